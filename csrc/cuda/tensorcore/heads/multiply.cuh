// Rows times a head's matrix, and the taps: one block to a (region, head, window).
//
//   kOutput         out = w S / (w . m + eps / f) + bias + taps over v, with phi = f w
//   kQueryTerms     1 / den = 1 / (w . m + eps / f) and g . o with o = w S / den
//   kValueGradient  dv = f w dS + transposed taps over g, and w . (dS v + dm)
//
// A warp takes 16 rows at once. The taps are products too: an mma m16n8k16 takes two of them; A is 16 pixels
// by eight channels at the shifts of both, B holds the weights of the channels on two 8x8 diagonals.
#pragma once

#include "../forward_output.cuh"
#include "pixels.cuh"

namespace flatten::cuda::tensorcore::heads {

/// What lies where in shared memory.
template <int kSlices>
struct MultiplyLayout {
  static constexpr int kWidth = kSlices * kSliceChannels, kBlocks = kWidth / 8;
  static constexpr int kFragments = (kBlocks + 1) * kSlices * 512;
  static constexpr int kZeros = 256, kStaging = 512;  // the latter of a warp: 16 rows of 16 channels
  int pairs, inverse, biases, most, offsets, words, staging, pixels, bytes;

  __host__ __device__ MultiplyLayout(const MultiplyParams& p, int warps) {
    pairs = (p.kernel_h * p.kernel_w + 1) / 2;
    inverse = kFragments;
    biases = inverse + kWidth * 4;
    most = biases + kWidth * 4;
    offsets = most + 128;
    words = offsets + (pairs * 8 + 127) / 128 * 128;
    staging = words + pairs * kWidth * 8 + (pairs ? kZeros : 0);
    pixels = staging + warps * kStaging;
    bytes = pixels + (pairs ? PixelBlock<kSlices>::bytes(p.region_h, p.region_w, p.kernel_h, p.kernel_w) : 0);
  }
};

/// Packs S and m of a head, times `scale`, into B fragments [block][slice][lane]. Word w of lane (g, t) has
/// rows 8t + 2w and 8t + 2w + 1 of column g; the block after the last is m, rounded in even columns and what
/// rounding left in odd ones.
template <typename T, int kSlices>
__device__ __forceinline__ void pack_matrix(uint4* fragments, const float* s, const float* m, int head_dim,
                                            float scale) {
  constexpr int kBlocks = kSlices * 4;
  const Lane lane;
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < (kBlocks + 1) * kSlices; i += blockDim.x / 32) {
    const int block = i / kSlices, row = (i - block * kSlices) * kSliceChannels + 8 * lane.t;
    const int column = block * 8 + lane.g;
    float v[8] = {};
    if (row < head_dim) {
      if (block == kBlocks) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x = m[row + j] * scale, upper = Pair<T>::unpack(Pair<T>::pack(x, 0.0f)).x;
          v[j] = lane.g % 2 ? x - upper : upper;
        }
      } else if (column < head_dim) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = s[(row + j) * head_dim + column] * scale;
      }
    }
    fragments[i * 32 + lane.index] = pack8<T>(v, 1.0f);
  }
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kMostWarps * 32, kSlices == 4 ? 1 : 2)
    multiply(const __grid_constant__ MultiplyParams params) {
  using Layout = MultiplyLayout<kSlices>;
  constexpr int kWidth = Layout::kWidth, kRows = kTileRows / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const Features& features = params.features;
  const Rows& rows = features.rows;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int head = blockIdx.y, head_dim = features.head_dim, first_channel = head * head_dim;
  const int index = blockIdx.x / params.regions, region_index = blockIdx.x - index * params.regions;
  const Window window(rows.grid, index);
  const Layout layout(params, warps);
  const int taps = params.kernel_h * params.kernel_w;
  Region region;
  if (taps) {
    region = rectangle(params, rows, region_index, true);
  } else {
    const int first = region_index * params.region_tokens;
    region = {first, min(params.region_tokens, rows.tokens - first), 0, 0, 0, 1};
  }
  const PixelBlock<kSlices> pixels{shared_address(shared) + layout.pixels,
                                   params.region_w + params.kernel_w - 1};
  if (taps) {
    pixels.load(params.pixels, rows, window, region, params.kernel_h, params.kernel_w, first_channel,
                head_dim);
  }

  // The first rows of the warp: on their way while the head's matrix is laid out.
  const int count = region.count();
  const auto tile_at = [&](int first) {
    return RowTile<T, kSlices, kRows>(
        features, index, [&](int i) { return region.at(rows, window, min(first + i, count - 1)); });
  };
  RowTile<T, kSlices, kRows> tile = tile_at(warp * kTileRows);
  RowWords<kSlices, kRows> w;
  tile.load(w, features.x, window.image, first_channel, head_dim);

  // ---- The head's matrix, its scale and its taps.
  float* inverse_scale = reinterpret_cast<float*>(shared + layout.inverse);
  float* biases = reinterpret_cast<float*>(shared + layout.biases);
  load_inverse_scale<T, kSlices>(inverse_scale, features, head);
  const int64_t channels = static_cast<int64_t>(features.heads) * head_dim;
  const float* state = params.state + index * channels * (head_dim + 1);
  const float *s = state + static_cast<int64_t>(first_channel) * head_dim,
              *m = state + channels * head_dim + first_channel;
  const float scale = scale_of_head<T>(s, m, head_dim, reinterpret_cast<unsigned*>(shared + layout.most));
  pack_matrix<T, kSlices>(reinterpret_cast<uint4*>(shared), s, m, head_dim, scale);
  if (taps) {
    const int kernel = params.per_channel ? first_channel : 0;
    int* offsets = reinterpret_cast<int*>(shared + layout.offsets);
    for (int tap = threadIdx.x; tap < 2 * layout.pairs; tap += blockDim.x) {
      offsets[tap] = tap_offset<kSlices>(tap, params.kernel_h, params.kernel_w, pixels.row_pixels);
    }
    // [pair][channel][tap of the pair]: a word whose half for the channel holds the weight.
    uint32_t* words = reinterpret_cast<uint32_t*>(shared + layout.words);
#pragma unroll 4
    for (int i = threadIdx.x; i < head_dim * taps; i += blockDim.x) {
      const int c = i / taps, from = i - c * taps, tap = params.mirrored ? taps - 1 - from : from;
      const float weight = element<T>(params.weight, static_cast<int64_t>(kernel) * taps + i);
      words[(tap / 2 * kWidth + c) * 2 + tap % 2] =
          c % 2 ? Pair<T>::pack(0.0f, weight) : Pair<T>::pack(weight, 0.0f);
    }
    if (taps % 2) {
      for (int c = threadIdx.x; c < head_dim; c += blockDim.x) words[(taps / 2 * kWidth + c) * 2 + 1] = 0;
    }
    for (int i = threadIdx.x; i < Layout::kZeros / 4; i += blockDim.x) {
      words[layout.pairs * kWidth * 2 + i] = 0;
    }
    for (int c = threadIdx.x; c < kWidth; c += blockDim.x) {
      biases[c] = params.bias.data && c < head_dim ? element<T>(params.bias, kernel + c) : 0.0f;
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  const uint32_t fragments = shared_address(shared) + lane.index * 16;
  const bool diagonal = lane.g / 2 == lane.t;
  const uint32_t first_word =
      shared_address(shared) + layout.words + (diagonal ? lane.g * 8 : layout.pairs * kWidth * 8);
  const uint32_t offsets = shared_address(shared) + layout.offsets + lane.index / 16 * 4;
  const Staging turn(shared_address(shared) + layout.staging + warp * Layout::kStaging, lane);
  const float room = kPowerRoom<T> * scale;  // of w times the packed matrix
  // The numbers of `other` that an n-block is multiplied with.
  const auto load_other = [&](uint32_t (&to)[2][kRows], int channel) {
    if (!params.other.data) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = channel + half * 8;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        to[half][r] = 0;
        if (c >= head_dim) continue;
        to[half][r] = *reinterpret_cast<const uint32_t*>(
            row_of(params.other, window.image, tile.spot[r].token, first_channel + c + 2 * lane.t));
      }
    }
  };
#pragma unroll 1
  for (int first = warp * kTileRows; first < count;) {
    tile.raise(w, features, inverse_scale, first_channel);
    const auto times_matrix = [&](float (&d)[1][4], int block) {
      times_block<T>(d, w, fragments + block * kSlices * 512);
    };
    float d[1][4], normalizer[kRows], dot[kRows];
    times_matrix(d, Layout::kBlocks);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float mean = d[0][r * 2] + d[0][r * 2 + 1];
      const bool of_value = params.product == Product::kValueGradient;
      dot[r] = of_value && lane.t == 0 ? mean : 0.0f;  // summed over the quad later
      normalizer[r] = of_value ? tile.norms[r].y / room : 1.0f / (mean + params.eps * room / tile.norms[r].y);
    }
    const uint32_t tap_pixel = taps ? pixels.first_tap(region, first + lane.index % 16) : 0;
    // The lane writes vector lane % 2 of the sixteen channels of row lane / 2.
    char* to = nullptr;
    const bool inside = first + lane.index / 2 < count;
    if (params.out.data) {
      const int token = region.at(rows, window, min(first + lane.index / 2, count - 1)).token;
      to = const_cast<char*>(row_of(params.out, window.image, token, first_channel + lane.index % 2 * 8));
    }
    // Sixteen channels at a time.
    unrolled<kWidth / 16>([&](auto pair_of_blocks) {
      constexpr int kFirst = pair_of_blocks * 16;
      if (kFirst >= head_dim) return;
      float c[2][4];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float2 start = {};
        if (taps) start = *reinterpret_cast<const float2*>(biases + kFirst + b * 8 + 2 * lane.t);
#pragma unroll
        for (int r = 0; r < kRows; ++r) c[b][r * 2] = start.x, c[b][r * 2 + 1] = start.y;
      }
      if (taps) {
        uint32_t word = first_word + (diagonal ? kFirst * 8 : 0), offset = offsets;
#pragma unroll 4
        for (int pair = 0; pair < layout.pairs; ++pair, offset += 8, word += diagonal ? kWidth * 8 : 0) {
          uint32_t shift;
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(shift) : "r"(offset));
          unrolled<2>([&](auto b) {
            uint32_t weights[2];
            asm volatile("ld.shared.v2.b32 {%0,%1}, [%2+%3];"
                         : "=r"(weights[0]), "=r"(weights[1])
                         : "r"(word), "n"(b * 64));
            uint32_t a[4];
            load_matrix_x4<kFirst * 2 + b * 16>(a, tap_pixel + shift);
            mma<T>(c[b], a[0], a[1], a[2], a[3], weights[0], weights[1], c[b]);
          });
        }
        if (first < region.linear) {  // tokens before the map have no taps
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (first + lane.g + 8 * r >= region.linear) continue;
#pragma unroll
            for (int b = 0; b < 2; ++b) c[b][r * 2] = c[b][r * 2 + 1] = 0.0f;
          }
        }
      }
      uint32_t other[2][kRows];
      load_other(other, kFirst);
      unrolled<2>([&](auto half) {
        times_matrix(d, kFirst / 8 + half);
        if (params.other.data) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float2 x = Pair<T>::unpack(other[half][r]);
            dot[r] = fmaf(x.x, d[0][r * 2], dot[r]);
            dot[r] = fmaf(x.y, d[0][r * 2 + 1], dot[r]);
          }
        }
        if (!params.out.data) return;
        unrolled<kRows>([&](auto r) {
          const float* o = &c[half][r * 2];
          turn.put<half, r>(Pair<T>::pack(fmaf(d[0][r * 2], normalizer[r], o[0]),
                                          fmaf(d[0][r * 2 + 1], normalizer[r], o[1])));
        });
      });
      if (!params.out.data) return;
      uint32_t vector[4];
      __syncwarp();
      load_shared<0>(vector, turn.read);
      __syncwarp();
      if (kFirst + lane.index % 2 * 8 < head_dim) {
        store_below<0, kFirst * 2>(inside, to, vector);
      }
    });
    if (params.terms) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        dot[r] += shuffle_xor<1>(dot[r]);
        dot[r] += shuffle_xor<2>(dot[r]);
        if (lane.t != 0 || first + lane.g + 8 * r >= count) continue;
        const int64_t at =
            (static_cast<int64_t>(index) * rows.tokens + tile.spot[r].local) * features.heads + head;
        if (params.product == Product::kQueryTerms) {
          reinterpret_cast<float2*>(params.terms)[at] =
              make_float2(normalizer[r] * room, dot[r] * normalizer[r]);
        } else {
          params.terms[at] = dot[r] / room;
        }
      }
    }
    first += warps * kTileRows;
    if (first >= count) break;
    tile = tile_at(first);
    tile.load(w, features.x, window.image, first_channel, head_dim);
  }
}

}  // namespace flatten::cuda::tensorcore::heads

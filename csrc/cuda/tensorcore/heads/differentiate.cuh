// The gradient through phi: dq or dk, and scale's. One block to a (chunk of rows, head, window).
//
// With z = prescale y, w = z^p, phi = f w, and r the gradient of phi (of q: over the gain 1 / f):
//   q:  r f = (g S^T) / den - (g . o) / den m      T = sum over heads of (g . o) / den times eps / f
//   k:  r = v dS^T + dm                            T = sum over heads of w . r
//   dy = gain (p z^(p - 1) (r - T / |w|^2 w) + T / |z|^2 z),   gain = prescale for q, prescale f for k
// multiply.cuh leaves the parts of T. g and v are operands as they are; all else is fp32.
#pragma once

#include "rows.cuh"

namespace flatten::cuda::tensorcore::heads {

template <int kSlices>
struct DifferentiateTraits {
  static constexpr int kWidth = kSlices * kSliceChannels, kBlocks = kWidth / 8;
  static constexpr int kFragments = kBlocks * kSlices * 512;
  static constexpr int kInverse = kFragments, kMean = kInverse + kWidth * 4, kMost = kMean + kWidth * 4;
  static constexpr int kSums = kMost + 128;
  static constexpr int kShared = kSums + kMostWarps * kWidth * 4;
};

/// B fragments of the transposed matrix, times `scale`: the columns of an n-block are channels in the order
/// of the lanes' vectors, so that lane t's two columns of the four blocks of a slice are its eight channels.
template <typename T, int kSlices>
__device__ __forceinline__ void pack_transposed(uint4* fragments, const float* s, int head_dim, float scale) {
  const Lane lane;
  for (int i = threadIdx.x / 32; i < kSlices * 4 * kSlices; i += blockDim.x / 32) {
    const int block = i / kSlices, row = (i - block * kSlices) * kSliceChannels + 8 * lane.t;
    const int column = block / 4 * kSliceChannels + lane.g / 2 * 8 + block % 4 * 2 + lane.g % 2;
    float v[8] = {};
    if (row < head_dim && column < head_dim) load8(v, s + column * head_dim + row);
    fragments[i * 32 + lane.index] = pack8<T>(v, scale);
  }
}

/// z^(p - 1).
__device__ __forceinline__ float raise_less(float z, float power) {
  return power == 1.0f ? 1.0f : power == 3.0f ? z * z : exp_2((power - 1.0f) * log_2(z));
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kMostWarps * 32, kSlices == 4 ? 1 : 2)
    differentiate(const __grid_constant__ DifferentiateParams params) {
  using Traits = DifferentiateTraits<kSlices>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const Features& features = params.features;
  const FocusParams& focus = features.focus;
  const Rows& rows = features.rows;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int heads = features.heads, head = blockIdx.y, head_dim = features.head_dim,
            first_channel = head * head_dim;
  const int index = blockIdx.x / params.chunks, chunk = blockIdx.x - index * params.chunks;
  const Window window(rows.grid, index);
  const int begin = chunk * params.chunk, count = min(params.chunk, rows.tokens - begin);

  // The first rows of the warp: on their way while the head's matrix is laid out.
  constexpr int kRows = kTileRows / 8;
  using Tile = RowTile<T, kSlices, kRows>;
  const auto tile_at = [&](int first) {
    return Tile(features, index,
                [&](int i) { return row_spot(rows, window, begin + min(first + i, count - 1)); });
  };
  Tile tile = tile_at(warp * kTileRows);
  RowWords<kSlices, kRows> other, x;
  tile.load(other, params.other, window.image, first_channel, head_dim);
  tile.load(x, features.x, window.image, first_channel, head_dim);

  float* inverse_scale = reinterpret_cast<float*>(shared + Traits::kInverse);
  float* mean = reinterpret_cast<float*>(shared + Traits::kMean);
  load_inverse_scale<T, kSlices>(inverse_scale, features, head);
  const int64_t channels = static_cast<int64_t>(heads) * head_dim;
  const float* state = params.state + index * channels * (head_dim + 1);
  const float *s = state + static_cast<int64_t>(first_channel) * head_dim,
              *m = state + channels * head_dim + first_channel;
  const float scale = scale_of_head<T>(s, m, head_dim, reinterpret_cast<unsigned*>(shared + Traits::kMost));
  pack_transposed<T, kSlices>(reinterpret_cast<uint4*>(shared), s, head_dim, scale);
  for (int c = threadIdx.x; c < Traits::kWidth; c += blockDim.x) mean[c] = c < head_dim ? m[c] : 0.0f;
  __syncthreads();

  const uint32_t fragments = shared_address(shared) + lane.index * 16;
  const bool mapped = focus.mode != kNoMapping;
  float sums[kSlices][8] = {};
#pragma unroll 1
  for (int first = warp * kTileRows; first < count;) {
    // r = by_product (other S^T) + by_mean m; T over |w|^2 and |z|^2.
    float by_product[kRows], by_mean[kRows], by_power[kRows], by_linear[kRows], gain[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowNorms& norms = tile.norms[r];
      const int64_t at = (static_cast<int64_t>(index) * rows.tokens + tile.spot[r].local) * heads;
      float total = 0.0f;
      if (mapped) {
#pragma unroll 2
        for (int h = lane.t; h < heads; h += 4) {
          if (params.of_key) {
            total += params.terms[at + h];
          } else {
            const float2 terms = reinterpret_cast<const float2*>(params.terms)[at + h];
            total = fmaf(terms.x, terms.y, total);
          }
        }
        total += shuffle_xor<1>(total);
        total += shuffle_xor<2>(total);
      }
      if (params.of_key) {
        by_product[r] = 1.0f / scale, by_mean[r] = 1.0f;
        gain[r] = norms.x * norms.y;
      } else {
        const float2 terms = reinterpret_cast<const float2*>(params.terms)[at + head];
        by_product[r] = terms.x / scale, by_mean[r] = -terms.x * terms.y;
        gain[r] = norms.x;
        total *= params.eps / norms.y;
      }
      const bool inside = first + lane.g + 8 * r < count;
      if (!inside) gain[r] = by_product[r] = by_mean[r] = total = 0.0f;
      by_linear[r] = total * norms.z, by_power[r] = total * norms.w;
      if (!(norms.y > 0.0f || norms.y < 0.0f)) by_linear[r] = by_power[r] = norms.y;  // 0 or NaN
    }
    unrolled<kSlices>([&](auto slice) {
      constexpr int kFirst = slice * kSliceChannels;
      if (kFirst >= head_dim) return;
      const int c = kFirst + 8 * lane.t;
      const bool has_channels = c < head_dim;
      unrolled<4>([&](auto word) {
        float d[kRows / 2][4];
        times_block<T>(d, other, fragments + (slice * 4 + word) * kSlices * 512);
        const float2 inverse = *reinterpret_cast<const float2*>(inverse_scale + c + 2 * word);
        const float2 means = *reinterpret_cast<const float2*>(mean + c + 2 * word);
        float2 sum = {sums[slice][2 * word], sums[slice][2 * word + 1]};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float2 input = Pair<T>::unpack(x.words[slice][r][word]);
          if (focus.key_bias.data && has_channels) {
            const int64_t at = tile.spot[r].local * channels + first_channel + c + 2 * word;
            input.x += element<T>(focus.key_bias, at), input.y += element<T>(focus.key_bias, at + 1);
          }
          const float prescale = tile.norms[r].x;
          const auto gradient = [&](float value, float a, float product, float average, float& sum) {
            const float given = fmaf(by_product[r], product, by_mean[r] * average);
            if (!mapped) return given * gain[r];
            const float z = fmaf(relu(value), a, focus.eps * a) * prescale;
            const float less = raise_less(z, focus.power);
            const float rest = fmaf(-by_power[r], less * z, given);
            const float dz = fmaf(focus.power * less, rest, by_linear[r] * z) * gain[r];
            sum = fmaf(dz, z * __fdividef(1.0f, prescale), sum);
            return value > 0.0f ? dz * a : 0.0f;
          };
          const float* pair = &d[r / 2][r % 2 * 2];
          const float low = gradient(input.x, inverse.x, pair[0], means.x, sum.x);
          x.words[slice][r][word] = Pair<T>::pack(low, gradient(input.y, inverse.y, pair[1], means.y, sum.y));
        }
        sums[slice][2 * word] = sum.x, sums[slice][2 * word + 1] = sum.y;
      });
      if (!has_channels || !params.gradient.data) return;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + lane.g + 8 * r >= count) continue;
        const uint32_t (&words)[4] = x.words[slice][r];
        *reinterpret_cast<uint4*>(
            const_cast<char*>(row_of(params.gradient, window.image, tile.spot[r].token, first_channel + c))) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    });
    first += warps * kTileRows;
    if (first >= count) break;
    tile = tile_at(first);
    tile.load(other, params.other, window.image, first_channel, head_dim);
    tile.load(x, features.x, window.image, first_channel, head_dim);
  }
  if (!params.scale_partials) return;

  // ---- The gradient of scale: over the lanes of a warp, then over warps.
  float* shared_sums = reinterpret_cast<float*>(shared + Traits::kSums);
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = sums[slice][i];
      sum += shuffle_xor<4>(sum);
      sum += shuffle_xor<8>(sum);
      sum += shuffle_xor<16>(sum);
      if (lane.g == 0) shared_sums[warp * Traits::kWidth + slice * kSliceChannels + 8 * lane.t + i] = sum;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < head_dim; c += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += shared_sums[i * Traits::kWidth + c];
    params.scale_partials[blockIdx.x * channels + first_channel + c] = -sum * inverse_scale[c];
  }
}

}  // namespace flatten::cuda::tensorcore::heads

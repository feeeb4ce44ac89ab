// dq, and the gradients of S and m by parts: one block to a (chunk of tokens, window).
//
// With Q = f w (row_gradient.cuh), den = w . m + eps / f and o = w S / den, f cancels between Q and the rest:
//   dS  = sum of w^T (g / den)          dm = -sum of share w,  share = (g . o) / den
//   r   = (g / den) S^T - share m       the gradient of phi(q), times f
// A warp owns a head and 32 tokens of a step; head_dim 64: one block in z for each half of the rows of S; w
// and g / den are fragments of A as they come from memory, and of A^T and B after movmatrix.
#pragma once

#include "forward_state.cuh"
#include "row_gradient.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim>
struct QueryGradientTraits {
  static constexpr int kSlices = kHeadDim / kSliceChannels;
  static constexpr int kBlocks = kSlices * 4;
  static_assert(kHeadDim == 32, "dS of a larger head would not fit in the warp's registers");
  static constexpr int kTile = Focus<T, kSlices, kAnyPower>::kTileBytes;
  // Of a head: S, S^T and m. Of a warp: two stages of q, one of grad_out.
  static constexpr int kFragments = (2 * kBlocks + 1) * kSlices * 512;
  static constexpr __host__ __device__ int shared_bytes(int channels, int groups) {
    const int heads = channels / kHeadDim;
    const int work = groups * heads * 3 * kTile;
    const int reduction = heads * StateTraits<T, kHeadDim>::accumulator_bytes();
    return channels * 12 + heads * kFragments + SliceGroup::shared_bytes(groups, heads) +
           (work > reduction ? work : reduction);
  }
};

template <typename T, int kHeadDim, int kMode>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_query(const __grid_constant__ QueryGradientParams params) {
#if __CUDA_ARCH__ >= 800
  using Traits = QueryGradientTraits<T, kHeadDim>;
  constexpr int kSlices = Traits::kSlices, kBlocks = Traits::kBlocks;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int channels = params.channels, heads = channels / kHeadDim;
  const int warp = threadIdx.x / 32, group_index = warp / heads, head = warp % heads;
  const int begin = blockIdx.x * params.chunk, end = min(begin + params.chunk, params.queries);
  const Window window(params.grid, blockIdx.y);
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;

  // Shared memory: 1 / scale, m, sums for scale, fragments, exchange, the warps' tiles.
  float* inverse_scale = reinterpret_cast<float*>(shared);
  float* mean = inverse_scale + channels;
  float* scale_sums = mean + channels;
  uint4* fragments =
      reinterpret_cast<uint4*>(scale_sums + channels) + head * (Traits::kFragments / 16) + lane.index;
  unsigned char* exchange = shared + channels * 12 + heads * Traits::kFragments;
  unsigned char* tiles = exchange + SliceGroup::shared_bytes(params.groups, heads);
  SliceGroup group(exchange, group_index, params.groups, head, heads);
  const uint4 *s_fragments = fragments, *st_fragments = fragments + kBlocks * kSlices * 32;
  const uint4* m_fragments = fragments + 2 * kBlocks * kSlices * 32;

  const int64_t state_size = static_cast<int64_t>(channels) * (kHeadDim + 1);
  const float* state = params.state + blockIdx.y * state_size;
  const float* s = state + head * kHeadDim * kHeadDim;
  const float* m = state + channels * kHeadDim;
  load_inverse_scale<T>(inverse_scale, params.focus, channels);
  for (int c = threadIdx.x; c < channels; c += blockDim.x) mean[c] = m[c];
  if (group_index == 0) {
    pack_matrix<T, kSlices, true>(fragments, lane, [&](int k, int n) { return s[k * kHeadDim + n]; });
    pack_matrix<T, kSlices, true>(fragments + kBlocks * kSlices * 32, lane,
                                  [&](int k, int n) { return s[n * kHeadDim + k]; });
#pragma unroll
    for (int slice = 0; slice < kSlices;
         ++slice) {  // m: its upper half in even columns, the rest in odd ones
      uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float part[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float v = m[head * kHeadDim + slice * kSliceChannels + 8 * lane.t + 2 * w + e];
          const float upper = Pair<T>::unpack(Pair<T>::pack(v, 0.0f)).x;
          part[e] = lane.g % 2 ? v - upper : upper;
        }
        word[w] = Pair<T>::pack(part[0], part[1]);
      }
      fragments[(2 * kBlocks * kSlices + slice) * 32] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  // ---- The lane's vectors of q and grad_out; tokens past the end repeat the last one.
  const int first_channel = head * kHeadDim + 8 * lane.t;
  const auto base = [&](const TokenArray& x) {
    return static_cast<const char*>(x.data) + window.image * x.image + first_channel * 2;
  };
  const char *query = base(params.query), *grad = base(params.grad_out);
  char* to = const_cast<char*>(base(params.grad_query));
  uint32_t query_tile = shared_address(tiles) + warp * 3 * Traits::kTile + lane.index * 16;
  int other_tile = Traits::kTile;
  const uint32_t grad_tile = query_tile + 2 * Traits::kTile;
  using QueryFocus = Focus<T, kSlices, kMode>;
  int token[4];
  const auto load = [&](uint32_t tile, int first) {
    window.tokens(token, params.grid, first + lane.g, end - 1);
    unrolled<4>([&](auto r) {
      const char* q = query + static_cast<int64_t>(token[r]) * params.query.token;
      const char* g = grad + static_cast<int64_t>(token[r]) * params.grad_out.token;
      unrolled<kSlices>([&](auto slice) {
        copy_async<QueryFocus::offset(slice, r), slice * 64>(tile, q);
        copy_async<QueryFocus::offset(slice, r), slice * 64>(grad_tile, g);
      });
    });
    copy_async_commit();
  };

  StateAccumulator<T, kHeadDim> sum;  // of the 32 rows of S that are this block's in z
  float scale_sum[kSlices][8] = {};
  const int stride = params.groups * kTileTokens;
  int first = begin + group_index * kTileTokens;
  load(query_tile, first);
  __syncthreads();
  const QueryFocus focus(params.focus, inverse_scale + first_channel, group, lane);
  for (; first < end; first += stride) {
    copy_async_wait<0>();
    TileWords<kSlices> w;
    Norms norms;
    focus(
        query_tile,
        [&](const float (&powers)[kSlices][4][8]) {
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                w[slice][r][i] = Pair<T>::pack(powers[slice][r][2 * i], powers[slice][r][2 * i + 1]);
              }
            }
          }
        },
        [&](const Norms& own) { norms = own; });

    // g / den and share. A token past the end has neither.
    TileWords<kSlices> g;
    unrolled<kSlices>([&](auto slice) {
      unrolled<4>([&](auto r) { load_shared<QueryFocus::offset(slice, r)>(g[slice][r], grad_tile); });
    });
    float share[4] = {}, inverse[4], d[2][4];
    times<T, kSlices>(d, w, m_fragments);
    quad_gather(inverse, __fdividef(params.eps, phi_factor(norms)));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float den = d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1] + inverse[r];
      inverse[r] = first + lane.g + 8 * r < end ? __fdividef(1.0f, den) : 0.0f;
    }
    unrolled<kBlocks>([&](auto b) {
      times<T, kSlices>(d, w, s_fragments + b * kSlices * 32);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t& word = g[b / 4][r][b % 4];
        const float2 x = Pair<T>::unpack(word);
        share[r] = fmaf(x.x, d[r / 2][r % 2 * 2], fmaf(x.y, d[r / 2][r % 2 * 2 + 1], share[r]));
        word = Pair<T>::pack(x.x * inverse[r], x.y * inverse[r]);
      }
    });
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      share[r] += shuffle_xor<1>(share[r]);
      share[r] += shuffle_xor<2>(share[r]);
      share[r] *= inverse[r] * inverse[r];
    }
    int out[4];  // tokens
#pragma unroll
    for (int r = 0; r < 4; ++r) out[r] = token[r];
    if (first + stride < end) load(query_tile + other_tile, first + stride);

    // r, first for its product with w, over the warps of all heads. Blocks of another z leave dq alone.
    const auto r_block = [&](int b, float (&r)[2][4]) {
      times<T, kSlices>(r, g, st_fragments + b * kSlices * 32);
      const float* m_pair = mean + first_channel + b / 4 * kSliceChannels + b % 4 * 2;
#pragma unroll
      for (int row = 0; row < 4; ++row) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          r[row / 2][row % 2 * 2 + e] = fmaf(-share[row], m_pair[e], r[row / 2][row % 2 * 2 + e]);
        }
      }
    };
    if (blockIdx.z == 0) {
      float dot[4] = {};
      unrolled<kBlocks>([&](auto b) {
        r_block(b, d);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 x = Pair<T>::unpack(w[b / 4][r][b % 4]);
          dot[r] = fmaf(x.x, d[r / 2][r % 2 * 2], fmaf(x.y, d[r / 2][r % 2 * 2 + 1], dot[r]));
        }
      });
      // Or the compiler would see that the products below are those above, and keep them.
      unrolled<kBlocks>([&](auto b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) keep(g[b / 4][r][b % 4]);
      });
      const auto plus = [](float2 a, float2 b) { return float2{a.x + b.x, 0.0f}; };
      const float total = group.exchange({quad_sum(dot, lane.t), 0.0f}, lane.index, plus).x;
      const RowTerms terms(total, norms);
      gradient_rows<T, kSlices, kMode>(query_tile, NoBias{}, inverse_scale + first_channel, params.focus,
                                       terms, scale_sum, r_block, [&](int slice, int r, uint4 v) {
                                         if (first + lane.g + 8 * r >= end) return;
                                         char* row =
                                             to + static_cast<int64_t>(out[r]) * params.grad_query.token;
                                         *reinterpret_cast<uint4*>(row + slice * 64) = v;
                                       });
    }

    // dS and dm: fragments of w^T and, as B, of g / den and of -share (its upper half, and what that leaves).
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t share_column[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = -share[2 * step + half];
        const float upper = Pair<T>::unpack(Pair<T>::pack(value, 0.0f)).x;
        share_column[half] = transpose8x8(lane.t == 0 ? Pair<T>::pack(upper, value - upper) : 0u);
      }
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * step + half;
          const uint32_t word = kSlices == 1 || blockIdx.z == 0 ? w[0][r][i] : w[kSlices - 1][r][i];
          a[i / 2][2 * half + i % 2] = transpose8x8(word);
        }
      }
      const auto product = [&](float (&c)[2][4], uint32_t b0, uint32_t b1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma<T>(c[i], a[i][0], a[i][1], a[i][2], a[i][3], b0, b1, c[i]);
      };
      product(sum.m, share_column[0], share_column[1]);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        product(sum.s[b], transpose8x8(g[b / 4][2 * step][b % 4]),
                transpose8x8(g[b / 4][2 * step + 1][b % 4]));
      }
    }
    query_tile += other_tile;
    other_tile = -other_tile;
  }

  // ---- Partial sums: over the groups in order, then to memory.
  copy_async_wait<0>();
  if (params.scale_partials && blockIdx.z == 0) {
    store_scale<kSlices>(params.scale_partials + block * channels, scale_sums, inverse_scale, scale_sum,
                         head * kHeadDim, group_index, params.groups, lane);
  }
  float* staging = reinterpret_cast<float*>(tiles + head * StateTraits<T, kHeadDim>::accumulator_bytes());
  for (int other = 1; other < params.groups; ++other) {
    __syncthreads();
    if (group_index == other) sum.send(staging, lane.index);
    __syncthreads();
    if (group_index == 0) sum.receive(staging, lane.index);
  }
  if (group_index == 0) {
    sum.store_tile_order(params.partial + block * state_size, channels, head * kSlices + blockIdx.z,
                         params.inverse_keys, lane);
  }
#endif
}

}  // namespace flatten::cuda::tensorcore

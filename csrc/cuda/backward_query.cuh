// dq, and the gradients of S and m by parts: one block to a (chunk of tokens, window).
//
// With Q = f w (row_gradient.cuh), den = w . m + eps / f and o = w S / den, f cancels between Q and the rest:
//   dS  = sum of w^T (g / den)          dm = -sum of share w,  share = (g . o) / den, of a head
//   r   = (g / den) S^T - share m       the gradient of phi(q), times f
//   T   = w . r = eps / f * sum of the heads' shares: o does not change with the length of phi(q) but for eps
#pragma once

#include "row_gradient.cuh"
#include "state_gradient.cuh"

namespace flatten::cuda::tensorcore {

/// Tokens begin + 32 (group + n groups) and on of a window, up to `end`: adds their part of dS and dm to
/// `sum` and of scale's gradient to scale_sums. The block holds S and m.
template <typename T, int kHeadDim, int kMode, int kStages, typename Sums>
__device__ __forceinline__ void query_pass(const BackwardBlock<kHeadDim, kStages>& block, SliceGroup& group,
                                           const QueryGradientParams& params, const Window& window, int begin,
                                           int end, StateGradient<T, kHeadDim>& sum, Sums& scale_sums) {
  using Layout = BackwardLayout<kHeadDim, kStages>;
  constexpr int kPartners = Layout::kPartners;
  const Lane& lane = block.lane;
  const int first_channel = block.first_channel();
  const float* inverse_scale = block.inverse_scale(block.slice) + 8 * lane.t;
  const float* mean = block.mean(block.slice) + 8 * lane.t;
  const auto base = [&](const TokenArray& x) {  // made where it is used: it takes no registers between
    int image = window.image, first = first_channel;
    keep(image), keep(first);
    return static_cast<const char*>(x.data) + image * x.image + first * 2u;
  };

  // The lane's vectors of q and grad_out; tokens past the end repeat the last one.
  int token[4], stage = 0;
  const auto load = [&](int at, int first) {
    window.tokens(token, params.grid, first + lane.g, end - 1);
    const char *query = base(params.query), *grad = base(params.grad_out);
    unrolled<4>([&](auto r) {
      copy_async<r * 512, 0>(block.tile + at, query + static_cast<int64_t>(token[r]) * params.query.token);
      copy_async<Layout::kSecond + r * 512, 0>(block.tile + at,
                                               grad + static_cast<int64_t>(token[r]) * params.grad_out.token);
    });
    copy_async_commit();
  };
  const int stride = block.groups * kTileTokens;
  int first = begin + block.group * kTileTokens;
  load(stage, first);
  const Focus<T, 1, kMode> focus(params.focus, inverse_scale, group, lane);
  for (; first < end; first += stride) {
    const uint32_t query_tile = block.tile + stage;
    copy_async_wait<0>();
    TileWords<1> w;
    const Norms norms = focus.pack(query_tile, [&](const float (&powers)[1][4][8]) {
      pack_tile<T>(w[0], powers[0]);
      if constexpr (kPartners > 1) store_tile(block.tile + Layout::kShared, w[0]);
    });
    int out[4];  // tokens
#pragma unroll
    for (int r = 0; r < 4; ++r) out[r] = token[r];
    if (kStages > 1 && first + stride < end) load(stage ^ Layout::kTile, first + stride);

    // share, and g / den in the place of g. A token past the end has neither.
    const float own_eps = __fdividef(params.eps, phi_factor(norms));
    float share[4], own_share;
    {
      TileWords<kPartners> all;
      if constexpr (kPartners > 1) {
        block.load_tiles(all, block.tile + Layout::kShared);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) all[0][i / 4][i % 4] = w[0][i / 4][i % 4];
      }
      float d[2][4];
      times<T, kPartners>(d, all, block.mean_block());
      float eps[4], inverse[Layout::kHeads][4], shares[Layout::kHeads][4] = {};
      quad_gather(eps, own_eps);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float den = d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1] + eps[r];
        const float own = first + lane.g + 8 * r < end ? __fdividef(1.0f, den) : 0.0f;
        inverse[0][r] = own;
        if constexpr (Layout::kHeads == 2) {  // own: of head t / 2
          const float other = shuffle_xor<2>(own);
          inverse[0][r] = lane.t < 2 ? own : other;
          inverse[1][r] = lane.t < 2 ? other : own;
        }
      }
      const int grad_tile = stage + Layout::kSecond;
      const uint32_t grad_row = block.block_row(lane.index / 8, 0) + grad_tile;
      unrolled<4>([&](auto b) {
        times<T, kPartners>(d, all, block.row_block(b));
        uint32_t g[4];  // channels 8 b + 2t of token g + 8r
        load_matrix_x4<0>(g, grad_row ^ b * 16);
        __syncwarp();  // before words take the place of others' rows
        constexpr int head = b * Layout::kHeads / 4;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 x = Pair<T>::unpack(g[r]);
          float& sum = shares[head][r];
          sum = fmaf(x.x, d[r / 2][r % 2 * 2], fmaf(x.y, d[r / 2][r % 2 * 2 + 1], sum));
          g[r] = Pair<T>::pack(x.x * inverse[head][r], x.y * inverse[head][r]);
        }
        const uint32_t to = block.word(block.warp_tile() + grad_tile, b);
        unrolled<4>([&](auto r) { store_shared<r * 512>(to, g[r]); });
      });
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        share[r] = shares[0][r] * inverse[0][r] * inverse[0][r];
        if constexpr (Layout::kHeads == 2) {
          const float first_head = share[r], second_head = shares[1][r] * inverse[1][r] * inverse[1][r];
          share[r] = first_head + second_head;
          shares[0][r] = lane.t < 2 ? first_head : second_head;  // of head t / 2, and of the other
          shares[1][r] = lane.t < 2 ? second_head : first_head;
        }
      }
      own_share = quad_sum(share, lane.t);
      if constexpr (Layout::kHeads == 2) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          share[r] = shares[0][r] + shuffle_xor<2>(shares[1][r]);
          share[r] += shuffle_xor<1>(share[r]);
        }
      }
    }
    const auto plus = [](float2 a, float2 b) { return float2{a.x + b.x, 0.0f}; };
    const float dot = group.exchange({own_share, 0.0f}, lane.index, plus).x * own_eps;
    if constexpr (kPartners > 1) {
      own_share = 0.0f;
#pragma unroll
      for (int p = 0; p < kPartners; ++p)
        own_share += group.brought(block.slice - block.partner + p, lane.index).x;
    }
    if constexpr (Layout::kHeads == 1) quad_gather(share, own_share);
#pragma unroll
    for (int r = 0; r < 4; ++r) share[r] = -share[r];

    uint32_t x[4][4];
    unrolled<4>([&](auto r) { load_shared<r * 512>(x[r], query_tile); });
    if constexpr (kPartners == 1) {  // w takes the place of q
      store_tile(query_tile, w[0]);
      __syncwarp();
    }
    sum.add(block, kPartners > 1 ? Layout::kShared : stage, stage + Layout::kSecond, share);

    TileWords<kPartners> u;
    block.load_tiles_in_order(u, block.block_row(lane.index / 8, 0) + stage + Layout::kSecond);
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    RowTerms terms(ones, 1.0f, dot, norms);
    const auto product = [&](auto b, float (&r)[2][4]) {
      const float2 m = *reinterpret_cast<const float2*>(mean + 2 * b);
      float start[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) start[i / 4][i % 4] = share[i / 2] * (i % 2 ? m.y : m.x);
      times<T, kPartners>(r, u, block.column_block(b), start);
    };
    gradient_rows<T, kMode>(x, LaneBias{}, inverse_scale, params.focus, terms, scale_sums, product);
    char* to = const_cast<char*>(base(params.grad_query));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (first + lane.g + 8 * r < end) {
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(out[r]) * params.grad_query.token) =
            make_uint4(x[r][0], x[r][1], x[r][2], x[r][3]);
      }
    }

    if constexpr (kStages > 1) {
      stage ^= Layout::kTile;
      __syncwarp();
    } else if (first + stride < end) {
      if (kPartners > 1) group.barrier();
      __syncwarp();
      load(stage, first + stride);
    }
  }
  copy_async_wait<0>();  // of a group without a step
}

template <typename T, int kHeadDim, int kMode>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_query(const __grid_constant__ QueryGradientParams params) {
#if __CUDA_ARCH__ >= 800
  constexpr int kStages = 2;
  extern __shared__ __align__(128) unsigned char shared[];
  const BackwardBlock<kHeadDim, kStages> block(shared, params.channels, params.groups);
  const Lane& lane = block.lane;
  const int begin = blockIdx.x * params.chunk, end = min(begin + params.chunk, params.queries);
  const Window window(params.grid, blockIdx.y);
  const int64_t index = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t state_size = static_cast<int64_t>(params.channels) * (kHeadDim + 1);

  load_inverse_scale<T>(block, params.focus);
  load_state<T, true>(block, params.state + blockIdx.y * state_size);
  StateGradient<T, kHeadDim> sum;
  SliceGroup group(block.exchange, block.group, params.groups, block.slice, block.slices);
  RegisterSums scale_sums;
  query_pass<T, kHeadDim, kMode>(block, group, params, window, begin, end, sum, scale_sums);

  // ---- Partial sums: over the groups in order, then to memory.
  if (params.scale_partials) {
    store_scale(params.scale_partials + index * params.channels, block, scale_sums, block.slice, block.group,
                params.groups, lane);
  }
  sum.add_groups(block);
  if (block.group == 0) {
    sum.scale(params.inverse_keys);
    sum.store_matrix(params.partial + index * state_size, block.slice, lane);
    sum.store_mean(
        params.partial + index * state_size + params.channels * kHeadDim + block.slice * kSliceChannels,
        lane);
  }
#endif
}

}  // namespace flatten::cuda::tensorcore

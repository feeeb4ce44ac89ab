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

/// Takes the tokens begin + 32 (group + n groups) and on of a window, up to `end`: computes their dq, and
/// adds their parts of dS and dm to `sum` and of scale's gradient to scale_sums. The block holds S and m.
template <typename T, int kHeadDim, int kStages, bool kShort, typename Sums>
__device__ __forceinline__ void query_pass(const BackwardBlock<kHeadDim, kStages, kShort>& block,
                                           SliceGroup& group, const QueryGradientParams& params,
                                           const Window& window, int begin, int end,
                                           StateGradient<T, kHeadDim>& sum, Sums& scale_sums) {
  using Layout = BackwardLayout<kHeadDim, kStages>;
  constexpr int kPartners = Layout::kPartners;
  static_assert(kStages == 1 || !kShort, "tokens are found again after the next ones have been loaded");
  const Lane& lane = block.lane;
  const float* inverse_scale = block.inverse_scale(block.slice) + 8 * lane.t;
  const float* mean = block.mean(block.slice) + 8 * lane.t;
  const auto base = [&](const TokenArray& x) { return block.base(x, window.image, 8 * lane.t); };

  // The lane's vectors of q and grad_out; tokens past the end repeat the last one.
  int token[4], stage = 0;
  const auto find = [&](int first) { window.tokens(token, params.grid, first + lane.g, end - 1); };
  const auto load = [&](int at, int first) {
    find(first);
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
  const Focus<T, 1, kRuntimeMode> focus(params.focus, inverse_scale, group, lane);
  for (; first < end; first += stride) {
    const uint32_t query_tile = block.tile + stage;
    copy_async_wait<0>();
    TileWords<1> w;
    float own_room;
    const Norms norms = focus.pack(query_tile, NoBias{}, [&](const float (&powers)[1][4][8]) {
      own_room = pack_powers<T, kPartners>(w.words, powers, group, lane);
      if constexpr (kPartners > 1) store_tile(block.tile + Layout::kShared, w.words[0]);
    });
    const int out[4] = {token[0], token[1], token[2], token[3]};
    if (kStages > 1 && first + stride < end) load(stage ^ Layout::kTile, first + stride);

    // Computes share, and g / den in the place of g. Both are zero for tokens past the end.
    const float own_eps = __fdividef(params.eps, phi_factor(norms));
    const float state_scale = block.template state_scale<T>();
    float share[4], own_share;
    {
      const auto all = block.tiles_of_head(w);
      float d[2][4];
      times<T, kPartners>(d, all, block.mean_block());
      float eps[4], inverse[Layout::kHeads][4], shares[Layout::kHeads][4] = {};
      quad_gather(eps, own_eps * own_room * state_scale);
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
      if constexpr (kNarrow<T>) {
        float largest = 0.0f;
        unrolled<4>([&](auto r) {
          uint32_t g[4];
          load_shared<r * 512>(g, block.tile + grad_tile);
          const bool second = Layout::kHeads == 2 && lane.t >= 2;  // head of the lane's channels
          const float own = second ? inverse[Layout::kHeads - 1][r] : inverse[0][r];
          largest = fmaxf(largest, Pair<T>::largest(g) * own);
        });
        sum.make_room(group.largest_of_partners<kPartners>(warp_max(largest), lane.index));
#pragma unroll
        for (int i = 0; i < 4 * Layout::kHeads; ++i) inverse[i / 4][i % 4] *= sum.u_scale.value;
      }
      const uint32_t grad_row = block.block_row(lane.index / 8, 0) + grad_tile;
      const auto quotients = [&](auto b) {
        times<T, kPartners>(d, all, block.row_block(b));
        uint32_t g[4];  // channels 8 b + 2t of token g + 8r
        load_matrix_x4<0>(g, grad_row ^ b * 16);
        __syncwarp();  // other lanes have read the rows whose place the words take
        const int head = Layout::kHeads == 1 ? 0 : b * Layout::kHeads / 4;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 x = Pair<T>::unpack(g[r]);
          float& sum = shares[head][r];
          sum = fmaf(x.x, d[r / 2][r % 2 * 2], fmaf(x.y, d[r / 2][r % 2 * 2 + 1], sum));
          g[r] = Pair<T>::pack(x.x * inverse[head][r], x.y * inverse[head][r]);
        }
        const uint32_t to = block.word(block.warp_tile() + grad_tile, b);
        unrolled<4>([&](auto r) { store_shared<r * 512>(to, g[r]); });
      };
      if constexpr (kPartners <= 2) {
        unrolled<4>(quotients);
      } else {  // with fewer registers
#pragma unroll 1
        for (int b = 0; b < 4; ++b) quotients(b);
      }
      const float unscale = kNarrow<T> ? __fdividef(1.0f, sum.u_scale.value) : 1.0f;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        share[r] = shares[0][r] * inverse[0][r] * (inverse[0][r] * unscale);
        if constexpr (Layout::kHeads == 2) {
          const float first_head = share[r],
                      second_head = shares[1][r] * inverse[1][r] * (inverse[1][r] * unscale);
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
    // In fp16 share and u = g / den carry the factor u_scale / (own_room state_scale), and r carries
    // u_scale / own_room.
    const float own_gain = kNarrow<T> ? __fdividef(own_room, sum.u_scale.value) : 1.0f;
    const float shares = group.exchange({own_share * own_gain * state_scale, own_share}, lane.index, plus).x;
    const float dot = shares * own_eps * (kNarrow<T> ? __fdividef(1.0f, own_gain) : 1.0f);
    if constexpr (kPartners > 1) {
      own_share = 0.0f;
#pragma unroll
      for (int p = 0; p < kPartners; ++p)
        own_share += group.brought(block.slice - block.partner() + p, lane.index).y;
    }
    if constexpr (Layout::kHeads == 1) quad_gather(share, own_share);
#pragma unroll
    for (int r = 0; r < 4; ++r) share[r] = -share[r];

    uint32_t x[4][4];
    const auto load_query = [&] { unrolled<4>([&](auto r) { load_shared<r * 512>(x[r], query_tile); }); };
    if constexpr (kPartners == 1) {  // w takes the place of q
      load_query();
      store_tile(query_tile, w.words[0]);
      __syncwarp();
    }
    sum.add(block, kPartners > 1 ? Layout::kShared : stage, stage + Layout::kSecond, share);
    if constexpr (kPartners > 1) load_query();

    const auto u = block.tiles_in_order(block.block_row(lane.index / 8, 0) + stage + Layout::kSecond);
    float gain[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if constexpr (kNarrow<T>) quad_gather(gain, own_gain);
    RowTerms terms(gain, own_gain, dot, norms);
    const auto product = [&](auto b, float (&r)[2][4]) {
      const float2 m = *reinterpret_cast<const float2*>(mean + 2 * b);
      float start[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) start[i / 4][i % 4] = share[i / 2] * (i % 2 ? m.y : m.x);
      times<T, kPartners>(r, u, block.column_block(b), start);
    };
    gradient_rows<T, (kPartners <= 2)>(x, LaneBias{}, inverse_scale, params.focus, terms, scale_sums,
                                       product);
    char* to = const_cast<char*>(base(params.grad_query));
    if (kShort) find(first);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (first + lane.g + 8 * r < end) {
        const int64_t at = kShort ? token[r] : out[r];
        *reinterpret_cast<uint4*>(to + at * params.grad_query.token) =
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
  copy_async_wait<0>();  // for groups that had no step
}

template <int kHeadDim>
struct QueryGradientTraits {
  // With a head of 128 there is memory for one tile of an input, and registers for the 128 sums of S alone.
  static constexpr int kStages = kHeadDim <= 64 ? 2 : 1;
  using Layout = BackwardLayout<kHeadDim, kStages>;
  static constexpr bool kShort = kHeadDim > 64;
  using Sums = std::conditional_t<kShort, SharedSums, RegisterSums>;

  static constexpr __host__ __device__ int sums_at(int channels, int groups) {
    return Layout::fixed_bytes(channels, groups) + Layout::tile_bytes(channels, groups);
  }
  static constexpr __host__ __device__ int shared_bytes(int channels, int groups) {
    const int pass = sums_at(channels, groups) + (kShort ? SharedSums::bytes(channels * groups) : 0);
    const int slices = channels / kSliceChannels;
    const int sums = Layout::fixed_bytes(channels, groups) +
                     (groups > 1 ? slices * StateGradient<__nv_bfloat16, kHeadDim>::kBytes : 0);
    return pass > sums ? pass : sums;
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_query(const __grid_constant__ QueryGradientParams params) {
  using Traits = QueryGradientTraits<kHeadDim>;
  using Block = BackwardBlock<kHeadDim, Traits::kStages, Traits::kShort>;
  extern __shared__ __align__(128) unsigned char shared[];
  const auto state_size = [&] {
    int channels = params.channels;
    keep(channels);
    return static_cast<int64_t>(channels) * (kHeadDim + 1);
  };
  StateGradient<T, kHeadDim> sum;
  typename Traits::Sums scale_sums(shared + Traits::sums_at(params.channels, params.groups));
  {
    const Block block(shared, params.channels, params.groups);
    load_inverse_scale<T>(block, params.focus);
    load_state<T, true>(block, params.state + blockIdx.y * state_size());
  }
  {
    const Block block(shared, params.channels, params.groups);
    const int begin = blockIdx.x * params.chunk, end = min(begin + params.chunk, params.queries);
    SliceGroup group(block.exchange, block.group, block.slice, block.slices);
    query_pass<T>(block, group, params, Window(params.grid, blockIdx.y), begin, end, sum, scale_sums);
  }
  // The partial sums are added over the groups in order, then stored. Each part makes its own view of the
  // block, so that one part's addresses take no registers in another.
  const Block block(shared, params.channels, params.groups);
  const int64_t index = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (params.scale_partials) {
    store_scale(params.scale_partials + index * params.channels, block, scale_sums, block.slice, block.group,
                params.groups, block.lane);
  }
  sum.finish(params.inverse_keys * block.template state_scale<T>());
  sum.add_groups(block);
  if (block.group == 0) {
    float* partial = params.partial + index * state_size();
    sum.store_matrix(partial, block.slice, block.lane);
    sum.store_mean(partial + params.channels * kHeadDim + block.slice * kSliceChannels, block.lane);
  }
}

}  // namespace flatten::cuda::tensorcore

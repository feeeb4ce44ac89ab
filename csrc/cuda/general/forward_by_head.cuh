// The forward pass with a warp for each head (by_head.cuh):
//   state_by_head   chunks of keys     -> S and m, or partial sums of them
//   output_by_head  chunks of queries  -> out
#pragma once

#include "by_head_tile.cuh"

namespace flatten::cuda::general {

// The kernels are templates, with T = float, so that no unit but their own compiles them.

template <class T>
__global__ void __launch_bounds__(kMostHeads * 32) state_by_head(const __grid_constant__ HeadForward call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = call.plan;
  const HeadLane at;
  const HeadPlace place(plan, call.keys);
  float* cubes = reinterpret_cast<float*>(shared) + at.head * kStateShared;
  float *next_cubes = cubes + kHeadTile, *values = next_cubes + kHeadTile;
  HeadFocus focus(call.params, call.params.key, true, place.batch, at, plan, values + kHeadTile,
                  reinterpret_cast<float*>(shared) + plan.heads * kStateShared);
  const HeadReader value(call.params.value, place.batch, at, plan.head_dim);

  HeadOuter outer;
  float mean[4] = {};
  // The keys of the next tile are copied while this one is worked on.
  const int last = call.keys.last_tile(place.chunk);
  int tile = call.keys.first_tile(place.chunk);
  OwnToken own(at, plan.map, call.keys.tiling, place.window, tile);
  focus.in.start(at, own.token, cubes);
  for (; tile < last; ++tile) {
    float x[8][4];
    focus.load_bias(at, own.local, x);
    wait_for_copies();
    value.start(at, own.token, values);
    const OwnToken now = own;
    focus.add_tile(at, cubes, x);
    const float none[4] = {};
    float dot;
    const RowNorm norm = focus.map<false>(at, x, now.token, now.local, cubes, none, dot);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gain = at.of_row(norm.gain, i);
      float* row = cubes + at.slot_of_row(i) * kRow + at.part * 4;  // the lane's own
      float phi[4];
      load_pack<4>(row, phi);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        phi[c] *= gain;
        mean[c] += phi[c];
      }
      store_pack<4, float>(row, phi);
    }
    wait_for_copies();
    __syncwarp();
    if (tile + 1 < last) {
      own = OwnToken(at, plan.map, call.keys.tiling, place.window, tile + 1);
      focus.in.start(at, own.token, next_cubes);
    }
    outer.add(at, cubes, values);
    __syncwarp();
    float* before = cubes;
    cubes = next_cubes, next_cubes = before;
  }
  const bool whole = call.keys.chunks == 1;
  const State<float> to(whole ? call.state : call.partials, plan,
                        whole ? place.pair : place.pair * call.keys.chunks + place.chunk, at.head);
  outer.store(at, to, mean, whole ? static_cast<float>(plan.inverse_keys) : 1.0f);
}

/// The taps of a tile, with their bias, of the lane's channel.
template <int K>
__device__ __forceinline__ void convolve_head(const HeadLane& at, const float* halo,
                                              const float (&taps)[K * K], float bias, float (&sum)[2][4][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[half][i / 4][i % 4] = bias;
#pragma unroll
    for (int r = 0; r < kHeadRows + K - 1; ++r) {
      float x[4 + K - 1];
      HeadHalo<K>::load(halo, at, half, r, x);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        if (r - row < 0 || r - row >= K) continue;
#pragma unroll
        for (int i = 0; i < K; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[half][row][c] += taps[(r - row) * K + i] * x[c + i];
        }
      }
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kMostHeads * 32) output_by_head(const __grid_constant__ HeadForward call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = call.plan;
  const HeadLane at;
  const HeadPlace place(plan, call.queries);
  float* tile_of_query = reinterpret_cast<float*>(shared) + at.head * kOutputShared<K>;
  float *halo = tile_of_query, *convolved = tile_of_query + kHeadTile;  // the tiles come where the halo was
  float *matrix = halo + kHaloShared<K>, *factors = matrix + kMatrixElements;
  HeadFocus focus(call.params, call.params.query, false, place.batch, at, plan, factors + kHeadSlots,
                  reinterpret_cast<float*>(shared) + plan.heads * kOutputShared<K>);
  const State<const float> state(call.state, plan, place.pair, at.head);
  stage_head_matrix<Staged::kPlain>(at, state, matrix);
  float mean[4];
  load_head_mean(at.part * 4, state, mean);
  float taps[K > 0 ? K * K : 1], bias = 0;
  if constexpr (K > 0) {
    load_head_taps<K>(call.params.taps, at, plan.head_dim, taps);
    if (const float* from = static_cast<const float*>(call.params.taps.bias.data)) {
      const int channel = min(at.lane, plan.head_dim - 1);
      bias = from[call.params.taps.per_channel ? at.head * plan.head_dim + channel : channel];
    }
  }
  const HeadReader value(call.params.value, place.batch, at, plan.head_dim);
  float* out = static_cast<float*>(call.params.out.data) + place.batch * call.params.out.batch_stride +
               at.head * plan.head_dim;

  for (int tile = call.queries.first_tile(place.chunk); tile < call.queries.last_tile(place.chunk); ++tile) {
    const OwnToken own(at, plan.map, call.queries.tiling, place.window, tile);
    const bool taps_here = K > 0 && call.queries.tiling.on_map(tile);
    if constexpr (K > 0) {
      if (taps_here) {
        HeadHalo<K>::start(halo, value, plan.map, call.queries.tiling, place.window, tile, at);
      }
    }
    float x[8][4];
    focus.load(at, own.token, own.local, x);
    if constexpr (K > 0) {
      if (taps_here) {
        float sum[2][4][4];
        wait_for_copies();
        __syncwarp();
        convolve_head<K>(at, halo, taps, bias, sum);
        __syncwarp();
        store_pixels(at, sum, convolved);
      }
    }
    float dot;
    const RowNorm norm = focus.map<true>(at, x, own.token, own.local, tile_of_query, mean, dot);
    factors[at.own_slot()] = norm.gain / (norm.gain * dot + focus.eps);
    __syncwarp();
    HeadProduct product;
    product.add(at, tile_of_query, matrix);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int slot = at.slot_of_product(t), token = at.of_slot(own.token, slot);
      const float factor = factors[slot];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = at.columns + half * 16;
        if (token < 0 || column >= plan.head_dim) continue;
        float x[4] = {};
        if (taps_here) load_pack<4>(convolved + slot * kRow + column, x);
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] += product.sum[t][half * 4 + c] * factor;
        store_pack<4, float>(out + token * call.params.out.token_stride + column, x);
      }
    }
    __syncwarp();
  }
}

}  // namespace flatten::cuda::general

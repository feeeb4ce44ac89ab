// The backward pass with a warp for each head (by_head.cuh; the formulas: backward.cuh). With phi = gain *
// z^3:
//   grad_state_by_head  chunks of queries -> dS and dm, or partial sums of them; what the next needs of each
//   row grad_query_by_head  chunks of queries -> dq, partial sums for scale grad_key_by_head    chunks of
//   keys    -> dk, dv, partial sums for scale and the taps
// The product of dphi(k) with z^3 over all channels is v . (z^3 dS) + dm . z^3: dv's product has it.
#pragma once

#include "by_head_tile.cuh"

namespace flatten::cuda::general {

/// The sum over the four lanes that share rows by products.
__device__ __forceinline__ float sum_of_columns(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// x . sum over the head's channels, for each of the lane's rows by products, left by slot in `to`.
__device__ __forceinline__ void dot_rows(const HeadLane& at, const float (&x)[4][8],
                                         const HeadProduct& product, float* to) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float dot = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c) dot += x[t][c] * product.sum[t][c];
    dot = sum_of_columns(dot);
    if (at.lane % 4 == 0) to[at.slot_of_product(t)] = dot;
  }
}

template <class T>
__global__ void __launch_bounds__(kMostHeads * 32)
    grad_state_by_head(const __grid_constant__ HeadBackward call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = call.plan;
  const HeadLane at;
  const HeadPlace place(plan, call.queries);
  float* cubes = reinterpret_cast<float*>(shared) + at.head * kGradStateShared;
  float *grads = cubes + kHeadTile, *matrix = grads + kHeadTile, *dots = matrix + kMatrixElements;
  HeadFocus focus(call.params, call.params.query, false, place.batch, at, plan, dots + kHeadSlots,
                  reinterpret_cast<float*>(shared) + plan.heads * kGradStateShared);
  const HeadReader grad(call.params.grad_out, place.batch, at, plan.head_dim);
  const State<const float> state(call.state, plan, place.pair, at.head);
  stage_head_matrix<Staged::kPlain>(at, state, matrix);
  float mean[4];
  load_head_mean(at.part * 4, state, mean);
  const std::int64_t first_row = place.pair * call.params.geometry.queries / plan.windows;

  HeadOuter outer;
  float grad_mean[4] = {};
  for (int tile = call.queries.first_tile(place.chunk); tile < call.queries.last_tile(place.chunk); ++tile) {
    const OwnToken own(at, plan.map, call.queries.tiling, place.window, tile);
    float dot;
    grad.start(at, own.token, grads);
    const RowNorm norm = focus.map<true>(at, own.token, own.local, cubes, mean, dot);
    wait_for_copies();
    __syncwarp();
    {
      HeadProduct product;
      product.add(at, cubes, matrix);
      float g[4][8];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_columns(at, grads + at.slot_of_product(t) * kRow, g[t]);
      dot_rows(at, g, product, dots);
    }
    __syncwarp();
    const float inverse = 1 / (norm.gain * dot + focus.eps);
    // A slot without a token has gain 0, and so g is 0 there.
    const float share = own.token < 0 ? 0.0f : dots[at.own_slot()] * norm.gain * inverse * inverse;
    if (own.token >= 0) {
      const std::int64_t row = first_row + own.local;
      call.row_terms[row * plan.heads + at.head] = make_float2(inverse, share);
      if (at.head == 0) {
        call.row_norms[row] = make_float4(norm.pre, norm.gain, norm.inverse_z, norm.inverse_cube);
      }
    }
    const float of_grad = own.token < 0 ? 0.0f : norm.gain * inverse, of_cube = -norm.gain * share;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int offset = at.slot_of_row(i) * kRow + at.part * 4;
      const float for_grad = at.of_row(of_grad, i), for_cube = at.of_row(of_cube, i);
      float g[4], z3[4];
      load_pack<4>(grads + offset, g);
      load_pack<4>(cubes + offset, z3);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        g[c] *= for_grad;
        grad_mean[c] += for_cube * z3[c];
      }
      store_pack<4, float>(grads + offset, g);
    }
    __syncwarp();
    outer.add(at, cubes, grads);
    __syncwarp();
  }
  const bool whole = call.queries.chunks == 1;
  const State<float> to(whole ? call.grad_state : call.grad_partials, plan,
                        whole ? place.pair : place.pair * call.queries.chunks + place.chunk, at.head);
  outer.store(at, to, grad_mean, whole ? static_cast<float>(plan.inverse_keys) : 1.0f);
}

/// The end of dq and dk: from dphi to the gradient of the token, and of scale.
struct HeadFinish {
  float* out;  // of the image and head, or null
  std::int64_t out_stride;
  int channels, head_dim;
  float eps;
  const float* inverse;  // 1 / scale of the head's channels, in shared memory: registers are scarce
  float scale_sums[8] = {};

  __device__ HeadFinish(const AttentionInputs& params, const MutableTokens& to, std::int64_t batch,
                        const HeadLane& at, const Plan& plan, const float* inverse)
      : out(to.data ? static_cast<float*>(to.data) + batch * to.batch_stride + at.head * plan.head_dim
                    : nullptr),
        out_stride(to.token_stride),
        channels(plan.channels),
        head_dim(plan.head_dim),
        eps(static_cast<float>(params.eps)),
        inverse(inverse) {}

  /// Each row's terms lie in shared memory by slot: pre, 3 * factor, dot / |z^3|^2, factor * dot / |z|^2,
  /// where factor = gain * pre and dot = dphi . z^3.
  __device__ __forceinline__ void rows(const HeadLane& at, const OwnToken& own, const HeadProduct& e,
                                       const float4* terms, const float* tokens, const float* bias) {
    float of_scale[8];
    load_columns(at, inverse, of_scale);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int slot = at.slot_of_product(t);
      const int token = at.of_slot(own.token, slot);
      if (token < 0) continue;
      const float4 term = terms[slot];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = at.columns + half * 16;
        if (column >= head_dim) continue;
        float x[4];
        load_pack<4>(tokens + slot * kRow + column, x);
        if (bias) {
          float b[4];
          load_pack<4>(bias + slot * kRow + column, b);
#pragma unroll
          for (int c = 0; c < 4; ++c) x[c] += b[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int i = half * 4 + c;
          const float y = relu(x[c]) * of_scale[i] + eps * of_scale[i], z = y * term.x, z2 = z * z;
          const float dy = term.y * z2 * (e.sum[t][i] - z2 * z * term.z) + z * term.w;
          scale_sums[i] += dy * y;
          x[c] = x[c] <= 0 ? 0.0f : dy * of_scale[i];
        }
        if (out) store_pack<4, float>(out + token * out_stride + column, x);
      }
    }
  }

  __device__ void store_scale_sums(const HeadLane& at, float* partials, std::int64_t row) const {
    if (!partials) return;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float sum = scale_sums[c];
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      const int column = at.columns + HeadLane::column_step(c);
      if (at.row == 0 && column < head_dim) {
        partials[row * channels + at.head * head_dim + column] = -sum * inverse[column];
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kMostHeads * 32)
    grad_query_by_head(const __grid_constant__ HeadBackward call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = call.plan;
  const HeadLane at;
  const HeadPlace place(plan, call.queries);
  float* grads = reinterpret_cast<float*>(shared) + at.head * kGradQueryShared;
  float *queries = grads + kHeadTile, *matrix = queries + kHeadTile;
  float4* terms = reinterpret_cast<float4*>(matrix + kMatrixElements);
  float2* rows_of_head = reinterpret_cast<float2*>(terms + kHeadSlots);  // 1 / denominator, share
  float* inverse_scale = reinterpret_cast<float*>(rows_of_head + kHeadSlots);
  const HeadReader query(call.params.query, place.batch, at, plan.head_dim);
  const HeadReader grad(call.params.grad_out, place.batch, at, plan.head_dim);
  const State<const float> state(call.state, plan, place.pair, at.head);
  stage_head_matrix<Staged::kTransposed>(at, state, matrix);
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const int column = at.columns + HeadLane::column_step(c);
    mean[c] = column < plan.head_dim ? state.m[column] : 0.0f;
  }
  stage_inverse_scale(call.params.mapping, at, plan.head_dim, inverse_scale);
  HeadFinish finish(call.params, call.params.grad_query, place.batch, at, plan, inverse_scale);
  const std::int64_t first_row = place.pair * call.params.geometry.queries / plan.windows;

  for (int tile = call.queries.first_tile(place.chunk); tile < call.queries.last_tile(place.chunk); ++tile) {
    const OwnToken own(at, plan.map, call.queries.tiling, place.window, tile);
    grad.start(at, own.token, grads);
    query.start(at, own.token, queries);
    float inverse = 0, share = 0;
    float4 term = make_float4(0, 0, 0, 0);
    if (own.token >= 0) {
      const std::int64_t row = first_row + own.local;
      const float4 norm = call.row_norms[row];
      float shares_of_row = 0;
      for (int head = 0; head < plan.heads; ++head) {
        const float2 mine = call.row_terms[row * plan.heads + head];
        shares_of_row += mine.y;
        if (head == at.head) inverse = mine.x, share = mine.y;
      }
      // dphi . phi: the output does not change with the length of phi(q), so only eps is left of it.
      const float dot = norm.y > 0 ? finish.eps * shares_of_row / norm.y : 0.0f, factor = norm.x * norm.y;
      term = make_float4(norm.x, 3 * factor, dot * norm.w, factor * dot * norm.z);
    }
    terms[at.own_slot()] = term;
    rows_of_head[at.own_slot()] = make_float2(inverse, share);
    wait_for_copies();
    __syncwarp();
    HeadProduct e;
    e.add(at, grads, matrix);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 of_row = rows_of_head[at.slot_of_product(t)];
#pragma unroll
      for (int c = 0; c < 8; ++c) e.sum[t][c] = of_row.x * e.sum[t][c] - of_row.y * mean[c];
    }
    finish.rows(at, own, e, terms, queries, nullptr);
    __syncwarp();
  }
  finish.store_scale_sums(at, call.scale_partials, place.pair * call.queries.chunks + place.chunk);
}

/// The mirrored taps of a tile over g, of the lane's channel, and what the tile has for the gradients of taps
/// and bias to `sums`: g as the taps' output, v as their input.
template <int K>
__device__ __forceinline__ void convolve_head_back(const HeadLane& at, const float* halo, const float* values,
                                                   const float* shared_taps, float (&sums)[K * K + 1],
                                                   float (&sum)[2][4][4]) {
  float taps[K * K];  // from shared memory for each tile: between them the registers are needed
#pragma unroll
  for (int i = 0; i < K * K; ++i) taps[i] = shared_taps[i * 32 + at.lane];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float v[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[half][i / 4][i % 4] = 0;
#pragma unroll
    for (int r = 0; r < kHeadRows + K - 1; ++r) {
      float g[4 + K - 1];
      HeadHalo<K>::load(halo, at, half, r, g);
#pragma unroll
      for (int c = 0; r < 4 && c < 4; ++c) v[r][c] = values[slot_of_pixel(half, r, c) * kRow + at.lane];
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        if (r - row < 0 || r - row >= K) continue;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const int tap = K * K - 1 - ((r - row) * K + i);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sum[half][row][c] += taps[tap] * g[c + i];
            sums[tap] += v[row][c] * g[c + i];
          }
        }
        if (r - row == K / 2) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[K * K] += g[c + K / 2];
        }
      }
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kMostHeads * 32)
    grad_key_by_head(const __grid_constant__ HeadBackward call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Plan& plan = call.plan;
  const AttentionBackward& params = call.params;
  const HeadLane at;
  const HeadPlace place(plan, call.keys);
  float* cubes = reinterpret_cast<float*>(shared) + at.head * kGradKeyShared<K>;
  float *halo = cubes, *convolved = cubes + kHeadTile;  // the tiles come where the halo was
  float *values = halo + kHaloShared<K>, *matrix = values + kHeadTile;
  float *gains = matrix + kMatrixElements, *dots = gains + kHeadSlots;
  float4* terms = reinterpret_cast<float4*>(dots + kHeadSlots);
  float* inverse_scale = reinterpret_cast<float*>(terms + kHeadSlots);
  HeadFocus focus(params, params.key, true, place.batch, at, plan, inverse_scale,
                  reinterpret_cast<float*>(shared) + plan.heads * kGradKeyShared<K>);
  const HeadReader value(params.value, place.batch, at, plan.head_dim);
  const HeadReader grad(params.grad_out, place.batch, at, plan.head_dim);
  const State<const float> grad_state(call.grad_state, plan, place.pair, at.head);
  if (call.attention) stage_head_matrix<Staged::kPermuted>(at, grad_state, matrix);
  HeadFinish finish(params, params.grad_key, place.batch, at, plan, inverse_scale);
  float tap_sums[K * K + 1] = {};
  // One set of taps where the heads share them.
  float* taps = reinterpret_cast<float*>(shared) + plan.heads * (kGradKeyShared<K> + 6 * kHeadSlots) +
                (params.taps.per_channel ? at.head * K * K * 32 : 0);
  if constexpr (K > 0) {
    if (params.taps.per_channel || at.head == 0) {
      float mine[K * K];
      load_head_taps<K>(params.taps, at, plan.head_dim, mine);
#pragma unroll
      for (int i = 0; i < K * K; ++i) taps[i * 32 + at.lane] = mine[i];
    }
    __syncthreads();
  }

  for (int tile = call.keys.first_tile(place.chunk); tile < call.keys.last_tile(place.chunk); ++tile) {
    const OwnToken own(at, plan.map, call.keys.tiling, place.window, tile);
    const bool taps_here = K > 0 && call.keys.tiling.on_map(tile);
    if constexpr (K > 0) {
      if (taps_here) HeadHalo<K>::start(halo, grad, plan.map, call.keys.tiling, place.window, tile, at);
    }
    value.start(at, own.token, values);
    wait_for_copies();
    __syncwarp();
    if constexpr (K > 0) {
      if (taps_here) {
        float sum[2][4][4];
        convolve_head_back<K>(at, halo, values, taps, tap_sums, sum);
        __syncwarp();
        store_pixels(at, sum, convolved);
      }
    }
    __syncwarp();
    if (!call.attention) continue;
    float dot, grad_mean[4];
    load_head_mean(at.part * 4, grad_state, grad_mean);
    const RowNorm norm = focus.map<true>(at, own.token, own.local, cubes, grad_mean, dot);
    gains[at.own_slot()] = norm.gain;
    __syncwarp();
    {
      HeadPermutedProduct product;
      product.add(at, cubes, matrix);
      float v[4][8];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_columns(at, values + at.slot_of_product(t) * kRow, v[t]);
      dot_rows(at, v, product, dots);
      float* to_value = params.grad_value.data
                            ? static_cast<float*>(params.grad_value.data) +
                                  place.batch * params.grad_value.batch_stride + at.head * plan.head_dim
                            : nullptr;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int slot = at.slot_of_product(t), token = at.of_slot(own.token, slot);
        const float gain = gains[slot];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = at.columns + half * 16;
          if (token < 0 || column >= plan.head_dim || !to_value) continue;
          float x[4] = {};
          if (taps_here) load_pack<4>(convolved + slot * kRow + column, x);
#pragma unroll
          for (int c = 0; c < 4; ++c) x[c] += product.sum[t][half * 4 + c] * gain;
          store_pack<4, float>(to_value + token * params.grad_value.token_stride + column, x);
        }
      }
    }
    __syncwarp();
    // dphi . z^3 over all heads.
    const float whole = focus.join(at, 2, {dots[at.own_slot()] + dot, 0}, Add()).x,
                factor = norm.pre * norm.gain;
    terms[at.own_slot()] =
        make_float4(norm.pre, 3 * factor, whole * norm.inverse_cube, factor * whole * norm.inverse_z);
    __syncwarp();
    // For the end of the tile, where z^3 and the taps were.
    float *keys = convolved, *biases = focus.bias ? cubes : nullptr;
    focus.in.start(at, own.token, keys);
    if (biases) focus.start_bias(at, own.local, biases);
    HeadPermutedProduct e;
    e.add_transposed(at, values, matrix);
    wait_for_copies();
    __syncwarp();
    float mean[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int column = at.columns + HeadLane::column_step(c);
      mean[c] = column < plan.head_dim ? grad_state.m[column] : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int c = 0; c < 8; ++c) e.sum[t][c] += mean[c];
    }
    finish.rows(at, own, e, terms, keys, biases);
    __syncwarp();
  }
  const std::int64_t row = place.pair * call.keys.chunks + place.chunk;
  finish.store_scale_sums(at, call.scale_partials,
                          params.geometry.batch * plan.windows * call.queries.chunks + row);
  if constexpr (K > 0) {
    if (call.taps_partials && at.lane < plan.head_dim) {
      float* to = call.taps_partials + row * (K * K + 1) * plan.channels + at.head * plan.head_dim + at.lane;
#pragma unroll
      for (int i = 0; i <= K * K; ++i) to[i * plan.channels] = tap_sums[i];
    }
  }
}

}  // namespace flatten::cuda::general

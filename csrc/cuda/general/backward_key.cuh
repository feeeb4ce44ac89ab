// dk, dv and scale's partial gradient by keys: the last kernel of the general backward.
#pragma once

#include "backward.cuh"

namespace flatten::cuda::general {

template <class T, int K>
__global__ void __launch_bounds__(kThreads) gradient_of_key(const __grid_constant__ BackwardCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Arena<A> arena{reinterpret_cast<A*>(shared)};
  const Plan& plan = call.plan;
  const Place at(plan, call.keys, blockIdx.x);
  const int first = call.keys.first_tile(at.chunk), tiles = call.keys.tiles_of(at.chunk);

  const Rows<A> rows(arena.take(Rows<A>::kElements));
  rows.find(plan.map, call.keys.tiling, at.window, first, tiles);
  const Focus<T> focus(call.params, plan.channels, plan.staged_scale, plan.bias_vector,
                       arena.take(plan.staged_scale));
  A* dm = arena.take(plan.blocks * kWidth);
  A* transposed = arena.take(plan.matrix_blocks * kMatrixElements);
  A* matrices = arena.take(plan.matrix_blocks * kMatrixElements);
  A *dots = arena.take(kChunkSlots), *sums_scratch = arena.take(kWarps * kWidth), *work = arena.next;
  const Reader<T> key = reader<T>(call.params.key, at.batch, plan.vector);
  const Reader<T> value = reader<T>(call.params.value, at.batch, plan.vector);
  const Reader<T> grad = reader<T>(call.params.grad_out, at.batch, plan.vector);
  const Writer<T> to_key = writer<T>(call.params.grad_key, at.batch, plan.vector);
  const Writer<T> to_value = writer<T>(call.params.grad_value, at.batch, plan.vector);
  focus.measure(key, true, rows, tiles * kSlots);
  for (int slot = threadIdx.x; slot < tiles * kSlots; slot += kThreads) dots[slot] = 0;

  /// e_k of one tile for a head's columns i.
  const auto gradient_of_phi = [&](const State<const A>& state, const Rows<A>& r, int head, int i) {
    RowProduct<A> e = rows_times_transposed(
        state, plan, transposed, work, head, i,
        [&](A* staged, Columns of_value) { stage(staged, value, r.token, of_value, Identity{}); });
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int c = 0; c < 4; ++c) e.sum[k][c] += dm[i * kWidth + RowProduct<A>::column() + c];
    }
    return e;
  };
  const A* grad_state = static_cast<const A*>(call.grad_state);
  const bool want_key = to_key.data || call.scale_partials;
  // e_k . z^p runs over all heads. With p = 1 its two terms cancel.
  if (want_key && focus.mapping.map == FeatureMap::kFocused && focus.power.whole != 1) {
    for (int head = 0; head < plan.heads; ++head) {
      const State<const A> state(grad_state, plan, at.pair, head);
      state.stage(dm, transposed, plan, true);
      for (int i = 0; i < plan.blocks; ++i) {
        const Columns columns = columns_of_head(head, i, plan.head_dim);
        for (int tile = 0; tile < tiles; ++tile) {
          const Rows<A> r = rows.tile(tile);
          const RowProduct<A> e = gradient_of_phi(state, r, head, i);
          const int column = RowProduct<A>::column();
          A inverse[4];
          focus.load_scale(columns.first + column, inverse);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int slot = RowProduct<A>::slot(k), token = r.token[slot];
            A dot = 0;
            if (token >= 0 && column < columns.width) {
              A x[4];
              load_four(key, token, columns, column, x);
              focus.add_bias(true, r.local[slot], columns.first + column, x);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                if (column + c >= columns.width) continue;
                dot += e.sum[k][c] * focus.power(focus.positive(x[c], inverse[c]) * r.inverse[slot]);
              }
            }
            dot = sum_of_row(dot);
            if (column == 0) dots[tile * kSlots + slot] += dot;
          }
        }
      }
    }
  }
  const MapWindow where{plan.map, call.keys.tiling, at.window};
  const TapIndex taps{call.params.taps, plan.head_dim};
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<const A> state(grad_state, plan, at.pair, head);
    state.stage(dm, transposed, plan, true);
    if (plan.resident) state.stage(dm, matrices, plan, false);
    for (int i = 0; want_key && i < plan.blocks; ++i) {
      const Columns columns = columns_of_head(head, i, plan.head_dim);
      A scale_sums[4] = {};
      for (int tile = 0; tile < tiles; ++tile) {
        const RowProduct<A> e = gradient_of_phi(state, rows.tile(tile), head, i);
        finish_rows(focus, key, to_key, true, rows.tile(tile), columns, e.sum, dots + tile * kSlots,
                    scale_sums);
      }
      const std::int64_t row = call.params.geometry.batch * plan.windows * call.queries.chunks +
                               at.pair * call.keys.chunks + at.chunk;
      store_scale_sums(call, focus, row, columns, scale_sums, sums_scratch);
    }
    for (int j = 0; to_value.data && j < plan.blocks; ++j) {
      const Columns columns = columns_of_head(head, j, plan.head_dim);
      for (int tile = 0; tile < tiles; ++tile) {
        const Rows<A> r = rows.tile(tile);
        RowProduct<A> product;
        for (int i = 0; i < plan.blocks; ++i) {
          const Columns of_key = columns_of_head(head, i, plan.head_dim);
          __syncthreads();
          stage(work, key, r.token, of_key, [&](int slot, int column, auto& x) {
            focus.map(true, r, slot, of_key.first + column, x);
            for (auto& entry : x) entry *= r.gain[slot];
          });
          const A* matrix = state.matrix(matrices, plan, i, j, false);
          __syncthreads();
          product.add(work, matrix);
        }
        const bool taps_here = taps.taps.weight.data && where.tiling.on_map(first + tile);
        if (taps_here) {
          convolve<T, K>(work, work + kTileElements, grad, where, first + tile, columns, taps, true);
        }
        const int column = RowProduct<A>::column();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int slot = RowProduct<A>::slot(k), token = r.token[slot];
          if (token < 0) continue;
          A x[4] = {};
          if (taps_here) load_row(work + slot * kRow + column, x);
#pragma unroll
          for (int c = 0; c < 4; ++c) x[c] += product.sum[k][c];
          store_four(to_value, token, columns, column, x);
        }
      }
    }
  }
}

}  // namespace flatten::cuda::general

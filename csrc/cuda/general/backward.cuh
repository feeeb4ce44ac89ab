// The backward pass for every dtype, head size, kernel and stride. With z = y / max(y) (focus.cuh),
// per row:
//   den = z_q^p . m + eps / gain      o = (z_q^p S) / den     share = (g . o) / den   (per head)
//   dS  = sum over queries of z_q^p^T (g / den)               dm = -sum of share * z_q^p
//   e_q = (g / den) S^T - share * m   the gradient of phi(q), times its gain
//   e_k = (v dS^T + dm) / M           the gradient of phi(k)
//   dv  = K dS / M + mirrored taps over g
//
// sum_queries: chunks of queries -> dS and dm, or partial sums of them; 1 / den and share of every row.
// gradient_of_query: chunks of queries -> dq, partial sums for scale; sums the partial dS and dm beside it.
// gradient_of_key (general_backward_key.cuh): chunks of keys -> dk, dv, partial sums for scale.
#pragma once

#include "focus.cuh"
#include "plan.h"
#include "products.cuh"
#include "reduce.cuh"
#include "state.cuh"
#include "taps.cuh"

namespace flatten::cuda::general {

template <class A>
struct BackwardShared {
  static constexpr int kOuter =
      2 * kTileElements > OuterProduct<A>::kScratch ? 2 * kTileElements : OuterProduct<A>::kScratch;
  static int common(const Plan& p) { return Rows<A>::kElements + p.staged_scale + p.blocks * kWidth + 16; }
  static int sums(const Plan& p) {
    return common(p) + p.matrix_blocks * kMatrixElements + 2 * kChunkSlots + kOuter;
  }
  static int query(const Plan& p) {
    return common(p) + p.matrix_blocks * kMatrixElements + 3 * kChunkSlots + kWarps * kWidth + kTileElements;
  }
  template <int K>
  static int key(const Plan& p, const Tiling& t) {
    return common(p) + 2 * p.matrix_blocks * kMatrixElements + kChunkSlots + kWarps * kWidth + kTileElements +
           taps_elements<K, A>(t.log_width);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_queries(const __grid_constant__ BackwardCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Arena<A> arena{reinterpret_cast<A*>(shared)};
  const Plan& plan = call.plan;
  const Place at(plan, call.queries, blockIdx.x);
  const int first = call.queries.first_tile(at.chunk), tiles = call.queries.tiles_of(at.chunk);

  const Rows<A> rows(arena.take(Rows<A>::kElements));
  rows.find(plan.map, call.queries.tiling, at.window, first, tiles);
  const Focus<T> focus(call.params, plan.channels, plan.staged_scale, plan.bias_vector,
                       arena.take(plan.staged_scale));
  A* m = arena.take(plan.blocks * kWidth);
  A* matrices = arena.take(plan.matrix_blocks * kMatrixElements);
  A *inverse_denominator = arena.take(kChunkSlots), *minus_share = arena.take(kChunkSlots);
  A* work = arena.take(BackwardShared<A>::kOuter);
  const Reader<T> query = reader<T>(call.params.query, at.batch, plan.vector);
  const Reader<T> grad = reader<T>(call.params.grad_out, at.batch, plan.vector);
  focus.measure(query, false, rows, tiles * kSlots);

  const bool whole = call.queries.chunks == 1;
  const A scale = whole ? A(plan.inverse_keys) : A(1);
  A* out =
      whole ? static_cast<A*>(call.grad_state) + at.pair * plan.state()
            : static_cast<A*>(call.grad_partials) + (at.pair * call.queries.chunks + at.chunk) * plan.state();
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<const A> state(static_cast<const A*>(call.state), plan, at.pair, head);
    const auto stage_query = [&](A* tile, const Rows<A>& r, Columns columns) {
      stage(tile, query, r.token, columns,
            [&](int slot, int column, auto& x) { focus.map(false, r, slot, columns.first + column, x); });
    };
    state.stage(m, matrices, plan, false);
    for (int tile = 0; tile < tiles; ++tile) {
      const Rows<A> r = rows.tile(tile);
      A share[4] = {};
      for (int j = 0; j < plan.blocks; ++j) {
        const Columns columns = columns_of_head(head, j, plan.head_dim);
        RowProduct<A> product;
        A denominator = 0;
        for (int i = 0; i < plan.blocks; ++i) {
          __syncthreads();
          stage_query(work, r, columns_of_head(head, i, plan.head_dim));
          const A* matrix = state.matrix(matrices, plan, i, j, false);
          __syncthreads();
          product.add(work, matrix);
          if (j == 0) denominator += row_dot(work, m + i * kWidth);
        }
        if (j == 0 && threadIdx.x % 2 == 0) {
          const int slot = threadIdx.x / 2;
          inverse_denominator[tile * kSlots + slot] = 1 / (denominator + focus.eps / r.gain[slot]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = r.token[RowProduct<A>::slot(i)];
          if (token < 0) continue;
          A g[4];
          load_four(grad, token, columns, RowProduct<A>::column(), g);
#pragma unroll
          for (int c = 0; c < 4; ++c) share[i] += g[c] * product.sum[i][c];
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        share[i] = sum_of_row(share[i]);
        const int slot = RowProduct<A>::slot(i), at_slot = tile * kSlots + slot;
        if (RowProduct<A>::column() != 0) continue;
        const A inverse = inverse_denominator[at_slot];
        minus_share[at_slot] = r.token[slot] < 0 ? A(0) : -share[i] * inverse * inverse;
        if (r.token[slot] >= 0) {
          const std::int64_t row = at.pair * call.params.geometry.queries / plan.windows + r.local[slot];
          A* terms = static_cast<A*>(call.row_terms) + (row * plan.heads + head) * 2;
          terms[0] = inverse;
          terms[1] = -minus_share[at_slot];
        }
      }
    }
    const State<A> to(out, plan, 0, head);
    for (int i = 0; i < plan.blocks; ++i) {
      const Columns of_query = columns_of_head(head, i, plan.head_dim);
      for (int j = 0; j < plan.blocks; ++j) {
        const Columns of_grad = columns_of_head(head, j, plan.head_dim);
        OuterProduct<A> product;
        for (int tile = 0; tile < tiles; ++tile) {
          const Rows<A> r = rows.tile(tile);
          __syncthreads();
          stage_query(work, r, of_query);
          stage(work + kTileElements, grad, r.token, of_grad, [&](int slot, int, auto& x) {
            for (auto& entry : x) entry *= inverse_denominator[tile * kSlots + slot];
          });
          __syncthreads();
          product.add(work, work + kTileElements, minus_share + tile * kSlots);
        }
        product.store(
            work, [&](int row, int column, A x) { to.put(i, j, row, column, x * scale); },
            [&](int row, A x) {
              if (j == 0) to.put_mean(i, row, x * scale);
            });
      }
    }
  }
}

/// (rows * (dS or S)^T)[columns i] of one tile: the product both input gradients start from.
/// `stage_rows(tile, columns)` stages the rows' columns j.
template <class A, class S, class F>
__device__ __forceinline__ RowProduct<A> rows_times_transposed(const S& state, const Plan& plan, A* matrices,
                                                               A* work, int head, int i, F&& stage_rows) {
  RowProduct<A> product;
  for (int j = 0; j < plan.blocks; ++j) {
    __syncthreads();
    stage_rows(work, columns_of_head(head, j, plan.head_dim));
    const A* matrix = state.matrix(matrices, plan, i, j, true);
    __syncthreads();
    product.add(work, matrix);
  }
  return product;
}

/// The gradient of one tile of q or k from e, the gradient of phi: stores it, adds up scale's.
template <class T>
__device__ __forceinline__ void finish_rows(const Focus<T>& focus, const Reader<T>& in, const Writer<T>& out,
                                            bool keys, const Rows<Acc<T>>& r, Columns columns,
                                            const Acc<T> (&e)[4][4], const Acc<T>* dots,
                                            Acc<T> (&scale_sums)[4]) {
  using A = Acc<T>;
  const int column = RowProduct<A>::column();
  A inverse[4];
  focus.load_scale(columns.first + column, inverse);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = RowProduct<A>::slot(i), token = r.token[slot];
    if (token < 0) continue;
    A x[4];
    load_four(in, token, columns, column, x);
    focus.add_bias(keys, r.local[slot], columns.first + column, x);
    const A factor = keys ? r.gain[slot] * r.inverse[slot] : r.inverse[slot];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (column + c < columns.width) {
        x[c] = focus.gradient(x[c], inverse[c], e[i][c], dots[slot], factor, r, slot, scale_sums[c]);
      }
    }
    if (out.data) store_four(out, token, columns, column, x);
  }
}

/// Writes one chunk's share of scale's gradient for a block of columns.
template <class T>
__device__ void store_scale_sums(const BackwardCall& call, const Focus<T>& focus, std::int64_t row,
                                 Columns columns, Acc<T> (&sums)[4], Acc<T>* scratch) {
  using A = Acc<T>;
  if (!call.scale_partials) return;
  const A total = column_sums(sums, scratch);
  if (threadIdx.x < columns.width) {
    const int c = columns.first + threadIdx.x;
    A inverse[1];
    focus.load_scale(c, inverse);
    static_cast<A*>(call.scale_partials)[row * call.plan.channels + c] = -total * inverse[0];
  }
}

template <class A>
__host__ __device__ PartialSums<A> partial_sums(const BackwardCall& call) {
  return {static_cast<A*>(call.grad_state), static_cast<const A*>(call.grad_partials), call.plan.state(),
          call.queries.chunks, A(call.plan.inverse_keys)};
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_of_query(const __grid_constant__ BackwardCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Arena<A> arena{reinterpret_cast<A*>(shared)};
  const Plan& plan = call.plan;
  std::int64_t block = blockIdx.x;
  if (call.queries.chunks > 1) {
    const PartialSums<A> sums = partial_sums<A>(call);
    const std::int64_t blocks = call.params.geometry.batch * plan.windows * sums.blocks_per_pair();
    if (block < blocks) return sums.run(block);
    block -= blocks;
  }
  const Place at(plan, call.queries, block);
  const int first = call.queries.first_tile(at.chunk), tiles = call.queries.tiles_of(at.chunk);

  const Rows<A> rows(arena.take(Rows<A>::kElements));
  rows.find(plan.map, call.queries.tiling, at.window, first, tiles);
  const Focus<T> focus(call.params, plan.channels, plan.staged_scale, plan.bias_vector,
                       arena.take(plan.staged_scale));
  A* m = arena.take(plan.blocks * kWidth);
  A* matrices = arena.take(plan.matrix_blocks * kMatrixElements);
  A *inverse_denominator = arena.take(kChunkSlots), *share = arena.take(kChunkSlots);
  A *dots = arena.take(kChunkSlots), *sums_scratch = arena.take(kWarps * kWidth), *work = arena.next;
  const Reader<T> query = reader<T>(call.params.query, at.batch, plan.vector);
  const Reader<T> grad = reader<T>(call.params.grad_out, at.batch, plan.vector);
  const Writer<T> out = writer<T>(call.params.grad_query, at.batch, plan.vector);
  focus.measure(query, false, rows, tiles * kSlots);

  const A* terms = static_cast<const A*>(call.row_terms) +
                   at.pair * call.params.geometry.queries / plan.windows * plan.heads * 2;
  const auto term = [&](int slot, int head, int which) {
    const std::int64_t row = rows.local[slot];
    return row < 0 ? A(0) : terms[(row * plan.heads + head) * 2 + which];
  };
  // e_q . z^p over the whole row: o does not change with the length of phi(q), so only eps is left of it.
  for (int slot = threadIdx.x; slot < tiles * kSlots; slot += kThreads) {
    A total = 0;
    for (int head = 0; head < plan.heads; ++head) total += term(slot, head, 1);
    dots[slot] = rows.gain[slot] > 0 ? total * (focus.eps / rows.gain[slot]) : A(0);
  }
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<const A> state(static_cast<const A*>(call.state), plan, at.pair, head);
    state.stage(m, matrices, plan, true);
    for (int slot = threadIdx.x; slot < tiles * kSlots; slot += kThreads) {
      inverse_denominator[slot] = term(slot, head, 0);
      share[slot] = term(slot, head, 1);
    }
    for (int i = 0; i < plan.blocks; ++i) {
      const Columns columns = columns_of_head(head, i, plan.head_dim);
      A scale_sums[4] = {};
      for (int tile = 0; tile < tiles; ++tile) {
        const Rows<A> r = rows.tile(tile);
        const int skip = tile * kSlots;
        RowProduct<A> e =
            rows_times_transposed(state, plan, matrices, work, head, i, [&](A* staged, Columns of_grad) {
              stage(staged, grad, r.token, of_grad, [&](int slot, int, auto& x) {
                for (auto& entry : x) entry *= inverse_denominator[skip + slot];
              });
            });
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            e.sum[k][c] -= share[skip + RowProduct<A>::slot(k)] * m[i * kWidth + RowProduct<A>::column() + c];
          }
        }
        finish_rows(focus, query, out, false, r, columns, e.sum, dots + skip, scale_sums);
      }
      store_scale_sums(call, focus, at.pair * call.queries.chunks + at.chunk, columns, scale_sums,
                       sums_scratch);
    }
  }
}

}  // namespace flatten::cuda::general

// The forward pass for every dtype, head size, kernel and stride:
//   sum_keys     chunks of keys     -> S and m, or partial sums of them
//   (reduce.cuh  partial sums       -> S and m)
//   attend       chunks of queries  -> out
//   attend_small one window in a block: both at once, S and m in shared memory
#pragma once

#include "focus.cuh"
#include "plan.h"
#include "products.cuh"
#include "state.cuh"
#include "taps.cuh"

namespace flatten::cuda::general {

/// Shared memory of a block, in elements: what host and kernels agree on.
template <class A>
struct ForwardShared {
  static int common(const Plan& p) { return Rows<A>::kElements + p.staged_scale + 8; }
  static constexpr int kOuter =
      2 * kTileElements > OuterProduct<A>::kScratch ? 2 * kTileElements : OuterProduct<A>::kScratch;
  static int keys(const Plan& p) { return common(p) + kOuter; }

  /// m of a head, the matrix blocks, denominators, then the query tile or the convolution.
  template <int K>
  static int queries(const Plan& p, const Tiling& t) {
    return common(p) + (p.blocks + p.matrix_blocks * kRow) * kWidth + kSlots + 16 + work<K>(t);
  }

  template <int K>
  static int small(const Plan& p, const Tiling& t) {
    const int rest = work<K>(t) > kOuter ? work<K>(t) : kOuter;
    return queries<K>(p, t) - work<K>(t) + Rows<A>::kElements + rest;
  }

  template <int K>
  static int work(const Tiling& t) {
    const int convolution = kTileElements + taps_elements<K, A>(t.log_width);
    return convolution > kTileElements ? convolution : kTileElements;
  }
};

/// S and m of one head over the tiles of a chunk: to(i, j, row, column, x) for every entry of every matrix
/// block, padding included, and to_mean(i, row, x).
template <class T, class F, class G>
__device__ void sum_head(const ForwardCall& call, const Focus<T>& focus, const Rows<Acc<T>>& rows, int tiles,
                         const Reader<T>& key, const Reader<T>& value, int head, Acc<T>* scratch, F&& to,
                         G&& to_mean) {
  using A = Acc<T>;
  const Plan& plan = call.plan;
  A *key_tile = scratch, *value_tile = scratch + kTileElements;
  for (int i = 0; i < plan.blocks; ++i) {
    const Columns of_key = columns_of_head(head, i, plan.head_dim);
    for (int j = 0; j < plan.blocks; ++j) {
      const Columns of_value = columns_of_head(head, j, plan.head_dim);
      OuterProduct<A> product;
      for (int tile = 0; tile < tiles; ++tile) {
        const Rows<A> r = rows.tile(tile);
        __syncthreads();
        stage(key_tile, key, r.token, of_key, [&](int slot, int column, auto& x) {
          focus.map(true, r, slot, of_key.first + column, x);
          for (auto& entry : x) entry *= r.gain[slot];
        });
        stage(value_tile, value, r.token, of_value, Identity{});
        __syncthreads();
        product.add(key_tile, value_tile);
      }
      product.store(
          scratch, [&](int row, int column, A x) { to(i, j, row, column, x); },
          [&](int row, A x) {
            if (j == 0) to_mean(i, row, x);
          });
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_keys(const __grid_constant__ ForwardCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Arena<A> arena{reinterpret_cast<A*>(shared)};
  const Plan& plan = call.plan;
  const Place at(plan, call.keys, blockIdx.x);
  const int tiles = call.keys.tiles_of(at.chunk);

  const Rows<A> rows(arena.take(Rows<A>::kElements));
  rows.find(plan.map, call.keys.tiling, at.window, call.keys.first_tile(at.chunk), tiles);
  const Focus<T> focus(call.params, plan.channels, plan.staged_scale, plan.bias_vector,
                       arena.take(plan.staged_scale));
  const Reader<T> key = reader<T>(call.params.key, at.batch, plan.vector);
  const Reader<T> value = reader<T>(call.params.value, at.batch, plan.vector);
  focus.measure(key, true, rows, tiles * kSlots);

  const bool whole = call.keys.chunks == 1;
  const A scale = whole ? A(plan.inverse_keys) : A(1);
  A* out = static_cast<A*>(whole ? call.state : call.partials);
  const std::int64_t which = whole ? at.pair : at.pair * call.keys.chunks + at.chunk;
  A* scratch = arena.take(ForwardShared<A>::kOuter);
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<A> state(out, plan, which, head);
    sum_head<T>(
        call, focus, rows, tiles, key, value, head, scratch,
        [&](int i, int j, int row, int column, A x) { state.put(i, j, row, column, x * scale); },
        [&](int i, int row, A x) { state.put_mean(i, row, x * scale); });
  }
}

/// Where attend keeps things, and the S and m of the head at hand.
template <class A>
struct AttendShared {
  A *m, *matrices, *inverse_denominator, *work;

  __device__ AttendShared(Arena<A>& arena, const Plan& plan)
      : m(arena.take(plan.blocks * kWidth)),
        matrices(arena.take(plan.matrix_blocks * kMatrixElements)),
        inverse_denominator(arena.take(kSlots)),
        work(arena.next) {}
};

/// out of one head on the tiles of a chunk of queries. m and resident matrices are in shared memory already.
template <class T, int K>
__device__ void attend_head(const ForwardCall& call, const Focus<T>& focus, const Rows<Acc<T>>& rows,
                            int first_tile, int tiles, const Place& at, int head,
                            const AttendShared<Acc<T>>& shared, const State<const Acc<T>>& state) {
  using A = Acc<T>;
  const Plan& plan = call.plan;
  const Reader<T> query = reader<T>(call.params.query, at.batch, plan.vector);
  const Reader<T> value = reader<T>(call.params.value, at.batch, plan.vector);
  const Writer<T> out = writer<T>(call.params.out, at.batch, plan.vector);
  const MapWindow where{plan.map, call.queries.tiling, at.window};
  const TapIndex taps{call.params.taps, plan.head_dim};
  A* tile_of_query = shared.work;
  A* convolved = shared.work;
  for (int tile = 0; tile < tiles; ++tile) {
    const Rows<A> r = rows.tile(tile);
    for (int j = 0; j < plan.blocks; ++j) {
      const Columns columns = columns_of_head(head, j, plan.head_dim);
      RowProduct<A> product;
      A denominator = 0;
      for (int i = 0; i < plan.blocks; ++i) {
        const Columns of_query = columns_of_head(head, i, plan.head_dim);
        __syncthreads();
        stage(tile_of_query, query, r.token, of_query,
              [&](int slot, int column, auto& x) { focus.map(false, r, slot, of_query.first + column, x); });
        const A* matrix = state.matrix(shared.matrices, plan, i, j, false);
        __syncthreads();
        product.add(tile_of_query, matrix);
        if (j == 0) denominator += row_dot(tile_of_query, shared.m + i * kWidth);
      }
      if (j == 0 && threadIdx.x % 2 == 0) {
        // Numerator and denominator are both without the row's gain, so eps is divided by it.
        const int slot = threadIdx.x / 2;
        shared.inverse_denominator[slot] = 1 / (denominator + focus.eps / r.gain[slot]);
      }
      const bool taps_here = taps.taps.weight.data && where.tiling.on_map(first_tile + tile);
      if (taps_here) {
        convolve<T, K>(convolved, shared.work + kTileElements, value, where, first_tile + tile, columns, taps,
                       false);
      } else {
        __syncthreads();
      }
      const int column = RowProduct<A>::column();
      A bias[4] = {};
      if (taps_here && taps.taps.bias.data) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (column + c < columns.width) {
            bias[c] = load_parameter<T>(taps.taps.bias, taps.kernel(columns.first + column + c));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = RowProduct<A>::slot(i), token = r.token[slot];
        if (token < 0) continue;
        A x[4] = {};
        if (taps_here) load_row(convolved + slot * kRow + column, x);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          x[c] += bias[c] + product.sum[i][c] * shared.inverse_denominator[slot];
        }
        store_four(out, token, columns, column, x);
      }
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ ForwardCall call) {
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
  const AttendShared<A> work(arena, plan);
  focus.measure(reader<T>(call.params.query, at.batch, plan.vector), false, rows, tiles * kSlots);
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<const A> state(static_cast<const A*>(call.state), plan, at.pair, head);
    state.stage(work.m, work.matrices, plan, false);
    attend_head<T, K>(call, focus, rows, first, tiles, at, head, work, state);
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads) attend_small(const __grid_constant__ ForwardCall call) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  Arena<A> arena{reinterpret_cast<A*>(shared)};
  const Plan& plan = call.plan;
  const Place at(plan, call.keys, blockIdx.x);
  const int key_tiles = call.keys.tiling.tiles, query_tiles = call.queries.tiling.tiles;

  const Rows<A> keys(arena.take(Rows<A>::kElements)), queries(arena.take(Rows<A>::kElements));
  keys.find(plan.map, call.keys.tiling, at.window, 0, key_tiles);
  queries.find(plan.map, call.queries.tiling, at.window, 0, query_tiles);
  const Focus<T> focus(call.params, plan.channels, plan.staged_scale, plan.bias_vector,
                       arena.take(plan.staged_scale));
  const AttendShared<A> work(arena, plan);
  const Reader<T> key = reader<T>(call.params.key, at.batch, plan.vector);
  const Reader<T> value = reader<T>(call.params.value, at.batch, plan.vector);
  focus.measure(key, true, keys, key_tiles * kSlots);
  focus.measure(reader<T>(call.params.query, at.batch, plan.vector), false, queries, query_tiles * kSlots);

  const A scale = A(plan.inverse_keys);
  for (int head = at.first_head; head < at.last_head; ++head) {
    const State<A> state(static_cast<A*>(call.state), plan, at.pair, head);
    sum_head<T>(
        call, focus, keys, key_tiles, key, value, head, work.work,
        [&](int i, int j, int row, int column, A x) {
          work.matrices[(i * plan.blocks + j) * kMatrixElements + row * kRow + column] = x * scale;
          if (call.state) state.put(i, j, row, column, x * scale);
        },
        [&](int i, int row, A x) {
          work.m[i * kWidth + row] = x * scale;
          if (call.state) state.put_mean(i, row, x * scale);
        });
    attend_head<T, K>(call, focus, queries, 0, query_tiles, at, head, work,
                      State<const A>(static_cast<const A*>(call.state), plan, at.pair, head));
  }
}

}  // namespace flatten::cuda::general

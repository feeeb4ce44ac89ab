// What a block of the general kernels works on: its place in the plan, the tokens of its chunk, tiles of rows
// staged in shared memory.
#pragma once

#include "element.cuh"
#include "plan.h"

namespace flatten::cuda::general {

/// Which (image, window), head group and chunk a thread block has: chunks fastest.
struct Place {
  int chunk, window, first_head, last_head;
  std::int64_t pair;   // image * windows + window
  std::int64_t batch;  // image

  __device__ Place(const Plan& plan, const Side& side, std::int64_t block) {
    chunk = static_cast<int>(block % side.chunks);
    block /= side.chunks;
    first_head = static_cast<int>(block % side.groups) * side.heads_per_group;
    last_head = min(plan.heads, first_head + side.heads_per_group);
    pair = block / side.groups;
    window = static_cast<int>(pair % plan.windows);
    batch = pair / plan.windows;
  }
};

/// Dynamic shared memory handed out front to back, in elements of the accumulate type.
template <class A>
struct Arena {
  A* next;

  __device__ A* take(int elements) {
    A* at = next;
    next += (elements + 3) / 4 * 4;  // keeps every part on 16 bytes
    return at;
  }
};

/// Up to 32 adjacent channels.
struct Columns {
  int first, width;
};

/// Block `index` of a head's columns.
__device__ inline Columns columns_of_head(int head, int index, int head_dim) {
  const int offset = index * kWidth;
  return {head * head_dim + offset, min(kWidth, head_dim - offset)};
}

/// One image of a (batch, token, channel) tensor. `vector`: rows and column blocks start on 16 bytes.
template <class T>
struct Reader {
  const T* data;
  std::int64_t stride;
  bool vector;

  __device__ const T* row(int token) const { return data + token * stride; }
};

template <class T>
struct Writer {
  T* data;
  std::int64_t stride;
  bool vector;

  __device__ T* row(int token) const { return data + token * stride; }
};

template <class T>
__device__ Reader<T> reader(const Tokens& t, std::int64_t batch, bool vector) {
  return {static_cast<const T*>(t.data) + batch * t.batch_stride, t.token_stride, vector};
}

template <class T>
__device__ Writer<T> writer(const MutableTokens& t, std::int64_t batch, bool vector) {
  return {static_cast<T*>(t.data) + batch * t.batch_stride, t.token_stride, vector};
}

/// What a block knows of the tokens of its chunk, in shared memory, by slot.
template <class A>
struct Rows {
  int* token;    // in the image, or -1
  int* local;    // in the window: the row of key_bias
  A* inverse;    // 1 / largest y of the row
  A* gain;       // phi = gain * (y * inverse)^p
  A* inverse_y;  // 1 / |y * inverse|^2
  A* inverse_p;  // 1 / |(y * inverse)^p|^2

  static constexpr int kElements = 4 * kChunkSlots + 2 * kChunkSlots * sizeof(int) / sizeof(A);

  __device__ explicit Rows(A* shared)
      : token(reinterpret_cast<int*>(shared + 4 * kChunkSlots)),
        local(token + kChunkSlots),
        inverse(shared),
        gain(shared + kChunkSlots),
        inverse_y(shared + 2 * kChunkSlots),
        inverse_p(shared + 3 * kChunkSlots) {}

  __device__ Rows tile(int index) const {
    Rows r = *this;
    const int skip = index * kSlots;
    r.token += skip, r.local += skip;
    r.inverse += skip, r.gain += skip, r.inverse_y += skip, r.inverse_p += skip;
    return r;
  }

  /// Looks up `tiles` tiles from `first` on; the caller synchronises.
  __device__ void find(const TokenMap& map, const Tiling& tiling, int window, int first, int tiles) const {
    for (int slot = threadIdx.x; slot < tiles * kSlots; slot += kThreads) {
      const int index = tiling.local(first + slot / kSlots, slot % kSlots);
      local[slot] = index;
      token[slot] = index < 0 ? -1 : map.at(window, index);
    }
  }
};

template <int N, class T, class F>
__device__ __forceinline__ void stage_by(Acc<T>* tile, const Reader<T>& in, const int* token, Columns columns,
                                         F&& map) {
  constexpr int lanes = kWidth / N;
#pragma unroll 2
  for (int i = threadIdx.x; i < kSlots * lanes; i += kThreads) {
    const int slot = i / lanes, column = i % lanes * N;
    Acc<T> x[N] = {};
    if (token[slot] >= 0 && column < columns.width) {
      load_pack<N>(in.row(token[slot]) + columns.first + column, x);
      map(slot, column, x);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) tile[slot * kRow + column + j] = x[j];
  }
}

/// tile[slot][column] = map(x), 0 where there is no token or channel. `map(slot, column, x)` changes the
/// values x[N] of adjacent channels in place.
template <class T, class F>
__device__ __forceinline__ void stage(Acc<T>* tile, const Reader<T>& in, const int* token, Columns columns,
                                      F&& map) {
  if (in.vector) {
    stage_by<kVector<T>>(tile, in, token, columns, map);
  } else {
    stage_by<1>(tile, in, token, columns, map);
  }
}

struct Identity {
  template <class X>
  __device__ void operator()(int, int, X&) const {}
};

/// Four adjacent channels of one token from global memory; channels past the width give 0.
template <class T>
__device__ __forceinline__ void load_four(const Reader<T>& in, int token, Columns columns, int column,
                                          Acc<T> (&x)[4]) {
  const T* from = in.row(token) + columns.first + column;
  if (in.vector && column + 4 <= columns.width) {
    load_pack<4>(from, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = column + j < columns.width ? widen(from[j]) : Acc<T>(0);
  }
}

template <class T>
__device__ __forceinline__ void store_four(const Writer<T>& out, int token, Columns columns, int column,
                                           const Acc<T> (&x)[4]) {
  T* to = out.row(token) + columns.first + column;
  if (out.vector && column + 4 <= columns.width) {
    store_pack<4>(to, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < columns.width) to[j] = narrow<T>(x[j]);
    }
  }
}

}  // namespace flatten::cuda::general

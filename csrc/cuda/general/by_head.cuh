// What the kernels with a warp for each head share: the lanes, and phi of a tile's rows.
//
// With y = (relu(x + bias) + eps) / scale, z = pre * y and phi = gain * z^3, where gain = |z| / (|z^3| pre).
// A row of usual length is cubed as it is (pre = 1). Where a sum of sixth powers could leave float's range,
// pre is 1 over the row's largest entry: its tile is mapped a second time.
//
// A lane has two views of its warp's 32 rows x 32 channels. By rows, for the mapping: four channels of eight
// rows, slots 4 * i + lane / 8. By products: eight columns, 4 * (lane % 4) + {0..3, 16..19}, of four rows,
// slots lane / 4 + 8 * t. And what belongs to one row is kept by one lane, `own_slot`.
#pragma once

#include <cfloat>

#include "../relu.cuh"
#include "by_head.h"
#include "tiles.cuh"

namespace flatten::cuda::general {

struct HeadLane {
  int lane = threadIdx.x % 32, head = threadIdx.x / 32;
  int part = lane % 8, sub = lane / 8;         // by rows
  int columns = lane % 4 * 4, row = lane / 4;  // by products

  __device__ int slot_of_row(int i) const { return 4 * i + sub; }
  __device__ int slot_of_product(int t) const { return row + 8 * t; }
  __device__ static int column_step(int c) { return c < 4 ? c : c + 12; }
  __device__ int own_slot() const { return 4 * part + sub; }

  /// The value of the lane whose own slot is that of row i of this lane's rows.
  template <class X>
  __device__ X of_row(X own, int i) const {
    return __shfl_sync(0xffffffffu, own, sub * 8 + i);
  }
  template <class X>
  __device__ X of_slot(X own, int slot) const {
    return __shfl_sync(0xffffffffu, own, slot % 4 * 8 + slot / 4);
  }
};

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return max(a, b); }
};

/// Joins x, one value for each row, over the eight lanes that share rows. A lane gets the value of the row of
/// its own slot.
template <class F>
__device__ __forceinline__ float reduce_rows(const HeadLane& at, float (&x)[8], F&& join) {
#pragma unroll
  for (int width = 4; width > 0; width /= 2) {
    const bool upper = at.part & width;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float give = upper ? x[j] : x[j + width], keep = upper ? x[j + width] : x[j];
      x[j] = join(keep, __shfl_xor_sync(0xffffffffu, give, width));
    }
  }
  return x[0];
}

/// Copies 16 bytes to shared memory, or zeros where `there` is false. The copy may go on meanwhile: the lane
/// that started it calls wait_for_copies().
__device__ __forceinline__ void copy_four(float* to, const float* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  float x[4] = {};
  if (there) load_pack<4>(from, x);
  store_pack<4, float>(to, x);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/// The lane's share of one token tensor: four channels of its head, by rows.
struct HeadReader {
  const float* data;
  std::int64_t stride;
  bool active;  // the head has these channels

  __device__ HeadReader(const Tokens& t, std::int64_t batch, const HeadLane& at, int head_dim)
      : data(static_cast<const float*>(t.data) + batch * t.batch_stride + at.head * head_dim + at.part * 4),
        stride(t.token_stride),
        active(at.part * 4 < head_dim) {}

  /// Zeros where there is no token.
  __device__ void load(const HeadLane& at, int own_token, float (&x)[8][4]) const {
    if (__all_sync(0xffffffffu, active && own_token >= 0)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) load_pack<4>(data + at.of_row(own_token, i) * stride, x[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = at.of_row(own_token, i);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] = 0;
      if (active && token >= 0) load_pack<4>(data + token * stride, x[i]);
    }
  }

  /// Starts to copy them to tile[slot][channel].
  __device__ void start(const HeadLane& at, int own_token, float* tile) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = at.of_row(own_token, i);
      const bool there = active && token >= 0;
      copy_four(tile + at.slot_of_row(i) * kRow + at.part * 4, data + (there ? token * stride : 0), there);
    }
  }
};

/// The factors in phi = gain * (pre * y)^3 of one row, kept by the lane whose own slot it is.
struct RowNorm {
  float pre, gain, inverse_z, inverse_cube;  // 1 / |z|^2, 1 / |z^3|^2
};

/// 1 / scale of the warp's head, 0 behind it: entries there become zeros.
__device__ inline void stage_inverse_scale(const Mapping& mapping, const HeadLane& at, int head_dim,
                                           float* to) {
  const float* scale = static_cast<const float*>(mapping.scale.data);
  to[at.lane] = at.lane >= head_dim ? 0.0f : scale ? 1 / scale[at.head * head_dim + at.lane] : 1.0f;
  __syncwarp();
}

/// Maps tiles of queries or keys. Every warp of the block calls it for every tile: it exchanges sums.
struct HeadFocus {
  HeadReader in;
  const float* bias;  // of the lane's channels, or null
  int channels, heads;
  float eps;
  const float* inverse;  // 1 / scale of the head's channels, in shared memory
  float2* exchange;      // [2 + 1][heads][32]
  int parity = 0;

  __device__ HeadFocus(const AttentionInputs& params, const Tokens& tokens, bool keys, std::int64_t batch,
                       const HeadLane& at, const Plan& plan, float* inverse, float* exchange)
      : in(tokens, batch, at, plan.head_dim),
        bias(keys && params.mapping.key_bias.data ? static_cast<const float*>(params.mapping.key_bias.data) +
                                                        at.head * plan.head_dim + at.part * 4
                                                  : nullptr),
        channels(plan.channels),
        heads(plan.heads),
        eps(static_cast<float>(params.eps)),
        inverse(inverse),
        exchange(reinterpret_cast<float2*>(exchange)) {
    stage_inverse_scale(params.mapping, at, plan.head_dim, inverse);
  }

  __device__ void load(const HeadLane& at, int own_token, int own_local, float (&x)[8][4]) const {
    in.load(at, own_token, x);
    if (bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int local = at.of_row(own_local, i);
      if (!in.active || local < 0) continue;
      float b[4];
      load_pack<4>(bias + static_cast<std::int64_t>(local) * channels, b);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] += b[c];
    }
  }

  /// The rows of the bias, or zeros.
  __device__ void load_bias(const HeadLane& at, int own_local, float (&x)[8][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int local = at.of_row(own_local, i);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] = 0;
      if (bias && in.active && local >= 0) {
        load_pack<4>(bias + static_cast<std::int64_t>(local) * channels, x[i]);
      }
    }
  }

  /// x += what the lane has copied to the tile.
  __device__ void add_tile(const HeadLane& at, const float* tile, float (&x)[8][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float more[4];
      load_pack<4>(tile + at.slot_of_row(i) * kRow + at.part * 4, more);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] += more[c];
    }
  }

  /// Starts to copy the rows of the bias, which there is, to tile[slot][channel].
  __device__ void start_bias(const HeadLane& at, int own_local, float* tile) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int local = at.of_row(own_local, i);
      const bool there = in.active && local >= 0;
      copy_four(tile + at.slot_of_row(i) * kRow + at.part * 4,
                bias + (there ? static_cast<std::int64_t>(local) * channels : 0), there);
    }
  }

  /// z^3 to the tile; the sums of z^2 and z^6 and, with `vector`, of z^3 * vector, over the head's channels.
  /// `own_pre` is 1 without kPre.
  template <bool kDot, bool kPre>
  __device__ void cube(const HeadLane& at, const float (&x)[8][4], float own_pre, float* tile,
                       const float (&vector)[4], float2& sums, float& dot) const {
    float squares[8], sixths[8], dots[8], of_scale[4], of_eps[4];
    load_pack<4>(inverse + at.part * 4, of_scale);
#pragma unroll
    for (int c = 0; c < 4; ++c) of_eps[c] = eps * of_scale[c];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float pre = kPre ? at.of_row(own_pre, i) : 1.0f;
      float z3[4];
      squares[i] = sixths[i] = dots[i] = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float y = relu(x[i][c]) * of_scale[c] + of_eps[c], z = kPre ? y * pre : y, z2 = z * z;
        z3[c] = z2 * z;
        squares[i] += z2;
        sixths[i] += z3[c] * z3[c];
        if (kDot) dots[i] += z3[c] * vector[c];
      }
      store_pack<4, float>(tile + at.slot_of_row(i) * kRow + at.part * 4, z3);
    }
    sums.x = reduce_rows(at, squares, Add());
    sums.y = reduce_rows(at, sixths, Add());
    if (kDot) dot = reduce_rows(at, dots, Add());
  }

  /// The sum over heads of what each warp has for its own slots. Synchronises.
  template <class F>
  __device__ float2 join(const HeadLane& at, int buffer, float2 mine, F&& add) {
    float2* here = exchange + buffer * heads * kHeadSlots;
    here[at.head * kHeadSlots + at.lane] = mine;
    __syncthreads();
    float2 total = here[at.lane];
    for (int head = 1; head < heads; ++head) {
      const float2 more = here[head * kHeadSlots + at.lane];
      total.x = add(total.x, more.x), total.y = add(total.y, more.y);
    }
    return total;
  }

  /// Leaves z^3 of the tile in `tile` (this warp's own; the caller synchronises the warp) and returns the
  /// norms of the own slot's row. `dot`: z^3 . vector over the head's channels.
  template <bool kDot>
  __device__ RowNorm map(const HeadLane& at, int own_token, int own_local, float* tile,
                         const float (&vector)[4], float& dot) {
    float x[8][4];
    load(at, own_token, own_local, x);
    return map<kDot>(at, x, own_token, own_local, tile, vector, dot);
  }

  /// The same for the inputs x, which `load` has read.
  template <bool kDot>
  __device__ RowNorm map(const HeadLane& at, const float (&x)[8][4], int own_token, int own_local,
                         float* tile, const float (&vector)[4], float& dot) {
    float2 sums;
    cube<kDot, false>(at, x, 1, tile, vector, sums, dot);
    float2 total = join(at, parity, sums, Add());
    parity ^= 1;
    // |y|^2 of a row whose sixth powers and their products with S stay far from float's borders.
    const bool usual = total.x >= 0x1p-12f && total.x <= 0x1p18f;
    RowNorm norm{1, sqrtf(total.x / total.y), 1 / total.x, 1 / total.y};
    if (__any_sync(0xffffffffu, own_token >= 0 && !usual))
      norm = map_again<kDot>(at, own_token, own_local, tile, vector, dot);
    if (own_token < 0) norm = {1, 0, 0, 0};
    return norm;
  }

  /// Maps the tile again, with every row divided by its largest entry first. All warps have seen the same
  /// sums, so all of them come here.
  template <bool kDot>
  __device__ RowNorm map_again(const HeadLane& at, int own_token, int own_local, float* tile,
                               const float (&vector)[4], float& dot) {
    float x[8][4], most[8], of_scale[4];
    float2 sums;
    load(at, own_token, own_local, x);
    load_pack<4>(inverse + at.part * 4, of_scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      most[i] = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) most[i] = max(most[i], relu(x[i][c]) * of_scale[c] + eps * of_scale[c]);
    }
    const float own_most = reduce_rows(at, most, Larger());
    const float largest = join(at, 2, {own_most, 0}, Larger()).x;
    // A row of zeros (eps = 0) has no direction: it maps to zeros. One with an infinity maps to NaN: its
    // factor is 0.
    const float pre = largest >= FLT_MIN ? 1 / largest : 0.0f;
    cube<kDot, true>(at, x, pre, tile, vector, sums, dot);
    const float2 total = join(at, parity, sums, Add());
    parity ^= 1;
    if (largest < FLT_MIN) return {0, 0, 0, 0};
    return {pre, largest * sqrtf(total.x / total.y), 1 / total.x, 1 / total.y};
  }
};

}  // namespace flatten::cuda::general

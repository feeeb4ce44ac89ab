// What the kernels with a warp for each head share: phi of a tile's rows, the products, the depthwise taps.
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

#include "by_head.h"
#include "reduce.cuh"
#include "state.cuh"

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

/// max(x, 0), NaN if x is.
__device__ __forceinline__ float relu(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0 ? 0.0f : x;
#endif
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return max(a, b); }
};

/// What the eight lanes that share rows make of x, one value for each of their rows: of the own slot's row.
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

/// Of one row, in the lane whose own slot it is: phi = gain * (pre * y)^3.
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

  /// The same of what `load` has read.
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

  /// With every row divided by its largest entry first. All warps see the same sums, so all come here.
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
    // A row of zeros (eps = 0) has no direction: it maps to zeros.
    const float pre = largest >= FLT_MIN ? 1 / largest : 0.0f;
    cube<kDot, true>(at, x, pre, tile, vector, sums, dot);
    const float2 total = join(at, parity, sums, Add());
    parity ^= 1;
    if (!(pre > 0)) return {0, 0, 0, 0};
    return {pre, largest * sqrtf(total.x / total.y), 1 / total.x, 1 / total.y};
  }
};

/// The lane's eight columns, by products, of a row of a tile.
__device__ __forceinline__ void load_columns(const HeadLane& at, const float* row, float (&to)[8]) {
  float x[4], y[4];
  load_pack<4>(row + at.columns, x);
  load_pack<4>(row + at.columns + 16, y);
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = x[c], to[c + 4] = y[c];
}

/// rows[slot] += a[slot] * matrix over 32 channels, by products.
struct HeadProduct {
  float sum[4][8] = {};

  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* matrix) {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        float y[4], z[4];
        load_pack<4>(matrix + (k + l) * kRow + at.columns, y);
        load_pack<4>(matrix + (k + l) * kRow + at.columns + 16, z);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sum[t][c] += x[t][l] * y[c];
            sum[t][c + 4] += x[t][l] * z[c];
          }
        }
      }
    }
  }
};

/// Where row i of a matrix for both products lies, such that neither meets a bank twice.
__host__ __device__ constexpr int permuted_row(int i) { return i % 16 / 4 + 4 * (i % 4 + i / 16 * 4); }

/// As HeadProduct, of a matrix with its rows permuted.
struct HeadPermutedProduct : HeadProduct {
  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* matrix) {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
      const float* rows = matrix + permuted_row(k) * kRow;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        float y[8];
        load_columns(at, rows + 4 * l * kRow, y);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[t][c] += x[t][l] * y[c];
        }
      }
    }
  }

  /// rows[slot] += a[slot] * matrix^T
  __device__ __forceinline__ void add_transposed(const HeadLane& at, const float* a, const float* matrix) {
    const float* mine = matrix + at.lane % 4 * kRow;
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float x[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) load_pack<4>(a + at.slot_of_product(t) * kRow + k, x[t]);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float y[4];
        load_pack<4>(mine + 4 * c * kRow + k, y);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int l = 0; l < 4; ++l) sum[t][c] += x[t][l] * y[l];
        }
      }
    }
  }
};

/// sum over the slots of a[slot]^T b[slot], 32 x 32: a lane has four rows and eight columns.
struct HeadOuter {
  float sum[4][8] = {};

  __device__ __forceinline__ void add(const HeadLane& at, const float* a, const float* b) {
#pragma unroll 8
    for (int slot = 0; slot < kHeadSlots; ++slot) {
      float x[4], y[4], z[4];
      load_pack<4>(a + slot * kRow + at.row * 4, x);
      load_pack<4>(b + slot * kRow + at.columns, y);
      load_pack<4>(b + slot * kRow + at.columns + 16, z);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[r][c] += x[r] * y[c];
          sum[r][c + 4] += x[r] * z[c];
        }
      }
    }
  }

  /// To a state, with the means of the lane's four channels by rows.
  __device__ void store(const HeadLane& at, const State<float>& to, float (&mean)[4], float scale) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        to.put(0, 0, at.row * 4 + r, at.columns + HeadLane::column_step(c), sum[r][c] * scale);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      mean[c] += __shfl_xor_sync(0xffffffffu, mean[c], 8);
      mean[c] += __shfl_xor_sync(0xffffffffu, mean[c], 16);
      if (at.sub == 0) to.put_mean(0, at.part * 4 + c, mean[c] * scale);
    }
  }
};

enum class Staged { kPlain, kTransposed, kPermuted };

/// S or its gradient of the warp's head in the warp's shared memory, zero behind the head.
template <Staged kStaged>
__device__ inline void stage_head_matrix(const HeadLane& at, const State<const float>& state, float* matrix) {
  const int column = at.part * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = at.slot_of_row(i);
    float x[4] = {};
    // The head's width is a multiple of four.
    if (row < state.head_dim && column < state.head_dim)
      load_pack<4>(state.s + row * state.head_dim + column, x);
    if constexpr (kStaged == Staged::kTransposed) {
#pragma unroll
      for (int c = 0; c < 4; ++c) matrix[(column + c) * kRow + row] = x[c];
    } else {
      store_pack<4, float>(matrix + (kStaged == Staged::kPermuted ? permuted_row(row) : row) * kRow + column,
                           x);
    }
  }
}

__device__ inline void load_head_mean(int first, const State<const float>& state, float (&to)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = first + c < state.head_dim ? state.m[first + c] : 0.0f;
}

/// Where a block works: chunks fastest.
struct HeadPlace {
  int chunk, window;
  std::int64_t pair, batch;

  __device__ HeadPlace(const Plan& plan, const HeadSide& side)
      : chunk(static_cast<int>(blockIdx.x % side.chunks)), pair(blockIdx.x / side.chunks) {
    window = static_cast<int>(pair % plan.windows);
    batch = pair / plan.windows;
  }
};

/// The own slot's local index and token; -1 where there is none.
struct OwnToken {
  int local, token;

  __device__ OwnToken(const HeadLane& at, const TokenMap& map, const HeadTiling& tiling, int window, int tile)
      : local(tiling.local(tile, at.own_slot())), token(local < 0 ? -1 : map.at(window, local)) {}
};

/// A tile of a map in the warp's head with the pixels around it, K / 2 on each side; zeros outside of the
/// window.
template <int K>
struct HeadHalo {
  static constexpr int kPitch = 12;  // pixels of a row

  /// Starts to copy it; the caller waits, and synchronises the warp.
  static __device__ __forceinline__ void start(float* to, const HeadReader& in, const TokenMap& map,
                                               const HeadTiling& tiling, int window, int tile,
                                               const HeadLane& at) {
    const int y = tiling.y(tile) - K / 2, x = tiling.x(tile) - K / 2;
    const int map_y = window / map.windows_w * map.window_h + y + map.shift_h;
    const int map_x = window % map.windows_w * map.window_w + x + map.shift_w;
    std::int64_t offset[kPitch / 4];
    bool inside[kPitch / 4];
#pragma unroll
    for (int i = 0; i < kPitch / 4; ++i) {
      const int column = i * 4 + at.sub;
      inside[i] = in.active && x + column >= 0 && x + column < map.window_w;
      offset[i] = inside[i] ? wrapped(map_x + column, map.map_w) * in.stride : 0;
    }
    float* row_to = to + at.sub * kWidth + at.part * 4;
#pragma unroll
    for (int r = 0; r < kHeadRows + K - 1; ++r) {
      const bool row_inside = y + r >= 0 && y + r < map.window_h;
      const int row = row_inside ? wrapped(map_y + r, map.map_h) : 0;
      const float* from = in.data + (map.prefix + static_cast<std::int64_t>(row) * map.map_w) * in.stride;
#pragma unroll
      for (int i = 0; i < kPitch / 4; ++i) {
        copy_four(row_to + (r * kPitch + i * 4) * kWidth, from + offset[i], row_inside && inside[i]);
      }
    }
  }

  static __device__ int wrapped(int at, int size) { return at >= size ? at - size : at; }

  /// The pixels of row r that half a tile sees, of the lane's channel.
  static __device__ __forceinline__ void load(const float* halo, const HeadLane& at, int half, int r,
                                              float (&to)[4 + K - 1]) {
#pragma unroll
    for (int i = 0; i < 4 + K - 1; ++i) to[i] = halo[(r * kPitch + half * 4 + i) * kWidth + at.lane];
  }
};

/// Where pixel (row, column) of half a tile lies in it.
__device__ __forceinline__ int slot_of_pixel(int half, int row, int column) {
  return row * kHeadColumns + half * 4 + column;
}

/// What each lane has of a tile, by pixels, to out[slot][channel].
__device__ __forceinline__ void store_pixels(const HeadLane& at, const float (&x)[2][4][4], float* out) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    out[slot_of_pixel(i / 16, i / 4 % 4, i % 4) * kRow + at.lane] = x[i / 16][i / 4 % 4][i % 4];
  }
}

/// The taps of the lane's channel, 0 behind the head.
template <int K>
__device__ void load_head_taps(const Taps& taps, const HeadLane& at, int head_dim, float (&to)[K * K]) {
  const int channel = min(at.lane, head_dim - 1);
  const float* from =
      static_cast<const float*>(taps.weight.data) +
      static_cast<std::int64_t>(taps.per_channel ? at.head * head_dim + channel : channel) * K * K;
#pragma unroll
  for (int i = 0; i < K * K; ++i) to[i] = from[i];
}

}  // namespace flatten::cuda::general

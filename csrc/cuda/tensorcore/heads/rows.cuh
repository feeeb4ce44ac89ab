// Rows of tokens as these kernels see them: where they lie, and phi of them.
#pragma once

#include "../../relu.cuh"
#include "../range.cuh"
#include "../windows.cuh"
#include "params.h"

namespace flatten::cuda::tensorcore::heads {

/// The factor of powers z^p before they are rounded. In fp16 they are at most 1 before it (measure_rows).
template <typename T>
constexpr float kPowerRoom = kNarrow<T> ? 8192.0f : 1.0f;

/// A row's number in its window, and its token in the image.
struct Spot {
  int local, token;
};

__device__ __forceinline__ Spot pixel_spot(const Rows& rows, const Window& window, int y, int x) {
  return {rows.prefix + y * rows.grid.window_w + x,
          rows.prefix + window.row(rows.grid, y) + window.column(rows.grid, x)};
}

__device__ __forceinline__ Spot row_spot(const Rows& rows, const Window& window, int local) {
  if (rows.grid.raster || local < rows.prefix) return {local, local};
  const int pixel = local - rows.prefix, y = pixel / rows.grid.window_w;
  return pixel_spot(rows, window, y, pixel - y * rows.grid.window_w);
}

/// Channel `channel` of a token.
__device__ __forceinline__ const char* row_of(const TokenArray& x, int image, int token, int channel) {
  return static_cast<const char*>(x.data) + image * x.image + static_cast<int64_t>(token) * x.token +
         channel * 2;
}

__device__ __forceinline__ uint4 load16(const char* from) { return *reinterpret_cast<const uint4*>(from); }

/// Adds the positional encoding of a row, from channel `channel` on.
template <typename T>
__device__ __forceinline__ void add_bias(float (&x)[8], const Features& features, int local, int channel) {
  const Floats& bias = features.focus.key_bias;
  if (!bias.data) return;
  add8<T>(x, bias, static_cast<int64_t>(local) * features.heads * features.head_dim + channel);
}

/// Turns inputs into z: (relu(x) + eps) / scale times `prescale`, or what is mapped already times `prescale`.
__device__ __forceinline__ void scale8(float (&x)[8], const FocusParams& focus, const float (&inverse)[8],
                                       float prescale) {
  if (focus.mode == kNoMapping) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= prescale;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = fmaf(relu(x[i]), inverse[i], focus.eps * inverse[i]) * prescale;
    }
  }
}

/// Raises z to the power p.
__device__ __forceinline__ void raise8(float (&z)[8], const FocusParams& focus) {
  if (focus.mode == kNoMapping) return;
  if (focus.mode == 3) {
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = z[i] * z[i] * z[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = raise<kAnyPower>(z[i], focus.power);
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&x)[8], float factor) {
  return make_uint4(Pair<T>::pack(x[0] * factor, x[1] * factor), Pair<T>::pack(x[2] * factor, x[3] * factor),
                    Pair<T>::pack(x[4] * factor, x[5] * factor), Pair<T>::pack(x[6] * factor, x[7] * factor));
}

__device__ __forceinline__ void set_words(uint32_t (&words)[4], const uint4& x) {
  words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
}

/// Fills an array with 1 / scale of the block's head, and with zeros behind its last channel.
template <typename T, int kSlices>
__device__ __forceinline__ void load_inverse_scale(float* inverse, const Features& features, int head) {
  for (int c = threadIdx.x; c < kSlices * kSliceChannels; c += blockDim.x) {
    const bool own = c < features.head_dim;
    const Floats& scale = features.focus.scale;
    inverse[c] = !own ? 0.0f : scale.data ? 1.0f / element<T>(scale, head * features.head_dim + c) : 1.0f;
  }
}

/// The largest magnitude that threads bring. Synchronises the block; `most` is in shared memory.
__device__ __forceinline__ float block_largest(float largest, unsigned* most) {
  __syncthreads();
  if (threadIdx.x == 0) *most = 0;
  __syncthreads();
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) atomicMax(most, __float_as_uint(largest));
  __syncthreads();
  return __uint_as_float(*most);
}

/// fp16 only: the factor of a head's S and m before they are rounded.
template <typename T>
__device__ __forceinline__ float scale_of_head(const float* s, const float* m, int head_dim, unsigned* most) {
  if constexpr (!kNarrow<T>) return 1.0f;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < head_dim * head_dim; i += blockDim.x) largest = fmaxf(largest, fabsf(s[i]));
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) largest = fmaxf(largest, fabsf(m[i]));
  return fit(block_largest(largest, most));
}

/// Rows as fragments of A, [slice][r][w]: word w of row g + 8r holds the channels 8t + 2w and 8t + 2w + 1.
template <int kSlices, int kRows>
struct RowWords {
  uint32_t words[kSlices][kRows][4];
};

/// Computes d = rows times an n-block: d[i][0..1] belong to row g + 16i, d[i][2..3] to row g + 16i + 8. The
/// block's B fragments are at shared address `from`, slice by slice.
template <typename T, int kSlices, int kRows>
__device__ __forceinline__ void times_block(float (&d)[kRows / 2][4], const RowWords<kSlices, kRows>& rows,
                                            uint32_t from) {
  const float zeros[4] = {};
  unrolled<kSlices>([&](auto s) {
    uint32_t f[4];
    load_shared<s * 512>(f, from);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const uint32_t (&upper)[4] = rows.words[s][2 * i], (&lower)[4] = rows.words[s][2 * i + 1];
      if constexpr (s == 0) {
        mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f[0], f[1], zeros);
      } else {
        mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f[0], f[1], d[i]);
      }
      mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f[2], f[3], d[i]);
    }
  });
}

/// The 8 kRows rows that a warp takes at once. A lane has the rows g, g + 8 and so on.
template <typename T, int kSlices, int kRows>
struct RowTile {
  Spot spot[kRows];
  RowNorms norms[kRows];

  template <typename At>
  __device__ __forceinline__ RowTile(const Features& features, int window_index, At at) {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      spot[r] = at(lane.g + 8 * r);
      norms[r] = features.norms[static_cast<int64_t>(window_index) * features.rows.tokens + spot[r].local];
    }
  }

  /// The lane's vectors of the head; zeros beyond its channels.
  __device__ __forceinline__ void load(RowWords<kSlices, kRows>& tile, const TokenArray& x, int image,
                                       int channel, int head_dim) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int c = s * kSliceChannels + 8 * t;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        set_words(tile.words[s][r],
                  c < head_dim ? load16(row_of(x, image, spot[r].token, channel + c)) : uint4{});
      }
    }
  }

  /// Turns inputs into powers, times kPowerRoom.
  __device__ __forceinline__ void raise(RowWords<kSlices, kRows>& tile, const Features& features,
                                        const float* inverse_scale, int channel) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int c = s * kSliceChannels + 8 * t;
      float inverse[8];
      __syncwarp();  // one slice after the other, in fewer registers
      load8(inverse, inverse_scale + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t (&x)[4] = tile.words[s][r];
        float y[8];
        unpack8<T>(y, {x[0], x[1], x[2], x[3]});
        if (c < features.head_dim) heads::add_bias<T>(y, features, spot[r].local, channel + c);
        scale8(y, features.focus, inverse, norms[r].x);
        raise8(y, features.focus);
        set_words(tile.words[s][r], c < features.head_dim ? pack8<T>(y, kPowerRoom<T>) : uint4{});
      }
    }
  }
};

}  // namespace flatten::cuda::tensorcore::heads

// Rows of tokens into and out of head-major blocks, and parameters into vectors.
#pragma once

#include "layout.h"

namespace flatten::cpu::FLATTEN_ISA {

/// One token's row into a block (dst: its first element there); heads lie `stride` apart.
template <class X, class T>
void pack_row(const X* src, T* dst, i64 stride, const Channels& c, T factor) {
  for (i64 h = 0; h < c.heads; ++h, src += c.dim, dst += stride) {
    i64 d = 0;
    for (; d + kLanes<T> <= c.dim; d += kLanes<T>) store(dst + d, load(src + d) * factor);
    if (d < c.dim) store(dst + d, load_partial(src + d, c.dim - d) * factor);
  }
}

/// The way back, rounding to the storage type.
template <class X, class T>
void unpack_row(const T* src, X* dst, i64 stride, const Channels& c) {
  for (i64 h = 0; h < c.heads; ++h, src += stride, dst += c.dim) {
    i64 d = 0;
    for (; d + kLanes<T> <= c.dim; d += kLanes<T>) store(dst + d, load(src + d));
    if (d < c.dim) store_partial(dst + d, load(src + d), c.dim - d);
  }
}

template <class T>
void set_zero(T* x, i64 count) {
  __builtin_memset(x, 0, static_cast<std::size_t>(count) * sizeof(T));
}

/// y += x; count is a multiple of the lanes.
template <class T>
void add_to(T* y, const T* x, i64 count) {
  for (i64 i = 0; i < count; i += kLanes<T>) store(y + i, load(y + i) + load(x + i));
}

/// kLanes elements of a parameter in its own dtype; fewer at the end of a row.
template <class T>
FLATTEN_INLINE Vec<T> load_parameter(const Parameter& p, i64 index, i64 count) {
  if constexpr (sizeof(T) == 8) {
    const double* x = static_cast<const double*>(p.data) + index;
    return count < kLanes<T> ? load_partial(x, count) : load(x);
  } else {
    const bool partial = count < kLanes<T>;
    switch (p.dtype) {
      case Dtype::kBFloat16: {
        const BFloat16* x = static_cast<const BFloat16*>(p.data) + index;
        return partial ? load_partial(x, count) : load(x);
      }
      case Dtype::kFloat16: {
        const Float16* x = static_cast<const Float16*>(p.data) + index;
        return partial ? load_partial(x, count) : load(x);
      }
      default: {
        const float* x = static_cast<const float*>(p.data) + index;
        return partial ? load_partial(x, count) : load(x);
      }
    }
  }
}

template <class T>
T read_parameter(const Parameter& p, i64 index) {
  return load_parameter<T>(p, index, 1)[0];
}

template <class T>
void write_parameter(const MutableParameter& p, i64 index, T value) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(p.data)[index] = value;
      break;
    case Dtype::kFloat32:
      static_cast<float*>(p.data)[index] = static_cast<float>(value);
      break;
    case Dtype::kBFloat16:
      store_partial(static_cast<BFloat16*>(p.data) + index, broadcast(static_cast<float>(value)), 1);
      break;
    case Dtype::kFloat16:
      store_partial(static_cast<Float16*>(p.data) + index, broadcast(static_cast<float>(value)), 1);
      break;
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA

// Rows of tokens into and out of head-major blocks, and parameters into vectors.
#pragma once

#include "../kernels.h"
#include "layout.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Rows of a block's tokens in a (batch, token, channel) tensor.
template <class X>
struct Rows {
  X* at[kBlock];
  X* operator[](int t) const { return at[t]; }
};

template <class X>
Rows<const X> rows_of(const Tokens& x, const Block& block) {
  Rows<const X> rows;
  const X* image = static_cast<const X*>(x.data) + block.image * x.batch_stride;
  for (int t = 0; t < block.count; ++t) rows.at[t] = image + block.token[t] * x.token_stride;
  return rows;
}
template <class X>
Rows<X> rows_of(const MutableTokens& x, const Block& block) {
  Rows<X> rows;
  X* image = static_cast<X*>(x.data) + block.image * x.batch_stride;
  for (int t = 0; t < block.count; ++t) rows.at[t] = image + block.token[t] * x.token_stride;
  return rows;
}

/// Whether a result of `tokens` rows an image is written past the caches. It is where it is large, every row
/// begins a cache line, and every head consists of whole lines.
template <class X>
bool is_streamed(const MutableTokens& to, const Geometry& g, i64 tokens) {
  if constexpr (kFillsLine<X>) {
    constexpr i64 kLine = kVectorBytes, kSize = sizeof(X);
    const bool begins_lines = reinterpret_cast<std::uintptr_t>(to.data) % kLine == 0 &&
                              to.batch_stride * kSize % kLine == 0 && to.token_stride * kSize % kLine == 0;
    return to.data && begins_lines && g.head_dim * kSize % kLine == 0 &&
           g.batch * tokens * g.channels() * kSize >= streamed_from();
  }
  return false;
}

/// Memory that the next block will read. The products and taps of the block at hand call step() every hundred
/// vector operations or so, and each call prefetches a few cache lines. (Many lines at once are slower: the
/// core drops requests beyond those it can keep track of.)
class Upcoming {
 public:
  /// Forgets everything; the lines of all rows added from here on will be spread over about `steps` steps.
  void plan(i64 steps) {
    steps_ = greater(steps, 1);
    spans_ = next_ = 0;
    lines_ = per_step_ = 0;
    at_ = end_ = nullptr;
  }
  /// Adds the block's rows of a tensor.
  template <class X>
  void add(const Tokens& x, const Block& block, i64 channels) {
    const X* image = static_cast<const X*>(x.data) + block.image * x.batch_stride;
    add_rows(image, x.token_stride, block.token, block, channels);
  }
  template <class X>
  void add(const MutableTokens& x, const Block& block, i64 channels) {
    add<X>(Tokens{x.data, x.batch_stride, x.token_stride}, block, channels);
  }
  /// Adds rows index[t] of a matrix for every token t of the block; within a run of the block the indices go
  /// up by one.
  template <class X>
  void add_rows(const X* rows, i64 stride, const i64* index, const Block& block, i64 channels) {
    const i64 bytes = channels * static_cast<i64>(sizeof(X));
    for (int run = 0; run < block.runs; ++run) {
      const int begin = block.run_begin[run], end = block.run_begin[run + 1];
      if (stride == channels) {
        add_span(rows + index[begin] * stride, (end - begin) * bytes);
      } else {
        for (int t = begin; t < end; ++t) add_span(rows + index[t] * stride, bytes);
      }
    }
    lines_ += ceil_div(block.count * bytes, kLine);
    per_step_ = ceil_div(lines_, steps_);
  }
  FLATTEN_INLINE void step() {
    const char* at = at_;
    for (i64 left = per_step_; left > 0; --left) {
      if (at >= end_) {
        if (next_ == spans_) break;
        at = span_[next_].begin;
        end_ = span_[next_++].end;
      }
      __builtin_prefetch(at, 0, 2);  // into the second-level cache
      at += kLine;
    }
    at_ = at;
  }

 private:
  static constexpr i64 kLine = 64;  // [bytes]
  // Spans that are kept; others are not read ahead. A key pass adds the most: a block's rows of k, v, their
  // gradients and key_bias, and of the output's gradient for the taps, a span a row at the worst.
  static constexpr int kMost = 6 * kBlock;
  struct Span {
    const char *begin, *end;
  };

  /// Spans that follow each other in memory become one.
  void add_span(const void* begin, i64 bytes) {
    const char* first = static_cast<const char*>(begin);
    if (spans_ > 0 && span_[spans_ - 1].end == first) {
      span_[spans_ - 1].end = first + bytes;
    } else if (spans_ < kMost) {
      span_[spans_++] = {first, first + bytes};
    }
  }

  Span span_[kMost];
  int spans_ = 0, next_ = 0;
  i64 lines_ = 0, steps_ = 1, per_step_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

/// Loads or stores a vector, or `count` elements where a head has no more left.
template <class X>
FLATTEN_INLINE Vec<Accumulate<X>> load_at_most(const X* p, i64 count) {
  return count < kLanes<Accumulate<X>> ? load_partial(p, count) : load(p);
}
template <class X>
FLATTEN_INLINE void store_at_most(X* p, Vec<Accumulate<X>> x, i64 count) {
  if (count < kLanes<Accumulate<X>>) {
    store_partial(p, x, count);
  } else {
    store(p, x);
  }
}

/// Copies one head's `dim` elements, times a factor, to a row padded with zeros; and back.
template <class X, class T>
FLATTEN_INLINE void pack(const X* from, T* to, i64 dim, T factor) {
  for (i64 d = 0; d < dim; d += kLanes<T>) store(to + d, load_at_most(from + d, dim - d) * factor);
}
template <class X, class T>
FLATTEN_INLINE void unpack(const T* from, X* to, i64 dim) {
  for (i64 d = 0; d < dim; d += kLanes<T>) store_at_most(to + d, load(from + d), dim - d);
}

/// Copies one head of a block's rows, times factor[t], to rows of `padded` elements.
template <class X, class T>
void pack_head(const Rows<const X>& rows, int count, i64 head, Channels c, const T* factor, T* to) {
  for (int t = 0; t < count; ++t, to += c.padded) {
    const X* from = rows[t] + head * c.dim;
    if (c.dim != c.padded) {
      pack(from, to, c.dim, factor[t]);
      continue;
    }
    const Vec<T> f = broadcast(factor[t]);
    for (i64 d = 0; d < c.padded; d += kLanes<T>) store(to + d, load(from + d) * f);
  }
}
template <class X, class T>
void unpack_head(const T* from, int count, i64 head, Channels c, const Rows<X>& rows, bool streamed) {
  for (int t = 0; t < count; ++t, from += c.padded) {
    X* to = rows[t] + head * c.dim;
    if (!streamed) {
      unpack(from, to, c.dim);
      continue;
    }
    for (i64 d = 0; d < c.dim; d += kLanes<T>) stream(to + d, load(from + d));
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

/// A vector whose lanes add up to the dot product of two padded rows.
template <class T>
FLATTEN_INLINE Vec<T> dot_lanes(const T* a, const T* b, i64 padded) {
  Vec<T> dot = load(a) * load(b);
  for (i64 d = kLanes<T>; d < padded; d += kLanes<T>) dot = fma(load(a + d), load(b + d), dot);
  return dot;
}
/// dots[t] = rows[t] . m
template <class T>
void row_dots(const T* rows, const T* m, int count, i64 padded, T* dots) {
  sum_rows<T>(count, dots, [&](int t) FLATTEN_INLINED { return dot_lanes(rows + t * padded, m, padded); });
}

template <class X>
FLATTEN_INLINE const X* elements_of(const Parameter& p) {
  return static_cast<const X*>(p.data);
}
template <class X>
FLATTEN_INLINE X* elements_of(const MutableParameter& p) {
  return static_cast<X*>(p.data);
}

/// body(elements), with the elements of a parameter in their own dtype.
template <class T, class P, class Body>
FLATTEN_INLINE auto with_elements(const P& p, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    return body(elements_of<double>(p));
  } else {
    switch (p.dtype) {
      case Dtype::kBFloat16:
        return body(elements_of<BFloat16>(p));
      case Dtype::kFloat16:
        return body(elements_of<Float16>(p));
      case Dtype::kFloat32:
        return body(elements_of<float>(p));
      case Dtype::kFloat64:
        break;  // goes with float64 tokens alone, which the host checked
    }
    __builtin_trap();
  }
}

/// Loads a vector of a parameter from `index` on, or `count` elements where the row has no more left.
template <class T>
FLATTEN_INLINE Vec<T> load_parameter(const Parameter& p, i64 index, i64 count) {
  return with_elements<T>(p, [&](const auto* elements) { return load_at_most(elements + index, count); });
}

FLATTEN_INLINE float value_at(const float* p) { return *p; }
FLATTEN_INLINE double value_at(const double* p) { return *p; }
template <class X>
FLATTEN_INLINE float value_at(const X* p) {
  return load_partial(p, 1)[0];
}

template <class T>
T read_parameter(const Parameter& p, i64 index) {
  return with_elements<T>(p, [&](const auto* elements) { return value_at(elements + index); });
}

/// Stores a vector of a parameter, or `count` elements where the row has no more left.
template <class T>
FLATTEN_INLINE void store_parameter(const MutableParameter& p, i64 index, Vec<T> x, i64 count) {
  with_elements<T>(p, [&](auto* elements) { store_at_most(elements + index, x, count); });
}

FLATTEN_INLINE void store_value(float* p, float value) { *p = value; }
FLATTEN_INLINE void store_value(double* p, double value) { *p = value; }
template <class X>
FLATTEN_INLINE void store_value(X* p, float value) {
  store_partial(p, broadcast(value), 1);
}

template <class T>
FLATTEN_INLINE void write_parameter(const MutableParameter& p, i64 index, T value) {
  with_elements<T>(p, [&](auto* elements) { store_value(elements + index, value); });
}

}  // namespace flatten::cpu::FLATTEN_ISA

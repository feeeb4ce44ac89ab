// The depthwise taps of a tile of tokens, and their gradients.
//
// Rows of the convolved tensor are copied once, zero-padded to the left and right, into a ring of head-major
// rows that moves down a strip of the map: ring element (row, head, column, channel) lies at
// ((row % ring_rows * heads + head) * ring_columns + column) * padded + channel.
#pragma once

#include "rows_kernel.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Outputs of a register tile along a row.
constexpr int kOutputs = 8;

template <class T>
struct TapsShape {
  Channels channels;
  i64 kernel_h, kernel_w, pad_h, pad_w;
  i64 ring_rows, ring_columns;
  i64 weight_heads;  // 1 where the heads share the weights

  static TapsShape make(const Taps& taps, const Channels& c, const Tiling& tiling) {
    const i64 kh = taps.kernel_h, kw = taps.kernel_w;
    return {c,
            kh,
            kw,
            kh / 2,
            kw / 2,
            tiling.tile_rows + kh - 1,
            tiling.strip_columns + kw - 1,
            taps.per_channel ? c.heads : 1};
  }
  i64 area() const { return kernel_h * kernel_w; }
  i64 ring_elements() const { return ring_rows * channels.heads * ring_columns * channels.padded; }
  /// Weights as the kernels read them: (weight_heads, padded / lanes, area, lanes).
  i64 weight_elements() const { return weight_heads * area() * channels.padded; }
  i64 weight_vector(i64 head, i64 d) const {
    return ((weight_heads == 1 ? 0 : head) * channels.padded + d) * area();
  }
};

/// Weights into the kernels' order, `flipped` for the transposed convolution.
template <class T>
void fill_weights(const Taps& taps, const TapsShape<T>& shape, bool flipped, T* weights) {
  const Channels& c = shape.channels;
  set_zero(weights, shape.weight_elements());
  for (i64 h = 0; h < shape.weight_heads; ++h) {
    for (i64 d = 0; d < c.dim; ++d) {
      T* to = weights + shape.weight_vector(h, d / kLanes<T> * kLanes<T>) + d % kLanes<T>;
      for (i64 k = 0; k < shape.area(); ++k) {
        const i64 at = flipped ? shape.area() - 1 - k : k;
        to[at * kLanes<T>] = read_parameter<T>(taps.weight, (h * c.dim + d) * shape.area() + k);
      }
    }
  }
}

/// The bias of every channel, padded like a row.
template <class T>
void fill_tap_bias(const Taps& taps, const Channels& c, T* bias) {
  set_zero(bias, c.padded_count());
  if (!taps.bias) return;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.dim; ++d) {
      bias[h * c.padded + d] = read_parameter<T>(taps.bias, (taps.per_channel ? h * c.dim : 0) + d);
    }
  }
}

/// The rows of one strip of one window that are in the ring.
template <class X, class T>
class TapsRing {
 public:
  TapsRing() = default;
  TapsRing(const TapsShape<T>& shape, T* memory) : shape_(shape), memory_(memory) {}

  void forget() { next_ = -1; }

  /// Brings the rows that the taps of `tile` reach into the ring, those inside the window.
  void advance(const Tokens& source, const Grid& grid, i64 image, i64 window, const Tile& tile) {
    const i64 first = greater(0, tile.y - shape_.pad_h);
    const i64 end = smaller(grid.rows, tile.y + tile.height + shape_.pad_h);
    const bool continues = next_ >= first && tile.x == x_;
    x_ = tile.x;
    for (i64 y = continues ? next_ : first; y < end; ++y) stage(source, grid, image, window, y, tile);
    next_ = end;
  }

  const T* row(i64 y, i64 head) const {
    return memory_ + (y % shape_.ring_rows * shape_.channels.heads + head) * shape_.ring_columns *
                         shape_.channels.padded;
  }
  const TapsShape<T>& shape() const { return shape_; }

 private:
  void stage(const Tokens& source, const Grid& grid, i64 image, i64 window, i64 y, const Tile& tile) {
    const Channels& c = shape_.channels;
    T* to = const_cast<T*>(row(y, 0));
    const i64 stride = shape_.ring_columns * c.padded;
    const Grid::Row tokens = grid.row(window, y);
    for (i64 i = 0; i < tile.width + 2 * shape_.pad_w; ++i, to += c.padded) {
      const i64 x = tile.x - shape_.pad_w + i;
      if (x < 0 || x >= grid.columns) {
        for (i64 h = 0; h < c.heads; ++h) set_zero(to + h * stride, c.padded);
      } else {
        pack_row(token_row<X>(source, image, tokens.token(x)), to, stride, c, T(1));
      }
    }
  }

  TapsShape<T> shape_;
  T* memory_ = nullptr;
  i64 next_ = -1, x_ = -1;
};

/// One vector of channels of R adjacent outputs: out += taps.
template <int kKernelW, int R, class X, class T>
FLATTEN_INLINE void convolve_outputs(const TapsRing<X, T>& ring, const T* weights, i64 rows, i64 y, i64 x,
                                     i64 head, i64 d, T* out) {
  const TapsShape<T>& s = ring.shape();
  const i64 padded = s.channels.padded;
  const i64 kernel_w = kKernelW ? kKernelW : s.kernel_w;
  Vec<T> acc[R];
  for (int i = 0; i < R; ++i) acc[i] = load(out + i * padded);
  const i64 dy_begin = greater(0, s.pad_h - y), dy_end = smaller(s.kernel_h, rows + s.pad_h - y);
  for (i64 dy = dy_begin; dy < dy_end; ++dy) {
    const T* in = ring.row(y + dy - s.pad_h, head) + x * padded + d;
    const T* w = weights + dy * kernel_w * kLanes<T>;
    if constexpr (kKernelW != 0) {
      Vec<T> wv[kKernelW];
      for (int k = 0; k < kKernelW; ++k) wv[k] = load(w + k * kLanes<T>);
      for (int i = 0; i < R + kKernelW - 1; ++i) {
        const Vec<T> v = load(in + i * padded);
        for (int k = 0; k < kKernelW; ++k) {
          if (i - k >= 0 && i - k < R) acc[i - k] = fma(v, wv[k], acc[i - k]);
        }
      }
    } else {
      for (i64 k = 0; k < kernel_w; ++k) {
        const Vec<T> wv = load(w + k * kLanes<T>);
        for (int i = 0; i < R; ++i) acc[i] = fma(load(in + (i + k) * padded), wv, acc[i]);
      }
    }
  }
  for (int i = 0; i < R; ++i) store(out + i * padded, acc[i]);
}

/// out += taps of the tile's rows, with `out` a block whose tokens are the tile's.
template <int kKernelW, class X, class T>
void convolve_tile(const TapsRing<X, T>& ring, const T* weights, i64 rows, const Tile& tile, T* out) {
  const TapsShape<T>& s = ring.shape();
  const Channels& c = s.channels;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 i = 0; i < tile.height; ++i) {
      T* out_row = out + h * c.head_stride() + i * tile.width * c.padded;
      for (i64 x = 0; x < tile.width;) {
        const i64 left = tile.width - x;
        for (i64 d = 0; d < c.padded; d += kLanes<T>) {
          const T* w = weights + s.weight_vector(h, d);
          T* to = out_row + x * c.padded + d;
          const i64 y = tile.y + i;
          if (left >= kOutputs) {
            convolve_outputs<kKernelW, kOutputs>(ring, w, rows, y, x, h, d, to);
          } else if (left >= 4) {
            convolve_outputs<kKernelW, 4>(ring, w, rows, y, x, h, d, to);
          } else {
            convolve_outputs<kKernelW, 1>(ring, w, rows, y, x, h, d, to);
          }
        }
        x += left >= kOutputs ? kOutputs : left >= 4 ? 4 : 1;
      }
    }
  }
}

/// The gradient of one vector of channels of one row of (flipped) taps, over one row of the tile:
/// sum[k] += v[x] * g[x + k].
template <int kKernelW, class T>
FLATTEN_INLINE void correlate_row(const T* v, const T* g, i64 width, i64 padded, i64 kernel_w, T* sum) {
  if constexpr (kKernelW != 0) {
    Vec<T> acc[kKernelW];
    for (int k = 0; k < kKernelW; ++k) acc[k] = load(sum + k * kLanes<T>);
    for (i64 x = 0; x < width; ++x) {
      const Vec<T> vx = load(v + x * padded);
      for (int k = 0; k < kKernelW; ++k) acc[k] = fma(vx, load(g + (x + k) * padded), acc[k]);
    }
    for (int k = 0; k < kKernelW; ++k) store(sum + k * kLanes<T>, acc[k]);
  } else {
    for (i64 k = 0; k < kernel_w; ++k) {
      Vec<T> acc = load(sum + k * kLanes<T>);
      for (i64 x = 0; x < width; ++x) acc = fma(load(v + x * padded), load(g + (x + k) * padded), acc);
      store(sum + k * kLanes<T>, acc);
    }
  }
}

/// Adds a tile's part of the gradient of the (flipped) weights, in the weights' order; `v` is a block whose
/// tokens are the tile's, the ring holds the output's gradient.
template <int kKernelW, class X, class T>
void correlate_tile(const TapsRing<X, T>& ring, const T* v, i64 rows, const Tile& tile, T* sum) {
  const TapsShape<T>& s = ring.shape();
  const Channels& c = s.channels;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 i = 0; i < tile.height; ++i) {
      const i64 y = tile.y + i;
      const T* v_row = v + h * c.head_stride() + i * tile.width * c.padded;
      const i64 dy_begin = greater(0, s.pad_h - y), dy_end = smaller(s.kernel_h, rows + s.pad_h - y);
      for (i64 d = 0; d < c.padded; d += kLanes<T>) {
        for (i64 dy = dy_begin; dy < dy_end; ++dy) {
          correlate_row<kKernelW>(v_row + d, ring.row(y + dy - s.pad_h, h) + d, tile.width, c.padded,
                                  s.kernel_w, sum + s.weight_vector(h, d) + dy * s.kernel_w * kLanes<T>);
        }
      }
    }
  }
}

/// sum += the tile's own rows of the ring, padded like a row: the gradient of the bias.
template <class X, class T>
void sum_tile(const TapsRing<X, T>& ring, const Tile& tile, T* sum) {
  const TapsShape<T>& s = ring.shape();
  const Channels& c = s.channels;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> acc = load(sum + h * c.padded + d);
      for (i64 i = 0; i < tile.height; ++i) {
        const T* g = ring.row(tile.y + i, h) + s.pad_w * c.padded + d;
        for (i64 x = 0; x < tile.width; ++x) acc = acc + load(g + x * c.padded);
      }
      store(sum + h * c.padded + d, acc);
    }
  }
}

/// The tile functions for one kernel width.
template <class X, class T>
struct TapsKernels {
  void (*convolve)(const TapsRing<X, T>& ring, const T* weights, i64 rows, const Tile& tile, T* out);
  void (*correlate)(const TapsRing<X, T>& ring, const T* v, i64 rows, const Tile& tile, T* sum);

  template <int kKernelW>
  static TapsKernels make() {
    return {&convolve_tile<kKernelW, X, T>, &correlate_tile<kKernelW, X, T>};
  }
  static TapsKernels select(i64 kernel_w) {
    switch (kernel_w) {
      case 3:
        return make<3>();
      case 5:
        return make<5>();
      case 7:
        return make<7>();
      default:
        return make<0>();
    }
  }
};

/// Gradients of weight and bias from the slots' sums, in order, into the caller's tensors.
template <class T>
void write_taps_gradients(const TapsShape<T>& shape, const T* weight_sums, const T* bias_sums, int slots,
                          const MutableParameter& grad_weight, const MutableParameter& grad_bias) {
  const Channels& c = shape.channels;
  const i64 heads = shape.weight_heads, area = shape.area();
  if (grad_weight) {
    for (i64 h = 0; h < heads; ++h) {
      for (i64 d = 0; d < c.dim; ++d) {
        const i64 from = shape.weight_vector(h, d / kLanes<T> * kLanes<T>) + d % kLanes<T>;
        for (i64 k = 0; k < area; ++k) {
          T total = 0;
          for (int s = 0; s < slots; ++s) {
            total += weight_sums[s * shape.weight_elements() + from + (area - 1 - k) * kLanes<T>];
          }
          write_parameter(grad_weight, (h * c.dim + d) * area + k, total);
        }
      }
    }
  }
  if (grad_bias) {
    for (i64 h = 0; h < heads; ++h) {
      for (i64 d = 0; d < c.dim; ++d) {
        T total = 0;
        for (int s = 0; s < slots; ++s) {
          for (i64 from = h; from < c.heads; from += heads) {
            total += bias_sums[s * c.padded_count() + from * c.padded + d];
          }
        }
        write_parameter(grad_bias, h * c.dim + d, total);
      }
    }
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA

// The depthwise taps of a tile of tokens, and their gradients, head by head.
#pragma once

#include "taps_ring.h"

namespace flatten::cpu::FLATTEN_ISA {

/// The columns [first, end) that exist among those a run of outputs reads, counted from the column of the
/// run's leftmost tap.
struct Columns {
  i64 first, end;
};

/// Adds the taps of one vector of channels to R adjacent outputs, sums[0] ... sums[R - 1]. `rows[dy]` +
/// offset points at the first output's leftmost tap; adjacent columns lie `stride` elements apart.
template <int kKernelW, int R, class T>
FLATTEN_INLINE void convolve_outputs(const T* const* rows, i64 offset, i64 stride, Columns present,
                                     const T* weights, i64 first, i64 last, i64 kernel_w, Vec<T> (&sums)[R]) {
  constexpr int kV = kLanes<T>;
  for (i64 dy = first; dy < last; ++dy) {
    const T* in = immediate_offsets(rows[dy] + offset);
    const T* w = weights + dy * kernel_w * kV;
    if constexpr (kKernelW != 0) {
      // As many weights as find a register beside the sums are loaded once; the others are read from memory
      // by every operation.
      constexpr int kHeld = static_cast<int>(smaller(kKernelW, kRegisters - 1 - R));
      Vec<T> held[kHeld];
      unrolled<kHeld>([&](auto k) FLATTEN_INLINED { held[k] = load(w + k * kV); });
      unrolled<R + kKernelW - 1>([&](auto i) FLATTEN_INLINED {
        constexpr bool kMayBeAbsent = i < kKernelW / 2 || i >= R + kKernelW / 2;
        const T* column = in;
        in += stride;
        if (kMayBeAbsent && (i < present.first || i >= present.end)) return;
        const Vec<T> v = in_register(load(column));
        const T* others = kHeld < kKernelW ? immediate_offsets(w) : w;
        unrolled<kKernelW>([&](auto k) FLATTEN_INLINED {
          constexpr int kTap = decltype(k)::value, kOutput = decltype(i)::value - kTap;
          if constexpr (kOutput >= 0 && kOutput < R && kTap < kHeld) {
            sums[kOutput] = fma(v, held[kTap], sums[kOutput]);
          } else if constexpr (kOutput >= 0 && kOutput < R) {
            sums[kOutput] = fma(v, load(others + kTap * kV), sums[kOutput]);
          }
        });
      });
    } else {
      for (i64 k = 0; k < kernel_w; ++k) {
        const Vec<T> wv = load(w + k * kV);
        unrolled<R>([&](auto i) FLATTEN_INLINED {
          if (i + k < present.first || i + k >= present.end) return;
          sums[i] = fma(load(in + (i + k) * stride), wv, sums[i]);
        });
      }
    }
  }
}

/// The most outputs of a run: enough independent sums to hide the latency of a fused product (4 cycles, two a
/// cycle: 8), and no more than fit the registers beside a weight and an element (14 of 16).
template <class T>
constexpr int most_outputs() {
  if (sizeof(T) == 8) return 4;  // fewer to compile
  return kRegisters == 32 || kVectorBytes == 32 ? 14 : 8;
}

/// What the taps of one head are added to, and where the result goes.
template <class X, class T>
struct TapsOutput {
  const T* start;  // rows of `padded` elements, one per token of the tile
  const T* bias;   // padded like a row of the head
  X* const* rows;  // the tokens' rows of the result
  i64 channel;     // where the head begins in a row
  bool streamed;   // see is_streamed
};

/// Stores the `left` channels from d on, which are fewer than a vector, of `count` outputs.
template <class X, class T>
__attribute__((noinline)) void store_rest(X* const* to, i64 d, i64 left, const T* sums, int count) {
  for (int r = 0; r < count; ++r) store_partial(to[r] + d, load(sums + r * kLanes<T>), left);
}

/// R outputs from column x of the tile's row i, all vectors of the head.
template <int kKernelW, int R, class X, class T>
FLATTEN_INLINE void convolve_run(const TapRows<T>& ring, const T* weights, i64 i, i64 x, i64 width,
                                 const TapsOutput<X, T>& out, Upcoming& upcoming) {
  const TapsShape<T>& s = ring.shape();
  const i64 padded = s.channels.padded, dim = s.channels.dim, area = s.area();
  const i64 kernel_w = kKernelW ? kKernelW : s.kernel_w;
  const i64 first = ring.first_tap_row(i), last = ring.last_tap_row(i);
  const i64 left = x - s.pad_w, stride = ring.column_stride();
  const Columns present{ring.first_column() - left, ring.end_column() - left};
  const T* const* rows = ring.rows() + i;
  const T *start = out.start + (i * width + x) * padded, *bias = out.bias;
  X* to[R];
  for (int r = 0; r < R; ++r) to[r] = out.rows[i * width + x + r] + out.channel;
  for (i64 d = 0; d < padded; d += kLanes<T>) {
    const Vec<T> b = load(bias + d);
    Vec<T> sums[R];
    unrolled<R>([&](auto r) FLATTEN_INLINED { sums[r] = load(start + r * padded + d) + b; });
    convolve_outputs<kKernelW, R, T>(rows, d * ring.channel_stride() + left * stride, stride, present,
                                     weights + d * area, first, last, kernel_w, sums);
    if (kFillsLine<X> && out.streamed) {
      unrolled<R>([&](auto r) FLATTEN_INLINED { stream(to[r] + d, sums[r]); });
    } else if (const i64 rest = dim - d; rest >= kLanes<T>) {
      unrolled<R>([&](auto r) FLATTEN_INLINED { store(to[r] + d, sums[r]); });
    } else {
      T lanes[R * kLanes<T>];
      unrolled<R>([&](auto r) FLATTEN_INLINED { store(lanes + r * kLanes<T>, sums[r]); });
      store_rest(to, d, rest, lanes, R);
    }
    upcoming.step();
  }
}

/// out = start + bias + taps for one head of a tile, row by row.
template <int kKernelW, class X, class T>
void convolve_head(const TapRows<T>& ring, const T* weights, const Tile& tile, const TapsOutput<X, T>& out,
                   Upcoming& upcoming) {
  for (i64 i = 0; i < tile.height; ++i) {
    in_pieces<1, most_outputs<T>()>(tile.width, [&](auto size, i64 x) FLATTEN_INLINED {
      convolve_run<kKernelW, decltype(size)::value>(ring, weights, i, x, tile.width, out, upcoming);
    });
  }
}

/// How often convolve_head calls Upcoming::step().
template <class T>
i64 convolve_steps(const Tile& tile, i64 padded) {
  return tile.height * ceil_div(tile.width, most_outputs<T>()) * (padded / kLanes<T>);
}

/// How many tap rows correlate_rows() takes at once: so many that their sums and a few more vectors fill the
/// registers, and no more than a square kernel has.
template <int kKernelW, class T>
constexpr int most_tap_rows() {
  if (kKernelW == 0 || sizeof(T) == 8) return 1;  // fewer to compile
  return smaller(kKernelW, (kRegisters == 32 ? 27 : 15) / kKernelW);
}

/// Gradient of tap rows [dy, dy + G) for one vector of channels: sum[g][k] += v[i][x] * rows[i + dy + g][x +
/// k].
template <int kKernelW, int G, class T>
FLATTEN_INLINE void correlate_rows(const T* const* rows, i64 offset, const T* v, i64 padded, i64 dy,
                                   const Tile& tile, T* sum) {
  constexpr int kV = kLanes<T>;
  // Where registers allow, two adjacent columns are taken at once: they share all but one of the elements
  // that each of them reads.
  constexpr int kColumns = kRegisters == 32 ? 2 : 1;
  Vec<T> acc[G][kKernelW];
  sum += dy * kKernelW * kV;
  unrolled<G>([&](auto g) FLATTEN_INLINED {
    unrolled<kKernelW>([&](auto k) FLATTEN_INLINED { acc[g][k] = load(sum + (g * kKernelW + k) * kV); });
  });
  for (i64 i = 0; i < tile.height; ++i) {
    const T* in[G];
    unrolled<G>([&](auto g) FLATTEN_INLINED { in[g] = rows[i + dy + g] + offset; });
    const auto add = [&](auto columns) FLATTEN_INLINED {
      constexpr int kTake = decltype(columns)::value;
      Vec<T> vx[kTake];
      unrolled<kTake>([&](auto x) FLATTEN_INLINED { vx[x] = load(v + x * padded); });
      v += kTake * padded;
      unrolled<G>([&](auto g) FLATTEN_INLINED {
        in[g] = immediate_offsets(in[g]);
        unrolled<kTake + kKernelW - 1>([&](auto c) FLATTEN_INLINED {
          const Vec<T> e = in_register(load(in[g] + c * kV));
          unrolled<kTake>([&](auto x) FLATTEN_INLINED {
            constexpr int k = decltype(c)::value - decltype(x)::value;
            if constexpr (k >= 0 && k < kKernelW) acc[g][k] = fma(vx[x], e, acc[g][k]);
          });
        });
        in[g] += kTake * kV;
      });
    };
    i64 x = 0;
    for (; x + kColumns <= tile.width; x += kColumns) add(Constant<kColumns>{});
    for (; x < tile.width; ++x) add(Constant<1>{});
  }
  unrolled<G>([&](auto g) FLATTEN_INLINED {
    unrolled<kKernelW>([&](auto k) FLATTEN_INLINED { store(sum + (g * kKernelW + k) * kV, acc[g][k]); });
  });
}

/// correlate_rows of tap rows [dy, end), at most G at a time.
template <int kKernelW, int G, class T>
FLATTEN_INLINE void correlate_from(const T* const* rows, i64 offset, const T* v, i64 padded, i64 dy, i64 end,
                                   const Tile& tile, T* sum) {
  for (; dy + G <= end; dy += G) correlate_rows<kKernelW, G>(rows, offset, v, padded, dy, tile, sum);
  if constexpr (G > 1) correlate_from<kKernelW, G - 1>(rows, offset, v, padded, dy, end, tile, sum);
}

/// Adds one head's part of the gradient of the (flipped) weights, in the weights' order: v holds the tile's
/// rows of `padded` elements, the ring (not in place) those of the output's gradient.
template <int kKernelW, class T>
void correlate_head(const TapRows<T>& ring, const T* v, const Tile& tile, T* sum) {
  const TapsShape<T>& s = ring.shape();
  const i64 padded = s.channels.padded, area = s.area();
  for (i64 d = 0; d < padded; d += kLanes<T>) {
    const i64 offset = d * ring.channel_stride() - s.pad_w * kLanes<T>;
    T* sums = sum + d * area;
    if constexpr (kKernelW != 0) {
      correlate_from<kKernelW, most_tap_rows<kKernelW, T>()>(ring.rows(), offset, v + d, padded, 0,
                                                             s.kernel_h, tile, sums);
    } else {
      for (i64 k = 0; k < area; ++k) {
        Vec<T> acc = load(sums + k * kLanes<T>);
        for (i64 t = 0; t < tile.height * tile.width; ++t) {
          const T* in = ring.rows()[t / tile.width + k / s.kernel_w] + offset;
          acc = fma(load(v + t * padded + d), load(in + (t % tile.width + k % s.kernel_w) * kLanes<T>), acc);
        }
        store(sums + k * kLanes<T>, acc);
      }
    }
  }
}

/// Adds the tile's own rows of the ring, of the head staged there, to sum: the gradient of the bias.
template <class T>
void sum_head(const TapRows<T>& ring, const Tile& tile, T* sum) {
  const TapsShape<T>& s = ring.shape();
  const i64 padded = s.channels.padded;
  for (i64 d = 0; d < padded; d += kLanes<T>) {
    Vec<T> acc[4] = {load(sum + d)};  // several, to hide the latency of a sum
    for (i64 i = 0; i < tile.height; ++i) {
      const T* g = ring.rows()[i + s.pad_h] + d * ring.channel_stride();
      i64 x = 0;
      for (; x + 4 <= tile.width; x += 4) {
        for (int j = 0; j < 4; ++j) acc[j] = acc[j] + load(g + (x + j) * ring.column_stride());
      }
      for (; x < tile.width; ++x) acc[0] = acc[0] + load(g + x * ring.column_stride());
    }
    store(sum + d, (acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

/// The functions for one kernel width.
template <class X, class T>
struct TapsKernels {
  void (*convolve)(const TapRows<T>& ring, const T* weights, const Tile& tile, const TapsOutput<X, T>& out,
                   Upcoming& upcoming);
  void (*correlate)(const TapRows<T>& ring, const T* v, const Tile& tile, T* sum);

  template <int kKernelW>
  static TapsKernels make() {
    return {&convolve_head<kKernelW, X, T>, &correlate_head<kKernelW, T>};
  }
  /// The widths of published models are compiled in; make<0>() takes any.
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

/// Gradients of weight and bias from the slots' sums, in order, into the caller's tensors. The slots' sums of
/// weights lie `weight_stride` apart.
template <class T>
void write_taps_gradients(const TapsShape<T>& shape, const T* weight_sums, i64 weight_stride,
                          const T* bias_sums, int slots, const MutableParameter& grad_weight,
                          const MutableParameter& grad_bias) {
  const Channels c = shape.channels;
  const i64 heads = shape.weight_heads, area = shape.area();
  if (grad_weight) {
    with_elements<T>(grad_weight, [&](auto* to) {
      for (i64 h = 0; h < heads; ++h) {
        for (i64 d = 0; d < c.dim; d += kLanes<T>) {
          const int count = static_cast<int>(smaller(kLanes<T>, c.dim - d));
          for (i64 k = 0; k < area; ++k) {
            const T* from = weight_sums + shape.weight_vector(h, d) + (area - 1 - k) * kLanes<T>;
            Vec<T> total = load(from);
            for (int s = 1; s < slots; ++s) total = total + load(from + s * weight_stride);
            for (int i = 0; i < count; ++i) store_value(to + (h * c.dim + d + i) * area + k, total[i]);
          }
        }
      }
    });
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

/// The same where each of several images has weights of its own: a slot's sums are of one image after the
/// other.
template <class T>
void write_taps_gradients_of_images(const TapsShape<T>& shape, const T* weight_sums, i64 images,
                                    const T* bias_sums, int slots, const MutableParameter& grad_weight,
                                    const MutableParameter& grad_bias) {
  const i64 elements = grad_weight ? shape.weight_elements() : 0;
  MutableParameter weight = grad_weight;
  for (i64 image = 0; image < images; ++image) {
    write_taps_gradients(shape, weight_sums + image * elements, images * elements, bias_sums, slots, weight,
                         image == 0 ? grad_bias : MutableParameter{});
    if (weight) {
      const i64 bytes = shape.channels.count() * shape.area() * element_size(weight.dtype);
      weight.data = static_cast<char*>(weight.data) + bytes;
    }
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA

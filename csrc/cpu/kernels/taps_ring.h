// What the depthwise taps read: their weights, and the rows that a tile's taps reach. Those are read from the
// tensor itself or from a ring that holds copies.
#pragma once

#include <type_traits>

#include "rows.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Sizes of the taps and of the ring of rows they read.
template <class T>
struct TapsShape {
  Channels channels;
  i64 kernel_h, kernel_w, pad_h, pad_w;
  i64 ring_rows, ring_columns;
  i64 ring_heads;    // 1 where every tile is a whole strip, so that no row is needed after its head is done
  i64 weight_heads;  // 1 where the heads share the weights

  static TapsShape make(const Taps& taps, Channels c, const Tiling& tiling) {
    const i64 kh = taps.kernel_h, kw = taps.kernel_w;
    return {c,
            kh,
            kw,
            kh / 2,
            kw / 2,
            tiling.tile_rows + kh - 1,
            tiling.strip_columns + kw - 1,
            tiling.row_steps == 1 ? 1 : c.heads,
            taps.per_channel || taps.per_image ? c.heads : 1};
  }
  i64 area() const { return kernel_h * kernel_w; }
  i64 row_elements() const { return ring_columns * channels.padded; }
  /// The ring and, behind it, a row of zeros.
  i64 ring_elements() const { return (ring_heads * ring_rows + 1) * row_elements(); }
  /// Weights as the kernels read them: (weight_heads, padded / lanes, area, lanes).
  i64 weight_elements() const { return weight_heads * area() * channels.padded; }
  i64 weight_vector(i64 head, i64 d) const {
    return ((weight_heads == 1 ? 0 : head) * channels.padded + d) * area();
  }
};

/// The weights of one image, where each has its own; else those of all.
inline Taps taps_of_image(const Taps& taps, i64 channels, i64 image) {
  Taps own = taps;
  if (taps.per_image) {
    const i64 bytes = channels * taps.kernel_h * taps.kernel_w * element_size(taps.weight.dtype);
    own.weight.data = static_cast<const char*>(taps.weight.data) + image * bytes;
  }
  return own;
}

/// Copies the weights into the kernels' order; `flipped` turns them round for the transposed convolution.
template <class T>
void fill_weights(const Taps& taps, const TapsShape<T>& shape, bool flipped, T* weights) {
  const Channels c = shape.channels;
  const i64 area = shape.area();
  with_elements<T>(taps.weight, [&](const auto* from) {
    for (i64 h = 0; h < shape.weight_heads; ++h) {
      for (i64 d = 0; d < c.dim; d += kLanes<T>) {
        T* to = weights + shape.weight_vector(h, d);
        const int count = static_cast<int>(smaller(kLanes<T>, c.dim - d));
        for (i64 k = 0; k < area; ++k) {
          Vec<T> w = {};
          for (int i = 0; i < count; ++i) w[i] = value_at(from + i * area + k);
          store(to + (flipped ? area - 1 - k : k) * kLanes<T>, w);
        }
        from += count * area;
      }
    }
  });
}

/// Fills `bias`, padded like a row, with every channel's bias, or with zeros if there is none.
template <class T>
void fill_tap_bias(const Taps& taps, Channels c, T* bias) {
  set_zero(bias, c.padded_count());
  if (!taps.bias) return;
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 d = 0; d < c.dim; ++d) {
      bias[h * c.padded + d] = read_parameter<T>(taps.bias, (taps.per_channel ? h * c.dim : 0) + d);
    }
  }
}

/// What the taps of a tile read, whatever the rows' tensor holds. Its functions are called for every few
/// outputs, and by so many that GCC would not inline them all unasked.
template <class T>
class TapRows {
 public:
  TapRows() = default;
  explicit TapRows(const TapsShape<T>& shape) : shape_(shape) {}

  /// rows()[i + dy] is what tap row dy of the tile's row i reads, from the tile's first column on; outside
  /// the window it is zeros, which only the ring is as wide as. Channels d, the first of a vector, of column
  /// x are at x * column_stride() + d * channel_stride().
  FLATTEN_INLINE const T* const* rows() const { return rows_; }
  FLATTEN_INLINE i64 column_stride() const { return in_place_ ? token_stride_ : kLanes<T>; }
  FLATTEN_INLINE i64 channel_stride() const { return in_place_ ? 1 : shape_.ring_columns; }
  /// The columns [first, end) that a row has, counted from the tile's first.
  FLATTEN_INLINE i64 first_column() const { return in_place_ ? -tile_.x : -shape_.pad_w; }
  FLATTEN_INLINE i64 end_column() const {
    return in_place_ ? grid_columns_ - tile_.x : tile_.width + shape_.pad_w;
  }
  FLATTEN_INLINE const TapsShape<T>& shape() const { return shape_; }
  /// The tap rows [first, last) of the tile's row i that lie inside the window.
  FLATTEN_INLINE i64 first_tap_row(i64 i) const { return greater(0, shape_.pad_h - tile_.y - i); }
  FLATTEN_INLINE i64 last_tap_row(i64 i) const {
    return smaller(shape_.kernel_h, grid_rows_ + shape_.pad_h - tile_.y - i);
  }

 protected:
  TapsShape<T> shape_;
  bool in_place_ = false;
  const T** rows_ = nullptr;
  i64 token_stride_ = 0, grid_rows_ = 0, grid_columns_ = 0;
  Tile tile_{};
};

/// The rows of the convolved tensor that a tile's taps reach. Each is copied once into a ring that moves down
/// a strip of the map, zero-padded to the left and right: (heads, ring rows, vectors of a head, columns,
/// lanes). A caller that needs no padding (`in_place`) reads the rows from the tensor itself, if its elements
/// need no conversion, heads consist of whole vectors, and the tokens of a row lie side by side.
template <class X, class T>
class TapsRing : public TapRows<T> {
 public:
  TapsRing() = default;
  TapsRing(const TapsShape<T>& shape, Arena& arena, bool in_place)
      : TapRows<T>(shape),
        may_read_in_place_(in_place && std::is_same_v<X, T> && shape.channels.dim == shape.channels.padded),
        memory_(arena.take<T>(shape.ring_elements())) {
    rows_ = arena.take<const T*>(shape.ring_rows);
    tokens_ = arena.take<Grid::Row>(shape.ring_rows);
  }

  /// Before the first window.
  void clear() { set_zero(zeros(), shape_.row_elements()); }

  /// Before the first tile of a window.
  void forget() { end_ = -1; }

  void begin_tile(const Tokens& source, const Grid& grid, i64 image, i64 window, const Tile& tile) {
    const i64 first = greater(0, tile.y - shape_.pad_h);
    in_place_ = may_read_in_place_ && grid.row(window, first).run(0) >= grid.columns;
    const bool continues = !in_place_ && end_ >= first && tile.x == tile_.x;
    begin_ = continues ? end_ : first;
    end_ = smaller(grid.rows, tile.y + tile.height + shape_.pad_h);
    for (i64 y = begin_; y < end_; ++y) tokens_[y - begin_] = grid.row(window, y);
    tile_ = tile;
    grid_rows_ = grid.rows;
    grid_columns_ = grid.columns;
    source_ = static_cast<const X*>(source.data) + image * source.batch_stride;
    token_stride_ = source.token_stride;
  }

  /// Copies what the tile needs of a head and is not there yet; then rows() are that head's.
  void stage_head(i64 head) {
    if (!in_place_) {
      for (i64 y = begin_; y < end_; ++y) stage_row(head, y, slot(head, y));
    }
    const i64 rows = tile_.height + shape_.kernel_h - 1;
    for (i64 i = 0; i < rows; ++i) {
      const i64 y = tile_.y - shape_.pad_h + i;
      const bool outside = y < 0 || y >= grid_rows_;
      const T* in_ring = outside ? zeros() : slot(head, y);
      rows_[i] = in_place_ && !outside ? in_place(head, y) : in_ring + shape_.pad_w * kLanes<T>;
    }
  }

 private:
  T* zeros() const { return memory_ + shape_.ring_heads * shape_.ring_rows * shape_.row_elements(); }
  const T* in_place(i64 head, i64 y) const {
    if constexpr (std::is_same_v<X, T>) {
      return source_ + tokens_[y - begin_].token(tile_.x) * token_stride_ + head * shape_.channels.dim;
    }
    return nullptr;
  }
  T* slot(i64 head, i64 y) const {
    const i64 h = shape_.ring_heads == 1 ? 0 : head;
    return memory_ + (h * shape_.ring_rows + y % shape_.ring_rows) * shape_.row_elements();
  }

  void stage_row(i64 head, i64 y, T* to) const {
    constexpr int kV = kLanes<T>;
    const Channels c = shape_.channels;
    const i64 columns = shape_.ring_columns, width = tile_.width + 2 * shape_.pad_w, stride = token_stride_;
    const i64 left = tile_.x - shape_.pad_w;  // the window's column of the row's first element
    const i64 begin = greater(0, -left), end = smaller(width, grid_columns_ - left);
    const Grid::Row tokens = tokens_[y - begin_];
    const X* from = source_ + head * c.dim;
    for (i64 d = 0; d < c.padded; d += kV, to += columns * kV) {
      for (i64 i = 0; i < begin; ++i) store(to + i * kV, Vec<T>{});
      for (i64 i = begin; i < end;) {
        const X* token = from + tokens.token(left + i) * stride + d;
        const i64 stop = smaller(end, i + tokens.run(left + i));
        if (d + kV <= c.dim) {
          for (; i < stop; ++i, token += stride) store(to + i * kV, load(token));
        } else {
          for (; i < stop; ++i, token += stride) store(to + i * kV, load_partial(token, c.dim - d));
        }
      }
      for (i64 i = greater(begin, end); i < width; ++i) store(to + i * kV, Vec<T>{});
    }
  }

  using TapRows<T>::shape_, TapRows<T>::in_place_, TapRows<T>::rows_, TapRows<T>::token_stride_;
  using TapRows<T>::grid_rows_, TapRows<T>::grid_columns_, TapRows<T>::tile_;
  bool may_read_in_place_ = false;
  T* memory_ = nullptr;
  Grid::Row* tokens_ = nullptr;  // of the rows [begin_, end_) that the tile brings in
  const X* source_ = nullptr;
  i64 begin_ = 0, end_ = -1;
};

/// Adds the rows of `source` that the ring will copy for tile `next`, the one before it in its strip being
/// done.
template <class X>
void expect_ring_rows(const Tokens& source, const Grid& grid, i64 image, i64 window, Tile next, i64 pad_h,
                      i64 channels, Upcoming& upcoming) {
  next.y += pad_h;
  next.height = smaller(next.height, grid.rows - next.y);
  if (next.is_prefix || next.height <= 0) return;
  Block block;
  fill_tile(grid, block, image, window, next);
  upcoming.add<X>(source, block, channels);
}

}  // namespace flatten::cpu::FLATTEN_ISA

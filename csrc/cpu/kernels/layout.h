// How the kernels cut their work: windows, blocks of tokens, and the head-major blocks they compute on.
#pragma once

#include <cstddef>

#include "../../params.h"
#include "../vec/transpose.h"

namespace flatten::cpu::FLATTEN_ISA {

FLATTEN_INLINE constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
FLATTEN_INLINE constexpr i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
FLATTEN_INLINE constexpr i64 greater(i64 a, i64 b) { return a > b ? a : b; }

/// Cuts [0, count) into as few pieces of at most kMost as possible, all of nearly the same size, and calls
/// body(Constant<size>{}, start) for each. The caller knows that none will be smaller than kLeast.
template <int kLeast, int kMost, class Body>
FLATTEN_INLINE void in_pieces(i64 count, const Body& body) {
  const i64 pieces = ceil_div(count, kMost), least = count / pieces, extra = count % pieces;
  i64 start = 0;
  for (i64 i = 0; i < pieces; ++i) {
    const i64 size = least + (i < extra);
    with_size<kLeast, kMost>(size, [&](auto constant) FLATTEN_INLINED { body(constant, start); });
    start += size;
  }
}

/// The most tokens of a block: at 96 channels of float32 its q, k, v and gradient rows take 24 KiB each,
/// which second-level caches hold. Measured: fewer are 1 to 3 % faster at two shapes and 2 % slower at
/// another (benchmarks/NOTES.md).
constexpr int kBlock = 64;

/// The size of the blocks that cover `count` tokens: as even as whole groups of eight allow.
FLATTEN_INLINE i64 block_size(i64 count) {
  const i64 blocks = ceil_div(count, kBlock);
  return ceil_div(ceil_div(count, blocks), 8) * 8;
}

/// Blocks whose terms are added up one after the other before they join a longer sum. A float32 sum of n
/// terms in one chain is off by about 6e-8 sqrt(n), which on a large map would be the largest error by far.
constexpr i64 kChainBlocks = 16;

/// Channels of a token in the blocks the kernels compute on: the heads one after the other, each padded with
/// zeros to whole vectors. Element (head, token, channel) of a block lies at
/// (head * kBlock + token) * padded + channel, so that one head's rows are adjacent.
struct Channels {
  i64 heads, dim, padded;

  template <class T>
  static Channels make(const Geometry& g) {
    return {g.heads, g.head_dim, ceil_div(g.head_dim, kLanes<T>) * kLanes<T>};
  }
  i64 count() const { return heads * dim; }
  i64 padded_count() const { return heads * padded; }
  i64 head_stride() const { return kBlock * padded; }
  i64 block() const { return heads * kBlock * padded; }
  /// One dim x padded matrix per head.
  i64 matrix() const { return dim * padded; }
  i64 matrices() const { return heads * dim * padded; }
};

/// Hands out pieces of one allocation. With a null base it only adds up what will be taken.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(i64 count) {
    char* piece = base_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(piece) : nullptr;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

/// Calls lay_out(arena) twice: first to measure what it takes, then in a workspace of that size.
template <class LayOut>
void lay_out_in(void* (*workspace)(std::size_t bytes), const LayOut& lay_out) {
  Arena measure;
  lay_out(measure);
  Arena arena(workspace(measure.used()));
  lay_out(arena);
}

/// Some tokens of one window: their rows in the (batch, token, channel) tensors, and their positions in the
/// window, which are rows of key_bias.
struct Block {
  i64 image = 0;
  int count = 0, runs = 0;
  i64 token[kBlock];
  i64 position[kBlock];
  int run_begin[kBlock + 1];  // within a run, tokens and positions go up by one

  void clear(i64 of_image) { image = of_image, count = runs = run_begin[0] = 0; }
  /// Appends a run.
  void add(i64 first_token, i64 first_position, i64 length) {
    for (i64 i = 0; i < length; ++i) {
      token[count + i] = first_token + i;
      position[count + i] = first_position + i;
    }
    count += static_cast<int>(length);
    run_begin[++runs] = count;
  }
};

/// One window's tokens as a grid of rows x columns behind `prefix` tokens. Where neither taps nor a shift
/// give the map a meaning, the grid is one row of all tokens.
struct Grid {
  Geometry geometry;
  i64 prefix, rows, columns;
  bool flat;

  static Grid make(const Geometry& g, i64 tokens, bool has_taps) {
    const bool flat = g.windows() == 1 && !has_taps && g.shift_h == 0 && g.shift_w == 0;
    if (flat) return {g, 0, 1, tokens, true};
    return {g, g.windows() == 1 ? g.prefix : 0, g.window_h, g.window_w, false};
  }
  i64 tokens() const { return prefix + rows * columns; }

  /// Where the tokens of one row of a window lie: a run of the map's row that may wrap around its end.
  struct Row {
    i64 base, first, map_w;
    i64 token(i64 x) const { return base + (first + x < map_w ? first + x : first + x - map_w); }
    /// Tokens from column x on that lie side by side; it may reach beyond the window.
    i64 run(i64 x) const { return first + x < map_w ? map_w - first - x : 2 * map_w - first - x; }
  };
  Row row(i64 window, i64 y) const {
    if (flat) return {0, 0, columns};
    const Geometry& g = geometry;
    const i64 map_y = (window / g.windows_w() * g.window_h + y + g.shift_h) % g.map_h;
    const i64 map_x = (window % g.windows_w() * g.window_w + g.shift_w) % g.map_w;
    return {g.prefix + map_y * g.map_w, map_x, g.map_w};
  }

  /// Positions [begin, begin + count) of a window.
  void fill(Block& block, i64 image, i64 window, i64 begin, i64 count) const {
    block.clear(image);
    i64 position = begin;
    const i64 end = begin + count;
    if (position < prefix) {
      block.add(position, position, smaller(end, prefix) - position);
      position += block.count;
    }
    while (position < end) {
      const i64 x = (position - prefix) % columns, width = smaller(columns - x, end - position);
      add_row(block, row(window, (position - prefix) / columns), x, width, position);
      position += width;
    }
  }

  /// The rectangle of `height` rows from y and `width` columns from x.
  void fill(Block& block, i64 image, i64 window, i64 y, i64 height, i64 x, i64 width) const {
    block.clear(image);
    for (i64 i = y; i < y + height; ++i) add_row(block, row(window, i), x, width, prefix + i * columns + x);
  }

 private:
  /// Columns [x, x + width) of a row, whose first has this position.
  static void add_row(Block& block, const Row& tokens, i64 x, i64 width, i64 position) {
    for (i64 done = 0; done < width;) {
      const i64 length = smaller(tokens.run(x + done), width - done);
      block.add(tokens.token(x + done), position + done, length);
      done += length;
    }
  }
};

/// A grid cut into tiles of at most kBlock tokens: `tile_rows` rows of a strip of columns. Tile numbers first
/// count blocks of prefix tokens, then go down each strip, so that taps find the rows above where they left
/// them.
struct Tiling {
  i64 prefix_tiles, strips, strip_columns, tile_rows, row_steps;

  static Tiling make(const Grid& grid) {
    const i64 strips = ceil_div(grid.columns, kBlock);
    const i64 strip_columns = ceil_div(grid.columns, strips);
    const i64 most_rows = smaller(grid.rows, greater(1, kBlock / strip_columns));
    const i64 row_steps = ceil_div(grid.rows, most_rows);
    return {ceil_div(grid.prefix, kBlock), strips, strip_columns, ceil_div(grid.rows, row_steps), row_steps};
  }
  i64 count() const { return prefix_tiles + strips * row_steps; }
};

struct Tile {
  bool is_prefix;
  i64 y, height, x, width;  // of prefix tokens: from x, width of them
};

FLATTEN_INLINE Tile tile_at(const Grid& grid, const Tiling& tiling, i64 index) {
  if (index < tiling.prefix_tiles) {
    const i64 begin = index * kBlock;
    return {true, 0, 1, begin, smaller(kBlock, grid.prefix - begin)};
  }
  index -= tiling.prefix_tiles;
  const i64 x = index / tiling.row_steps * tiling.strip_columns;
  const i64 y = index % tiling.row_steps * tiling.tile_rows;
  return {false, y, smaller(tiling.tile_rows, grid.rows - y), x,
          smaller(tiling.strip_columns, grid.columns - x)};
}

FLATTEN_INLINE void fill_tile(const Grid& grid, Block& block, i64 image, i64 window, const Tile& tile) {
  if (tile.is_prefix) {
    grid.fill(block, image, window, tile.x, tile.width);
  } else {
    grid.fill(block, image, window, tile.y, tile.height, tile.x, tile.width);
  }
}

}  // namespace flatten::cpu::FLATTEN_ISA

// One call of the general form (DESIGN, part 2) as all its passes see it: what it reads, how its tokens are
// cut, the functions for its sizes; the shares of the keys; the features of queries and keys.
#pragma once

#include "../../workspace.h"
#include "../schedule.h"
#include "../taps.h"
#include "maps.h"
#include "normalize.h"
#include "products.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Of one window: S (D_k x D_v a head), m (D_k a head) and u (D_v a head), rows padded to whole vectors, one
/// behind the other.
template <class T>
struct GeneralSums {
  T *s = nullptr, *m = nullptr, *u = nullptr;
};

/// Features of a block of queries or keys: factor * z. Focused ones are mapped for all heads at once, since a
/// row's factor needs them all; others head by head, as each is needed.
template <class T>
struct HeadFeatures {
  T* z = nullptr;       // head-major where focused, else of one head
  T* turned = nullptr;  // of one head, rotated
  T* normal = nullptr;  // of one head: the features of the normalizer where they are given
  Norms<T> norms;
};

/// One head's features, as HeadFeatures holds them: for S, and for m and z; and those that were mapped.
template <class T>
struct Head {
  const T *product, *normal, *z;
};

/// What a key weighs in a block: share[h][t] = w / W, or 1 / M without weights; where they are summed for a
/// state, w or 1.
template <class X>
struct KeyShares {
  using T = Accumulate<X>;
  T* share = nullptr;         // kBlock a row; one row for all heads, unless each has its own weights
  double* inverse = nullptr;  // 1 / W, as many as rows; 0 where W is
  X *key = nullptr, *value = nullptr, *normal = nullptr;  // rows of keys that are left out, cleaned
  bool cleaned = false;                                   // whether rows of the block at hand were
};

template <class X>
class GeneralCall {
 public:
  using T = Accumulate<X>;

  /// `divides`: S, m and u are divided by W, as attention has them; otherwise they are a state's.
  explicit GeneralCall(const AttentionInputs& in, bool divides = true)
      : in(in),
        general(in.general),
        geometry(in.geometry),
        ck(Channels::make<T>(in.geometry)),
        cv(Channels::make<T>(values(in.geometry))),
        keys(Grid::make(in.geometry, in.geometry.window_keys(), static_cast<bool>(in.taps))),
        queries(Grid::make(in.geometry, in.geometry.window_queries(), static_cast<bool>(in.taps))),
        products(ck, cv),
        normalizing(in.general, in.eps),
        focused(in.mapping.map == FeatureMap::kFocused),
        divides(divides),
        needs_u(normalizing.reads_u() || !divides),
        weight_rows(in.general.key_weight && in.general.key_weight.per_head ? ck.heads : 1),
        focus_query_(Focus<X, T>::select(in.mapping, {}, ck)),
        focus_key_(Focus<X, T>::select(in.mapping, in.mapping.key_bias, ck)),
        map_(HeadMap<X, T>::select(in.mapping.map, ck)),
        turns_in_one_(in.general.rotation && map_.forward_and_turn &&
                      in.general.rotation.table.dtype == dtype_of(T{})) {
    for (T& one : ones_) one = 1;
  }

  /// The geometry of values: one of D_v channels a head.
  static Geometry values(Geometry g) {
    g.head_dim = g.value_dim;
    return g;
  }

  i64 pairs() const { return geometry.batch * geometry.windows(); }
  i64 image(i64 pair) const { return pair / geometry.windows(); }
  i64 window(i64 pair) const { return pair % geometry.windows(); }
  const T* ones() const { return ones_; }

  /// The tokens of a pair's tile; none if there is no such tile or pair.
  void tile_block(const Grid& grid, const Tiling& tiling, i64 pair, i64 index, Block& block) const {
    block.clear(0);
    if (pair >= pairs() || index >= tiling.count()) return;
    fill_tile(grid, block, image(pair), window(pair), tile_at(grid, tiling, index));
  }

  double forward_flops() const {
    const double taps = 2.0 * in.taps.kernel_h * in.taps.kernel_w;
    return static_cast<double>(geometry.batch) * cv.count() *
           (2.0 * (geometry.queries + geometry.keys) * ck.dim + taps * geometry.queries);
  }

  // ---- S, m and u.

  i64 matrix() const { return ck.dim * cv.padded; }
  i64 sums_elements() const {
    return ck.heads * matrix() + ck.padded_count() + (needs_u ? cv.padded_count() : 0);
  }
  GeneralSums<T> sums_at(T* memory) const {
    T* m = memory + ck.heads * matrix();
    return {memory, m, m + ck.padded_count()};
  }
  void clear(const GeneralSums<T>& sums) const { set_zero(sums.s, sums_elements()); }
  /// Adds up the slots' sums, in order.
  void add_partials(const T* partials, i64 stride, int slots, const GeneralSums<T>& sums) const {
    for (i64 i = 0; i < sums_elements(); i += kLanes<T>) {
      Vec<T> sum = load(partials + i);
      for (int s = 1; s < slots; ++s) sum = sum + load(partials + s * stride + i);
      store(sums.s + i, sum);
    }
  }

  // A state keeps S, m and, where they are read, u without padding, window by window. The places of W, and of
  // u where it is not read, are cleared: a state is the same in every run.
  i64 saved_elements() const { return window_state_elements(in); }
  /// Where a state of `saved` windows holds those of a pair, or -1 if it does not. The windows it holds are
  /// spread evenly over the pairs, so that every slot finds as many.
  i64 saved_at(i64 pair, i64 saved) const {
    const i64 at = pair * saved / pairs();
    return (pair + 1) * saved / pairs() > at ? at * saved_elements() : -1;
  }
  void save_state(const GeneralSums<T>& sums, T* state) const {
    T* const end = state + saved_elements();
    for (i64 i = 0; i < ck.count(); ++i, state += cv.dim) unpack(sums.s + i * cv.padded, state, cv.dim);
    for (i64 h = 0; h < ck.heads; ++h, state += ck.dim) unpack(sums.m + h * ck.padded, state, ck.dim);
    for (i64 h = 0; needs_u && h < ck.heads; ++h, state += cv.dim)
      unpack(sums.u + h * cv.padded, state, cv.dim);
    for (; state < end; ++state) *state = T(0);
  }
  void load_state(const T* state, const GeneralSums<T>& sums) const {
    for (i64 i = 0; i < ck.count(); ++i, state += cv.dim) pack(state, sums.s + i * cv.padded, cv.dim, T(1));
    for (i64 h = 0; h < ck.heads; ++h, state += ck.dim) pack(state, sums.m + h * ck.padded, ck.dim, T(1));
    for (i64 h = 0; needs_u && h < ck.heads; ++h, state += cv.dim)
      pack(state, sums.u + h * cv.padded, cv.dim, T(1));
  }
  /// S^T or dS^T of every head, D_v x D_k.
  void transpose_matrices(const T* from, T* to) const {
    for (i64 h = 0; h < ck.heads; ++h) transpose_uneven(from + h * matrix(), to + h * cv.dim * ck.padded);
  }
  i64 transposed_elements() const { return ck.heads * cv.dim * ck.padded; }

  // ---- Features.

  HeadFeatures<T> take_features(Arena& arena) const {
    HeadFeatures<T> f;
    f.z = arena.take<T>(focused ? ck.block() : ck.head_stride());
    if (general.rotation) f.turned = arena.take<T>(ck.head_stride());
    if (general.normalizer_query.data || general.normalizer_key.data)
      f.normal = arena.take<T>(ck.head_stride());
    return f;
  }
  FocusParameters<T> focus_parameters(T* inverse_scale) const {
    fill_inverse_scale(in.mapping, ck, inverse_scale);
    return FocusParameters<T>::make(in.mapping, in.eps, inverse_scale);
  }

  /// Before the heads of a block: maps what is mapped for all of them.
  void begin_queries(const Rows<const X>& rows, const Block& block, const FocusParameters<T>& f,
                     HeadFeatures<T>& to) const {
    if (focused) return focus_query_.forward(rows.at, {}, block.count, to.z, ck, f, to.norms);
    for (T& factor : to.norms.factor) factor = 1;
  }
  void begin_keys(const Rows<const X>& rows, const Block& block, const FocusParameters<T>& f,
                  HeadFeatures<T>& to) const {
    if (focused) return focus_key_.forward(rows.at, bias_rows(block), block.count, to.z, ck, f, to.norms);
    for (T& factor : to.norms.factor) factor = 1;
  }

  /// The features of one head. `normal`: rows of the normalizer's own features, or null.
  Head<T> query_head(i64 h, const Rows<const X>& rows, const Rows<const X>* normal, const Block& block,
                     const HeadFeatures<T>& f) const {
    return head_of(h, rows, {}, normal, block, f);
  }
  Head<T> key_head(i64 h, const Rows<const X>& rows, const Rows<const X>* normal, const Block& block,
                   const HeadFeatures<T>& f) const {
    return head_of(h, rows, in.mapping.key_bias, normal, block, f);
  }
  /// The derivative by the unrotated features: rotates a head's gradient back and adds start[d] * factor[t].
  void turn_back(i64 h, const Block& block, T* gradient, const T* start, const T* factor) const {
    turn_head(gradient, table_of(h, block), block.count, ck, true, start, factor, gradient);
  }

  /// dx of one head, whose features are not focused, from the derivative by its features as S has them
  /// (`gradient`, which is spoiled): rotated back, start[d] * factor[t] added unless `start` is null, times
  /// the map's slope.
  void finish_head(i64 h, const T* z, const Block& block, T* gradient, const T* start, const T* factor,
                   const HeadGradient<X, T>& to) const {
    if (start && turns_in_one_)
      return map_.turn_and_backward(z, gradient, table_of(h, block), block.count, h, ck, start, factor, to);
    finish_features(h, block, gradient, start, factor);
    map_backward(h, z, block, gradient, to);
  }
  /// The slope alone.
  void map_backward(i64 h, const T* z, const Block& block, const T* gradient,
                    const HeadGradient<X, T>& to) const {
    map_.backward(z, gradient, block.position, block.count, h, ck, to);
  }
  /// All but the slope.
  void finish_features(i64 h, const Block& block, T* gradient, const T* start, const T* factor) const {
    if (general.rotation) {
      turn_back(h, block, gradient, start, factor);
    } else if (start) {
      add_multiples(start, factor, block.count, ck.padded, gradient);
    }
  }

  BiasRows bias_rows(const Block& block) const { return {in.mapping.key_bias.data, block.position}; }
  const Focus<X, T>& focus_query() const { return focus_query_; }
  const Focus<X, T>& focus_key() const { return focus_key_; }

  // ---- What keys weigh.

  KeyShares<X> take_shares(Arena& arena) const {
    KeyShares<X> s;
    s.share = arena.take<T>(weight_rows * kBlock);
    s.inverse = arena.take<double>(weight_rows);
    if (!general.key_weight) return s;
    s.key = arena.take<X>(kBlock * ck.count());
    s.value = arena.take<X>(kBlock * cv.count());
    if (general.normalizer_key.data) s.normal = arena.take<X>(kBlock * ck.count());
    return s;
  }

  /// body(t, row, w) for all weights of a block's keys.
  template <class Body>
  void for_weights(const Block& block, const Body& body) const {
    with_elements<T>(general.key_weight.weight, [&](const auto* weights) {
      for (int t = 0; t < block.count; ++t) {
        const auto* of_key = weights + (block.image * geometry.keys + block.token[t]) * weight_rows;
        for (i64 r = 0; r < weight_rows; ++r) body(t, r, value_at(of_key + r));
      }
    });
  }
  /// W of every row of shares: the sum over all keys of a window.
  void total_weights(i64 pair, double* totals) const {
    if (!general.key_weight) {
      totals[0] = static_cast<double>(geometry.window_keys());
      return;
    }
    for (i64 r = 0; r < weight_rows; ++r) totals[r] = 0;
    Block block;
    for (i64 at = 0; at < keys.tokens(); at += kBlock) {
      keys.fill(block, image(pair), window(pair), at, smaller(kBlock, keys.tokens() - at));
      for_weights(block, [&](int, i64 r, T w) FLATTEN_INLINED { totals[r] += static_cast<double>(w); });
    }
  }
  /// Before the first key of a pair: 1 / W.
  void begin_pair(i64 pair, KeyShares<X>& s) const {
    if (!divides) {
      for (i64 r = 0; r < weight_rows; ++r) s.inverse[r] = 1;
      return;
    }
    total_weights(pair, s.inverse);
    for (i64 r = 0; r < weight_rows; ++r) s.inverse[r] = s.inverse[r] == 0 ? 0 : 1 / s.inverse[r];
  }
  bool is_empty(i64 h, const KeyShares<X>& s) const { return s.inverse[weight_rows == 1 ? 0 : h] == 0; }
  const T* share_of(i64 h, const KeyShares<X>& s) const {
    return s.share + (weight_rows == 1 ? 0 : h * kBlock);
  }

  /// The shares of a block's keys. Rows of keys that weigh nothing are replaced by clean ones, so that what
  /// they hold reaches no sum: `normal` may be null.
  void begin_shares(const Block& block, KeyShares<X>& s, Rows<const X>& key, Rows<const X>& value,
                    Rows<const X>* normal) const {
    s.cleaned = false;
    if (!general.key_weight) {
      const T mean = static_cast<T>(s.inverse[0]);
      for (T *to = s.share, *end = to + kBlock; to < end; ++to) *to = mean;
      return;
    }
    int dropped[kBlock] = {}, any = 0;  // heads that drop a key, or 1 for all of them
    for_weights(block, [&](int t, i64 r, T w) FLATTEN_INLINED {
      s.share[r * kBlock + t] = static_cast<T>(static_cast<double>(w) * s.inverse[r]);
      dropped[t] += w == 0;
      any += w == 0;
    });
    for (int t = 0; any > 0 && t < block.count; ++t) {
      if (dropped[t] == 0) continue;
      s.cleaned = true;
      const bool all = dropped[t] == weight_rows;
      const i64 first = (block.image * geometry.keys + block.token[t]) * weight_rows;
      const auto is_dropped = [&](i64 h) {
        return all || read_parameter<T>(general.key_weight.weight, first + h) == 0;
      };
      // A focused row's factor is of all its heads: it stays as it is unless all are dropped.
      if (!focused || all) clean(key, t, s.key, ck, is_dropped);
      clean(value, t, s.value, cv, is_dropped);
      if (normal) clean(*normal, t, s.normal, ck, is_dropped);
    }
  }
  /// weight[t] = factor share of one head's keys; of one that weighs nothing 0, whatever its factor is. Where
  /// only some heads drop a focused key, its features are cleaned here.
  void weigh_keys(i64 h, const Block& block, const KeyShares<X>& s, const HeadFeatures<T>& f,
                  T* weight) const {
    const T* share = share_of(h, s);
    for (int t = 0; t < block.count; ++t) {
      weight[t] = share[t] == 0 ? 0 : f.norms.factor[t] * share[t];
      if (share[t] == 0 && s.cleaned && focused)
        clean_features(f.norms.factor[t], z_of(h, f) + t * ck.padded);
    }
  }

  /// Adds the rows of key_bias that a block's keys will read.
  void expect_bias(const Block& block, Upcoming& upcoming) const {
    const Parameter& bias = in.mapping.key_bias;
    if (!bias || element_size(bias.dtype) != static_cast<i64>(sizeof(X))) return;
    upcoming.add_rows(static_cast<const X*>(bias.data), ck.count(), block.position, block, ck.count());
  }
  /// Adds the rows of the rotation's table that a block will read.
  void expect_table(const Block& block, Upcoming& upcoming) const {
    const Parameter& table = general.rotation.table;
    if (!table || element_size(table.dtype) != static_cast<i64>(sizeof(T))) return;
    const i64 row = general.rotation.per_channel ? ck.count() : ck.dim;
    upcoming.add_rows(static_cast<const T*>(table.data), row, block.position, block, row);
  }
  /// Adds the keys and values of a block.
  void expect_keys(const Block& block, Upcoming& upcoming) const {
    upcoming.add<X>(in.key, block, ck.count());
    upcoming.add<X>(in.value, block, cv.count());
    if (general.normalizer_key.data) upcoming.add<X>(general.normalizer_key, block, ck.count());
    expect_bias(block, upcoming);
    expect_table(block, upcoming);
  }
  void expect_keys(i64 pair, i64 position, Upcoming& upcoming) const {
    Block block;
    block.clear(0);
    if (pair < pairs() && position < keys.tokens())
      keys.fill(block, image(pair), window(pair), position, smaller(kBlock, keys.tokens() - position));
    expect_keys(block, upcoming);
  }

  const AttentionInputs& in;
  const General& general;
  const Geometry& geometry;
  Channels ck, cv;
  Grid keys, queries;
  Products<T> products;
  Normalizing<T> normalizing;
  bool focused, divides, needs_u;
  i64 weight_rows;  // of key weights: one for all heads, or one for each

 private:
  T* z_of(i64 h, const HeadFeatures<T>& f) const { return focused ? f.z + h * ck.head_stride() : f.z; }

  HeadTable table_of(i64 h, const Block& block) const {
    const Rotation& r = general.rotation;
    return {r.table, r.per_channel ? ck.count() : ck.dim, r.per_channel ? h * ck.dim : 0, block.position};
  }
  Head<T> head_of(i64 h, const Rows<const X>& rows, const Parameter& bias, const Rows<const X>* normal,
                  const Block& block, const HeadFeatures<T>& f) const {
    T* z = z_of(h, f);
    Head<T> head{z, z, z};
    const bool in_one = !focused && turns_in_one_ && !bias;
    if (in_one) {
      map_.forward_and_turn(rows.at, table_of(h, block), block.count, h, ck, z, f.turned);
    } else if (!focused) {
      (bias ? map_.forward_with_bias : map_.forward)(rows.at, bias, block.position, block.count, h, ck, z);
    }
    if (general.rotation) {
      if (!in_one) turn_head<T>(z, table_of(h, block), block.count, ck, false, nullptr, nullptr, f.turned);
      head.product = f.turned;
    }
    if (normal) {
      pack_head(*normal, block.count, h, ck, ones_, f.normal);
      head.normal = f.normal;
    }
    return head;
  }

  /// What makes 0 * x, or the gradient of it, other than 0: NaN, infinity, and numbers so large that their
  /// products overflow.
  static bool is_harmful(T x) {
    constexpr T kMost = sizeof(T) == 4 ? T(4.2e9) : T(1e77);
    return !(x < kMost && x > -kMost);
  }
  template <class IsDropped>
  static void clean(Rows<const X>& rows, int t, X* memory, Channels c, const IsDropped& is_dropped) {
    X* to = memory + t * c.count();
    __builtin_memcpy(to, rows.at[t], static_cast<std::size_t>(c.count()) * sizeof(X));
    for (i64 h = 0; h < c.heads; ++h) {
      if (!is_dropped(h)) continue;
      for (i64 d = h * c.dim; d < (h + 1) * c.dim; ++d) {
        if (is_harmful(value_at(to + d))) to[d] = X{};
      }
    }
    rows.at[t] = to;
  }
  void clean_features(T factor, T* z) const {
    for (i64 d = 0; d < ck.dim; ++d) {
      if (is_harmful(factor * z[d])) z[d] = 0;
    }
  }

  void transpose_uneven(const T* from, T* to) const {
    if (ck.dim == cv.dim) return transpose(from, to, ck.dim, ck.dim, ck.padded);
    set_zero(to, cv.dim * ck.padded);
    for (i64 i = 0; i < ck.dim; ++i) {
      for (i64 j = 0; j < cv.dim; ++j) to[j * ck.padded + i] = from[i * cv.padded + j];
    }
  }

  Focus<X, T> focus_query_, focus_key_;
  HeadMap<X, T> map_;
  bool turns_in_one_;  // whether rotation and map of a head are one pass
  T ones_[kBlock];
};

}  // namespace flatten::cpu::FLATTEN_ISA

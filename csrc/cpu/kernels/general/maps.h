// What the general form does to rows of one head: feature maps of single numbers, rotation, the gate. Rows of
// a head lie `padded` elements apart, as in rows.h.
#pragma once

#include "../../vec/exponential.h"
#include "../focus.h"

namespace flatten::cpu::FLATTEN_ISA {

/// elu(x) + 1, whose slope at 0 is 1.
template <class V>
FLATTEN_INLINE V elu_plus_one(V x) {
  return exponential(at_most(x, V{})) + relu(x);  // e^0 is 1 exactly
}

/// phi(x) of a map of single numbers.
template <FeatureMap kMap, class V>
FLATTEN_INLINE V map_number(V x) {
  if constexpr (kMap == FeatureMap::kElu) return elu_plus_one(x);
  if constexpr (kMap == FeatureMap::kRelu) return relu(x);
  return x;
}
/// Its slope, from z = phi(x).
template <FeatureMap kMap, class V>
FLATTEN_INLINE V slope_at(V z) {
  if constexpr (kMap == FeatureMap::kElu) return z < 1 ? z : V{} + 1;
  if constexpr (kMap == FeatureMap::kRelu) return z > 0 ? V{} + 1 : V{};
  return V{} + 1;
}

/// load_at_most and store_at_most, where kWhole says that heads consist of whole vectors.
template <bool kWhole, class X>
FLATTEN_INLINE Vec<Accumulate<X>> load_part(const X* p, i64 left) {
  return kWhole ? load(p) : load_at_most(p, left);
}
template <bool kWhole, class X>
FLATTEN_INLINE void store_part(X* p, Vec<Accumulate<X>> x, i64 left, bool streamed) {
  if (kFillsLine<X> && streamed) return stream(p, x);
  kWhole ? store(p, x) : store_at_most(p, x, left);
}

/// The table of a call's rotation: one head's part of the rows of a block's tokens.
struct HeadTable {
  const Parameter& table;
  i64 row_elements, first;  // of a row; the head's first
  const i64* position;
};

/// A vector of pairs of channels, rotated by angles of which there are cosine and sine side by side. `signs`:
/// pair_signs, or their opposite to rotate back.
template <class T>
FLATTEN_INLINE Vec<T> turn_pairs(Vec<T> x, Vec<T> angles, Vec<T> signs) {
  const Vec<T> cosines = first_of_pairs(angles, LaneNumbers<T>{});
  const Vec<T> sines = second_of_pairs(angles, LaneNumbers<T>{}) * signs;
  return fma(swap_pairs(x, LaneNumbers<T>{}), sines, x * cosines);
}

/// One head of a block's rows, mapped: z = phi(x + key_bias).
template <FeatureMap kMap, bool kBias, bool kWhole, class X, class T>
void map_head(const X* const* rows, const Parameter& bias, const i64* position, int count, i64 head,
              Channels c, T* z) {
  for (int t = 0; t < count; ++t, z += c.padded) {
    const X* x = rows[t] + head * c.dim;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> xv = load_part<kWhole>(x + d, c.dim - d);
      if constexpr (kBias)
        xv = xv + load_parameter<T>(bias, position[t] * c.count() + head * c.dim + d, c.dim - d);
      Vec<T> zv = map_number<kMap>(xv);
      if (kMap == FeatureMap::kElu && !kWhole && c.dim - d < kLanes<T>) {  // phi(0) = 1, but the padding is 0
        T lanes[kLanes<T>];
        store(lanes, zv);
        zv = load_partial(lanes, c.dim - d);
      }
      store(z + d, zv);
    }
  }
}

/// map_head and turn_head in one, for heads of whole vectors and a table of T.
template <FeatureMap kMap, class X, class T>
void map_and_turn_head(const X* const* rows, const HeadTable& at, int count, i64 head, Channels c, T* z,
                       T* turned) {
  const Vec<T> signs = pair_signs<T>(LaneNumbers<T>{});
  const T* table = elements_of<T>(at.table) + at.first;
  for (int t = 0; t < count; ++t, z += c.padded, turned += c.padded) {
    const X* x = rows[t] + head * c.dim;
    const T* row = table + at.position[t] * at.row_elements;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> zv = map_number<kMap>(load(x + d));
      store(z + d, zv);
      store(turned + d, turn_pairs<T>(zv, load(row + d), signs));
    }
  }
}

/// Where the gradient of one head's rows goes; each may be null.
template <class X, class T>
struct HeadGradient {
  X* const* dx = nullptr;
  T* bias_sum = nullptr;  // padded rows of key_bias, to which it is added
  bool streamed = false;  // see is_streamed
};

/// dx = slope dphi of one head of a block, from its features and dphi.
template <FeatureMap kMap, bool kWhole, class X, class T>
void map_head_backward(const T* z, const T* gradient, const i64* position, int count, i64 head, Channels c,
                       const HeadGradient<X, T>& to) {
  for (int t = 0; t < count; ++t, z += c.padded, gradient += c.padded) {
    X* dx = to.dx ? to.dx[t] + head * c.dim : nullptr;
    T* sum = to.bias_sum ? to.bias_sum + position[t] * c.padded_count() + head * c.padded : nullptr;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> value = load(gradient + d);
      if constexpr (kMap != FeatureMap::kNone) value = value * slope_at<kMap>(load(z + d));
      if (sum) store(sum + d, load(sum + d) + value);
      if (dx) store_part<kWhole>(dx + d, value, c.dim - d, to.streamed);
    }
  }
}

/// turn_head back and map_head_backward in one, for heads of whole vectors and a table of T: dx from the
/// derivative by the rotated features; start[d] * factor[t] is added to that by the unrotated ones.
template <FeatureMap kMap, class X, class T>
void turn_back_and_map_head(const T* z, const T* gradient, const HeadTable& at, int count, i64 head,
                            Channels c, const T* start, const T* factor, const HeadGradient<X, T>& to) {
  const Vec<T> signs = -pair_signs<T>(LaneNumbers<T>{});
  const T* table = elements_of<T>(at.table) + at.first;
  for (int t = 0; t < count; ++t, z += c.padded, gradient += c.padded) {
    const T* row = table + at.position[t] * at.row_elements;
    const Vec<T> f = broadcast(factor[t]);
    X* dx = to.dx ? to.dx[t] + head * c.dim : nullptr;
    T* sum = to.bias_sum ? to.bias_sum + at.position[t] * c.padded_count() + head * c.padded : nullptr;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> value = fma(load(start + d), f, turn_pairs<T>(load(gradient + d), load(row + d), signs));
      if constexpr (kMap != FeatureMap::kNone) value = value * slope_at<kMap>(load(z + d));
      if (sum) store(sum + d, load(sum + d) + value);
      if (dx) store_part<true>(dx + d, value, c.dim - d, to.streamed);
    }
  }
}

/// The functions of one map of single numbers.
template <class X, class T>
struct HeadMap {
  void (*forward)(const X* const* rows, const Parameter& bias, const i64* position, int count, i64 head,
                  Channels c, T* z);
  void (*forward_with_bias)(const X* const* rows, const Parameter& bias, const i64* position, int count,
                            i64 head, Channels c, T* z);
  void (*backward)(const T* z, const T* gradient, const i64* position, int count, i64 head, Channels c,
                   const HeadGradient<X, T>& to);
  /// Both null where heads are not of whole vectors.
  void (*forward_and_turn)(const X* const* rows, const HeadTable& at, int count, i64 head, Channels c, T* z,
                           T* turned);
  void (*turn_and_backward)(const T* z, const T* gradient, const HeadTable& at, int count, i64 head,
                            Channels c, const T* start, const T* factor, const HeadGradient<X, T>& to);

  template <FeatureMap kMap>
  static HeadMap make(Channels c) {
    if (c.dim == c.padded) {
      return {&map_head<kMap, false, true, X, T>, &map_head<kMap, true, false, X, T>,
              &map_head_backward<kMap, true, X, T>, &map_and_turn_head<kMap, X, T>,
              &turn_back_and_map_head<kMap, X, T>};
    }
    return {&map_head<kMap, false, false, X, T>, &map_head<kMap, true, false, X, T>,
            &map_head_backward<kMap, false, X, T>, nullptr, nullptr};
  }
  static HeadMap select(FeatureMap map, Channels c) {
    if (map == FeatureMap::kElu) return make<FeatureMap::kElu>(c);
    if (map == FeatureMap::kRelu) return make<FeatureMap::kRelu>(c);
    return make<FeatureMap::kNone>(c);
  }
};

/// The pairs of channels (2i, 2i + 1) of one head's rows, rotated by the table's angles or, `back`, against
/// them; kAdds: then start[d] * factor[t] is added. `to` may be `from`.
template <bool kWhole, bool kAdds, class E, class T>
void turn_rows(const T* from, const E* table, const HeadTable& at, int count, Channels c, bool back,
               const T* start, const T* factor, T* to) {
  const Vec<T> signs = back ? -pair_signs<T>(LaneNumbers<T>{}) : pair_signs<T>(LaneNumbers<T>{});
  for (int t = 0; t < count; ++t, from += c.padded, to += c.padded) {
    const E* row = table + at.position[t] * at.row_elements + at.first;
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      const Vec<T> angles = load_part<kWhole>(row + d, c.dim - d), x = load(from + d);
      Vec<T> turned = turn_pairs<T>(x, angles, signs);
      if constexpr (kAdds) turned = fma(load(start + d), broadcast(factor[t]), turned);
      store(to + d, turned);
    }
  }
}
/// `start` null: nothing is added.
template <class T>
void turn_head(const T* from, const HeadTable& at, int count, Channels c, bool back, const T* start,
               const T* factor, T* to) {
  with_elements<T>(at.table, [&](const auto* table) {
    if (c.dim != c.padded) {
      start ? turn_rows<false, true>(from, table, at, count, c, back, start, factor, to)
            : turn_rows<false, false>(from, table, at, count, c, back, start, factor, to);
    } else {
      start ? turn_rows<true, true>(from, table, at, count, c, back, start, factor, to)
            : turn_rows<true, false>(from, table, at, count, c, back, start, factor, to);
    }
  });
}

/// rows[t] += factor[t] * x, for the rows of one head of a block.
template <class T>
void add_multiples(const T* x, const T* factor, int count, i64 padded, T* rows) {
  for (int t = 0; t < count; ++t, rows += padded) {
    const Vec<T> f = broadcast(factor[t]);
    for (i64 d = 0; d < padded; d += kLanes<T>) store(rows + d, fma(load(x + d), f, load(rows + d)));
  }
}

/// act(gate) and, in `slope`, its derivative.
template <GateActivation kActivation, class V>
FLATTEN_INLINE V activate(V gate, V& slope) {
  if constexpr (kActivation == GateActivation::kNone) {
    slope = V{} + 1;
    return gate;
  } else {
    V rest;
    const V s = sigmoid(gate, rest);
    if constexpr (kActivation == GateActivation::kSigmoid) {
      slope = s * rest;
      return s;
    }
    slope = s * fma(gate, rest, V{} + 1);
    return gate * s;
  }
}

/// out = act(gate) h for one head of a block; h has rows of `padded` elements.
template <GateActivation kActivation, bool kWhole, class X, class T>
void gate_head(const T* h, const X* const* gate, int count, i64 head, Channels c, X* const* out,
               bool streamed) {
  for (int t = 0; t < count; ++t, h += c.padded) {
    const X* from = gate[t] + head * c.dim;
    X* to = out[t] + head * c.dim;
    for (i64 d = 0; d < c.dim; d += kLanes<T>) {
      Vec<T> slope;
      const Vec<T> gate_at = load_part<kWhole>(from + d, c.dim - d);
      store_part<kWhole>(to + d, load(h + d) * activate<kActivation>(gate_at, slope), c.dim - d, streamed);
    }
  }
}

/// Where the derivative by one head's ungated output goes: times factor[t] to rows of `padded` elements and,
/// unless `kept` is null, as it is to rows of the head's own.
template <class T>
struct UngatedGradient {
  const T* factor;
  T* scaled;
  T* const* kept;
};

/// act(gate) grad_out of one head of a block and, unless `grad_gate` is null, dgate = act'(gate) grad_out h.
template <GateActivation kActivation, bool kWhole, class X, class T>
void gate_head_backward(const T* h, const X* const* gate, const X* const* grad_out, int count, i64 head,
                        Channels c, const UngatedGradient<T>& to, X* const* grad_gate) {
  T* scaled = to.scaled;
  for (int t = 0; t < count; ++t, h += c.padded, scaled += c.padded) {
    const X *g = gate[t] + head * c.dim, *go = grad_out[t] + head * c.dim;
    X* dg = grad_gate ? grad_gate[t] + head * c.dim : nullptr;
    const Vec<T> factor = broadcast(to.factor[t]);
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> slope;
      const Vec<T> gradient = load_part<kWhole>(go + d, c.dim - d);
      const Vec<T> ungated = gradient * activate<kActivation>(load_part<kWhole>(g + d, c.dim - d), slope);
      store(scaled + d, ungated * factor);
      if (to.kept) store_part<kWhole>(to.kept[t] + d, ungated, c.dim - d, false);
      if (dg) store_part<kWhole>(dg + d, gradient * slope * load(h + d), c.dim - d, false);
    }
  }
}

/// act(gate) and, in `ratio`, act'(gate) / act(gate); `inverse` becomes 1 / gate where the ratio has it.
template <GateActivation kActivation, class V>
FLATTEN_INLINE V activate_with_ratio(V gate, V& ratio, V& inverse) {
  if constexpr (kActivation == GateActivation::kSigmoid) {
    inverse = V{};
    return sigmoid(gate, ratio);
  } else {
    ratio = inverse = reciprocal(gate);
    if constexpr (kActivation == GateActivation::kNone) return gate;
    V rest;
    const V s = sigmoid(gate, rest);
    ratio = inverse + rest;
    return gate * s;
  }
}

/// gate_head_backward from the output in place of h: act' h = out act' / act. Returns whether that is right:
/// not where a gate is nearly 0, very large, or NaN, or the output overflows. For heads of whole vectors.
template <GateActivation kActivation, class X, class T>
bool gate_head_backward_from_output(const X* const* out, const X* const* gate, const X* const* grad_out,
                                    int count, i64 head, Channels c, const UngatedGradient<T>& to,
                                    X* const* grad_gate) {
  constexpr T kMost = T(1e12);  // of the squares of gates and of their inverses
  Vec<T> gates{}, outputs{};    // sums of squares, where NaN and infinity stay
  T* scaled = to.scaled;
  for (int t = 0; t < count; ++t, scaled += c.padded) {
    const i64 first = head * c.dim;
    const Vec<T> factor = broadcast(to.factor[t]);
    for (i64 d = 0; d < c.padded; d += kLanes<T>) {
      Vec<T> ratio, inverse;
      const Vec<T> g = load(gate[t] + first + d), o = load(out[t] + first + d);
      const Vec<T> gradient = load(grad_out[t] + first + d);
      const Vec<T> ungated = gradient * activate_with_ratio<kActivation>(g, ratio, inverse);
      gates = fma(g, g, fma(inverse, inverse, gates));
      outputs = fma(o, o, outputs);
      store(scaled + d, ungated * factor);
      if (to.kept) store(to.kept[t] + d, ungated);
      store(grad_gate[t] + first + d, gradient * o * ratio);
    }
  }
  return sum(gates) < kMost && sum(outputs) - sum(outputs) == 0;
}

/// The functions of one activation.
template <class X, class T>
struct Gate {
  void (*forward)(const T* h, const X* const* gate, int count, i64 head, Channels c, X* const* out,
                  bool streamed);
  void (*backward)(const T* h, const X* const* gate, const X* const* grad_out, int count, i64 head,
                   Channels c, const UngatedGradient<T>& to, X* const* grad_gate);
  /// Null where heads are not of whole vectors, and in half precision, which would round h twice.
  bool (*backward_from_output)(const X* const* out, const X* const* gate, const X* const* grad_out, int count,
                               i64 head, Channels c, const UngatedGradient<T>& to, X* const* grad_gate);

  template <GateActivation kActivation>
  static Gate make(Channels c) {
    if (c.dim != c.padded)
      return {&gate_head<kActivation, false, X, T>, &gate_head_backward<kActivation, false, X, T>, nullptr};
    Gate gate{&gate_head<kActivation, true, X, T>, &gate_head_backward<kActivation, true, X, T>, nullptr};
    if constexpr (std::is_same_v<X, T>)
      gate.backward_from_output = &gate_head_backward_from_output<kActivation, X, T>;
    return gate;
  }
  static Gate select(GateActivation activation, Channels c) {
    if (activation == GateActivation::kSilu) return make<GateActivation::kSilu>(c);
    if (activation == GateActivation::kSigmoid) return make<GateActivation::kSigmoid>(c);
    return make<GateActivation::kNone>(c);
  }
};

}  // namespace flatten::cpu::FLATTEN_ISA

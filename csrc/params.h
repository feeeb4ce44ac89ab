// What a kernel is told: plain sizes, strides and pointers. No torch, no CUDA, no std beyond <cstdint>,
// so that kernels compile in seconds and can be driven from any host.
#pragma once

#include <cstdint>

namespace flatten {

enum class Dtype : std::int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

/// Sums, norms, S, m and the taps accumulate in float; in double for double inputs.
constexpr Dtype accumulate_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

constexpr std::int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

/// As torch prints it, "float32"; null for a value that is none of the four.
constexpr const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return nullptr;
}

/// A (batch, token, channel) tensor in the call's dtype; channels are adjacent. Strides count elements,
/// 0 where the tensor was expanded.
struct Tokens {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t token_stride = 0;
};

/// The same, written to.
struct MutableTokens {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t token_stride = 0;
};

/// A contiguous parameter in its own dtype; `data` is null when the argument was None.
struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  explicit constexpr operator bool() const { return data != nullptr; }
};

/// A contiguous gradient in its parameter's dtype; `data` is null when nobody asked for it.
struct MutableParameter {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  explicit constexpr operator bool() const { return data != nullptr; }
};

/// How tokens lie on the map and in windows.
///
/// Tokens are stored in raster order: `prefix` tokens that are outside the map, then map_h * map_w
/// tokens row by row. Without `size` the map is 1 x keys. Without `window` there is one window, the
/// whole map plus the prefix; it is also the only case where `queries` may differ from `keys`.
/// Position (y, x) of window (wy, wx) is the map token
/// ((wy * window_h + y + shift_h) % map_h, (wx * window_w + x + shift_w) % map_w).
/// The shift may be nonzero with a single window too: then the window is the rolled map.
struct Geometry {
  std::int64_t batch = 0;
  std::int64_t queries = 0;  // N
  std::int64_t keys = 0;     // M
  std::int64_t prefix = 0;   // P, 0 with several windows
  std::int64_t map_h = 1, map_w = 1;
  std::int64_t window_h = 1, window_w = 1;
  std::int64_t shift_h = 0, shift_w = 0;
  std::int64_t heads = 1, head_dim = 1;  // head_dim: D_k, of queries and keys
  std::int64_t value_dim = 1;            // D_v, of values, taps, gate and output

  constexpr std::int64_t channels() const { return heads * head_dim; }
  constexpr std::int64_t value_channels() const { return heads * value_dim; }
  constexpr std::int64_t windows_h() const { return map_h / window_h; }
  constexpr std::int64_t windows_w() const { return map_w / window_w; }
  constexpr std::int64_t windows() const { return windows_h() * windows_w(); }
  /// Keys one window attends over: the mean's M, and the rows of key_bias.
  constexpr std::int64_t window_keys() const { return windows() > 1 ? window_h * window_w : keys; }
  constexpr std::int64_t window_queries() const { return windows() > 1 ? window_h * window_w : queries; }
};

/// The depthwise branch over v, of D = value_dim and C = value_channels(): weight (D, 1, kernel_h, kernel_w)
/// shared by the heads, or (C, 1, kernel_h, kernel_w), and bias (D,) or (C,). Absent when weight.data is
/// null.
struct Taps {
  Parameter weight;
  Parameter bias;
  std::int64_t kernel_h = 0, kernel_w = 0;  // odd
  bool per_channel = false;
  bool per_image = false;  // weight (B, C, 1, kernel_h, kernel_w): each image's own, without bias
  explicit constexpr operator bool() const { return static_cast<bool>(weight); }
};

/// What is done to the channels of a query or key before the products.
enum class FeatureMap : std::int32_t {
  kNone,     // the caller mapped them already (`linear_attention`); any sign
  kFocused,  // phi_p (DESIGN: y = (relu(x) + eps) / scale, phi = y^p |y| / |y^p|)
  kElu,      // elu(x) + 1
  kRelu,     // max(x, 0)
};

struct Mapping {
  FeatureMap map = FeatureMap::kFocused;
  double focusing_factor = 3.0;  // of kFocused
  Parameter scale;               // (C,), positive; of kFocused
  Parameter key_bias;            // (window_keys, C), added to the keys before the map, kNone too
};

/// What becomes of a query's sums y = c Qn S and z = c Qd . m (DESIGN, part 2).
enum class Normalizer : std::int32_t {
  kDivide,     // y / (z + eps)
  kNone,       // y
  kSubtract,   // y + (1 - z) u
  kMagnitude,  // (1 + 1 / (z + eps)) y - z u
};

/// act(gate) multiplies the output.
enum class GateActivation : std::int32_t { kNone, kSilu, kSigmoid };

/// Cosines and sines (window tokens, R, 2) that rotate the mapped channels (2i, 2i + 1), for S alone: m and z
/// use the features as they were before. `table.data` is null without rotation.
struct Rotation {
  Parameter table;
  bool per_channel = false;  // R = C / 2; else R = D / 2, the same for all heads
  explicit constexpr operator bool() const { return static_cast<bool>(table); }
};

/// w_j >= 0, (batch, keys) or (batch, keys, heads), contiguous, in raster order with windows too; null:
/// all 1. A key of weight 0 is dropped from S, m, u and W, whatever its k and v hold.
struct KeyWeight {
  Parameter weight;
  bool per_head = false;
  explicit constexpr operator bool() const { return static_cast<bool>(weight); }
};

/// What the general form (DESIGN, part 2) has beyond focused linear attention. By default it has nothing:
/// such calls take the kernels' shortest way.
struct General {
  Rotation rotation;
  KeyWeight key_weight;
  Normalizer normalizer = Normalizer::kDivide;
  double similarity_scale = 1.0;            // c
  Tokens normalizer_query, normalizer_key;  // Qd and Kd where they are not Qn and Kn before rotation; or null
  Tokens gate;                              // (B, N, h * D_v), or null
  GateActivation gate_activation = GateActivation::kNone;

  constexpr bool is_plain() const {
    return !rotation && !key_weight && normalizer == Normalizer::kDivide && similarity_scale == 1.0 &&
           normalizer_query.data == nullptr && normalizer_key.data == nullptr && gate.data == nullptr;
  }
  /// Whether a window's u and W are needed beside S and m.
  constexpr bool has_sums() const {
    return key_weight || normalizer == Normalizer::kSubtract || normalizer == Normalizer::kMagnitude;
  }
};

/// What flatten::attention and flatten::linear_attention read, forward and backward.
struct AttentionInputs {
  Geometry geometry;
  Dtype dtype = Dtype::kFloat32;
  Mapping mapping;
  double eps = 1e-6;
  Taps taps;
  Tokens query, key, value;
  General general;
};

/// Whether a call is focused linear attention's, or that of features which are mapped already: nothing in it
/// is of the general form.
constexpr bool is_plain(const AttentionInputs& in) {
  const bool mapped = in.mapping.map == FeatureMap::kNone && !in.mapping.key_bias;
  return in.general.is_plain() && !in.taps.per_image && in.geometry.value_dim == in.geometry.head_dim &&
         (mapped || in.mapping.map == FeatureMap::kFocused);
}

struct AttentionForward : AttentionInputs {
  MutableTokens out;
  /// Where to leave S and m for the backward pass, in the accumulate dtype, or null: window_state_elements()
  /// numbers for each of `saved_windows`, which are all windows of the batch or, on the CPU, some of them.
  /// Which those are, and the layout within a window, is the device's own.
  void* state = nullptr;
  std::int64_t saved_windows = 0;
};

/// S (head_dim x value_dim) and m (head_dim) of every head.
constexpr std::int64_t window_state_elements(const Geometry& g) { return g.channels() * (g.value_dim + 1); }

/// The same and, where a call needs them, u (value_dim) and W of every head.
constexpr std::int64_t window_state_elements(const AttentionInputs& in) {
  const Geometry& g = in.geometry;
  return window_state_elements(g) + (in.general.has_sums() ? g.heads * (g.value_dim + 1) : 0);
}

/// Those of all windows.
constexpr std::int64_t state_elements(const Geometry& g) {
  return g.batch * g.windows() * window_state_elements(g);
}

/// Each output is null when nobody asked for it.
struct AttentionBackward : AttentionInputs {
  Tokens grad_out;
  Tokens out;  // of the forward, or null: what saves computing again what the gate multiplied
  const void* state = nullptr;  // as the forward left it; null: recompute S and m of all windows
  std::int64_t saved_windows = 0;
  MutableTokens grad_query, grad_key, grad_value;
  MutableParameter grad_scale, grad_key_bias, grad_weight, grad_bias;
  MutableParameter grad_key_weight;
  MutableTokens grad_normalizer_query, grad_normalizer_key, grad_gate;
};

/// What flatten::attention_state reads: `query` is null, there is one window and no taps, and of `general`
/// only rotation (of the keys), key_weight and normalizer_key are given. geometry.queries is keys.
struct StateForward : AttentionInputs {
  /// (batch, heads, head_dim + 1, value_dim + 1), contiguous, in the accumulate dtype:
  /// sum_j w_j [Kn_j; 1] [v_j; 1]^T, with Kd in the last column. Sums, divided by nothing.
  void* state = nullptr;
};

struct StateBackward : AttentionInputs {
  const void* grad_state = nullptr;  // as `state`
  MutableTokens grad_key, grad_value, grad_normalizer_key;
  MutableParameter grad_scale, grad_key_bias, grad_key_weight;
};

/// What flatten::attention_from_state reads: `key` and `value` are null, there is one window and no taps, and
/// of `general` rotation (of the queries), normalizer, similarity_scale, normalizer_query and the gate are
/// given. geometry.keys is queries; the keys' number is in the state.
struct FromStateForward : AttentionInputs {
  const void* from = nullptr;  // the state, as StateForward leaves it
  MutableTokens out;
};

struct FromStateBackward : AttentionInputs {
  const void* from = nullptr;
  Tokens grad_out;
  MutableTokens grad_query, grad_normalizer_query, grad_gate;
  MutableParameter grad_scale;
  void* grad_from = nullptr;  // as `from`
};

/// What flatten::depthwise_conv reads: taps over x on the map, per window; prefix tokens give 0.
struct ConvInputs {
  Geometry geometry;  // queries == keys
  Dtype dtype = Dtype::kFloat32;
  Taps taps;
  Tokens x;
};

struct ConvForward : ConvInputs {
  MutableTokens out;
};

struct ConvBackward : ConvInputs {
  Tokens grad_out;
  MutableTokens grad_x;
  MutableParameter grad_weight, grad_bias;
};

}  // namespace flatten

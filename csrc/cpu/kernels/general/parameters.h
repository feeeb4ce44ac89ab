// The sums that become the gradients of a call's parameters: of each slot, in chains of tokens.
#pragma once

#include "call.h"

namespace flatten::cpu::FLATTEN_ISA {

/// Sums over tokens: `scale` has those of dy y and `bias` those of the taps' bias, as padded rows; `weight`
/// has those of the taps' weights, in the order of the kernels.
template <class T>
struct ParameterSums {
  T *scale = nullptr, *bias = nullptr, *weight = nullptr;
};

/// Which gradients are wanted; null for none.
struct ParameterTask {
  MutableParameter scale, key_bias, weight, bias;
};

template <class X>
class ParameterGradients {
 public:
  using T = Accumulate<X>;

  /// `shape` is that of the taps, null without taps.
  ParameterGradients(const GeneralCall<X>& call, const ParameterTask& task, const TapsShape<T>* shape)
      : call_(call), task_(task), shape_(shape), images_(call.in.taps.per_image ? call.geometry.batch : 1) {}

  /// The memory that all slots share.
  struct Shared {
    ParameterSums<T> totals;  // one behind the other; `weight` is of each slot and image
    T* key_bias = nullptr;    // padded rows, of each of key_bias_slots
    int key_bias_slots = 1;   // 1 where all pairs are shared: then no two slots have the same keys
  };

  i64 weight_elements() const { return task_.weight ? shape_->weight_elements() : 0; }
  i64 bias_elements() const { return task_.bias ? call_.cv.padded_count() : 0; }
  i64 scale_elements() const { return task_.scale ? call_.ck.padded_count() : 0; }
  i64 key_bias_elements() const { return task_.key_bias ? call_.keys.tokens() * call_.ck.padded_count() : 0; }

  void lay_out(Arena& arena, Shared& s, const Schedule& schedule) const {
    const int slots = schedule.slots;
    s.key_bias_slots = schedule.whole == 0 ? 1 : slots;
    s.totals.scale = arena.take<T>(slots * scale_elements());
    s.totals.bias = arena.take<T>(slots * bias_elements());
    s.totals.weight = arena.take<T>(slots * images_ * weight_elements());
    s.key_bias = arena.take<T>(s.key_bias_slots * key_bias_elements());
  }
  void clear(const Shared& s, int slots) const {
    set_zero(s.totals.scale, slots * scale_elements());
    set_zero(s.totals.bias, slots * bias_elements());
    set_zero(s.totals.weight, slots * images_ * weight_elements());
    set_zero(s.key_bias, s.key_bias_slots * key_bias_elements());
  }

  ParameterSums<T> take_chain(Arena& arena) const {
    return {arena.take<T>(scale_elements()), arena.take<T>(bias_elements()),
            arena.take<T>(weight_elements())};
  }
  void clear_chain(const ParameterSums<T>& chain) const {
    set_zero(chain.scale, scale_elements());
    set_zero(chain.bias, bias_elements());
    set_zero(chain.weight, weight_elements());
  }
  /// Adds the sums of a chain of tokens of an image to the slot's own and starts a new one.
  void end_chain(const ParameterSums<T>& chain, i64 image, int slot, const Shared& s) const {
    const i64 of_image = slot * images_ + (images_ > 1 ? image : 0);
    add_to(s.totals.scale + slot * scale_elements(), chain.scale, scale_elements());
    add_to(s.totals.bias + slot * bias_elements(), chain.bias, bias_elements());
    add_to(s.totals.weight + of_image * weight_elements(), chain.weight, weight_elements());
    clear_chain(chain);
  }
  T* key_bias_of(int slot, const Shared& s) const {
    return task_.key_bias ? s.key_bias + (s.key_bias_slots == 1 ? 0 : slot) * key_bias_elements() : nullptr;
  }

  /// Adds up the slots' sums, in order, into the gradients.
  void write(const Parallel& parallel, const Shared& s, int slots) const {
    const Channels ck = call_.ck;
    for (i64 c = 0; task_.scale && c < ck.count(); ++c) {
      // y = (relu(x) + eps) / scale, so dscale = -sum of dy y / scale.
      T sum = 0;
      for (int slot = 0; slot < slots; ++slot)
        sum += s.totals.scale[slot * scale_elements() + c / ck.dim * ck.padded + c % ck.dim];
      write_parameter(task_.scale, c, -sum / read_parameter<T>(call_.in.mapping.scale, c));
    }
    for_each_run(parallel, slots, task_.key_bias ? call_.keys.tokens() : 0,
                 [&](i64 begin, i64 end) { write_key_bias(s, begin, end); });
    if (!task_.weight && !task_.bias) return;
    write_taps_gradients_of_images(*shape_, s.totals.weight, images_, s.totals.bias, slots, task_.weight,
                                   task_.bias);
  }

 private:
  void write_key_bias(const Shared& s, i64 begin, i64 end) const {
    const Channels ck = call_.ck;
    for (i64 j = begin; j < end; ++j) {
      for (i64 h = 0; h < ck.heads; ++h) {
        for (i64 d = 0; d < ck.padded; d += kLanes<T>) {
          const T* from = s.key_bias + j * ck.padded_count() + h * ck.padded + d;
          Vec<T> sum = load(from);
          for (int slot = 1; slot < s.key_bias_slots; ++slot)
            sum = sum + load(from + slot * key_bias_elements());
          store_parameter<T>(task_.key_bias, j * ck.count() + h * ck.dim + d, sum, ck.dim - d);
        }
      }
    }
  }

  const GeneralCall<X>& call_;
  ParameterTask task_;
  const TapsShape<T>* shape_;
  i64 images_;
};

}  // namespace flatten::cpu::FLATTEN_ISA

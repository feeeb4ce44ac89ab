// The body of every unit of this folder: the kernels, compiled for the instruction set of its flags, as a
// table. The including file defines FLATTEN_ISA (the namespace) and FLATTEN_ISA_NAME first.
#include "../kernels/backward.h"
#include "../kernels/conv.h"
#include "../kernels/forward.h"
#include "../kernels/general/backward.h"
#include "../kernels/general/forward.h"
#include "../kernels/general/state.h"

namespace flatten::cpu::FLATTEN_ISA {
namespace {

/// Calls body(X{}) for the storage type X of `dtype`.
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat16:
      return body(Float16{});
  }
  refuse_dtype();
}

void attention_forward(const AttentionForward& p, const Parallel& parallel) {
  const bool is_general = !is_plain(p);
  with_dtype(p.dtype, [&](auto x) {
    if (is_general) return GeneralForward<decltype(x)>(p).run(parallel);
    ForwardKernel<decltype(x)>(p).run(parallel);
  });
}

void attention_backward(const AttentionBackward& p, const Parallel& parallel) {
  const bool is_general = !is_plain(p);
  with_dtype(p.dtype, [&](auto x) {
    if (is_general) return GeneralBackward<decltype(x)>(p).run(parallel);
    BackwardKernel<decltype(x)>(p).run(parallel);
  });
}

void conv_forward(const ConvForward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { ConvKernel<decltype(x)>(p).forward(p, parallel); });
}

void conv_backward(const ConvBackward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { ConvKernel<decltype(x)>(p).backward(p, parallel); });
}

void state_forward(const StateForward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { StateKernel<decltype(x)>(p).forward(p, parallel); });
}

void state_backward(const StateBackward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { StateKernel<decltype(x)>(p).backward(p, parallel); });
}

void from_state_forward(const FromStateForward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { FromStateKernel<decltype(x)>(p).forward(p, parallel); });
}

void from_state_backward(const FromStateBackward& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto x) { FromStateKernel<decltype(x)>(p).backward(p, parallel); });
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{FLATTEN_ISA_NAME, attention_forward,  attention_backward,
                       conv_forward,     conv_backward,      state_forward,
                       state_backward,   from_state_forward, from_state_backward};

}  // namespace flatten::cpu::FLATTEN_ISA

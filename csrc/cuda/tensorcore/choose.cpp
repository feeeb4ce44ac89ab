// The choice between the tensor-core kernels.
#include "plan.h"

namespace flatten::cuda::tensorcore {
namespace {

template <class Params>
Call choose_any(const Params& p, const Device& device) {
  if (Call call = choose_all_heads(p, device)) return call;
  return heads::choose(p, device);
}

}  // namespace

Call choose(const AttentionForward& p, const Device& device) { return choose_any(p, device); }
Call choose(const AttentionBackward& p, const Device& device) { return choose_any(p, device); }

}  // namespace flatten::cuda::tensorcore

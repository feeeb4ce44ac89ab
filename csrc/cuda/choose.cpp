// The choice between the two implementations. FLATTEN_LOG=1 writes each to stderr.
#include "choose.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "level.h"

namespace flatten::cuda {
namespace {

bool is_logged() {
  static const bool logged = [] {
    const char* value = std::getenv("FLATTEN_LOG");
    return value && std::strcmp(value, "0") != 0 && *value;
  }();
  return logged;
}

const char* operator_of(const AttentionForward&) { return "attention"; }
const char* operator_of(const AttentionBackward&) { return "attention_backward"; }
const char* operator_of(const ConvForward&) { return "depthwise_conv"; }
const char* operator_of(const ConvBackward&) { return "depthwise_conv_backward"; }

template <class Params>
std::string described(const Params& params) {
  const Geometry& g = params.geometry;
  std::ostringstream text;
  text << "flatten." << operator_of(params) << ": " << name(params.dtype) << " (" << g.batch << ", "
       << g.queries << ", " << g.channels() << "), " << g.heads << " heads, " << g.windows() << " windows";
  return text.str();
}

/// "flatten.attention: bfloat16 (2, 3136, 96), 3 heads, 64 windows: tensorcore::forward_window"
template <class Params>
Call logged(Call call, const Params& params) {
  if (!is_logged()) return call;
  std::fprintf(stderr, "%s: %s%s%s\n", described(params).c_str(), call.kernels,
               call.why_general ? ", not on tensor cores: " : "", call.why_general ? call.why_general : "");
  return call;
}

template <class Params>
Call choose_attention(const Params& params, const Device& device) {
  const char* why = "this library was built for no GPU that has them";
  if (level() < Level::kTensorCore) {
    why = "FLATTEN_CUDA or cuda_kernels leaves these out";
  } else if constexpr (tensorcore::kBuilt) {
    if (Call call = tensorcore::choose(params, device)) {
      return call;
    } else {
      why = call.why_general;
    }
  }
  Call call = general::choose(params, device);
  call.why_general = why;
  return call;
}

}  // namespace

bool takes(const AttentionInputs& inputs) {
  return level() > Level::kReference && is_plain(inputs) &&
         inputs.geometry.head_dim <= general::most_head_dim(inputs.dtype);
}

bool takes(const ConvInputs& inputs) { return level() > Level::kReference && !inputs.taps.per_image; }

std::string describe(const AttentionForward& params) { return described(params); }
std::string describe(const AttentionBackward& params) { return described(params); }
std::string describe(const ConvForward& params) { return described(params); }
std::string describe(const ConvBackward& params) { return described(params); }

Call choose(const AttentionForward& params, const Device& device) {
  return logged(choose_attention(params, device), params);
}

Call choose(const AttentionBackward& params, const Device& device) {
  return logged(choose_attention(params, device), params);
}

Call choose(const ConvForward& params, const Device& device) {
  return logged(general::choose(params, device), params);
}

Call choose(const ConvBackward& params, const Device& device) {
  return logged(general::choose(params, device), params);
}

std::int64_t workspace_bytes(const AttentionForward& params, const Device& device) {
  return choose(params, device).workspace_bytes;
}

cudaError_t launch(const AttentionForward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  return choose(params, device).launch(workspace, stream);
}

std::int64_t workspace_bytes(const AttentionBackward& params, const Device& device) {
  return choose(params, device).workspace_bytes;
}

cudaError_t launch(const AttentionBackward& params, const Device& device, void* workspace,
                   cudaStream_t stream) {
  return choose(params, device).launch(workspace, stream);
}

std::int64_t workspace_bytes(const ConvForward& params, const Device& device) {
  return choose(params, device).workspace_bytes;
}

cudaError_t launch(const ConvForward& params, const Device& device, void* workspace, cudaStream_t stream) {
  return choose(params, device).launch(workspace, stream);
}

std::int64_t workspace_bytes(const ConvBackward& params, const Device& device) {
  return choose(params, device).workspace_bytes;
}

cudaError_t launch(const ConvBackward& params, const Device& device, void* workspace, cudaStream_t stream) {
  return choose(params, device).launch(workspace, stream);
}

}  // namespace flatten::cuda

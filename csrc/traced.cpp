// What torch.jit.trace records: twins of the three operators that take plain ints, which a trace can hold,
// where the operators take SymInts. The kernel at torch's Tracer key (flatten_ext/_torch/entry.py) calls
// them.
//
// A trace keeps numbers as constants. The Tracer's kernel therefore hands over what it can measure anew in
// every run, such as the number of tokens and the sizes that were read from shapes (`measured`), beside what
// these were during the trace (`expected`): a traced call at another size is an error and never a wrong
// result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "show.h"
#include "torch_errors.h"

namespace flatten {
namespace {

using Numbers = std::vector<std::int64_t>;

Numbers values_of(const Tensor& measured) {
  // Shapes are measured on the host; a trace that was moved to another device may have moved them too.
  const Tensor host =
      measured.device().type() == torch::headeronly::DeviceType::CPU
          ? torch::stable::contiguous(measured)
          : torch::stable::to(measured, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  if (scalar_type_of(host) != ScalarType::Long)
    throw std::runtime_error("flatten: measured has dtype other than int64");
  const auto* data = static_cast<const std::int64_t*>(host.const_data_ptr());
  return {data, data + host.numel()};
}

/// Runs the operator `name` on the arguments after the first two, where these agree. Where they do not, the
/// arguments, which the operator would own, are taken off the stack by `take`, and so dropped.
template <class Take>
void run(const char* name, StableIValue* stack, std::uint64_t count, const Take& take) {
  using torch::stable::detail::to;
  const Numbers measured = values_of(to<Tensor>(stack[0])), expected = to<Numbers>(stack[1]);
  if (measured == expected) {
    const std::string op = std::string("flatten::") + name;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.c_str(), "", stack + 2, TORCH_ABI_VERSION));
    stack[0] = stack[2];
    return;
  }
  Arguments given(stack + 2, count - 2);
  take(given);
  given.end();
  std::ostringstream message;
  message << "flatten." << name
          << ": size differs from that of the trace: the tokens and the numbers taken from "
          << "shapes are " << show(measured) << ", expected " << show(expected)
          << "; a traced call runs at the size it was traced at";
  throw std::runtime_error(message.str());
}

void attention(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  run("attention", stack, count, [](Arguments& given) { given.attention(Focus::kFocused); });
}
void linear_attention(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  run("linear_attention", stack, count, [](Arguments& given) { given.attention(Focus::kLinear); });
}
void depthwise_conv(StableIValue* stack, std::uint64_t count, std::uint64_t) {
  run("depthwise_conv", stack, count, [](Arguments& given) { given.conv(); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flatten, CompositeImplicitAutograd, m) {
  m.impl("attention_traced", &attention);
  m.impl("linear_attention_traced", &linear_attention);
  m.impl("depthwise_conv_traced", &depthwise_conv);
}

}  // namespace flatten

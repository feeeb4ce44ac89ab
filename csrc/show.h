// Values as error messages show them. Each `show` only notes its value; text is made when it is streamed, so
// a check that passes formats nothing.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <ostream>

namespace flatten {

/// "(2, 49, 96)"
struct ShownSizes {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};

inline ShownSizes show(torch::headeronly::IntHeaderOnlyArrayRef sizes) { return {sizes}; }

inline std::ostream& operator<<(std::ostream& out, const ShownSizes& shown) {
  const char* separator = "(";
  for (const std::int64_t size : shown.sizes) {
    out << separator << size;
    separator = ", ";
  }
  return out << (shown.sizes.empty() ? "()" : shown.sizes.size() == 1 ? ",)" : ")");
}

/// "float32", as torch.float32 prints.
struct ShownDtype {
  torch::headeronly::ScalarType dtype;
};

inline ShownDtype show(torch::headeronly::ScalarType dtype) { return {dtype}; }

inline std::ostream& operator<<(std::ostream& out, const ShownDtype& shown) {
  using torch::headeronly::ScalarType;
  switch (shown.dtype) {
    case ScalarType::Double:
      return out << "float64";
    case ScalarType::Float:
      return out << "float32";
    case ScalarType::BFloat16:
      return out << "bfloat16";
    case ScalarType::Half:
      return out << "float16";
    default:
      return out << toString(shown.dtype);
  }
}

/// "cuda:0"
struct ShownDevice {
  const torch::stable::Tensor& tensor;
};

inline ShownDevice show_device(const torch::stable::Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const ShownDevice& shown) {
  using torch::headeronly::DeviceType;
  const torch::stable::Device device = shown.tensor.device();
  switch (device.type()) {
    case DeviceType::CPU:
      return out << "cpu";
    case DeviceType::Meta:
      return out << "meta";
    case DeviceType::CUDA:
      return out << "cuda:" << int(device.index());
    default:
      return out << "device type " << int(device.type()) << ':' << int(device.index());
  }
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace flatten

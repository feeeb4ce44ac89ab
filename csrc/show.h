// Values as error messages show them. Each `show` only notes its value; text is made when it is streamed, so
// a check that passes formats nothing.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <ostream>

#include "dtypes.h"

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

/// "float32", as torch prints it; of dtypes that no kernel has, torch's name in C++: "Int".
struct ShownDtype {
  torch::headeronly::ScalarType dtype;
};

inline ShownDtype show(torch::headeronly::ScalarType dtype) { return {dtype}; }

inline std::ostream& operator<<(std::ostream& out, const ShownDtype& shown) {
  const std::optional<Dtype> dtype = dtype_of(shown.dtype);
  return out << (dtype ? name(*dtype) : toString(shown.dtype));
}

/// "cuda:0"
struct ShownDevice {
  const torch::stable::Tensor& tensor;
};

inline ShownDevice show_device(const torch::stable::Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const ShownDevice& shown) {
  using torch::headeronly::DeviceType;
  const torch::stable::Device device = shown.tensor.device();
  const DeviceType type = device.type();
  if (type == DeviceType::CPU) return out << "cpu";
  if (type == DeviceType::Meta) return out << "meta";
  if (type == DeviceType::CUDA) return out << "cuda:" << int(device.index());
  return out << "device type " << int(type) << ':' << int(device.index());  // torch has many more
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace flatten

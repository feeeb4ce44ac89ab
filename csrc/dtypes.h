// The four dtypes of the kernels as torch calls them, and the one place that turns a Dtype into a type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <type_traits>

#include "params.h"
#include "torch_errors.h"

namespace flatten {

using torch::headeronly::ScalarType;

/// A Dtype as a type, so that a body can be compiled for each.
template <Dtype kDtype>
using DtypeConstant = std::integral_constant<Dtype, kDtype>;

/// body(DtypeConstant<dtype>{}). A Dtype added to params.h makes the compiler point here.
template <class Body>
auto with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(DtypeConstant<Dtype::kFloat64>{});
    case Dtype::kFloat32:
      return body(DtypeConstant<Dtype::kFloat32>{});
    case Dtype::kBFloat16:
      return body(DtypeConstant<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return body(DtypeConstant<Dtype::kFloat16>{});
  }
  throw std::logic_error("flatten: a Dtype that params.h does not have");
}

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return ScalarType::Double;
    case Dtype::kFloat32:
      return ScalarType::Float;
    case Dtype::kBFloat16:
      return ScalarType::BFloat16;
    case Dtype::kFloat16:
      return ScalarType::Half;
  }
  throw std::logic_error("flatten: a Dtype that params.h does not have");
}

/// The Dtype of a scalar type, where the kernels have one.
inline std::optional<Dtype> dtype_of(ScalarType type) {
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (type == scalar_type(dtype)) return dtype;
  }
  return std::nullopt;
}

/// The scalar type of any tensor; torch::stable::Tensor::scalar_type() throws for a quantized one.
inline ScalarType scalar_type_of(const torch::stable::Tensor& tensor) {
  std::int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return static_cast<ScalarType>(type);
}

}  // namespace flatten

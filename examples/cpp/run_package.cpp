// Runs a model that torch._inductor.aoti_compile_and_package compiled, without Python:
//
//   run_package model.pt2 images.f32 logits.f32 BATCH HEIGHT WIDTH
//
// images.f32 has BATCH x 3 x HEIGHT x WIDTH numbers of float32, as numpy's tofile writes them; the model's first
// result is written likewise. The package calls torch.ops.flatten, which is there since flatten_ext::flatten is
// linked.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read(const std::string& path, const std::vector<std::int64_t>& shape) {
  at::Tensor x = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(x.data_ptr()), static_cast<std::streamsize>(x.nbytes()));
  if (!file || file.peek() != std::ifstream::traits_type::eof())
    throw std::runtime_error(path + " does not have " + std::to_string(x.numel()) + " numbers of float32");
  return x;
}

void write(const std::string& path, const at::Tensor& x) {
  const at::Tensor y = x.to(at::kFloat).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(y.data_ptr()), static_cast<std::streamsize>(y.nbytes()));
  if (!file.flush()) throw std::runtime_error(path + " cannot be written");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) {
    std::fprintf(stderr, "usage: run_package model.pt2 images.f32 logits.f32 BATCH HEIGHT WIDTH\n");
    return 2;
  }
  try {
    const at::Tensor images =
        read(arguments[2], {std::atoll(arguments[4]), 3, std::atoll(arguments[5]), std::atoll(arguments[6])});
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    write(arguments[3], model.run({images}).at(0));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what());
    return 1;
  }
}

// The CPU kernels as a program without torch drives them: csrc/params.h filled by hand, work cut into ranges
// by a loop of its own.
#include "cpu/kernels.h"

#include <cstdio>
#include <string>

#include "cpu/isa.h"
#include "scalar_attention.h"

namespace {

using flatten::Dtype;

/// Runs ranges of one in reverse order, to show that results depend on the number of threads alone.
void run_backwards(std::int64_t count, void (*task)(std::int64_t, std::int64_t, void*), void* context) {
  for (std::int64_t i = count; i-- > 0;) task(i, i + 1, context);
}

scalar::Numbers run(const scalar::Problem& p, int threads) {
  flatten::AttentionForward f;
  f.dtype = Dtype::kFloat64;
  f.geometry.batch = 1;
  f.geometry.queries = f.geometry.keys = p.tokens();
  f.geometry.map_h = p.height;
  f.geometry.map_w = p.width;
  f.geometry.window_h = p.window_h;
  f.geometry.window_w = p.window_w;
  f.geometry.shift_h = p.shift_h;
  f.geometry.shift_w = p.shift_w;
  f.geometry.heads = p.heads;
  f.geometry.head_dim = p.dim;
  f.mapping.focusing_factor = p.focusing_factor;
  f.mapping.scale = {p.scale.data(), Dtype::kFloat64};
  f.eps = p.eps;
  f.taps.weight = {p.weight.data(), Dtype::kFloat64};
  f.taps.bias = {p.bias.data(), Dtype::kFloat64};
  f.taps.kernel_h = p.kernel_h;
  f.taps.kernel_w = p.kernel_w;
  f.query = {p.q.data(), 0, p.channels()};
  f.key = {p.k.data(), 0, p.channels()};
  f.value = {p.v.data(), 0, p.channels()};
  scalar::Numbers out(p.tokens() * p.channels());
  f.out = {out.data(), 0, p.channels()};
  flatten::cpu::kernels().attention_forward(f, {threads, run_backwards});
  return out;
}

}  // namespace

int main() {
  const scalar::Problem p = scalar::Problem::make();
  const scalar::Numbers expected = p.solve();
  for (int threads : {1, 3}) {
    const double error = scalar::relative_error(run(p, threads).data(), expected);
    std::printf("%s kernels, %d threads: relative error %.2g\n", flatten::cpu::isa_in_use().c_str(), threads,
                error);
    if (!(error < 1e-12)) return 1;
  }
  return 0;
}

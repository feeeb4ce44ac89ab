// Ordered sums of what thread blocks left behind: the same bits every time, whatever the timing.
#pragma once

#include "tiles.cuh"

namespace flatten::cuda::general {

/// out[pair][i] = scale * (partials[pair][0][i] + partials[pair][1][i] + ...), kThreads elements a block.
template <class A>
struct PartialSums {
  A* out;
  const A* partials;
  std::int64_t elements;
  int chunks;
  A scale;

  __host__ __device__ std::int64_t blocks_per_pair() const { return (elements + kThreads - 1) / kThreads; }

  __device__ void run(std::int64_t block) const {
    const std::int64_t pair = block / blocks_per_pair();
    const std::int64_t i = block % blocks_per_pair() * kThreads + threadIdx.x;
    if (i >= elements) return;
    const A* from = partials + pair * chunks * elements + i;
    A total = 0;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) total += from[chunk * elements];
    out[pair * elements + i] = total * scale;
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads) sum_partials(const __grid_constant__ PartialSums<A> sums) {
  sums.run(blockIdx.x);
}

}  // namespace flatten::cuda::general

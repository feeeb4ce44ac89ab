// The kernels' costs (schedule.h): of heads of 16 and 32 channels, then of 64. `registers` is what launch
// bounds of 384 and of 256 threads leave to a thread; a multiprocessor then holds twelve warps, or eight.
#pragma once

#include "schedule.h"

namespace flatten::cuda::tensorcore {

inline constexpr KernelCost kStateCosts[] = {{168, 6000, 1800, 220}, {255, 8000, 3500, 400}};
inline constexpr KernelCost kOutputCosts[] = {{168, 8000, 4200, 540}, {255, 20000, 9300, 1050}};
inline constexpr KernelCost kWideOutputCosts[] = {{255, 9000, 6000, 800},
                                                  {255, 25000, 14000, 1600}};  // 7 x 7
inline constexpr KernelCost kQueryCosts[] = {{255, 7000, 4000, 640}, {255, 12000, 5000, 800}};
inline constexpr KernelCost kKeyCosts[] = {{255, 9000, 8500, 1500}, {255, 18000, 15000, 2000}};

inline const KernelCost& of_head_dim(const KernelCost (&costs)[2], std::int64_t head_dim) {
  return costs[head_dim > 32];
}

}  // namespace flatten::cuda::tensorcore

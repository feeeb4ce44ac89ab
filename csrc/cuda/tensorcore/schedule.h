// How long a launch takes, roughly: by this the ways to cut a call into blocks are compared.
//
// A block's step takes `latency` cycles where few warps share its multiprocessor, and `work` cycles for each
// of them where many do. How many blocks share one follows from registers and shared memory. The kernels'
// numbers were fitted to the predictions of a model of a multiprocessor (benchmarks/cuda_predict.py), for an
// H100.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../choose.h"

namespace flatten::cuda::tensorcore {

/// What one kernel takes, in cycles.
struct KernelCost {
  int registers;  // of a thread, at most
  int start;      // of a block, besides its steps
  int latency;    // of a step
  int work;       // of one warp's step
};

/// One launch: `blocks` alike.
struct LaunchShape {
  int threads, shared_bytes;  // of a block
  std::int64_t blocks;
  int steps;            // of a block
  double filled = 1.0;  // the part of the warps that has work
};

/// Blocks of a kernel that one multiprocessor holds at once; 0 where its shared memory is too small for one.
inline std::int64_t resident_blocks(const KernelCost& cost, const LaunchShape& shape, const Device& device) {
  constexpr int kRegisters = 65536, kRegistersOfWarp = 256;  // handed out in such pieces,
  constexpr int kSharedOfBlock = 1024,
                kSharedPiece = 128;  // and a block's shared memory with so much besides
  if (shape.shared_bytes > device.shared_bytes) return 0;
  const int warps = shape.threads / 32;
  const int of_warp = (cost.registers * 32 + kRegistersOfWarp - 1) / kRegistersOfWarp * kRegistersOfWarp;
  const std::int64_t by_registers =
      kRegisters / of_warp / 4 * 4 / warps;  // each of four parts has a quarter of them
  const int of_block = (shape.shared_bytes + kSharedPiece - 1) / kSharedPiece * kSharedPiece + kSharedOfBlock;
  return std::max<std::int64_t>(1, std::min(by_registers, (device.shared_bytes + kSharedOfBlock) / of_block));
}

/// Cycles from a launch's first block to the end of its last; infinite if none fits.
inline double cycles(const KernelCost& cost, const LaunchShape& shape, const Device& device) {
  const std::int64_t resident = resident_blocks(cost, shape, device);
  if (resident == 0) return INFINITY;
  // The multiprocessor with the most blocks works on as many at once as fit, then on what is left.
  const std::int64_t blocks = (shape.blocks + device.multiprocessors - 1) / device.multiprocessors;
  const auto round = [&](std::int64_t at_once) {
    if (at_once == 0) return 0.0;
    const double work = static_cast<double>(at_once) * shape.threads / 32 * shape.filled * cost.work;
    // Neither is reached while the other is near: their fourth powers add up.
    const double latency = cost.latency, squares[2] = {work * work, latency * latency};
    return cost.start + shape.steps * std::sqrt(std::hypot(squares[0], squares[1]));
  };
  return static_cast<double>(blocks / resident) * round(resident) + round(blocks % resident);
}

/// Calls use(parts, steps of a part) for each way to cut `steps` steps into equal parts, from the fewest
/// parts on, up to `most` of them.
template <class Use>
void for_each_cut(int steps, std::int64_t most, Use use) {
  for (int parts = 1; parts <= std::min<std::int64_t>(most, steps);) {
    const int each = (steps + parts - 1) / parts;
    use((steps + each - 1) / each, each);
    parts = each > 1 ? (steps + each - 2) / (each - 1) : steps + 1;  // the fewest that are shorter
  }
}

}  // namespace flatten::cuda::tensorcore

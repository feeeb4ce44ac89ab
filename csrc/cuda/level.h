// The most that a call on CUDA may use: FLATTEN_CUDA=tensorcore|general|reference when the process starts,
// and flatten_ext.cuda_kernels later. The way out where some kernels are wrong on a GPU.
#pragma once

#include "../export.h"

namespace flatten::cuda {

/// Each contains those before it.
enum class Level {
  kReference,   // plain torch
  kGeneral,     // the general kernels too
  kTensorCore,  // everything
};

/// The level in force, for all threads. Throws where FLATTEN_CUDA names none.
Level level();

/// What goes on without kernels that failed: "FLATTEN_CUDA=general".
const char* variable_against(const char* kernels);

}  // namespace flatten::cuda

/// Sets the level if it is not negative. Returns the one before, or -1 where FLATTEN_CUDA names none.
extern "C" FLATTEN_API int flatten_cuda_level(int level);

// The launches of these kernels for one element type and padded head dimension: what a unit (units.txt) gives
// to the host code.
#pragma once

#include "../../enqueue.cuh"
#include "accumulate.cuh"
#include "correlate.cuh"
#include "differentiate.cuh"
#include "measure_rows.cuh"
#include "multiply.cuh"

namespace flatten::cuda::tensorcore::heads {

/// Threads for `rows` rows, of a block whose warps take `at_once` each: as many rounds for all warps.
inline int threads_for(int rows, int at_once) {
  const int tiles = (rows + at_once - 1) / at_once, rounds = (tiles + kMostWarps - 1) / kMostWarps;
  return (tiles + rounds - 1) / rounds * 32;
}

template <typename T, int kHeadDim>
struct Launches {
  static constexpr int kSlices = kHeadDim / kSliceChannels;

  static cudaError_t measure(const MeasureParams& params, cudaStream_t stream) {
    const Features& features = params.sides[0];
    const std::int64_t rows = params.rows[0] + params.rows[1],
                       rows_of_one = kMeasureThreads / kRowLanes * kMeasureRows;
    const auto blocks = static_cast<unsigned>((rows + rows_of_one - 1) / rows_of_one);
    return enqueue<measure_rows<T>>(blocks, kMeasureThreads, features.heads * features.head_dim * 4, params,
                                    stream);
  }

  static cudaError_t accumulate(const AccumulateParams& params, int windows, cudaStream_t stream) {
    return enqueue<heads::accumulate<T, kSlices>>(dim3(windows * params.chunks, params.features.heads),
                                                  AccumulateTraits<kSlices>::kThreads,
                                                  AccumulateTraits<kSlices>::kShared, params, stream);
  }

  static int multiply_threads(const MultiplyParams& p) {
    return threads_for(p.kernel_h ? p.region_h * p.region_w + p.features.rows.prefix : p.region_tokens,
                       kTileRows);
  }
  static int multiply_shared(const MultiplyParams& params) {
    return MultiplyLayout<kSlices>(params, multiply_threads(params) / 32).bytes;
  }
  static cudaError_t multiply(const MultiplyParams& params, int windows, cudaStream_t stream) {
    return enqueue<heads::multiply<T, kSlices>>(dim3(windows * params.regions, params.features.heads),
                                                multiply_threads(params), multiply_shared(params), params,
                                                stream);
  }

  static cudaError_t differentiate(const DifferentiateParams& params, int windows, cudaStream_t stream) {
    return enqueue<heads::differentiate<T, kSlices>>(dim3(windows * params.chunks, params.features.heads),
                                                     threads_for(params.chunk, kTileRows),
                                                     DifferentiateTraits<kSlices>::kShared, params, stream);
  }

  static int correlate_shared(const CorrelateParams& params) {
    return CorrelateLayout<kSlices>(params).bytes;
  }
  static cudaError_t correlate(const CorrelateParams& params, cudaStream_t stream) {
    const int rounds = (params.kernel_h * params.kernel_w + 2 * kRoundPairs - 1) / (2 * kRoundPairs);
    return enqueue<heads::correlate<T, kSlices>>(dim3(params.blocks, params.heads, rounds), kSlices * 128,
                                                 correlate_shared(params), params, stream);
  }

  static constexpr Kernels kKernels = {measure,       accumulate,       multiply_shared, multiply,
                                       differentiate, correlate_shared, correlate};
};

}  // namespace flatten::cuda::tensorcore::heads

// The gradients of the taps: one block to a (share of the regions, head, round of 26 taps), a warp to eight
// channels.
//
// dW of a tap and channel is the sum over pixels of v at the tap times grad_out. An mma m16n8k16 takes two
// taps and 16 pixels: A is v at both shifts, transposed, B is grad_out, both of the same eight channels; the
// diagonals of the two 8x8 blocks of the product are wanted.
#pragma once

#include "pixels.cuh"

namespace flatten::cuda::tensorcore::heads {

template <int kSlices>
struct CorrelateLayout {
  static constexpr int kPitch = kSlices * 64 + 16;  // of a row of grad_out
  int pixels, bytes;
  __host__ __device__ CorrelateLayout(const CorrelateParams& p) {
    pixels = (p.region_h * p.region_w + 15) / 16 * 16 * kPitch;
    bytes = pixels + PixelBlock<kSlices>::bytes(p.region_h, p.region_w, p.kernel_h, p.kernel_w);
  }
};

template <typename T, int kSlices>
__global__ void __launch_bounds__(kSlices * 128) correlate(const __grid_constant__ CorrelateParams params) {
  using Layout = CorrelateLayout<kSlices>;
  constexpr int kPitch = Layout::kPitch, kVectors = kSlices * 4;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const Layout layout(params);
  const int warp = threadIdx.x / 32, head = blockIdx.y, head_dim = params.head_dim;
  const int first_channel = head * head_dim, first_pair = blockIdx.z * kRoundPairs;
  const PixelBlock<kSlices> pixels{shared_address(shared) + layout.pixels,
                                   params.region_w + params.kernel_w - 1};
  // Lane's part of ldmatrix: matrices 0 and 1 are eight pixels at the two taps, 2 and 3 the next eight.
  const int quarter = lane.index / 8;
  int shift[kRoundPairs];
#pragma unroll
  for (int i = 0; i < kRoundPairs; ++i) {
    shift[i] = tap_offset<kSlices>(2 * (first_pair + i) + quarter % 2, params.kernel_h, params.kernel_w,
                                   pixels.row_pixels);
  }
  float sum[kRoundPairs][4] = {}, bias[4] = {};
  const uint32_t one = Pair<T>::pack(1.0f, 1.0f);
  const uint32_t gradients = shared_address(shared) + warp * 16;

  const int regions = params.regions * params.windows;
#pragma unroll 1
  for (int i = blockIdx.x; i < regions; i += params.blocks) {
    const int index = i / params.regions;
    const Window window(params.rows.grid, index);
    const Region region = rectangle(params, params.rows, i - index * params.regions, false);
    const int count = region.count(), padded_count = (count + 15) / 16 * 16;
    __syncthreads();  // the region before is no longer needed
    const int vector = threadIdx.x % kVectors;
    for (int item = threadIdx.x / kVectors; item < padded_count; item += blockDim.x / kVectors) {
      const bool inside = item < count && vector * 8 < head_dim;
      const int token = region.at(params.rows, window, min(item, count - 1)).token;
      copy_async_or_zeros<0>(
          shared_address(shared) + item * kPitch + vector * 16,
          row_of(params.grad_out, window.image, token, inside ? first_channel + vector * 8 : 0),
          inside ? 16 : 0);
    }
    pixels.load(params.pixels, params.rows, window, region, params.kernel_h, params.kernel_w, first_channel,
                head_dim);
    copy_async_wait<0>();
    __syncthreads();
    if (warp * 8 >= head_dim) continue;
#pragma unroll 1
    for (int item = 0; item < padded_count; item += 16) {
      uint32_t g[2];
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(g[0]), "=r"(g[1])
                   : "r"(gradients + (item + lane.index % 16) * kPitch)
                   : "memory");
      const uint32_t from = pixels.first_tap(region, item + lane.index % 8 + quarter / 2 * 8) + warp * 16;
#pragma unroll
      for (int pair = 0; pair < kRoundPairs; ++pair) {
        uint32_t v[4];
        load_matrix_x4_transposed<0>(v, from + shift[pair]);
        mma<T>(sum[pair], v[0], v[1], v[2], v[3], g[0], g[1], sum[pair]);
      }
      mma<T>(bias, one, one, one, one, g[0], g[1], bias);
    }
  }
  if (warp * 8 >= head_dim) return;

  // ---- Lane (g, t) has the diagonal's number of channel g where g / 2 is t.
  if (lane.g / 2 != lane.t) return;
  const int taps = params.kernel_h * params.kernel_w, c = warp * 8 + lane.g;
  const int64_t kernels = params.per_channel ? static_cast<int64_t>(params.heads) * head_dim : head_dim;
  const int64_t row = params.per_channel ? blockIdx.x : blockIdx.x * gridDim.y + blockIdx.y;
  float* to = params.partials + row * (taps + 1) * kernels + (params.per_channel ? first_channel : 0) + c;
#pragma unroll
  for (int pair = 0; pair < kRoundPairs; ++pair) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tap = 2 * (first_pair + pair) + half;
      const float total = lane.g % 2 ? sum[pair][2 * half + 1] : sum[pair][2 * half];
      if (tap < taps) to[tap * kernels] = total;
    }
  }
  if (blockIdx.z == 0) to[taps * kernels] = lane.g % 2 ? bias[1] : bias[0];
}

}  // namespace flatten::cuda::tensorcore::heads

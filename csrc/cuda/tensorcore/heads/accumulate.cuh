// S and m of a head, or their gradients: one block to a (chunk of rows, head, window).
//
// Every step brings 64 rows of the features and of the other tensor to shared memory: the features as z^p
// times the row's factor. A warp has 16 channels of the features (in heads of 32 two warps have the same, and
// half of the rows each) by all channels of the other tensor:
//   S  = sum of phi(k) v^T              m  = sum of phi(k)
//   dS = sum of w (g / den)^T           dm = -sum of w (g . o) / den, with w = z^p and the denominator of w
// The factor of a row (phi's; or 1 / den) goes to the features, so that the other operand is exact.
#pragma once

#include "rows.cuh"

namespace flatten::cuda::tensorcore::heads {

template <int kSlices>
struct AccumulateTraits {
  static constexpr int kWidth = kSlices * kSliceChannels, kVectors = kWidth / 8, kBlocks = kWidth / 8;
  static constexpr int kPitch = kWidth * 2 + 16;  // of a row: an odd number of 16-byte vectors
  static constexpr int kTile = kStateTokens * kPitch;
  static constexpr int kThreads = kSlices == 4 ? 256 : 128;
  static constexpr int kParts = kSlices == 1 ? 2 : 1;  // of a step's rows
  static constexpr int kStep = kThreads / kVectors;    // rows that the block's threads load at once
  static constexpr int kLoads = kStateTokens / kStep;
  // A tile of features and two of the other tensor; of each row what multiplies its features in the sum of
  // means; a number to agree on.
  static constexpr int kShared = 3 * kTile + kStateTokens * 4 + 16 + kWidth * 4;
};

template <typename T, int kSlices>
__global__ void __launch_bounds__(AccumulateTraits<kSlices>::kThreads, kSlices == 4 ? 1 : 4)
    accumulate(const __grid_constant__ AccumulateParams params) {
  using Traits = AccumulateTraits<kSlices>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const Features& features = params.features;
  const int warp = threadIdx.x / 32, head = blockIdx.y, head_dim = features.head_dim;
  const int index = blockIdx.x / params.chunks, chunk = blockIdx.x - index * params.chunks;
  const Window window(features.rows.grid, index);
  const int first_channel = head * head_dim;
  const int begin = chunk * params.chunk, end = min(begin + params.chunk, features.rows.tokens);
  const int64_t first_row = static_cast<int64_t>(index) * features.rows.tokens;
  float* means = reinterpret_cast<float*>(shared + 3 * Traits::kTile);
  unsigned* most = reinterpret_cast<unsigned*>(means + kStateTokens);
  float* inverse_scale = reinterpret_cast<float*>(most + 4);
  load_inverse_scale<T, kSlices>(inverse_scale, features, head);

  const auto terms_of = [&](int local) { return params.terms[(first_row + local) * features.heads + head]; };
  // fp16: the factors of the chunk's rows, and what goes to the means, in the range of fp16.
  float row_room = 1.0f, mean_room = 1.0f;
  if constexpr (kNarrow<T>) {
    float factor = 0.0f, mean = 0.0f;
    for (int local = begin + threadIdx.x; local < end; local += Traits::kThreads) {
      if (params.terms) {
        const float2 terms = terms_of(local);
        factor = fmaxf(factor, fabsf(terms.x)), mean = fmaxf(mean, fabsf(terms.y));
      } else {
        factor = fmaxf(factor, fabsf(features.norms[first_row + local].y));
      }
    }
    // Features times factor then reach 2^13 to 2^15.
    row_room = fit(block_largest(factor, most));
    if (params.terms) mean_room = fit(block_largest(mean, most));
  }
  __syncthreads();

  // ---- The thread's vectors of a step: channels 8 (thread % kVectors), rows thread / kVectors and on.
  const int vector = threadIdx.x % Traits::kVectors, row = threadIdx.x / Traits::kVectors;
  const bool has_channels = 8 * vector < head_dim;
  float inverse[8];
  load8(inverse, inverse_scale + 8 * vector);
  uint4 x[Traits::kLoads];
  float prescale[Traits::kLoads], factor[Traits::kLoads], mean[Traits::kLoads];
  const uint32_t own = shared_address(shared) + row * Traits::kPitch + vector * 16;
  // The other tensor goes straight to the tile of the step.
  const auto load = [&](int first, int tile) {
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      const int local = first + row + i * Traits::kStep, clamped = min(local, end - 1);
      const int token = row_spot(features.rows, window, clamped).token;
      const bool inside = local < end && has_channels;
      const int channel = has_channels ? first_channel + 8 * vector : 0;
      copy_async_or_zeros<0>(own + tile * Traits::kTile + i * Traits::kStep * Traits::kPitch,
                             row_of(params.other, window.image, token, channel), inside ? 16 : 0);
      x[i] = inside ? load16(row_of(features.x, window.image, token, channel)) : uint4{};
      const RowNorms norms = features.norms[first_row + clamped];
      prescale[i] = norms.x;
      if (params.terms) {
        const float2 terms = terms_of(clamped);
        factor[i] = inside ? terms.x * row_room : 0.0f, mean[i] = -terms.y * mean_room;
      } else {
        factor[i] = inside ? norms.y * row_room : 0.0f, mean[i] = 1.0f;
      }
      if (local >= end) mean[i] = 0.0f;
    }
    copy_async_commit();
  };

  float s[Traits::kBlocks][4] = {}, m[4] = {};
  const int row_tile = Traits::kParts > 1 ? warp % 2 : warp, part = Traits::kParts > 1 ? warp / 2 : 0;
  constexpr int kPartRows = kStateTokens / Traits::kParts;
  const int quarter = lane.index / 8;
  // For ldmatrix: A's rows are channels, its columns tokens; B's rows are tokens.
  const uint32_t a_address = shared_address(shared) +
                             (part * kPartRows + lane.index % 8 + quarter / 2 * 8) * Traits::kPitch +
                             (row_tile * 16 + quarter % 2 * 8) * 2;
  uint32_t b_address = shared_address(shared) + Traits::kTile +
                       (part * kPartRows + lane.index % 8 + quarter % 2 * 8) * Traits::kPitch +
                       quarter / 2 * 16;
  const float* mean_rows = means + part * kPartRows + 2 * lane.t;

  load(begin, 1);
  int tile = 1;
#pragma unroll 1
  for (int first = begin; first < end; first += kStateTokens) {
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      float y[8];
      unpack8<T>(y, x[i]);
      const int token = row + i * Traits::kStep;
      if (has_channels) {
        heads::add_bias<T>(y, features, min(first + token, end - 1), first_channel + 8 * vector);
      }
      scale8(y, features.focus, inverse, prescale[i]);
      raise8(y, features.focus);
      const bool used = factor[i] != 0.0f;  // rows past the end hold nothing, not even NaN
      *reinterpret_cast<uint4*>(shared + token * Traits::kPitch + vector * 16) =
          used ? pack8<T>(y, factor[i]) : uint4{};
      if (vector == 0) means[token] = mean[i];
    }
    copy_async_wait<0>();
    __syncthreads();
    if (first + kStateTokens < end) load(first + kStateTokens, 3 - tile);
    unrolled<kPartRows / 16>([&](auto step) {
      constexpr int kOffset = step * 16 * Traits::kPitch;
      uint32_t a[4];
      load_matrix_x4_transposed<kOffset>(a, a_address);
      const auto product = [&](float (&sum)[4], uint32_t b0, uint32_t b1) {
        mma<T>(sum, a[0], a[1], a[2], a[3], b0, b1, sum);
      };
      // The means' numbers as the sum of two rounded ones: even columns have one, odd ones the other.
      uint32_t b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v = *reinterpret_cast<const float2*>(mean_rows + step * 16 + half * 8);
        const uint32_t upper = Pair<T>::pack(v.x, v.y);
        const float2 cut = Pair<T>::unpack(upper);
        b[half] = lane.g % 2 ? Pair<T>::pack(v.x - cut.x, v.y - cut.y) : upper;
      }
      product(m, b[0], b[1]);
      unrolled<Traits::kBlocks / 2>([&](auto pair) {
        uint32_t v[4];
        load_matrix_x4_transposed<kOffset + pair * 32>(v, b_address);
        product(s[2 * pair], v[0], v[1]);
        product(s[2 * pair + 1], v[2], v[3]);
      });
    });
    __syncthreads();
    b_address += (3 - 2 * tile) * Traits::kTile;  // the other one of the two
    tile = 3 - tile;
  }

  if constexpr (Traits::kParts > 1) {  // the second half of the rows, through the tiles' memory
    float* sums = reinterpret_cast<float*>(shared) + (row_tile * (Traits::kBlocks + 1)) * 128 + lane.index;
    if (part == 1) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int b = 0; b < Traits::kBlocks; ++b) sums[(b * 4 + e) * 32] = s[b][e];
        sums[(Traits::kBlocks * 4 + e) * 32] = m[e];
      }
    }
    __syncthreads();
    if (part == 1) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) s[b][e] += sums[(b * 4 + e) * 32];
      m[e] += sums[(Traits::kBlocks * 4 + e) * 32];
    }
  }

  const int64_t channels = static_cast<int64_t>(features.heads) * head_dim;
  float* state = params.partial + static_cast<int64_t>(blockIdx.x) * channels * (head_dim + 1);
  const float scale = params.scale / row_room, mean_scale = scale / mean_room;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = row_tile * 16 + half * 8 + lane.g;
    if (c >= head_dim) continue;
    float* to = state + static_cast<int64_t>(first_channel + c) * head_dim;
#pragma unroll
    for (int b = 0; b < Traits::kBlocks; ++b) {
      if (b * 8 >= head_dim) continue;
      *reinterpret_cast<float2*>(to + b * 8 + 2 * lane.t) =
          make_float2(s[b][2 * half] * scale, s[b][2 * half + 1] * scale);
    }
    if (lane.t == 0) {
      state[channels * head_dim + first_channel + c] = (m[2 * half] + m[2 * half + 1]) * mean_scale;
    }
  }
}

}  // namespace flatten::cuda::tensorcore::heads

// out = Q S / (Q . m + eps) + taps over V: one block to a (strip of columns, run of rows, window).
//
// A warp owns 8 x 4 pixels of a step and one head (head_dim 16: a pair of heads, S block-diagonal). The block
// walks down its strip four rows a step, over a ring of rows of V in shared memory that cp.async keeps one
// step ahead; a row is read once per strip, plus its halo.
//   Q: brought a step ahead, mapped (features.cuh), A fragments as it is; the norm factor only scales eps.
//   S: B fragments in shared memory, rows in the channel order of the fragments of Q.
//   taps: tap_product.cuh, on top of the normalised product
//   out: turned in shared memory, 16 channels at a time, so that two lanes write 32 adjacent bytes, a sector
#pragma once

#include "features.cuh"
#include "range.cuh"
#include "row_loader.cuh"
#include "tap_product.cuh"
#include "windows.cuh"

namespace flatten::cuda::tensorcore {

template <typename T, int kHeadDim, int kTaps>
struct OutputTraits {
  static constexpr int kSlices = kHeadDim <= 32 ? 1 : kHeadDim / 32;
  static constexpr int kWarpChannels = kSlices * kSliceChannels;
  static constexpr int kHeads = kHeadDim == 16 ? 2 : 1;  // of a warp
  static constexpr int kBlocks = kWarpChannels / 8;      // n-blocks of its output

  // B fragments of one warp's channels: S, then m (columns of its upper and lower half) per head.
  static constexpr int kStateFragments = (kBlocks + kHeads) * kSlices;
  static constexpr __host__ __device__ int state_bytes(int channels) {
    return channels / kWarpChannels * kStateFragments * 512;
  }

  static constexpr __host__ __device__ int tap_rows(int channels, bool per_channel) {
    return per_channel ? channels : kWarpChannels;
  }
  static constexpr __host__ __device__ int taps_bytes(int channels, bool per_channel) {
    return TapTable<kTaps>::bytes(tap_rows(channels, per_channel));
  }

  // The ring of V in blocks of four pixel rows: what a step reads, and one block in flight. A pixel is an odd
  // number of 16-byte vectors: eight of them in a row lie in different banks.
  static constexpr int kHalo = kTaps / 2;
  static constexpr int kReadBlocks = (kStepRows + 2 * kHalo + kStepRows - 1) / kStepRows;
  static constexpr int kRingBlocks = kReadBlocks + 1;
  static constexpr __host__ __device__ int pitch(int patches) { return patches * kPatchColumns + 2 * kHalo; }
  static constexpr __host__ __device__ int pixel_bytes(int channels) { return channels * 2 + 16; }
  static constexpr __host__ __device__ int ring_bytes(int channels, int patches) {
    return kTaps ? kRingBlocks * kStepRows * pitch(patches) * pixel_bytes(channels) : 0;
  }

  static constexpr int kQueryBytes = kSlices * kTileBytes;  // of a warp
  static constexpr int kStagingBytes = kTileTokens * 32;    // of a warp: 16 channels of out
  static constexpr __host__ __device__ int query_bytes(int channels, int patches) {
    return channels / kWarpChannels * patches * kQueryBytes;
  }
  static constexpr __host__ __device__ int exchange_bytes(int channels, int patches) {
    return SliceGroup::shared_bytes(patches, channels / kWarpChannels);
  }
  static int shared_bytes(int channels, int patches, bool per_channel) {
    return state_bytes(channels) + taps_bytes(channels, per_channel) + ScaleTable::bytes(channels) +
           exchange_bytes(channels, patches) + query_bytes(channels, patches) +
           channels / kWarpChannels * patches * kStagingBytes + ring_bytes(channels, patches);
  }
};

/// The factor of a warp's S and m before they are rounded.
template <typename T, int kChannels, int kHeadDim>
__device__ __forceinline__ float scale_of_state(const float* s, const float* m, int lane) {
  if constexpr (!kNarrow<T>) return 1.0f;
  float largest = 0.0f;
  for (int i = lane; i < kChannels * kHeadDim; i += 32) largest = fmaxf(largest, fabsf(s[i]));
  for (int i = lane; i < kChannels; i += 32) largest = fmaxf(largest, fabsf(m[i]));
  return scale_for_rounding<T>(largest);
}

/// Packs a warp's S and m, times `scale`, into B fragments; a lane's own vectors lie 32 vectors apart. Word w
/// of lane (g, t) holds rows 8t + 2w and 8t + 2w + 1 of column g. The warps of the same channels, `part` of
/// `parts`, share the work.
template <typename T, int kHeadDim, int kTaps>
__device__ __forceinline__ void pack_state(uint4* fragments, const float* s, const float* m, float scale,
                                           const Lane& lane, int part, int parts) {
  using Traits = OutputTraits<T, kHeadDim, kTaps>;
  const auto pack = [&](const float (&v)[8]) {
    return make_uint4(Pair<T>::pack(v[0] * scale, v[1] * scale), Pair<T>::pack(v[2] * scale, v[3] * scale),
                      Pair<T>::pack(v[4] * scale, v[5] * scale), Pair<T>::pack(v[6] * scale, v[7] * scale));
  };
#pragma unroll
  for (int slice = 0; slice < Traits::kSlices; ++slice) {
    const int row = slice * kSliceChannels + 8 * lane.t;
    const float* from = s + row * kHeadDim + lane.g;
#pragma unroll 4
    for (int b = part; b < Traits::kBlocks; b += parts) {
      float v[8] = {};
      if (kHeadDim > 16 || lane.t / 2 == b / 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = from[i * kHeadDim + b * 8 % kHeadDim];
      }
      fragments[(b * Traits::kSlices + slice) * 32] = pack(v);
    }
    if (part != 0) continue;
    float means[8], split[8];
    load8(means, m + row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float upper = Pair<T>::unpack(Pair<T>::pack(means[i] * scale, 0.0f)).x / scale;
      split[i] = lane.g % 2 ? means[i] - upper : upper;
    }
#pragma unroll
    for (int head = 0; head < Traits::kHeads; ++head) {
      const bool own = kHeadDim > 16 || lane.t / 2 == head;
      fragments[((Traits::kBlocks + head) * Traits::kSlices + slice) * 32] = own ? pack(split) : uint4{};
    }
  }
}

/// Turns 16 channels of out from fragments into vectors, through a warp's own shared memory: 32 tokens of 32
/// bytes, whose two vectors change places every four tokens, so that no access meets a bank twice.
struct Staging {
  uint32_t write[2],
      read;  // addresses of the lane's word in each n-block, and of its vector of token lane / 2

  __device__ __forceinline__ Staging(uint32_t shared, const Lane& lane) {
    write[0] = shared + lane.g * 32 + lane.g / 4 * 16 + lane.t * 4;
    write[1] = write[0] ^ 16;
    const int token = lane.index / 2;
    read = shared + token * 32 + (lane.index % 2 ^ token % 8 / 4) * 16;
    keep(write[0]), keep(write[1]), keep(read);
  }
  /// Puts the lane's word of token g + 8 kRow and n-block kHalf.
  template <int kHalf, int kRow>
  __device__ __forceinline__ void put(uint32_t word) const {
    store_shared<kRow * 256>(write[kHalf], word);
  }
  /// Takes vector lane % 2 of the tokens lane / 2 and lane / 2 + 16.
  __device__ __forceinline__ void take(uint32_t (&x)[2][4]) const {
    __syncwarp();
    load_shared<0>(x[0], read);
    load_shared<512>(x[1], read);
    __syncwarp();
  }
};

/// Turns `normalizer` into 1 / (Q . m + eps) of each head. Before the call its row 0 holds eps in the units
/// of Q. times_state(d, Constant<b>) computes d = Q times n-block b of the fragments; those of m start at
/// kFirst.
template <int kFirst, int kHeads, typename TimesState>
__device__ __forceinline__ void invert_denominators(float (&normalizer)[kHeads][4],
                                                    const TimesState& times_state) {
  unrolled<kHeads>([&](auto h) {
    constexpr int head =
        kHeads - 1 - h;  // head 0 comes last, because all heads start from the eps in its `normalizer`
    float d[2][4];
    times_state(d, Constant<kFirst + head>{});
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      normalizer[head][r] =
          __fdividef(1.0f, d[r / 2][r % 2 * 2] + d[r / 2][r % 2 * 2 + 1] + normalizer[0][r]);
    }
  });
}

/// Computes and writes n-blocks 2 kPair and 2 kPair + 1, 16 channels: Q S normalised, the bias at `biases`
/// and the taps over `pixels` at `weights`, which moves on by `step` for each. to, limit: as store_below.
template <typename T, int kPair, int kTaps, typename TimesState>
__device__ __forceinline__ void write_pair(const TimesState& times_state, const float (&normalizer)[4],
                                           const PixelRows<kTaps>& pixels, uint32_t& weights, int step,
                                           uint32_t biases, const Staging& turn, int limit,
                                           char* const (&to)[2]) {
  unrolled<2>([&](auto half) {
    constexpr int b = 2 * kPair + half;
    float o[2][4], start[2] = {};
    times_state(o, Constant<b>{});
    if constexpr (kTaps > 0) load_shared_pair<b * 32>(start, biases);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      o[r / 2][r % 2 * 2] = fmaf(o[r / 2][r % 2 * 2], normalizer[r], start[0]);
      o[r / 2][r % 2 * 2 + 1] = fmaf(o[r / 2][r % 2 * 2 + 1], normalizer[r], start[1]);
    }
    if constexpr (kTaps > 0) {
      convolve<T, kTaps, b * 16>(o, pixels, weights);
      weights += step;
    }
    unrolled<4>(
        [&](auto r) { turn.put<half, r>(Pair<T>::pack(o[r / 2][r % 2 * 2], o[r / 2][r % 2 * 2 + 1])); });
  });
  uint32_t vector[2][4];
  turn.take(vector);
  store_below<0, kPair * 32>(limit, to[0], vector[0]);
  store_below<2, kPair * 32>(limit, to[1], vector[1]);
}

template <typename T, int kHeadDim, int kTaps, int kMode>
__global__ void __launch_bounds__(max_threads(kHeadDim, kTaps), 1)
    forward_output(const __grid_constant__ OutputParams params) {
  using Traits = OutputTraits<T, kHeadDim, kTaps>;
  constexpr int kSlices = Traits::kSlices, kBlocks = Traits::kBlocks;
  extern __shared__ __align__(128) unsigned char shared[];
  const Lane lane;
  const int channels = params.channels, warps = channels / Traits::kWarpChannels;
  const int warp = threadIdx.x / 32 % warps, patch = threadIdx.x / 32 / warps;
  const int warp_channel = warp * Traits::kWarpChannels;
  const WindowGrid& grid = params.grid;
  const Window window(grid, blockIdx.z);
  const int x0 = blockIdx.x * params.patches * kPatchColumns, y0 = blockIdx.y * params.rows;
  int y_end = min(y0 + params.rows, grid.window_h);
  keep(y_end);

  // Shared memory: taps, fragments of S and m, the scale, exchange, the warps' tiles of Q and staging, ring
  // of V.
  unsigned char* taps = shared;
  unsigned char* fragments = taps + Traits::taps_bytes(channels, params.per_channel);
  const ScaleTable table{fragments + Traits::state_bytes(channels), channels};
  unsigned char* exchange = table.data + ScaleTable::bytes(channels);
  unsigned char* tiles = exchange + Traits::exchange_bytes(channels, params.patches);
  unsigned char* staging = tiles + Traits::query_bytes(channels, params.patches);
  const uint32_t ring = shared_address(staging + warps * params.patches * Traits::kStagingBytes);
  fragments += (warp * Traits::kStateFragments * 32 + lane.index) * 16;

  RowLoader<Traits> values(params.value, grid, window, channels, params.patches, ring, x0, y_end,
                           warp_channel, patch, lane);
  if constexpr (kTaps > 0) {
    for (int i = 0; i < Traits::kReadBlocks; ++i) values.load_block(y0 - Traits::kHalo + i * kStepRows, i);
  }

  // ---- Q and out: pixels in column n % 8 of the patch, row n / 8 of the step; a lane brings and writes
  // those of n = lane / 2 (TileCopy) and n + 16.
  const int n = TileCopy::token(), x = x0 + patch * kPatchColumns + n % 8;
  const bool patch_inside = x0 + patch * kPatchColumns < grid.window_w;
  const auto base = [&](const TokenArray& tokens) {
    return static_cast<const char*>(tokens.data) + window.image * tokens.image + warp_channel * 2 +
           TileCopy::byte();
  };
  const char *query = base(params.query), *out = base(params.out);
  uint32_t tile = shared_address(tiles) + threadIdx.x / 32 * Traits::kQueryBytes;
  const TileCopy copy(tile);
  tile += tile_offset(lane.g, lane.t);
  const Staging turn(shared_address(staging) + threadIdx.x / 32 * Traits::kStagingBytes, lane);
  int column = window.column(grid, min(x, grid.window_w - 1)), last_row = window.y + grid.window_h - 1;
  int query_bytes = params.query.token, out_bytes = params.out.token, last_token = params.tokens - 1;
  keep(query), keep(out), keep(tile), keep(column), keep(last_row);
  keep(query_bytes), keep(out_bytes), keep(last_token);
  int token[2];
  const auto load_queries = [&](int y) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(window.y + y + n / 8 + 2 * i, last_row);
      token[i] = min(window.on_map(grid, row) * grid.map_w + column, last_token);
    }
    const char* const from[2] = {advance(query, token[0], query_bytes),
                                 advance(query, token[1], query_bytes)};
    copy.operator()<kSlices>(from);
    copy_async_commit();
  };
  load_queries(y0);
  // The lane's rows of out are those below: of its first row, up to y_stop. A raster of tokens may end
  // inside its last row.
  int y_stop = x < grid.window_w ? y_end : y0;
  if (grid.raster) y_stop = min(y_stop, (params.tokens - x + grid.map_w - 1) / grid.map_w);
  y_stop -= n / 8;
  keep(y_stop);

  table.load<T>(params.focus);
  const int tap_rows = Traits::tap_rows(channels, params.per_channel);
  const int tap_channel = params.per_channel ? warp_channel : 0;
  if constexpr (kTaps > 0) {
    TapTable<kTaps>::template load<T>(taps, params.weight, params.bias, tap_rows,
                                      params.per_channel ? channels : kHeadDim);
  }
  const LaneTaps<kTaps> lane_taps(taps, tap_rows, tap_channel, lane);
  uint32_t biases =
      shared_address(taps) + TapTable<kTaps>::bias_offset(tap_rows) + (tap_channel + 2 * lane.t) * 4;
  const float* window_state = params.state + static_cast<int64_t>(blockIdx.z) * channels * (kHeadDim + 1);
  const float* s = window_state + warp_channel * kHeadDim;
  const float* m = window_state + channels * kHeadDim + warp_channel;
  const float state_scale = scale_of_state<T, Traits::kWarpChannels, kHeadDim>(s, m, lane.index);
  pack_state<T, kHeadDim, kTaps>(reinterpret_cast<uint4*>(fragments), s, m, state_scale, lane, patch,
                                 params.patches);
  uint32_t state = shared_address(fragments);
  keep(biases), keep(state);

  SliceGroup group(exchange, patch, warp, warps);
  const FeatureMap<T, kSlices, kMode> features(params.focus, table, warp_channel, group, lane);
  float eps = params.eps * state_scale;
  RingRows<kTaps, Traits::kRingBlocks> ring_rows(
      ring + patch * kPatchColumns * Traits::pixel_bytes(channels) + warp_channel * 2,
      Traits::pixel_bytes(channels), Traits::pitch(params.patches) * Traits::pixel_bytes(channels), lane);
  int block = 0;  // the block of the ring that holds the step's first row
  for (int y = y0; y < y_end; y += kStepRows) {
    copy_async_wait<0>();
    __syncthreads();  // now Q and V of this step are visible, and no warp reads the step before any more
    const bool more = y + kStepRows < y_end;
    if (kTaps > 0 && more) {
      values.load_block(y - Traits::kHalo + Traits::kReadBlocks * kStepRows,
                        block ? block - 1 : Traits::kRingBlocks - 1);
    }
    if (patch_inside) {
      Words<kSlices> q;
      float normalizer[Traits::kHeads][4];  // first eps in the units of Q, then 1 / (Q . m + eps)
      features.queries(q, normalizer[0], eps, tile);
      char* to[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = const_cast<char*>(advance(out, token[i], out_bytes));
      if (more) load_queries(y + kStepRows);

      // d = Q times the fragments of a block.
      uint32_t blocks = state;
      const auto times_state = [&](float (&d)[2][4], auto fragment) {
        const float zero[4] = {};
        unrolled<kSlices>([&](auto s) {
          uint32_t f[4];
          load_shared<(fragment * kSlices + s) * 512>(f, blocks);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t (&upper)[4] = q[s][2 * i], (&lower)[4] = q[s][2 * i + 1];
            const float (&sum)[4] = s ? static_cast<const float (&)[4]>(d[i]) : zero;
            mma<T>(d[i], upper[0], lower[0], upper[1], lower[1], f[0], f[1], sum);
            mma<T>(d[i], upper[2], lower[2], upper[3], lower[3], f[2], f[3], d[i]);
          }
        });
      };
      invert_denominators<kBlocks>(normalizer, times_state);

      PixelRows<kTaps> pixels;
      ring_rows.point(pixels, block);
      uint32_t weights = lane_taps.address, start_at = biases;
      int limit = y_stop - y;
      // A slice at a time in heads of 128, or all at once; two n-blocks, 16 channels, together.
      constexpr int kAtOnce = kSlices > 2 ? 1 : kSlices;
#pragma unroll 1
      for (int slice = 0; slice < kSlices; slice += kAtOnce) {
        unrolled<2 * kAtOnce>([&](auto pair) {
          write_pair<T, pair>(times_state, normalizer[Traits::kHeads == 2 ? pair : 0], pixels, weights,
                              lane_taps.step, start_at, turn, limit, to);
        });
        if constexpr (kAtOnce < kSlices) {
          blocks += 4 * kSlices * 512, start_at += kSliceChannels * 4;
          pixels.advance(kSliceChannels * 2);
          to[0] += kSliceChannels * 2, to[1] += kSliceChannels * 2;
        }
      }
    }
    block = block + 1 < Traits::kRingBlocks ? block + 1 : 0;
  }
}

}  // namespace flatten::cuda::tensorcore

// The mapping phi_p and its gradient, row by row.
//
// With y = (relu(x + bias) + eps) / scale and z = y / max(y), phi = gain * z^p, gain = max(y) |z| / |z^p|.
// Dividing by the largest entry first means no power overflows and |z^p| is at least 1.
#pragma once

#include <cfloat>

#include "tiles.cuh"

namespace flatten::cuda::general {

template <class T>
struct Power {
  using A = Acc<T>;
  int whole;  // p if it is 1, 2, 3 or 4, else 0
  A p;

  /// z^exponent, of z from 0 to 1.
  __device__ __forceinline__ A general(A z, A exponent) const {
    if constexpr (std::is_same_v<T, double>) {
      return pow(z, exponent);
    } else if constexpr (std::is_same_v<T, float>) {
      return powf(z, exponent);
    } else {
      return __powf(z, exponent);
    }
  }

  /// z^p
  __device__ __forceinline__ A operator()(A z) const {
    if (whole == 0) return general(z, p);
    const A square = z * z;
    return whole == 3 ? square * z : whole == 2 ? square : whole == 1 ? z : square * square;
  }

  /// p z^(p - 1)
  __device__ __forceinline__ A slope(A z) const {
    if (whole == 0) return p * general(z, p - 1);
    const A square = z * z;
    return p * (whole == 3 ? square : whole == 2 ? z : whole == 1 ? A(1) : square * z);
  }
};

/// Lanes that measure a row together.
inline constexpr int kRowLanes = 8;

template <class T>
struct Focus {
  using A = Acc<T>;

  Mapping mapping;
  Power<T> power;
  A eps;
  const A* inverse_scale;  // shared memory, `staged` elements
  int staged, channels;
  bool bias_vector;  // key_bias can be read in vectors

  __device__ Focus(const AttentionInputs& in, int channels, int staged, bool bias_vector, A* shared)
      : mapping(in.mapping),
        power{0, static_cast<A>(in.mapping.focusing_factor)},
        eps(static_cast<A>(in.eps)),
        inverse_scale(shared),
        staged(staged),
        channels(channels),
        bias_vector(bias_vector) {
    const A p = power.p;
    power.whole = p == 1 || p == 2 || p == 3 || p == 4 ? static_cast<int>(p) : 0;
    for (int c = threadIdx.x; c < staged; c += kThreads) {
      shared[c] = mapping.scale.data && c < channels ? 1 / load_parameter<T>(mapping.scale, c) : A(1);
    }
    __syncthreads();
  }

  /// 1 / scale of N adjacent channels.
  template <int N>
  __device__ __forceinline__ void load_scale(int c, A (&to)[N]) const {
    if (c % N == 0 && c + N <= staged) {
      load_pack<N>(inverse_scale + c, to);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        to[j] = mapping.scale.data && c + j < channels ? 1 / load_parameter<T>(mapping.scale, c + j) : A(1);
      }
    }
  }

  /// x + key_bias for N adjacent channels, if the rows are keys.
  template <int N>
  __device__ __forceinline__ void add_bias(bool keys, int local, int c, A (&x)[N]) const {
    if (!keys || !mapping.key_bias.data) return;
    const std::int64_t at = static_cast<std::int64_t>(local) * channels + c;
    if (N > 1 && bias_vector && c < channels) {
      A bias[N];
      load_parameter_pack<N, T>(mapping.key_bias, at, bias);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += bias[j];
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (c + j < channels) x[j] += load_parameter<T>(mapping.key_bias, at + j);
      }
    }
  }

  /// y of one biased entry. NaN stays NaN.
  __device__ __forceinline__ A positive(A x, A inverse) const { return ((x < 0 ? A(0) : x) + eps) * inverse; }

  /// use(y) for a lane's share of the row's entries; eight lanes share a row.
  template <int N, class F>
  __device__ __forceinline__ void for_entries(const Reader<T>& in, bool keys, int token, int local,
                                              F&& use) const {
    const int end = token < 0 ? 0 : channels;
    for (int c = threadIdx.x % kRowLanes * N; c < end; c += kRowLanes * N) {
      A x[N], inverse[N];
      load_pack<N>(in.row(token) + c, x);
      load_scale(c, inverse);
      add_bias(keys, local, c, x);
#pragma unroll
      for (int j = 0; j < N; ++j) use(positive(x[j], inverse[j]));
    }
  }

  template <int N>
  __device__ void measure_by(const Reader<T>& in, bool keys, const Rows<A>& rows, int slots) const {
    constexpr A smallest = std::is_same_v<A, double> ? A(DBL_MIN) : A(FLT_MIN);
    for (int slot = threadIdx.x / kRowLanes; slot < slots; slot += kThreads / kRowLanes) {
      const int token = rows.token[slot], local = rows.local[slot];
      A largest = 0, sum_y = 0, sum_p = 0;
      for_entries<N>(in, keys, token, local, [&](A y) { largest = max(largest, y); });
      for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      }
      // A row of zeros (eps = 0) has no direction: it maps to zeros.
      const A inverse = largest >= smallest ? 1 / largest : A(0);
      for_entries<N>(in, keys, token, local, [&](A y) {
        const A z = y * inverse, zp = power(z);
        sum_y += z * z;
        sum_p += zp * zp;
      });
      for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
        sum_y += __shfl_xor_sync(0xffffffffu, sum_y, lanes);
        sum_p += __shfl_xor_sync(0xffffffffu, sum_p, lanes);
      }
      if (threadIdx.x % kRowLanes == 0) {
        const bool alive = sum_y != 0;  // NaN and infinity make it NaN, and so the gain and the gradient
        rows.inverse[slot] = inverse;
        rows.gain[slot] = alive ? largest * sqrt(sum_y / sum_p) : A(token < 0);
        rows.inverse_y[slot] = alive ? 1 / sum_y : A(0);
        rows.inverse_p[slot] = alive ? 1 / sum_p : A(0);
      }
    }
  }

  /// Fills in the norms of the first `slots` rows, a multiple of kSlots. Synchronises before and after.
  __device__ void measure(const Reader<T>& in, bool keys, const Rows<A>& rows, int slots) const {
    __syncthreads();
    if (mapping.map == FeatureMap::kNone) {
      for (int slot = threadIdx.x; slot < slots; slot += kThreads) rows.inverse[slot] = rows.gain[slot] = 1;
    } else if (in.vector) {
      measure_by<kVector<T>>(in, keys, rows, slots);
    } else {
      measure_by<1>(in, keys, rows, slots);
    }
    __syncthreads();
  }

  /// z^p for N adjacent channels of one row, from x.
  template <int N>
  __device__ __forceinline__ void map(bool keys, const Rows<A>& rows, int slot, int c, A (&x)[N]) const {
    if (mapping.map == FeatureMap::kNone) return;
    A inverse[N];
    load_scale(c, inverse);
    add_bias(keys, rows.local[slot], c, x);
    const A of_row = rows.inverse[slot];
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = power(positive(x[j], inverse[j]) * of_row);
  }

  /// The gradient of x at one entry. With dot = e . z^p over the row,
  ///   d loss / d y = factor * (p z^(p-1) (e - z^p dot / |z^p|^2) + z dot / |z|^2),
  /// where e = d loss / d phi goes with factor = gain / max(y), and e = gain * d loss / d phi with 1 /
  /// max(y). Adds d loss / d y * y, the share of scale's gradient, to `scale_sum`.
  __device__ __forceinline__ A gradient(A x, A inverse, A e, A dot, A factor, const Rows<A>& rows, int slot,
                                        A& scale_sum) const {
    if (mapping.map == FeatureMap::kNone) return e;
    const A y = positive(x, inverse), z = y * rows.inverse[slot];
    const A zp = power(z);
    const A dy =
        factor * (power.slope(z) * (e - zp * dot * rows.inverse_p[slot]) + z * dot * rows.inverse_y[slot]);
    scale_sum += dy * y;
    return x <= 0 ? A(0) : dy * inverse;  // NaN is neither, and handed on
  }
};

}  // namespace flatten::cuda::general

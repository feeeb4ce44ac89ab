// Warp-wide instructions of sm_80 and later, one thin wrapper each. Fragments follow the PTX ISA, section
// "Matrix Fragments for mma.m16n8k16": lane = 4 * g + t holds rows g and g + 8, columns 2t and 2t + 1 (and
// 2t + 8, 2t + 9 of the long axis), two 16-bit numbers to a register, the lower index in the lower half.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error \
    "The tensor-core kernels are compiled for compute capability 8.0 and later only (setup.py, CMakeLists.txt)."
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace flatten::cuda::tensorcore {

/// Two adjacent 16-bit numbers, as they lie in memory and in fragments.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    float2 y;  // as assembly: from C++, the bits would take a move each to become floats
    asm("shl.b32 %0, %1, 16;" : "=f"(y.x) : "r"(x));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(y.y) : "r"(x));
    return y;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
  }
  static __device__ __forceinline__ uint32_t relu(uint32_t x) {
    uint32_t y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
    return y;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000));  // minus zero
    return z;
  }
};

template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
  }
  static __device__ __forceinline__ uint32_t relu(uint32_t x) {
    uint32_t y;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
    return y;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
  }
  /// The largest magnitude of eight.
  static __device__ __forceinline__ float largest(const uint32_t (&x)[4]) {
    constexpr uint32_t kMagnitudes = 0x7fff7fff;
    uint32_t most = x[0] & kMagnitudes;
#pragma unroll
    for (int w = 1; w < 4; ++w) asm("max.f16x2 %0, %0, %1;" : "+r"(most) : "r"(x[w] & kMagnitudes));
    const float2 two = unpack(most);
    return fmaxf(two.x, two.y);
  }
};

// d = a b + c, with the operands' type as a string.
#define FLATTEN_MMA_K16(TYPE)                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE           \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                 \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
#define FLATTEN_MMA_K8(TYPE)                                \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE \
      ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"  \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])      \
      : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    FLATTEN_MMA_K16("f16");
  } else {
    FLATTEN_MMA_K16("bf16");
  }
}

template <typename T>
__device__ __forceinline__ void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                       const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    FLATTEN_MMA_K8("f16");
  } else {
    FLATTEN_MMA_K8("bf16");
  }
}
#undef FLATTEN_MMA_K16
#undef FLATTEN_MMA_K8

/// Transposes an 8x8 block of 16-bit numbers held one fragment register to a lane.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// Four 8x8 blocks from shared memory; lanes 8i .. 8i + 7 name the rows (16 bytes each) of block i.
template <int kOffset>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}

template <int kOffset>
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}

/// Keeps a value in its register: the compiler would otherwise compute addresses anew in every basic block.
template <typename V>
__device__ __forceinline__ void keep(V& value) {
  if constexpr (sizeof(V) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

/// The same in kernels that are short of registers; elsewhere it would only cost instructions.
template <bool kShort, typename V>
__device__ __forceinline__ void keep_if(V& value) {
  if constexpr (kShort) keep(value);
}

/// address ^ bits, made where the program says so: the compiler would make all such addresses ahead of a
/// loop, and keep registers for them.
__device__ __forceinline__ uint32_t flip(uint32_t address, int bits) {
  uint32_t flipped;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(flipped) : "r"(address), "r"(bits));
  return flipped;
}

template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

/// body(Constant<0>) .. body(Constant<n - 1>): a loop whose index can be a template argument, for offsets
/// that are part of an instruction.
template <typename Body, int... kIndex>
__device__ __forceinline__ void unrolled(std::integer_sequence<int, kIndex...>, Body body) {
  (body(Constant<kIndex>{}), ...);
}
template <int n, typename Body>
__device__ __forceinline__ void unrolled(Body body) {
  unrolled(std::make_integer_sequence<int, n>{}, body);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes of shared memory, read where the program says so: the compiler would move the load up, and keep
/// registers for what is needed much later.
template <int kOffset>
__device__ __forceinline__ void load_shared(uint32_t* x, uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ void load_shared(float* x, uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4+%5];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address), "n"(kOffset));
}

/// Two numbers.
template <int kOffset>
__device__ __forceinline__ void load_shared_pair(float (&x)[2], uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2+%3];" : "=f"(x[0]), "=f"(x[1]) : "r"(address), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ void store_shared_pair(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0+%1], {%2,%3};" ::"r"(address), "n"(kOffset), "f"(x.x), "f"(x.y)
               : "memory");
}
template <int kOffset>
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0+%1], {%2,%3,%4,%5};" ::"r"(address), "n"(kOffset), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}
template <int kOffset>
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0+%1], %2;" ::"r"(address), "n"(kOffset), "r"(x) : "memory");
}

/// 16 bytes from global to shared memory, asynchronously. kShared, kGlobal: added to the addresses.
template <int kShared, int kGlobal>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0+%2], [%1+%3], 16;" ::"r"(shared), "l"(global), "n"(kShared),
               "n"(kGlobal)
               : "memory");
}

/// The same with kOffset in both, where `bytes` is 16; zeros where it is 0.
template <int kOffset>
__device__ __forceinline__ void copy_async_or_zeros(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1+%3], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes),
               "n"(kOffset)
               : "memory");
}

/// The same; nothing where `bytes` is negative.
template <int kOffset = 0>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile(
      "{ .reg .pred some; setp.ge.s32 some, %2, 0; @some cp.async.cg.shared.global [%0+%3], [%1+%3], 16, %2; "
      "}" ::"r"(shared),
      "l"(global), "r"(bytes), "n"(kOffset)
      : "memory");
}

/// Writes 16 bytes, kOffset behind `to`, if limit > kIndex: without the branch that an if would make.
template <int kIndex, int kOffset>
__device__ __forceinline__ void store_below(int limit, void* to, const uint32_t (&x)[4]) {
  asm volatile(
      "{ .reg .pred inside; setp.gt.s32 inside, %0, %1; @inside st.global.v4.b32 [%2+%7], {%3, %4, %5, %6}; "
      "}" ::"r"(limit),
      "n"(kIndex), "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "n"(kOffset)
      : "memory");
}

/// Writes eight bytes where `inside`: without the branch that an if would make.
__device__ __forceinline__ void store_if(bool inside, void* to, uint2 x) {
  asm volatile(
      "{ .reg .pred inside; setp.ne.b32 inside, %0, 0; @inside st.global.v2.b32 [%1], {%2, %3}; }" ::"r"(
          static_cast<int>(inside)),
      "l"(to), "r"(x.x), "r"(x.y)
      : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// The value of the lane whose index differs in kMask.
template <int kMask>
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t x) {
  uint32_t y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=r"(y) : "r"(x), "n"(kMask));
  return y;
}
template <int kMask>
__device__ __forceinline__ float shuffle_xor(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(y) : "f"(x), "n"(kMask));
  return y;
}

/// The value of the quad's lane kLane.
template <int kLane>
__device__ __forceinline__ float quad_broadcast(float x) {
  float y;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 7199, -1;" : "=f"(y) : "f"(x), "n"(kLane));  // segments of 4
  return y;
}

/// A barrier of `threads` threads of the block, several of which can be in use at once.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flatten::cuda::tensorcore

// What every source uses: vector loads, conversions, sums over a warp and a block.
#pragma once
#include <cuda_fp16.h>

typedef signed char int8;
typedef unsigned char uint8;
typedef short int16;
typedef unsigned short uint16;
typedef int int32;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

#ifndef INFINITY  // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

constexpr int WARP = 32;
constexpr uint32 ALL_LANES = 0xffffffffu;

inline int lane_id() { return threadIdx.x % WARP; }
inline int warp_id() { return threadIdx.x / WARP; }

// Returns when all kernels before this one are done; then what they wrote is there. The kernels of a step overlap
// where the GPU can do that (engine/gpu/launch.py), so every kernel calls this, all of them waiting for the one before,
// and most before they touch anything but weights and the step's inputs, which no kernel writes: what else may be read
// or written earlier is told where it is. The next kernel may begin now.
#if __CUDA_ARCH__ >= 900
#define OVERLAPS 1
#else
#define OVERLAPS 0
#endif
inline void await_previous() {
#if OVERLAPS
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The same, but the next kernel begins only then: it may read at once what kernels before this one wrote.
inline void await_previous_first() {
#if OVERLAPS
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <class A, class B> inline auto divide_up(A a, B b) { return (a + b - 1) / b; }

// Loads of weights that are read once in a step: they leave no trace in the first-level cache.
inline uint4 load_once(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
inline uint2 load_once(const uint2* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
inline uint32 load_once(const uint32* p) {
    uint32 v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
inline uint16 load_once(const uint16* p) {
    uint16 v;
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

// float16 and bfloat16 as their bits.
inline float half_to_float(uint16 bits) { return __half2float(__ushort_as_half(bits)); }
inline float bfloat_to_float(uint16 bits) { return __uint_as_float(uint32(bits) << 16); }
inline uint16 float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
inline uint32 floats_to_half2(float low, float high) { return float_to_half(low) | uint32(float_to_half(high)) << 16; }

// Pairs of float16.
inline uint32 add_halves(uint32 x, uint32 y) {
    uint32 z;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
inline uint32 multiply_halves(uint32 x, uint32 y) {
    uint32 z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// The sum (the largest) of a value over a warp, in every lane; the order is fixed.
inline float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}
inline float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over a block of THREADS, in every thread; the order is fixed. All threads must call it.
template <int THREADS> inline float block_sum(float x) {
    __shared__ float parts[THREADS / WARP];
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) parts[warp_id()] = x;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) total += parts[i];
    return total;
}

// Tensor cores and what feeds them: mma, ldmatrix, movmatrix, asynchronous copies; sm_75 takes other ways.
//
// A lane is (g, t): g = lane / 4, t = lane % 4. Fragments of m16n8k16, all of float16 pairs:
//   a0 (row g, k 2t 2t+1)  a1 (row g+8, same k)  a2 (row g, k 2t+8 2t+9)  a3 (row g+8, same k)
//   b0 (k 2t 2t+1, column g)  b1 (k 2t+8 2t+9, column g)
//   c0 c1 (row g, columns 2t 2t+1)  c2 c3 (row g+8, columns 2t 2t+1), float32
#pragma once
#include "common.cuh"

// d += a b. Volatile, as the loads around it are: they keep their order, which is the software pipeline.
inline void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// An 8 x 8 matrix of float16, row g columns 2t 2t+1 in each lane, transposed.
inline uint32 transpose(uint32 x) {
    uint32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

inline uint32 shared_address(const void* p) { return uint32(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of float16; lane l gives the address of row l % 8 of matrix l / 8.
inline void load_matrices(uint32 (&d)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}
inline void load_matrices_transposed(uint32 (&d)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// 16 bytes from global to shared memory, in groups that are waited for in order; at once on sm_75.
inline void copy_async(uint32 shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
    uint4 v = *static_cast<const uint4*>(global);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
inline void close_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait for all groups but the last PENDING.
template <int PENDING> inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// 2^x, within 2 units in the last place; 0 for -infinity.
inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

inline uint32 pack(float low, float high) {
    half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32*>(&h);
}

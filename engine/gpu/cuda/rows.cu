// Operations on rows of activations, float32 [rows, cols], cols a multiple of 4. One block a row unless told.
#include "common.cuh"

constexpr int THREADS = 512;

// out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019); out may be x.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const float* x, const float* weight, float eps, int cols, float* out) {
    await_previous();
    const float4* row = (const float4*)(x + int64(blockIdx.x) * cols);
    float4* to = (float4*)(out + int64(blockIdx.x) * cols);
    float squares = 0;
    for (int i = threadIdx.x; i < cols / 4; i += THREADS) {
        float4 v = row[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / cols + eps);
    for (int i = threadIdx.x; i < cols / 4; i += THREADS) {
        float4 v = row[i], w = ((const float4*)weight)[i];
        to[i] = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
    }
}

inline float silu(float x) { return x / (1.0f + expf(-x)); }

// out = silu(gate) * up (Shazeer 2020), `count` numbers; out may be gate or up. One thread for four of them.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const float* gate, const float* up, int64 count, float* out) {
    await_previous();
    int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (4 * i >= count) return;
    float4 g = ((const float4*)gate)[i], u = ((const float4*)up)[i];
    ((float4*)out)[i] = make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w);
}

// out[i] = x[indices[i]].
extern "C" __global__ void __launch_bounds__(THREADS) gather(const float* x, const int* indices, int cols, float* out) {
    await_previous();
    const float4* row = (const float4*)(x + int64(indices[blockIdx.x]) * cols);
    for (int i = threadIdx.x; i < cols / 4; i += THREADS) ((float4*)(out + int64(blockIdx.x) * cols))[i] = row[i];
}

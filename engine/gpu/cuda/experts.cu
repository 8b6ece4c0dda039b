// Around the matrix products of routed experts for many rows: routing, grouping the (row, choice) pairs by
// expert, gathering their rows, SwiGLU, and the weighted sum back into the residual stream.

#include "common.cuh"
#include "routing.cuh"

constexpr int ROUTE_THREADS = 128;

// logits: float32 [rows, experts]; ids int32 and weights float32 [rows, top_k]. A block a row. Shared memory: experts
// + 2 top_k floats.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)
route_rows(const float* logits, int experts, int top_k, int normalize, float scale, int* ids, float* weights) {
    extern __shared__ float router[];
    await_previous();
    int64 row = blockIdx.x;
    for (int e = threadIdx.x; e < experts; e += ROUTE_THREADS) router[e] = logits[row * experts + e];
    route<ROUTE_THREADS>(router, experts, top_k, normalize, scale, router + experts, ids + row * top_k, weights + row * top_k);
}

// Sort pairs (number: row * top_k + choice) by expert, ascending in each. offsets: int32 [experts + 1], where
// an expert's pairs begin; order: int32 [pairs], the pair at each place; place: int32 [pairs], the place of
// each pair. One block an expert, of 256 threads; each looks at all pairs, so that the order is fixed.
extern "C" __global__ void __launch_bounds__(256)
group_pairs(const int* ids, int pairs, int experts, int* offsets, int* order, int* place) {
    __shared__ int before[8], start;
    await_previous();
    int expert = blockIdx.x, lower = 0;
    for (int i = threadIdx.x; i < pairs; i += 256) lower += ids[i] < expert;
    for (int step = WARP / 2; step; step /= 2) lower += __shfl_xor_sync(ALL_LANES, lower, step);
    if (lane_id() == 0) before[warp_id()] = lower;
    __syncthreads();
    if (threadIdx.x == 0) {
        start = 0;
        for (int i = 0; i < 8; i++) start += before[i];
        offsets[expert] = start;
        if (expert == experts - 1) offsets[experts] = pairs;
    }
    __syncthreads();
    int next = start;
    for (int base = 0; base < pairs; base += 256) {
        int i = base + threadIdx.x;
        bool mine = i < pairs && ids[i] == expert;
        uint32 same = __ballot_sync(ALL_LANES, mine);
        __syncthreads();
        if (lane_id() == 0) before[warp_id()] = __popc(same);
        __syncthreads();
        int at = next;
        for (int w = 0; w < 8; w++) {
            if (w < warp_id()) at += before[w];
            next += before[w];
        }
        if (mine) {
            at += __popc(same & ((1u << lane_id()) - 1));
            order[at] = i;
            place[i] = at;
        }
    }
}

// out float16 [pairs, hidden]: the rows of x float32 [rows, hidden] in the pairs' order. One block a pair.
extern "C" __global__ void gather_pairs(const float* x, const int* order, int top_k, int hidden, uint16* out) {
    await_previous();
    const float4* source = (const float4*)(x + int64(order[blockIdx.x] / top_k) * hidden);
    uint2* target = (uint2*)(out + int64(blockIdx.x) * hidden);
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 v = source[i];
        target[i] = make_uint2(floats_to_half2(v.x, v.y), floats_to_half2(v.z, v.w));
    }
}

// out float16 [pairs, ffn] = silu(gate) * up; both: float32 [pairs, 2 ffn], gate first. One block a pair.
extern "C" __global__ void swiglu_pairs(const float* both, int ffn, uint16* out) {
    await_previous();
    const float* gate = both + int64(blockIdx.x) * 2 * ffn;
    for (int i = 2 * threadIdx.x; i < ffn; i += 2 * blockDim.x) {
        float2 g = *(const float2*)(gate + i), u = *(const float2*)(gate + ffn + i);
        float a = g.x / (1.0f + expf(-g.x)) * u.x, b = g.y / (1.0f + expf(-g.y)) * u.y;
        *(uint32*)(out + int64(blockIdx.x) * ffn + i) = floats_to_half2(a, b);
    }
}

// x float32 [rows, hidden] += weights[row, c] * y[place[row, c]], in the order of choices; y float32 [pairs, hidden].
// One block a row.
extern "C" __global__ void combine_pairs(float* x, const float* y, const int* place, const float* weights, int top_k,
                                         int hidden) {
    await_previous();
    int row = blockIdx.x;
    float4* out = (float4*)(x + int64(row) * hidden);
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 total = out[i];
        for (int c = 0; c < top_k; c++) {
            float w = weights[row * top_k + c];
            float4 v = ((const float4*)(y + int64(place[row * top_k + c]) * hidden))[i];
            total.x += w * v.x, total.y += w * v.y, total.z += w * v.z, total.w += w * v.w;
        }
        out[i] = total;
    }
}

// Puts together what the splits of a row's context have given.
#include "kv.cuh"
#include "mma.cuh"

constexpr int THREADS = 256;

// parts float32 [rows, heads, splits, dim] and states [rows, heads, splits] (reference, sum) of decode, or of
// prefill if tokens is 0 -> out float32 [rows, heads, dim]. tokens: that a warp of decode takes at once.
// Grid: heads, rows. Shared memory: splits floats.
extern "C" __global__ void __launch_bounds__(THREADS) merge(
    const float* parts, const float2* states, int dim, int splits, const int* positions, int tokens, float* out) {
    extern __shared__ float weights[];
    __shared__ float4 sums[THREADS];
    __shared__ float references[THREADS / WARP];
    int thread = threadIdx.x, row = blockIdx.y;
    int64 head = int64(row) * gridDim.x + blockIdx.x;
    int used = tokens ? used_splits(splits, positions[row] + 1, tokens) : splits;
    states += head * splits;

    float reference = -INFINITY;
    for (int i = thread; i < used; i += THREADS) reference = fmaxf(reference, states[i].x);
    reference = warp_max(reference);
    if (lane_id() == 0) references[warp_id()] = reference;
    __syncthreads();
    for (int i = 0; i < THREADS / WARP; i++) reference = fmaxf(reference, references[i]);
    float total = 0;
    for (int i = thread; i < used; i += THREADS) {
        float2 state = states[i];
        weights[i] = state.x == -INFINITY ? 0 : exp2_fast(state.x - reference);
        total += weights[i] * state.y;
    }
    total = block_sum<THREADS>(total);  // a barrier for weights as well

    int lanes = dim <= 128 ? 32 : 64, column = thread % lanes, groups = THREADS / lanes;
    float4 sum = make_float4(0, 0, 0, 0);
    if (4 * column < dim) {
        const float4* part = reinterpret_cast<const float4*>(parts + head * splits * dim) + column;
#pragma unroll 4
        for (int i = thread / lanes; i < used; i += groups) {
            float4 x = part[i * (dim / 4)];
            float weight = weights[i];
            if (weight == 0) continue;  // a split of prefill without work writes no part
            sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
        }
    }
    sums[thread] = sum;
    __syncthreads();
    if (thread >= lanes || 4 * column >= dim) return;
    for (int i = 1; i < groups; i++) {
        float4 x = sums[thread + i * lanes];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    float inverse = 1 / total;
    reinterpret_cast<float4*>(out + head * dim)[column] =
        make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
}

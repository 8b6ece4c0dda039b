// Which experts a row goes to.
#pragma once
#include "common.cuh"

// A block of THREADS: the top_k experts by logit, highest first and the lower number of equals, and their
// weights: softmax over all experts, or over the chosen ones (normalize), times scale. NaN counts as the lowest.
// As engine/experts/exchange.py route_softmax. logits: shared [experts], from any thread; space: shared [2 top_k].
template <int THREADS>
inline void route(float* logits, int experts, int top_k, int normalize, float scale, float* space, int* ids, float* weights) {
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        if (logits[e] != logits[e]) logits[e] = -INFINITY;
    }
    __syncthreads();
    float *chosen = space, *exponentials = space + top_k;
    constexpr int TEAM = 8;  // lanes that find together how many come before an expert
    for (int base = 0; base < experts; base += THREADS / TEAM) {
        int e = base + threadIdx.x / TEAM, rank = 0;
        float mine = e < experts ? logits[e] : 0;
        for (int other = threadIdx.x % TEAM; other < experts; other += TEAM)
            rank += logits[other] > mine || (logits[other] == mine && other < e);
#pragma unroll
        for (int step = 1; step < TEAM; step *= 2) rank += __shfl_xor_sync(ALL_LANES, rank, step);
        if (e < experts && rank < top_k && threadIdx.x % TEAM == 0) ids[rank] = e, chosen[rank] = mine;
    }
    __syncthreads();
    if (warp_id() > 0) return;
    float total = 0;
    for (int i = lane_id(); i < top_k; i += WARP) exponentials[i] = expf(chosen[i] - chosen[0]);
    __syncwarp();
    if (normalize) {
        for (int i = 0; i < top_k; i++) total += exponentials[i];
    } else {
        for (int e = lane_id(); e < experts; e += WARP) total += expf(logits[e] - chosen[0]);
        total = warp_sum(total);
    }
    for (int i = lane_id(); i < top_k; i += WARP) weights[i] = exponentials[i] / total * scale;
}

// Which experts a row goes to.
#pragma once
#include "common.cuh"

// The larger of two logits, the lower number of equals.
inline void best_of(float &x, int &i, float other, int j) {
    if (other > x || (other == x && j < i)) { x = other; i = j; }
}

// One warp: the top_k experts by logit, highest first, and their weights: softmax over all experts, or
// over the chosen ones (normalize), times scale. As engine/experts/exchange.py route_softmax.
inline void route(float *logits, int experts, int top_k, int normalize, float scale, int *ids, float *weights) {
    int lane = threadIdx.x % 32;
    float largest = 0, total = 0, mine = 0;
    int chosen = 0;
    for (int choice = 0; choice < top_k; choice++) {
        float x = -INFINITY;
        int best = 0x7fffffff;
        for (int e = lane; e < experts; e += 32) best_of(x, best, logits[e], e);
        for (int step = 16; step; step /= 2)
            best_of(x, best, __shfl_xor_sync(~0u, x, step), __shfl_xor_sync(~0u, best, step));
        if (best == 0x7fffffff) best = choice;  // nothing but NaN: any expert that exists
        if (choice == 0) {
            largest = x;
            if (!normalize) {
                for (int e = lane; e < experts; e += 32) total += expf(logits[e] - largest);
                for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
            }
            __syncwarp();
        }
        float weight = expf(x - largest);
        if (normalize) total += weight;
        if (lane == choice % 32) { mine = weight; chosen = best; }
        if (lane == 0) logits[best] = -INFINITY;
        __syncwarp();
        // Write a full warp's worth, or the last few, when they are there.
        if (choice % 32 == 31 || choice == top_k - 1) {
            if (lane <= choice % 32) { ids[choice / 32 * 32 + lane] = chosen; weights[choice / 32 * 32 + lane] = mine; }
        }
    }
    __syncwarp();
    for (int choice = lane; choice < top_k; choice += 32) weights[choice] = weights[choice] / total * scale;
}

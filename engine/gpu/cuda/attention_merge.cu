// Puts together what the splits of a row's context have given.
#include "kv.cuh"
#include "mma.cuh"

constexpr int MAX_WARPS = 16;
constexpr int AT_ONCE = 8;

// parts float32 [rows, heads, splits, dim] and states [rows, heads, splits] (reference, sum) of decode, or of
// prefill if tiles is 0 -> out float32 [rows, heads, dim]. tiles: that a warp of decode takes at once.
// Grid: heads, rows. Block: `lanes` threads (32 up to dim 128, else 64) for each group of splits. Shared
// memory: splits floats.
extern "C" __global__ void __launch_bounds__(MAX_WARPS * WARP) merge(
    const float* parts, const float2* states, int dim, int splits, const int* positions, int tiles, float* out) {
    extern __shared__ float weights[];
    __shared__ float4 sums[MAX_WARPS * WARP];
    __shared__ float references[MAX_WARPS], totals[MAX_WARPS];
    int thread = threadIdx.x, threads = blockDim.x, warps = threads / WARP, row = blockIdx.y;
    int64 head = int64(row) * gridDim.x + blockIdx.x;
    states += head * splits;

    // The first parts are under way while it is found out how much each counts.
    int used = tiles ? used_splits(splits, positions[row] + 1, tiles) : splits;
    int lanes = dim <= 128 ? 32 : 64, column = thread % lanes, group = thread / lanes, groups = threads / lanes;
    const float4* part = reinterpret_cast<const float4*>(parts + head * splits * dim) + min(column, dim / 4 - 1);
    float4 first[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (group + i * groups < used) first[i] = part[(group + i * groups) * (dim / 4)];
    }

    float reference = -INFINITY;
    for (int i = thread; i < used; i += threads) reference = fmaxf(reference, states[i].x);
    reference = warp_max(reference);
    if (lane_id() == 0) references[warp_id()] = reference;
    __syncthreads();
    for (int i = 0; i < warps; i++) reference = fmaxf(reference, references[i]);
    float total = 0;
    for (int i = thread; i < used; i += threads) {
        float2 state = states[i];
        weights[i] = state.x == -INFINITY ? 0 : exp2_fast(state.x - reference);
        total += weights[i] * state.y;
    }
    total = warp_sum(total);
    if (lane_id() == 0) totals[warp_id()] = total;
    __syncthreads();

    float4 sum = make_float4(0, 0, 0, 0);
    auto add = [&](int i, float4 x) {
        float weight = i < used ? weights[i] : 0;
        if (weight == 0) return;  // prefill's part may never have been written
        sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    };
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) add(group + i * groups, first[i]);
    for (int i = group + AT_ONCE * groups; i < used; i += groups) add(i, part[i * (dim / 4)]);
    sums[thread] = sum;
    __syncthreads();
    if (thread >= lanes || 4 * column >= dim) return;
    for (int i = 1; i < groups; i++) {
        float4 x = sums[thread + i * lanes];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    total = 0;
    for (int i = 0; i < warps; i++) total += totals[i];
    float inverse = 1 / total;
    reinterpret_cast<float4*>(out + head * dim)[column] =
        make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
}

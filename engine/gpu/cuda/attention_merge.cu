// Puts together what the splits of a row's context have given.
#include "kv.cuh"
#include "mma.cuh"

constexpr int MAX_WARPS = 16;
constexpr int AT_ONCE = 8;
constexpr int MOST = 512 / WARP;  // splits that a lane minds

// parts float32 [rows, heads, splits, dim] and states [rows, heads, splits] (reference, sum) of decode, or of
// prefill if tiles is 0 -> out float32 [rows, heads, dim]. splits: 512 at most. tiles: that a warp of decode takes
// at once. Grid: heads, rows. Block: `lanes` threads (32 up to dim 128, else 64) for each group of splits.
extern "C" __global__ void __launch_bounds__(MAX_WARPS * WARP) merge(
    const float* parts, const float2* states, int dim, int splits, const int* positions, int tiles, float* out) {
    __shared__ float4 sums[MAX_WARPS * WARP];
    int thread = threadIdx.x, row = blockIdx.y, used = tiles ? used_splits(splits, positions[row] + 1, tiles) : splits;
    int64 head = int64(row) * gridDim.x + blockIdx.x;
    await_previous();

    // The first parts are under way while it is found out how much each counts: every warp does that for itself. Of
    // prefill's, some that do not count were never written.
    int lanes = dim <= 128 ? 32 : 64, column = thread % lanes, group = thread / lanes, groups = blockDim.x / lanes;
    const float4* part = reinterpret_cast<const float4*>(parts + head * splits * dim) + min(column, dim / 4 - 1);
    float4 first[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (tiles && group + i * groups < used) first[i] = part[(group + i * groups) * (dim / 4)];
    }
    float2 mine[MOST];
    float reference = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int split = lane_id() + i * WARP;
        mine[i] = split < used ? states[head * splits + split] : make_float2(-INFINITY, 0);
        reference = fmaxf(reference, mine[i].x);
    }
    reference = warp_max(reference);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        mine[i].x = mine[i].x == -INFINITY ? 0 : exp2_fast(mine[i].x - reference);
        total += mine[i].x * mine[i].y;
    }
    total = warp_sum(total);

    float4 sum = make_float4(0, 0, 0, 0);
    auto weight_of = [&](int split) {
        float weight = 0;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            float other = __shfl_sync(ALL_LANES, mine[i].x, split % WARP);
            if (split / WARP == i) weight = other;
        }
        return weight;
    };
    auto add = [&](float weight, float4 x) {
        sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    };
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (tiles && group + i * groups < used) add(weight_of(group + i * groups), first[i]);
    }
    for (int i = group + (tiles ? AT_ONCE * groups : 0); i < used; i += groups) {
        float weight = weight_of(i);
        if (weight != 0) add(weight, part[i * (dim / 4)]);
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

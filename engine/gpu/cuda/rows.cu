// Operations on rows of activations, float32 [rows, cols], cols a multiple of 4. One block a row unless told.
#include "common.cuh"

constexpr int THREADS = 512, ARGMAX_THREADS = WARP * WARP, ARGMAX_LOADS = 8;

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

// Whether (value, id) comes before another: larger, or equal with a lower id.
inline bool before(float value, int id, float other, int other_id) { return value > other || (value == other && id < other_id); }

inline void warp_first(float& value, int& id) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, value, step);
        int other_id = __shfl_xor_sync(ALL_LANES, id, step);
        if (before(other, other_id, value, id)) value = other, id = other_id;
    }
}

// ids[row] = the column of the largest logit, the lowest of equals; largest[row] = that logit, or NaN where
// any is NaN. Any cols.
extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS)
argmax(const float* logits, int cols, int* ids_out, float* largest) {
    __shared__ float values[ARGMAX_THREADS / WARP];
    __shared__ int ids[ARGMAX_THREADS / WARP];
    await_previous();
    const float* row = logits + int64(blockIdx.x) * cols;
    float value = -INFINITY;
    int id = 0x7fffffff, bad = 0;
    for (int first = threadIdx.x; first < cols; first += ARGMAX_LOADS * ARGMAX_THREADS) {
        float some[ARGMAX_LOADS];
#pragma unroll
        for (int i = 0; i < ARGMAX_LOADS; i++) {
            int at = first + i * ARGMAX_THREADS;
            some[i] = at < cols ? row[at] : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < ARGMAX_LOADS; i++) {
            bad |= some[i] != some[i];
            if (before(some[i], first + i * ARGMAX_THREADS, value, id)) value = some[i], id = first + i * ARGMAX_THREADS;
        }
    }
    warp_first(value, id);
    if (lane_id() == 0) values[warp_id()] = value, ids[warp_id()] = id;
    bad = __syncthreads_or(bad);
    if (warp_id()) return;
    value = values[lane_id()], id = ids[lane_id()];
    warp_first(value, id);
    if (lane_id() == 0) {
        ids_out[blockIdx.x] = id < cols ? id : 0;
        largest[blockIdx.x] = bad ? __int_as_float(0x7fffffff) : value;
    }
}

// Threads 0 to 1023: the values in `list`, one each, in descending order.
inline void sort_descending(float* list) {
    for (int size = 2; size <= ARGMAX_THREADS; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            int i = threadIdx.x, j = i ^ step;
            __syncthreads();
            if (i > j) continue;
            float a = list[i], b = list[j];
            bool larger_first = (i & size) == 0;
            if ((a < b) == larger_first && a != b) list[i] = b, list[j] = a;
        }
    }
    __syncthreads();
}

// The tokens that matter to sampling: every logit that is at least as large as one which LISTED logits reach, in no
// order. counts[row]: how many they are; of more than MOST_LISTED only so many are written, to ids and values, [rows,
// MOST_LISTED]. totals[row]: the sum of exp(logit - largest) over all.
constexpr int LISTED = 256, MOST_LISTED = 1024;
extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS)
shortlist(const float* logits, int cols, int* counts, int* ids, float* values, double* totals) {
    __shared__ float highest[ARGMAX_THREADS];
    __shared__ double sums[ARGMAX_THREADS / WARP];
    __shared__ int count;
    await_previous();
    const float* row = logits + int64(blockIdx.x) * cols;
    float mine = -INFINITY;
#pragma unroll 8
    for (int i = threadIdx.x; i < cols; i += ARGMAX_THREADS) mine = fmaxf(mine, row[i]);
    highest[threadIdx.x] = mine;
    if (threadIdx.x == 0) count = 0;
    sort_descending(highest);
    float most = highest[0], least = highest[LISTED - 1];
    double total = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < cols; i += ARGMAX_THREADS) {
        float x = row[i];
        total += expf(x - most);
        if (x >= least) {
            int at = atomicAdd(&count, 1);
            if (at < MOST_LISTED) ids[blockIdx.x * MOST_LISTED + at] = i, values[blockIdx.x * MOST_LISTED + at] = x;
        }
    }
    for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
    if (lane_id() == 0) sums[warp_id()] = total;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < ARGMAX_THREADS / WARP; i++) total += sums[i];
    counts[blockIdx.x] = count;
    totals[blockIdx.x] = total;
}

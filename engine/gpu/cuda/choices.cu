// What choosing a token wants to know of a row's logits: the likeliest one, and those that matter to sampling.
//
// SLICES blocks share a row of any length out, in two kernels: the first finds the largest of each warp's part, from
// which the second knows how large a logit must be to be among the first.
#include "common.cuh"

constexpr int SLICES = 32, THREADS = WARP * WARP, PARTS = SLICES * WARP;
constexpr int LISTED = 256, MOST_LISTED = 1024;

// Of a slice of a row.
struct Likeliest {
    float logit;
    int id, bad;  // bad: whether there is NaN
};
struct Counters {
    int listed, arrived;  // zero between two steps
};

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

struct Slice {
    int first, last;
    inline Slice(int cols) : first(int64(cols) * blockIdx.x / SLICES), last(int64(cols) * (blockIdx.x + 1) / SLICES) {}
};

// logits float32 [rows, cols] -> likeliest [rows, SLICES]; highs float32 [rows, PARTS], the largest of each part.
// Grid: SLICES, rows.
extern "C" __global__ void __launch_bounds__(THREADS)
survey(const float* logits, int cols, Likeliest* likeliest, float* highs) {
    __shared__ float values[WARP];
    __shared__ int ids[WARP];
    await_previous();
    const float* row = logits + int64(blockIdx.y) * cols;
    Slice slice(cols);
    float value = -INFINITY;
    int id = 0x7fffffff, bad = 0;
    // Of a short row every warp shall have some: neighbouring columns go to different warps.
    int start = cols < SLICES * THREADS ? lane_id() * WARP + warp_id() : threadIdx.x;
#pragma unroll 4
    for (int i = slice.first + start; i < slice.last; i += THREADS) {
        float x = row[i];
        bad |= x != x;
        if (before(x, i, value, id)) value = x, id = i;
    }
    warp_first(value, id);
    if (lane_id() == 0) {
        values[warp_id()] = value, ids[warp_id()] = id;
        highs[blockIdx.y * PARTS + blockIdx.x * WARP + warp_id()] = value;
    }
    bad = __syncthreads_or(bad);
    if (warp_id()) return;
    value = values[lane_id()], id = ids[lane_id()];
    warp_first(value, id);
    if (lane_id() == 0) likeliest[blockIdx.y * SLICES + blockIdx.x] = {value, id, bad};
}

// ids_out[row] = the column of the largest logit, the lowest of equals; largest[row] = that logit, or NaN where any is
// NaN. Also every logit that is at least as large as one which LISTED logits reach, in no order: counts[row] of them; of
// more than MOST_LISTED only so many are written, to ids and values, [rows, MOST_LISTED]. totals[row]: the sum of
// exp(logit - largest) over all. sums: float64 [rows, SLICES]. Grid: SLICES, rows.
extern "C" __global__ void __launch_bounds__(THREADS)
shortlist(const float* logits, int cols, const Likeliest* likeliest, const float* highs, Counters* counters, double* sums,
          int* ids_out, float* largest, int* counts, int* ids, float* values, double* totals) {
    __shared__ __align__(16) float high[PARTS];
    __shared__ double parts[WARP];
    __shared__ float most, least;
    __shared__ bool last_block;
    await_previous();
    int at_row = blockIdx.y;
    float mine = highs[at_row * PARTS + threadIdx.x];
    high[threadIdx.x] = mine;
    __syncthreads();
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < PARTS; i += 4) {
        float4 four = *(const float4*)(high + i);
        rank += before(four.x, i, mine, threadIdx.x) + before(four.y, i + 1, mine, threadIdx.x) +
                before(four.z, i + 2, mine, threadIdx.x) + before(four.w, i + 3, mine, threadIdx.x);
    }
    if (rank == 0) most = mine;
    if (rank == LISTED - 1) least = mine;
    __syncthreads();

    const float* row = logits + int64(at_row) * cols;
    Slice slice(cols);
    double total = 0;
#pragma unroll 4
    for (int i = slice.first + threadIdx.x; i < slice.last; i += THREADS) {
        float x = row[i];
        total += expf(x - most);
        if (x >= least) {
            int at = atomicAdd(&counters[at_row].listed, 1);
            if (at < MOST_LISTED) ids[at_row * MOST_LISTED + at] = i, values[at_row * MOST_LISTED + at] = x;
        }
    }
    for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
    if (lane_id() == 0) parts[warp_id()] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARP; i++) total += parts[i];
        sums[at_row * SLICES + blockIdx.x] = total;
        __threadfence();
        last_block = atomicAdd(&counters[at_row].arrived, 1) == SLICES - 1;
    }
    __syncthreads();
    if (!last_block || warp_id()) return;
    __threadfence();
    Likeliest one = likeliest[at_row * SLICES + lane_id()];
    warp_first(one.logit, one.id);
    bool bad = __any_sync(ALL_LANES, one.bad);
    if (lane_id()) return;
    total = 0;
    for (int i = 0; i < SLICES; i++) total += ((volatile double*)sums)[at_row * SLICES + i];
    ids_out[at_row] = one.id < cols ? one.id : 0;
    largest[at_row] = bad ? __int_as_float(0x7fffffff) : one.logit;
    counts[at_row] = ((volatile Counters*)counters)[at_row].listed;
    totals[at_row] = total;
    counters[at_row] = {0, 0};
}

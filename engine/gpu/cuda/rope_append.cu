// Rotary embedding and, with it, everything between the projections and attention.
#include "kv.cuh"

constexpr int WARPS = 4;
constexpr int MAX_DIM = 256;
constexpr int PARTS = MAX_DIM / WARP;

// frequencies float64 [half], positions int32 [rows] -> table [rows, half], cosine and sine times magnitude.
// A float32 angle would be off by a hundredth of a turn at a million tokens.
extern "C" __global__ void rope_table(
    const double* frequencies, int half, double magnitude, const int* positions, int rows, float2* table) {
    await_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * half) return;
    double sine, cosine;
    sincos(positions[i / half] * frequencies[i % half], &sine, &cosine);
    table[i] = make_float2(float(cosine * magnitude), float(sine * magnitude));
}

// Element lane + 32 j of a head in x[j] -> scaled so that the mean of squares is 1, times weight, likewise.
inline void normalize(float (&x)[PARTS], int dim, const float (&weight)[PARTS], float eps) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < PARTS; j++) squares += x[j] * x[j];
    float scale = 1 / sqrtf(warp_sum(squares) / dim + eps);
#pragma unroll
    for (int j = 0; j < PARTS; j++) x[j] = x[j] * scale * weight[j];
}

// Rotates the first 2 half elements: pairs (i, i + half) in the NeoX style, else (2 i, 2 i + 1).
inline void rotate(float (&x)[PARTS], int dim, const float2* table, int half, bool neox, float* staged) {
#pragma unroll
    for (int j = 0; j < PARTS; j++) staged[lane_id() + WARP * j] = x[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        int e = lane_id() + WARP * j;
        if (e >= 2 * half) continue;
        bool first = neox ? e < half : e % 2 == 0;
        float2 turn = table[neox ? e - (first ? 0 : half) : e / 2];
        float other = staged[neox ? (first ? e + half : e - half) : e ^ 1];
        x[j] = first ? x[j] * turn.x - other * turn.y : x[j] * turn.x + other * turn.y;
    }
}

// Writes one token's key or value, element lane + 32 j in x[j], to its head's part of a page.
template <KvKind KIND> inline void append(char* place, int token, int dim, const float (&x)[PARTS]) {
    int lane = lane_id(), blocks = dim / BLOCK;
    half* scales = reinterpret_cast<half*>(place + PAGE_TOKENS * code_bytes(KIND, dim)) + token * blocks;
    uint8* codes = reinterpret_cast<uint8*>(place) + token * code_bytes(KIND, dim);
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        if (WARP * j >= dim) break;
        if constexpr (KIND == F16) {
            if (lane + WARP * j < dim) reinterpret_cast<half*>(codes)[lane + WARP * j] = __float2half_rn(x[j]);
        } else {
            float high = warp_max(x[j]), low = -warp_max(-x[j]);
            int place_of_four = lane / 4 * blocks + j;
            if constexpr (KIND == Q8_0) {
                // At least float16's smallest normal number.
                half scale = __float2half_rn(fmaxf(fmaxf(high, -low) / 127, 6.2e-5f));
                float code = fminf(fmaxf(rintf(x[j] / __half2float(scale)), -127), 127);
                codes[4 * place_of_four + lane % 4] = uint8(int(code) + 128);
                if (lane == 0) scales[j] = scale;
            } else {
                // The element of the largest magnitude becomes -8, whatever its sign.
                half scale = __float2half_rn((high > -low ? high : low) / -8);
                float divisor = __half2float(scale);
                float code = divisor == 0 ? 0 : fminf(fmaxf(rintf(x[j] / divisor), -8), 7);
                int mine = int(code) + 8, next = __shfl_down_sync(ALL_LANES, mine, 1);
                if (lane % 2 == 0) codes[2 * place_of_four + lane % 4 / 2] = uint8(mine | next << 4);
                if (lane == 0) scales[j] = scale;
            }
        }
    }
}

// q float32 [rows, heads, dim] is normalised (q_norm [dim] or null) and rotated in place; k and v float32
// [rows, kv_heads, dim], k likewise, go to the pool. A warp takes one head of one row; grid: heads and
// both kinds of KV heads over WARPS, rows.
template <KvKind KEYS, KvKind VALUES>
__global__ void __launch_bounds__(WARPS * WARP) rope_append(
    float* q, const float* k, const float* v, int heads, int kv_heads, int dim, const float2* table, int half,
    int neox, const float* q_norm, const float* k_norm, float eps, const int* positions, const int* slots,
    KV_PARAMETERS) {
    __shared__ float staged[WARPS][MAX_DIM];
    int unit = blockIdx.x * WARPS + warp_id(), row = blockIdx.y;
    if (unit >= heads + 2 * kv_heads) return;
    bool is_query = unit < heads, is_key = !is_query && unit < heads + kv_heads;
    int head = is_query ? unit : (unit - heads) % kv_heads;
    int position = positions[row], token = position % PAGE_TOKENS;
    const int* pages = page_tables + int64(slots[row]) * max_pages;
    char* keys = find_keys(layer, page_bytes, head_bytes, pages, position / PAGE_TOKENS, head);
    const float* norm = is_query ? q_norm : is_key ? k_norm : nullptr;
    float weight[PARTS];
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        int e = lane_id() + WARP * j;
        weight[j] = norm && e < dim ? norm[e] : 0;
    }
    await_previous();

    const float* source = is_query ? q + (int64(row) * heads + head) * dim
                                   : (is_key ? k : v) + (int64(row) * kv_heads + head) * dim;
    float x[PARTS];
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        int e = lane_id() + WARP * j;
        x[j] = e < dim ? source[e] : 0;
    }
    if (norm) normalize(x, dim, weight, eps);
    if (is_query || is_key) rotate(x, dim, table + int64(row) * half, half, neox, staged[warp_id()]);
    if (is_query) {
        float* out = q + (int64(row) * heads + head) * dim;
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
            int e = lane_id() + WARP * j;
            if (e < dim) out[e] = x[j];
        }
        return;
    }
    if (is_key) append<KEYS>(keys, token, dim, x);
    else append<VALUES>(keys + key_bytes, token, dim, x);
}

#ifdef ALL_INSTANCES
#define INSTANCE(...)                                                                                           \
    template __global__ void rope_append<__VA_ARGS__>(                                                          \
        float*, const float*, const float*, int, int, int, const float2*, int, int, const float*, const float*, \
        float, const int*, const int*, KV_PARAMETERS)
INSTANCE(F16, F16);
INSTANCE(F16, Q8_0);
INSTANCE(F16, Q4_0);
INSTANCE(Q8_0, F16);
INSTANCE(Q8_0, Q8_0);
INSTANCE(Q8_0, Q4_0);
INSTANCE(Q4_0, F16);
INSTANCE(Q4_0, Q8_0);
INSTANCE(Q4_0, Q4_0);
#endif

// Attention of many rows of one or several sequences: causal, over paged KV, on tensor cores
// (FlashAttention-2, Dao 2023).
//
// A block takes M rows of the matrix [rows x group, dim] that the query heads of one KV head make of the
// batch, so that all of them share each load; a warp 16 ROWS16 of these. Keys and values come by tiles of
// TOKENS: the next keys are copied while this tile's values are multiplied, the next values while its scores
// are. Codes are copied as they are and made float16 in shared memory. Rows of shared memory are padded by
// 16 bytes, so that eight of them lie in different banks.
#include "kv.cuh"
#include "mma.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr float SLACK = 6, LIFT = 8;  // see attention_decode.cu

// Keys or values of one KV head on their way into shared memory: float16 [TOKENS, DIM + 8] in the end.
template <int DIM, KvKind KIND, int TOKENS> struct Tile {
    static constexpr int STRIDE = 2 * DIM + 16, BLOCKS = DIM / BLOCK;
    static constexpr int CODES = TOKENS * code_bytes(KIND, DIM), SCALES = 2 * TOKENS * BLOCKS;
    static constexpr int BYTES = TOKENS * STRIDE, RAW_BYTES = KIND == F16 ? 0 : CODES + SCALES;
    char *numbers, *raw;

    // Begins to copy tokens `token` and on; those beyond the last one count as the last, or as zeros.
    inline void copy(const char* place, int token, int last) const {
        if constexpr (KIND == F16) {
            constexpr int PIECES = DIM / 8;
            uint32 to = shared_address(numbers);
#pragma unroll
            for (int i = threadIdx.x; i < TOKENS * PIECES; i += THREADS) {
                int row = i / PIECES, piece = i % PIECES;
                copy_async(to + row * STRIDE + 16 * piece, place + min(token + row, last) * (2 * DIM) + 16 * piece);
            }
        } else {
            const char* scales = place + PAGE_TOKENS * code_bytes(KIND, DIM) + 2 * BLOCKS * token;
            place += token * code_bytes(KIND, DIM);
            uint32 to = shared_address(raw);
#pragma unroll
            for (int i = threadIdx.x; i < CODES / 16; i += THREADS) copy_async(to + 16 * i, place + 16 * i);
#pragma unroll
            for (int i = threadIdx.x; i < SCALES / 16; i += THREADS) copy_async(to + CODES + 16 * i, scales + 16 * i);
        }
    }

    // Codes to numbers; tokens from `tokens` on are zeros.
    inline void convert(int tokens) const {
        const uint16* scales = reinterpret_cast<const uint16*>(raw + CODES);
#pragma unroll
        for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
            int row = i / 8, four = i % 8;
            char* to = numbers + row * STRIDE + 8 * four;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                uint32 scale = row < tokens ? scales[row * BLOCKS + b] * 0x10001u : 0;
                uint2 both = four_numbers<KIND, BLOCKS>(raw + row * code_bytes(KIND, DIM), four, b, scale);
                *reinterpret_cast<uint2*>(to + 2 * BLOCK * b) = both;
            }
        }
    }
};

// q float32 [rows, kv_heads * group, DIM], rotated -> out float32, likewise; with splits > 1 -> parts float32
// [rows, heads, splits, DIM] and states [rows, heads, splits], as of decode, from shares of each context.
// Rows of a sequence lie side by side, in order of their positions. scale: of the softmax, times log2 e.
// Grid: rows * group over M; KV heads; splits.
template <int DIM, KvKind KEYS, KvKind VALUES, int ROWS16, int TOKENS>
__global__ void __launch_bounds__(THREADS, DIM > 128 ? 1 : 2) prefill(
    const float* q, int rows, int kv_heads, int group, float scale, const int* positions, const int* slots,
    KV_PARAMETERS, int splits, float* parts, float2* states, float* out) {
    constexpr int M = 16 * ROWS16 * WARPS, STRIDE = 2 * DIM + 16, STEPS = DIM / 16;
    using KeyTile = Tile<DIM, KEYS, TOKENS>;
    using ValueTile = Tile<DIM, VALUES, TOKENS>;
    extern __shared__ __align__(16) char shared[];
    __shared__ int run_end;
    await_previous();
    KeyTile keys{shared + M * STRIDE, shared + M * STRIDE + 2 * KeyTile::BYTES};
    ValueTile values{shared + M * STRIDE + KeyTile::BYTES, keys.raw + KeyTile::RAW_BYTES};

    int lane = lane_id(), g = lane / 4, t = lane % 4, kv_head = blockIdx.y, split = blockIdx.z;
    int first_m = (gridDim.x - 1 - blockIdx.x) * M;  // long contexts first
    int first_row = first_m / group, end_row = min(rows, divide_up(first_m + M, group));
    int64 heads = int64(kv_heads) * group;

    for (int i = threadIdx.x; i < M * DIM / 4; i += THREADS) {
        int m = i / (DIM / 4), column = i % (DIM / 4) * 4, row = (first_m + m) / group;
        float4 x = make_float4(0, 0, 0, 0);
        if (row < rows) {
            int64 head = row * heads + kv_head * group + (first_m + m) % group;
            x = *reinterpret_cast<const float4*>(q + head * DIM + column);
        }
        *reinterpret_cast<uint2*>(shared + m * STRIDE + 2 * column) =
            make_uint2(pack(x.x * scale, x.y * scale), pack(x.z * scale, x.w * scale));
    }

    // This lane's rows of M: i / 2 picks 16 of them, i % 2 row g or g + 8.
    auto m_of = [&](int i) { return first_m + warp_id() * 16 * ROWS16 + i / 2 * 16 + i % 2 * 8 + g; };
    float o[ROWS16][2 * STEPS][4], reference[2 * ROWS16], total[2 * ROWS16];
#pragma unroll
    for (int i = 0; i < 2 * ROWS16; i++) {
        reference[i] = -INFINITY, total[i] = 0;
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++) o[i / 2][j][i % 2 * 2] = o[i / 2][j][i % 2 * 2 + 1] = 0;
    }

    // Rows of ldmatrix that this lane names: of queries and keys by k, of values by token.
    uint32 q_at = shared_address(shared) + (warp_id() * 16 * ROWS16 + lane % 16) * STRIDE + lane / 16 * 16;
    uint32 k_at = shared_address(keys.numbers) + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16;
    uint32 v_at = shared_address(values.numbers) + lane % 16 * STRIDE + lane / 16 * 16;

    for (int first = first_row, next; first < end_row; first = next) {
        // Rows `first` to `next` are of one sequence.
        int slot = slots[first];
        if (threadIdx.x == 0) run_end = end_row;
        __syncthreads();
        if (first + int(threadIdx.x) < end_row && slots[first + threadIdx.x] != slot) atomicMin(&run_end, first + int(threadIdx.x));
        __syncthreads();
        next = run_end;
        __syncthreads();
        int length = positions[next - 1] + 1;
        int all_see = first == first_row && next == end_row ? positions[first] + 1 : 0;
        int limits[2 * ROWS16];  // how many tokens a row sees; those that are never written see all
#pragma unroll
        for (int i = 0; i < 2 * ROWS16; i++) {
            int row = m_of(i) / group;
            limits[i] = row >= rows ? length + TOKENS : row >= first && row < next ? positions[row] + 1 : 0;
        }
        const int* pages = page_tables + int64(slot) * max_pages;
        int tiles = divide_up(length, TOKENS);
        int tile = int(int64(tiles) * split / splits), end = int(int64(tiles) * (split + 1) / splits);
        if (tile >= end) continue;

        auto place_of = [&](int at) { return find_keys(layer, page_bytes, head_bytes, pages, at / (PAGE_TOKENS / TOKENS), kv_head); };
        auto copy_keys = [&](const char* place, int at) {
            int token = at % (PAGE_TOKENS / TOKENS) * TOKENS;
            keys.copy(place, token, token + length - at * TOKENS - 1);
        };
        auto copy_values = [&](const char* place, int at) {
            int token = at % (PAGE_TOKENS / TOKENS) * TOKENS;
            values.copy(place + key_bytes, token, token + length - at * TOKENS - 1);
        };

        const char* place = place_of(tile);
        copy_keys(place, tile);
        close_copies();
        copy_values(place, tile);
        close_copies();
        for (; tile < end; tile++) {
            if (tile + 1 < end) place = place_of(tile + 1);
            wait_for_copies<1>();
            __syncthreads();
            if constexpr (KEYS != F16) {
                keys.convert(length - tile * TOKENS);
                __syncthreads();
                if (tile + 1 < end) copy_keys(place, tile + 1);
                close_copies();
            }

            float s[ROWS16][TOKENS / 8][4];
#pragma unroll
            for (int i = 0; i < ROWS16; i++) {
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0;
            }
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32 a[ROWS16][4];
#pragma unroll
                for (int i = 0; i < ROWS16; i++) load_matrices(a[i], q_at + i * 16 * STRIDE + 32 * step);
#pragma unroll
                for (int j = 0; j < TOKENS / 16; j++) {
                    uint32 b[4];
                    load_matrices(b, k_at + j * 16 * STRIDE + 32 * step);
#pragma unroll
                    for (int i = 0; i < ROWS16; i++) {
                        mma(s[i][2 * j], a[i], b[0], b[1]);
                        mma(s[i][2 * j + 1], a[i], b[2], b[3]);
                    }
                }
            }
            if constexpr (KEYS == F16) {
                __syncthreads();
                if (tile + 1 < end) copy_keys(place, tile + 1);
                close_copies();
            }

            if ((tile + 1) * TOKENS > all_see) {
#pragma unroll
                for (int i = 0; i < ROWS16; i++) {
#pragma unroll
                    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            if (tile * TOKENS + 8 * j + 2 * t + c % 2 >= limits[2 * i + c / 2]) s[i][j][c] = -INFINITY;
                        }
                    }
                }
            }
            float most[2 * ROWS16];
            bool outgrown = false;
#pragma unroll
            for (int i = 0; i < 2 * ROWS16; i++) {
                most[i] = -INFINITY;
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) most[i] = fmaxf(most[i], fmaxf(s[i / 2][j][i % 2 * 2], s[i / 2][j][i % 2 * 2 + 1]));
                outgrown |= most[i] > reference[i] + SLACK;
            }
            if (__any_sync(ALL_LANES, outgrown)) {
#pragma unroll
                for (int i = 0; i < 2 * ROWS16; i++) {
                    float m = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 1));
                    m = fmaxf(reference[i], fmaxf(m, __shfl_xor_sync(ALL_LANES, m, 2)));
                    float factor = reference[i] == -INFINITY ? 0 : exp2_fast(reference[i] - m);
                    reference[i] = m, total[i] *= factor;
#pragma unroll
                    for (int j = 0; j < 2 * STEPS; j++) o[i / 2][j][i % 2 * 2] *= factor, o[i / 2][j][i % 2 * 2 + 1] *= factor;
                }
            }
            uint32 weights[ROWS16][TOKENS / 8][2];
#pragma unroll
            for (int i = 0; i < 2 * ROWS16; i++) {
                float base = reference[i] == -INFINITY ? 0 : reference[i] - LIFT;
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) {
                    float x = exp2_fast(s[i / 2][j][i % 2 * 2] - base), y = exp2_fast(s[i / 2][j][i % 2 * 2 + 1] - base);
                    total[i] += x + y;
                    weights[i / 2][j][i % 2] = pack(x, y);
                }
            }

            wait_for_copies<1>();
            __syncthreads();
            if constexpr (VALUES != F16) {
                values.convert(length - tile * TOKENS);
                __syncthreads();
                if (tile + 1 < end) copy_values(place, tile + 1);
                close_copies();
            }
#pragma unroll
            for (int j = 0; j < TOKENS / 16; j++) {
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    uint32 b[4];
                    load_matrices_transposed(b, v_at + j * 16 * STRIDE + 32 * step);
#pragma unroll
                    for (int i = 0; i < ROWS16; i++) {
                        uint32 a[4] = {weights[i][2 * j][0], weights[i][2 * j][1], weights[i][2 * j + 1][0], weights[i][2 * j + 1][1]};
                        mma(o[i][2 * step], a, b[0], b[1]);
                        mma(o[i][2 * step + 1], a, b[2], b[3]);
                    }
                }
            }
            if constexpr (VALUES == F16) {
                __syncthreads();
                if (tile + 1 < end) copy_values(place, tile + 1);
                close_copies();
            }
        }
        wait_for_copies<0>();
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 2 * ROWS16; i++) {
        total[i] += __shfl_xor_sync(ALL_LANES, total[i], 1);
        total[i] += __shfl_xor_sync(ALL_LANES, total[i], 2);
        int m = m_of(i), row = m / group;
        if (row >= rows) continue;
        int64 head = row * heads + kv_head * group + m % group;
        float* to = out + head * DIM;
        float factor = 1 / total[i];
        if (splits > 1) {
            int64 at = head * splits + split;
            if (t == 0) states[at] = make_float2(reference[i], total[i]);
            if (reference[i] == -INFINITY) continue;
            to = parts + at * DIM, factor = 1;
        }
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++) {
            float2 two = make_float2(o[i / 2][j][i % 2 * 2] * factor, o[i / 2][j][i % 2 * 2 + 1] * factor);
            *reinterpret_cast<float2*>(to + 8 * j + 2 * t) = two;
        }
    }
}

#ifdef ALL_INSTANCES  // rather, some of each sort
#define INSTANCE(...)                           \
    template __global__ void prefill<__VA_ARGS__>( \
        const float*, int, int, int, float, const int*, const int*, KV_PARAMETERS, int, float*, float2*, float*)
#if __CUDA_ARCH__ >= 800
INSTANCE(128, F16, F16, 2, 64);
INSTANCE(128, Q8_0, Q4_0, 2, 64);
INSTANCE(80, F16, F16, 2, 64);
INSTANCE(256, F16, F16, 1, 32);
#else
INSTANCE(128, F16, F16, 2, 32);
INSTANCE(128, Q8_0, Q4_0, 2, 32);
INSTANCE(80, F16, F16, 2, 32);
INSTANCE(256, F16, F16, 1, 16);
#endif
#endif

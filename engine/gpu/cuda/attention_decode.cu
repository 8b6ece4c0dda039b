// Attention of single rows of possibly many sequences: memory-bound, so everything serves the loads.
//
// A block takes a share of one row's context for the query heads of one KV head; each of its warps reads
// tiles of 16 tokens straight into registers, in the layout in which tensor cores take them: S^T = K Q^T
// has 16 tokens by 8 heads, O^T = V^T P^T 16 dimensions by 8 heads. Which dimension a register stands for
// is free as long as both operands agree; it is chosen so that lanes read 16 bytes in a row. The next
// tile's keys are under way while this tile's values are waited for, and the other way round.
// Every warp of a row gets as many tiles, but for one.
//
// Softmax is online (Milakov & Gimelshein 2018), in base 2. The reference that scores are taken
// relative to follows the maximum only when that outgrows it by SLACK, so tiles seldom rescale.
#include "kv.cuh"
#include "mma.cuh"

constexpr int WARPS = DECODE_WARPS;
constexpr int MOST_ROWS = 16;  // of a step whose kernels overlap
constexpr float SLACK = 6;   // weights reach 2^(SLACK + LIFT), within float16's range,
constexpr float LIFT = 8;    // and small ones stay normal numbers

// Loads that keep their place among the volatile instructions around them.
#if __CUDA_ARCH__ >= 800
#define AHEAD ".L2::256B"  // what comes next is wanted too
#else
#define AHEAD ""
#endif
inline void load_early(uint32* d, const uint4* p) {
    asm volatile("ld.global.nc.L1::no_allocate" AHEAD ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(p));
}
inline void load_early(uint32* d, const uint2* p) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(p));
}
inline void load_early(uint32* d, const uint32* p) {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(d[0]) : "l"(p));
}
inline uint16 load_early(const uint16* p) {
    uint16 x;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(x) : "l"(p));
    return x;
}

// COUNT 16-bit numbers, whose address is a multiple of 2 COUNT bytes, in as few loads as that allows.
template <int COUNT> inline void load_halves(uint32* d, const char* p) {
    if constexpr (COUNT % 8 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) load_early(d + 4 * i, reinterpret_cast<const uint4*>(p) + i);
    } else if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) load_early(d + 2 * i, reinterpret_cast<const uint2*>(p) + i);
    } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) load_early(d + i, reinterpret_cast<const uint32*>(p) + i);
    } else {
        const uint16* q = reinterpret_cast<const uint16*>(p);
#pragma unroll
        for (int i = 0; i < COUNT; i++) d[i / 2] = i % 2 ? d[i / 2] | uint32(load_early(q + i)) << 16 : load_early(q + i);
    }
}

// Half I of a's halves with half J of b's, as a pair of 16 bits each.
template <int I, int J> inline uint32 pair(const uint32* a, const uint32* b) {
    return halves<I % 2, J % 2>(a[I / 2], b[J / 2]);
}

// Token of row g of a tile; that of row g + 8 is two further. Rows 2t, 2t+1, 2t+8, 2t+9 are tokens 4t to 4t+3.
inline int token_of_row() { return lane_id() / 8 * 4 + lane_id() / 4 % 2; }

// Keys of a tile: rows g and g + 8 of operand a, dimensions as `dimension` says.
template <int DIM, KvKind KIND> struct Keys {
    static constexpr int BLOCKS = DIM / BLOCK;
    static constexpr int HALVES = code_bytes(KIND, DIM) / 8;  // a lane reads a quarter of a token
    uint32 codes[2][(HALVES + 1) / 2];
    uint32 scales[2][KIND == F16 ? 1 : (BLOCKS + 1) / 2];

    // Tokens beyond the last one count as the last: what lies there may be anything.
    inline void load(const char* keys, int token, int last) {
        int t = lane_id() % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = min(token + token_of_row() + 2 * r, last);
            const char* p = keys + at * code_bytes(KIND, DIM);
            if constexpr (KIND == F16) {
#pragma unroll
                for (int j = 0; j < DIM / 32; j++) load_halves<8>(codes[r] + 4 * j, p + 64 * j + 16 * t);
                if constexpr (DIM % 32) load_halves<4>(codes[r] + DIM / 32 * 4, p + DIM / 32 * 64 + 8 * t);
            } else {
                if constexpr (KIND == Q8_0) {
                    load_halves<2 * BLOCKS>(codes[r], p + 4 * BLOCKS * t);
                    load_halves<2 * BLOCKS>(codes[r] + BLOCKS, p + 4 * BLOCKS * (t + 4));
                } else {
                    load_halves<2 * BLOCKS>(codes[r], p + 4 * BLOCKS * t);
                }
                load_halves<BLOCKS>(scales[r], keys + PAGE_TOKENS * code_bytes(KIND, DIM) + 2 * BLOCKS * at);
            }
        }
    }

    // The dimension that register I (0 1: k 2t 2t+1; 2 3: k 2t+8 2t+9) of step `step` holds in this lane.
    static inline int dimension(int step, int i) {
        int t = lane_id() % 4;
        if constexpr (KIND == F16) {
            if (DIM % 32 && step == DIM / 16 - 1) return 16 * step + 4 * t + i;
            return step / 2 * 32 + 8 * t + step % 2 * 4 + i;
        } else if constexpr (KIND == Q8_0) {
            return step / 2 * 32 + step % 2 * 16 + 4 * t + i;
        } else {
            return step / 2 * 32 + 8 * t + step % 2 * 2 + i / 2 + i % 2 * 4;
        }
    }

    // What stored codes exceed the numbers they stand for by, in those registers.
    static constexpr float bias(int i) { return KIND == F16 ? 0 : KIND == Q8_0 ? Q8_BIAS : i < 2 ? Q4_BIAS : Q4_BIAS_HIGH; }

    template <int STEP> inline void operand(uint32 (&a)[4]) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32* c = codes[r];
            if constexpr (KIND == F16) {
                a[r] = c[2 * STEP], a[2 + r] = c[2 * STEP + 1];
            } else if constexpr (KIND == Q8_0) {
                uint32 word = c[STEP / 2 + (STEP % 2) * BLOCKS];
                a[r] = low_bytes(word), a[2 + r] = high_bytes(word);
            } else {
                uint32 word = pair<STEP / 2, BLOCKS + STEP / 2>(c, c);
                if (STEP % 2) word >>= 8;
                a[r] = low_nibbles(word), a[2 + r] = high_nibbles(word);
            }
        }
    }

    template <int B> inline float scale(int r) const {
        return half_to_float(uint16(scales[r][B / 2] >> (16 * (B % 2))));
    }
};

// Values of a tile: tokens 4t to 4t+3; operand a has dimensions for rows and tokens for k.
template <int DIM, KvKind KIND> struct Values {
    static constexpr int BLOCKS = DIM / BLOCK;
    static constexpr int HALVES = code_bytes(KIND, DIM) / 16;  // a lane reads an eighth of a token
    uint32 codes[4][(HALVES + 1) / 2];
    uint32 scales[4][KIND == F16 ? 1 : (BLOCKS + 1) / 2];

    inline void load(const char* values, int token, int last) {
        int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int at = min(token + 4 * t + r, last);
            const char* p = values + at * code_bytes(KIND, DIM);
            if constexpr (KIND == F16) {
#pragma unroll
                for (int j = 0; j < DIM / 64; j++) load_halves<8>(codes[r] + 4 * j, p + 128 * j + 16 * g);
#pragma unroll
                for (int j = DIM / 64 * 4; j < DIM / 16; j++) load_halves<2>(codes[r] + j, p + 32 * j + 4 * g);
            } else {
                load_halves<HALVES>(codes[r], p + 2 * HALVES * g);
                load_halves<BLOCKS>(scales[r], values + PAGE_TOKENS * code_bytes(KIND, DIM) + 2 * BLOCKS * at);
            }
        }
    }

    // The dimension of row g of step `step`; that of row g + 8 is the next one.
    static inline int dimension(int step) {
        int g = lane_id() / 4;
        if constexpr (KIND == F16) {
            if (step >= DIM / 64 * 4) return 16 * step + 2 * g;
            return step / 4 * 64 + 8 * g + step % 4 * 2;
        } else {
            return step / 2 * 32 + 4 * g + step % 2 * 2;
        }
    }

    template <int STEP> inline void operand(uint32 (&a)[4]) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {  // tokens 4t 4t+1, then 4t+2 4t+3
            const uint32 *x = codes[2 * r], *y = codes[2 * r + 1];
            if constexpr (KIND == F16) {
                a[2 * r] = pair<2 * STEP, 2 * STEP>(x, y), a[2 * r + 1] = pair<2 * STEP + 1, 2 * STEP + 1>(x, y);
            } else {
                constexpr int B = STEP / 2;
                uint32 scale = pair<B, B>(scales[2 * r], scales[2 * r + 1]);
                if constexpr (KIND == Q8_0) {
                    uint32 bytes = pair<STEP, STEP>(x, y);
                    a[2 * r] = add_halves(even_bytes(bytes), MINUS_Q8_BIAS);
                    a[2 * r + 1] = add_halves(odd_bytes(bytes), MINUS_Q8_BIAS);
                } else {
                    uint32 nibbles = pair<B, B>(x, y) >> (STEP % 2 * 8);
                    a[2 * r] = add_halves(low_nibbles(nibbles), MINUS_Q4_BIAS);
                    a[2 * r + 1] = add_halves(high_nibbles(nibbles), MINUS_Q4_BIAS_HIGH);
                }
                a[2 * r] = multiply_halves(a[2 * r], scale), a[2 * r + 1] = multiply_halves(a[2 * r + 1], scale);
            }
        }
    }
};

template <int I> struct Index { static constexpr int value = I; };

// Calls f(Index<0>()), ... f(Index<COUNT - 1>()).
template <int COUNT, int AT = 0, class F> inline void unroll(const F& f) {
    if constexpr (AT < COUNT) {
        f(Index<AT>());
        unroll<COUNT, AT + 1>(f);
    }
}

// Queries of 8 heads: operand b of every step, float16, times the softmax's scale; and what the bias of
// stored codes adds to the scores of this lane's heads 2t and 2t + 1, per block.
template <int DIM, KvKind KIND> struct Queries {
    static constexpr int BLOCKS = KIND == F16 ? 1 : DIM / BLOCK;
    uint32 b[DIM / 16][2];
    float bias[BLOCKS][2];

    // q float32 [heads, DIM]; missing heads count as zeros.
    inline void load(const float* q, int heads, float scale) {
        int g = lane_id() / 4, t = lane_id() % 4;
        const float* mine = q + g * DIM;
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) bias[block][0] = 0;
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = g < heads ? mine[Keys<DIM, KIND>::dimension(step, 2 * i)] : 0;
                float y = g < heads ? mine[Keys<DIM, KIND>::dimension(step, 2 * i + 1)] : 0;
                b[step][i] = pack(x * scale, y * scale);
                if constexpr (KIND != F16) {
                    float sum = half_to_float(uint16(b[step][i])) + half_to_float(uint16(b[step][i] >> 16));
                    bias[step / 2][0] -= Keys<DIM, KIND>::bias(2 * i) * sum;
                }
            }
        }
#pragma unroll
        for (int block = 0; KIND != F16 && block < BLOCKS; block++) {
            float sum = bias[block][0];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            bias[block][0] = __shfl_sync(ALL_LANES, sum, 8 * t);
            bias[block][1] = __shfl_sync(ALL_LANES, sum, 8 * t + 4);
        }
    }
};

// Scores of a tile's tokens (rows) for the heads (columns) of each of `queries`.
template <int DIM, int HEADS8, KvKind KIND>
inline void score(const Keys<DIM, KIND>& keys, const Queries<DIM, KIND> (&queries)[HEADS8], float (&s)[HEADS8][4]) {
#pragma unroll
    for (int h = 0; h < HEADS8; h++) s[h][0] = s[h][1] = s[h][2] = s[h][3] = 0;
    if constexpr (KIND == F16) {
        unroll<DIM / 16>([&](auto step) {
            uint32 a[4];
            keys.template operand<step.value>(a);
#pragma unroll
            for (int h = 0; h < HEADS8; h++) mma(s[h], a, queries[h].b[step.value][0], queries[h].b[step.value][1]);
        });
    } else {
        unroll<DIM / BLOCK>([&](auto block) {
            constexpr int B = block.value;
            uint32 a[2][4];
            keys.template operand<2 * B>(a[0]);
            keys.template operand<2 * B + 1>(a[1]);
            float scales[2] = {keys.template scale<B>(0), keys.template scale<B>(1)};
#pragma unroll
            for (int h = 0; h < HEADS8; h++) {
                const float* bias = queries[h].bias[B];
                float c[4] = {bias[0], bias[1], bias[0], bias[1]};
                mma(c, a[0], queries[h].b[2 * B][0], queries[h].b[2 * B][1]);
                mma(c, a[1], queries[h].b[2 * B + 1][0], queries[h].b[2 * B + 1][1]);
#pragma unroll
                for (int j = 0; j < 4; j++) s[h][j] += scales[j / 2] * c[j];
            }
        });
    }
}

// What a warp has so far: O^T unnormalised, the reference of its weights and this lane's share of their sum,
// for heads 2t and 2t + 1.
template <int DIM, int HEADS8> struct Sums {
    float out[HEADS8][DIM / 16][4];
    float reference[HEADS8][2], total[HEADS8][2];

    inline void clear() {
#pragma unroll
        for (int h = 0; h < HEADS8; h++) {
#pragma unroll
            for (int i = 0; i < DIM / 16; i++) out[h][i][0] = out[h][i][1] = out[h][i][2] = out[h][i][3] = 0;
            reference[h][0] = reference[h][1] = -INFINITY;
            total[h][0] = total[h][1] = 0;
        }
    }

    // Makes a head's sums relative to another reference.
    inline void rescale(int h, int head, float to) {
        float factor = reference[h][head] == -INFINITY ? 0 : exp2_fast(reference[h][head] - to);
        reference[h][head] = to;
        total[h][head] *= factor;
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) out[h][i][head] *= factor, out[h][i][2 + head] *= factor;
    }
};

// Scores to weights 2^(score - reference + LIFT), in place.
template <int DIM, int HEADS8, int TILES>
inline void soften(float (&s)[TILES][HEADS8][4], Sums<DIM, HEADS8>& sums) {
    float most[HEADS8][2];
    bool outgrown = false;
#pragma unroll
    for (int h = 0; h < HEADS8; h++) {
#pragma unroll
        for (int head = 0; head < 2; head++) {
            most[h][head] = fmaxf(s[0][h][head], s[0][h][2 + head]);
#pragma unroll
            for (int i = 1; i < TILES; i++) most[h][head] = fmaxf(most[h][head], fmaxf(s[i][h][head], s[i][h][2 + head]));
            outgrown |= most[h][head] > sums.reference[h][head] + SLACK;
        }
    }
    if (__any_sync(ALL_LANES, outgrown)) {
#pragma unroll
        for (int h = 0; h < HEADS8; h++) {
#pragma unroll
            for (int head = 0; head < 2; head++) {
                float m = most[h][head];
#pragma unroll
                for (int step = 4; step < WARP; step *= 2) m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, step));
                sums.rescale(h, head, fmaxf(m, sums.reference[h][head]));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < HEADS8; h++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s[i][h][c] = exp2_fast(s[i][h][c] - (sums.reference[h][c % 2] - LIFT));
                sums.total[h][c % 2] += s[i][h][c];
            }
        }
    }
}

// Adds up the warps' sums and writes them, unnormalised, with their reference and total: to `parts` and `states`,
// which are `splits` rows of DIM and states apart from head to head.
template <int DIM, int HEADS8, KvKind VALUES>
inline void write_sums(const Sums<DIM, HEADS8>& sums, int heads, int splits, float* parts, float2* states) {
    constexpr int STEPS = DIM / 16;
    __shared__ float4 outs[WARPS][STEPS][WARP];
    __shared__ float2 both[WARPS][HEADS8][2][4];  // reference and total of heads 2t and 2t + 1
    int warp = warp_id(), lane = lane_id(), t = lane % 4;
#pragma unroll
    for (int h = 0; h < HEADS8; h++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = sums.total[h][i];
#pragma unroll
            for (int lanes = 4; lanes < WARP; lanes *= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
            if (lane < 4) both[warp][h][i][t] = make_float2(sums.reference[h][i], total);
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS8; h++) {
        if (h > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const float* o = sums.out[h][i];
            outs[warp][i][lane] = make_float4(o[0], o[1], o[2], o[3]);
        }
        __syncthreads();
        float factors[WARPS][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float reference = -INFINITY, total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) reference = fmaxf(reference, both[w][h][i][t].x);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float2 state = both[w][h][i][t];
                factors[w][i] = state.x == -INFINITY ? 0 : exp2_fast(state.x - reference);
                total += factors[w][i] * state.y;
            }
            int head = 8 * h + 2 * t + i;
            if (warp == 0 && lane < 4 && head < heads) states[int64(head) * splits] = make_float2(reference, total);
        }
        for (int i = warp; i < STEPS; i += WARPS) {
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float4 o = outs[w][i][lane];
                sum.x += factors[w][0] * o.x, sum.y += factors[w][1] * o.y;
                sum.z += factors[w][0] * o.z, sum.w += factors[w][1] * o.w;
            }
            float* to = parts + int64(8 * h + 2 * t) * splits * DIM + Values<DIM, VALUES>::dimension(i);
            if (8 * h + 2 * t < heads) *reinterpret_cast<float2*>(to) = make_float2(sum.x, sum.z);
            if (8 * h + 2 * t + 1 < heads) *reinterpret_cast<float2*>(to + int64(splits) * DIM) = make_float2(sum.y, sum.w);
        }
    }
}

// q float32 [rows, kv_heads * group, DIM], rotated -> parts float32 [rows, heads, splits, DIM], relative to and
// with sums of states [rows, heads, splits]. scale: of the softmax, times log2 e.
// Grid: KV heads, for each 8 HEADS8 of its query heads; rows; splits, so that blocks without work come last.
// How many splits a row has work for follows from its length alone, and so do all of its sums. TILES: that a warp takes at once. RESIDENT: blocks
// that a multiprocessor is to have room for.
template <int DIM, int HEADS8, KvKind KEYS, KvKind VALUES, int TILES, int RESIDENT>
__global__ void __launch_bounds__(WARPS * WARP, RESIDENT) decode(
    const float* q, int kv_heads, int group, float scale, const int* positions, const int* slots, KV_PARAMETERS,
    int splits, float* parts, float2* states) {
    int split = blockIdx.z, row = blockIdx.y, kv_head = blockIdx.x % kv_heads;
    int first_head = blockIdx.x / kv_heads * 8 * HEADS8, heads = min(group - first_head, 8 * HEADS8);
    int slot = slots[row], length = positions[row] + 1, used = used_splits(splits, length, TILES);
    if (split >= used) return;
    const int* pages = page_tables + int64(slot) * max_pages;
    int64 head = int64(row) * kv_heads * group + kv_head * group + first_head;

    // This warp's tiles.
    int tiles = divide_up(length, TILE), share = split * WARPS + warp_id();
    int tile = int(int64(tiles) * share / (used * WARPS)), end = int(int64(tiles) * (share + 1) / (used * WARPS));

    Keys<DIM, KEYS> keys[TILES];
    Values<DIM, VALUES> values[TILES];
    const char* places[TILES];
    // Where tile at + i is; in place of one beyond the end, the last.
    auto find = [&](int at) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            int page = min(at + i, end - 1) / (PAGE_TOKENS / TILE);
            places[i] = find_keys(layer, page_bytes, head_bytes, pages, page, kv_head);
        }
    };
    auto first_token = [&](int at) { return min(at, end - 1) % (PAGE_TOKENS / TILE) * TILE; };
    auto last_token = [&](int at) { return min(PAGE_TOKENS, length - min(at, end - 1) / (PAGE_TOKENS / TILE) * PAGE_TOKENS) - 1; };
    auto load_keys = [&](int at) {
#pragma unroll
        for (int i = 0; i < TILES; i++) keys[i].load(places[i], first_token(at + i), last_token(at + i));
    };
    auto load_values = [&](int at) {
#pragma unroll
        for (int i = 0; i < TILES; i++) values[i].load(places[i] + key_bytes, first_token(at + i), last_token(at + i));
    };

    // Tokens of this step may still be on their way to the pool, older ones are there.
    bool old = (tile + TILES) * TILE + MOST_ROWS <= length;
    if (tile < end) find(tile);
    if (tile < end && old) load_keys(tile), load_values(tile);
    await_previous();
    if (tile < end && !old) load_keys(tile), load_values(tile);
    Queries<DIM, KEYS> queries[HEADS8];
#pragma unroll
    for (int h = 0; h < HEADS8; h++) queries[h].load(q + (head + 8 * h) * DIM, heads - 8 * h, scale);
    Sums<DIM, HEADS8> sums;
    sums.clear();

    for (int next; tile < end; tile = next) {
        next = tile + TILES;
        if (next < end) find(next);
        float s[TILES][HEADS8][4];
#pragma unroll
        for (int i = 0; i < TILES; i++) score(keys[i], queries, s[i]);
        if (next < end) load_keys(next);
        if (next > end || next * TILE > length) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                int left = tile + i < end ? length - (tile + i) * TILE - token_of_row() : 0;
#pragma unroll
                for (int h = 0; h < HEADS8; h++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (j / 2 * 2 >= left) s[i][h][j] = -INFINITY;
                    }
                }
            }
        }
        soften<DIM, HEADS8, TILES>(s, sums);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint32 b[HEADS8][2];
#pragma unroll
            for (int h = 0; h < HEADS8; h++) {
                b[h][0] = transpose(pack(s[i][h][0], s[i][h][1]));
                b[h][1] = transpose(pack(s[i][h][2], s[i][h][3]));
            }
            unroll<DIM / 16>([&](auto step) {
                uint32 a[4];
                values[i].template operand<step.value>(a);
#pragma unroll
                for (int h = 0; h < HEADS8; h++) mma(sums.out[h][step.value], a, b[h][0], b[h][1]);
            });
        }
        if (next < end) load_values(next);
    }
    write_sums<DIM, HEADS8, VALUES>(sums, heads, splits, parts + (head * splits + split) * DIM, states + head * splits + split);
}

#ifdef ALL_INSTANCES  // rather, some of each sort
#define INSTANCE(...)                          \
    template __global__ void decode<__VA_ARGS__>( \
        const float*, int, int, float, const int*, const int*, KV_PARAMETERS, int, float*, float2*)
INSTANCE(128, 1, F16, F16, 1, 3);
INSTANCE(128, 2, Q8_0, Q8_0, 2, 2);
INSTANCE(64, 1, Q4_0, F16, 2, 3);
INSTANCE(96, 2, Q4_0, Q8_0, 2, 2);
INSTANCE(80, 1, F16, F16, 1, 3);
#endif

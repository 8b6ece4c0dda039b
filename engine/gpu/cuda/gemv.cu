// Products of a matrix with up to 16 rows of activations: out[r] = W x[r], or out[r] += W x[r].
//
// Quantized weights stay as they are: integer tensor cores multiply their codes with x, of which each 32
// numbers become 15-bit integers under one scale, held as high * 128 + low in two bytes, so that a product
// over 32 (or 16) columns is exact before it is scaled in float32. Nothing that a row's result is made of,
// nor the order of its sums, depends on the number of rows.
#include "formats.cuh"

constexpr int WARPS = 16, THREADS = WARPS * WARP;
constexpr int AHEAD = 2;                            // tiles to a batch that a warp loads
constexpr int HIGHEST = 127 * 128;                  // of the integers that stand for x
constexpr int X_BYTES = 64;                         // of 32 numbers of x: high bytes, low bytes

// Flags of a product: out += instead of out =; the next kernel reads x too, without waiting for this one.
constexpr int ADD = 1, SHARE_X = 2;

struct Product {
    const uint8* weights;
    float* out;                                     // [x rows, out_rows]
    int64 out_rows;
};
struct Products {                                   // of the same x and format
    Product each[4];
    int64 count;
};
struct Place {                                      // 16 rows of one of them
    const uint8* weights;
    float* out;
    int out_rows, first_row;
};

inline void mma32(int (&c)[4], const uint32 (&a)[4], uint2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#else
#pragma unroll
    for (int j = 0; j < 4; j++)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(c[j % 2 * 2]), "+r"(c[j % 2 * 2 + 1]) : "r"(a[j]), "r"(j < 2 ? b.x : b.y));
#endif
}
inline void mma16(int (&c)[4], uint32 a0, uint32 a1, uint32 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(c[0]), "+r"(c[1]) : "r"(a0), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+r"(c[2]), "+r"(c[3]) : "r"(a1), "r"(b));
#endif
}

// What x becomes in shared memory: for each block of 32 columns and each row, X_BYTES of codes in the order of
// operand B, and the scale, with the sums of the scaled integers where the format adds an offset.
template <class F> struct Activations {
    static constexpr int FLOATS = F::HALVES && F::OFFSET ? 4 : 2;  // scale, sum | its halves
    uint8* codes;
    float* scales;
    int rows;
};

// Four numbers of a row of x, columns 4 j .. 4 j + 3 of a block, j = lane % 8; eight lanes do a block together.
template <class F> inline void quantize(const Activations<F>& to, float4 v, int row, int block, bool inside) {
    int j = lane_id() % 8;
    float top = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int step = 4; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
    float inverse = top > 1e-30f ? __fdividef(HIGHEST, top) : 0.0f, scale = __fmul_rn(top, 1.0f / HIGHEST);
    int q[4] = {__float2int_rn(__fmul_rn(v.x, inverse)), __float2int_rn(__fmul_rn(v.y, inverse)),
                __float2int_rn(__fmul_rn(v.z, inverse)), __float2int_rn(__fmul_rn(v.w, inverse))};
    uint32 high = 0, low = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int h = (q[i] + 64) >> 7;
        high |= (h & 255) << 8 * i;
        low |= (q[i] - 128 * h & 255) << 8 * i;
        sum += q[i];
    }
    int other = 0;                                  // the sum of the half of the block that is not this lane's
    if constexpr (F::OFFSET) {
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        other = __shfl_xor_sync(ALL_LANES, sum, 4);
    }
    if (!inside) return;
    int at = block * to.rows + row;
    uint32* codes = (uint32*)(to.codes + at * X_BYTES) + j % 4 * 2 + j / 4;
    codes[0] = high, codes[8] = low;
    if (j) return;
    float* scales = to.scales + at * Activations<F>::FLOATS;
    scales[0] = scale, scales[1] = __fmul_rn(scale, float(sum + other));
    if constexpr (Activations<F>::FLOATS == 4) scales[2] = __fmul_rn(scale, float(sum)), scales[3] = __fmul_rn(scale, float(other));
}

// A warp's reader of blocks first .. last - 1 of x, float32 [rows, cols]: eight lanes a block, eight loads at a time.
template <int NT> struct Reader {
    static constexpr int ROWS = NT == 1 ? 4 : 8, BLOCKS = 8 / ROWS;
    const float* x;
    int cols, rows, last, block, row;
    float4 values[BLOCKS][ROWS];

    void load() {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int at = (block + 4 * i) * BLOCK_COLS + 4 * lane_id();
                bool inside = row + r < rows && block + 4 * i + lane_id() / 8 < last && at < cols;
                values[i][r] = inside ? *(const float4*)(x + int64(row + r) * cols + at) : make_float4(0, 0, 0, 0);
            }
    }
    template <class F> void quantize_all(const Activations<F>& to) {
        while (block < last) {
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    int mine = block + 4 * i + lane_id() / 8;
                    if (row + r < rows && block + 4 * i < last) quantize<F>(to, values[i][r], row + r, mine, mine < last);
                }
            row += ROWS;
            if (row >= rows) row = 0, block += 4 * BLOCKS;
            if (block < last) load();
        }
    }
};

// acc += one block of a tile times x. acc[n][i]: row g + 8 i of the tile, row 4 n + t of x.
template <class F, int NT, int BLOCK>
inline void multiply_block(float (&acc)[NT][2], const typename F::Tile& tile, const Activations<F>& x, int block) {
    uint32 a[4] = {F::template bytes<BLOCK, 0>(tile), F::template bytes<BLOCK, 1>(tile), F::template bytes<BLOCK, 2>(tile),
                   F::template bytes<BLOCK, 3>(tile)};
    Affine first = F::template affine<BLOCK, 0>(tile), second = F::template affine<BLOCK, 1>(tile);
    int lane = lane_id();
#pragma unroll
    for (int n = 0; n < NT; n++) {
        uint2 b = {0, 0};
        if (4 * n + lane / 8 < x.rows) b = *(const uint2*)(x.codes + (block * x.rows + 4 * n) * X_BYTES + lane * 8);
        const float* s = x.scales + (block * x.rows + min(4 * n + lane % 4, x.rows - 1)) * Activations<F>::FLOATS;
        float scale = s[0];
        int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        if constexpr (F::HALVES) mma16(c, a[0], a[1], b.x), mma16(d, a[2], a[3], b.y);
        else mma32(c, a, b);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float dot = __fmul_rn(scale, float(c[2 * i] * 128 + c[2 * i + 1]));
            acc[n][i] = fmaf(first.scale[i], dot, acc[n][i]);
            if constexpr (F::HALVES) {
                dot = __fmul_rn(scale, float(d[2 * i] * 128 + d[2 * i + 1]));
                acc[n][i] = fmaf(second.scale[i], dot, acc[n][i]);
            }
            // Bytes of a format with an offset are its codes: UNIT is 1.
            if constexpr (F::OFFSET && F::HALVES) {
                acc[n][i] = fmaf(first.offset[i], s[2], acc[n][i]);
                acc[n][i] = fmaf(second.offset[i], s[3], acc[n][i]);
            } else if constexpr (F::OFFSET) acc[n][i] = fmaf(first.offset[i], s[1], acc[n][i]);
        }
    }
}

// x: float32 [rows, cols], rows <= 4 NT. Each block takes groups of 16 weight rows, grid-wide in turns; its warps
// share the columns out among themselves and add up in order. Shared memory: see Activations, then float32
// [2][WARPS][rows][16].
template <class F, int NT>
__forceinline__ void multiply_rows(const Products& products, const float* x, int cols, int rows, int flags) {
    extern __shared__ __align__(16) uint8 shared[];
    int tiles = divide_up(cols, TILE_COLS), warp = warp_id(), lane = lane_id();
    int first = tiles * warp / WARPS, last = tiles * (warp + 1) / WARPS;
    Activations<F> activations = {shared, (float*)(shared + 2 * tiles * rows * X_BYTES), rows};
    float* partial = activations.scales + 2 * tiles * rows * Activations<F>::FLOATS;

    auto find = [&](int group) {                    // group: 16 rows of all products together
        Place place = {};
        int end = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int start = end, out_rows = products.each[i].out_rows;
            end += i < products.count ? divide_up(out_rows, TILE_ROWS) : 0;
            if (group >= start && group < end)
                place = {products.each[i].weights + (group - start) * F::row_bytes(tiles), products.each[i].out,
                         out_rows, (group - start) * TILE_ROWS};
        }
        return place;
    };

    // A warp goes through its share of the tiles of all its groups, AHEAD at a time, two such batches in flight.
    struct Cursor {
        Place place;
        int group, tile;
    };
    auto advance = [&](Cursor& at) {
        at.tile += AHEAD;
        if (at.tile >= last) at.tile = first, at.group += gridDim.x, at.place = find(at.group);
    };
    typename F::Tile even[AHEAD], odd[AHEAD];
    Cursor here = {find(blockIdx.x), int(blockIdx.x), first}, ahead = here;
    auto load = [&](typename F::Tile (&to)[AHEAD]) {
        if (!ahead.place.weights) return;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (ahead.tile + i < last) F::load(to[i], ahead.place.weights, ahead.tile + i, lane);
        advance(ahead);
    };

    Reader<NT> reader = {x, cols, rows, 2 * last, 2 * first, 0};
    if constexpr (OVERLAPS) {                       // the weights, which are there, before x, which may not be
        load(even);
        load(odd);
        if (flags & SHARE_X) await_previous_first();
        else await_previous();
        reader.load();
    } else {
        reader.load();                              // before the weights, which keep the memory busy
        load(even);
        load(odd);
    }
    reader.quantize_all(activations);
    __syncwarp();

    float acc[NT][2] = {};
    int turn = 0;
    auto multiply = [&](typename F::Tile (&tiles)[AHEAD]) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (here.tile + i < last) {
                multiply_block<F, NT, 0>(acc, tiles[i], activations, 2 * (here.tile + i));
                multiply_block<F, NT, 1>(acc, tiles[i], activations, 2 * (here.tile + i) + 1);
            }
        load(tiles);
        if (here.tile + AHEAD >= last) {
            float* sums = partial + turn * WARPS * TILE_ROWS * rows;
            turn ^= 1;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (4 * n + lane % 4 < rows) {
                    float* p = sums + (warp * rows + 4 * n + lane % 4) * TILE_ROWS + lane / 4;
                    p[0] = acc[n][0], p[8] = acc[n][1];
                }
                acc[n][0] = acc[n][1] = 0;
            }
            __syncthreads();
            int row = here.place.first_row + threadIdx.x % TILE_ROWS;
            if (threadIdx.x < TILE_ROWS * rows && row < here.place.out_rows) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total = __fadd_rn(total, sums[w * TILE_ROWS * rows + threadIdx.x]);
                float* to = here.place.out + int64(threadIdx.x / TILE_ROWS) * here.place.out_rows + row;
                *to = flags & ADD ? fmaf(total, F::UNIT, *to) : total * F::UNIT;
            }
        }
        advance(here);
    };
    while (here.place.weights) {
        multiply(even);
        if (here.place.weights) multiply(odd);
    }
}

template <class F, int NT> __global__ void __launch_bounds__(THREADS, 1)
gemv(const __grid_constant__ Products products, const float* x, int cols, int rows, int flags) {
    multiply_rows<F, NT>(products, x, cols, rows, flags);
}

// Up to two matrices of each of many experts, which follow one another `bytes` apart.
struct Experts {
    Product each[2];                                // of expert 0; out: [pairs, out_rows]
    int64 bytes[2];
    int64 count;
};

// The products of a (row, choice) pair's expert ids[pair] with row pair / per_row of x.
inline Products choose(const Experts& experts, const int* ids, int pair) {
    Products chosen = {};
    chosen.count = experts.count;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Product& of_first = experts.each[i];
        chosen.each[i] = {of_first.weights + ids[pair] * experts.bytes[i], of_first.out + pair * of_first.out_rows,
                          of_first.out_rows};
    }
    return chosen;
}

// Grid: blocks that share a pair's groups, pairs. A pair's result does not depend on either.
template <class F> __global__ void __launch_bounds__(THREADS, 1)
gemv_experts(const __grid_constant__ Experts experts, const int* ids, const float* x, int per_row, int cols) {
    await_previous();
    int pair = blockIdx.y;
    multiply_rows<F, 1>(choose(experts, ids, pair), x + int64(pair / per_row) * cols, cols, 1, 0);
}

// --- matrices of floats ---------------------------------------------------------------------------

constexpr int FLOAT_WARPS = 8, FLOAT_ROWS = 4;

// Sums of N values over a warp, each by the same tree. The lane is left with one (with N / 32) of them in v,
// the result being the index of the first.
template <int N, int STEP = 16> inline int sum_values(float* v) {
    if constexpr (STEP == 0) return 0;
    else if constexpr (N == 1) {
        v[0] = __fadd_rn(v[0], __shfl_xor_sync(ALL_LANES, v[0], STEP));
        return sum_values<1, STEP / 2>(v);
    } else {
        bool upper = lane_id() & STEP;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            float sent = upper ? v[i] : v[i + N / 2], kept = upper ? v[i + N / 2] : v[i];
            v[i] = __fadd_rn(kept, __shfl_xor_sync(ALL_LANES, sent, STEP));
        }
        return (upper ? N / 2 : 0) + sum_values<N / 2, STEP / 2>(v);
    }
}

// weights: F [out_rows, cols]; x: float32 [rows, cols], rows <= R; out: float32 [rows, out_rows]. A block takes
// FLOAT_ROWS weight rows; its threads share the columns out.
template <class F, int R>
__forceinline__ void multiply_floats(const uint8* weights, const float* x, int out_rows, int cols, int rows, float* out, int flags) {
    constexpr int VECTOR = 16 / F::SIZE, SUMS = FLOAT_ROWS * R;
    __shared__ float partial[FLOAT_WARPS][SUMS];
    int64 first = int64(blockIdx.x) * FLOAT_ROWS;
    float acc[SUMS] = {};
    uint4 raw[FLOAT_ROWS];
    auto load = [&](int col) {
        if (col >= cols) return;
#pragma unroll
        for (int i = 0; i < FLOAT_ROWS; i++) {
            int64 row = min(first + i, int64(out_rows - 1));
            raw[i] = load_once((const uint4*)(weights + (row * cols + col) * F::SIZE));
        }
    };
    load(threadIdx.x * VECTOR);
    if (flags & SHARE_X) await_previous_first();
    else await_previous();
    for (int col = threadIdx.x * VECTOR; col < cols; col += FLOAT_WARPS * WARP * VECTOR) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float4* p = (const float4*)(x + int64(min(r, rows - 1)) * cols + col);
#pragma unroll
            for (int part = 0; part < VECTOR / 4; part++) {
                float4 v = p[part];
#pragma unroll
                for (int i = 0; i < FLOAT_ROWS; i++) {
                    const uint8* w = (const uint8*)&raw[i] + 4 * part * F::SIZE;
                    float& sum = acc[i * R + r];
                    sum = fmaf(F::number(w), v.x, sum);
                    sum = fmaf(F::number(w + F::SIZE), v.y, sum);
                    sum = fmaf(F::number(w + 2 * F::SIZE), v.z, sum);
                    sum = fmaf(F::number(w + 3 * F::SIZE), v.w, sum);
                }
            }
        }
        load(col + FLOAT_WARPS * WARP * VECTOR);
    }
    int at = sum_values<SUMS>(acc);
    constexpr int KEPT = SUMS > WARP ? SUMS / WARP : 1;
#pragma unroll
    for (int i = 0; i < KEPT; i++) partial[warp_id()][at + i] = acc[i];
    __syncthreads();
    int i = threadIdx.x / R, r = threadIdx.x % R;
    if (threadIdx.x < SUMS && r < rows && first + i < out_rows) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < FLOAT_WARPS; w++) total = __fadd_rn(total, partial[w][threadIdx.x]);
        float* to = out + int64(r) * out_rows + first + i;
        *to = flags & ADD ? __fadd_rn(*to, total) : total;
    }
}

template <class F, int R> __global__ void __launch_bounds__(FLOAT_WARPS * WARP)
gemv_floats(const uint8* weights, const float* x, int out_rows, int cols, int rows, float* out, int flags) {
    multiply_floats<F, R>(weights, x, out_rows, cols, rows, out, flags);
}

// Grid: the blocks of the wider matrix, pairs, matrices.
template <class F> __global__ void __launch_bounds__(FLOAT_WARPS * WARP)
gemv_experts_floats(const __grid_constant__ Experts experts, const int* ids, const float* x, int per_row, int cols) {
    await_previous();
    int pair = blockIdx.y;
    Product mine = choose(experts, ids, pair).each[blockIdx.z];
    if (int64(blockIdx.x) * FLOAT_ROWS >= mine.out_rows) return;
    multiply_floats<F, 1>(mine.weights, x + int64(pair / per_row) * cols, int(mine.out_rows), cols, 1, mine.out, 0);
}

#ifdef ALL_INSTANCES  // for the compiler: of every format, one number of rows is enough
#define INSTANCES(F)                                                                                            \
    template __global__ void gemv<F, 4>(const __grid_constant__ Products, const float*, int, int, int);             \
    template __global__ void gemv_experts<F>(const __grid_constant__ Experts, const int*, const float*, int, int);
INSTANCES(Q8_0) INSTANCES(Q4_0) INSTANCES(Q4_1) INSTANCES(Q5_0) INSTANCES(Q5_1) INSTANCES(Q2_K) INSTANCES(Q3_K)
INSTANCES(Q4_K) INSTANCES(Q5_K) INSTANCES(Q6_K) INSTANCES(IQ4_NL) INSTANCES(IQ4_XS) INSTANCES(MXFP4)
#define FLOAT_INSTANCES(F, R)                                                                                   \
    template __global__ void gemv_floats<F, R>(const uint8*, const float*, int, int, int, float*, int);             \
    template __global__ void gemv_experts_floats<F>(const __grid_constant__ Experts, const int*, const float*, int, int);
FLOAT_INSTANCES(F32, 8) FLOAT_INSTANCES(F16, 8) FLOAT_INSTANCES(BF16, 8)
#endif

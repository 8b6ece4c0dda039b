// Matrices from GGUF's blocks to tiles (formats.cuh), and from tiles to numbers.
#include "formats.cuh"

constexpr int THREADS = 256;

inline int64 thread_id() { return int64(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class F> inline uint32 both_rows(const uint8* const (&p)[2], int at) {
    return (p[0] ? read_u16(p[0] + at) : 0) | uint32(p[1] ? read_u16(p[1] + at) : 0) << 16;
}

// raw: uint8 [rows, row_bytes], GGUF rows, the first a multiple of 16; out: where their tiles begin.
// One thread for each lane of each tile. What lies outside the matrix becomes zero.
template <class F> __global__ void repack(const uint8* raw, int64 row_bytes, int rows, int cols, int tiles, uint8* out) {
    await_previous();
    int64 id = thread_id();
    int lane = id % WARP, g = lane / 4, t = lane % 4;
    int tile = id / WARP % tiles;
    int64 group = id / WARP / tiles;
    if (group * TILE_ROWS >= rows) return;
    uint8* base = out + group * F::row_bytes(tiles);
    uint8* to = base + F::tile_at(tile);
    typename F::Tile packed = {};
    const uint8* row[2];
    for (int i = 0; i < 2; i++) {
        int64 number = group * TILE_ROWS + g + 8 * i;
        row[i] = number < rows ? raw + number * row_bytes : nullptr;
    }
    for (int block = 0; block < 2; block++) {
        int col = tile * TILE_COLS + block * BLOCK_COLS, inside = col % F::COLS, sub = inside / (F::HALVES ? 16 : 32);
        const uint8* p[2];
        for (int i = 0; i < 2; i++) p[i] = row[i] && col < cols ? row[i] + int64(col / F::COLS) * F::BYTES : nullptr;
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                if (!p[j % 2]) continue;
                uint32 code = F::code(p[j % 2], inside + 16 * (j / 2) + 4 * t + i);
                uint32 low = code & ((1u << F::LOW) - 1), high = code >> F::LOW;
                if constexpr (F::CODES == TABLE_IQ4 || F::CODES == TABLE_FP4) packed.low[j] |= low << (16 * block + 4 * i);
                else if constexpr (F::LOW == 8) packed.low[4 * block + j] |= low << 8 * i;
                else if constexpr (F::LOW == 4) packed.low[j] |= low << (8 * i + 4 * block);
                else packed.low[block] |= low << (8 * i + 2 * j);
                if constexpr (F::HIGH == 1) packed.high[0] |= high << (8 * i + j + 4 * block);
                if constexpr (F::HIGH == 2) packed.high[block] |= high << (8 * i + 2 * j);
            }
        if constexpr (!F::K && F::SCALES != EXPONENT) {
            packed.scales[block] = both_rows<F>(p, F::D_AT);
            if constexpr (F::OFFSET) packed.scales[2 + block] = both_rows<F>(p, F::D_AT + 2);
        }
        for (int i = 0; i < 2; i++) {
            if (!p[i]) continue;
            if constexpr (F::SCALES == EXPONENT) packed.scales[0] |= uint32(p[i][0]) << (16 * block + 8 * i);
            if constexpr (F::SCALES == INT8) packed.scales[0] |= F::sub(p[i], sub) << (16 * block + 8 * i);
            if constexpr (F::HALVES)
                packed.scales[block] |= F::sub(p[i], sub) << 8 * i | F::sub(p[i], sub + 1) << (16 + 8 * i);
            if constexpr (F::SCALES == UINT8_MIN)
                packed.scales[block] |= F::sub(p[i], sub) << 8 * i | F::sub_min(p[i], sub) << (16 + 8 * i);
        }
        if constexpr (F::K) {
            packed.super[0] = both_rows<F>(p, F::D_AT);
            if constexpr (F::OFFSET) packed.super[1] = both_rows<F>(p, F::D_AT + 2);
        }
    }
    for (int i = 0; i < F::LOW; i++) {
        int at = F::LOW == 8 ? i / 4 * 4 * WARP + 4 * lane + i % 4 : F::LOW * lane + i;
        ((uint32*)to)[at] = packed.low[i];
    }
    for (int i = 0; i < F::HIGH; i++) ((uint32*)(to + F::HIGH_AT))[F::HIGH * lane + i] = packed.high[i];
    if (t) return;
    for (int i = 0; i < F::SCALE_WORDS; i++) ((uint32*)(to + F::SCALES_AT))[F::SCALE_WORDS * g + i] = packed.scales[i];
    if (F::K && tile % SUPER_TILES == 0)
        for (int i = 0; i < F::SUPER_WORDS; i++) ((uint32*)(base + F::SUPER_AT + int64(tile / SUPER_TILES) * F::SUPER_BYTES))[F::SUPER_WORDS * g + i] = packed.super[i];
}

// Calls to(row 0 or 1, column in the tile, four consecutive values) for all that a lane holds of a tile.
template <class F, int BLOCK, int J, class To> inline void unpack_register(const typename F::Tile& tile, int t, To to) {
    uint32 bytes = F::template bytes<BLOCK, J>(tile);
    Affine a = F::template affine<BLOCK, J / 2>(tile);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = F::value(int8(bytes >> 8 * i), a.scale[J % 2], a.offset[J % 2]);
    to(J % 2, BLOCK * BLOCK_COLS + J / 2 * 16 + 4 * t, values);
}
template <class F, class To> inline void unpack(const typename F::Tile& tile, int t, To to) {
    unpack_register<F, 0, 0>(tile, t, to), unpack_register<F, 0, 1>(tile, t, to);
    unpack_register<F, 0, 2>(tile, t, to), unpack_register<F, 0, 3>(tile, t, to);
    unpack_register<F, 1, 0>(tile, t, to), unpack_register<F, 1, 1>(tile, t, to);
    unpack_register<F, 1, 2>(tile, t, to), unpack_register<F, 1, 3>(tile, t, to);
}

// weights: tiles of rows first_group * 16 on; out: float16 [., cols], those rows; after each `part` rows as many are
// left out there. One thread a lane.
template <class F> __global__ void dequantize(const uint8* weights, int64 first_group, int rows, int cols, int tiles, uint16* out, int part) {
    await_previous();
    int64 id = thread_id(), group = id / WARP / tiles;
    int lane = id % WARP, tile = id / WARP % tiles;
    if (group * TILE_ROWS >= rows) return;
    typename F::Tile packed;
    F::load(packed, weights + (first_group + group) * F::row_bytes(tiles), tile, lane);
    unpack<F>(packed, lane % 4, [&](int half, int col, const float* values) {
        int64 row = group * TILE_ROWS + lane / 4 + 8 * half;
        col += tile * TILE_COLS;
        if (row < rows && col < cols) {
            uint2 four = {floats_to_half2(values[0], values[1]), floats_to_half2(values[2], values[3])};
            *(uint2*)(out + (row + row / part * part) * cols + col) = four;
        }
    });
}

// out: float32 [rows, cols], rows tokens[0..rows - 1] of the matrix. blockIdx.y is the row of out.
template <class F> __global__ void embed(const uint8* weights, const int* tokens, int cols, int tiles, float* out) {
    await_previous();
    int id = blockIdx.x * blockDim.x + threadIdx.x, tile = id / 4, token = tokens[blockIdx.y];
    if (tile >= tiles) return;
    int lane = token % 8 * 4 + id % 4, wanted = token / 8 % 2;
    typename F::Tile packed;
    F::load(packed, weights + int64(token / TILE_ROWS) * F::row_bytes(tiles), tile, lane);
    unpack<F>(packed, lane % 4, [&](int half, int col, const float* values) {
        col += tile * TILE_COLS;
        if (half == wanted && col < cols)
            *(float4*)(out + int64(blockIdx.y) * cols + col) = make_float4(values[0], values[1], values[2], values[3]);
    });
}

// The same for matrices of floats, which lie row after row.
template <class F> __global__ void embed_floats(const uint8* weights, const int* tokens, int cols, float* out) {
    await_previous();
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col < cols)
        out[int64(blockIdx.y) * cols + col] = F::number(weights + (int64(tokens[blockIdx.y]) * cols + col) * F::SIZE);
}

// out: float16 [count], the numbers of a matrix or of activations; what float16 cannot hold becomes its largest.
template <class F> __global__ void to_half(const uint8* x, int64 count, uint16* out) {
    await_previous();
    int64 i = thread_id() * 4;
    if (i >= count) return;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = fminf(fmaxf(F::number(x + (i + j) * F::SIZE), -65504.0f), 65504.0f);
    *(uint2*)(out + i) = {floats_to_half2(v[0], v[1]), floats_to_half2(v[2], v[3])};
}

#ifdef ALL_INSTANCES
#define INSTANCES(F)                                                                        \
    template __global__ void repack<F>(const uint8*, int64, int, int, int, uint8*);         \
    template __global__ void dequantize<F>(const uint8*, int64, int, int, int, uint16*, int); \
    template __global__ void embed<F>(const uint8*, const int*, int, int, float*);
INSTANCES(Q8_0) INSTANCES(Q4_0) INSTANCES(Q4_1) INSTANCES(Q5_0) INSTANCES(Q5_1) INSTANCES(Q2_K) INSTANCES(Q3_K)
INSTANCES(Q4_K) INSTANCES(Q5_K) INSTANCES(Q6_K) INSTANCES(IQ4_NL) INSTANCES(IQ4_XS) INSTANCES(MXFP4)
#define FLOAT_INSTANCES(F)                                                                  \
    template __global__ void embed_floats<F>(const uint8*, const int*, int, float*);        \
    template __global__ void to_half<F>(const uint8*, int64, uint16*);
FLOAT_INSTANCES(F32) FLOAT_INSTANCES(F16) FLOAT_INSTANCES(BF16)
#endif

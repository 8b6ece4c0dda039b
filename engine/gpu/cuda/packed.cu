// Weights in the packed layouts of engine/formats/layouts.py, which the CPU's kernels read, to float16
// matrices for tensor cores. A lane takes half a row of a tile: 16 of its 32 columns.

#include "common.cuh"

enum Format { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 };

__constant__ int8 IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
__constant__ int8 MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline uint32 word(const uint8* p) { return *(const uint32*)p; }
inline float half_at(const uint8* p) { return half_to_float(*(const uint16*)p); }
inline int nibble_of(const uint8* p, int i) { return p[i % 8] >> (i / 8 * 4) & 15; }

// 16 codes of four bits: two words, the low halves of each before the high ones.
inline void nibbles(const uint8* tile, int row, int half, int* codes) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint32 w = word(tile + 64 * (2 * half + k) + 4 * row);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            codes[8 * k + i] = w >> (8 * i) & 15;
            codes[8 * k + 4 + i] = w >> (8 * i + 4) & 15;
        }
    }
}

// One more bit of each code, from the plane at `plane`, into bit `bit`.
inline void or_bit(const uint8* plane, int row, int half, int bit, int* codes) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int four = plane[8 * (4 * half + j) + row / 2] >> (row % 2 * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) codes[4 * j + i] |= (four >> i & 1) << bit;
    }
}

// Two more bits of each code, from the planes at `planes`, into bits `bit` and `bit` + 1.
inline void or_two_bits(const uint8* planes, int row, int half, int bit, int* codes) {
    uint32 w = word(planes + 64 * half + 4 * row);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) codes[4 * j + i] |= (w >> (8 * i + 2 * j) & 3) << bit;
}

// The scale and the minimum of Q4_K and Q5_K, whose 6-bit factors lie at `factors`.
inline void k_scale(const uint8* factors, const uint8* shared, int row, float& scale, float& minimum) {
    int low = factors[row], high = nibble_of(factors + 16, row);
    scale = half_at(shared + 2 * row) * float((low & 15) | (high & 3) << 4);
    minimum = -(half_at(shared + 32 + 2 * row) * float(low >> 4 | high >> 2 << 4));
}

// Columns 16 half to 16 half + 15 of a row of a tile, as float32.
template <int FORMAT> inline void decode(const uint8* tile, const uint8* shared, int row, int half, float* out) {
    if constexpr (FORMAT == F32 || FORMAT == F16 || FORMAT == BF16) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            int at = 16 * (16 * half + i) + row;
            if constexpr (FORMAT == F32) out[i] = ((const float*)tile)[at];
            if constexpr (FORMAT == F16) out[i] = half_to_float(((const uint16*)tile)[at]);
            if constexpr (FORMAT == BF16) out[i] = bfloat_to_float(((const uint16*)tile)[at]);
        }
        return;
    }
    int codes[16], bias = 0;
    float scale = 0, minimum = 0;
    if constexpr (FORMAT == Q8_0) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32 w = word(tile + 64 * (4 * half + j) + 4 * row);
#pragma unroll
            for (int i = 0; i < 4; i++) codes[4 * j + i] = w >> (8 * i) & 255;
        }
        bias = 128, scale = half_at(tile + 512 + 2 * row);
    } else if constexpr (FORMAT == Q2_K || FORMAT == Q3_K) {
#pragma unroll
        for (int i = 0; i < 16; i++) codes[i] = 0;
        or_two_bits(tile, row, half, 0, codes);
    } else {
        nibbles(tile, row, half, codes);
    }
    if constexpr (FORMAT == Q4_0) bias = 8, scale = half_at(tile + 256 + 2 * row);
    if constexpr (FORMAT == Q4_1) scale = half_at(tile + 256 + 2 * row), minimum = half_at(tile + 288 + 2 * row);
    if constexpr (FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q5_K) or_bit(tile + 256, row, half, 4, codes);
    if constexpr (FORMAT == Q5_0) bias = 16, scale = half_at(tile + 320 + 2 * row);
    if constexpr (FORMAT == Q5_1) scale = half_at(tile + 320 + 2 * row), minimum = half_at(tile + 352 + 2 * row);
    if constexpr (FORMAT == Q4_K) k_scale(tile + 256, shared, row, scale, minimum);
    if constexpr (FORMAT == Q5_K) k_scale(tile + 320, shared, row, scale, minimum);
    if constexpr (FORMAT == Q6_K) {
        or_two_bits(tile + 256, row, half, 4, codes);
        bias = 32, scale = half_at(shared + 2 * row) * float(int8(tile[384 + 16 * half + row]));
    }
    if constexpr (FORMAT == Q2_K) {
        int factors = tile[128 + 16 * half + row];
        scale = half_at(shared + 2 * row) * float(factors & 15);
        minimum = -(half_at(shared + 32 + 2 * row) * float(factors >> 4));
    }
    if constexpr (FORMAT == Q3_K) {
        or_bit(tile + 128, row, half, 2, codes);
        int low = tile[192 + row] >> (4 * half) & 15, high = nibble_of(tile + 208, row) >> (2 * half) & 3;
        bias = 4, scale = half_at(shared + 2 * row) * float((low | high << 4) - 32);
    }
    if constexpr (FORMAT == IQ4_NL || FORMAT == IQ4_XS) {
#pragma unroll
        for (int i = 0; i < 16; i++) codes[i] = IQ4_VALUES[codes[i]];
    }
    if constexpr (FORMAT == IQ4_NL) scale = half_at(tile + 256 + 2 * row);
    if constexpr (FORMAT == IQ4_XS) {
        int factor = nibble_of(tile + 256, row) | (tile[264 + row % 4] >> (row / 4 * 2) & 3) << 4;
        scale = half_at(shared + 2 * row) * float(factor - 32);
    }
    if constexpr (FORMAT == MXFP4) {
#pragma unroll
        for (int i = 0; i < 16; i++) codes[i] = MXFP4_VALUES[codes[i]];
        uint32 e = tile[256 + row];  // half of the E8M0 scale, as GGML has it
        scale = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = __fadd_rn(__fmul_rn(float(codes[i] - bias), scale), minimum);
}

// Packed matrices [experts] of groups x blocks tiles at `packed`, to float16 at `out`: weight (row, column)
// of expert e at e * out_stride + row * row_stride + column, counted in elements. grid: (tiles of a matrix
// in rounds of 8, experts); block: 256 threads, a warp a tile.
template <int FORMAT>
__device__ void unpack(const uint8* packed, int64 packed_stride, int groups, int blocks, int phase, int tile_bytes,
                       int super_bytes, int64 group_bytes, uint16* out, int64 out_stride, int64 row_stride) {
    int tile = blockIdx.x * 8 + warp_id(), row = lane_id() / 2, half = lane_id() % 2;
    if (tile >= groups * blocks) return;
    int group = tile / blocks, block = tile % blocks;
    const uint8* start = packed + blockIdx.y * packed_stride + group * group_bytes;
    const uint8* shared = start + int64(blocks) * tile_bytes + (phase + block) / 8 * super_bytes;
    float values[16];
    decode<FORMAT>(start + int64(block) * tile_bytes, shared, row, half, values);
    uint4 both[2];
    uint32* pairs = (uint32*)both;
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = floats_to_half2(values[2 * i], values[2 * i + 1]);
    uint4* place = (uint4*)(out + blockIdx.y * out_stride + (16 * group + row) * row_stride + 32 * block + 16 * half);
    place[0] = both[0];
    place[1] = both[1];
}

#define UNPACK(FORMAT) \
    extern "C" __global__ void __launch_bounds__(256) unpack_##FORMAT( \
        const uint8* packed, int64 packed_stride, int groups, int blocks, int phase, int tile_bytes, int super_bytes, \
        int64 group_bytes, uint16* out, int64 out_stride, int64 row_stride) { \
        await_previous(); \
        unpack<FORMAT>(packed, packed_stride, groups, blocks, phase, tile_bytes, super_bytes, group_bytes, out, \
                       out_stride, row_stride); \
    }
UNPACK(F32) UNPACK(F16) UNPACK(BF16) UNPACK(Q8_0) UNPACK(Q4_0) UNPACK(Q4_1) UNPACK(Q5_0) UNPACK(Q5_1)
UNPACK(Q2_K) UNPACK(Q3_K) UNPACK(Q4_K) UNPACK(Q5_K) UNPACK(Q6_K) UNPACK(IQ4_NL) UNPACK(IQ4_XS) UNPACK(MXFP4)

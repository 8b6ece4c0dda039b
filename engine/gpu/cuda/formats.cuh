// The quantized weight formats: how a matrix lies in VRAM, and how that comes from GGUF's blocks.
//
// A matrix is cut into tiles of 16 rows x 64 columns (two blocks of 32); the tiles of 16 rows follow one
// another. Lane 4 g + t of a warp owns, of rows g and g + 8, columns 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3
// of each block: what operand A of mma.m16n8k32 wants. Register j, byte i is row g + 8 (j % 2), column
// 16 (j / 2) + 4 t + i. A tile is, one after the other,
//
//     low codes    LOW words for each lane: 8-bit codes; two nibbles or four 2-bit fields to a byte
//     high codes   HIGH words for each lane: the fifth bit, or bits five and six
//     scales       SCALE_WORDS for each g, for both rows and blocks
//
// and every fourth tile of a K-quant is followed by SUPER_WORDS for each g: what 256 columns share.
// A format whose codes have a middle (Q4_0: code - 8) stores them in two's complement and unpacks them to
// the top of a byte, so that a value is byte * scale * UNIT; nothing is requantized.
#pragma once
#include "common.cuh"

constexpr int TILE_ROWS = 16, TILE_COLS = 64, BLOCK_COLS = 32, SUPER_TILES = 4;

enum Codes { SIGNED, UNSIGNED, TABLE_IQ4, TABLE_FP4 };
enum Scales {
    HALF,        // float16 for 32 columns
    HALF_MIN,    // and a float16 to add
    EXPONENT,    // E8M0 for 32 columns
    INT8,        // int8 for 32 columns, times a float16 for 256
    INT8_16,     // int8 for 16 columns, times a float16 for 256
    UINT8_MIN,   // uint8 for 32 columns and uint8 to subtract, each times a float16 for 256
    NIBBLES_16,  // the same with 4 bits for 16 columns
};

// What 32 columns (or one half of them) of a lane's two rows are multiplied with, and what is added.
struct Affine {
    float scale[2], offset[2];
};

template <int BITS> inline uint32 shifted(uint32 x) {
    if constexpr (BITS >= 0) return x << BITS;
    else return x >> -BITS;
}

// Four codes of 4 bits to four signed bytes by a table of 16.
inline uint32 look_up(uint32 codes, uint32 t0, uint32 t1, uint32 t2, uint32 t3) {
    uint32 low = __byte_perm(t0, t1, codes & 0x7777), high = __byte_perm(t2, t3, codes & 0x7777);
    return __byte_perm(low, high, 0x3210 | (codes & 0x8888) >> 1);
}

template <int WORDS> inline void load_words(uint32 (&to)[WORDS], const uint8* from) {
    if constexpr (WORDS == 1) {
        to[0] = load_once((const uint32*)from);
    } else if constexpr (WORDS == 2) {
        uint2 v = load_once((const uint2*)from);
        to[0] = v.x, to[1] = v.y;
    } else {
        uint4 v = load_once((const uint4*)from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        if constexpr (WORDS == 8) {
            v = load_once((const uint4*)(from + 16 * WARP));
            to[4] = v.x, to[5] = v.y, to[6] = v.z, to[7] = v.w;
        }
    }
}

template <int LOW_, int HIGH_, Codes CODES_, Scales SCALES_> struct Format {
    static constexpr int LOW = LOW_, HIGH = HIGH_;
    static constexpr Codes CODES = CODES_;
    static constexpr Scales SCALES = SCALES_;
    static constexpr bool K = SCALES >= INT8;
    static constexpr bool HALVES = SCALES == INT8_16 || SCALES == NIBBLES_16;
    static constexpr bool OFFSET = SCALES == HALF_MIN || SCALES == UINT8_MIN || SCALES == NIBBLES_16;
    static constexpr int ALIGN = CODES == SIGNED ? 8 - LOW - HIGH : 0;
    static constexpr float UNIT = 1.0f / (1 << ALIGN);
    static constexpr int SCALE_WORDS = SCALES == HALF_MIN ? 4 : SCALES == EXPONENT || SCALES == INT8 ? 1 : 2;
    static constexpr int SUPER_WORDS = !K ? 0 : OFFSET ? 2 : 1;
    static constexpr int HIGH_AT = 128 * LOW, SCALES_AT = HIGH_AT + 128 * HIGH, TILE_BYTES = SCALES_AT + 32 * SCALE_WORDS;
    static constexpr int SUPER_AT = SUPER_TILES * TILE_BYTES, SUPER_BYTES = SUPER_AT + 32 * SUPER_WORDS;

    // What a lane holds of a tile.
    struct Tile {
        uint32 low[LOW], high[HIGH ? HIGH : 1], scales[SCALE_WORDS], super[SUPER_WORDS ? SUPER_WORDS : 1];
    };

    // Bytes of 16 rows of `tiles` tiles.
    static int64 row_bytes(int tiles) {
        return K ? int64(tiles / SUPER_TILES) * SUPER_BYTES : int64(tiles) * TILE_BYTES;
    }
    static int64 tile_at(int tile) {
        return K ? int64(tile / SUPER_TILES) * SUPER_BYTES + tile % SUPER_TILES * TILE_BYTES : int64(tile) * TILE_BYTES;
    }

    static void load(Tile& to, const uint8* rows, int tile, int lane) {
        const uint8* p = rows + tile_at(tile);
        load_words(to.low, p + lane * (LOW == 8 ? 16 : 4 * LOW));
        if constexpr (HIGH) load_words(to.high, p + HIGH_AT + lane * 4 * HIGH);
        load_words(to.scales, p + SCALES_AT + lane / 4 * 4 * SCALE_WORDS);
        if constexpr (K) load_words(to.super, rows + int64(tile / SUPER_TILES) * SUPER_BYTES + SUPER_AT + lane / 4 * 4 * SUPER_WORDS);
    }

    // Register J of block BLOCK: four signed bytes, values / (scale UNIT).
    template <int BLOCK, int J> static uint32 bytes(const Tile& tile) {
        if constexpr (CODES == TABLE_IQ4) {
            return look_up(tile.low[J] >> 16 * BLOCK, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
        } else if constexpr (CODES == TABLE_FP4) {
            return look_up(tile.low[J] >> 16 * BLOCK, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
        } else if constexpr (LOW == 8) {
            return tile.low[4 * BLOCK + J];
        } else {
            uint32 value;
            if constexpr (LOW == 4) value = shifted<ALIGN - 4 * BLOCK>(tile.low[J]) & 0x0f0f0f0fu << ALIGN;
            else value = shifted<ALIGN - 2 * J>(tile.low[BLOCK]) & 0x03030303u << ALIGN;
            constexpr int TO = ALIGN + LOW;
            if constexpr (HIGH == 1) value |= shifted<TO - J - 4 * BLOCK>(tile.high[0]) & 0x01010101u << TO;
            if constexpr (HIGH == 2) value |= shifted<TO - 2 * J>(tile.high[BLOCK]) & 0x03030303u << TO;
            return value;
        }
    }

    // Scales of block BLOCK, or of its half HALF where those differ.
    template <int BLOCK, int HALF_> static Affine affine(const Tile& tile) {
        Affine a = {};
#pragma unroll
        for (int row = 0; row < 2; row++) {
            if constexpr (SCALES == HALF || SCALES == HALF_MIN) {
                a.scale[row] = half_to_float(uint16(tile.scales[BLOCK] >> 16 * row));
                if constexpr (OFFSET) a.offset[row] = half_to_float(uint16(tile.scales[2 + BLOCK] >> 16 * row));
            } else if constexpr (SCALES == EXPONENT) {  // 2^(e - 128)
                uint32 e = tile.scales[0] >> (16 * BLOCK + 8 * row) & 255;
                a.scale[row] = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
            } else {
                float d = half_to_float(uint16(tile.super[0] >> 16 * row));
                if constexpr (SCALES == INT8)
                    a.scale[row] = __fmul_rn(d, float(int8(tile.scales[0] >> (16 * BLOCK + 8 * row))));
                else if constexpr (SCALES == INT8_16)
                    a.scale[row] = __fmul_rn(d, float(int8(tile.scales[BLOCK] >> (16 * HALF_ + 8 * row))));
                else {
                    float d_min = half_to_float(uint16(tile.super[SUPER_WORDS - 1] >> 16 * row));
                    uint32 word = tile.scales[BLOCK], scale, min;
                    if constexpr (SCALES == UINT8_MIN) scale = word >> 8 * row & 255, min = word >> (16 + 8 * row) & 255;
                    else scale = word >> (16 * HALF_ + 8 * row) & 15, min = word >> (16 * HALF_ + 8 * row + 4) & 15;
                    a.scale[row] = __fmul_rn(d, float(scale));
                    a.offset[row] = -__fmul_rn(d_min, float(min));
                }
            }
        }
        return a;
    }

    // A value as GGML's dequantization rounds it; byte: a signed byte of `bytes`.
    static float value(int byte, float scale, float offset) {
        float product = __fmul_rn(scale, float(byte) * UNIT);
        return OFFSET ? __fadd_rn(product, offset) : product;
    }
};

// --- GGUF's blocks ------------------------------------------------------------------------------
//
// Each format says how many COLS and BYTES a block has, and for a block at p: `code` of column c as it is
// stored here; D_AT, where its float16 scale (and minimum) lie; `sub`, scale number i of a K-quant, and
// `sub_min`.

inline uint16 read_u16(const uint8* p) { return uint16(p[0] | p[1] << 8); }
inline uint32 nibble(const uint8* p, int c) { return p[c % 16] >> c / 16 * 4 & 15; }
inline uint32 bit(const uint8* p, int c) { return p[c / 8] >> c % 8 & 1; }

struct Q8_0 : Format<8, 0, SIGNED, HALF> {
    static constexpr int COLS = 32, BYTES = 34, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return p[2 + c]; }
};
struct Q4_0 : Format<4, 0, SIGNED, HALF> {
    static constexpr int COLS = 32, BYTES = 18, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 2, c) ^ 8; }
};
struct Q4_1 : Format<4, 0, UNSIGNED, HALF_MIN> {
    static constexpr int COLS = 32, BYTES = 20, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 4, c); }
};
struct Q5_0 : Format<4, 1, SIGNED, HALF> {
    static constexpr int COLS = 32, BYTES = 22, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return (nibble(p + 6, c) | bit(p + 2, c) << 4) ^ 16; }
};
struct Q5_1 : Format<4, 1, UNSIGNED, HALF_MIN> {
    static constexpr int COLS = 32, BYTES = 24, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 8, c) | bit(p + 4, c) << 4; }
};
struct IQ4_NL : Format<4, 0, TABLE_IQ4, HALF> {
    static constexpr int COLS = 32, BYTES = 18, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 2, c); }
};
struct MXFP4 : Format<4, 0, TABLE_FP4, EXPONENT> {
    static constexpr int COLS = 32, BYTES = 17, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 1, c); }
};

// The six-bit scale (minimum) of 32 columns in Q4_K and Q5_K; q: their twelve bytes.
inline uint32 six_bit_scale(const uint8* q, int i) { return i < 4 ? q[i] & 63 : (q[i + 4] & 15) | q[i - 4] >> 6 << 4; }
inline uint32 six_bit_min(const uint8* q, int i) { return i < 4 ? q[i + 4] & 63 : q[i + 4] >> 4 | q[i] >> 6 << 4; }

struct Q4_K : Format<4, 0, UNSIGNED, UINT8_MIN> {
    static constexpr int COLS = 256, BYTES = 144, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return p[16 + c / 64 * 32 + c % 32] >> c / 32 % 2 * 4 & 15; }
    static uint32 sub(const uint8* p, int i) { return six_bit_scale(p + 4, i); }
    static uint32 sub_min(const uint8* p, int i) { return six_bit_min(p + 4, i); }
};
struct Q5_K : Format<4, 1, UNSIGNED, UINT8_MIN> {
    static constexpr int COLS = 256, BYTES = 176, D_AT = 0;
    static uint32 code(const uint8* p, int c) {
        return (p[48 + c / 64 * 32 + c % 32] >> c / 32 % 2 * 4 & 15) | (p[16 + c % 32] >> c / 32 & 1) << 4;
    }
    static uint32 sub(const uint8* p, int i) { return six_bit_scale(p + 4, i); }
    static uint32 sub_min(const uint8* p, int i) { return six_bit_min(p + 4, i); }
};
struct Q6_K : Format<4, 2, SIGNED, INT8_16> {
    static constexpr int COLS = 256, BYTES = 210, D_AT = 208;
    static uint32 code(const uint8* p, int c) {
        int n = c / 128, e = c % 128;
        uint32 low = p[64 * n + e % 64] >> e / 64 * 4 & 15, high = p[128 + 32 * n + e % 32] >> e / 32 * 2 & 3;
        return (low | high << 4) ^ 32;
    }
    static uint32 sub(const uint8* p, int i) { return p[192 + i]; }
};
struct IQ4_XS : Format<4, 0, TABLE_IQ4, INT8> {
    static constexpr int COLS = 256, BYTES = 136, D_AT = 0;
    static uint32 code(const uint8* p, int c) { return nibble(p + 8 + c / 32 * 16, c % 32); }
    static uint32 sub(const uint8* p, int i) {
        uint32 low = p[4 + i / 2] >> i % 2 * 4 & 15, high = read_u16(p + 2) >> 2 * i & 3;
        return ((low | high << 4) - 32) & 255;
    }
};
struct Q2_K : Format<2, 0, UNSIGNED, NIBBLES_16> {
    static constexpr int COLS = 256, BYTES = 84, D_AT = 80;
    static uint32 code(const uint8* p, int c) { return p[16 + c / 128 * 32 + c % 32] >> c % 128 / 32 * 2 & 3; }
    static uint32 sub(const uint8* p, int i) { return p[i]; }
};
struct Q3_K : Format<2, 1, SIGNED, INT8_16> {
    static constexpr int COLS = 256, BYTES = 110, D_AT = 108;
    static uint32 code(const uint8* p, int c) {
        uint32 low = p[32 + c / 128 * 32 + c % 32] >> c % 128 / 32 * 2 & 3, high = p[c % 32] >> c / 32 & 1;
        return (low | high << 2) ^ 4;
    }
    static uint32 sub(const uint8* p, int i) {
        uint32 low = p[96 + i % 8] >> i / 8 * 4 & 15, high = p[104 + i % 4] >> i / 4 * 2 & 3;
        return ((low | high << 4) - 32) & 255;
    }
};

// Floats lie as in the file, row after row; sixteen bytes of them at a time become float32.
struct F32 {
    static constexpr int SIZE = 4;
    static float number(const uint8* p) { return *(const float*)p; }
};
struct F16 {
    static constexpr int SIZE = 2;
    static float number(const uint8* p) { return half_to_float(*(const uint16*)p); }
};
struct BF16 {
    static constexpr int SIZE = 2;
    static float number(const uint8* p) { return bfloat_to_float(*(const uint16*)p); }
};

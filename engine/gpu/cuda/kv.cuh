// The KV pool: where a token's keys and values lie, and codes as float16 numbers.
//
// A page holds PAGE_TOKENS tokens of every layer and KV head, keys then values. Of one head:
//   F16   float16 [256, dim]
//   Q8_0  uint8 [256, dim], a code and 128; then float16 scales [256, dim / 32]
//   Q4_0  4 bits [256, dim], a code and 8; then scales as above
// A token's codes are interleaved, so that whoever reads 4 or 8 bytes in a row gets a few codes of every
// block of 32: dimension i of block b is code 4 (i / 4 * blocks + b) + i % 4.
#pragma once
#include "common.cuh"

constexpr int PAGE_TOKENS = 256;
constexpr int BLOCK = 32;
enum KvKind { F16, Q8_0, Q4_0 };

constexpr int code_bytes(KvKind kind, int dim) { return kind == F16 ? 2 * dim : kind == Q8_0 ? dim : dim / 2; }

// What every kernel gets: a layer's part of page 0, and how to find other pages and heads.
#define KV_PARAMETERS char *layer, int64 page_bytes, int head_bytes, int key_bytes, const int *page_tables, int max_pages

// Where the keys of a KV head begin in a sequence's page.
inline char* find_keys(char* layer, int64 page_bytes, int head_bytes, const int* page_table, int page, int kv_head) {
    return layer + page_table[page] * page_bytes + kv_head * head_bytes;
}

// Decode: how many of SPLITS shares of a row's context there is work for. Each of a block's warps takes two
// rounds of TILES tiles of 16 tokens at least, or two tiles where that would make few splits.
constexpr int DECODE_WARPS = 4, TILE = 16, FEW_SPLITS = 16;
inline int used_splits(int splits, int length, int tiles) {
    int pairs = divide_up(length, 2 * TILE * DECODE_WARPS);
    return min(splits, max(min(pairs, FEW_SPLITS), divide_up(pairs, tiles)));
}

// float16 whose mantissa holds a code: the code's bits and MAGIC are code + 1024 (or + 64, four bits up).
constexpr uint32 MAGIC = 0x64006400, MAGIC_HIGH = 0x54005400;
constexpr float Q8_BIAS = 1024 + 128, Q4_BIAS = 1024 + 8, Q4_BIAS_HIGH = 64 + 8;
constexpr uint32 MINUS_Q8_BIAS = 0xe480e480, MINUS_Q4_BIAS = 0xe408e408, MINUS_Q4_BIAS_HIGH = 0xd480d480;

// (a's half H, b's half I) of two registers of float16 or 16-bit pairs.
template <int H, int I> inline uint32 halves(uint32 a, uint32 b) {
    return __byte_perm(a, b, (H ? 0x0032 : 0x0010) | (I ? 0x7600 : 0x5400));
}
// Bytes 0 and 2 (1 and 3) as biased float16.
inline uint32 even_bytes(uint32 x) { return (x & 0x00ff00ff) | MAGIC; }
inline uint32 odd_bytes(uint32 x) { return __byte_perm(x, MAGIC, 0x5351); }
// Bytes 0 and 1 (2 and 3) as biased float16.
inline uint32 low_bytes(uint32 x) { return __byte_perm(x, MAGIC, 0x5150); }
inline uint32 high_bytes(uint32 x) { return __byte_perm(x, MAGIC, 0x5352); }
// Bits 0-3 (4-7) of both halves as float16, biased by Q4_BIAS (Q4_BIAS_HIGH).
inline uint32 low_nibbles(uint32 x) { return (x & 0x000f000f) | MAGIC; }
inline uint32 high_nibbles(uint32 x) { return (x & 0x00f000f0) | MAGIC_HIGH; }

// Number `four` of the fours of a token's codes of block b of BLOCKS, times a scale: float16. scale: twice, as a pair.
template <KvKind KIND, int BLOCKS> inline uint2 four_numbers(const char* codes, int four, int b, uint32 scale) {
    uint32 x, y;
    if constexpr (KIND == Q8_0) {
        uint32 bytes = reinterpret_cast<const uint32*>(codes)[four * BLOCKS + b];
        x = add_halves(low_bytes(bytes), MINUS_Q8_BIAS), y = add_halves(high_bytes(bytes), MINUS_Q8_BIAS);
    } else {
        uint32 bits = reinterpret_cast<const uint16*>(codes)[four * BLOCKS + b];
        bits = (bits & 0x00ff) | (bits & 0xff00) << 8;  // 0 and 1 in the low half, 2 and 3 in the high one
        uint32 even = add_halves(low_nibbles(bits), MINUS_Q4_BIAS), odd = add_halves(high_nibbles(bits), MINUS_Q4_BIAS_HIGH);
        x = halves<0, 0>(even, odd), y = halves<1, 1>(even, odd);
    }
    return make_uint2(multiply_halves(x, scale), multiply_halves(y, scale));
}

// Brings what the next layer reads to the second-level cache. It begins at once, whatever kernels are before it: it
// touches only what none of them writes, but for tokens of this step, and those may come to the cache as they like.
// That it is done means, as of any kernel, that those before it are: so it waits for them in the end.
#include "kv.cuh"

constexpr int THREADS = 256, PIECE = 4096, MOST_RANGES = 8;

// Weights, in the order in which they are wanted.
struct Ranges {
    const char* start[MOST_RANGES];
    int64 bytes[MOST_RANGES];  // multiples of 16
    int64 count;
};

// What there is of a token in its page's part of a KV head: codes and scales, of keys and values.
struct Parts {
    int offset[4], token_bytes[4];
    int64 count;
};

// bytes: a multiple of 16.
inline void prefetch(const char* p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#else
    for (int at = 0; at < bytes; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + at) : "memory");
#endif
}

// Of every page of the rows' sequences the same number of tokens, as `budget` bytes allow, so that all blocks of attention
// find as much of their share in the cache.
inline void fetch_tokens(const Parts& parts, int64 budget, int kv_heads, int rows, const int* positions, const int* slots,
                         char* layer, int64 page_bytes, int head_bytes, const int* page_tables, int max_pages) {
    constexpr int TILES = PAGE_TOKENS / TILE;
    int64 thread = int64(blockIdx.x) * THREADS + threadIdx.x, threads = int64(gridDim.x) * THREADS;
    // A sequence's rows lie together, and the last of them sees the most.
    auto is_last = [&](int row) { return row + 1 == rows || slots[row + 1] != slots[row]; };
    int64 pages = 0;
    for (int row = 0; row < rows; row++) {
        if (is_last(row)) pages += divide_up(positions[row] + 1, PAGE_TOKENS);
    }
    int tiles = int(min(int64(TILES), budget * TILES / (pages * kv_heads * head_bytes)));
    if (tiles == 0) return;
    for (int row = 0; row < rows; row++) {
        if (!is_last(row)) continue;
        const int* table = page_tables + int64(slots[row]) * max_pages;
        int64 pieces = int64(divide_up(positions[row] + 1, PAGE_TOKENS)) * kv_heads * parts.count * tiles;
        for (int64 i = thread; i < pieces; i += threads) {
            int tile = int(i % tiles), part = int(i / tiles % parts.count);
            int64 head = i / tiles / parts.count;
            const char* place = find_keys(layer, page_bytes, head_bytes, table, int(head / kv_heads), int(head % kv_heads));
            int bytes = TILE * parts.token_bytes[part];
            prefetch(place + parts.offset[part] + tile * bytes, bytes);
        }
    }
}

// First the weights, then keys and values with what they leave of `budget` bytes, a multiple of PIECE.
extern "C" __global__ void __launch_bounds__(THREADS)
look_ahead(const __grid_constant__ Ranges ranges, const __grid_constant__ Parts parts, int64 budget, int kv_heads,
           int rows, const int* positions, const int* slots, KV_PARAMETERS) {
    int64 thread = int64(blockIdx.x) * THREADS + threadIdx.x, threads = int64(gridDim.x) * THREADS;
#pragma unroll
    for (int i = 0; i < MOST_RANGES; i++) {
        if (i >= ranges.count) break;
        int64 bytes = min(budget, ranges.bytes[i]);
        budget -= bytes;
        for (int64 at = thread * PIECE; at < bytes; at += threads * PIECE)
            prefetch(ranges.start[i] + at, int(min(int64(PIECE), bytes - at)));
    }
    if (kv_heads > 0) fetch_tokens(parts, budget, kv_heads, rows, positions, slots, layer, page_bytes, head_bytes, page_tables, max_pages);
    await_previous();
}

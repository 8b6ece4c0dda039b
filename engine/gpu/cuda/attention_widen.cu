// Pages of quantized keys and values of one layer as float16, for a prefill whose many blocks would each convert them.
#include "kv.cuh"

constexpr int THREADS = 256;

// What a KV head has of a kind in a page -> float16 [256, DIM].
template <int DIM, KvKind KIND> inline void widen_cell(const char* cell, char* out) {
    if constexpr (KIND == F16) {
        for (int i = threadIdx.x; i < PAGE_TOKENS * DIM / 8; i += THREADS)
            reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(cell)[i];
    } else {
        constexpr int BLOCKS = DIM / BLOCK;
        const uint16* scales = reinterpret_cast<const uint16*>(cell + PAGE_TOKENS * code_bytes(KIND, DIM));
        for (int i = threadIdx.x; i < PAGE_TOKENS * 8; i += THREADS) {
            int token = i / 8, four = i % 8;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                uint32 scale = scales[token * BLOCKS + b] * 0x10001u;
                uint2 numbers = four_numbers<KIND, BLOCKS>(cell + token * code_bytes(KIND, DIM), four, b, scale);
                *reinterpret_cast<uint2*>(out + 2 * (token * DIM + b * BLOCK + 4 * four)) = numbers;
            }
        }
    }
}

// out: a pool of float16 pages of this layer alone; its page i is of page sources[i]. Grid: pages, KV heads, keys and values.
template <int DIM, KvKind KEYS, KvKind VALUES>
__global__ void __launch_bounds__(THREADS)
widen(const char* layer, int64 page_bytes, int head_bytes, int key_bytes, const int* sources, char* out) {
    constexpr int CELL = 2 * PAGE_TOKENS * DIM;
    await_previous();
    const char* head = layer + sources[blockIdx.x] * page_bytes + blockIdx.y * head_bytes;
    out += (int64(blockIdx.x) * gridDim.y + blockIdx.y) * 2 * CELL;
    if (blockIdx.z == 0) widen_cell<DIM, KEYS>(head, out);
    else widen_cell<DIM, VALUES>(head + key_bytes, out + CELL);
}

#ifdef ALL_INSTANCES
#define INSTANCE(...) \
    template __global__ void widen<__VA_ARGS__>(const char*, int64, int, int, const int*, char*)
INSTANCE(128, Q8_0, Q8_0);
INSTANCE(128, Q4_0, Q4_0);
INSTANCE(96, F16, Q8_0);
INSTANCE(256, Q4_0, F16);
#endif

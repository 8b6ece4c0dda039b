// The hand-off to the expert shards through the mailbox, which is host memory mapped for the GPU.
//
// send writes a request as engine/experts/mailbox.py lays it out; the block that finishes last publishes its
// sequence number. receive and wait spin on the shards' replies. A shard whose heartbeat
// stands still for longer than the bound is late: `failed` becomes its number + 1, and every kernel of
// the step that follows returns at once, so that a dead shard never leaves the GPU spinning.

#include "common.cuh"
#include "routing.cuh"

constexpr int THREADS = 512, SEND_THREADS = 1024;

// Words in device memory that live as long as the worker (see engine/gpu/exchange.py).
struct Words {
    unsigned sequence;             // of the last request published
    unsigned failed;               // shard number + 1, or 0
    unsigned arrived;              // blocks of a send that are done
    unsigned unused;
    unsigned long long published;  // when, in nanoseconds
    unsigned long long experts;    // nanoseconds that the slowest shards worked, all layers
    unsigned long long wait;       // nanoseconds between request and reply beyond that
};

// Where things lie in the mailbox: addresses as the GPU sees them.
struct Mailbox {
    unsigned char *request;        // the sequence word; layer and rows follow at 128 and 136 bytes
    unsigned char *replies;        // a shard's words every 256 bytes
    int *ids;                      // [rows, top_k]
    float *weights;                // [rows, top_k]
    unsigned char *q8_rows;        // 8-bit activation rows
    float *f32_rows;               // the same as float32, if any shard reads them
    const float *partials;         // [shards, max_rows, hidden]
    long long q8_stride, f32_stride, partial_stride;  // bytes, bytes, floats
    long long shards;
};

__device__ __forceinline__ unsigned long long clock_ns() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// What another processor wrote, or is to read: never from or to a cache of this one.
__device__ __forceinline__ unsigned load_word(const unsigned char *p) {
    unsigned x;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void store_word(unsigned char *p, unsigned x) {
    asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ void store_long(unsigned char *p, unsigned long long x) {
    asm volatile("st.volatile.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

// 16 lanes: 32 numbers to 8-bit codes and their scale and sums, bit for bit as engine/cpu/rows.py
// quantize_block: lane i holds numbers i and i + 16, and sums run over halves.
__device__ __forceinline__ void quantize_block(float a, float b, signed char *codes, float *meta) {
    int lane = threadIdx.x % 16;
    unsigned half = 0xffffu << (threadIdx.x & 16);  // the other half of the warp may have left the loop
    float high = fmaxf(a, b), low = fminf(a, b);
    for (int step = 8; step; step /= 2) {
        high = fmaxf(high, __shfl_xor_sync(half, high, step));
        low = fminf(low, __shfl_xor_sync(half, low, step));
    }
    float extreme = high > -low ? high : low;
    float inverse = fabsf(extreme) > 1e-30f ? __fdiv_rn(-128.0f, extreme) : 0.0f;
    float fa = rintf(fminf(__fmul_rn(a, inverse), 127.0f)), fb = rintf(fminf(__fmul_rn(b, inverse), 127.0f));
    float squares = __fmaf_rn(fa, fa, __fmul_rn(fb, fb)), products = __fmaf_rn(fa, a, __fmul_rn(fb, b));
    int first = (int)fa, last = (int)fb;
    codes[lane] = (signed char)first;
    codes[lane + 16] = (signed char)last;
    for (int step = 8; step; step /= 2) {
        squares = __fadd_rn(squares, __shfl_xor_sync(half, squares, step));
        products = __fadd_rn(products, __shfl_xor_sync(half, products, step));
        first += __shfl_xor_sync(half, first, step);
        last += __shfl_xor_sync(half, last, step);
    }
    if (lane == 0) {
        meta[0] = squares > 0.0f ? __fdiv_rn(products, squares) : 0.0f;
        ((int *)meta)[1] = first + last;
        ((int *)meta)[2] = first;
        ((int *)meta)[3] = last;
    }
}

// One thread: a step begins.
extern "C" __global__ void begin(Words *words) {
    await_previous();
    words->failed = words->arrived = 0;
    words->experts = words->wait = 0;
}

// One block a row: the request of a layer. x: float32 [rows, hidden], the normalised rows, which are there from the
// start: the router's product, the kernel before, has waited for them (SHARE_X in gemv.cu). logits: float32 [rows,
// experts], its result. Shared memory: an 8-bit row (hidden / 32 * 48 bytes), then experts + 2 top_k floats.
extern "C" __global__ void __launch_bounds__(SEND_THREADS)
send(const float *x, int hidden, const float *logits, int experts, int top_k, int normalize, float scale,
     Mailbox box, Words *words, unsigned layer) {
    extern __shared__ __align__(16) unsigned char shared[];
    // None of this may come from the first-level cache, which this kernel may have found as older ones left it.
    unsigned sequence = *(volatile unsigned *)&words->sequence;
    bool failed = *(volatile unsigned *)&words->failed;
    long long row = blockIdx.x;
    if (!failed) {
        const float *source = x + row * hidden;
        for (int i = threadIdx.x; i < hidden / 2; i += SEND_THREADS) {
            int block = i / 16, first = 32 * block + i % 16;
            quantize_block(__ldcg(source + first), __ldcg(source + first + 16), (signed char *)shared + 32 * block,
                           (float *)(shared + hidden + 16 * block));
        }
        __syncthreads();
        uint4 *out = (uint4 *)(box.q8_rows + row * box.q8_stride);
        for (int i = threadIdx.x; i < hidden / 32 * 3; i += SEND_THREADS) out[i] = ((uint4 *)shared)[i];
        if (box.f32_rows) {
            float4 *wide = (float4 *)((unsigned char *)box.f32_rows + row * box.f32_stride);
            for (int i = threadIdx.x; i < hidden / 4; i += SEND_THREADS) wide[i] = __ldcg((const float4 *)source + i);
        }
        if (row == 0 && threadIdx.x == 0) {
            store_long(box.request + 128, layer);
            store_long(box.request + 136, gridDim.x);
        }
    }
    await_previous();
    if (failed) return;
    float *router = (float *)(shared + hidden / 32 * 48);
    for (int e = threadIdx.x; e < experts; e += SEND_THREADS) router[e] = logits[row * experts + e];
    route<SEND_THREADS>(router, experts, top_k, normalize, scale, router + experts, box.ids + row * top_k, box.weights + row * top_k);
    __syncthreads();
    if (threadIdx.x > 0) return;
    if (gridDim.x > 1) {
        __threadfence_system();
        if (atomicAdd(&words->arrived, 1) < gridDim.x - 1) return;
        words->arrived = 0;
    }
    words->sequence = ++sequence;
    words->published = clock_ns();
    __threadfence_system();  // also for what other threads wrote, whom this one has waited for
    store_word(box.request, sequence);
}

// Threads 0 to shards - 1 of a block: wait for the reply of a shard each. Returns on all threads.
__device__ void await_replies(const Mailbox &box, Words *words, long long bound) {
    if (threadIdx.x < box.shards) {
        const unsigned char *reply = box.replies + 256 * threadIdx.x;
        unsigned wanted = words->sequence, beat = load_word(reply + 128);
        unsigned long long since = clock_ns();
        for (unsigned look = 1; (int)(load_word(reply) - wanted) < 0; look++) {
            if (look % 256) continue;
            if (*(volatile unsigned *)&words->failed) break;
            unsigned now = load_word(reply + 128);
            if (now != beat) { beat = now; since = clock_ns(); }
            else if ((long long)(clock_ns() - since) > bound) { atomicCAS(&words->failed, 0, threadIdx.x + 1); break; }
        }
        __threadfence_system();
    }
    __syncthreads();
}

// One thread of one block of a layer: book where the time since the request went.
__device__ void book_time(const Mailbox &box, Words *words) {
    unsigned long long busy = 0, passed = clock_ns() - words->published;
    for (int shard = 0; shard < box.shards; shard++) {
        unsigned long long worked = *(volatile unsigned long long *)(box.replies + 256 * shard + 192);
        busy = worked > busy ? worked : busy;
    }
    words->experts += busy;
    words->wait += passed > busy ? passed - busy : 0;
}

// x[row] += the shards' partial sums, in the order of the shards; one block a row, which waits itself. Its last warp
// keeps the books, while the others read: each look at the host's memory takes a microsecond.
extern "C" __global__ void __launch_bounds__(THREADS + WARP)
receive(float *x, int hidden, Mailbox box, Words *words, long long bound) {
    constexpr int AT_ONCE = 4;
    await_previous();
    if (words->failed) return;
    await_replies(box, words, bound);
    if (*(volatile unsigned *)&words->failed) return;
    long long row = blockIdx.x;
    if (threadIdx.x >= THREADS) {
        if (row == 0 && threadIdx.x == THREADS) book_time(box, words);
        return;
    }
    float4 *out = (float4 *)(x + row * hidden);
    for (int first = threadIdx.x; first < hidden / 4; first += AT_ONCE * THREADS) {
        float4 total[AT_ONCE], part[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i * THREADS < hidden / 4) total[i] = out[first + i * THREADS];
        }
        for (int shard = 0; shard < box.shards; shard++) {
            const float4 *from = (const float4 *)(box.partials + shard * box.partial_stride + row * hidden);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (first + i * THREADS < hidden / 4) part[i] = __ldcv(from + first + i * THREADS);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                total[i].x += part[i].x, total[i].y += part[i].y, total[i].z += part[i].z, total[i].w += part[i].w;
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i * THREADS < hidden / 4) out[first + i * THREADS] = total[i];
        }
    }
}

// One block: wait only (before `receive`, where there are many rows, so that few blocks look at the mailbox).
extern "C" __global__ void wait(Mailbox box, Words *words, long long bound) {
    await_previous();
    if (words->failed) return;
    await_replies(box, words, bound);
}

// Draws one index of each row of logits, by temperature and top-p.
//
// logits: [num_seqs, vocab_size], vocab_size a multiple of 8; seqs: (1 / temperature, top_p, u, -) of each sequence, u
// in [0, 1); ids: [num_seqs] int32. With top_p 0 and u 0 the answer is the lowest index of the largest logit.
//
// The candidates of a row are its logits from a threshold up: the highest threshold that leaves at least top_p of the
// probability, so that equal logits stay or go together. Of the candidates in order of their index, the one is drawn whose
// share of their probability covers u. A probability is exp((logit - largest) / temperature) in units of 2^-40; sums of
// whole numbers depend on no order, so a row's answer is the same in every batch. A NaN has none.
//
// One block a row. A bf16 logit has 16 bits, so 16 halvings find the threshold.

#define NUM_THREADS 1024
#define ONE 1099511627776.0f

// Mapped to integers in the order of the numbers; 0 is a NaN.
__device__ __forceinline__ u32 ordered(u32 bits) {
    if ((bits & 0x7fffu) > 0x7f80u) return 0;
    if ((bits & 0x7fffu) == 0) bits = 0;
    return bits & 0x8000u ? bits ^ 0xffffu : bits | 0x8000u;
}

__device__ __forceinline__ float number(u32 key) {
    const u32 bits = key & 0x8000u ? key & 0x7fffu : key ^ 0xffffu;
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ u64 probability(u32 key, float largest, float inverse_temperature) {
    return key == 0 ? 0 : u64(__expf((number(key) - largest) * inverse_temperature) * ONE);
}

__device__ u64 sum_of_block(u64 value) {
    __shared__ u64 warp_sums[NUM_THREADS / 32];
    __syncthreads();
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_sums[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// What the logits from `least` up have, together.
__device__ u64 mass(const Vec8* row, u32 row_vectors, u32 least, float largest, float inverse_temperature) {
    u64 sum = 0;
    for (u32 i = threadIdx.x; i < row_vectors; i += NUM_THREADS) {
        const Vec8 vector = row[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const u32 key = ordered(vector.word[j / 2] >> (16 * (j % 2)) & 0xffffu);
            if (key >= least) sum += probability(key, largest, inverse_temperature);
        }
    }
    return sum_of_block(sum);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    sample_random(const Vec8* logits, const float4* seqs, int* ids, u32 row_vectors) {
    const Vec8* row = logits + u64(blockIdx.x) * row_vectors;
    const float4 seq = seqs[blockIdx.x];
    const float inverse_temperature = seq.x;

    __shared__ u32 warp_most[NUM_THREADS / 32];
    u32 most = 0;
    for (u32 i = threadIdx.x; i < row_vectors; i += NUM_THREADS) {
        const Vec8 vector = row[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) most = max(most, ordered(vector.word[j / 2] >> (16 * (j % 2)) & 0xffffu));
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0) warp_most[threadIdx.x / 32] = most;
    __syncthreads();
    most = __reduce_max_sync(0xffffffffu, warp_most[threadIdx.x % 32]);
    const float largest = number(most);

    u32 least = most;
    if (seq.y >= 1.0f) {
        least = 1;
    } else if (seq.y > 0.0f) {
        const u64 total = mass(row, row_vectors, 1, largest, inverse_temperature);
        const u64 wanted = u64(double(seq.y) * double(total));
        // The highest threshold in [low, high) that leaves enough; the lowest one always does.
        u32 low = 1, high = most + 1;
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (mass(row, row_vectors, middle, largest, inverse_temperature) >= wanted) {
                low = middle;
            } else {
                high = middle;
            }
        }
        least = low;
    }

    // Each thread has a part of the row, in order, so that sums before it are sums of threads before it.
    const u32 share = (row_vectors + NUM_THREADS - 1) / NUM_THREADS;
    const u32 begin = min(threadIdx.x * share, row_vectors), end = min(begin + share, row_vectors);
    u64 own = 0;
    for (u32 i = begin; i < end; ++i) {
        const Vec8 vector = row[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const u32 key = ordered(vector.word[j / 2] >> (16 * (j % 2)) & 0xffffu);
            if (key >= least) own += probability(key, largest, inverse_temperature);
        }
    }
    __shared__ u64 sums[NUM_THREADS];
    sums[threadIdx.x] = own;
    const u64 total = sum_of_block(own);
    u64 before = 0;
    for (u32 thread = 0; thread < threadIdx.x; ++thread) before += sums[thread];
    if (total == 0) {
        // Nothing but NaN.
        if (threadIdx.x == 0) ids[blockIdx.x] = 0;
        return;
    }
    const u64 target = min(u64(double(seq.z) * double(total)), total - 1);
    if (target < before || target >= before + own) return;
    for (u32 i = begin; i < end; ++i) {
        const Vec8 vector = row[i];
        for (int j = 0; j < 8; ++j) {
            const u32 key = ordered(vector.word[j / 2] >> (16 * (j % 2)) & 0xffffu);
            if (key < least) continue;
            const u64 part = probability(key, largest, inverse_temperature);
            if (target < before + part) {
                ids[blockIdx.x] = int(8 * i + j);
                return;
            }
            before += part;
        }
    }
}

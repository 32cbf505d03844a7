// Greedy sampling: the index of the largest logit of each row; of equal ones the lowest index.
//
// logits: [num_seqs, vocab_size], vocab_size a multiple of 8; ids: [num_seqs] int32.
// partials: [num_seqs, gridDim.y] and arrived: [num_seqs], which is zero before and after a launch.
// Grid (sequence, part of the row): a block finds the best of its part, and the block of a row that
// arrives last picks among the parts. A candidate is one 64-bit key, so that "larger" means "better":
// the logit mapped to an ordered integer above the inverted index. A NaN is passed over.

__device__ __forceinline__ u64 better(u64 a, u64 b) { return a > b ? a : b; }

__device__ __forceinline__ u64 candidate(float logit, u32 index) {
    // Zeros of either sign are equal; negative numbers order backwards, so all their bits are flipped.
    const u32 bits = __float_as_uint(logit + 0.0f);
    const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return u64(ordered) << 32 | (0xffffffffu - index);
}

__device__ u64 best_of_block(u64 best) {
    __shared__ u64 warp_best[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) best = better(best, __shfl_xor_sync(0xffffffffu, best, offset));
    if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
    __syncthreads();
    best = threadIdx.x % 32 < blockDim.x / 32 ? warp_best[threadIdx.x % 32] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) best = better(best, __shfl_xor_sync(0xffffffffu, best, offset));
    return best;
}

extern "C" __global__ void __launch_bounds__(512)
    sample(const Vec8* logits, int* ids, u64* partials, u32* arrived, u32 row_vectors) {
    const u32 seq = blockIdx.x, part = blockIdx.y, num_parts = gridDim.y;
    const u32 part_vectors = (row_vectors + num_parts - 1) / num_parts;
    const u32 begin = part * part_vectors;
    const u32 end = min(begin + part_vectors, row_vectors);
    const Vec8* row = logits + u64(seq) * row_vectors;
    // Each thread goes upwards, so a strictly larger logit is all that replaces its best.
    float most = -INFINITY;
    u32 most_index = 8 * (begin + threadIdx.x);
#pragma unroll 4
    for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        float value[8];
        unpack(load_once(row + i), value);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            if (value[j] > most) {
                most = value[j];
                most_index = 8 * i + j;
            }
        }
    }
    u64 best = begin + threadIdx.x < end ? candidate(most, most_index) : 0;
    best = best_of_block(best);

    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        partials[u64(seq) * num_parts + part] = best;
        fence_device();
        is_last = atomicAdd(&arrived[seq], 1u) == num_parts - 1;
    }
    __syncthreads();
    if (!is_last) return;
    fence_device();
    best = 0;
    for (u32 i = threadIdx.x; i < num_parts; i += blockDim.x) {
        best = better(best, __ldcg(&partials[u64(seq) * num_parts + i]));
    }
    best = best_of_block(best);
    if (threadIdx.x == 0) {
        ids[seq] = int(0xffffffffu - u32(best));
        arrived[seq] = 0;
    }
}

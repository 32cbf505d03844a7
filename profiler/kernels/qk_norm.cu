// RMS-normalises every query and key head in place.
//
// qkv: [num_tokens, (num_q_heads + 2 num_kv_heads) * HEAD_DIM]; q_weight, k_weight: [HEAD_DIM].
// HEAD_DIM / 8 lanes share a head, one 16-byte vector each; values are not touched. A thread has HEADS_PER_THREAD heads,
// blockDim.x / LANES apart: with many tokens two, as one vector a thread does not keep enough bytes under way.

#define LANES (HEAD_DIM / 8)

extern "C" __global__ void __launch_bounds__(256)
    qk_norm(Vec8* qkv, const Vec8* q_weight, const Vec8* k_weight, u32 num_tokens, u32 num_q_heads,
            u32 num_kv_heads, float epsilon) {
    const u32 lane = threadIdx.x % LANES;
    const u32 heads = num_q_heads + num_kv_heads;
    const u32 heads_per_pass = blockDim.x / LANES;
    const u64 first = u64(blockIdx.x) * heads_per_pass * HEADS_PER_THREAD + threadIdx.x / LANES;

    Vec8* address[HEADS_PER_THREAD];
    Vec8 vector[HEADS_PER_THREAD], weight[HEADS_PER_THREAD];
    bool present[HEADS_PER_THREAD];
#pragma unroll
    for (int k = 0; k < HEADS_PER_THREAD; ++k) {
        const u64 head_of_all = first + u64(k) * heads_per_pass;
        present[k] = head_of_all < u64(num_tokens) * heads;
        // Lanes past the end take part in the shuffles below.
        const u64 token = present[k] ? head_of_all / heads : 0;
        const u32 head = present[k] ? u32(head_of_all % heads) : 0;
        address[k] = qkv + (token * (heads + num_kv_heads) + head) * LANES + lane;
        vector[k] = *address[k];
        weight[k] = (head < num_q_heads ? q_weight : k_weight)[lane];
    }
#pragma unroll
    for (int k = 0; k < HEADS_PER_THREAD; ++k) {
        float value[8], factor[8];
        unpack(vector[k], value);
        unpack(weight[k], factor);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += value[j] * value[j];
        squares = sum_over_lanes<LANES>(squares);
        const float scale = rsqrtf(squares / float(HEAD_DIM) + epsilon);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] *= scale * factor[j];
        if (present[k]) *address[k] = pack(value);
    }
}

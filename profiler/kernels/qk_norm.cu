// RMS-normalises every query and key head in place.
//
// qkv: [num_tokens, (num_q_heads + 2 num_kv_heads) * HEAD_DIM]; q_weight, k_weight: [HEAD_DIM].
// HEAD_DIM / 8 lanes share a head, one 16-byte vector each; values are not touched.

#define LANES (HEAD_DIM / 8)

extern "C" __global__ void __launch_bounds__(256)
    qk_norm(Vec8* qkv, const Vec8* q_weight, const Vec8* k_weight, u32 num_tokens, u32 num_q_heads,
            u32 num_kv_heads, float epsilon) {
    const u32 lane = threadIdx.x % LANES;
    const u32 heads = num_q_heads + num_kv_heads;
    const u64 head_of_all = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    const bool present = head_of_all < u64(num_tokens) * heads;
    // Lanes past the end take part in the shuffles below.
    const u64 token = present ? head_of_all / heads : 0;
    const u32 head = present ? u32(head_of_all % heads) : 0;
    Vec8* address = qkv + (token * (heads + num_kv_heads) + head) * LANES + lane;

    float value[8], factor[8];
    unpack(*address, value);
    unpack((head < num_q_heads ? q_weight : k_weight)[lane], factor);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += value[j] * value[j];
    squares = sum_over_lanes<LANES>(squares);
    const float scale = rsqrtf(squares / float(HEAD_DIM) + epsilon);
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] *= scale * factor[j];
    if (present) *address = pack(value);
}

// Rotates queries and keys in place, NeoX style: element i pairs with element i + HEAD_DIM / 2.
//
// qkv: [num_tokens, (num_q_heads + 2 num_kv_heads) * HEAD_DIM]; positions: [num_tokens] int32;
// cos_sin: [max_positions, HEAD_DIM] fp32, cosines then sines of each position's HEAD_DIM / 2 angles.
// One block a token; a thread rotates eight pairs of one head at a time.

#define LANES (HEAD_DIM / 16)

extern "C" __global__ void __launch_bounds__(512)
    rope(Vec8* qkv, const int* positions, const float4* cos_sin, u32 num_q_heads, u32 num_kv_heads) {
    const u64 token = blockIdx.x;
    const u32 lane = threadIdx.x % LANES;
    const float4* angles = cos_sin + u64(positions[token]) * (HEAD_DIM / 4) + lane * 2;
    const float4 cos_low = angles[0], cos_high = angles[1];
    const float4 sin_low = angles[HEAD_DIM / 8], sin_high = angles[HEAD_DIM / 8 + 1];
    const float c[8] = {cos_low.x, cos_low.y, cos_low.z, cos_low.w, cos_high.x, cos_high.y, cos_high.z, cos_high.w};
    const float s[8] = {sin_low.x, sin_low.y, sin_low.z, sin_low.w, sin_high.x, sin_high.y, sin_high.z, sin_high.w};

    const u32 heads = num_q_heads + num_kv_heads;
    Vec8* row = qkv + token * (heads + num_kv_heads) * (HEAD_DIM / 8);
    for (u32 head = threadIdx.x / LANES; head < heads; head += blockDim.x / LANES) {
        Vec8* first = row + head * (HEAD_DIM / 8) + lane;
        Vec8* second = first + LANES;
        float a[8], b[8];
        unpack(*first, a);
        unpack(*second, b);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float rotated = a[j] * c[j] - b[j] * s[j];
            b[j] = b[j] * c[j] + a[j] * s[j];
            a[j] = rotated;
        }
        *first = pack(a);
        *second = pack(b);
    }
}

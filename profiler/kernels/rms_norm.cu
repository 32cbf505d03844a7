// Adds the residual and RMS-normalises: residual += x; out = residual / rms(residual) * weight.
//
// x, residual, out: [num_tokens, hidden_size]; weight: [hidden_size]. The sum is rounded to bf16 once,
// stored, and that value is normalised, in fp32. One block a token; each thread keeps its VECTORS vectors in
// registers between the passes. hidden_size is a multiple of 8, at most 8 * VECTORS * blockDim.x.

extern "C" __global__ void __launch_bounds__(VECTORS == 4 ? 1024 : 512)
    rms_norm(const Vec8* x, Vec8* residual, const Vec8* weight, Vec8* out, u32 row_vectors, float epsilon) {
    const u64 row = u64(blockIdx.x) * row_vectors;
    float value[VECTORS][8];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const u32 i = threadIdx.x + k * blockDim.x;
        if (i < row_vectors) {
            float added[8];
            const Vec8 x_vector = load_once(x + row + i);
            const Vec8 residual_vector = residual[row + i];
            unpack(x_vector, added);
            unpack(residual_vector, value[k]);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[k][j] += added[j];
            const Vec8 rounded = pack(value[k]);
            residual[row + i] = rounded;
            unpack(rounded, value[k]);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += value[k][j] * value[k][j];
        }
    }

    __shared__ float warp_sums[32];
    squares = sum_over_lanes<32>(squares);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = squares;
    __syncthreads();
    const u32 num_warps = blockDim.x / 32;
    float total = threadIdx.x % 32 < num_warps ? warp_sums[threadIdx.x % 32] : 0.0f;
    total = sum_over_lanes<32>(total);
    const float scale = rsqrtf(total / float(row_vectors * 8) + epsilon);

#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const u32 i = threadIdx.x + k * blockDim.x;
        if (i < row_vectors) {
            float factor[8];
            unpack(weight[i], factor);
#pragma unroll
            for (int j = 0; j < 8; ++j) factor[j] *= value[k][j] * scale;
            out[row + i] = pack(factor);
        }
    }
}

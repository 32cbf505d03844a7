// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)), in fp32.
//
// gate_up: [num_tokens, 2 * intermediate_size], gate first; out: [num_tokens, intermediate_size].
// Grid (token, part of the row); one 16-byte vector a thread. intermediate_size is a multiple of 8.

extern "C" __global__ void __launch_bounds__(256) silu_mul(const Vec8* gate_up, Vec8* out, u32 row_vectors) {
    const u64 token = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= row_vectors) return;
    const Vec8* row = gate_up + token * 2 * row_vectors;
    const Vec8 gate_vector = load_once(row + i);
    const Vec8 up_vector = load_once(row + row_vectors + i);
    float gate[8], up[8];
    unpack(gate_vector, gate);
    unpack(up_vector, up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = __fdividef(gate[j], 1.0f + __expf(-gate[j])) * up[j];
    out[token * row_vectors + i] = pack(gate);
}

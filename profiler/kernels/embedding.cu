// Gathers one row of the embedding per token.
//
// ids: [num_tokens] int32, each a row of table; table: [vocab_size, hidden_size]; out: [num_tokens, hidden_size].
// One block a token, one 16-byte vector a thread and pass. hidden_size is a multiple of 8.

extern "C" __global__ void __launch_bounds__(512)
    embedding(const int* ids, const Vec8* table, Vec8* out, u32 row_vectors) {
    const u64 token = blockIdx.x;
    const Vec8* row = table + u64(ids[token]) * row_vectors;
    Vec8* destination = out + token * row_vectors;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < row_vectors; i += blockDim.x) destination[i] = load_once(row + i);
}

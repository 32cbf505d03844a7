// Gathers one row of the embedding per token.
//
// ids: [num_tokens] int32, each a row of table; table: [vocab_size, hidden_size]; out: [num_tokens, hidden_size].
// One block a token; a thread asks for two 16-byte vectors before it writes one. hidden_size is a multiple of 8.

extern "C" __global__ void __launch_bounds__(512)
    embedding(const int* ids, const Vec8* table, Vec8* out, u32 row_vectors) {
    const u64 token = blockIdx.x;
    const Vec8* row = table + u64(ids[token]) * row_vectors;
    Vec8* destination = out + token * row_vectors;
    for (u32 i = threadIdx.x; i < row_vectors; i += 2 * blockDim.x) {
        const u32 j = i + blockDim.x;
        const Vec8 one = load_once(row + i);
        const Vec8 two = load_once(row + (j < row_vectors ? j : i));
        destination[i] = one;
        if (j < row_vectors) destination[j] = two;
    }
}

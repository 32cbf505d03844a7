// Writes keys and values to their slots in the paged KV cache.
//
// qkv: [num_tokens, token_vectors * 8], keys at vector k_offset, values right behind them;
// slots: [num_tokens] int64, block * block_size + offset, negative for a token that is not kept;
// k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]. One block a token; a
// thread asks for two 16-byte vectors before it writes one.

extern "C" __global__ void __launch_bounds__(512)
    kv_cache_write(const Vec8* qkv, const i64* slots, Vec8* k_cache, Vec8* v_cache, u32 token_vectors,
                   u32 k_offset, u32 kv_vectors) {
    const u64 token = blockIdx.x;
    const i64 slot = slots[token];
    if (slot < 0) return;
    const Vec8* source = qkv + token * token_vectors + k_offset;
    Vec8* keys = k_cache + u64(slot) * kv_vectors;
    Vec8* values = v_cache + u64(slot) * kv_vectors;
    for (u32 i = threadIdx.x; i < 2 * kv_vectors; i += 2 * blockDim.x) {
        const u32 j = i + blockDim.x;
        const bool has_second = j < 2 * kv_vectors;
        const Vec8 one = load_once(source + i);
        const Vec8 two = load_once(source + (has_second ? j : i));
        *(i < kv_vectors ? keys + i : values + (i - kv_vectors)) = one;
        if (has_second) *(j < kv_vectors ? keys + j : values + (j - kv_vectors)) = two;
    }
}

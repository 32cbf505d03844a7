// Fills memory with bf16 values, uniform in [-scale, scale), from a counter-based generator.
//
// out: [num_vectors * 8]. One thread makes one 16-byte vector at a time, grid-stride. The values are
// operands of timed launches: never zeros, which some units multiply faster and with less power.

__device__ __forceinline__ u64 mix(u64 x) {
    // The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

__device__ __forceinline__ float uniform(u32 bits16) { return float(int(bits16) - 32768) * (1.0f / 32768.0f); }

extern "C" __global__ void __launch_bounds__(256) fill(Vec8* out, u64 num_vectors, u64 seed, float scale) {
    const u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < num_vectors; i += stride) {
        const u64 first = mix(seed + (2 * i + 1) * 0x9e3779b97f4a7c15ull);
        const u64 second = mix(seed + (2 * i + 2) * 0x9e3779b97f4a7c15ull);
        float value[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            value[j] = scale * uniform(u32(first >> (16 * j)) & 0xffffu);
            value[4 + j] = scale * uniform(u32(second >> (16 * j)) & 0xffffu);
        }
        out[i] = pack(value);
    }
}

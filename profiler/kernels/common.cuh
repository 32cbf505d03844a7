// Shared by every kernel: types and bf16 arithmetic, with no header, so that NVRTC alone compiles them.
//
// A bf16 value is the upper half of an fp32 one; two travel in a 32-bit word, the lower-numbered
// element in the low half, and eight in a 16-byte vector, the unit of every global access.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INFINITY __int_as_float(0x7f800000)

struct alignas(16) Vec8 {
    u32 word[4];
};

__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounds to nearest even.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void unpack(const Vec8& vector, float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[2 * i] = bf16_low(vector.word[i]);
        value[2 * i + 1] = bf16_high(vector.word[i]);
    }
}

__device__ __forceinline__ Vec8 pack(const float (&value)[8]) {
    Vec8 vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) vector.word[i] = bf16_pair(value[2 * i], value[2 * i + 1]);
    return vector;
}

// Read once by this kernel: kept out of the L1 cache.
__device__ __forceinline__ Vec8 load_once(const Vec8* address) {
    Vec8 vector;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vector.word[0]), "=r"(vector.word[1]), "=r"(vector.word[2]), "=r"(vector.word[3])
                 : "l"(address));
    return vector;
}

// Orders this thread's accesses to memory that other blocks see, which is all that handing over results takes.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

template <int WIDTH>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

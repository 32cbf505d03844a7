// Attention of one query per sequence over the paged KV cache, split along the keys (flash-decoding).
//
// q: [num_tokens, q_stride], HEAD_DIM values at head * HEAD_DIM of each row; k_cache, v_cache: [num_blocks, 16,
// num_kv_heads, HEAD_DIM]; out: [num_tokens, num_q_heads * HEAD_DIM]; block_tables: [num_seqs, table_stride]
// int32. seqs: (token, kv_len, first item, num_items) of each sequence; items: (sequence, first KV block, past the last
// KV block, -) of each split; one without a block is passed over. partial_out: fp32 [num_items, gridDim.x, 8, HEAD_DIM] and partial_stats: [num_items,
// gridDim.x, 8] of (maximum, sum) hold the splits' results; arrived: [num_seqs, gridDim.x] is zero before and after.
//
// Grid (KV head and group of up to eight of its q heads, item). The warps of a block take the item's KV blocks in
// turn and keep a softmax each; the block joins them, and the last block of a sequence and head to arrive joins the items.
//
// A warp computes S^T = K Q^T and O^T = V^T P^T with mma.sync m16n8k16: keys or dimensions fill the 16 rows, q heads
// the 8 columns. The order of the summed-over elements is free, and so is that of the rows, so each thread loads 16
// consecutive bytes of a key or value straight into the fragments and nothing is staged in shared memory: in K
// (row = key) a thread's eight dimensions serve two k-steps; in V^T (row = dimension) the halves of two keys are paired.

#define WARPS 4
#define GROUP 8
#define PADDED (HEAD_DIM + 2)

__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transpose(u32 fragment) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
    return result;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float max_over_keys(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 4));
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 8));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 16));
}
__device__ __forceinline__ u16 bf16_bits(float value) { return u16(bf16_pair(value, 0.0f) & 0xffffu); }

// Joins the items of a sequence: a thread adds up four neighbouring elements over some of the items.
__device__ __forceinline__ void join_items(const int4& seq, u32 num_heads, u16* out_row, const float* partial_out,
                                           const float2* partial_stats, float* shared) {
    const u32 columns = num_heads * HEAD_DIM / 4;
    const u32 parts = max(32 * WARPS / columns, 1u);
    float4* part_sums = reinterpret_cast<float4*>(shared);
    float* part_totals = shared + 4 * 32 * WARPS;
    for (u32 first = 0; first < columns; first += 32 * WARPS) {
        const u32 column = first + (parts > 1 ? threadIdx.x % columns : threadIdx.x);
        const u32 part = parts > 1 ? threadIdx.x / columns : 0;
        const bool is_busy = column < columns && part < parts;
        const u32 head = is_busy ? column * 4 / HEAD_DIM : 0;
        const u64 stride = u64(gridDim.x) * GROUP;
        const float2* stats = partial_stats + u64(seq.z) * stride + blockIdx.x * GROUP + head;
        const float* source = partial_out + (u64(seq.z) * stride + blockIdx.x * GROUP) * HEAD_DIM + column * 4;
        float most = -INFINITY, total = 0.0f;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (is_busy) {
#pragma unroll 8
            for (int item = 0; item < seq.w; ++item) most = fmaxf(most, __ldcg(&stats[item * stride]).x);
#pragma unroll 8
            for (int item = part; item < seq.w; item += parts) {
                const float2 own = __ldcg(&stats[item * stride]);
                const float4 values = __ldcg(reinterpret_cast<const float4*>(source + item * stride * HEAD_DIM));
                const float factor = exp2_fast(own.x - most);
                total += own.y * factor;
                sum.x += values.x * factor;
                sum.y += values.y * factor;
                sum.z += values.z * factor;
                sum.w += values.w * factor;
            }
        }
        part_sums[threadIdx.x] = sum;
        part_totals[threadIdx.x] = total;
        __syncthreads();
        if (is_busy && part == 0) {
            for (u32 other = 1; other < parts; ++other) {
                const float4 values = part_sums[other * columns + threadIdx.x];
                total += part_totals[other * columns + threadIdx.x];
                sum.x += values.x;
                sum.y += values.y;
                sum.z += values.z;
                sum.w += values.w;
            }
            const float inverse = 1.0f / total;
            *reinterpret_cast<uint2*>(out_row + column * 4) =
                make_uint2(bf16_pair(sum.x * inverse, sum.y * inverse), bf16_pair(sum.z * inverse, sum.w * inverse));
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
    attention_decode(const u16* q, const u16* k_cache, const u16* v_cache, u16* out, const int* block_tables,
                     const int4* seqs, const int4* items, float* partial_out, float2* partial_stats, u32* arrived,
                     u32 table_stride, u32 q_stride, u32 num_q_heads, u32 num_kv_heads, float scale_log2) {
    const u32 heads_per_kv = num_q_heads / num_kv_heads;
    const u32 groups = (heads_per_kv + GROUP - 1) / GROUP;
    const u32 kv_head = blockIdx.x / groups, group = blockIdx.x % groups;
    const u32 first_head = kv_head * heads_per_kv + group * GROUP;
    const u32 num_heads = min(heads_per_kv - group * GROUP, GROUP);
    const int4 item = items[blockIdx.y];
    // A recorded launch has room for more items than a step may need.
    if (item.y >= item.z) return;
    const int4 seq = seqs[item.x];
    const int kv_len = seq.y;
    const int* table = block_tables + u64(item.x) * table_stride;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = lane / 4, column = lane % 4;

    // Columns without a q head repeat the last one; their results are dropped.
    Vec8 query[HEAD_DIM / 32];
    const u16* q_row = q + u64(seq.x) * q_stride + (first_head + min(u32(row), num_heads - 1)) * HEAD_DIM;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; ++k) {
        query[k] = *reinterpret_cast<const Vec8*>(q_row + k * 32 + column * 8);
    }

    const i64 token_stride = i64(num_kv_heads) * HEAD_DIM;
    const u16* keys = k_cache + kv_head * HEAD_DIM + row * token_stride + column * 8;
    const u16* values = v_cache + kv_head * HEAD_DIM + 2 * column * token_stride + row * 8;
    float output[HEAD_DIM / 16][4] = {};
    float highest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};

    Vec8 key[HEAD_DIM / 32][2], value[HEAD_DIM / 64][4];
    const auto load_keys = [&](int page) {
        const u16* source = keys + i64(page) * 16 * token_stride;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                key[k][half] = load_once(reinterpret_cast<const Vec8*>(source + half * 8 * token_stride + k * 32));
            }
        }
    };
    const auto load_values = [&](int page, int first_key) {
        const u16* source = values + i64(page) * 16 * token_stride;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 64; ++d) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key_row = i % 2 + i / 2 * 8;
                // Past the end lies whatever another sequence left, and even a NaN times zero is a NaN.
                if (first_key + 2 * column + key_row < kv_len) {
                    value[d][i] =
                        load_once(reinterpret_cast<const Vec8*>(source + key_row * token_stride + d * 64));
                } else {
                    value[d][i] = Vec8{{0, 0, 0, 0}};
                }
            }
        }
    };

    int block = item.y + int(warp);
    int page = block < item.z ? table[block] : 0;
    if (block < item.z) {
        load_keys(page);
        load_values(page, block * 16);
    }
    for (; block < item.z; block += WARPS) {
        const bool has_next = block + WARPS < item.z;
        const int first_key = block * 16;
        page = has_next ? table[block + WARPS] : 0;

        // Two chains of products, as each waits for the one before.
        float score[2][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; ++k) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                multiply_add(score[step], key[k][0].word[2 * step], key[k][1].word[2 * step],
                             key[k][0].word[2 * step + 1], key[k][1].word[2 * step + 1], query[k].word[2 * step],
                             query[k].word[2 * step + 1]);
            }
        }
        // The registers of the keys are free again: the next ones travel during the softmax.
        if (has_next) load_keys(page);
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool is_present = first_key + row + i / 2 * 8 < kv_len;
            weight[i] = is_present ? (score[0][i] + score[1][i]) * scale_log2 : -INFINITY;
        }
        float rescale[2];
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            // Every block holds a key, so the maximum is finite.
            const float higher = fmaxf(highest[head], max_over_keys(fmaxf(weight[head], weight[2 + head])));
            rescale[head] = exp2_fast(highest[head] - higher);
            highest[head] = higher;
            weight[head] = exp2_fast(weight[head] - higher);
            weight[2 + head] = exp2_fast(weight[2 + head] - higher);
            sum[head] = sum[head] * rescale[head] + weight[head] + weight[2 + head];
        }
        if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
            for (int t = 0; t < HEAD_DIM / 16; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[t][i] *= rescale[i % 2];
            }
        }
        const u32 b0 = transpose(bf16_pair(weight[0], weight[1]));
        const u32 b1 = transpose(bf16_pair(weight[2], weight[3]));
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 64; ++d) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                multiply_add(output[d * 4 + t], __byte_perm(value[d][0].word[t], value[d][1].word[t], 0x5410),
                             __byte_perm(value[d][0].word[t], value[d][1].word[t], 0x7632),
                             __byte_perm(value[d][2].word[t], value[d][3].word[t], 0x5410),
                             __byte_perm(value[d][2].word[t], value[d][3].word[t], 0x7632), b0, b1);
            }
        }
        if (has_next) load_values(page, first_key + 16 * WARPS);
    }

    __shared__ __align__(16) float shared_out[WARPS][GROUP][PADDED];
    __shared__ float shared_max[WARPS][GROUP];
    __shared__ float shared_sum[WARPS][GROUP];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
        float total = sum[head];
        total += __shfl_xor_sync(0xffffffffu, total, 4);
        total += __shfl_xor_sync(0xffffffffu, total, 8);
        total += __shfl_xor_sync(0xffffffffu, total, 16);
        const u32 h = 2 * column + head;
        if (row == 0) {
            shared_max[warp][h] = highest[head];
            shared_sum[warp][h] = total;
        }
        if (h < num_heads) {
#pragma unroll
            for (int t = 0; t < HEAD_DIM / 16; ++t) {
                *reinterpret_cast<float2*>(&shared_out[warp][h][t / 4 * 64 + row * 8 + t % 4 * 2]) =
                    make_float2(output[t][head], output[t][2 + head]);
            }
        }
    }
    __syncthreads();

    const bool is_split = seq.w > 1;
    const u64 slot = (u64(blockIdx.y) * gridDim.x + blockIdx.x) * GROUP;
    u16* out_row = out + (u64(seq.x) * num_q_heads + first_head) * HEAD_DIM;
    for (u32 i = threadIdx.x; i < num_heads * HEAD_DIM; i += 32 * WARPS) {
        const u32 head = i / HEAD_DIM, d = i % HEAD_DIM;
        float most = shared_max[0][head];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, shared_max[w][head]);
        float joined = 0.0f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2_fast(shared_max[w][head] - most);
            joined += shared_out[w][head][d] * factor;
            total += shared_sum[w][head] * factor;
        }
        if (is_split) {
            partial_out[slot * HEAD_DIM + i] = joined;
            if (d == 0) partial_stats[slot + head] = make_float2(most, total);
        } else {
            out_row[i] = bf16_bits(joined / total);
        }
    }
    if (!is_split) return;

    __shared__ bool is_last;
    fence_device();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = arrived + u64(item.x) * gridDim.x + blockIdx.x;
        is_last = atomicAdd(counter, 1u) == u32(seq.w) - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    fence_device();
    join_items(seq, num_heads, out_row, partial_out, partial_stats, &shared_out[0][0][0]);
}

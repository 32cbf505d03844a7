// Causal attention of prefill chunks over the paged KV cache on Hopper, the FlashAttention-3 way (Shah et al. 2024).
//
// What `attention_prefill` computes, from the same tables, with Hopper's own units. q_map: tensor map of q as [num_tokens,
// q_stride], boxes of [BLOCK_M, 64]; k_map, v_map: of the caches as [num_blocks * 16, num_kv_heads, HEAD_DIM], boxes of
// [16, 1, 64]; all with the 128-byte swizzle.
//
// Grid (q head, tile of BLOCK_M query rows). A warp of the third warpgroup copies: queries once, then 128 keys and 128 values in turn, a
// copy for each KV block, into two stages. The first two own 64 rows each and walk from the diagonal down: the scores of
// one step are issued together with the values of the step before, and while the tensor cores are at it the softmax
// goes on. The warpgroups take turns to issue, so that one's softmax runs under the other's products.
//
// tiles: (chunk, first row, first step, past the last step) and (first slot, num_items, slot, group) of each block, a step
// being 128 keys. When there are few tiles, their keys are split among num_items blocks: each leaves its unnormalised
// output and (maximum, sum) in its slot of partial_out, fp32 [num_slots, gridDim.x, BLOCK_M, HEAD_DIM], and partial_stats,
// and the last one of a group and head to arrive joins them; arrived: [num_groups, gridDim.x] is zero before and after.
//
// A tile of 64 columns is a column of 128-byte rows, 8 of which make up the unit that the swizzle and wgmma work on.
// Keys and queries are K-major operands; values are an MN-major one, so nothing is transposed.

#define BLOCK_M 128
#define BLOCK_N 128
#define STAGES 2
#define HALVES (HEAD_DIM / 64)
#define HALF_BYTES (128 * 128)
#define TILE_BYTES (HALVES * HALF_BYTES)
#define NUM_THREADS 384

struct alignas(128) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void multiply_scores(float (&d)[64], u64 a, u64 b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "l"(a), "l"(b), "r"(int(accumulate)));
}

#if HEAD_DIM == 128
__device__ __forceinline__ void multiply_values(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#else
__device__ __forceinline__ void multiply_values(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void copy_rows(u32 shared, const TensorMap* map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared),
        "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}
__device__ __forceinline__ void copy_block(u32 shared, const TensorMap* map, u32 barrier, int column, int head, int slot) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared),
        "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(slot)
        : "memory");
}

// Named barriers of some of the block's warps.
__device__ __forceinline__ void sync_threads(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void signal_threads(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of accumulators over the wait for them.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Describes a swizzled operand: groups of 8 rows lie 1,024 bytes apart, columns of 64 values HALF_BYTES.
__device__ __forceinline__ u64 operand(u32 shared) {
    return u64((shared & 0x3ffff) >> 4) | u64(HALF_BYTES >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Turns scores into weights; returns what the running output must be multiplied by. Index 0 is row lane / 4, 1 that plus 8.
__device__ __forceinline__ void softmax_step(float (&score)[BLOCK_N / 2], float (&highest)[2], float (&sum)[2],
                                             float (&rescale)[2], int first_key, int first_position, bool is_masked,
                                             float scale_log2) {
    const int lane = threadIdx.x % 32;
    if (is_masked) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
            const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (key > first_position + lane / 4 + i % 4 / 2 * 8) score[i] = -INFINITY;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = highest[half];
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i += 4) {
            most = fmaxf(most, fmaxf(score[i + 2 * half], score[i + 2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // A row that has seen no key yet keeps -inf as its maximum, but must not compute inf - inf.
        const float shift = most == -INFINITY ? 0.0f : most * scale_log2;
        rescale[half] = exp2_fast(highest[half] * scale_log2 - shift);
        highest[half] = most;
        float added = 0.0f;
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i += 4) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float& s = score[i + 2 * half + j];
                s = exp2_fast(s * scale_log2 - shift);
                added += s;
            }
        }
        sum[half] = sum[half] * rescale[half] + added;
    }
}

__device__ __forceinline__ void pack_weights(const float (&score)[BLOCK_N / 2], u32 (&weight)[BLOCK_N / 16][4]) {
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[k][i] = bf16_pair(score[8 * k + 2 * i], score[8 * k + 2 * i + 1]);
    }
}

__device__ __forceinline__ void issue_scores(float (&score)[BLOCK_N / 2], u32 queries, u32 keys) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        const u32 offset = k / 4 * HALF_BYTES + k % 4 * 32;
        multiply_scores(score, operand(queries + offset), operand(keys + offset), k > 0);
    }
}

__device__ __forceinline__ void issue_values(float (&out)[HEAD_DIM / 2], const u32 (&weight)[BLOCK_N / 16][4],
                                             u32 values) {
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) multiply_values(out, weight[k], operand(values + k * 16 * 128));
}

struct Work {
    int first_row, num_rows, first_token, context_len, kv_len, end_step, num_steps;
    // Of a split: the slots of all items, this item's, and the counter of those that have arrived.
    int first_slot, num_items, slot;
    float* partial_out;
    float2* partial_stats;
    u32* arrived;
};

// Copies the queries, then keys and values from the diagonal down.
__device__ __forceinline__ void copy_all(const Work& work, const TensorMap* q_map, const TensorMap* k_map,
                                         const TensorMap* v_map, const int* table, u32 table_stride, u32 head,
                                         u32 kv_head, u32 q_tile, u32 kv_tiles, u32 full, u32 empty, u32 q_full) {
    const u32 lane = threadIdx.x % 32;
    if (lane == 0) {
        barrier_expect(q_full, TILE_BYTES);
        for (int half = 0; half < HALVES; ++half) {
            copy_rows(q_tile + half * HALF_BYTES, q_map, q_full, head * HEAD_DIM + half * 64,
                      work.first_token + work.first_row);
        }
    }
    for (int step = 0; step < work.num_steps; ++step) {
        const u32 stage = step % STAGES, parity = step / STAGES % 2;
        const u32 first_block = (work.end_step - 1 - step) * (BLOCK_N / 16);
        const u32 block = lane / HALVES, half = lane % HALVES;
        const u32 row = min(first_block + block, table_stride - 1);
        const int slot = lane < 8 * HALVES ? table[row] * 16 : 0;
#pragma unroll
        for (u32 is_value = 0; is_value < 2; ++is_value) {
            const u32 index = 2 * stage + is_value;
            barrier_wait(empty + 8 * index, parity ^ 1);
            if (lane == 0) barrier_expect(full + 8 * index, TILE_BYTES);
            __syncwarp();
            if (lane < 8 * HALVES) {
                copy_block(kv_tiles + index * TILE_BYTES + half * HALF_BYTES + block * 16 * 128,
                           is_value ? v_map : k_map, full + 8 * index, half * 64, kv_head, slot);
            }
        }
    }
}

// Writes a warp's rows, not yet divided by their sums, to the item's slot.
__device__ __forceinline__ void leave_partial(const Work& work, const float (&output)[HEAD_DIM / 2],
                                              const float (&highest)[2], const float (&sum)[2], u32 head,
                                              u32 num_q_heads, float scale_log2) {
    const u32 lane = threadIdx.x % 32;
    const u64 slot = (u64(work.slot) * num_q_heads + head) * BLOCK_M;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const u32 row = threadIdx.x / 32 * 16 + half * 8 + lane / 4;
        if (work.first_row + int(row) >= work.num_rows) continue;
        if (lane % 4 == 0) work.partial_stats[slot + row] = make_float2(highest[half] * scale_log2, total);
        float* destination = work.partial_out + (slot + row) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
            *reinterpret_cast<float2*>(destination + chunk * 8) =
                make_float2(output[4 * chunk + 2 * half], output[4 * chunk + 2 * half + 1]);
        }
    }
}

// The last of a tile's items adds up all of them: a thread takes eight elements of a row at a time.
__device__ __forceinline__ void join_items(const Work& work, u16* out, u32 head, u32 num_q_heads) {
    __shared__ bool is_last;
    fence_device();
    sync_threads(1, 256);
    if (threadIdx.x == 0) {
        is_last = atomicAdd(work.arrived, 1u) == u32(work.num_items) - 1;
        if (is_last) *work.arrived = 0;
    }
    sync_threads(1, 256);
    if (!is_last) return;
    fence_device();
    const u32 num_rows = min(work.num_rows - work.first_row, BLOCK_M);
    for (u32 i = threadIdx.x; i < num_rows * (HEAD_DIM / 8); i += 256) {
        const u32 row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
        float most = -INFINITY, total = 0.0f, joined[8] = {};
        for (int item = 0; item < work.num_items; ++item) {
            const u64 slot = (u64(work.first_slot + item) * num_q_heads + head) * BLOCK_M + row;
            most = fmaxf(most, __ldcg(&work.partial_stats[slot]).x);
        }
#pragma unroll 4
        for (int item = 0; item < work.num_items; ++item) {
            const u64 slot = (u64(work.first_slot + item) * num_q_heads + head) * BLOCK_M + row;
            const float2 stats = __ldcg(&work.partial_stats[slot]);
            const float4* source = reinterpret_cast<const float4*>(work.partial_out + slot * HEAD_DIM + chunk * 8);
            const float4 low = __ldcg(source), high = __ldcg(source + 1);
            const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const float factor = exp2_fast(stats.x - most);
            total += stats.y * factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) joined[j] += values[j] * factor;
        }
        const float inverse = 1.0f / total;
#pragma unroll
        for (int j = 0; j < 8; ++j) joined[j] *= inverse;
        const u64 token = u64(work.first_token) + work.first_row + row;
        *reinterpret_cast<Vec8*>(out + (token * num_q_heads + head) * HEAD_DIM + chunk * 8) = pack(joined);
    }
}

// Attention of a warpgroup's 64 rows.
__device__ __forceinline__ void attend(const Work& work, u16* out, u32 q_tile, u32 kv_tiles, unsigned char* q_bytes,
                                       unsigned char* kv_bytes, u32 q_full, u32 full, u32 empty, u32 head,
                                       u32 num_q_heads, float scale_log2) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 group = warp / 4;
    const u32 queries = q_tile + group * 64 * 128;
    const int first_position = work.context_len + work.first_row + int(warp) * 16;
    const int lowest_position = work.context_len + work.first_row + int(group) * 64;
    float score[BLOCK_N / 2], output[HEAD_DIM / 2];
    u32 weight[BLOCK_N / 16][4];
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, rescale[2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = 0.0f;

    barrier_wait(q_full, 0);
    barrier_wait(full, 0);
    products_begin();
    issue_scores(score, queries, kv_tiles);
    products_commit();
    products_wait<0>();
    hold(score);
    if (lane == 0) barrier_arrive(empty);
    int first_key = (work.end_step - 1) * BLOCK_N;
    softmax_step(score, highest, sum, rescale, first_key, first_position, first_key + BLOCK_N - 1 > lowest_position,
                 scale_log2);
    pack_weights(score, weight);

    // Past the last key lies whatever another sequence left, and even a NaN times zero is a NaN.
    barrier_wait(full + 8, 0);
    if (first_key + BLOCK_N > work.kv_len) {
        const u32 first_absent = work.kv_len - first_key;
        for (u32 i = threadIdx.x; i < (BLOCK_N - first_absent) * HALVES * 8; i += 256) {
            const u32 row = first_absent + i / (HALVES * 8), half = i / 8 % HALVES, chunk = i % 8;
            *reinterpret_cast<Vec8*>(kv_bytes + TILE_BYTES + half * HALF_BYTES + row * 128 + chunk * 16) =
                Vec8{{0, 0, 0, 0}};
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync_threads(1, 256);
    }

    const int my_turn = 2 + group, other_turn = 3 - group;
    if (group == 1 && work.num_steps > 1) signal_threads(other_turn, 256);
    for (int step = 1; step < work.num_steps; ++step) {
        const u32 keys = 2 * (step % STAGES), values = 2 * ((step - 1) % STAGES) + 1;
        barrier_wait(full + 8 * keys, step / STAGES % 2);
        sync_threads(my_turn, 256);
        products_begin();
        issue_scores(score, queries, kv_tiles + keys * TILE_BYTES);
        products_commit();
        barrier_wait(full + 8 * values, (step - 1) / STAGES % 2);
        products_begin();
        issue_values(output, weight, kv_tiles + values * TILE_BYTES);
        products_commit();
        if (group == 0 || step + 1 < work.num_steps) signal_threads(other_turn, 256);
        products_wait<1>();
        hold(score);
        if (lane == 0) barrier_arrive(empty + 8 * keys);

        first_key -= BLOCK_N;
        softmax_step(score, highest, sum, rescale, first_key, first_position,
                     first_key + BLOCK_N - 1 > lowest_position, scale_log2);
        products_wait<0>();
        hold(output);
        if (lane == 0) barrier_arrive(empty + 8 * values);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= rescale[i % 4 / 2];
        pack_weights(score, weight);
    }
    const u32 values = 2 * ((work.num_steps - 1) % STAGES) + 1;
    barrier_wait(full + 8 * values, (work.num_steps - 1) / STAGES % 2);
    products_begin();
    issue_values(output, weight, kv_tiles + values * TILE_BYTES);
    products_commit();
    products_wait<0>();
    hold(output);

    if (work.num_items > 1) {
        leave_partial(work, output, highest, sum, head, num_q_heads, scale_log2);
        join_items(work, out, head, num_q_heads);
        return;
    }

    // Accumulators become rows through the warpgroup's part of the query tile, which nothing reads any more.
    sync_threads(4 + group, 128);
    unsigned char* rows = q_bytes + group * 64 * 128;
    const u32 warp_row = warp % 4 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = 1.0f / total;
        const u32 row = warp_row + half * 8 + lane / 4;
#pragma unroll
        for (u32 chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
            const u32 pair =
                bf16_pair(output[4 * chunk + 2 * half] * inverse, output[4 * chunk + 2 * half + 1] * inverse);
            *reinterpret_cast<u32*>(rows + chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ (row & 7)) * 16 +
                                    lane % 4 * 4) = pair;
        }
    }
    __syncwarp();
    for (u32 i = lane; i < 16 * HEAD_DIM / 8; i += 32) {
        const u32 row = warp_row + i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
        const int tile_row = work.first_row + int(group * 64 + row);
        if (tile_row < work.num_rows) {
            const u64 token = u64(work.first_token) + tile_row;
            *reinterpret_cast<Vec8*>(out + (token * num_q_heads + head) * HEAD_DIM + chunk * 8) =
                *reinterpret_cast<const Vec8*>(rows + chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ (row & 7)) * 16);
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    attention_prefill_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, u16* out, const int* block_tables,
                           const int4* seqs, const int4* tiles, float* partial_out, float2* partial_stats,
                           u32* arrived, u32 table_stride, u32 num_kv_heads, float scale_log2) {
    extern __shared__ unsigned char shared_memory[];
    __shared__ __align__(8) u64 barriers[1 + 4 * STAGES];
    // The swizzle works on addresses, so tiles start at multiples of its 1,024 bytes.
    const u32 unaligned = shared_address(shared_memory);
    const u32 q_tile = (unaligned + 1023) & ~1023u;
    unsigned char* q_bytes = shared_memory + (q_tile - unaligned);
    const u32 kv_tiles = q_tile + TILE_BYTES;
    unsigned char* kv_bytes = q_bytes + TILE_BYTES;
    const u32 q_full = shared_address(barriers);
    const u32 full = q_full + 8, empty = full + 16 * STAGES;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (u32 i = 0; i < 2 * STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    const u32 head = blockIdx.x, num_q_heads = gridDim.x;
    const int4 tile = tiles[2 * blockIdx.y], split = tiles[2 * blockIdx.y + 1];
    const int4 seq = seqs[tile.x];
    Work work;
    work.first_row = tile.y;
    work.first_token = seq.x;
    work.num_rows = seq.y;
    work.context_len = seq.z;
    work.kv_len = seq.z + seq.y;
    work.end_step = tile.w;
    work.num_steps = tile.w - tile.z;
    work.first_slot = split.x;
    work.num_items = split.y;
    work.slot = split.z;
    work.partial_out = partial_out;
    work.partial_stats = partial_stats;
    work.arrived = arrived + u64(split.w) * num_q_heads + head;
    const u32 warp = threadIdx.x / 32;
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 8) {
            copy_all(work, &q_map, &k_map, &v_map, block_tables + u64(tile.x) * table_stride, table_stride, head,
                     head / (num_q_heads / num_kv_heads), q_tile, kv_tiles, full, empty, q_full);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        attend(work, out, q_tile, kv_tiles, q_bytes, kv_bytes, q_full, full, empty, head, num_q_heads, scale_log2);
    }
}

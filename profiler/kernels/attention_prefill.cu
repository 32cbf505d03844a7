// Causal attention of prefill chunks over the paged KV cache, the FlashAttention-2 way (Dao 2023).
//
// q: [num_tokens, q_stride], HEAD_DIM values at head * HEAD_DIM of each row, so that it may be a part of
// the qkv buffer; k_cache, v_cache: [num_blocks, 16, num_kv_heads, HEAD_DIM]; out: [num_tokens,
// num_q_heads * HEAD_DIM]. block_tables: [num_seqs, table_stride] int32, table_stride a multiple of 4, unused
// entries holding any valid block. seqs: (first token, num_tokens, context_len, -) of each chunk; tiles:
// (chunk, first row, -, -), and four more that only attention_prefill_sm90 reads, of each block of BLOCK_M rows. The query at row i of a chunk sees keys 0..=context_len + i.
//
// Grid (q head, tile). A block of four warps owns BLOCK_M query rows, WARP_TILES x 16 of them a warp, and walks
// over the keys 64 at a time from the diagonal down; values load while the scores are computed, the next keys
// while the values are used. Products are mma.sync m16n8k16 with fp32 accumulation; the softmax is online and in base 2.
//
// Left out: dropout, sliding windows, soft caps, alibi.

#define BLOCK_N 64
#define BLOCK_M (64 * WARP_TILES)
#define CHUNKS (HEAD_DIM / 8)
#define NUM_THREADS 128

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Element chunk (of eight) of a row, swizzled so that eight consecutive rows hit all banks.
__device__ __forceinline__ u32 tile_offset(u32 row, u32 chunk) { return (row * CHUNKS + (chunk ^ (row & 7))) * 16; }

// Copies 16 bytes, or writes zeros when there is nothing to copy.
__device__ __forceinline__ void copy_async(u32 shared, const void* global, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(present ? 16 : 0));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void copy_wait_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts copying keys (or values) first..first + 63 of one head into a tile.
__device__ __forceinline__ void load_kv_tile(u32 tile, const u16* cache, const int* table, int first, int kv_len,
                                             i64 token_stride) {
    const int4 pages = *reinterpret_cast<const int4*>(table + first / 16);
    const int page[4] = {pages.x, pages.y, pages.z, pages.w};
    const u32 chunk = threadIdx.x % CHUNKS;
    constexpr u32 ROWS = NUM_THREADS / CHUNKS;
#pragma unroll
    for (u32 pass = 0; pass < BLOCK_N / ROWS; ++pass) {
        const u32 row = pass * ROWS + threadIdx.x / CHUNKS;
        const u16* source = cache + (i64(page[pass * ROWS / 16]) * 16 + row % 16) * token_stride + chunk * 8;
        copy_async(tile + tile_offset(row, chunk), source, first + int(row) < kv_len);
    }
}

// Running state of the online softmax for a warp's rows; index [tile][0] is row lane / 4, [1] that plus 8.
struct Rows {
    float out[WARP_TILES][HEAD_DIM / 8][4];
    float max[WARP_TILES][2];
    float sum[WARP_TILES][2];
};

template <bool IS_MASKED>
__device__ __forceinline__ void softmax_step(Rows& rows, float (&score)[WARP_TILES][BLOCK_N / 8][4], int first_key,
                                             int first_position, float scale_log2) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
        if (IS_MASKED) {
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
                    const int position = first_position + m * 16 + lane / 4 + i / 2 * 8;
                    if (key > position) score[m][n][i] = -INFINITY;
                }
            }
        }
        float shift[2], rescale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = rows.max[m][half];
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; ++n) {
                highest = fmaxf(highest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // A row that has seen no key yet keeps -inf as its maximum, but must not compute inf - inf.
            shift[half] = highest == -INFINITY ? 0.0f : highest * scale_log2;
            rescale[half] = exp2_fast(rows.max[m][half] * scale_log2 - shift[half]);
            rows.max[m][half] = highest;
            rows.sum[m][half] *= rescale[half];
        }
        if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) rows.out[m][n][i] *= rescale[i / 2];
            }
        }
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[m][n][i] = exp2_fast(score[m][n][i] * scale_log2 - shift[i / 2]);
                rows.sum[m][i / 2] += score[m][n][i];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 2)
    attention_prefill(const u16* q, const u16* k_cache, const u16* v_cache, u16* out, const int* block_tables,
                      const int4* seqs, const int4* tiles, u32 table_stride, u32 q_stride, u32 num_kv_heads,
                      float scale_log2) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 q_tile = shared_address(shared);
    const u32 k_tile = q_tile + BLOCK_M * HEAD_DIM * 2;
    const u32 v_tile = k_tile + BLOCK_N * HEAD_DIM * 2;

    const u32 head = blockIdx.x, num_q_heads = gridDim.x;
    const int4 tile = tiles[2 * blockIdx.y];
    const int4 seq = seqs[tile.x];
    const int first_row = tile.y, num_rows = seq.y, context_len = seq.z;
    const int kv_len = context_len + num_rows;
    const i64 kv_stride = i64(num_kv_heads) * HEAD_DIM;
    const u32 kv_head = head / (num_q_heads / num_kv_heads);
    const u16* keys = k_cache + kv_head * HEAD_DIM;
    const u16* values = v_cache + kv_head * HEAD_DIM;
    const int* table = block_tables + u64(tile.x) * table_stride;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    {
        const u32 chunk = threadIdx.x % CHUNKS;
        for (u32 row = threadIdx.x / CHUNKS; row < BLOCK_M; row += NUM_THREADS / CHUNKS) {
            const bool present = first_row + int(row) < num_rows;
            const u64 token = u64(seq.x) + (present ? first_row + row : 0);
            copy_async(q_tile + tile_offset(row, chunk), q + token * q_stride + head * HEAD_DIM + chunk * 8, present);
        }
    }
    const int last_key = min(kv_len, context_len + first_row + BLOCK_M) - 1;
    int first_key = last_key / BLOCK_N * BLOCK_N;
    load_kv_tile(k_tile, keys, table, first_key, kv_len, kv_stride);
    copy_commit();

    Rows rows;
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) rows.out[m][n][i] = 0.0f;
        }
        rows.max[m][0] = rows.max[m][1] = -INFINITY;
        rows.sum[m][0] = rows.sum[m][1] = 0.0f;
    }
    const u32 warp_row = warp * 16 * WARP_TILES;
    const int first_position = context_len + first_row + int(warp_row);

    for (; first_key >= 0; first_key -= BLOCK_N) {
        // Keys are here, and no warp still reads the values of the previous turn.
        copy_wait_all();
        __syncthreads();
        load_kv_tile(v_tile, values, table, first_key, kv_len, kv_stride);
        copy_commit();

        float score[WARP_TILES][BLOCK_N / 8][4];
#pragma unroll
        for (int m = 0; m < WARP_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            u32 a[WARP_TILES][4];
#pragma unroll
            for (int m = 0; m < WARP_TILES; ++m) {
                load_matrices(a[m], q_tile + tile_offset(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < BLOCK_N / 16; ++n) {
                u32 b[4];
                load_matrices(b, k_tile + tile_offset(n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < WARP_TILES; ++m) {
                    multiply_add(score[m][2 * n], a[m], b[0], b[1]);
                    multiply_add(score[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        // Values are here, and no warp still reads the keys.
        copy_wait_all();
        __syncthreads();
        if (first_key > 0) load_kv_tile(k_tile, keys, table, first_key - BLOCK_N, kv_len, kv_stride);
        copy_commit();

        if (first_key + BLOCK_N - 1 > context_len + first_row) {
            softmax_step<true>(rows, score, first_key, first_position, scale_log2);
        } else {
            softmax_step<false>(rows, score, first_key, first_position, scale_log2);
        }
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; ++k) {
            u32 a[WARP_TILES][4];
#pragma unroll
            for (int m = 0; m < WARP_TILES; ++m) {
                a[m][0] = bf16_pair(score[m][2 * k][0], score[m][2 * k][1]);
                a[m][1] = bf16_pair(score[m][2 * k][2], score[m][2 * k][3]);
                a[m][2] = bf16_pair(score[m][2 * k + 1][0], score[m][2 * k + 1][1]);
                a[m][3] = bf16_pair(score[m][2 * k + 1][2], score[m][2 * k + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n) {
                u32 b[4];
                load_matrices_transposed(b, v_tile + tile_offset(k * 16 + lane % 16, n * 2 + lane / 16));
#pragma unroll
                for (int m = 0; m < WARP_TILES; ++m) {
                    multiply_add(rows.out[m][2 * n], a[m], b[0], b[1]);
                    multiply_add(rows.out[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // Each warp turns its accumulators into rows through its own rows of the query tile.
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float inverse = 1.0f / sum;
            const u32 row = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const u32 pair = bf16_pair(rows.out[m][n][2 * half] * inverse, rows.out[m][n][2 * half + 1] * inverse);
                *reinterpret_cast<u32*>(shared + tile_offset(row, n) + lane % 4 * 4) = pair;
            }
        }
    }
    __syncwarp();
    for (u32 i = lane; i < 16 * WARP_TILES * CHUNKS; i += 32) {
        const u32 row = warp_row + i / CHUNKS, chunk = i % CHUNKS;
        if (first_row + int(row) < num_rows) {
            const u64 token = u64(seq.x) + first_row + row;
            *reinterpret_cast<Vec8*>(out + (token * num_q_heads + head) * HEAD_DIM + chunk * 8) =
                *reinterpret_cast<const Vec8*>(shared + tile_offset(row, chunk));
        }
    }
}

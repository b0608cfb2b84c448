// h100_bwd_one_pass.cuh: dq, dk and dv in one walk, five products; for long sequences at head dim 64, and what head dim
// 128 shares with it. Part of h100_bwd.cu.
//
// tiles      as causal_dkdv: a block owns 128 rows of k, v, a warpgroup 64 of them, and walks q, dout
// pipeline   in a step a warpgroup has dp of this step and the scores of the next one in flight while it computes p.
//            ds^T goes to shared memory, where a third warpgroup multiplies it with k and adds the 64 rows of dq to a
//            float workspace by bulk reduction in L2. The first two never wait for each other.
// before     delta and lse in base 2 to `stats`, and zeros to the workspace
// after      the workspace by the scale, to bf16 -> dq
// order      blocks add to dq in the order in which they come: the last bits of dq differ between runs
#pragma once

namespace attn {

template <int D> struct one_pass_smem {
    using shape = one_pass_shape<D>;
    st_bf<ROWS, D> k[2][2], v[2][2]; // this tile's and the next's; dk and dv leave through them
    st_bf<ROWS, D> q[shape::stages], dout[shape::stages];
    st_bf<2 * ROWS, ROWS> ds[2];          // transposed: rows of k down, of q across
    alignas(128) float dq[2][ROWS * D];   // on its way to the workspace
    sv_fl<2 * ROWS> stats[shape::stages]; // lse2, delta
    semaphore kv_arrived[2][2], kv_free[2][2];
    semaphore q_arrived[shape::stages], q_free[shape::stages];
    semaphore ds_arrived[2], ds_free[2];
};
static_assert(sizeof(one_pass_smem<64>) <= SMEM_LIMIT, "head dim 64: fewer stages");

// Where 64 rows of dq are added up: 64 columns after 64 columns, each in the order of a warpgroup's accumulator, warp
// by warp, 16 bytes a lane at a time.
template <int D> KITTENS_DEVICE float* dq_sums(const bwd_args& args, int head, int piece) {
    return args.dq_sums + (static_cast<int64_t>(head) * args.pieces + piece) * ROWS * D;
}

// The third warpgroup: dq of each step, added to the workspace.
template <int D> KITTENS_DEVICE void one_pass_dq(one_pass_smem<D>& smem, const bwd_args& args) {
    rt_fl<D> dq;
    ring<2> turn, kv;
    int head, rank;
    const int thread = threadIdx.x % 128;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++, kv.advance()) {
        const int first_piece = 2 * rank;
        wait(smem.kv_arrived[kv.slot][0], kv.parity);
        wait(smem.kv_arrived[kv.slot][1], kv.parity);
#pragma unroll 1
        for (int j = first_piece; j < args.pieces; j++, turn.advance()) {
            wait(smem.ds_arrived[turn.slot], turn.parity);
            const st_bf<2 * ROWS, ROWS>& ds = smem.ds[turn.slot];
            warpgroup::pin(dq);
            wgmma::fence();
            // the second warpgroup's keys lie in the future of the first rows, or past the last one
            warpgroup::mma_AtB(dq, ds.template row_window<ROWS>(0), smem.k[kv.slot][0], 0);
            if (j > first_piece) warpgroup::mma_AtB(dq, ds.template row_window<ROWS>(ROWS), smem.k[kv.slot][1], 1);
            wgmma::commit();
            if (thread == 0) tma::wait_read<1>();
            warpgroup::pin(dq);
            wgmma::wait<0>();
            warpgroup::pin(dq);
            if (elected_lane()) arrive(smem.ds_free[turn.slot]);
            sync(1, 128); // the buffer that is written now has been read
            float* buffer = smem.dq[turn.slot];
#pragma unroll
            for (int e = 0; e < D / 2; e += 4)
                *reinterpret_cast<float4*>(buffer + thread / 32 * 16 * D + e * 32 + thread % 32 * 4) =
                    make_float4(dq.data[e], dq.data[e + 1], dq.data[e + 2], dq.data[e + 3]);
            fence_async();
            sync(1, 128);
            if (thread == 0) {
                tma::reduce_add_floats(dq_sums<D>(args, head, j), smem_address(buffer), ROWS * D * 4);
                tma::commit();
            }
        }
        if (elected_lane()) {
            arrive(smem.kv_free[kv.slot][0]);
            arrive(smem.kv_free[kv.slot][1]);
        }
    }
    if (thread == 0) tma::wait_written<0>();
}

template <int D> KITTENS_DEVICE void one_pass_compute(one_pass_smem<D>& smem, const bwd_args& args, const int w) {
    using shape = one_pass_shape<D>;
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> q, next;
    ring<2> turn;
    rt_fl<D> dk, dv;
    rt_fl<ROWS> s_even, s_odd, dp;
    rt_bf<ROWS> p_bf, ds;
    rt_bf<D> v_reg;
    int head, rank, slot = 0;
    const uint32_t never = args.N < 0; // 0, and the compiler does not know

    const auto free = [&](semaphore& bar) KITTENS_INLINE {
        if (elected_lane()) arrive(bar);
    };
    // Scores `s` of this step are there.
    const auto step = [&]<bool first, bool last>(rt_fl<ROWS>& s, rt_fl<ROWS>& s_next) KITTENS_INLINE {
        warpgroup::pin(dp);
        warpgroup::pin(s_next);
        if constexpr (!last) wait(smem.q_arrived[next.slot], next.parity);
        wgmma::fence();
        warpgroup::mma_ABt(dp, v_reg, smem.dout[q.slot], 0);
        wgmma::commit();
        if constexpr (!last) {
            warpgroup::mma_ABt(s_next, smem.k[slot][w], smem.q[next.slot], 0);
            wgmma::commit();
        }
        if constexpr (first) warp::hide_below_diagonal(s, warp_row(), -INFINITY);
        exponentials_across(s, smem.stats[q.slot], scale_log2);
        warpgroup::hold(s, never);
        wgmma::wait<last ? 0 : 1>();
        warpgroup::pin(dp);
        round_kept<false>(p_bf, s, 0);
        score_gradients_across<false>(ds, s, dp, smem.stats[q.slot], 0, 1.f);
        wait(smem.ds_free[turn.slot], turn.parity ^ 1);
        warp::store(smem.ds[turn.slot], w * ROWS + warp_row(), ds);
        fence_async();
        __syncwarp();
        free(smem.ds_arrived[turn.slot]);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        wgmma::fence();
        warpgroup::mma_AB(dv, p_bf, smem.dout[q.slot], 1);
        warpgroup::mma_AB(dk, ds, smem.q[q.slot], 1);
        wgmma::commit();
        wgmma::wait<0>();
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        warpgroup::pin(s_next);
        free(smem.q_free[q.slot]);
        turn.advance();
        q = next;
        next.advance();
    };

#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++) {
        slot = i & 1;
        const int first_piece = 2 * rank, piece = first_piece + w, steps = args.pieces - piece;
#pragma unroll 1
        for (int j = first_piece; j < min(piece, args.pieces); j++, q.advance(), turn.advance()) { // the neighbour's
            wait(smem.q_arrived[q.slot], q.parity);
            free(smem.q_free[q.slot]);
            wait(smem.ds_free[turn.slot], turn.parity ^ 1);
            free(smem.ds_arrived[turn.slot]);
        }
        const auto release_last_tile = [&]() KITTENS_INLINE {
            if (i > 0 && elected_lane()) { // its dk and dv have left by now
                tma::wait_read<0>();
                arrive(smem.kv_free[slot ^ 1][w]);
            }
        };
        if (steps <= 0) {
            release_last_tile();
            wait(smem.kv_arrived[slot][w], i / 2 & 1);
            continue;
        }
        wait(smem.kv_arrived[slot][w], i / 2 & 1);
        warp::load(v_reg, smem.v[slot][w], warp_row());
        warp::zero(dk);
        warp::zero(dv);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        wait(smem.q_arrived[q.slot], q.parity);
        next = q;
        next.advance();
        warpgroup::pin(s_even);
        wgmma::fence();
        warpgroup::mma_ABt(s_even, smem.k[slot][w], smem.q[q.slot], 0);
        wgmma::commit();
        release_last_tile();
        wgmma::wait<0>();
        warpgroup::pin(s_even);
        walk(step, s_even, s_odd, steps);
        const int b = head / args.H, h = head - b * args.H;
        store_rows(smem.v[slot][w], args.dv, dv, 1.f, piece * ROWS, h, b);
        const ring<2> last_turn = turn.previous();
        wait(smem.ds_free[last_turn.slot], last_turn.parity); // k has been read for the last time
        store_rows(smem.k[slot][w], args.dk, dk, args.scale, piece * ROWS, h, b);
    }
    if (elected_lane()) tma::wait_written<0>();
}

template <int D> __global__ void __launch_bounds__(512, 1) causal_one_pass(const __grid_constant__ bwd_args args) {
    using shape = one_pass_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    one_pass_smem<D>& smem = *reinterpret_cast<one_pass_smem<D>*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            init(smem.kv_arrived[i / 2][i % 2], 1);
            init(smem.kv_free[i / 2][i % 2], 8); // one arrival a warp: its owner's and dq's
        }
        for (int i = 0; i < shape::stages; i++) {
            init(smem.q_arrived[i], 1);
            init(smem.q_free[i], 8);
        }
        for (int i = 0; i < 2; i++) {
            init(smem.ds_arrived[i], 8);
            init(smem.ds_free[i], 4);
        }
        fence_init();
    }
    __syncthreads();
    let_dependents_launch();
    const int w = warpgroup_id();
    if (w == 3) {
        decrease_registers<24>();
        if (threadIdx.x % 128 == 0) dkdv_load<D>(smem, args);
    } else if (w == 2) {
        decrease_registers<72>();
        one_pass_dq<D>(smem, args);
    } else {
        increase_registers<208>();
        one_pass_compute<D>(smem, args, w);
    }
}

// One block a piece: stats, and zeros where dq is added up. Eight threads share a row, so that a warp reads whole lines
// and all loads of a thread are on their way at once.
template <int D> __global__ void __launch_bounds__(128) causal_delta(const __grid_constant__ bwd_args args) {
    constexpr int passes = ROWS / 16, pieces_of_8 = D / 64;
    let_dependents_launch();
    const int head = blockIdx.x / args.pieces, piece = blockIdx.x - head * args.pieces, t = threadIdx.x;
    const int b = head / args.H, h = head - b * args.H;
    uint4 x[passes][pieces_of_8], y[passes][pieces_of_8];
#pragma unroll
    for (int i = 0; i < passes; i++)
#pragma unroll
        for (int c = 0; c < pieces_of_8; c++) {
            const int row = piece * ROWS + 16 * i + t / 8, col = 64 * c + t % 8 * 8;
            const bool there = row < args.N && col < args.D;
            x[i][c] = there ? *reinterpret_cast<const uint4*>(args.o_at.row(b, h, row) + col) : uint4{};
            y[i][c] = there ? *reinterpret_cast<const uint4*>(args.dout_at.row(b, h, row) + col) : uint4{};
        }
    float4* sums = reinterpret_cast<float4*>(dq_sums<D>(args, head, piece));
#pragma unroll
    for (int i = 0; i < ROWS * D / 4; i += 128) sums[i + t] = make_float4(0.f, 0.f, 0.f, 0.f);
    float* stats = args.stats + (static_cast<int64_t>(head) * args.pieces + piece) * 2 * ROWS;
#pragma unroll
    for (int i = 0; i < passes; i++) {
        float delta = 0.f;
#pragma unroll
        for (int c = 0; c < pieces_of_8; c++) {
            const uint32_t xs[4] = {x[i][c].x, x[i][c].y, x[i][c].z, x[i][c].w};
            const uint32_t ys[4] = {y[i][c].x, y[i][c].y, y[i][c].z, y[i][c].w};
#pragma unroll
            for (int e = 0; e < 4; e++)
                delta = fmaf(low_bf16(xs[e]), low_bf16(ys[e]), fmaf(high_bf16(xs[e]), high_bf16(ys[e]), delta));
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
        if (t % 8 == 0) stats[ROWS + 16 * i + t / 8] = delta;
    }
    const int row = piece * ROWS + t;
    if (t < ROWS)
        stats[t] = row < args.N ? args.lse[static_cast<int64_t>(head) * args.N + row] * LOG2E : INFINITY;
}

// One block a piece: the sums by the scale, to bf16.
template <int D> __global__ void __launch_bounds__(128) causal_dq_round(const __grid_constant__ bwd_args args) {
    __shared__ st_bf<ROWS, D> slab;
    const int head = blockIdx.x / args.pieces, piece = blockIdx.x - head * args.pieces, t = threadIdx.x;
    const int b = head / args.H, h = head - b * args.H;
    wait_for_previous_kernel();
    const float4* sums = reinterpret_cast<const float4*>(dq_sums<D>(args, head, piece));
    rt_fl<D> dq;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        const float4 x = sums[i / 8 * ROWS * PANEL / 4 + t / 32 * 16 * PANEL / 4 + i % 8 * 32 + t % 32];
        dq.data[4 * i] = x.x;
        dq.data[4 * i + 1] = x.y;
        dq.data[4 * i + 2] = x.z;
        dq.data[4 * i + 3] = x.w;
    }
    store_rows(slab, args.dq, dq, args.scale, piece * ROWS, h, b);
    if (elected_lane()) tma::wait_read<0>();
}

} // namespace attn

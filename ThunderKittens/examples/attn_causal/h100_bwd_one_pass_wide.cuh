// h100_bwd_one_pass_wide.cuh: the one pass at head dim 128, where a third computing warpgroup's registers do not fit.
// Part of h100_bwd.cu; what goes before and after it is in h100_bwd_one_pass.cuh.
//
// tiles      a block owns 128 rows of k, v, a warpgroup 64 of them, and both walk the same 64 rows of q, dout
// pipeline   ds^T of both warpgroups meets in shared memory, where each multiplies all of it with its half of k's
//            columns: 64 x 64 of dq. What is in flight, and what is computed meanwhile:
//                dv       ds from p and dp, to shared memory
//                dq, dk   dq to shared memory and from there, by bulk addition, to the workspace
//                s, dp    of the next step: its p
//            Between steps nothing is in flight; p and dp are in registers. dq and dp share theirs. 256 threads, so
//            that each may have 255 registers: the first one loads
// source     the shape of FlashAttention-3's backward, arXiv:2407.08608
#pragma once

namespace attn {

template <int D> struct wide_smem {
    using shape = wide_shape<D>;
    st_bf<ROWS, D> k[2], v[2]; // dk and dv leave through them
    st_bf<ROWS, D> q[shape::stages], dout[shape::stages];
    st_bf<2 * ROWS, ROWS> ds[2];             // transposed: rows of k down, of q across
    alignas(128) float dq[2][4][16 * PANEL]; // of a warpgroup, of a warp; on its way to the workspace
    sv_fl<2 * ROWS> stats[shape::stages];    // lse2, delta
    semaphore kv_arrived, kv_free, q_arrived[shape::stages], ds_arrived[2];
    int batch, head; // of the tile that is loaded; thread 0 alone
};
static_assert(sizeof(wide_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages");

template <int D> KITTENS_DEVICE void wide_compute(wide_smem<D>& smem, const bwd_args& args, const int w) {
    using shape = wide_shape<D>;
    static_assert(D == 2 * PANEL, "a warpgroup takes one panel of k in dq");
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> q, next;
    ring<2> turn;
    rt_fl<D> dk, dv;
    rt_fl<ROWS> s, dp;
    rt_fl<ROWS>& dq = dp;
    rt_bf<ROWS> p_bf, ds;
    int head, rank, ahead;             // the piece of q to load next
    float* sums = nullptr;             // of this warp, for this step's rows of q
    const uint32_t never = args.N < 0; // 0, and the compiler does not know

    const auto free = [&](semaphore& bar) KITTENS_INLINE {
        if (elected_lane()) arrive(bar);
    };
    // Thread 0 loads, two steps ahead: into the slot of the last step, which both warpgroups have left.
    const auto load_piece = [&](int slot) KITTENS_INLINE {
        semaphore& arrived = smem.q_arrived[slot];
        const int b = smem.batch, h = smem.head;
        expect(arrived, 2 * sizeof(st_bf<ROWS, D>) + sv_fl<2 * ROWS>::bytes);
        load_rows(smem.q[slot], args.q, arrived, ahead * ROWS, h, b, tma::KEEP);
        load_rows(smem.dout[slot], args.dout, arrived, ahead * ROWS, h, b, tma::KEEP);
        tma::load(smem.stats[slot].address(), args.stats_rows, arrived, 0, ahead, b * args.H + h, 0);
    };
    const auto load_ahead = [&](int slot) KITTENS_INLINE {
        if (threadIdx.x == 0 && ahead < args.pieces) load_piece(slot);
        ahead++;
    };
    // What is written here was read two steps ago, and the other warpgroup has arrived since.
    const auto share_ds = [&]() KITTENS_INLINE {
        warp::store(smem.ds[turn.slot], w * ROWS + warp_row(), ds);
        fence_async();
        __syncwarp();
        free(smem.ds_arrived[turn.slot]);
    };
    const auto issue_dq = [&]() KITTENS_INLINE {
        const st_bf<2 * ROWS, ROWS>& all = smem.ds[turn.slot];
        warpgroup::mma_AtB(dq, all.template row_window<ROWS>(0), smem.k[0].template col_window<PANEL>(w * PANEL), 0);
        warpgroup::mma_AtB(dq, all.template row_window<ROWS>(ROWS),
                           smem.k[1].template col_window<PANEL>(w * PANEL), 1);
        wgmma::commit();
    };
    const auto add_dq = [&]() KITTENS_INLINE {
        float* buffer = smem.dq[w][threadIdx.x >> 5 & 3];
        if (elected_lane()) tma::wait_read<0>(); // the last step's
        __syncwarp();
#pragma unroll
        for (int e = 0; e < PANEL / 2; e += 4)
            *reinterpret_cast<float4*>(buffer + e * 32 + (threadIdx.x & 31) * 4) =
                make_float4(dq.data[e], dq.data[e + 1], dq.data[e + 2], dq.data[e + 3]);
        fence_async();
        __syncwarp();
        if (elected_lane()) {
            tma::reduce_add_floats(sums, smem_address(buffer), 16 * PANEL * 4);
            tma::commit();
        }
        sums += ROWS * D;
    };
    // p and dp of this step are there, in s and dp.
    const auto step = [&]<bool last>() KITTENS_INLINE {
        round_kept<false>(p_bf, s, 0);
        warpgroup::pin(dv);
        wgmma::fence();
        warpgroup::mma_AB(dv, p_bf, smem.dout[q.slot], 1);
        wgmma::commit();
        score_gradients_across<false>(ds, s, dp, smem.stats[q.slot], 0, 1.f);
        share_ds();
        wait(smem.ds_arrived[turn.slot], turn.parity);
        warpgroup::pin(dq);
        warpgroup::pin(dk);
        warpgroup::pin(s);
        wgmma::fence();
        issue_dq();
        warpgroup::mma_AB(dk, ds, smem.q[q.slot], 1);
        wgmma::commit();
        load_ahead(next.previous().previous().slot); // the last step's
        wgmma::wait<1>();
        warpgroup::pin(dq);
        add_dq();
        if constexpr (!last) {
            wait(smem.q_arrived[next.slot], next.parity);
            warpgroup::pin(s);
            wgmma::fence();
            warpgroup::mma_ABt(s, smem.k[w], smem.q[next.slot], 0);
            wgmma::commit();
            warpgroup::pin(dp);
            wgmma::fence();
            warpgroup::mma_ABt(dp, smem.v[w], smem.dout[next.slot], 0);
            wgmma::commit();
            wgmma::wait<1>();
            warpgroup::pin(s);
            exponentials_across(s, smem.stats[next.slot], scale_log2);
            warpgroup::hold(s, never);
        }
        wgmma::wait<0>();
        warpgroup::pin(dp);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        turn.advance();
        q = next;
        next.advance();
    };

    const auto load_first = [&]() KITTENS_INLINE { // of a tile: its first two pieces of q
        ahead = 2 * rank;
        if (threadIdx.x == 0) {
            smem.batch = head / args.H;
            smem.head = head - smem.batch * args.H;
        }
        load_ahead(q.slot);
        load_ahead(q.next().slot);
    };
    const auto load_kv = [&]() KITTENS_INLINE {
        if (threadIdx.x == 0) {
            expect(smem.kv_arrived, 4 * sizeof(st_bf<ROWS, D>));
#pragma unroll 1
            for (int i = 0; i < 2; i++) { // a piece past the last one arrives as zeros
                load_rows(smem.k[i], args.k, smem.kv_arrived, (2 * rank + i) * ROWS, smem.head, smem.batch, tma::PASS);
                load_rows(smem.v[i], args.v, smem.kv_arrived, (2 * rank + i) * ROWS, smem.head, smem.batch, tma::PASS);
            }
        }
    };

    bool more = args.schedule.find(0, head, rank);
    if (more) {
        load_first();
        load_kv();
    }
#pragma unroll 1
    for (int i = 0; more; i++) {
        const int piece = 2 * rank + w, steps = args.pieces - piece;
        wait(smem.kv_arrived, i & 1);
        sums = dq_sums<D>(args, head, 2 * rank) + (w * 4 + (threadIdx.x >> 5 & 3)) * 16 * PANEL;
        if (w == 1) { // the first rows of q see none of its keys
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds.data[k][e] = 0;
            share_ds();
            wait(smem.q_arrived[q.slot], q.parity);
            wait(smem.ds_arrived[turn.slot], turn.parity);
            warpgroup::pin(dq);
            wgmma::fence();
            issue_dq();
            wgmma::wait<0>();
            warpgroup::pin(dq);
            add_dq();
            turn.advance();
            q.advance();
            ahead++;
        }
        if (steps > 0) {
            warp::zero(dk);
            warp::zero(dv);
            next = q.next();
            wait(smem.q_arrived[q.slot], q.parity);
            warpgroup::pin(dk);
            warpgroup::pin(dv);
            warpgroup::pin(s);
            warpgroup::pin(dp);
            wgmma::fence();
            warpgroup::mma_ABt(s, smem.k[w], smem.q[q.slot], 0);
            wgmma::commit();
            warpgroup::mma_ABt(dp, smem.v[w], smem.dout[q.slot], 0);
            wgmma::commit();
            wgmma::wait<1>();
            warpgroup::pin(s);
            warp::hide_below_diagonal(s, warp_row(), -INFINITY);
            exponentials_across(s, smem.stats[q.slot], scale_log2);
            wgmma::wait<0>();
            warpgroup::pin(dp);
#pragma unroll 1
            for (int left = steps; left > 1; left--) step.template operator()<false>();
            step.template operator()<true>();
        }
        sync(1, 256); // both have read k and the last q
        const int b = head / args.H, h = head - b * args.H;
        more = args.schedule.find(i + 1, head, rank);
        if (more) load_first();
        if (steps > 0) {
            store_rows(smem.v[w], args.dv, dv, 1.f, piece * ROWS, h, b);
            store_rows(smem.k[w], args.dk, dk, args.scale, piece * ROWS, h, b);
        }
        if (elected_lane()) {
            tma::wait_read<0>();
            arrive(smem.kv_free);
        }
        if (more) {
            if (threadIdx.x == 0) wait(smem.kv_free, i & 1);
            load_kv();
        }
    }
    if (elected_lane()) tma::wait_written<0>();
}

template <int D> __global__ void __launch_bounds__(256, 1) causal_one_pass_wide(const __grid_constant__ bwd_args args) {
    using shape = wide_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    wide_smem<D>& smem = *reinterpret_cast<wide_smem<D>*>(raw);
    if (threadIdx.x == 0) {
        init(smem.kv_arrived, 1);
        init(smem.kv_free, 8); // one arrival a warp
        for (int i = 0; i < shape::stages; i++) init(smem.q_arrived[i], 1);
        for (int i = 0; i < 2; i++) init(smem.ds_arrived[i], 8);
        fence_init();
    }
    __syncthreads();
    let_dependents_launch();
    wait_for_previous_kernel();
    wide_compute<D>(smem, args, warpgroup_id());
}

} // namespace attn

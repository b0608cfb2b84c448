// h100_bwd_one_pass_wide.cuh: the one pass at head dim 128, where a third computing warpgroup's registers do not fit.
// Part of h100_bwd.cu; what goes before and after it is in h100_bwd_one_pass.cuh.
//
// tiles      a block owns 128 rows of k, v, a warpgroup 64 of them, and both walk the same 64 rows of q, dout
// pipeline   ds^T of both warpgroups meets in shared memory, where each multiplies all of it with its half of k's
//            columns: 64 x 64 of dq, a step late, so that neither waits for the other within a step. What is in flight
//            and what is computed meanwhile:
//                dq of the last step      p; then dq to shared memory and by bulk addition to the workspace
//                dp, dv                   ds from p and dp, to shared memory
//                dk, s of the next step   the next loads
//            dq and dp take turns in one set of registers. 256 threads, so that each may have 255: one of them loads
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
    semaphore kv_arrived, kv_free, q_arrived[shape::stages], q_free[shape::stages], ds_arrived[2];
    int batch, head; // of the tile that is loaded; thread 0 alone
};
static_assert(sizeof(wide_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages");

template <int D> KITTENS_DEVICE void wide_compute(wide_smem<D>& smem, const bwd_args& args, const int w) {
    using shape = wide_shape<D>;
    static_assert(D == 2 * PANEL, "a warpgroup takes one panel of k in dq");
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> q;
    ring<2> turn;
    rt_fl<D> dk, dv;
    rt_fl<ROWS> s, dp_or_dq;
    rt_bf<ROWS> p_bf, ds;
    int head, rank, ahead = 0;         // the piece of q to load next
    float* sums = nullptr;             // of this warp, for the rows of q whose dq is next
    const uint32_t never = args.N < 0; // 0, and the compiler does not know

    const auto free = [&](semaphore& bar) KITTENS_INLINE {
        if (elected_lane()) arrive(bar);
    };
    const auto load_piece = [&](int slot) KITTENS_INLINE {
        semaphore& arrived = smem.q_arrived[slot];
        const int b = smem.batch, h = smem.head;
        expect(arrived, 2 * sizeof(st_bf<ROWS, D>) + sv_fl<2 * ROWS>::bytes);
        load_rows(smem.q[slot], args.q, arrived, ahead * ROWS, h, b, tma::KEEP);
        load_rows(smem.dout[slot], args.dout, arrived, ahead * ROWS, h, b, tma::KEEP);
        tma::load(smem.stats[slot].address(), args.stats_rows, arrived, 0, ahead, b * args.H + h, 0);
    };
    // What is overwritten here was read two steps ago by this warpgroup; by the other one before it wrote its part of
    // the last step's, for which this one has waited.
    const auto share_ds = [&]() KITTENS_INLINE {
        warp::store(smem.ds[turn.slot], w * ROWS + warp_row(), ds);
        fence_async();
        __syncwarp();
        free(smem.ds_arrived[turn.slot]);
    };
    const auto issue_dq = [&]() KITTENS_INLINE { // of the last step
        const ring<2> last = turn.previous();
        wait(smem.ds_arrived[last.slot], last.parity);
        const st_bf<2 * ROWS, ROWS>& all = smem.ds[last.slot];
        warpgroup::pin(dp_or_dq);
        wgmma::fence();
        warpgroup::mma_AtB(dp_or_dq, all.template row_window<ROWS>(0),
                           smem.k[0].template col_window<PANEL>(w * PANEL), 0);
        warpgroup::mma_AtB(dp_or_dq, all.template row_window<ROWS>(ROWS),
                           smem.k[1].template col_window<PANEL>(w * PANEL), 1);
        wgmma::commit();
    };
    const auto add_dq = [&]() KITTENS_INLINE {
        wgmma::wait<0>();
        warpgroup::pin(dp_or_dq);
        float* buffer = smem.dq[w][threadIdx.x >> 5 & 3];
        if (elected_lane()) tma::wait_read<0>();
        __syncwarp();
#pragma unroll
        for (int e = 0; e < PANEL / 2; e += 4)
            *reinterpret_cast<float4*>(buffer + e * 32 + (threadIdx.x & 31) * 4) =
                make_float4(dp_or_dq.data[e], dp_or_dq.data[e + 1], dp_or_dq.data[e + 2], dp_or_dq.data[e + 3]);
        fence_async();
        __syncwarp();
        if (elected_lane()) {
            tma::reduce_add_floats(sums, smem_address(buffer), 16 * PANEL * 4);
            tma::commit();
        }
        sums += ROWS * D;
    };
    // Scores of this step are there, and nothing is in flight.
    const auto step = [&]<bool first, bool last>() KITTENS_INLINE {
        if constexpr (!first) issue_dq();
        if constexpr (first) warp::hide_below_diagonal(s, warp_row(), -INFINITY);
        exponentials_across(s, smem.stats[q.slot], scale_log2);
        warpgroup::hold(s, never);
        if constexpr (!first) add_dq();
        round_kept<false>(p_bf, s, 0);
        warpgroup::pin(dp_or_dq);
        warpgroup::pin(dv);
        wgmma::fence();
        warpgroup::mma_ABt(dp_or_dq, smem.v[w], smem.dout[q.slot], 0);
        wgmma::commit();
        warpgroup::mma_AB(dv, p_bf, smem.dout[q.slot], 1);
        wgmma::commit();
        wgmma::wait<1>();
        warpgroup::pin(dp_or_dq);
        score_gradients_across<false>(ds, s, dp_or_dq, smem.stats[q.slot], 0, 1.f);
        share_ds();
        turn.advance();
        const ring<shape::stages> next = q.next();
        if constexpr (!last) wait(smem.q_arrived[next.slot], next.parity);
        warpgroup::pin(dk);
        warpgroup::pin(s);
        wgmma::fence();
        warpgroup::mma_AB(dk, ds, smem.q[q.slot], 1);
        wgmma::commit();
        if constexpr (!last) {
            warpgroup::mma_ABt(s, smem.k[w], smem.q[next.slot], 0);
            wgmma::commit();
        }
        if (threadIdx.x == 0 && ahead < args.pieces) { // into the slot of the last step
            const ring<shape::stages> slot = q.previous();
            wait(smem.q_free[slot.slot], slot.parity);
            load_piece(slot.slot);
        }
        ahead++;
        wgmma::wait<0>();
        warpgroup::pin(s);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        free(smem.q_free[q.slot]);
        q = next;
    };
    const auto load_first = [&]() KITTENS_INLINE { // of a tile: its first two pieces of q
        ahead = 2 * rank;
        if (threadIdx.x == 0) {
            smem.batch = head / args.H;
            smem.head = head - smem.batch * args.H;
        }
#pragma unroll 1
        for (ring<shape::stages> slot = q; ahead < 2 * rank + 2; ahead++, slot.advance())
            if (threadIdx.x == 0 && ahead < args.pieces) {
                wait(smem.q_free[slot.slot], slot.parity ^ 1); // it is: each phase is waited for, as synccheck asks
                load_piece(slot.slot);
            }
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
        sums = dq_sums<D>(args, head, 2 * rank) + (w * 4 + (threadIdx.x >> 5 & 3)) * 16 * PANEL;
        wait(smem.kv_arrived, i & 1);
        if (w == 1) { // the first rows of q see none of its keys
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds.data[k][e] = 0;
            share_ds();
            turn.advance();
            free(smem.q_free[q.slot]);
            q.advance();
            ahead++;
        }
        if (steps > 0) {
            warp::zero(dk);
            warp::zero(dv);
            wait(smem.q_arrived[q.slot], q.parity);
            warpgroup::pin(dk);
            warpgroup::pin(dv);
            warpgroup::pin(s);
            wgmma::fence();
            warpgroup::mma_ABt(s, smem.k[w], smem.q[q.slot], 0);
            wgmma::commit();
            wgmma::wait<0>();
            warpgroup::pin(s);
        }
        if (w == 1) {
            issue_dq();
            add_dq();
        }
        if (steps == 1) {
            step.template operator()<true, true>();
        } else if (steps > 1) {
            step.template operator()<true, false>();
#pragma unroll 1
            for (int left = steps; left > 2; left--) step.template operator()<false, false>();
            step.template operator()<false, true>();
        }
        if (steps > 0) {
            issue_dq();
            add_dq();
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
        for (int i = 0; i < shape::stages; i++) {
            init(smem.q_arrived[i], 1);
            init(smem.q_free[i], 8);
        }
        for (int i = 0; i < 2; i++) init(smem.ds_arrived[i], 8);
        fence_init();
    }
    __syncthreads();
    let_dependents_launch();
    wait_for_previous_kernel();
    wide_compute<D>(smem, args, warpgroup_id());
}

} // namespace attn

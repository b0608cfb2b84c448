// h100_bwd.cu: causal attention, backward, sm_90a       letters: B batch, H heads, N rows (= T), D head dim (= hs)
//
// problem    with p = exp(q k^T / sqrt(D) - lse), dp = dout v^T, delta = row sum of dout o, ds = p (dp - delta):
//            dq = ds k / sqrt(D)      dk = ds^T q / sqrt(D)      dv = p^T dout        no row sees a later one
//            all (B, H, N, D) bf16 with any strides;  lse (B, H, N) float from the forward
// tiles      two kernels. causal_dq: a warpgroup owns 64 rows of q and walks k, v from its diagonal down to row 0.
//            causal_dkdv: a warpgroup owns 64 rows of k, v and walks q, dout from its diagonal to the last row, and
//            keeps scores^T (k down, q across). A block is two such warpgroups and stays on its multiprocessor;
//            the host deals the tiles out (schedule.cuh). Seven products where one pass needs five, but nothing is
//            added up in memory: no workspace to clear or convert, and the same bits every time.         shapes.cuh
//            For long sequences one pass: h100_bwd_one_pass.cuh, and at head dim 128 h100_bwd_one_pass_wide.cuh.
// pipeline   one producer thread keeps the walked tiles in flight by TMA. In a step, the last step's products into
//            dq (dk, dv), this one's dp and the next one's scores are in flight while this step's p is computed
// softmax    p from the forward's lse, in base 2; delta in causal_dq before its first step, from there to causal_dkdv
//            through `stats` (which also hides the rows past N: their lse is infinite, so p is 0)
// dropout    kept scores by dropout.cuh; dp counts where kept, times the scale, and so does p in dv
// epilogue   by the scale, to bf16 -> a dead shared tile -> TMA store, which clips at N
// limits     sm_90a; D a multiple of 8 up to 128; N >= 1; strides and bases multiples of 16 bytes
#include "h100_bwd.cuh"

#include <algorithm>
#include <cmath>

#include "dropout.cuh"
#include "schedule.cuh"
#include "shapes.cuh"

namespace attn {

using namespace kittens;

// What a tensor map says, for threads that load by themselves.
struct rows_at {
    const bf16* data;
    int64_t batch_stride, head_stride, row_stride;
    KITTENS_DEVICE const bf16* row(int b, int h, int r) const {
        return data + b * batch_stride + h * head_stride + r * row_stride;
    }
};

struct bwd_args {
    CUtensorMap q, k, v, o, dout, dq, dk, dv, stats_rows;
    const float* lse;
    float* stats;   // (B H, pieces, 2, 64): lse in base 2, delta
    float* dq_sums; // (B H, pieces, D / 64, 64 x 64), one pass only
    rows_at o_at, dout_at;
    int N, H, D, pieces;
    float scale, scale_log2;
    dropout_args dropout;
    tile_schedule schedule;
};

constexpr int ROWS = 64;  // of a piece: what a warpgroup owns, and what it walks over in a step
constexpr int PANEL = 64; // columns of a shared tile that lie together

KITTENS_DEVICE int warp_row() { return (threadIdx.x >> 5 & 3) * 16; }

// 64 rows from `row` on, all panels
template <int D>
KITTENS_DEVICE void load_rows(const st_bf<ROWS, D>& dst, const CUtensorMap& map, semaphore& arrived, int row, int h,
                              int b, uint64_t policy) {
    for (int c = 0; c < D; c += 64)
        tma::load(dst.address() + c * ROWS * 2, map, arrived, c, row, h, b, policy);
}

// This warp's 16 rows of `src`, times `by`, through its rows of `slab` to `row` and on.
template <int D>
KITTENS_DEVICE void store_rows(const st_bf<ROWS, D>& slab, const CUtensorMap& map, const rt_fl<D>& src, float by,
                               int row, int h, int b) {
    rt_bf<D> out;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            out.data[k][i] = pack_bf16(src.data[8 * k + 2 * i] * by, src.data[8 * k + 2 * i + 1] * by);
    warp::store(slab, warp_row(), out);
    fence_async();
    __syncwarp();
    if (elected_lane()) {
        for (int c = 0; c < D; c += 64)
            tma::store(map, slab.address() + c * ROWS * 2 + warp_row() * 128, c, row + warp_row(), h, b);
        tma::commit();
    }
}

// All steps of a piece, scores of the next one computed into the other register tile. On entry those of the first step
// are there, in s_even. The first and the last step are their own code: nothing may be issued under a condition.
template <class Step> KITTENS_DEVICE void walk(const Step& step, rt_fl<ROWS>& s_even, rt_fl<ROWS>& s_odd, int steps) {
    if (steps == 1) {
        step.template operator()<true, true>(s_even, s_odd);
        return;
    }
    step.template operator()<true, false>(s_even, s_odd);
    int left = steps - 1;
#pragma unroll 1
    for (; left > 2; left -= 2) {
        step.template operator()<false, false>(s_odd, s_even);
        step.template operator()<false, false>(s_even, s_odd);
    }
    if (left == 2) {
        step.template operator()<false, false>(s_odd, s_even);
        step.template operator()<false, true>(s_even, s_odd);
    } else {
        step.template operator()<false, true>(s_odd, s_even);
    }
}

// ---- dq: a warpgroup owns rows of q ------------------------------------------------------------------------------

template <int D> struct dq_smem {
    using shape = dq_shape<D>;
    st_bf<ROWS, D> q[shape::slots][2], dout[shape::slots][2], o[shape::slots][2]; // dq leaves through o
    st_bf<ROWS, D> k[shape::stages], v[shape::stages];
    semaphore q_arrived[shape::slots][2], q_free[shape::slots][2], o_arrived[shape::slots][2], o_free[shape::slots][2];
    semaphore kv_arrived[shape::stages], kv_free[shape::stages];
};
static_assert(sizeof(dq_smem<64>) <= SMEM_LIMIT, "head dim 64: fewer stages or slots");
static_assert(sizeof(dq_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages or slots");

// Tile `rank` of a head; the first rows may make a tile whose first piece is -1: then warpgroup 0 has none.
KITTENS_DEVICE int dq_first_piece(const bwd_args& args, int rank) { return args.pieces - 2 * (rank + 1); }

template <int D> KITTENS_DEVICE void dq_load(dq_smem<D>& smem, const bwd_args& args) {
    using shape = dq_shape<D>;
    ring<shape::stages> kv;
    ring<shape::slots> q;
    int head, rank;
#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++, q.advance()) {
        const int b = head / args.H, h = head - b * args.H, first_piece = dq_first_piece(args, rank);
#pragma unroll 1
        for (int w = 0; w < 2; w++) {
            const int row = (first_piece + w) * ROWS; // piece -1 arrives as zeros
            wait(smem.q_free[q.slot][w], q.parity ^ 1);
            expect(smem.q_arrived[q.slot][w], 2 * sizeof(st_bf<ROWS, D>));
            load_rows(smem.q[q.slot][w], args.q, smem.q_arrived[q.slot][w], row, h, b, tma::PASS);
            load_rows(smem.dout[q.slot][w], args.dout, smem.q_arrived[q.slot][w], row, h, b, tma::PASS);
            wait(smem.o_free[q.slot][w], q.parity ^ 1);
            expect(smem.o_arrived[q.slot][w], sizeof(st_bf<ROWS, D>));
            load_rows(smem.o[q.slot][w], args.o, smem.o_arrived[q.slot][w], row, h, b, tma::PASS);
        }
#pragma unroll 1
        for (int j = first_piece + 1; j >= 0; j--, kv.advance()) {
            wait(smem.kv_free[kv.slot], kv.parity ^ 1);
            expect(smem.kv_arrived[kv.slot], 2 * sizeof(st_bf<ROWS, D>));
            load_rows(smem.k[kv.slot], args.k, smem.kv_arrived[kv.slot], j * ROWS, h, b, tma::KEEP);
            load_rows(smem.v[kv.slot], args.v, smem.kv_arrived[kv.slot], j * ROWS, h, b, tma::KEEP);
        }
    }
}

// row[r] = sum over c of a[r][c] b[r][c] of this warp's 16 rows
template <int D> KITTENS_DEVICE void row_dot(rv_fl& row, const st_bf<ROWS, D>& a, const st_bf<ROWS, D>& b) {
    const int lane = threadIdx.x & 31;
    row.data[0] = row.data[1] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t x[4], y[4];
        ldmatrix(x, a.address(warp_row() + (lane & 15), 2 * k + (lane >> 4)));
        ldmatrix(y, b.address(warp_row() + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int i = 0; i < 4; i++)
            row.data[i % 2] = fmaf(low_bf16(x[i]), low_bf16(y[i]),
                                   fmaf(high_bf16(x[i]), high_bf16(y[i]), row.data[i % 2]));
    }
    warp::reduce_quad(row, [](float x, float y) { return x + y; });
}

// p = 2^(s scale_log2 - lse2) in place; rows down
KITTENS_DEVICE void exponentials(rt_fl<ROWS>& s, const rv_fl& lse2, float scale_log2) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
        s.data[i] = exp2_fast(fmaf(s.data[i], scale_log2, -lse2.data[i / 2 % 2]));
}

// ds = p (dp - delta), where `keep` says which dp count, and times what
template <bool drop>
KITTENS_DEVICE void score_gradients(rt_bf<ROWS>& ds, const rt_fl<ROWS>& p, const rt_fl<ROWS>& dp, const rv_fl& delta,
                                    uint32_t keep, float keep_scale) {
    const auto gradient = [&](int i) KITTENS_INLINE {
        if constexpr (drop)
            return p.data[i] * fmaf(dp.data[i], keep >> i & 1 ? keep_scale : 0.f, -delta.data[i / 2 % 2]);
        else
            return p.data[i] * (dp.data[i] - delta.data[i / 2 % 2]);
    };
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) ds.data[k][i] = pack_bf16(gradient(8 * k + 2 * i), gradient(8 * k + 2 * i + 1));
}

template <int D, bool drop> KITTENS_DEVICE void dq_compute(dq_smem<D>& smem, const bwd_args& args, const int w) {
    using shape = dq_shape<D>;
    constexpr bool deep = shape::deep && !drop, in_registers = shape::in_registers && deep;
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> prev, kv, next;
    rt_fl<D> dq;
    rt_fl<ROWS> s_even, s_odd, dp;
    rt_bf<ROWS> ds;
    rt_bf<D> q_reg, dout_reg; // if in_registers
    rv_fl lse2, delta;
    dropout_key key = {};
    int head, rank, key_row = 0, slot = 0;

    const auto free = [&](semaphore& bar) KITTENS_INLINE {
        if (elected_lane()) arrive(bar);
    };
    const auto issue_scores = [&](rt_fl<ROWS>& s, int stage) KITTENS_INLINE {
        if constexpr (in_registers) warpgroup::mma_ABt(s, q_reg, smem.k[stage], 0);
        else warpgroup::mma_ABt(s, smem.q[slot][w], smem.k[stage], 0);
        wgmma::commit();
    };
    const auto issue_dp = [&](int stage) KITTENS_INLINE {
        if constexpr (in_registers) warpgroup::mma_ABt(dp, dout_reg, smem.v[stage], 0);
        else warpgroup::mma_ABt(dp, smem.dout[slot][w], smem.v[stage], 0);
        wgmma::commit();
    };
    const auto issue_dq = [&](int stage) KITTENS_INLINE {
        warpgroup::mma_AB(dq, ds, smem.k[stage], 1);
        wgmma::commit();
    };
    // Scores `s` of this step are there; ds of the last step waits for its product with k.
    const auto step = [&]<bool first, bool last>(rt_fl<ROWS>& s, rt_fl<ROWS>& s_next) KITTENS_INLINE {
        if constexpr (!last) wait(smem.kv_arrived[next.slot], next.parity);
        warpgroup::pin(dp);
        warpgroup::pin(s_next);
        warpgroup::pin(dq);
        wgmma::fence();
        if constexpr (!first) issue_dq(prev.slot);
        issue_dp(kv.slot);
        if constexpr (!last) issue_scores(s_next, next.slot);
        if constexpr (first) warp::hide_above_diagonal(s, warp_row(), -INFINITY);
        exponentials(s, lse2, scale_log2);
        wgmma::wait<last ? 0 : 1>();
        warpgroup::pin(dp);
        warpgroup::pin(dq);
        if constexpr (!first) free(smem.kv_free[prev.slot]);
        score_gradients<false>(ds, s, dp, delta, 0, 1.f);
        wgmma::wait<0>();
        warpgroup::pin(s_next);
        prev = kv;
        kv = next;
        next.advance();
    };
    // The same with one set of scores: issued first, and the last step's product with k runs under this step's p.
    const auto lean_step = [&]<bool first>(int piece) KITTENS_INLINE {
        wait(smem.kv_arrived[kv.slot], kv.parity);
        warpgroup::pin(dp);
        warpgroup::pin(s_even);
        warpgroup::pin(dq);
        wgmma::fence();
        if constexpr (!first) issue_scores(s_even, kv.slot);
        issue_dp(kv.slot);
        if constexpr (!first) issue_dq(prev.slot);
        uint32_t keep = 0;
        if constexpr (drop) keep = kept<false>(key, args.dropout.threshold, piece * ROWS + warp_row(), key_row);
        wgmma::wait<first ? 1 : 2>();
        warpgroup::pin(s_even);
        if constexpr (first) warp::hide_above_diagonal(s_even, warp_row(), -INFINITY);
        exponentials(s_even, lse2, scale_log2);
        wgmma::wait<0>();
        warpgroup::pin(dp);
        warpgroup::pin(dq);
        if constexpr (!first) free(smem.kv_free[prev.slot]);
        score_gradients<drop>(ds, s_even, dp, delta, keep, args.dropout.scale);
        prev = kv;
        kv.advance();
        key_row -= ROWS;
    };

#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++) {
        slot = i % shape::slots;
        const uint32_t parity = i / shape::slots & 1;
        const int first_piece = dq_first_piece(args, rank), piece = first_piece + w, steps = piece + 1;
#pragma unroll 1
        for (int j = first_piece + 1; j > piece; j--, kv.advance()) { // the neighbour's: handed round
            wait(smem.kv_arrived[kv.slot], kv.parity);
            free(smem.kv_free[kv.slot]);
        }
        const auto release_last_tile = [&]() KITTENS_INLINE {
            if (shape::slots == 2 && i > 0 && elected_lane()) { // its dq has left by now
                tma::wait_read<0>();
                arrive(smem.o_free[slot ^ 1][w]);
            }
        };
        if (piece < 0) {
            release_last_tile();
            wait(smem.q_arrived[slot][w], parity);
            free(smem.q_free[slot][w]);
            wait(smem.o_arrived[slot][w], parity);
            if constexpr (shape::slots == 1) free(smem.o_free[slot][w]);
            continue;
        }
        float lse[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = piece * ROWS + warp_row() + row_of(r);
            lse[r] = row < args.N ? args.lse[static_cast<int64_t>(head) * args.N + row] : INFINITY;
        }
        wait(smem.q_arrived[slot][w], parity);
        if constexpr (in_registers) {
            warp::load(q_reg, smem.q[slot][w], warp_row());
            warp::load(dout_reg, smem.dout[slot][w], warp_row());
        }
        wait(smem.kv_arrived[kv.slot], kv.parity);
        next = kv;
        next.advance();
        warp::zero(dq);
        warpgroup::pin(dq);
        warpgroup::pin(s_even);
        wgmma::fence();
        issue_scores(s_even, kv.slot);

        release_last_tile();
        wait(smem.o_arrived[slot][w], parity);
        row_dot(delta, smem.dout[slot][w], smem.o[slot][w]);
        if constexpr (in_registers) free(smem.q_free[slot][w]);
        float* stats = args.stats + (static_cast<int64_t>(head) * args.pieces + piece) * 2 * ROWS;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            lse2.data[r] = lse[r] * LOG2E;
            const int row = warp_row() + row_of(r);
            if (col_of() == 0) {
                stats[row] = lse2.data[r];
                stats[ROWS + row] = delta.data[r];
            }
        }
        if constexpr (drop) key = head_key(*args.dropout.seed, head);
        key_row = piece * ROWS;

        if constexpr (!deep) {
            lean_step.template operator()<true>(piece);
#pragma unroll 1
            for (int j = 1; j < steps; j++) lean_step.template operator()<false>(piece);
        } else {
            wgmma::wait<0>();
            warpgroup::pin(s_even);
            walk(step, s_even, s_odd, steps);
        }
        warpgroup::pin(dq);
        wgmma::fence();
        issue_dq(prev.slot);
        if constexpr (!in_registers) free(smem.q_free[slot][w]);
        wgmma::wait<0>();
        warpgroup::pin(dq);
        free(smem.kv_free[prev.slot]);
        const int b = head / args.H, h = head - b * args.H;
        store_rows(smem.o[slot][w], args.dq, dq, args.scale, piece * ROWS, h, b);
        if (shape::slots == 1 && elected_lane()) {
            tma::wait_read<0>();
            arrive(smem.o_free[slot][w]);
        }
    }
    if (elected_lane()) tma::wait_written<0>();
}

template <int D, bool drop>
__global__ void __launch_bounds__(384, 1) causal_dq(const __grid_constant__ bwd_args args) {
    using shape = dq_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    dq_smem<D>& smem = *reinterpret_cast<dq_smem<D>*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * shape::slots; i++) {
            init(smem.q_arrived[i / 2][i % 2], 1);
            init(smem.q_free[i / 2][i % 2], 4); // one arrival a warp
            init(smem.o_arrived[i / 2][i % 2], 1);
            init(smem.o_free[i / 2][i % 2], 4);
        }
        for (int i = 0; i < shape::stages; i++) {
            init(smem.kv_arrived[i], 1);
            init(smem.kv_free[i], 8);
        }
        fence_init();
    }
    __syncthreads();
    let_dependents_launch();
    const int w = warpgroup_id();
    if (w == 2) {
        decrease_registers<24>();
        if (threadIdx.x % 128 == 0) dq_load<D>(smem, args);
    } else {
        increase_registers<240>();
        dq_compute<D, drop>(smem, args, w);
    }
}

// ---- dk, dv: a warpgroup owns rows of k and v --------------------------------------------------------------------

template <int D> struct dkdv_smem {
    using shape = dkdv_shape<D>;
    st_bf<ROWS, D> k[2][2], v[2][2]; // this tile's and the next's; dk and dv leave through them
    st_bf<ROWS, D> q[shape::stages], dout[shape::stages];
    sv_fl<2 * ROWS> stats[shape::stages]; // lse2, delta
    semaphore kv_arrived[2][2], kv_free[2][2];
    semaphore q_arrived[shape::stages], q_free[shape::stages];
};
static_assert(sizeof(dkdv_smem<64>) <= SMEM_LIMIT, "head dim 64: fewer stages");
static_assert(sizeof(dkdv_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages");

// The producer of causal_dkdv and of causal_one_pass, whose plans of shared memory name the same things alike.
template <int D, class Smem> KITTENS_DEVICE void dkdv_load(Smem& smem, const bwd_args& args) {
    ring<Smem::shape::stages> q;
    ring<Smem::shape::slots> kv;
    int head, rank;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++, kv.advance()) {
        const int b = head / args.H, h = head - b * args.H, first_piece = 2 * rank;
#pragma unroll 1
        for (int w = 0; w < 2; w++) {
            semaphore& arrived = smem.kv_arrived[kv.slot][w];
            const int row = (first_piece + w) * ROWS; // a piece past the last one arrives as zeros
            wait(smem.kv_free[kv.slot][w], kv.parity ^ 1);
            expect(arrived, 2 * sizeof(st_bf<ROWS, D>));
            load_rows(smem.k[kv.slot][w], args.k, arrived, row, h, b, tma::PASS);
            load_rows(smem.v[kv.slot][w], args.v, arrived, row, h, b, tma::PASS);
        }
#pragma unroll 1
        for (int j = first_piece; j < args.pieces; j++, q.advance()) {
            semaphore& arrived = smem.q_arrived[q.slot];
            wait(smem.q_free[q.slot], q.parity ^ 1);
            expect(arrived, 2 * sizeof(st_bf<ROWS, D>) + sv_fl<2 * ROWS>::bytes);
            load_rows(smem.q[q.slot], args.q, arrived, j * ROWS, h, b, tma::KEEP);
            load_rows(smem.dout[q.slot], args.dout, arrived, j * ROWS, h, b, tma::KEEP);
            // by tensor map: racecheck does not see that the barrier covers a plain bulk copy
            tma::load(smem.stats[q.slot].address(), args.stats_rows, arrived, 0, j, head, 0);
        }
    }
}

// p^T = 2^(s^T scale_log2 - lse2) in place; q across, so a column has its number
KITTENS_DEVICE void exponentials_across(rt_fl<ROWS>& s, const sv_fl<2 * ROWS>& stats, float scale_log2) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        const float2 lse2 = load_pair(stats.address() + (2 * i + col_of()) * 4);
#pragma unroll
        for (int e = 0; e < 4; e++)
            s.data[i + e] = exp2_fast(fmaf(s.data[i + e], scale_log2, e % 2 ? -lse2.y : -lse2.x));
    }
}

// p^T to bf16, zero where dropped
template <bool drop> KITTENS_DEVICE void round_kept(rt_bf<ROWS>& p_bf, const rt_fl<ROWS>& p, uint32_t keep) {
    const auto kept_p = [&](int i) KITTENS_INLINE { return !drop || (keep >> i & 1) ? p.data[i] : 0.f; };
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) p_bf.data[k][i] = pack_bf16(kept_p(8 * k + 2 * i), kept_p(8 * k + 2 * i + 1));
}

// ds^T = p^T (dp^T - delta)
template <bool drop>
KITTENS_DEVICE void score_gradients_across(rt_bf<ROWS>& ds, const rt_fl<ROWS>& p, const rt_fl<ROWS>& dp,
                                           const sv_fl<2 * ROWS>& stats, uint32_t keep, float keep_scale) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
        const float2 delta = load_pair(stats.address() + (ROWS + 2 * i + col_of()) * 4);
        float gradient[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float of_col = e % 2 ? delta.y : delta.x, x = dp.data[i + e];
            gradient[e] = p.data[i + e] *
                          (drop ? fmaf(x, keep >> (i + e) & 1 ? keep_scale : 0.f, -of_col) : x - of_col);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
            ds.data[i / 8][i / 4 % 2 * 2 + half] = pack_bf16(gradient[2 * half], gradient[2 * half + 1]);
    }
}

template <int D, bool drop> KITTENS_DEVICE void dkdv_compute(dkdv_smem<D>& smem, const bwd_args& args, const int w) {
    using shape = dkdv_shape<D>;
    constexpr bool deep = shape::deep && !drop, v_in_registers = shape::v_in_registers && deep;
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> prev, q, next;
    rt_fl<D> dk, dv;
    rt_fl<ROWS> s_even, s_odd, dp;
    rt_bf<ROWS> p_bf, ds;
    rt_bf<D> v_reg; // if v_in_registers
    dropout_key key = {};
    int head, rank, slot = 0;

    const auto free = [&](semaphore& bar) KITTENS_INLINE {
        if (elected_lane()) arrive(bar);
    };
    const auto issue_scores = [&](rt_fl<ROWS>& s, int stage) KITTENS_INLINE {
        warpgroup::mma_ABt(s, smem.k[slot][w], smem.q[stage], 0);
        wgmma::commit();
    };
    const auto issue_dp = [&](int stage) KITTENS_INLINE {
        if constexpr (v_in_registers) warpgroup::mma_ABt(dp, v_reg, smem.dout[stage], 0);
        else warpgroup::mma_ABt(dp, smem.v[slot][w], smem.dout[stage], 0);
        wgmma::commit();
    };
    const auto issue_dv = [&](int stage) KITTENS_INLINE { warpgroup::mma_AB(dv, p_bf, smem.dout[stage], 1); };
    const auto issue_dk = [&](int stage) KITTENS_INLINE { warpgroup::mma_AB(dk, ds, smem.q[stage], 1); };
    // Scores `s` of this step are there; p and ds of the last step wait for their products.
    const auto step = [&]<bool first, bool last>(rt_fl<ROWS>& s, rt_fl<ROWS>& s_next) KITTENS_INLINE {
        if constexpr (!last) wait(smem.q_arrived[next.slot], next.parity);
        warpgroup::pin(dp);
        warpgroup::pin(s_next);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        wgmma::fence();
        if constexpr (!first) {
            issue_dv(prev.slot);
            issue_dk(prev.slot);
            wgmma::commit();
        }
        issue_dp(q.slot);
        if constexpr (!last) issue_scores(s_next, next.slot);
        if constexpr (first) warp::hide_below_diagonal(s, warp_row(), -INFINITY);
        exponentials_across(s, smem.stats[q.slot], scale_log2);
        wgmma::wait<last ? 0 : 1>();
        warpgroup::pin(dp);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        if constexpr (!first) free(smem.q_free[prev.slot]);
        round_kept<false>(p_bf, s, 0);
        score_gradients_across<false>(ds, s, dp, smem.stats[q.slot], 0, 1.f);
        wgmma::wait<0>();
        warpgroup::pin(s_next);
        prev = q;
        q = next;
        next.advance();
    };
    // The same in fewer registers: one set of scores, and dv and dk in their own step.
    const auto lean_step = [&](int q_piece, int piece) KITTENS_INLINE {
        uint32_t keep = 0;
        if constexpr (drop) keep = kept<true>(key, args.dropout.threshold, q_piece * ROWS, piece * ROWS + warp_row());
        wait(smem.q_arrived[q.slot], q.parity);
        warpgroup::pin(dp);
        warpgroup::pin(s_even);
        wgmma::fence();
        issue_scores(s_even, q.slot);
        issue_dp(q.slot);
        wgmma::wait<1>();
        warpgroup::pin(s_even);
        if (q_piece == piece) warp::hide_below_diagonal(s_even, warp_row(), -INFINITY);
        exponentials_across(s_even, smem.stats[q.slot], scale_log2);
        round_kept<drop>(p_bf, s_even, keep);
        warpgroup::pin(dv);
        wgmma::fence();
        issue_dv(q.slot);
        wgmma::commit();
        wgmma::wait<1>();
        warpgroup::pin(dp);
        score_gradients_across<drop>(ds, s_even, dp, smem.stats[q.slot], keep, args.dropout.scale);
        warpgroup::pin(dk);
        wgmma::fence();
        issue_dk(q.slot);
        wgmma::commit();
        wgmma::wait<0>();
        warpgroup::pin(dv);
        warpgroup::pin(dk);
        free(smem.q_free[q.slot]);
        q.advance();
    };

#pragma unroll 1
    for (int i = 0; args.schedule.find(i, head, rank); i++) {
        slot = i & 1;
        const int first_piece = 2 * rank, piece = first_piece + w, steps = args.pieces - piece;
#pragma unroll 1
        for (int j = first_piece; j < min(piece, args.pieces); j++, q.advance()) { // the neighbour's: handed round
            wait(smem.q_arrived[q.slot], q.parity);
            free(smem.q_free[q.slot]);
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
        if constexpr (drop) key = head_key(*args.dropout.seed, head);
        wait(smem.kv_arrived[slot][w], i / 2 & 1);
        if constexpr (v_in_registers) warp::load(v_reg, smem.v[slot][w], warp_row());
        warp::zero(dk);
        warp::zero(dv);
        warpgroup::pin(dk);
        warpgroup::pin(dv);
        if constexpr (deep) {
            wait(smem.q_arrived[q.slot], q.parity);
            next = q;
            next.advance();
            warpgroup::pin(s_even);
            wgmma::fence();
            issue_scores(s_even, q.slot);
            release_last_tile();
            wgmma::wait<0>();
            warpgroup::pin(s_even);
            walk(step, s_even, s_odd, steps);
        } else {
            release_last_tile();
#pragma unroll 1
            for (int j = piece; j < args.pieces; j++) lean_step(j, piece);
        }
        if constexpr (deep) {
            warpgroup::pin(dk);
            warpgroup::pin(dv);
            wgmma::fence();
            issue_dv(prev.slot);
            issue_dk(prev.slot);
            wgmma::commit();
            wgmma::wait<0>();
            warpgroup::pin(dk);
            warpgroup::pin(dv);
            free(smem.q_free[prev.slot]);
        }
        const int b = head / args.H, h = head - b * args.H;
        sync(1 + w, 128); // the other warps' products have read k and v
        store_rows(smem.v[slot][w], args.dv, dv, drop ? args.dropout.scale : 1.f, piece * ROWS, h, b);
        store_rows(smem.k[slot][w], args.dk, dk, args.scale, piece * ROWS, h, b);
    }
    if (elected_lane()) tma::wait_written<0>();
}

template <int D, bool drop>
__global__ void __launch_bounds__(384, 1) causal_dkdv(const __grid_constant__ bwd_args args) {
    using shape = dkdv_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    dkdv_smem<D>& smem = *reinterpret_cast<dkdv_smem<D>*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            init(smem.kv_arrived[i / 2][i % 2], 1);
            init(smem.kv_free[i / 2][i % 2], 4); // one arrival a warp
        }
        for (int i = 0; i < shape::stages; i++) {
            init(smem.q_arrived[i], 1);
            init(smem.q_free[i], 8);
        }
        fence_init();
    }
    __syncthreads();
    const int w = warpgroup_id();
    if (w == 2) {
        decrease_registers<24>();
        if (threadIdx.x % 128 == 0) dkdv_load<D>(smem, args);
    } else {
        increase_registers<240>();
        dkdv_compute<D, drop>(smem, args, w);
    }
}

} // namespace attn

#include "h100_bwd_one_pass.cuh"
#include "h100_bwd_one_pass_wide.cuh"

namespace attn {

// ---- host --------------------------------------------------------------------------------------------------------

template <class Kernel>
cudaError_t launch_kernel(Kernel kernel, int threads, size_t smem_bytes, int blocks, bool after_its_predecessor,
                          const bwd_args& args, cudaStream_t stream) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = after_its_predecessor ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

// Delta and zeros, the walk, the rounding of dq.
template <int D> cudaError_t launch_one_pass(const bwd_args& args, int blocks, cudaStream_t stream) {
    constexpr auto walk_kernel = [] {
        if constexpr (D == 64) return causal_one_pass<D>;
        else return causal_one_pass_wide<D>;
    }();
    constexpr int threads = D == 64 ? 512 : 256;
    constexpr size_t smem_bytes = D == 64 ? sizeof(one_pass_smem<64>) : sizeof(wide_smem<128>);
    static bool may_use_memory[64] = {};
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    if (!may_use_memory[device]) {
        const cudaError_t e =
            cudaFuncSetAttribute(walk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        if (e != cudaSuccess) return e;
        may_use_memory[device] = true;
    }
    const int all_pieces = args.schedule.heads * args.pieces;
    cudaError_t e = launch_kernel(causal_delta<D>, 128, 0, all_pieces, false, args, stream);
    if (e == cudaSuccess) e = launch_kernel(walk_kernel, threads, smem_bytes, blocks, true, args, stream);
    if (e == cudaSuccess) e = launch_kernel(causal_dq_round<D>, 128, 0, all_pieces, true, args, stream);
    return e;
}

template <int D, bool drop> const char* launch(const bwd_problem& x, cudaStream_t stream) {
    bwd_args args;
    const auto map = [&](CUtensorMap& m, const fwd_tensor& t, int rows) {
        const gl layout = {t.data, x.B, x.H, x.N, x.D, t.batch_stride, t.head_stride, t.row_stride};
        return make_tensor_map(&m, layout, rows, 64) == CUDA_SUCCESS;
    };
    if (!map(args.q, x.q, ROWS)) return "no tensor map for q";
    if (!map(args.k, x.k, ROWS)) return "no tensor map for k";
    if (!map(args.v, x.v, ROWS)) return "no tensor map for v";
    if (!map(args.o, x.o, ROWS)) return "no tensor map for o";
    if (!map(args.dout, x.dout, ROWS)) return "no tensor map for dout";
    if (!map(args.dq, x.dq, 16)) return "no tensor map for dq";
    if (!map(args.dk, x.dk, 16)) return "no tensor map for dk";
    if (!map(args.dv, x.dv, 16)) return "no tensor map for dv";
    args.pieces = (x.N + ROWS - 1) / ROWS;
    const int64_t stats_of_head = static_cast<int64_t>(args.pieces) * 2 * ROWS;
    const gl stats = {x.stats, 1, x.B * x.H, args.pieces, 2 * ROWS, 0, stats_of_head, 2 * ROWS, sizeof(float)};
    if (make_tensor_map(&args.stats_rows, stats, 1, 2 * ROWS) != CUDA_SUCCESS) return "no tensor map for stats";
    args.lse = x.lse;
    args.stats = x.stats;
    args.dq_sums = x.dq_sums;
    const auto rows = [](const fwd_tensor& t) {
        return rows_at{static_cast<const bf16*>(t.data), t.batch_stride, t.head_stride, t.row_stride};
    };
    args.o_at = rows(x.o);
    args.dout_at = rows(x.dout);
    args.D = x.D;
    args.N = x.N;
    args.H = x.H;
    args.scale = 1.f / std::sqrt(static_cast<float>(x.D));
    args.scale_log2 = args.scale * LOG2E;
    args.dropout = make_dropout(x.dropout, x.seed);

    const auto dq = causal_dq<D, drop>;
    const auto dkdv = causal_dkdv<D, drop>;
    static int multiprocessors[64] = {}; // by device; set once the kernels may use their shared memory there
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
    if (multiprocessors[device] == 0) {
        constexpr auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
        cudaError_t e = cudaFuncSetAttribute(dq, limit, sizeof(dq_smem<D>));
        if (e == cudaSuccess) e = cudaFuncSetAttribute(dkdv, limit, sizeof(dkdv_smem<D>));
        int count = 0;
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return cudaGetErrorString(e);
        multiprocessors[device] = std::min<int>(count, tile_schedule::MAX_BLOCKS);
    }
    static schedule_cache dq_schedules, dkdv_schedules;
    const int heads = x.B * x.H, tiles = (args.pieces + 1) / 2, pieces = args.pieces;
    const int blocks = std::min(multiprocessors[device], heads * tiles);
    const int section = static_cast<int>(std::max<int64_t>(1, BWD_SECTION_BYTES / (static_cast<int64_t>(x.N) * D * 4)));
    // in steps of one warpgroup, and what a tile costs beside its steps
    const auto dq_cost = [&](int rank) {
        const int piece = pieces - 2 * (rank + 1);
        return piece + 1.f + piece + 2.f + BWD_TILE_COST;
    };
    const auto dkdv_cost = [&](int rank) {
        const int steps = pieces - 2 * rank;
        return steps + std::max(0, steps - 1) + BWD_TILE_COST;
    };
    if constexpr (!drop) {
        if (x.dq_sums != nullptr) {
            args.schedule = dkdv_schedules.get(heads, section, tiles, blocks, dkdv_cost);
            const cudaError_t e = launch_one_pass<D>(args, blocks, stream);
            return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
        }
    }
    args.schedule = dq_schedules.get(heads, section, tiles, blocks, dq_cost);
    cudaError_t e = launch_kernel(dq, 384, sizeof(dq_smem<D>), blocks, false, args, stream);
    if (e != cudaSuccess) return cudaGetErrorString(e);
    args.schedule = dkdv_schedules.get(heads, section, tiles, blocks, dkdv_cost);
    e = launch_kernel(dkdv, 384, sizeof(dkdv_smem<D>), blocks, true, args, stream);
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

} // namespace attn

extern "C" const char* launch_causal_backward(const attn::bwd_problem* problem, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    const attn::bwd_problem& x = *problem;
    if (x.dropout > 0.f)
        return x.D <= 64 ? attn::launch<64, true>(x, s) : attn::launch<128, true>(x, s);
    return x.D <= 64 ? attn::launch<64, false>(x, s) : attn::launch<128, false>(x, s);
}

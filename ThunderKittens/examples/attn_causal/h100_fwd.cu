// h100_fwd.cu: causal attention, forward, sm_90a        letters: B batch, H heads, N rows (= T), D head dim (= hs)
//
// problem    o = softmax(q k^T / sqrt(D)) v, no row sees a later one;  lse = log of each row's sum of exp
//            q, k, v (B, H, N, D) bf16 with any strides, o (B, N, H, D) bf16, lse (B, H, N) float
// tiles      a warpgroup owns 64 rows of q and o and walks k, v in steps of 128 rows, from the diagonal down to row 0;
//            a block is 3 such warpgroups (D = 64) or 2 (D = 128) and stays on its multiprocessor       shapes.cuh
// pipeline   one producer thread keeps k, v tiles in flight by TMA, and the next tile's q; a warpgroup does not wait
//            for its neighbours, neither inside a tile nor between tiles, unless the shape asks for turns
// softmax    in base 2, with an offset a row that is fixed at the diagonal: exp2(s * scale_log2 - offset), no maximum
//            and no rescaling afterwards. It is exact while no later score exceeds the offset by JUMP; a step in
//            which one does is done again the ordinary way, with the maximum so far
// dropout    p is added up and then zero where dropout.cuh says so; what is kept is scaled with o
// epilogue   o / (sum of the rounded p) -> q's shared tile -> TMA store;  lse = offset + log2(sum of p), the exact one
// limits     sm_90a; D a multiple of 8 up to 128; N >= 1; strides and bases multiples of 16 bytes
#include "h100_fwd.cuh"

#include <algorithm>
#include <cmath>

#include "dropout.cuh"
#include "schedule.cuh"
#include "shapes.cuh"

namespace attn {

using namespace kittens;

struct fwd_args {
    CUtensorMap q, k, v, o;
    float* lse;
    int N, pieces;
    divisor H;
    float scale_log2;
    dropout_args dropout;
    tile_schedule schedule;
    int lse_rows; // N, or 0 where no backward follows
};

// v, and beside it a panel of ones: a column of p times that is the sum of p. D = 128 has the panel in the tile.
template <int D> using v_tile = st_bf<KV_ROWS, D == 64 ? 64 : 192>;

template <int D> struct fwd_smem {
    using shape = fwd_shape<D>;
    st_bf<Q_ROWS, D> q[shape::q_slots][shape::consumers]; // a piece's output leaves through its q
    st_bf<KV_ROWS, D> k[shape::stages];
    v_tile<D> v[shape::stages];
    st_bf<16, 64> ones; // D = 64: the panel beside every 16 rows of v
    semaphore q_arrived[shape::q_slots][shape::consumers], q_free[shape::q_slots][shape::consumers];
    semaphore k_arrived[shape::stages], k_free[shape::stages], v_arrived[shape::stages], v_free[shape::stages];
};
static_assert(sizeof(fwd_smem<64>) <= SMEM_LIMIT, "head dim 64: fewer stages or smaller tiles");
static_assert(sizeof(fwd_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages or smaller tiles");

KITTENS_DEVICE int warp_row() { return (thread_here() >> 5 & 3) * 16; } // this warp's first one in a piece

struct tile {
    int head, first_piece; // first_piece may be negative: then the first warpgroups have no rows
};

// The i-th tile of this block; false when there is none. A full warp.
template <int D> KITTENS_DEVICE bool find_tile(tile& t, const fwd_args& args, int i) {
    int rank;
    if (!args.schedule.find(i, t.head, rank)) return false;
    t.head = same_in_warp(t.head);
    t.first_piece = args.pieces - fwd_shape<D>::consumers * (same_in_warp(rank) + 1);
    return true;
}

// The piece of tile i that warpgroup w has: the order turns over from tile to tile, since later pieces are longer.
template <int D> KITTENS_DEVICE int piece_of(const tile& t, int w, int i) {
    return t.first_piece + (i % 2 ? fwd_shape<D>::consumers - 1 - w : w);
}

// ---- producer ----------------------------------------------------------------------------------------------------

// One warp, of which one lane issues.
template <int D> KITTENS_DEVICE void load_tiles(fwd_smem<D>& smem, const fwd_args& args) {
    using shape = fwd_shape<D>;
    ring<shape::stages> kv;
    ring<shape::q_slots> q[shape::consumers];
    tile t;
    const auto load = [&](uint32_t dst, int rows, const CUtensorMap& map, semaphore& arrived, int row, int h, int b,
                          uint64_t policy) KITTENS_INLINE {
        if (!elected_lane()) return;
        expect(arrived, rows * D * 2);
        for (int c = 0; c < D; c += 64) tma::load(dst + c * rows * 2, map, arrived, c, row, h, b, policy);
    };
#pragma unroll 1
    for (int i = 0; find_tile<D>(t, args, i); i++) {
        const int b = args.H.of(t.head), h = t.head - b * args.H.by;
#pragma unroll
        for (int w = 0; w < shape::consumers; w++) {
            const int piece = piece_of<D>(t, w, i);
            if (piece < 0) continue;
            wait(smem.q_free[q[w].slot][w], q[w].parity ^ 1);
            load(smem.q[q[w].slot][w].address(), Q_ROWS, args.q, smem.q_arrived[q[w].slot][w],
                 piece * Q_ROWS, h, b, tma::PASS);
            q[w].advance();
        }
#pragma unroll 1
        for (int j = (t.first_piece + shape::consumers - 1) * Q_ROWS / KV_ROWS; j >= 0; j--, kv.advance()) {
            wait(smem.k_free[kv.slot], kv.parity ^ 1);
            load(smem.k[kv.slot].address(), KV_ROWS, args.k, smem.k_arrived[kv.slot], j * KV_ROWS, h, b, tma::KEEP);
            wait(smem.v_free[kv.slot], kv.parity ^ 1);
            load(smem.v[kv.slot].address(), KV_ROWS, args.v, smem.v_arrived[kv.slot], j * KV_ROWS, h, b, tma::KEEP);
        }
    }
}

// ---- consumer: softmax -------------------------------------------------------------------------------------------

using scores = rt_fl<KV_ROWS>;
using probabilities = rt_bf<KV_ROWS>;

// P = 2^(score - offset) may grow to this before the offset moves: room for bf16 v up to 2^70 in float sums.
constexpr float JUMP = 0x1p48f;
// The offset of a row that has seen no finite score: any finite one exceeds it by more than JUMP.
constexpr float NO_OFFSET = -1e30f;

// offset and sum of p in base 2; a thread's sum covers the columns it holds. With dropout also the sum of p as it was
// rounded, before some of it is dropped.
struct row_state {
    rv_fl offset, sum, rounded;
};

// p = 2^(s - offset) in place over columns [0, cols); `step_sum` is what they add up to
template <int cols>
KITTENS_DEVICE void exponentials(scores& s, rv_fl& step_sum, const rv_fl& offset, float scale_log2) {
    step_sum.data[0] = step_sum.data[1] = 0.f;
#pragma unroll
    for (int i = 0; i < cols / 2; i += 4) {
#pragma unroll
        for (int e = 0; e < 4; e++) s.data[i + e] = exp2_fast(fmaf(s.data[i + e], scale_log2, -offset.data[e / 2]));
        step_sum.data[0] += s.data[i] + s.data[i + 1];
        step_sum.data[1] += s.data[i + 2] + s.data[i + 3];
    }
}

// The diagonal step. The last 64 of `cols` columns are the triangle; columns from `cols` on are the future altogether.
template <int cols> KITTENS_DEVICE void first_softmax(scores& s, row_state& rows, float scale_log2) {
    const int warp_row = (threadIdx.x >> 5 & 3) * 16;
    const int visible[2] = {warp_row + row_of(0) - col_of(), warp_row + row_of(1) - col_of()};
#pragma unroll
    for (int i = (cols - 64) / 2; i < cols / 2; i++)
        if (8 * (i / 4) + i % 2 - (cols - 64) > visible[i / 2 % 2]) s.data[i] = -INFINITY;
    rv_fl top = {s.data[0], s.data[2]};
#pragma unroll
    for (int i = 0; i < cols / 2; i += 4) {
        top.data[0] = fmaxf(top.data[0], fmaxf(s.data[i], s.data[i + 1]));
        top.data[1] = fmaxf(top.data[1], fmaxf(s.data[i + 2], s.data[i + 3]));
    }
    warp::reduce_quad(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int h = 0; h < 2; h++) rows.offset.data[h] = top.data[h] == -INFINITY ? NO_OFFSET : top.data[h] * scale_log2;
    exponentials<cols>(s, rows.sum, rows.offset, scale_log2);
#pragma unroll
    for (int i = cols / 2; i < KV_ROWS / 2; i++) s.data[i] = 0.f;
}

// Some score of this warp's rows exceeded its offset by JUMP: the ordinary step, with the maximum so far.
template <int D, class Output>
KITTENS_DEVICE void moving_softmax(scores& s, rv_fl& step_sum, row_state& rows, Output& o, const st_bf<Q_ROWS, D>& q,
                                   const st_bf<KV_ROWS, D>& k, float scale_log2) {
    warp::mma_ABt(s, q, warp_row(), k); // the scores are gone: this warp computes its own again
    rv_fl top, shrink;
    warp::row_max(top, s);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float offset = fmaxf(rows.offset.data[h], top.data[h] * scale_log2);
        shrink.data[h] = exp2_fast(rows.offset.data[h] - offset);
        rows.offset.data[h] = offset;
        rows.sum.data[h] *= shrink.data[h];
        rows.rounded.data[h] *= shrink.data[h];
    }
    warp::mul_row(o, shrink);
    exponentials<KV_ROWS>(s, step_sum, rows.offset, scale_log2);
}

// p of 16 x 128: what it adds up to, and then zero where dropped
KITTENS_DEVICE void drop_some(probabilities& p, row_state& rows, const fwd_args& args, int head, int row, int col) {
    const dropout_key key = head_key(*args.dropout.seed, head);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t keep = kept<false>(key, args.dropout.threshold, row, col + 64 * half);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t& pair = p.data[4 * half + k][i];
                rows.rounded.data[i % 2] += low_bf16(pair) + high_bf16(pair);
                const int bit = 8 * k + 4 * (i / 2) + 2 * (i % 2);
                pair &= (keep >> bit & 1 ? 0x0000ffffu : 0) | (keep >> bit & 2 ? 0xffff0000u : 0);
            }
    }
}

// ---- consumer: products ------------------------------------------------------------------------------------------

// o has 8 columns more than v, which all hold the sum of p as it was rounded to bf16. Dividing by that, not by the sum
// of the unrounded p, keeps the output free of the rounding's bias: a row with one maximum and many equal lower scores
// has the same rounding error in every p. (arXiv:2510.04212)
template <int D> using output = rt_fl<D + 8>;

// o += p v, to be committed
template <int D>
KITTENS_DEVICE void accumulate(output<D>& o, const probabilities& p, const v_tile<D>& v, const st_bf<16, 64>& ones) {
    // one panel, and the 16 rows of ones beside every 16 rows of it; or three panels
    const uint32_t to_next_panel = D == 64 ? ones.address() - v.address() : v_tile<D>::panel_bytes;
    const uint64_t first = wgmma::descriptor(v.address(), to_next_panel);
#pragma unroll
    for (int k = 0; k < KV_ROWS / 16; k++)
        wgmma::rs<1>(o.data, p.data[k], wgmma::advance(first, k * 2048, D == 64 ? -k * 2048 : 0), 1);
}

// ---- consumer: one warpgroup -------------------------------------------------------------------------------------

template <int D, bool drop>
KITTENS_DEVICE void store_output(fwd_smem<D>& smem, const fwd_args& args, output<D>& o, row_state& rows,
                                 const st_bf<Q_ROWS, D>& slab, int head, int piece) {
    const int first_row = warp_row(), row = piece * Q_ROWS + first_row;
    const auto add = [](float a, float b) { return a + b; };
    warp::reduce_quad(rows.sum, add);
    if constexpr (drop) warp::reduce_quad(rows.rounded, add);
    const rv_fl rounded = drop ? rows.rounded : rv_fl{o.data[D / 2], o.data[D / 2 + 2]};
    rt_bf<D> out;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float by = (drop ? args.dropout.scale : 1.f) / rounded.data[i % 2];
            out.data[k][i] = pack_bf16(o.data[8 * k + 2 * i] * by, o.data[8 * k + 2 * i + 1] * by);
        }
    warp::store(slab, first_row, out);
    fence_async();
    __syncwarp();
    const int b = args.H.of(head), h = head - b * args.H.by;
    if (elected_lane()) {
        for (int c = 0; c < D; c += 64)
            tma::store(args.o, slab.address() + c * Q_ROWS * 2 + first_row * 128, c, row, h, b);
        tma::commit();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (col_of() == 0 && row + row_of(i) < args.lse_rows)
            args.lse[static_cast<int64_t>(head) * args.N + row + row_of(i)] =
                (rows.offset.data[i] + log2_fast(rows.sum.data[i])) * LN2;
}

template <int D, bool drop> KITTENS_DEVICE void attend(fwd_smem<D>& smem, const fwd_args& args, const int w) {
    using shape = fwd_shape<D>;
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> kv;
    tile t;
    ring<shape::q_slots> q;
    int i = 0, piece, diagonal; // tiles of the block; this warpgroup's piece of the tile, its first step
    bool stored = false;
    scores s;
    probabilities p;
    output<D> o;
    row_state rows;
    // the block's next tile, in which this warpgroup may have no piece; false: there is none
    const auto next_tile = [&]() KITTENS_INLINE {
        if (!find_tile<D>(t, args, i)) return false;
        piece = piece_of<D>(t, w, i++);
        diagonal = piece < 0 ? -1 : piece * Q_ROWS / KV_ROWS;
        return true;
    };
    // the slots of the steps before its diagonal, of which it needs nothing
    const auto hand_round = [&]() KITTENS_INLINE {
#pragma unroll 1
        for (int j = (t.first_piece + shape::consumers - 1) * Q_ROWS / KV_ROWS; j > diagonal; j--, kv.advance()) {
            wait(smem.k_arrived[kv.slot], kv.parity);
            if (elected_lane()) arrive(smem.k_free[kv.slot]);
            wait(smem.v_arrived[kv.slot], kv.parity);
            if (elected_lane()) arrive(smem.v_free[kv.slot]);
        }
    };
    const auto first_scores = [&]() KITTENS_INLINE {
        warpgroup::pin(s);
        wgmma::fence();
        warpgroup::mma_ABt(s, smem.q[q.slot][w], smem.k[kv.slot], 0);
        wgmma::commit();
    };
    // from any tile to the scores of the first step of the next piece; false: no more pieces
    const auto begin_piece = [&](bool tile_left) KITTENS_INLINE {
#pragma unroll 1
        while (tile_left) {
            hand_round();
            if (piece >= 0) break;
            tile_left = next_tile();
        }
        if (!tile_left) return false;
        wait(smem.q_arrived[q.slot][w], q.parity);
        wait(smem.k_arrived[kv.slot], kv.parity);
        first_scores();
        wgmma::wait<0>();
        warpgroup::pin(s);
        return true;
    };

    bool more = begin_piece(next_tile());
    if (shape::turns && more && w == shape::consumers - 1) arrive(1, 256); // warpgroup 0 has the first turn
#pragma unroll 1
    while (more) { // s holds the scores of the diagonal step
        const st_bf<Q_ROWS, D>& q_tile = smem.q[q.slot][w];
        if (elected_lane()) arrive(smem.k_free[kv.slot]);
        warp::zero(o);
        warpgroup::pin(o);
        if (piece & 1)
            first_softmax<128>(s, rows, scale_log2);
        else
            first_softmax<64>(s, rows, scale_log2);
        warp::copy(p, s);
        if constexpr (drop) {
            rows.rounded = {0.f, 0.f};
            drop_some(p, rows, args, t.head, piece * Q_ROWS + warp_row(), diagonal * KV_ROWS);
        }
        if (stored && elected_lane()) { // the last piece's output has left its q by now
            tma::wait_read<0>();
            arrive(smem.q_free[q.previous().slot][w]);
        }
        stored = true;

#pragma unroll 1
        for (int j = diagonal; j > 0; j--) {
            const int last = kv.slot;
            wait(smem.v_arrived[last], kv.parity);
            kv.advance();
            wait(smem.k_arrived[kv.slot], kv.parity);
            if (shape::turns) sync(1 + w, 256);
            warpgroup::pin(o);
            wgmma::fence();
            warpgroup::mma_ABt(s, q_tile, smem.k[kv.slot], 0);
            wgmma::commit();
            accumulate<D>(o, p, smem.v[last], smem.ones);
            wgmma::commit();
            if (shape::turns) arrive(1 + (w ^ 1), 256);
            wgmma::wait<1>();
            warpgroup::pin(s);
            rv_fl step_sum;
            exponentials<KV_ROWS>(s, step_sum, rows.offset, scale_log2);
            const bool jumped = __any_sync(~0u, !(step_sum.data[0] + step_sum.data[1] < JUMP)); // NaN too
            wall(jumped);
            wgmma::wait<0>();
            warpgroup::pin(o);
            if (elected_lane()) arrive(smem.v_free[last]);
            if (jumped) moving_softmax<D>(s, step_sum, rows, o, q_tile, smem.k[kv.slot], scale_log2);
            if (elected_lane()) arrive(smem.k_free[kv.slot]);
            rows.sum.data[0] += step_sum.data[0];
            rows.sum.data[1] += step_sum.data[1];
            warp::copy(p, s);
            if constexpr (drop)
                drop_some(p, rows, args, t.head, piece * Q_ROWS + warp_row(), (j - 1) * KV_ROWS);
        }

        // the last product, and with it the next piece's first: its scores come while this piece's output leaves
        const int last = kv.slot, last_head = t.head, last_piece = piece;
        wait(smem.v_arrived[last], kv.parity);
        kv.advance();
        warpgroup::pin(o);
        wgmma::fence();
        accumulate<D>(o, p, smem.v[last], smem.ones);
        wgmma::commit();
        q.advance();
        const bool tile_left = next_tile(), at_once = tile_left && piece >= 0;
        if (at_once) { // v's slot is still held: this must not wait for anything further on than the ring is long
            static_assert((shape::consumers - 1) * Q_ROWS <= KV_ROWS && shape::stages >= 2, "one step passed on");
            hand_round();
            wait(smem.q_arrived[q.slot][w], q.parity);
            wait(smem.k_arrived[kv.slot], kv.parity);
        }
        first_scores(); // of no use, and harmless, where the next piece is not at hand
        wgmma::wait<1>();
        warpgroup::pin(o);
        if (elected_lane()) arrive(smem.v_free[last]);
        store_output<D, drop>(smem, args, o, rows, q_tile, last_head, last_piece);
        wgmma::wait<0>();
        warpgroup::pin(s);
        more = at_once || begin_piece(tile_left);
    }
    if (shape::turns && w == 0 && stored) sync(1, 256); // takes up the last arrival
    if (elected_lane()) tma::wait_written<0>();
}

// ---- kernel ------------------------------------------------------------------------------------------------------

template <int D, bool drop>
__global__ void __launch_bounds__((fwd_shape<D>::consumers + 1) * 128, 1)
    causal_forward(const __grid_constant__ fwd_args args) {
    using shape = fwd_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    fwd_smem<D>& smem = *reinterpret_cast<fwd_smem<D>*>(raw);
    const int w = warpgroup_id();
    const auto fill = [](bf16* panel, int rows) {
        for (int i = threadIdx.x; i < rows * 64 / 8; i += blockDim.x)
            reinterpret_cast<uint4*>(panel)[i] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    };
    if (D == 64)
        fill(smem.ones.data, 16);
    else
        for (int i = 0; i < shape::stages; i++) fill(smem.v[i].data + KV_ROWS * D, KV_ROWS);
    fence_async();
    if (threadIdx.x == 0) {
        for (int i = 0; i < shape::q_slots * shape::consumers; i++) {
            init(smem.q_arrived[i / shape::consumers][i % shape::consumers], 1);
            init(smem.q_free[i / shape::consumers][i % shape::consumers], 4); // one arrival a warp
        }
        for (int i = 0; i < shape::stages; i++) {
            init(smem.k_arrived[i], 1);
            init(smem.v_arrived[i], 1);
            init(smem.k_free[i], 4 * shape::consumers);
            init(smem.v_free[i], 4 * shape::consumers);
        }
        fence_init();
    }
    __syncthreads();
    if (w == shape::consumers) {
        decrease_registers<shape::producer_registers>();
        if (same_in_warp(threadIdx.x % 128 / 32) == 0) load_tiles<D>(smem, args);
    } else {
        increase_registers<shape::registers>();
        attend<D, drop>(smem, args, w);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// What the tile of this rank costs, in steps of one warpgroup: its steps, half ones counted so, and 1.5 a warpgroup.
template <int D> float cost_of_tile(int pieces, int rank) {
    float sum = 0.f;
    for (int w = 0; w < fwd_shape<D>::consumers; w++) {
        const int piece = pieces - fwd_shape<D>::consumers * (rank + 1) + w;
        if (piece >= 0) sum += 1.5f + piece * Q_ROWS / KV_ROWS + (piece % 2 ? 1.f : 0.5f);
    }
    return sum;
}

template <int D, bool drop> const char* launch(const fwd_problem& x, cudaStream_t stream) {
    fwd_args args;
    const auto layout = [&](const fwd_tensor& t) {
        return gl{t.data, x.B, x.H, x.N, x.D, t.batch_stride, t.head_stride, t.row_stride};
    };
    if (make_tensor_map(&args.q, layout(x.q), Q_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for q";
    if (make_tensor_map(&args.k, layout(x.k), KV_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for k";
    if (make_tensor_map(&args.v, layout(x.v), KV_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for v";
    if (make_tensor_map(&args.o, layout(x.o), 16, 64) != CUDA_SUCCESS) return "no tensor map for o";
    args.lse = x.lse;
    args.lse_rows = x.lse == nullptr ? 0 : x.N;
    args.N = x.N;
    args.H = divisor(x.H);
    args.pieces = pieces_per_head<D>(x.N);
    args.scale_log2 = LOG2E / std::sqrt(static_cast<float>(x.D));
    args.dropout = make_dropout(x.dropout, x.seed);

    static int multiprocessors[64] = {}; // by device; set once the kernel may use its shared memory there
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
    if (multiprocessors[device] == 0) {
        cudaError_t e = cudaFuncSetAttribute(causal_forward<D, drop>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             sizeof(fwd_smem<D>));
        int count = 0;
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return cudaGetErrorString(e);
        multiprocessors[device] = std::min<int>(count, tile_schedule::MAX_BLOCKS);
    }
    const int heads = x.B * x.H;
    const int64_t all = static_cast<int64_t>(heads) * tiles_per_head<D>(x.N);
    const int blocks = static_cast<int>(std::min<int64_t>(multiprocessors[device], all));
    static schedule_cache known;
    const int pieces = args.pieces;
    args.schedule = known.get(heads, std::min(fwd_shape<D>::section_heads(x.N), heads), tiles_per_head<D>(x.N), blocks,
                              [pieces](int rank) { return cost_of_tile<D>(pieces, rank); });
    causal_forward<D, drop><<<blocks, (fwd_shape<D>::consumers + 1) * 128, sizeof(fwd_smem<D>), stream>>>(args);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

} // namespace attn

extern "C" const char* launch_causal_forward(const attn::fwd_problem* problem, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    const attn::fwd_problem& x = *problem;
    if (x.dropout > 0.f) return x.D <= 64 ? attn::launch<64, true>(x, s) : attn::launch<128, true>(x, s);
    return x.D <= 64 ? attn::launch<64, false>(x, s) : attn::launch<128, false>(x, s);
}

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
// epilogue   o / (sum of the rounded p) -> q's shared tile -> TMA store;  lse = offset + log2(sum of p), the exact one
// limits     sm_90a; D a multiple of 8 up to 128; N >= 1; strides and bases multiples of 16 bytes
#include "h100_fwd.cuh"

#ifndef WALL
#define WALL 0
#endif
#ifndef SUM128
#define SUM128 0
#endif

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <queue>
#include <utility>
#include <vector>

#include "shapes.cuh"

namespace attn {

using namespace kittens;

// Which tiles a block computes. Tiles are numbered by section of heads, then longest first, then head: blocks that run
// at the same time share k and v in L2. A block takes tile blockIdx.x, then each gridDim.x-th, for `rounds` tiles, and
// then its own run of `listed`, which the host filled so that all blocks end together.
struct fwd_schedule {
    static constexpr int MAX_BLOCKS = 160, MAX_LISTED = 1536;
    int heads, section_heads, rounds;
    uint16_t first[MAX_BLOCKS + 1];
    uint16_t listed[MAX_LISTED];
};

struct fwd_args {
    CUtensorMap q, k, v, o;
    float* lse;
    int N, H, pieces;
    float scale_log2;
    int listed_base; // number of the tile that 0 stands for in `listed`
    fwd_schedule schedule;
};

template <int D> struct fwd_smem {
    using shape = fwd_shape<D>;
    st_bf<Q_ROWS, D> q[2][shape::consumers]; // this tile's and the next's; a tile's output leaves through its q
    st_bf<KV_ROWS, D> k[shape::stages], v[shape::stages];
    alignas(1024) bf16 ones[16 * 64]; // a panel of ones beside v: its column of p v is the sum of p
    semaphore q_arrived[2][shape::consumers], q_free[2][shape::consumers];
    semaphore k_arrived[shape::stages], k_free[shape::stages], v_arrived[shape::stages], v_free[shape::stages];
};
static_assert(sizeof(fwd_smem<64>) <= SMEM_LIMIT, "head dim 64: fewer stages or smaller tiles");
static_assert(sizeof(fwd_smem<128>) <= SMEM_LIMIT, "head dim 128: fewer stages or smaller tiles");

struct tile {
    int head, first_piece; // first_piece may be negative: then the first warpgroups have no rows
};

// The i-th tile of this block; false when there is none.
template <int D> KITTENS_DEVICE bool find_tile(tile& t, const fwd_args& args, int i) {
    const fwd_schedule& s = args.schedule;
    int number;
    if (i < s.rounds) {
        number = i * gridDim.x + blockIdx.x;
    } else {
        const int at = s.first[blockIdx.x] + i - s.rounds;
        if (at >= s.first[blockIdx.x + 1]) return false;
        number = args.listed_base + s.listed[at];
    }
    constexpr int per_tile = fwd_shape<D>::consumers;
    const int tiles = (args.pieces + per_tile - 1) / per_tile;
    const int section = number / (s.section_heads * tiles), in_section = number - section * s.section_heads * tiles;
    const int heads = min(s.section_heads, s.heads - section * s.section_heads), rank = in_section / heads;
    t.head = section * s.section_heads + in_section - rank * heads;
    t.first_piece = args.pieces - per_tile * (rank + 1);
    return true;
}

// ---- producer ----------------------------------------------------------------------------------------------------

template <int D> KITTENS_DEVICE void load_tiles(fwd_smem<D>& smem, const fwd_args& args) {
    using shape = fwd_shape<D>;
    ring<shape::stages> kv;
    ring<2> q[shape::consumers];
    tile t;
    for (int i = 0; find_tile<D>(t, args, i); i++) {
        const int b = t.head / args.H, h = t.head - b * args.H;
#pragma unroll
        for (int w = 0; w < shape::consumers; w++) {
            if (t.first_piece + w < 0) continue;
            semaphore& arrived = smem.q_arrived[q[w].slot][w];
            wait(smem.q_free[q[w].slot][w], q[w].parity ^ 1);
            expect(arrived, sizeof(st_bf<Q_ROWS, D>));
            const uint32_t dst = smem.q[q[w].slot][w].address();
            for (int c = 0; c < D; c += 64)
                tma::load(dst + c * Q_ROWS * 2, args.q, arrived, c, (t.first_piece + w) * Q_ROWS, h, b, tma::PASS);
            q[w].advance();
        }
        for (int j = (t.first_piece + shape::consumers - 1) * Q_ROWS / KV_ROWS; j >= 0; j--) {
            wait(smem.k_free[kv.slot], kv.parity ^ 1);
            expect(smem.k_arrived[kv.slot], sizeof(st_bf<KV_ROWS, D>));
            for (int c = 0; c < D; c += 64)
                tma::load(smem.k[kv.slot].address() + c * KV_ROWS * 2, args.k, smem.k_arrived[kv.slot], c, j * KV_ROWS,
                          h, b, tma::KEEP);
            wait(smem.v_free[kv.slot], kv.parity ^ 1);
            expect(smem.v_arrived[kv.slot], sizeof(st_bf<KV_ROWS, D>));
            for (int c = 0; c < D; c += 64)
                tma::load(smem.v[kv.slot].address() + c * KV_ROWS * 2, args.v, smem.v_arrived[kv.slot], c, j * KV_ROWS,
                          h, b, tma::KEEP);
            kv.advance();
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

// offset and sum of p in base 2; a thread's sum covers the columns it holds
struct row_state {
    rv_fl offset, sum;
};

// p = 2^(s - offset) in place over columns [0, cols); `step_sum` is what they add up to
template <int cols> KITTENS_DEVICE void exponentials(scores& s, rv_fl& step_sum, const rv_fl& offset, float scale_log2) {
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
    warp::mma_ABt(s, q, (threadIdx.x >> 5 & 3) * 16, k); // the scores are gone: this warp computes its own again
    rv_fl top, shrink;
    warp::row_max(top, s);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float offset = fmaxf(rows.offset.data[h], top.data[h] * scale_log2);
        shrink.data[h] = exp2_fast(rows.offset.data[h] - offset);
        rows.offset.data[h] = offset;
        rows.sum.data[h] *= shrink.data[h];
    }
    rescale(o, shrink);
    exponentials<KV_ROWS>(s, step_sum, rows.offset, scale_log2);
}

// ---- consumer: products ------------------------------------------------------------------------------------------

// Dividing o by the sum of p as it was rounded to bf16, not by the sum of the unrounded p, keeps the output free of the
// rounding's bias: a row with one maximum and many equal lower scores has the same rounding error in every p
// (arXiv:2510.04212). D = 64: o has 8 columns more than v, p times a column of ones. D = 128: added up apart.
template <int D> struct output {
    static constexpr bool ones_beside_v = D == 64;
    rt_fl<D + (ones_beside_v ? 8 : 0)> sums;
    float rounded[ones_beside_v ? 1 : 4];
};

template <int D> KITTENS_DEVICE void clear(output<D>& o) {
    warp::zero(o.sums);
    warpgroup::pin(o.sums);
    if constexpr (!output<D>::ones_beside_v)
        for (float& x : o.rounded) x = 0.f;
}

template <int D> KITTENS_DEVICE void rescale(output<D>& o, const rv_fl& by) {
    warp::mul_row(o.sums, by);
    if constexpr (!output<D>::ones_beside_v)
        for (int i = 0; i < 4; i++) o.rounded[i] *= by.data[i / 2];
}

// o += p v, to be committed
template <int D>
KITTENS_DEVICE void accumulate(output<D>& o, const probabilities& p, const st_bf<KV_ROWS, D>& v, const bf16* ones) {
    if constexpr (output<D>::ones_beside_v) {
        const uint64_t first = wgmma::descriptor(v.address(), smem_address(ones) - v.address());
#pragma unroll
        for (int k = 0; k < KV_ROWS / 16; k++) // the same 16 rows of ones stand beside every 16 rows of v
            wgmma::rs<1>(o.sums.data, p.data[k], wgmma::advance(first, k * 2048, -k * 2048), 1);
    } else {
        warpgroup::mma_AB(o.sums, p, v, 1);
    }
}

// p = bf16(s), and what o must know of the rounding
template <int D> KITTENS_DEVICE void round(probabilities& p, output<D>& o, const scores& s) {
    warp::copy(p, s);
    if constexpr (!output<D>::ones_beside_v) {
#if SUM128 == 1
#pragma unroll
        for (int k = 0; k < KV_ROWS / 16; k++) mma_16x8(o.rounded, p.data[k], 0x3f803f80u, 0x3f803f80u);
#elif SUM128 == 0
#pragma unroll
        for (int k = 0; k < KV_ROWS / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) o.rounded[i % 2 * 2 + i / 2] += low_bf16(p.data[k][i]) + high_bf16(p.data[k][i]);
#endif
    }
}

// ---- consumer: one warpgroup -------------------------------------------------------------------------------------

template <int D>
KITTENS_DEVICE void store_output(fwd_smem<D>& smem, const fwd_args& args, output<D>& o, row_state& rows,
                                 const st_bf<Q_ROWS, D>& slab, int head, int piece) {
    const int warp_row = (threadIdx.x >> 5 & 3) * 16, row = piece * Q_ROWS + warp_row;
    const auto add = [](float a, float b) { return a + b; };
    warp::reduce_quad(rows.sum, add);
    rv_fl rounded;
    if constexpr (output<D>::ones_beside_v) {
        rounded = {o.sums.data[D / 2], o.sums.data[D / 2 + 2]};
    } else {
#if SUM128 == 1
        rounded = {o.rounded[0], o.rounded[2]};
#elif SUM128 == 0
        rounded = {o.rounded[0] + o.rounded[1], o.rounded[2] + o.rounded[3]};
        warp::reduce_quad(rounded, add);
#else
        rounded = rows.sum;
#endif
    }
    rt_bf<D> out;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float by = 1.f / rounded.data[i % 2];
            out.data[k][i] = pack_bf16(o.sums.data[8 * k + 2 * i] * by, o.sums.data[8 * k + 2 * i + 1] * by);
        }
    warp::store(slab, warp_row, out);
    fence_async();
    __syncwarp();
    const int b = head / args.H, h = head - b * args.H;
    if (elected_lane()) {
        for (int c = 0; c < D; c += 64)
            tma::store(args.o, slab.address() + c * Q_ROWS * 2 + warp_row * 128, c, row, h, b);
        tma::commit();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (col_of() == 0 && row + row_of(i) < args.N)
            args.lse[static_cast<int64_t>(head) * args.N + row + row_of(i)] =
                (rows.offset.data[i] + log2_fast(rows.sum.data[i])) * LN2;
}

template <int D> KITTENS_DEVICE void attend(fwd_smem<D>& smem, const fwd_args& args, const int w) {
    using shape = fwd_shape<D>;
    const float scale_log2 = args.scale_log2;
    ring<shape::stages> kv;
    ring<2> q;
    scores s;
    probabilities p;
    output<D> o;
    row_state rows;
    tile t;
    bool stored = false;
    if (shape::turns && w == shape::consumers - 1) arrive(1, 256); // warpgroup 0 has the first turn
#pragma unroll 1
    for (int i = 0; find_tile<D>(t, args, i); i++) {
        const int piece = t.first_piece + w, diagonal = piece < 0 ? -1 : piece * Q_ROWS / KV_ROWS;
        // a warpgroup that has less to do still hands the slots round
#pragma unroll 1
        for (int j = (t.first_piece + shape::consumers - 1) * Q_ROWS / KV_ROWS; j > diagonal; j--, kv.advance()) {
            wait(smem.k_arrived[kv.slot], kv.parity);
            if (elected_lane()) arrive(smem.k_free[kv.slot]);
            wait(smem.v_arrived[kv.slot], kv.parity);
            if (elected_lane()) arrive(smem.v_free[kv.slot]);
        }
        if (piece < 0) continue;

        const st_bf<Q_ROWS, D>& q_tile = smem.q[q.slot][w];
        wait(smem.q_arrived[q.slot][w], q.parity);
        wait(smem.k_arrived[kv.slot], kv.parity);
        warpgroup::pin(s);
        wgmma::fence();
        warpgroup::mma_ABt(s, q_tile, smem.k[kv.slot], 0);
        wgmma::commit();
        clear(o);
        wgmma::wait<0>();
        warpgroup::pin(s);
        if (elected_lane()) arrive(smem.k_free[kv.slot]);
        if (piece & 1)
            first_softmax<128>(s, rows, scale_log2);
        else
            first_softmax<64>(s, rows, scale_log2);
        round(p, o, s);
        if (stored && elected_lane()) { // the last tile's output has left its q by now
            tma::wait_read<0>();
            arrive(smem.q_free[q.slot ^ 1][w]);
        }

#pragma unroll 1
        for (int j = diagonal; j > 0; j--) {
            const ring<shape::stages> last = kv;
            kv.advance();
            wait(smem.k_arrived[kv.slot], kv.parity);
            wait(smem.v_arrived[last.slot], last.parity);
            if (shape::turns) sync(1 + w, 256);
            warpgroup::pin(o.sums);
            wgmma::fence();
            warpgroup::mma_ABt(s, q_tile, smem.k[kv.slot], 0);
            wgmma::commit();
            accumulate(o, p, smem.v[last.slot], smem.ones);
            wgmma::commit();
            if (shape::turns) arrive(1 + (w ^ 1), 256);
            wgmma::wait<1>();
            warpgroup::pin(s);
            rv_fl step_sum;
            exponentials<KV_ROWS>(s, step_sum, rows.offset, scale_log2);
            const bool jumped = !(step_sum.data[0] + step_sum.data[1] < JUMP); // NaN too
#if WALL == 0
            wgmma::wait<0>();
            warpgroup::pin(o.sums);
            if (elected_lane()) arrive(smem.v_free[last.slot]);
            if (__any_sync(~0u, jumped)) moving_softmax<D>(s, step_sum, rows, o, q_tile, smem.k[kv.slot], scale_log2);
#elif WALL == 1
            if (__any_sync(~0u, jumped)) {
                wgmma::wait<0>();
                warpgroup::pin(o.sums);
                moving_softmax<D>(s, step_sum, rows, o, q_tile, smem.k[kv.slot], scale_log2);
            } else {
                wgmma::wait<0>();
                warpgroup::pin(o.sums);
            }
            if (elected_lane()) arrive(smem.v_free[last.slot]);
#else
            const bool any_jumped = __any_sync(~0u, jumped);
            if (any_jumped) asm volatile("{\n.reg .u32 c;\n.reg .pred p;\nAGAIN:\nmov.u32 c, %clock;\nsetp.eq.u32 p, c, 0;\n@p bra AGAIN;\n}" ::: "memory");
            wgmma::wait<0>();
            warpgroup::pin(o.sums);
            if (elected_lane()) arrive(smem.v_free[last.slot]);
            if (any_jumped) moving_softmax<D>(s, step_sum, rows, o, q_tile, smem.k[kv.slot], scale_log2);
#endif
            if (elected_lane()) arrive(smem.k_free[kv.slot]);
            rows.sum.data[0] += step_sum.data[0];
            rows.sum.data[1] += step_sum.data[1];
            round(p, o, s);
        }

        wait(smem.v_arrived[kv.slot], kv.parity);
        warpgroup::pin(o.sums);
        wgmma::fence();
        accumulate(o, p, smem.v[kv.slot], smem.ones);
        wgmma::commit();
        wgmma::wait<0>();
        warpgroup::pin(o.sums);
        if (elected_lane()) arrive(smem.v_free[kv.slot]);
        kv.advance();
        store_output(smem, args, o, rows, q_tile, t.head, piece);
        q.advance();
        stored = true;
    }
    if (shape::turns && w == 0) sync(1, 256); // takes up the last arrival
    if (elected_lane()) tma::wait_written<0>();
}

// ---- kernel ------------------------------------------------------------------------------------------------------

template <int D>
__global__ void __launch_bounds__((fwd_shape<D>::consumers + 1) * 128, 1)
    causal_forward(const __grid_constant__ fwd_args args) {
    using shape = fwd_shape<D>;
    extern __shared__ __align__(1024) unsigned char raw[];
    fwd_smem<D>& smem = *reinterpret_cast<fwd_smem<D>*>(raw);
    const int w = warpgroup_id();
    for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) smem.ones[i] = __float2bfloat16(1.f);
    fence_async();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * shape::consumers; i++) {
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
        if (threadIdx.x % 128 == 0) load_tiles<D>(smem, args);
    } else {
        increase_registers<shape::registers>();
        attend<D>(smem, args, w);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Deals the tiles out: each to the block that has least to do so far, in the order of their numbers.
template <int D> void fill_schedule(fwd_args& args, int heads, int section_heads, int blocks) {
    constexpr int per_tile = fwd_shape<D>::consumers;
    const int tiles = tiles_per_head<D>(args.N), all = heads * tiles;
    fwd_schedule& s = args.schedule;
    s.heads = heads;
    s.section_heads = section_heads;
    s.rounds = all <= fwd_schedule::MAX_LISTED ? 0 : (all - fwd_schedule::MAX_LISTED + blocks - 1) / blocks;
    args.listed_base = s.rounds * blocks;
    const auto cost = [&](int number) { // in steps of one warpgroup; 1.5 for what a tile costs beside its steps
        const int in_section = number % (section_heads * tiles), section = number / (section_heads * tiles);
        const int rank = in_section / std::min(section_heads, heads - section * section_heads);
        float sum = 0.f;
        for (int w = 0; w < per_tile; w++) {
            const int piece = args.pieces - per_tile * (rank + 1) + w;
            if (piece >= 0) sum += 1.5f + piece * Q_ROWS / KV_ROWS + (piece % 2 ? 1.f : 0.5f);
        }
        return sum;
    };
    std::vector<float> load(blocks, 0.f);
    for (int number = 0; number < args.listed_base; number++) load[number % blocks] += cost(number);
    std::priority_queue<std::pair<float, int>, std::vector<std::pair<float, int>>, std::greater<>> free;
    for (int block = 0; block < blocks; block++) free.emplace(load[block], block);
    std::vector<std::vector<uint16_t>> run(blocks);
    for (int number = args.listed_base; number < all; number++) {
        const auto [busy, block] = free.top();
        free.pop();
        run[block].push_back(static_cast<uint16_t>(number - args.listed_base));
        free.emplace(busy + cost(number), block);
    }
    int at = 0;
    for (int block = 0; block < blocks; block++) {
        s.first[block] = static_cast<uint16_t>(at);
        at = static_cast<int>(std::copy(run[block].begin(), run[block].end(), s.listed + at) - s.listed);
    }
    s.first[blocks] = static_cast<uint16_t>(at);
}

// The plans of the last few shapes; making one takes some tens of microseconds.
template <int D> void plan(fwd_args& args, int heads, int section_heads, int blocks) {
    struct entry {
        int N, heads, section_heads, blocks, listed_base;
        fwd_schedule schedule;
    };
    static std::mutex mutex;
    static std::vector<entry> known;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const entry& e : known)
        if (e.N == args.N && e.heads == heads && e.section_heads == section_heads && e.blocks == blocks) {
            args.listed_base = e.listed_base;
            args.schedule = e.schedule;
            return;
        }
    fill_schedule<D>(args, heads, section_heads, blocks);
    if (known.size() == 64) known.erase(known.begin());
    known.push_back({args.N, heads, section_heads, blocks, args.listed_base, args.schedule});
}

template <int D> const char* launch(const fwd_problem& x, cudaStream_t stream) {
    fwd_args args;
    const auto layout = [&](const fwd_tensor& t) {
        return gl{t.data, x.B, x.H, x.N, x.D, t.batch_stride, t.head_stride, t.row_stride};
    };
    if (make_tensor_map(&args.q, layout(x.q), Q_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for q";
    if (make_tensor_map(&args.k, layout(x.k), KV_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for k";
    if (make_tensor_map(&args.v, layout(x.v), KV_ROWS, 64) != CUDA_SUCCESS) return "no tensor map for v";
    if (make_tensor_map(&args.o, layout(x.o), 16, 64) != CUDA_SUCCESS) return "no tensor map for o";
    args.lse = x.lse;
    args.N = x.N;
    args.H = x.H;
    args.pieces = pieces_per_head<D>(x.N);
    args.scale_log2 = LOG2E / std::sqrt(static_cast<float>(x.D));

    static int multiprocessors[64] = {}; // by device; set once the kernel may use its shared memory there
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
    if (multiprocessors[device] == 0) {
        cudaError_t e = cudaFuncSetAttribute(causal_forward<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             sizeof(fwd_smem<D>));
        int count = 0;
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return cudaGetErrorString(e);
        multiprocessors[device] = std::min<int>(count, fwd_schedule::MAX_BLOCKS);
    }
    const int heads = x.B * x.H;
    const int64_t all = static_cast<int64_t>(heads) * tiles_per_head<D>(x.N);
    const int blocks = static_cast<int>(std::min<int64_t>(multiprocessors[device], all));
    const int64_t kv_bytes = static_cast<int64_t>(x.N) * D * 4;
    const int section = x.section_heads > 0 ? x.section_heads
                                            : static_cast<int>(std::max<int64_t>(1, SECTION_BYTES / kv_bytes));
    plan<D>(args, heads, std::min(section, heads), blocks);
    causal_forward<D><<<blocks, (fwd_shape<D>::consumers + 1) * 128, sizeof(fwd_smem<D>), stream>>>(args);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

} // namespace attn

extern "C" const char* launch_causal_forward(const attn::fwd_problem* problem, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    return problem->D <= 64 ? attn::launch<64>(*problem, s) : attn::launch<128>(*problem, s);
}

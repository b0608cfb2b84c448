// shapes.cuh: what the kernels are cut into, a struct a head dim; nothing else hard-codes a size.
//
// D is the head dim as tiles have it, 64 or 128; a smaller one is filled up with zeros by TMA.
#pragma once

#include "kittens.cuh"

namespace attn {

constexpr int SMEM_LIMIT = 227 * 1024; // bytes one block may ask for on sm_90
constexpr int Q_ROWS = 64;             // rows of q, and of the output, that one warpgroup owns
constexpr int KV_ROWS = 128;           // rows of k and v in one step

template <int D> struct fwd_shape;
template <> struct fwd_shape<64> {
    static constexpr int consumers = 3; // warpgroups: 3 overlap softmax and products better than 2 (63 against 49 %)
    static constexpr int q_slots = 3;   // this tile's q and the next two's: 2 cost 3 % at N = 1024
    static constexpr int stages = 4;    // k, v tiles in flight: how far the fastest warpgroup may run ahead
    static constexpr int registers = 160, producer_registers = 32;
    static constexpr bool turns = false; // warpgroups issue their products in turn; then all make the same steps
    static constexpr int section_heads(int) { return 32; } // computed at the same time, out of L2
};
template <> struct fwd_shape<128> {
    static constexpr int consumers = 2; // 3 do not fit the registers
    static constexpr int q_slots = 2;
    static constexpr int stages = 2;
    static constexpr int registers = 232, producer_registers = 40;
    static constexpr bool turns = true; // without: 3 to 7 % slower from N = 2048 on
    // 8 MB of k and v; at N = 1024 4 heads are 2.5 % faster than those 16
    static constexpr int section_heads(int N) { return N < 2048 ? 4 : N < 16384 ? 16384 / N : 1; }
};

// How rows are dealt out. A head's rows are cut into pieces of Q_ROWS, and a tile is `consumers` pieces, one a
// warpgroup. Tile 0 holds the last rows of the head and is the longest; the first rows may make one with fewer pieces.
template <int D> constexpr int pieces_per_head(int N) {
    constexpr int per_tile = fwd_shape<D>::consumers;
    const int pieces = (N + Q_ROWS - 1) / Q_ROWS;
    // with turns every tile is whole and starts at an even piece; what lies past the last row is computed and dropped
    return fwd_shape<D>::turns ? (pieces + per_tile - 1) / per_tile * per_tile : pieces;
}
template <int D> constexpr int tiles_per_head(int N) {
    return (pieces_per_head<D>(N) + fwd_shape<D>::consumers - 1) / fwd_shape<D>::consumers;
}

// The backward. Two warpgroups, each with 64 rows of its own, walk over 64 rows in a step.
//   stages        walked tiles in flight
//   slots         own tiles (this one's, the next one's) in shared memory
//   deep          scores of the next step are computed during this one's exponentials: 32 more registers
//   in_registers  own operands that stay as fragments in registers and spare shared memory's bandwidth. Only where
//                 deep: in the other step ptxas 13.0 gives v's registers to ds and overwrites them in the first round
template <int D> struct dq_shape;
template <> struct dq_shape<64> {
    static constexpr int stages = 6, slots = 2;
    static constexpr bool deep = true, in_registers = true; // q, dout
};
template <> struct dq_shape<128> {
    static constexpr int stages = 4, slots = 1;
    static constexpr bool deep = true, in_registers = false;
};
template <int D> struct dkdv_shape;
template <> struct dkdv_shape<64> {
    static constexpr int stages = 6, slots = 2;
    static constexpr bool deep = true, v_in_registers = true;
};
template <> struct dkdv_shape<128> {
    static constexpr int stages = 3, slots = 2;
    static constexpr bool deep = false, v_in_registers = false;
};

template <int D> struct one_pass_shape;
template <> struct one_pass_shape<64> { // dk, dv, dp, two sets of scores, v: 128 would not fit the registers
    static constexpr int stages = 4, slots = 2;
};
template <int D> struct wide_shape; // one pass in the registers of two warpgroups
template <> struct wide_shape<128> {
    static constexpr int stages = 3;
};

constexpr int64_t BWD_SECTION_BYTES = 8 << 20; // walked operands that stay in L2 while a section of heads is computed
constexpr float BWD_TILE_COST = 3.f;           // what a tile costs beside its steps, in steps of one warpgroup

} // namespace attn

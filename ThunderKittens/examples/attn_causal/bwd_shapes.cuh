// bwd_shapes.cuh: what the backward kernels are cut into, beside shapes.cuh
#pragma once

#include "shapes.cuh"

namespace attn {

// Two warpgroups, each with 64 rows of its own, walk over 64 rows in a step.
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
    static constexpr int stages = 6;
    static constexpr bool deep = true, v_in_registers = true;
};
template <> struct dkdv_shape<128> {
    static constexpr int stages = 3;
    static constexpr bool deep = false, v_in_registers = false;
};

constexpr int64_t BWD_SECTION_BYTES = 8 << 20; // walked operands that stay in L2 while a section of heads is computed
constexpr float BWD_TILE_COST = 3.f;           // what a tile costs beside its steps, in steps of one warpgroup

} // namespace attn

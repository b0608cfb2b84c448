// Register tiles: what one warp holds of a tile. A warp owns 16 rows; a warpgroup's four warps own 64 consecutive ones.
#pragma once

#include <cstdint>

#include "../arch/barrier.cuh"

namespace kittens {

// 16 x C floats a warp, in the layout of a wgmma accumulator. data[4 b + i], with lane l of the warp:
//   row    l / 4 + 8 (i / 2)
//   column 8 b + 2 (l % 4) + i % 2
template <int C> struct rt_fl {
    static constexpr int cols = C;
    float data[C / 2];
};

// 16 x C bf16 a warp, in the layout of wgmma's A operand: data[k] is the 16 x 16 block of columns 16 k .. 16 k + 15.
template <int C> struct rt_bf {
    static constexpr int cols = C;
    uint32_t data[C / 16][4];
};

// One float a row of a 16-row tile: rows l / 4 and l / 4 + 8, the same in the four lanes that share them.
struct rv_fl {
    float data[2];
};

// which row of its warp's 16 a thread's element (half 0 or 1) is in, and its first column in a block of 8
KITTENS_DEVICE int row_of(int half) { return static_cast<int>((threadIdx.x & 31) >> 2) + 8 * half; }
KITTENS_DEVICE int col_of() { return static_cast<int>(threadIdx.x & 3) * 2; }

} // namespace kittens

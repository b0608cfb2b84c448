// What one warp does to its 16 rows of a tile. Destination first.
#pragma once

#include <cstdint>

#include "../arch/barrier.cuh"
#include "../arch/matrix.cuh"
#include "../arch/scalar.cuh"
#include "../types/register.cuh"
#include "../types/shared.cuh"

namespace kittens {
namespace warp {

// dst[r][c] = 0
// an accumulator before its first product
template <int C> KITTENS_DEVICE void zero(rt_fl<C>& dst) {
#pragma unroll
    for (int i = 0; i < C / 2; i++) dst.data[i] = 0.f;
}

// dst[r][c] = bf16(src[r][c])
// scores to the A operand of the next product; no data moves between lanes
template <int C> KITTENS_DEVICE void copy(rt_bf<C>& dst, const rt_fl<C>& src) {
#pragma unroll
    for (int k = 0; k < C / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) dst.data[k][i] = pack_bf16(src.data[8 * k + 2 * i], src.data[8 * k + 2 * i + 1]);
}

// dst[r][c] *= row[r]
// rescaling and normalising an output
template <int C> KITTENS_DEVICE void mul_row(rt_fl<C>& dst, const rv_fl& row) {
#pragma unroll
    for (int i = 0; i < C / 2; i++) dst.data[i] *= row.data[(i >> 1) & 1];
}

// row[r] = op over the four lanes that share row r
// the end of every row reduction
template <class Op> KITTENS_DEVICE void reduce_quad(rv_fl& row, Op op) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        row.data[h] = op(row.data[h], __shfl_xor_sync(~0u, row.data[h], 1));
        row.data[h] = op(row.data[h], __shfl_xor_sync(~0u, row.data[h], 2));
    }
}

// row[r] = max over c of src[r][c], NaN ignored
// the offset of a softmax
template <int C> KITTENS_DEVICE void row_max(rv_fl& row, const rt_fl<C>& src) {
    row.data[0] = src.data[0];
    row.data[1] = src.data[2];
#pragma unroll
    for (int i = 0; i < C / 2; i += 4) {
        row.data[0] = fmaxf(row.data[0], fmaxf(src.data[i], src.data[i + 1]));
        row.data[1] = fmaxf(row.data[1], fmaxf(src.data[i + 2], src.data[i + 3]));
    }
    reduce_quad(row, [](float a, float b) { return fmaxf(a, b); });
}

// dst[r][c] = value where c > r + first_row, `first_row` counted from the tile's first column
// hides the future on the diagonal
template <int C> KITTENS_DEVICE void hide_above_diagonal(rt_fl<C>& dst, int first_row, float value) {
    const int visible0 = row_of(0) + first_row - col_of(), visible1 = row_of(1) + first_row - col_of();
#pragma unroll
    for (int i = 0; i < C / 2; i++) {
        const int col = 8 * (i / 4) + i % 2;
        if (col > ((i & 2) ? visible1 : visible0)) dst.data[i] = value;
    }
}

// dst[r][c] = value where c < r + first_row
// the same for scores that are kept transposed
template <int C> KITTENS_DEVICE void hide_below_diagonal(rt_fl<C>& dst, int first_row, float value) {
    const int visible0 = row_of(0) + first_row - col_of(), visible1 = row_of(1) + first_row - col_of();
#pragma unroll
    for (int i = 0; i < C / 2; i++) {
        const int col = 8 * (i / 4) + i % 2;
        if (col < ((i & 2) ? visible1 : visible0)) dst.data[i] = value;
    }
}

// dst[row + r][c] = src[r][c], 16 rows
// stmatrix into the swizzle; fence_async before TMA or wgmma reads it
template <class Tile, int C> KITTENS_DEVICE void store(const Tile& dst, int row, const rt_bf<C>& src) {
    static_assert(Tile::cols >= C, "the register tile is wider than the shared one");
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < C / 16; k++) stmatrix(dst.address(row + (lane & 15), 2 * k + (lane >> 4)), src.data[k]);
}

// dst[r][c] = src[row + r][c], 16 rows
// fragments of an A operand that stays in registers
template <class Tile, int C> KITTENS_DEVICE void load(rt_bf<C>& dst, const Tile& src, int row) {
    static_assert(Tile::cols >= C, "the register tile is wider than the shared one");
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < C / 16; k++) ldmatrix(dst.data[k], src.address(row + (lane & 15), 2 * k + (lane >> 4)));
}

// d[r][n] = sum over k of a[row + r][k] b[n][k], 16 rows, by this warp alone (mma.sync)
// where the other warps of the warpgroup have nothing to compute
template <int N, class A, class B> KITTENS_DEVICE void mma_ABt(rt_fl<N>& d, const A& a, int row, const B& b) {
    static_assert(A::cols == B::cols && B::rows == N, "a is 16 x K, b is N x K");
    const int lane = thread_here() & 31;
    float(&acc)[N / 8][4] = reinterpret_cast<float(&)[N / 8][4]>(d.data);
#pragma unroll
    for (int i = 0; i < N / 2; i++) d.data[i] = 0.f;
#pragma unroll
    for (int k = 0; k < A::cols / 16; k++) {
        uint32_t a_reg[4];
        ldmatrix(a_reg, a.address(row + (lane & 15), 2 * k + (lane >> 4)));
        const uint32_t b_rows = b.address((lane >> 4) * 8 + (lane & 7), 2 * k + ((lane >> 3) & 1));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b_reg[4]; // rows n..n+7 and n+8..n+15 of b, each with both halves of this k
            ldmatrix(b_reg, b_rows + n * 128);
            mma_16x8(acc[n / 8], a_reg, b_reg[0], b_reg[1]);
            mma_16x8(acc[n / 8 + 1], a_reg, b_reg[2], b_reg[3]);
        }
    }
}

} // namespace warp
} // namespace kittens

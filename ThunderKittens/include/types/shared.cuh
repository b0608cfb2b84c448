// Shared tiles and vectors. A tile of R rows and C columns of bf16 is cut into panels of 64 columns, each R rows of
// 128 bytes, with the 128-byte swizzle: the eight 16-byte pieces of row r stand at place (piece ^ r % 8).
// TMA writes and reads that layout with CU_TENSOR_MAP_SWIZZLE_128B and boxes of 64 columns; wgmma reads it as it is.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "../arch/barrier.cuh"

namespace kittens {

using bf16 = __nv_bfloat16;

// A window of R rows and C columns onto a tile; `panel_bytes` from one panel of the tile to the next.
template <int R, int C, int panel_bytes_> struct st_window {
    static constexpr int rows = R, cols = C, panel_bytes = panel_bytes_;
    uint32_t base;
    KITTENS_DEVICE uint32_t address() const { return base; }
    // address of element (row, 8 piece)
    KITTENS_DEVICE uint32_t address(int row, int piece) const {
        return base + (piece >> 3) * panel_bytes + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
    }
};

template <int R, int C> struct alignas(1024) st_bf {
    static_assert(R % 8 == 0 && C % 64 == 0, "whole groups of eight rows and panels of 64 columns");
    static constexpr int rows = R, cols = C, panel_bytes = R * 128, bytes = R * C * 2;
    bf16 data[R * C];

    KITTENS_DEVICE uint32_t address() const { return smem_address(data); }
    KITTENS_DEVICE st_window<R, C, panel_bytes> window() const { return {address()}; }
    KITTENS_DEVICE uint32_t address(int row, int piece) const { return window().address(row, piece); }
    // n rows from row `first` on, a multiple of 8
    template <int n> KITTENS_DEVICE st_window<n, C, panel_bytes> row_window(int first) const {
        return {address() + first * 128};
    }
    // the n columns from column `first` on, multiples of 64
    template <int n> KITTENS_DEVICE st_window<R, n, panel_bytes> col_window(int first) const {
        return {address() + first / 64 * panel_bytes};
    }
};

// N floats in shared memory
template <int N> struct alignas(128) sv_fl {
    static constexpr int length = N, bytes = N * 4;
    float data[N];
    KITTENS_DEVICE uint32_t address() const { return smem_address(data); }
};

} // namespace kittens

// dropout.cuh: which probabilities are dropped. A pure function of (seed, batch and head, row, column), so the forward
// and both passes of the backward see the same mask in whatever order and layout they come to it.
//
//   head key    64 bits: splitmix64's finaliser of seed + (b H + h + 1) 0x9E3779B97F4A7C15
//   group       the four scores (row, row + 8) x (col, col + 8) with bit 3 of row and col clear: one thread holds all
//               four in the layout of the scores and in that of their transpose
//   counter     x0 = group row + high half of the key, x1 = group column;  group row = row / 16 * 8 + row % 8
//   numbers     Philox2x32-7 of the counter under the low half of the key: two words, one for row and one for row + 8;
//               lower 16 bits for col, upper for col + 8
//   dropped     where the number is below `threshold` = round(65536 p), at most 65535: the probability is exactly
//               threshold / 65536, and what is kept is scaled by exactly 65536 / (65536 - threshold)
//
// source  Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11
#pragma once

#include <algorithm>
#include <cmath>

#include "kittens.cuh"

namespace attn {

using namespace kittens;

struct dropout_args {
    const int64_t* seed;
    uint32_t threshold; // of 65536
    float scale;        // of what is kept
};

inline dropout_args make_dropout(float p, const int64_t* seed) {
    const uint32_t threshold = static_cast<uint32_t>(std::min(std::lround(65536.0 * p), 65535l));
    return {seed, threshold, 65536.f / static_cast<float>(65536 - threshold)};
}

struct dropout_key {
    uint32_t low, high;
};

KITTENS_DEVICE dropout_key head_key(uint64_t seed, int head) {
    uint64_t x = seed + (static_cast<uint64_t>(head) + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}

KITTENS_DEVICE uint2 philox2x32_7(uint32_t x0, uint32_t x1, uint32_t key) {
#pragma unroll
    for (int round = 0; round < 7; round++) {
        const uint64_t product = static_cast<uint64_t>(x0) * 0xD256D193u;
        x0 = static_cast<uint32_t>(product >> 32) ^ key ^ x1;
        x1 = static_cast<uint32_t>(product);
        key += 0x9E3779B9u;
    }
    return {x0, x1};
}

// Bit i is set where element i of this thread's part of a 16 x 64 register tile is kept. `row`, `col`: the tile's first
// ones, multiples of 16, in the matrix of scores; transposed: the tile holds scores^T, its own first row is `col`.
template <bool transposed>
KITTENS_DEVICE uint32_t kept(const dropout_key& key, uint32_t threshold, int row, int col) {
    uint32_t bits = 0;
    const uint32_t lane = thread_here() & 31, of_lane = lane >> 2, of_pair = lane % 4 * 2;
    const uint32_t group_row = row / 2 + (transposed ? of_pair : of_lane) + key.high;
    const uint32_t group_col = col / 2 + (transposed ? of_lane : of_pair);
#pragma unroll 1 // few registers matter more here than many products at once
    for (int k = 0; k < 4; k++) // blocks of 16 columns of the tile
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t step = 8 * k + c;
            const uint2 random = transposed ? philox2x32_7(group_row + step, group_col, key.low)
                                            : philox2x32_7(group_row, group_col + step, key.low);
            const uint32_t low_col[2] = {random.x & 0xffff, random.y & 0xffff}, // of row, row + 8
                high_col[2] = {random.x >> 16, random.y >> 16};
#pragma unroll
            for (int tile_row = 0; tile_row < 2; tile_row++)
#pragma unroll
                for (int tile_col = 0; tile_col < 2; tile_col++) {
                    const int of_row = transposed ? tile_col : tile_row, of_col = transposed ? tile_row : tile_col;
                    const uint32_t number = of_col ? high_col[of_row] : low_col[of_row];
                    if (number >= threshold) bits |= 1u << (8 * k + 4 * tile_col + 2 * tile_row + c);
                }
        }
    return bits;
}

} // namespace attn

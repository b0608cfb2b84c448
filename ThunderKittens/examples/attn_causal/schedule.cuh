// schedule.cuh: which tiles a block of a persistent kernel computes, decided by the host.
//
// Tiles are numbered by section of heads, then longest first, then head: blocks that run at the same time share what
// they read in L2. A block takes tile blockIdx.x, then each gridDim.x-th, for `rounds` tiles, and then its own run of
// `listed`, which the host filled so that all blocks end together. No counter, no atomic, the same every time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <mutex>
#include <queue>
#include <utility>
#include <vector>

#include "kittens.cuh"

namespace attn {

using namespace kittens;

// Division of 0 <= n < 2^31 by a number that the host knows: a multiplication and a shift. (Granlund, Montgomery 1994)
struct divisor {
    uint32_t by, factor, shift;
    divisor() = default;
    explicit divisor(uint32_t d) : by(d), shift(0) {
        while ((1ull << shift) < d) shift++;
        factor = static_cast<uint32_t>((((1ull << shift) - d) << 32) / d + 1);
    }
    KITTENS_DEVICE int of(int n) const {
        return static_cast<int>((__umulhi(static_cast<uint32_t>(n), factor) + static_cast<uint32_t>(n)) >> shift);
    }
};

struct tile_schedule {
    static constexpr int MAX_BLOCKS = 160, MAX_LISTED = 1536;
    int heads, section_heads, tiles; // tiles a head
    int rounds, listed_base;         // `listed` counts from tile number listed_base
    divisor per_section, per_rank, per_last_rank; // tiles a section; heads a section, and in the last one
    uint16_t first[MAX_BLOCKS + 1];
    uint16_t listed[MAX_LISTED];

    // The i-th tile of this block: its head, and its rank among the head's tiles (0 the longest). False: there is none.
    KITTENS_DEVICE bool find(int i, int& head, int& rank) const {
        int number;
        if (i < rounds) {
            number = i * gridDim.x + blockIdx.x;
        } else {
            const int at = first[blockIdx.x] + i - rounds;
            if (at >= first[blockIdx.x + 1]) return false;
            number = listed_base + listed[at];
        }
        const int section = per_section.of(number), in_section = number - section * per_section.by;
        const divisor& heads_here = heads - section * section_heads < section_heads ? per_last_rank : per_rank;
        rank = heads_here.of(in_section);
        head = section * section_heads + in_section - rank * heads_here.by;
        return true;
    }
};

// Deals the tiles out: each to the block that has least to do so far, in the order of their numbers.
inline tile_schedule make_schedule(int heads, int section_heads, int tiles, int blocks,
                                   const std::function<float(int)>& cost_of_rank) {
    tile_schedule s;
    const int all = heads * tiles;
    s.heads = heads;
    s.section_heads = std::min(section_heads, heads);
    s.tiles = tiles;
    s.per_section = divisor(s.section_heads * tiles);
    s.per_rank = divisor(s.section_heads);
    s.per_last_rank = divisor((heads - 1) % s.section_heads + 1);
    s.rounds = all <= tile_schedule::MAX_LISTED ? 0 : (all - tile_schedule::MAX_LISTED + blocks - 1) / blocks;
    s.listed_base = s.rounds * blocks;
    std::vector<float> cost(tiles);
    for (int rank = 0; rank < tiles; rank++) cost[rank] = cost_of_rank(rank);
    const auto cost_of = [&](int number) {
        const int per_section = s.section_heads * tiles, section = number / per_section;
        return cost[number % per_section / std::min(s.section_heads, heads - section * s.section_heads)];
    };
    std::vector<float> load(blocks, 0.f);
    for (int number = 0; number < s.listed_base; number++) load[number % blocks] += cost_of(number);
    std::priority_queue<std::pair<float, int>, std::vector<std::pair<float, int>>, std::greater<>> free;
    for (int block = 0; block < blocks; block++) free.emplace(load[block], block);
    std::vector<std::vector<uint16_t>> run(blocks);
    for (int number = s.listed_base; number < all; number++) {
        const auto [busy, block] = free.top();
        free.pop();
        run[block].push_back(static_cast<uint16_t>(number - s.listed_base));
        free.emplace(busy + cost_of(number), block);
    }
    int at = 0;
    for (int block = 0; block < blocks; block++) {
        s.first[block] = static_cast<uint16_t>(at);
        at = static_cast<int>(std::copy(run[block].begin(), run[block].end(), s.listed + at) - s.listed);
    }
    s.first[blocks] = static_cast<uint16_t>(at);
    return s;
}

// The last few schedules; making one takes some tens of microseconds. `known` is the caller's own list.
struct schedule_cache {
    struct entry {
        int heads, section_heads, tiles, blocks;
        tile_schedule schedule;
    };
    std::mutex mutex;
    std::vector<entry> known;

    tile_schedule get(int heads, int section_heads, int tiles, int blocks,
                      const std::function<float(int)>& cost_of_rank) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (const entry& e : known)
            if (e.heads == heads && e.section_heads == section_heads && e.tiles == tiles && e.blocks == blocks)
                return e.schedule;
        if (known.size() == 64) known.erase(known.begin());
        known.push_back({heads, section_heads, tiles, blocks,
                         make_schedule(heads, section_heads, tiles, blocks, cost_of_rank)});
        return known.back().schedule;
    }
};

} // namespace attn

// The copy engine: tiles by tensor map, both ways, and runs of floats that are added.
// Every function here is for one thread. [cp.async.bulk.tensor, cp.reduce.async.bulk]
//
// Coordinates are in elements, innermost first. What a box would read outside the tensor arrives as 0 (and counts as
// arrived bytes); what it would write past the end is dropped. So a tail needs no code. A load may begin at a negative
// coordinate; a store that did ended in an illegal instruction (H100, driver 580).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "barrier.cuh"

namespace kittens {
namespace tma {

// createpolicy's encodings for lines that will be read again, or never again
constexpr uint64_t KEEP = 0x14F0000000000000ull; // L2::evict_last
constexpr uint64_t PASS = 0x12F0000000000000ull; // L2::evict_first

// box at (c0, c1, c2, c3) -> shared memory; `bar` is told of the bytes
KITTENS_DEVICE void load(uint32_t dst, const CUtensorMap& map, semaphore& bar, int c0, int c1, int c2, int c3,
                         uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
                 "l"(&map), "r"(bar.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
                 : "memory");
}
KITTENS_DEVICE void load(uint32_t dst, const CUtensorMap& map, semaphore& bar, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
                 "l"(&map), "r"(bar.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
// the same box into the same place of every block of the cluster whose bit is set in `blocks`; each one's semaphore at
// the place of `bar` is told of the bytes
KITTENS_DEVICE void load_multicast(uint32_t dst, const CUtensorMap& map, semaphore& bar, int c0, int c1, int c2,
                                   int c3, uint16_t blocks, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(dst),
                 "l"(&map), "r"(bar.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks), "l"(policy)
                 : "memory");
}
// shared memory -> box; part of the group that the next commit() closes
KITTENS_DEVICE void store(const CUtensorMap& map, uint32_t src, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
// dst += shared memory, run by run: 16-byte aligned, a multiple of 16 bytes
KITTENS_DEVICE void reduce_add_floats(float* dst, uint32_t src, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src),
                 "r"(bytes)
                 : "memory");
}
// stores of this thread since the last commit become one group
KITTENS_DEVICE void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// until all but the last `groups` have read their shared memory (it may be overwritten)
template <int groups> KITTENS_DEVICE void wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}
// until all but the last `groups` are written
template <int groups> KITTENS_DEVICE void wait_written() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(groups) : "memory");
}

} // namespace tma
} // namespace kittens

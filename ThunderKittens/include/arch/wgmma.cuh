// The warpgroup's matrix product: d[64][n] (+)= A[64][16] B[16][n], bf16 in, float out, asynchronous.
// [wgmma.mma_async] Only the widths that a kernel or a test here uses: n = 8 x (2 floats a thread).
//
// The four warps of a warpgroup hold 16 rows of d each: in every block of 8 columns lane l has row l / 4, columns
// 2 (l % 4) and the next, and the same of row l / 4 + 8. A from registers uses the layout of two such blocks.
#pragma once

#include <cstdint>

#include "barrier.cuh"

namespace kittens {
namespace wgmma {

// [wgmma.fence] before the first product, and after ordinary code touched a register that one uses
KITTENS_DEVICE void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// products issued since the last commit become one group
KITTENS_DEVICE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// until all but the last `groups` are complete
template <int groups> KITTENS_DEVICE void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// Where an operand lies: address of its first row in a tile with the 128-byte swizzle, rows of 128 bytes, groups of
// eight rows 1024 bytes apart. `panel_bytes`: from one panel of 64 columns to the next, where columns run along M or N
// (a transposed operand wider than 64). [Asynchronous Warpgroup Level Matrix Shared Memory Layout]
KITTENS_DEVICE uint64_t descriptor(uint32_t address, uint32_t panel_bytes = 16) {
    constexpr uint64_t rows_of_8_at_1024_bytes = 64ull << 32, swizzle_128_bytes = 1ull << 62;
    return rows_of_8_at_1024_bytes | swizzle_128_bytes | (((panel_bytes >> 4) & 0x3fff) << 16 | address >> 4);
}
// The same operand `bytes` further on (and its panels `panel_bytes` further apart): one 32-bit addition, no carry.
KITTENS_DEVICE uint64_t advance(uint64_t descriptor, int bytes, int panel_bytes = 0) {
    const uint32_t panels = static_cast<uint32_t>(panel_bytes >> 4) << 16;
    const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4) + panels;
    return (descriptor & 0xffffffff00000000ull) | low;
}

// operand lists, so that each width below is one line
#define KITTENS_REGS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KITTENS_REGS_36 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35"
#define KITTENS_REGS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KITTENS_REGS_68 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67"
#define KITTENS_REGS_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KITTENS_ACC_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KITTENS_ACC_16(d, i) \
    KITTENS_ACC_4(d, i), KITTENS_ACC_4(d, i + 4), KITTENS_ACC_4(d, i + 8), KITTENS_ACC_4(d, i + 12)
#define KITTENS_ACC_32(d) KITTENS_ACC_16(d, 0), KITTENS_ACC_16(d, 16)
#define KITTENS_ACC_36(d) KITTENS_ACC_32(d), KITTENS_ACC_4(d, 32)
#define KITTENS_ACC_64(d) KITTENS_ACC_32(d), KITTENS_ACC_16(d, 32), KITTENS_ACC_16(d, 48)
#define KITTENS_ACC_68(d) KITTENS_ACC_64(d), KITTENS_ACC_4(d, 64)
#define KITTENS_ACC_96(d) KITTENS_ACC_64(d), KITTENS_ACC_16(d, 64), KITTENS_ACC_16(d, 80)

// ss: A and B in shared memory. rs: A in registers. transpose_x: rows of that operand run along K (M or N contiguous).
// accumulate = 0 overwrites d. %o0... are the numbers of the operands behind the accumulator.
#define KITTENS_WGMMA(n, floats, o0, o1, o2, o3, o4, o5, o6)                                                          \
    template <int transpose_a, int transpose_b>                                                                       \
    KITTENS_DEVICE void ss(float (&d)[floats], uint64_t a, uint64_t b, int accumulate) {                              \
        asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, %" #o2 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" KITTENS_REGS_##floats               \
                     "}, %" #o0 ", %" #o1 ", acc, 1, 1, %" #o3 ", %" #o4 ";\n}"                                       \
                     : KITTENS_ACC_##floats(d)                                                                        \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(transpose_a), "n"(transpose_b));                          \
    }                                                                                                                 \
    template <int transpose_b>                                                                                        \
    KITTENS_DEVICE void rs(float (&d)[floats], const uint32_t (&a)[4], uint64_t b, int accumulate) {                  \
        asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, %" #o5 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" KITTENS_REGS_##floats               \
                     "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", acc, 1, 1, %" #o6 ";\n}"                 \
                     : KITTENS_ACC_##floats(d)                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transpose_b));        \
    }

KITTENS_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
KITTENS_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
KITTENS_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
KITTENS_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
KITTENS_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)

} // namespace wgmma
} // namespace kittens

// 8x8 matrices of bf16 between a warp's registers and shared memory, and the warp's own small product.
#pragma once

#include <cstdint>

#include "barrier.cuh"

namespace kittens {

// [ldmatrix] lane l names row l % 8 of matrix l / 8; register i holds matrix i
KITTENS_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// [stmatrix] the same the other way
KITTENS_DEVICE void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
// [ld.shared.v2] two neighbouring floats; volatile, so it stays behind the wait that it is written behind
KITTENS_DEVICE float2 load_pair(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}
// [ld.shared.v4] eight neighbouring bf16; volatile likewise
KITTENS_DEVICE uint4 load_piece(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
// [st.shared.v4] to `address` unless that is 0
KITTENS_DEVICE void store_if(uint32_t address, float a, float b, float c, float d) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::
                     "r"(address), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}
// [mma.m16n8k16] d[16][8] += a[16][16] b[8][16]^T by one warp alone; d in the layout of wgmma's n8 blocks
KITTENS_DEVICE void mma_16x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace kittens

// Arithmetic on one thread's registers that C++ has no exact word for.
#pragma once

#include <cstdint>

#include "barrier.cuh"

namespace kittens {

constexpr float LOG2E = 1.4426950408889634f; // log2(e): scores are kept in base 2
constexpr float LN2 = 0.6931471805599453f;

// 2^x on the special function unit, relative error 2^-22; below 2^-126 it is 0
KITTENS_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2(x), absolute error 2^-22 near 1, else relative 2^-22
KITTENS_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x on the special function unit, error below 1 ulp; 0 for an infinite x
KITTENS_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// the smaller of two; NaN if one of them is
KITTENS_DEVICE float min_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
// [ld.global.cs.v4] eight bf16 that are read once; volatile
KITTENS_DEVICE uint4 load_once(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
// two floats rounded to nearest bf16, `low` in the lower half
KITTENS_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// the halves of such a pair as floats
KITTENS_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
KITTENS_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

} // namespace kittens

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
// `size` with the sign of `sign`, or the other sign if it is negative
KITTENS_DEVICE float with_sign_of(float size, float sign) {
    return __uint_as_float(__float_as_uint(size) ^ (__float_as_uint(sign) & 0x80000000u));
}
// [ld.global.cs.v4, st.global.cs.v4] eight bf16 that are read or written once, if `there`; no branch, and volatile
KITTENS_DEVICE void load_once_if(bool there, uint4& x, const void* p) {
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\n"
                 "@there ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "l"(p), "r"(static_cast<uint32_t>(there)));
}
KITTENS_DEVICE void store_once_if(bool there, void* p, uint4 x) {
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\n"
                 "@there st.global.cs.v4.u32 [%4], {%0, %1, %2, %3};\n}" ::"r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w), "l"(p), "r"(static_cast<uint32_t>(there))
                 : "memory");
}
// p, of which the compiler no longer knows where it came from
template <class T> KITTENS_DEVICE T* opaque(T* p) {
    asm("" : "+l"(p));
    return p;
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

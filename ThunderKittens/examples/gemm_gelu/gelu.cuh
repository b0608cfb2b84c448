// gelu.cuh: GELU and its derivative, x times the normal distribution's function, and the tanh form of it.
//
// exact   With a = |x| and Q(a) the upper tail of the normal distribution, gelu is max(x, 0) - a Q(a); its slope is
//         D(a) = Q(a) + a Q'(a) at -a and 1 - D(a) at a. Here
//             Q(a) = exp2(-1 + Q1 a + .. + Q5 a^5)
//             D(a) = exp2(-1 + E1 a + E2 a^2) (1 + D1 a + .. + D4 a^4)
//         one special function each. The coefficients are our own, minimax fits up to a = 5.7 in which an error counts
//         by 2^-9 of the value plus 1e-6 (D: 2e-6). gelu is off by 8e-6 at most and by 5.3e-5 of itself for |x| < 3,
//         the slope by 3.2e-5. Rounded to bf16, both are within 2^-8 of the exact value (+ 1e-7) at every bf16, and
//         where that is above 1e-4, 21 of 68972 differ from the exact value rounded.
// tanh    x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh z) / 2
// An infinite x gives the limit in the exact form; in the tanh form it gives NaN where torch does: gelu at -infinity, the
// slope at both. A NaN stays one.
#pragma once

#include "kittens.cuh"

namespace gemm {

using namespace kittens;

constexpr float FAR = 16.f; // Q and D are 0 in float from there on
constexpr float Q1 = -1.15033630f, Q2 = -0.461789411f, Q3 = -0.0499361609f, Q4 = 0.00633423099f, Q5 = -0.000373192373f;
constexpr float E1 = -0.690666706f, E2 = -0.654886932f;
constexpr float D1 = -1.11582591f, D2 = -0.20249802f, D3 = -0.124267503f, D4 = 0.0191596309f;
constexpr float TANH_2K = 1.5957691216f, TANH_CUBE = 0.044715f; // 2 sqrt(2 / pi)

template <bool tanh> KITTENS_DEVICE float gelu(float x) {
    if constexpr (tanh) {
        const float w = fmaf(x * x, -LOG2E * TANH_2K * TANH_CUBE, -LOG2E * TANH_2K);
        return x * reciprocal_fast(1.f + exp2_fast(x * w));
    } else {
        const float a = min_nan(fabsf(x), FAR);
        const float q = exp2_fast(fmaf(a, fmaf(a, fmaf(a, fmaf(a, fmaf(a, Q5, Q4), Q3), Q2), Q1), -1.f));
        return fmaf(-a, q, fmaxf(x, 0.f));
    }
}

template <bool tanh> KITTENS_DEVICE float gelu_slope(float x) {
    if constexpr (tanh) {
        const float xx = fminf(x * x, FAR * FAR), w = fmaf(x * x, -LOG2E * TANH_2K * TANH_CUBE, -LOG2E * TANH_2K);
        const float s = reciprocal_fast(1.f + exp2_fast(x * w));
        const float z_slope = fmaf(xx, 3.f * TANH_2K * TANH_CUBE, TANH_2K); // of 2 z
        return fmaf(x, z_slope * fmaf(-s, s, s), s);
    } else {
        const float a = min_nan(fabsf(x), FAR);
        const float e = exp2_fast(fmaf(a, fmaf(a, E2, E1), -1.f));
        const float d = fmaf(a, fmaf(a, fmaf(a, fmaf(a, D4, D3), D2), D1), 1.f);
        return 0.5f + with_sign_of(fmaf(-e, d, 0.5f), x);
    }
}

} // namespace gemm

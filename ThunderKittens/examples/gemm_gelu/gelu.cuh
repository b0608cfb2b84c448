// gelu.cuh: GELU, x times the normal distribution's function, and the tanh form of it.
//
// exact   Q(a) = 1 - Phi(a) = exp(-a^2 / 2) P(1 / (1 + p a)) for a >= 0, P a polynomial of degree 5 without constant
//         term, minimax with weight 1 + a: Q and a Q are off by less than 1.4e-7. The form is Abramowitz and Stegun's
//         7.1.26, the coefficients are our own. No branch, two special functions.
// tanh    x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh z) / 2
// A NaN stays one. -infinity gives 0 in the exact form, where torch has NaN.
#pragma once

#include "kittens.cuh"

namespace gemm {

using namespace kittens;

constexpr float P_SCALE = 0.333f;
constexpr float P1 = 0.12404345f, P2 = 0.19890411f, P3 = -0.077036604f, P4 = 0.363179f, P5 = -0.10909002f;
constexpr float TANH_2K = 1.5957691216f, TANH_CUBE = 0.044715f; // 2 sqrt(2 / pi)
constexpr float FAR = 16.f;                                     // exp(-FAR^2 / 2) is 0 in float

template <bool tanh> KITTENS_DEVICE float gelu(float x) {
    if constexpr (tanh) {
        const float w = fmaf(x * x, -LOG2E * TANH_2K * TANH_CUBE, -LOG2E * TANH_2K);
        return x * reciprocal_fast(1.f + exp2_fast(x * w));
    } else {
        const float a = min_nan(fabsf(x), FAR), t = reciprocal_fast(fmaf(P_SCALE, a, 1.f));
        const float p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, P5, P4), P3), P2), P1);
        return fmaf(-a, exp2_fast(a * (a * (-0.5f * LOG2E))) * p, fmaxf(x, 0.f));
    }
}

} // namespace gemm

// gelu.cuh: GELU and its derivative, x times the normal distribution's function, and the tanh form of it.
//
// exact   Q(a) = 1 - Phi(a) = exp(-a^2 / 2) P(1 / (1 + p a)) for a >= 0, P a polynomial of degree 5 without constant
//         term, minimax with weight 1 + a: Q and a Q are off by less than 1.4e-7. The form is Abramowitz and Stegun's
//         7.1.26, the coefficients are our own. No branch, two special functions; the derivative shares them.
// tanh    x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh z) / 2
// An infinite x gives the limit, where torch has NaN (tanh: NaN too, in the derivative); a NaN stays one.
#pragma once

#include "kittens.cuh"

namespace gemm {

using namespace kittens;

constexpr float P_SCALE = 0.333f;
constexpr float P1 = 0.12404345f, P2 = 0.19890411f, P3 = -0.077036604f, P4 = 0.363179f, P5 = -0.10909002f;
constexpr float INV_SQRT_2PI = 0.3989422804f;
constexpr float TANH_2K = 1.5957691216f, TANH_CUBE = 0.044715f; // 2 sqrt(2 / pi)
constexpr float FAR = 16.f;                                    // exp(-FAR^2 / 2) is 0 in float

// exp(-a^2 / 2) and P(1 / (1 + p a)), a = |x| but at most FAR
struct tail {
    float a, bell, p;
    KITTENS_DEVICE explicit tail(float x) : a(min_nan(fabsf(x), FAR)) {
        const float t = reciprocal_fast(fmaf(P_SCALE, a, 1.f));
        bell = exp2_fast(a * (a * (-0.5f * LOG2E)));
        p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, P5, P4), P3), P2), P1);
    }
};

template <bool tanh> KITTENS_DEVICE float gelu(float x) {
    if constexpr (tanh) {
        const float w = fmaf(x * x, -LOG2E * TANH_2K * TANH_CUBE, -LOG2E * TANH_2K);
        return x * reciprocal_fast(1.f + exp2_fast(x * w));
    } else {
        const tail q(x);
        return fmaf(-q.a, q.bell * q.p, fmaxf(x, 0.f));
    }
}

// the derivative at x, and gelu(x) where the caller uses it
template <bool tanh> KITTENS_DEVICE float gelu_slope(float x, float& value) {
    if constexpr (tanh) {
        const float xx = x * x, w = fmaf(xx, -LOG2E * TANH_2K * TANH_CUBE, -LOG2E * TANH_2K);
        const float s = reciprocal_fast(1.f + exp2_fast(x * w));
        const float z_slope = fmaf(xx, 3.f * TANH_2K * TANH_CUBE, TANH_2K); // of 2 z
        value = x * s;
        return fmaf(x * z_slope, fmaf(-s, s, s), s);
    } else {
        const tail q(x);
        value = fmaf(-q.a, q.bell * q.p, fmaxf(x, 0.f));
        const float below = q.bell * fmaf(-INV_SQRT_2PI, q.a, q.p); // the slope at -a; at a it is 1 minus that
        return x < 0.f ? below : 1.f - below;
    }
}

} // namespace gemm

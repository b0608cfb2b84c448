// h100_bwd.cuh: what the front end calls; plain pointers and sizes, no CUDA types
#pragma once

#include <cstdint>

#include "h100_fwd.cuh"

namespace attn {

struct bwd_problem {
    fwd_tensor q, k, v, o, dout; // what the forward read and wrote, and the gradient of what it wrote
    fwd_tensor dq, dk, dv;       // written, every element
    const float* lse;            // (B, H, N), contiguous, from the forward
    float* stats;                // bwd_stats_floats() of scratch, 16-byte aligned; need not be initialised
    float* dq_sums = nullptr;    // bwd_sums_floats() of scratch: one pass; null: two, the same bits every time
    int B, H, N, D;
    float dropout = 0.f;           // the forward's probability
    const int64_t* seed = nullptr; // on the device, read when the kernels run; needed where dropout > 0
};

// two numbers a row, in blocks of 64 rows: its log sum of exponentials in base 2, and the row sum of dout o
constexpr int64_t bwd_stats_floats(int64_t B, int64_t H, int64_t N) { return B * H * ((N + 63) / 64) * 128; }

// what one pass adds dq up in; it exists without dropout
constexpr int64_t bwd_sums_floats(int64_t B, int64_t H, int64_t N, int64_t D) {
    return B * H * ((N + 63) / 64) * 64 * (D <= 64 ? 64 : 128);
}

} // namespace attn

// queued on `stream`; nullptr, or what went wrong. No synchronisation, no allocation; the same bits every time.
extern "C" const char* launch_causal_backward(const attn::bwd_problem* problem, void* stream);

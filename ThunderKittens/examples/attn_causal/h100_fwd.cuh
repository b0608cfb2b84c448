// h100_fwd.cuh: what the front end calls; plain pointers and sizes, no CUDA types
#pragma once

#include <cstdint>

namespace attn {

struct fwd_tensor { // (B, H, N, D) bf16; strides in elements, D contiguous
    void* data;
    int64_t batch_stride, head_stride, row_stride;
};

struct fwd_problem {
    fwd_tensor q, k, v, o;
    float* lse; // (B, H, N), contiguous, or null: only the backward needs it
    int B, H, N, D;
    float dropout = 0.f;           // probability that a score is dropped after the softmax
    const int64_t* seed = nullptr; // on the device, read when the kernel runs; needed where dropout > 0
};

} // namespace attn

// queued on `stream`; nullptr, or what went wrong. No synchronisation, no allocation.
extern "C" const char* launch_causal_forward(const attn::fwd_problem* problem, void* stream);

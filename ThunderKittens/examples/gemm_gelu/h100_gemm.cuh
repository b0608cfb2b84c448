// h100_gemm.cuh: what the front end calls; plain pointers and sizes, no CUDA types
#pragma once

#include <cstdint>

namespace gemm {

// pre = x w^T + bias, act = gelu(pre). All bf16, row by row without gaps, bases at multiples of 16 bytes, N and K
// multiples of 8.
struct linear_gelu_problem {
    const void *x, *w; // (M, K), (N, K)
    const void* bias;  // (N), or null
    void *pre, *act;   // (M, N)
    int M, N, K;
    bool tanh;
};

} // namespace gemm

// queued on `stream`; nullptr, or what went wrong. No synchronisation, no allocation.
extern "C" const char* launch_linear_gelu(const gemm::linear_gelu_problem* problem, void* stream);

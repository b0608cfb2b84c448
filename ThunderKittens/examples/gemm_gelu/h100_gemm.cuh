// h100_gemm.cuh: what the front end calls; plain pointers and sizes, no CUDA types
#pragma once

#include <cstdint>

namespace gemm {

// All matrices bf16, row by row without gaps, bases at multiples of 16 bytes, N and K multiples of 8.
struct fwd_problem { // pre = x w^T + bias, act = gelu(pre)
    const void *x, *w; // (M, K), (N, K)
    const void* bias;  // (N), or null
    void *pre, *act;   // (M, N)
    int M, N, K;
    bool tanh;
};
struct bwd_problem { // dpre = (dy w) gelu'(pre), act = gelu(pre)
    const void *dy, *w, *pre; // (M, K), (K, N), (M, N)
    void *dpre, *act;         // (M, N); act may be null
    int M, N, K;
    bool tanh;
};

} // namespace gemm

// queued on `stream`; nullptr, or what went wrong. No synchronisation, no allocation.
extern "C" const char* launch_linear_gelu_fwd(const gemm::fwd_problem* problem, void* stream);
extern "C" const char* launch_linear_gelu_bwd(const gemm::bwd_problem* problem, void* stream);

// A program for compute-sanitizer: the attention backward on small shapes, both ways, with and without dropout.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include "h100_bwd.cuh"

static bool run(int B, int H, int N, int D, float dropout, bool one_pass) {
    const size_t elements = static_cast<size_t>(B) * N * 3 * H * D;
    std::vector<uint16_t> host(elements);
    for (uint16_t& x : host) x = static_cast<uint16_t>(0x3c00 + rand() % 0x380 + (rand() & 1) * 0x8000);
    uint16_t *qkv, *dqkv, *out, *dout;
    float *lse, *stats, *sums = nullptr;
    int64_t* seed;
    cudaMalloc(&qkv, elements * 2);
    cudaMalloc(&dqkv, elements * 2);
    cudaMalloc(&out, elements / 3 * 2);
    cudaMalloc(&dout, elements / 3 * 2);
    cudaMalloc(&lse, sizeof(float) * B * H * N);
    cudaMalloc(&stats, sizeof(float) * attn::bwd_stats_floats(B, H, N));
    if (one_pass) cudaMalloc(&sums, sizeof(float) * attn::bwd_sums_floats(B, H, N, D));
    cudaMalloc(&seed, 8);
    cudaMemset(seed, 1, 8);
    cudaMemcpy(qkv, host.data(), elements * 2, cudaMemcpyHostToDevice);
    cudaMemcpy(dout, host.data(), elements / 3 * 2, cudaMemcpyHostToDevice);
    const int64_t row = 3 * H * D;
    const auto packed = [&](uint16_t* base, int which) {
        return attn::fwd_tensor{base + which * H * D, row * N, D, row};
    };
    const auto rows = [&](uint16_t* base) {
        return attn::fwd_tensor{base, static_cast<int64_t>(N) * H * D, D, static_cast<int64_t>(H) * D};
    };
    attn::fwd_problem x{};
    x.q = packed(qkv, 0);
    x.k = packed(qkv, 1);
    x.v = packed(qkv, 2);
    x.o = rows(out);
    x.lse = lse;
    x.B = B;
    x.H = H;
    x.N = N;
    x.D = D;
    x.dropout = dropout;
    x.seed = seed;
    attn::bwd_problem y{};
    y.q = x.q;
    y.k = x.k;
    y.v = x.v;
    y.o = x.o;
    y.dout = rows(dout);
    y.dq = packed(dqkv, 0);
    y.dk = packed(dqkv, 1);
    y.dv = packed(dqkv, 2);
    y.lse = lse;
    y.stats = stats;
    y.dq_sums = sums;
    y.B = B;
    y.H = H;
    y.N = N;
    y.D = D;
    y.dropout = dropout;
    y.seed = seed;
    const char* error = launch_causal_forward(&x, nullptr);
    if (!error) error = launch_causal_backward(&y, nullptr);
    const cudaError_t ran = cudaDeviceSynchronize();
    if (error || ran != cudaSuccess) printf("%d %d %d %d: %s\n", B, H, N, D, error ? error : cudaGetErrorString(ran));
    for (uint16_t* p : {qkv, dqkv, out, dout}) cudaFree(p);
    for (float* p : {lse, stats, sums}) cudaFree(p);
    cudaFree(seed);
    return !error && ran == cudaSuccess;
}

int main() {
    bool good = true;
    for (int D : {64, 128})
        for (int N : {1, 65, 200, 400})
            for (float dropout : {0.f, 0.2f}) good &= run(1, 2, N, D, dropout, false);
    for (int D : {64, 128})
        for (int N : {1, 65, 200, 400}) good &= run(1, 2, N, D, 0.f, true);
    for (bool one_pass : {false, true})
        for (int D : {64, 128}) good &= run(3, 60, 130, D, 0.f, one_pass); // more tiles than blocks
    return good ? 0 : 1;
}

// A program for compute-sanitizer: the attention forward on small shapes, with tails and a score that jumps.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include "h100_fwd.cuh"

static bool run(int B, int H, int N, int D) {
    const size_t elements = static_cast<size_t>(B) * N * 3 * H * D;
    std::vector<uint16_t> host(elements);
    for (uint16_t& x : host) x = static_cast<uint16_t>(0x3c00 + rand() % 0x380 + (rand() & 1) * 0x8000);
    for (int i = 0; i < D; i++) host[static_cast<size_t>(H) * D + i] = 0x4700; // the first key is 32768 everywhere
    uint16_t *qkv, *out;
    float* lse;
    cudaMalloc(&qkv, elements * 2);
    cudaMalloc(&out, elements / 3 * 2);
    cudaMalloc(&lse, sizeof(float) * B * H * N);
    cudaMemcpy(qkv, host.data(), elements * 2, cudaMemcpyHostToDevice);
    const int64_t row = 3 * H * D;
    attn::fwd_problem x{};
    x.q = {qkv, row * N, D, row};
    x.k = {qkv + H * D, row * N, D, row};
    x.v = {qkv + 2 * H * D, row * N, D, row};
    x.o = {out, static_cast<int64_t>(N) * H * D, D, H * D};
    x.lse = lse;
    x.B = B;
    x.H = H;
    x.N = N;
    x.D = D;
    const char* error = launch_causal_forward(&x, nullptr);
    const cudaError_t ran = cudaDeviceSynchronize();
    if (error || ran != cudaSuccess) printf("%d %d %d %d: %s\n", B, H, N, D, error ? error : cudaGetErrorString(ran));
    cudaFree(qkv);
    cudaFree(out);
    cudaFree(lse);
    return !error && ran == cudaSuccess;
}

int main() {
    bool good = true;
    for (int D : {64, 128})
        for (int N : {1, 65, 200, 400}) good &= run(1, 2, N, D);
    good &= run(3, 60, 130, 64); // more tiles than blocks
    return good ? 0 : 1;
}

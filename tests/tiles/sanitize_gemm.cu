// A program for compute-sanitizer: the linear layer with GELU on small shapes, with tails, in both forms.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include "h100_gemm.cuh"

static uint16_t* random_bf16(size_t elements) {
    std::vector<uint16_t> host(elements);
    for (uint16_t& x : host) x = static_cast<uint16_t>(0x3c00 + rand() % 0x380 + (rand() & 1) * 0x8000);
    uint16_t* device;
    cudaMalloc(&device, elements * 2);
    cudaMemcpy(device, host.data(), elements * 2, cudaMemcpyHostToDevice);
    return device;
}

static bool run(int M, int N, int K, bool tanh) {
    const size_t out = static_cast<size_t>(M) * N;
    uint16_t *x = random_bf16(static_cast<size_t>(M) * K), *w = random_bf16(static_cast<size_t>(N) * K);
    uint16_t *bias = random_bf16(N), *pre, *act;
    cudaMalloc(&pre, out * 2);
    cudaMalloc(&act, out * 2);
    const gemm::linear_gelu_problem problem{x, w, tanh ? bias : nullptr, pre, act, M, N, K, tanh};
    const char* error = launch_linear_gelu(&problem, nullptr);
    const cudaError_t ran = cudaDeviceSynchronize();
    if (error || ran != cudaSuccess) printf("%d %d %d: %s\n", M, N, K, error ? error : cudaGetErrorString(ran));
    for (uint16_t* p : {x, w, bias, pre, act}) cudaFree(p);
    return !error && ran == cudaSuccess;
}

int main() {
    bool good = true;
    for (bool tanh : {false, true})
        for (int M : {1, 65, 300}) good &= run(M, 200, 72, tanh);
    good &= run(5000, 1000, 136, false); // more tiles than blocks
    return good ? 0 : 1;
}

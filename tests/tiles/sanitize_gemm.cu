// A program for compute-sanitizer: the linear layer with GELU on small shapes, with tails, both forms and directions.
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
    uint16_t *bias = random_bf16(N), *pre = random_bf16(out), *act, *dpre;
    cudaMalloc(&act, out * 2);
    cudaMalloc(&dpre, out * 2);
    const gemm::fwd_problem forward{x, w, tanh ? bias : nullptr, pre, act, M, N, K, tanh};
    const char* error = launch_linear_gelu_fwd(&forward, nullptr);
    for (uint16_t* again : {act, static_cast<uint16_t*>(nullptr)}) {
        const gemm::bwd_problem backward{x, w, pre, dpre, again, M, N, K, tanh};
        if (!error) error = launch_linear_gelu_bwd(&backward, nullptr);
    }
    const cudaError_t ran = cudaDeviceSynchronize();
    if (error || ran != cudaSuccess) printf("%d %d %d: %s\n", M, N, K, error ? error : cudaGetErrorString(ran));
    for (uint16_t* p : {x, w, bias, pre, act, dpre}) cudaFree(p);
    return !error && ran == cudaSuccess;
}

int main() {
    bool good = true;
    for (bool tanh : {false, true})
        for (int M : {1, 65, 300}) good &= run(M, 200, 72, tanh);
    good &= run(5000, 1000, 136, false); // more tiles than blocks
    return good ? 0 : 1;
}

// What the tile tests share: tensor maps for plain row-major matrices, and a launch that says what went wrong.
#pragma once

#include <cstdint>

#include "kittens.cuh"

using namespace kittens;

// (batch, rows, cols) row by row
inline CUtensorMap plain_map(void* data, int rows, int cols, int box_rows, int box_cols, int element_bytes = 2,
                             int batch = 1) {
    gl layout{data, batch, 1, rows, cols, static_cast<int64_t>(rows) * cols, static_cast<int64_t>(rows) * cols, cols,
              element_bytes};
    CUtensorMap map;
    if (make_tensor_map(&map, layout, box_rows, box_cols) != CUDA_SUCCESS) map = CUtensorMap{};
    return map;
}

template <class Kernel, class... Args> int launch(Kernel kernel, int blocks, int threads, int smem, Args... args) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    kernel<<<blocks, threads, smem>>>(args...);
    const cudaError_t queued = cudaGetLastError(), ran = cudaDeviceSynchronize();
    return queued != cudaSuccess ? queued : ran;
}

// the block's shared memory as a struct of tiles
template <class T> KITTENS_DEVICE T& shared_as() {
    extern __shared__ __align__(1024) unsigned char raw[];
    return *reinterpret_cast<T*>(raw);
}

// Fragments of a plain float matrix of 64 rows and C columns, by the layout that types/register.cuh documents
template <int C> KITTENS_DEVICE int fragment_at(int i) {
    const int row = threadIdx.x / 32 * 16 + row_of(i / 2 % 2), col = 8 * (i / 4) + col_of() + i % 2;
    return row * C + col;
}
template <int C> KITTENS_DEVICE void read_fragment(rt_fl<C>& x, const float* in) {
#pragma unroll
    for (int i = 0; i < C / 2; i++) x.data[i] = in[fragment_at<C>(i)];
}
template <int C> KITTENS_DEVICE void write_fragment(float* out, const rt_fl<C>& x) {
#pragma unroll
    for (int i = 0; i < C / 2; i++) out[fragment_at<C>(i)] = x.data[i];
}

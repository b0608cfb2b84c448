// Global layouts: a pointer, extents and strides, and the tensor map through which TMA sees them. Host code.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace kittens {

// A tensor of rank 4, outermost first: (batch, head, row, column). Strides in elements; columns are contiguous.
// Any order in memory: a view of a packed (B, T, 3, H, D) is one of these.
struct gl {
    void* data;
    int64_t batch, heads, rows, cols;
    int64_t batch_stride, head_stride, row_stride;
    int64_t element_bytes = 2;
};

// cuTensorMapEncodeTiled through the runtime, so that nothing links libcuda; null where the driver lacks it
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
        void* f = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) !=
                cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            f = nullptr;
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
    }();
    return encode;
}

// Gives this thread its device's context, which the driver asks for: autograd's threads come here without one.
// cudaSetDevice may also be called while a stream is captured.
inline bool has_context() {
    static thread_local const bool set = [] {
        int device;
        return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
    }();
    return set;
}

// The map of `t` with coordinates (column, row, head, batch), for boxes of `box_rows` rows and `box_cols` columns.
// bf16 with box_cols = 64 takes the 128-byte swizzle of st_bf; float is laid out row by row, unswizzled.
// Base and strides must be multiples of 16 bytes. CUDA_SUCCESS, or what the driver says.
inline CUresult make_tensor_map(CUtensorMap* map, const gl& t, int box_rows, int box_cols) {
    const auto encode = tensor_map_encoder();
    if (encode == nullptr || !has_context()) return CUDA_ERROR_NOT_SUPPORTED;
    const bool is_bf16 = t.element_bytes == 2;
    // an axis of extent 1 is never stepped along: its stride may be anything, so give one that the driver accepts
    const auto stride = [&](int64_t s, int64_t extent) {
        return static_cast<cuuint64_t>(extent == 1 ? 16 : s * t.element_bytes);
    };
    const cuuint64_t extents[4] = {static_cast<cuuint64_t>(t.cols), static_cast<cuuint64_t>(t.rows),
                                   static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
    const cuuint64_t strides[3] = {stride(t.row_stride, t.rows), stride(t.head_stride, t.heads),
                                   stride(t.batch_stride, t.batch)};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    return encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, t.data, extents,
                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  is_bf16 && box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

} // namespace kittens

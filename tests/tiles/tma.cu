// arch/tma.cuh: tails read as zeros and are not written, coordinates may be negative, adding adds.
#include "harness.cuh"

constexpr int R = 64, C = 64;
struct smem_plan {
    st_bf<R, C> tile;
    alignas(1024) float floats[R * C];
    semaphore arrived;
};

// box at row `from` of a matrix of `rows` rows -> the box at row `to` of another
__global__ void copy_box(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int from,
                         int to) {
    smem_plan& s = shared_as<smem_plan>();
    for (int i = threadIdx.x; i < R * C; i += blockDim.x) s.tile.data[i] = __float2bfloat16(777.f); // to be overwritten
    if (threadIdx.x == 0) { init(s.arrived, 1); fence_init(); }
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        expect(s.arrived, sizeof(s.tile));
        tma::load(s.tile.address(), in, s.arrived, 0, from, 0, 0, tma::KEEP);
        wait(s.arrived, 0);
        tma::store(out, s.tile.address(), 0, to, 0, 0);
        tma::commit();
        tma::wait_written<0>();
    }
}

// out[R][C] += in[R][C]
__global__ void add(const float* in, float* out) {
    smem_plan& s = shared_as<smem_plan>();
    for (int i = threadIdx.x; i < R * C; i += blockDim.x) s.floats[i] = in[i];
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma::reduce_add_floats(out, smem_address(s.floats), R * C * 4);
        tma::commit();
        tma::wait_read<0>();
        tma::wait_written<0>();
    }
}

extern "C" int test_copy_box(void* in, int in_rows, void* out, int out_rows, int from, int to) {
    return launch(copy_box, 1, 128, sizeof(smem_plan), plain_map(in, in_rows, C, R, 64),
                  plain_map(out, out_rows, C, R, 64), from, to);
}
extern "C" int test_add(void* in, void* out) {
    return launch(add, 1, 128, sizeof(smem_plan), static_cast<const float*>(in), static_cast<float*>(out));
}

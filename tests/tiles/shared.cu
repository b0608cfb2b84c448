// types/shared.cuh and types/global.cuh: where TMA puts an element is where st_bf says it is, both ways.
#include "harness.cuh"

constexpr int R = 64, C = 128;
struct smem_plan {
    st_bf<R, C> tile;
    semaphore arrived;
};

// in -> TMA -> tile -> generic reads through address() -> out
__global__ void read_swizzled(const __grid_constant__ CUtensorMap map, bf16* out) {
    smem_plan& s = shared_as<smem_plan>();
    if (threadIdx.x == 0) { init(s.arrived, 1); fence_init(); }
    __syncthreads();
    if (threadIdx.x == 0) {
        expect(s.arrived, sizeof(s.tile));
        for (int c = 0; c < C; c += 64)
            tma::load(s.tile.address() + c / 64 * s.tile.panel_bytes, map, s.arrived, c, 0, 0, 0);
    }
    wait(s.arrived, 0);
    for (int i = threadIdx.x; i < R * C; i += blockDim.x) {
        const int row = i / C, col = i % C;
        uint16_t x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(s.tile.address(row, col / 8) + col % 8 * 2));
        reinterpret_cast<uint16_t*>(out)[i] = x;
    }
}

// in -> generic writes through address() -> tile -> TMA -> out
__global__ void write_swizzled(const bf16* in, const __grid_constant__ CUtensorMap map) {
    smem_plan& s = shared_as<smem_plan>();
    for (int i = threadIdx.x; i < R * C; i += blockDim.x) {
        const int row = i / C, col = i % C;
        const uint16_t x = reinterpret_cast<const uint16_t*>(in)[i];
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(s.tile.address(row, col / 8) + col % 8 * 2), "h"(x) : "memory");
    }
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int c = 0; c < C; c += 64) tma::store(map, s.tile.address() + c / 64 * s.tile.panel_bytes, c, 0, 0, 0);
        tma::commit();
        tma::wait_written<0>();
    }
}

extern "C" int test_read_swizzled(void* in, void* out) {
    return launch(read_swizzled, 1, 128, sizeof(smem_plan), plain_map(in, R, C, R, 64), static_cast<bf16*>(out));
}
extern "C" int test_write_swizzled(void* in, void* out) {
    return launch(write_swizzled, 1, 128, sizeof(smem_plan), static_cast<const bf16*>(in), plain_map(out, R, C, R, 64));
}

// ops/warp.cuh, arch/matrix.cuh: fragments to shared memory and back, maps, reductions, the masks.
#include "harness.cuh"

constexpr int C = 128;
struct smem_plan {
    st_bf<64, C> a, b;
    semaphore arrived;
};

// in (64, C) -> fragments -> stmatrix -> TMA -> out; and back by ldmatrix, bits compared
__global__ void round_trip(const float* in, const __grid_constant__ CUtensorMap out, int* differing) {
    smem_plan& s = shared_as<smem_plan>();
    const int warp_row = threadIdx.x / 32 * 16;
    rt_fl<C> x;
    rt_bf<C> y, z;
    read_fragment(x, in);
    warp::copy(y, x);
    warp::store(s.a, warp_row, y);
    __syncwarp();
    warp::load(z, s.a, warp_row);
    for (int k = 0; k < C / 16; k++)
        for (int i = 0; i < 4; i++)
            if (y.data[k][i] != z.data[k][i]) atomicAdd(differing, 1);
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int c = 0; c < C; c += 64) tma::store(out, s.a.address() + c / 64 * s.a.panel_bytes, c, 0, 0, 0);
        tma::commit();
        tma::wait_written<0>();
    }
}

// rows (64): max; above (64, C): what lies above the diagonal hidden, then each row times its number; below (64, C):
// what lies below it hidden
__global__ void maps(const float* in, float* rows, float* above, float* below, int first_row) {
    rt_fl<C> x, y;
    rv_fl top;
    read_fragment(x, in);
    y = x;
    warp::row_max(top, x);
    warp::hide_above_diagonal(x, first_row + static_cast<int>(threadIdx.x) / 32 * 16, -5.f);
    warp::hide_below_diagonal(y, first_row + static_cast<int>(threadIdx.x) / 32 * 16, -7.f);
    write_fragment(below, y);
    rv_fl number;
    for (int h = 0; h < 2; h++) {
        const int row = threadIdx.x / 32 * 16 + row_of(h);
        number.data[h] = row;
        rows[row] = top.data[h];
    }
    warp::mul_row(x, number);
    write_fragment(above, x);
}

// out (64, 64) = a b^T by mma.sync, a and b (64, C)
__global__ void products(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* out) {
    smem_plan& s = shared_as<smem_plan>();
    if (threadIdx.x == 0) {
        init(s.arrived, 1);
        fence_init();
        expect(s.arrived, 2 * sizeof(s.a));
        for (int c = 0; c < C; c += 64) {
            tma::load(s.a.address() + c / 64 * s.a.panel_bytes, a, s.arrived, c, 0, 0, 0);
            tma::load(s.b.address() + c / 64 * s.b.panel_bytes, b, s.arrived, c, 0, 0, 0);
        }
    }
    __syncthreads();
    wait(s.arrived, 0);
    rt_fl<64> d;
    warp::mma_ABt(d, s.a, threadIdx.x / 32 * 16, s.b);
    write_fragment(out, d);
}

extern "C" int test_round_trip(void* in, void* out, void* differing) {
    return launch(round_trip, 1, 128, sizeof(smem_plan), static_cast<const float*>(in), plain_map(out, 64, C, 64, 64),
                  static_cast<int*>(differing));
}
extern "C" int test_maps(void* in, void* rows, void* above, void* below, int first_row) {
    return launch(maps, 1, 128, 0, static_cast<const float*>(in), static_cast<float*>(rows),
                  static_cast<float*>(above), static_cast<float*>(below), first_row);
}
extern "C" int test_products(void* a, void* b, void* out) {
    return launch(products, 1, 128, sizeof(smem_plan), plain_map(a, 64, C, 64, 64), plain_map(b, 64, C, 64, 64),
                  static_cast<float*>(out));
}

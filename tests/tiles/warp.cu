// ops/warp.cuh, arch/matrix.cuh, arch/scalar.cuh: fragments to shared memory and back, maps, reductions, the mask.
#include "harness.cuh"

constexpr int C = 128;
struct smem_plan {
    st_bf<64, C> a, b;
    semaphore arrived;
};

// Fragment of row r, column c of a plain float matrix, by the layout that types/register.cuh documents
KITTENS_DEVICE void read_fragment(rt_fl<C>& x, const float* in) {
    for (int i = 0; i < C / 2; i++) {
        const int row = threadIdx.x / 32 * 16 + row_of(i / 2 % 2), col = 8 * (i / 4) + col_of() + i % 2;
        x.data[i] = in[row * C + col];
    }
}
KITTENS_DEVICE void write_fragment(float* out, const rt_fl<C>& x) {
    for (int i = 0; i < C / 2; i++) {
        const int row = threadIdx.x / 32 * 16 + row_of(i / 2 % 2), col = 8 * (i / 4) + col_of() + i % 2;
        out[row * C + col] = x.data[i];
    }
}

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

// rows (64): max; masked (64, C): the future hidden, then each row times its number
__global__ void maps(const float* in, float* rows, float* masked, int first_row) {
    rt_fl<C> x;
    rv_fl top;
    read_fragment(x, in);
    warp::row_max(top, x);
    warp::hide_above_diagonal(x, first_row + static_cast<int>(threadIdx.x) / 32 * 16, -5.f);
    rv_fl number;
    for (int h = 0; h < 2; h++) {
        const int row = threadIdx.x / 32 * 16 + row_of(h);
        number.data[h] = row;
        rows[row] = top.data[h];
    }
    warp::mul_row(x, number);
    write_fragment(masked, x);
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
    for (int i = 0; i < 32; i++) {
        const int row = threadIdx.x / 32 * 16 + row_of(i / 2 % 2), col = 8 * (i / 4) + col_of() + i % 2;
        out[row * 64 + col] = d.data[i];
    }
}

__global__ void scalars(const float* in, float* exp2, float* log2, float* halves) {
    const int i = threadIdx.x;
    exp2[i] = exp2_fast(in[i]);
    log2[i] = log2_fast(fabsf(in[i]) + 0.5f);
    const uint32_t pair = pack_bf16(in[i], -in[i] * 3.f);
    halves[2 * i] = low_bf16(pair);
    halves[2 * i + 1] = high_bf16(pair);
}

extern "C" int test_round_trip(void* in, void* out, void* differing) {
    return launch(round_trip, 1, 128, sizeof(smem_plan), static_cast<const float*>(in), plain_map(out, 64, C, 64, 64),
                  static_cast<int*>(differing));
}
extern "C" int test_maps(void* in, void* rows, void* masked, int first_row) {
    return launch(maps, 1, 128, 0, static_cast<const float*>(in), static_cast<float*>(rows),
                  static_cast<float*>(masked), first_row);
}
extern "C" int test_products(void* a, void* b, void* out) {
    return launch(products, 1, 128, sizeof(smem_plan), plain_map(a, 64, C, 64, 64), plain_map(b, 64, C, 64, 64),
                  static_cast<float*>(out));
}
extern "C" int test_scalars(void* in, void* exp2, void* log2, void* halves, int n) {
    return launch(scalars, 1, n, 0, static_cast<const float*>(in), static_cast<float*>(exp2), static_cast<float*>(log2),
                  static_cast<float*>(halves));
}

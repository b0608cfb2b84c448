// ops/warpgroup.cuh and arch/wgmma.cuh: every form of the product, by one warpgroup.
#include "harness.cuh"

// A is 64 x K, as it lies (0), transposed (1: then B is too) or from registers (2); B is N x K as it lies or K x N.
enum { AS_IT_LIES, TRANSPOSED, REGISTERS };

template <int N, int K, int a_form, int b_form> struct smem_plan {
    st_bf<a_form == TRANSPOSED ? K : 64, a_form == TRANSPOSED ? 64 : K> a;
    st_bf<b_form == TRANSPOSED ? K : N, b_form == TRANSPOSED ? N : K> b;
    semaphore arrived;
};

template <class Tile>
KITTENS_DEVICE void load_panels(const Tile& t, const CUtensorMap& map, semaphore& arrived, int row = 0) {
    for (int c = 0; c < Tile::cols; c += 64)
        tma::load(t.address() + c / 64 * Tile::panel_bytes, map, arrived, c, row, 0, 0);
}

// out = 2 A B: overwritten by the first product, added to by the second
template <int N, int K, int a_form, int b_form>
__global__ void __launch_bounds__(128)
    product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* out) {
    auto& s = shared_as<smem_plan<N, K, a_form, b_form>>();
    if (threadIdx.x == 0) {
        init(s.arrived, 1);
        fence_init();
        expect(s.arrived, sizeof(s.a) + sizeof(s.b));
        load_panels(s.a, a, s.arrived);
        load_panels(s.b, b, s.arrived);
    }
    __syncthreads();
    wait(s.arrived, 0);
    rt_fl<N> d;
    rt_bf<K> a_reg;
    if constexpr (a_form == REGISTERS) warp::load(a_reg, s.a, threadIdx.x / 32 * 16);
    for (float& x : d.data) x = 1e9f; // must be overwritten
    warpgroup::pin(d);
    wgmma::fence();
#pragma unroll
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        if constexpr (a_form == REGISTERS && b_form == AS_IT_LIES) warpgroup::mma_ABt(d, a_reg, s.b, accumulate);
        if constexpr (a_form == REGISTERS && b_form == TRANSPOSED) warpgroup::mma_AB(d, a_reg, s.b, accumulate);
        if constexpr (a_form == AS_IT_LIES && b_form == AS_IT_LIES) warpgroup::mma_ABt(d, s.a, s.b, accumulate);
        if constexpr (a_form == AS_IT_LIES && b_form == TRANSPOSED) warpgroup::mma_AB(d, s.a, s.b, accumulate);
        if constexpr (a_form == TRANSPOSED && b_form == TRANSPOSED) warpgroup::mma_AtB(d, s.a, s.b, accumulate);
    }
    wgmma::commit();
    wgmma::wait<0>();
    warpgroup::pin(d);
    write_fragment(out, d);
}

template <int N, int K, int a_form, int b_form> int run(void* a, void* b, float* out) {
    using plan = smem_plan<N, K, a_form, b_form>;
    using A = decltype(plan::a);
    using B = decltype(plan::b);
    return launch(product<N, K, a_form, b_form>, 1, 128, sizeof(plan), plain_map(a, A::rows, A::cols, A::rows, 64),
                  plain_map(b, B::rows, B::cols, B::rows, 64), out);
}
template <int N, int K> int run_form(int a_form, int b_form, void* a, void* b, float* out) {
    switch (2 * a_form + b_form) {
        case 0: return run<N, K, AS_IT_LIES, AS_IT_LIES>(a, b, out);
        case 1: return run<N, K, AS_IT_LIES, TRANSPOSED>(a, b, out);
        case 3: return run<N, K, TRANSPOSED, TRANSPOSED>(a, b, out);
        case 4: return run<N, K, REGISTERS, AS_IT_LIES>(a, b, out);
        default: return run<N, K, REGISTERS, TRANSPOSED>(a, b, out);
    }
}

// Windows onto bigger tiles: rows 64.. of a (128, 64) as A, columns 64.. of b (64, 128) as B. out (64, 64)
struct window_plan {
    st_bf<128, 64> a;
    st_bf<64, 128> b;
    semaphore arrived;
};
__global__ void __launch_bounds__(128)
    windows(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* out) {
    window_plan& s = shared_as<window_plan>();
    if (threadIdx.x == 0) {
        init(s.arrived, 1);
        fence_init();
        expect(s.arrived, sizeof(s.a) + sizeof(s.b));
        load_panels(s.a, a, s.arrived);
        load_panels(s.b, b, s.arrived);
    }
    __syncthreads();
    wait(s.arrived, 0);
    rt_fl<64> d;
    wgmma::fence();
    warpgroup::mma_AB(d, s.a.row_window<64>(64), s.b.col_window<64>(64), 0);
    wgmma::commit();
    wgmma::wait<0>();
    warpgroup::pin(d);
    write_fragment(out, d);
}

// The forward's p v: 8 columns more than v has, from the panel beside it. D = 128 has that panel in v's tile, the third
// one; D = 64 has 16 rows of it further on, for every 16 rows of v again. out (64, D + 8) = p v[0] + p v[1]
template <int D> struct beside_plan {
    st_bf<64, 128> p;
    st_bf<128, D == 64 ? 64 : 192> v[2];
    st_bf<16, 64> beside; // D = 64
    semaphore arrived;
};
template <int D>
__global__ void __launch_bounds__(128)
    product_beside(const __grid_constant__ CUtensorMap p, const __grid_constant__ CUtensorMap v,
                   const __grid_constant__ CUtensorMap beside, float* out) {
    auto& s = shared_as<beside_plan<D>>();
    if (threadIdx.x == 0) {
        init(s.arrived, 1);
        fence_init();
        expect(s.arrived, sizeof(s.p) + sizeof(s.v) + sizeof(s.beside));
        load_panels(s.p, p, s.arrived);
        load_panels(s.v[0], v, s.arrived, 0);
        load_panels(s.v[1], v, s.arrived, 128);
        load_panels(s.beside, beside, s.arrived);
    }
    __syncthreads();
    wait(s.arrived, 0);
    rt_bf<128> p_reg;
    warp::load(p_reg, s.p, threadIdx.x / 32 * 16);
    rt_fl<D + 8> o;
    for (float& x : o.data) x = 1e9f; // must be overwritten
    warpgroup::pin(o);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const auto& tile = s.v[step];
        const uint32_t to_next_panel = D == 64 ? s.beside.address() - tile.address() : tile.panel_bytes;
        const uint64_t first = wgmma::descriptor(tile.address(), to_next_panel);
#pragma unroll
        for (int k = 0; k < 8; k++)
            wgmma::rs<1>(o.data, p_reg.data[k], wgmma::advance(first, k * 2048, D == 64 ? -k * 2048 : 0), step + k > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    warpgroup::pin(o);
    write_fragment(out, o);
}

extern "C" int test_product(int N, int K, int a_form, int b_form, void* a, void* b, void* out) {
    const auto d = static_cast<float*>(out);
    if (N == 64 && K == 64) return run_form<64, 64>(a_form, b_form, a, b, d);
    if (N == 64 && K == 128) return run_form<64, 128>(a_form, b_form, a, b, d);
    if (N == 128 && K == 64) return run_form<128, 64>(a_form, b_form, a, b, d);
    if (N == 128 && K == 128) return run_form<128, 128>(a_form, b_form, a, b, d);
    if (N == 192 && K == 64) return run_form<192, 64>(a_form, b_form, a, b, d);
    return -1;
}
extern "C" int test_windows(void* a, void* b, void* out) {
    return launch(windows, 1, 128, sizeof(window_plan), plain_map(a, 128, 64, 128, 64), plain_map(b, 64, 128, 64, 64),
                  static_cast<float*>(out));
}
extern "C" int test_beside(int D, void* p, void* v, void* beside, void* out) {
    const auto run = [&](auto kernel, int bytes, int v_cols) {
        return launch(kernel, 1, 128, bytes, plain_map(p, 64, 128, 64, 64), plain_map(v, 256, v_cols, 128, 64),
                      plain_map(beside, 16, 64, 16, 64), static_cast<float*>(out));
    };
    return D == 64 ? run(product_beside<64>, sizeof(beside_plan<64>), 64)
                   : run(product_beside<128>, sizeof(beside_plan<128>), 192);
}

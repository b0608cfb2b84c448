// arch/scalar.cuh, and what arch/matrix.cuh has for one thread: arithmetic, and loads and stores under a condition.
#include "harness.cuh"

__global__ void scalars(const float* in, float* exp2, float* log2, float* halves) {
    const int i = threadIdx.x;
    exp2[i] = exp2_fast(in[i]);
    log2[i] = log2_fast(fabsf(in[i]) + 0.5f);
    const uint32_t pair = pack_bf16(in[i], -in[i] * 3.f);
    halves[2 * i] = low_bf16(pair);
    halves[2 * i + 1] = high_bf16(pair);
}

__global__ void reciprocals(const float* in, float* out) { out[threadIdx.x] = reciprocal_fast(in[threadIdx.x]); }

__global__ void of_two(const float* a, const float* b, float* smaller, float* with_sign) {
    const int i = threadIdx.x;
    smaller[i] = min_nan(a[i], b[i]);
    with_sign[i] = with_sign_of(a[i], b[i]);
}

// Thread t of 128 has 16 bytes, (t, -t, 5 t, 9), loads others over them from in[t] unless t is a multiple of 3, and
// stores what it has then to out[t] if t is even.
__global__ void once(const uint4* in, uint4* out) {
    const uint32_t t = threadIdx.x;
    uint4 x = {t, 0 - t, 5 * t, 9};
    load_once_if(t % 3 != 0, x, in + t);
    store_once_if(t % 2 == 0, out + t, x);
}

// in (128, 4) to shared memory; from there backwards, by 8 bytes (the last 128 of 256) and by 16. Then thread t of 128
// stores (t, t + 0.5, -t, 7) over its 16 bytes if t is even, and all go to `after`. `never` is 0: no store goes there.
__global__ void shared_pieces(const float4* in, float2* pairs, uint4* pieces, float4* after, int* harmed,
                              uint32_t never) {
    __shared__ float4 box[128];
    const int t = threadIdx.x;
    box[t] = in[t];
    __syncthreads();
    const uint32_t first = smem_address(box);
    pairs[t] = load_pair(first + 8 * (255 - t));
    pieces[t] = load_piece(first + 16 * (127 - t));
    const uint4 before = load_piece(never);
    __syncthreads();
    store_if(t % 2 == 0 ? first + 16 * t : never, t, t + 0.5f, -t, 7.f);
    warpgroup::hold(rt_fl<8>{1.f, 2.f, 3.f, 4.f}, never);
    __syncthreads();
    const uint4 now = load_piece(never);
    if (before.x != now.x || before.y != now.y || before.z != now.z || before.w != now.w) atomicAdd(harmed, 1);
    after[t] = box[t];
}

extern "C" int test_scalars(void* in, void* exp2, void* log2, void* halves, int n) {
    return launch(scalars, 1, n, 0, static_cast<const float*>(in), static_cast<float*>(exp2), static_cast<float*>(log2),
                  static_cast<float*>(halves));
}
extern "C" int test_reciprocals(void* in, void* out, int n) {
    return launch(reciprocals, 1, n, 0, static_cast<const float*>(in), static_cast<float*>(out));
}
extern "C" int test_of_two(void* a, void* b, void* smaller, void* with_sign, int n) {
    return launch(of_two, 1, n, 0, static_cast<const float*>(a), static_cast<const float*>(b),
                  static_cast<float*>(smaller), static_cast<float*>(with_sign));
}
extern "C" int test_once(void* in, void* out) {
    return launch(once, 1, 128, 0, static_cast<const uint4*>(in), static_cast<uint4*>(out));
}
extern "C" int test_shared_pieces(void* in, void* pairs, void* pieces, void* after, void* harmed) {
    return launch(shared_pieces, 1, 128, 0, static_cast<const float4*>(in), static_cast<float2*>(pairs),
                  static_cast<uint4*>(pieces), static_cast<float4*>(after), static_cast<int*>(harmed), 0u);
}

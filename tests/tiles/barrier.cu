// arch/barrier.cuh: a ring of slots stays in order over many rounds, registers move between warpgroups, and a kernel
// begins before the one that it depends on has ended.
#include "harness.cuh"

template <int stages> struct smem_plan {
    int slot[stages];
    semaphore full[stages], empty[stages];
};

// One producer thread passes `items` numbers through `stages` slots to a warpgroup that adds them up, both with pauses.
template <int stages> __global__ void __launch_bounds__(256, 1) pass_on(int items, long long* sum) {
    smem_plan<stages>& s = shared_as<smem_plan<stages>>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) { init(s.full[i], 1); init(s.empty[i], 4); }
        fence_init();
    }
    __syncthreads();
    ring<stages> at;
    if (warpgroup_id() == 1) {
        decrease_registers<24>();
        if (threadIdx.x == 128)
            for (int i = 0; i < items; i++, at.advance()) {
                wait(s.empty[at.slot], at.parity ^ 1);
                s.slot[at.slot] = i * i;
                if (i % 7 == 3) __nanosleep(500);
                arrive(s.full[at.slot]);
            }
    } else {
        increase_registers<128>();
        long long mine = 0;
        for (int i = 0; i < items; i++, at.advance()) {
            wait(s.full[at.slot], at.parity);
            mine += s.slot[at.slot] * (i % 3 + 1); // the weight tells a number in the wrong place
            if (at.previous().slot == at.slot && stages > 1) mine = -1;
            if (i % 11 == threadIdx.x / 32) __nanosleep(300);
            __syncwarp();
            if (elected_lane()) arrive(s.empty[at.slot]);
        }
        sum[threadIdx.x] = mine;
    }
}

// Named barriers: warpgroup 1 only arrives, warpgroup 0 waits for what it wrote.
__global__ void hand_over(int* out) {
    __shared__ int box[128];
    if (warpgroup_id() == 1) {
        __nanosleep(2000);
        box[threadIdx.x - 128] = 3 * static_cast<int>(threadIdx.x);
        arrive(1, 256);
    } else {
        sync(1, 256);
        out[threadIdx.x] = box[127 - threadIdx.x];
    }
}

// The first of two kernels lets the second begin, waits until it has, a second at most, and only then writes.
__global__ void write_late(volatile int* second_began, int* met, int* numbers) {
    let_dependents_launch();
    if (threadIdx.x == 0) {
        const long long start = clock64();
        while (!*second_began && clock64() - start < 2'000'000'000) __nanosleep(1000);
        met[blockIdx.x] = *second_began;
    }
    __syncthreads();
    __nanosleep(200000); // time for the second to read what is not there yet
    const int i = blockIdx.x * 128 + threadIdx.x;
    numbers[i] = 3 * i;
}
// The second reads backwards: what another block of the first has written.
__global__ void read_after(volatile int* began, const int* numbers, int* out) {
    *began = 1;
    wait_for_previous_kernel();
    const int i = blockIdx.x * 128 + threadIdx.x;
    out[i] = numbers[gridDim.x * 128 - 1 - i];
}

extern "C" int test_dependents(void* began_, void* met, void* numbers_, void* out) {
    int *const began = static_cast<int*>(began_), *const numbers = static_cast<int*>(numbers_);
    cudaFuncAttributes loaded; // a kernel that is loaded only when it is launched may wait for the one that runs
    cudaStream_t stream;
    cudaError_t said = cudaFuncGetAttributes(&loaded, read_after);
    if (said == cudaSuccess) said = cudaFuncGetAttributes(&loaded, write_late);
    if (said == cudaSuccess) said = cudaStreamCreate(&stream);
    if (said != cudaSuccess) return said;
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(4);
    config.blockDim = dim3(128);
    config.stream = stream;
    said = cudaLaunchKernelEx(&config, write_late, began, static_cast<int*>(met), numbers);
    config.attrs = &overlap;
    config.numAttrs = 1;
    if (said == cudaSuccess) said = cudaLaunchKernelEx(&config, read_after, began, numbers, static_cast<int*>(out));
    const cudaError_t ran = cudaDeviceSynchronize();
    cudaStreamDestroy(stream);
    return said != cudaSuccess ? said : ran;
}
extern "C" int test_ring(int stages, int items, void* sum) {
    const auto out = static_cast<long long*>(sum);
    if (stages == 1) return launch(pass_on<1>, 1, 256, sizeof(smem_plan<1>), items, out);
    if (stages == 2) return launch(pass_on<2>, 1, 256, sizeof(smem_plan<2>), items, out);
    return launch(pass_on<3>, 1, 256, sizeof(smem_plan<3>), items, out);
}
extern "C" int test_hand_over(void* out) { return launch(hand_over, 1, 256, 0, static_cast<int*>(out)); }

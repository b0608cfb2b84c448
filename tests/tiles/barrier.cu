// arch/barrier.cuh: a ring of slots stays in order over many rounds, and registers move between warpgroups.
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

extern "C" int test_ring(int stages, int items, void* sum) {
    const auto out = static_cast<long long*>(sum);
    if (stages == 1) return launch(pass_on<1>, 1, 256, sizeof(smem_plan<1>), items, out);
    if (stages == 2) return launch(pass_on<2>, 1, 256, sizeof(smem_plan<2>), items, out);
    return launch(pass_on<3>, 1, 256, sizeof(smem_plan<3>), items, out);
}
extern "C" int test_hand_over(void* out) { return launch(hand_over, 1, 256, 0, static_cast<int*>(out)); }

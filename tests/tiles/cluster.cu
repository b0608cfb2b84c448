// arch/barrier.cuh and arch/tma.cuh in a cluster: two blocks fill each other's tiles and wait for one another.
#define KITTENS_TRAP_POLLS 1000000 // a box that goes to the wrong block is an error, not a wait without end
#include "harness.cuh"

constexpr int R = 64, C = 64, STAGES = 2, CLUSTER = 2, SHARE = R / CLUSTER;
struct smem_plan {
    st_bf<R, C> tile[STAGES];
    semaphore arrived[STAGES], free[STAGES];
};

// In every step each block of a cluster loads its share of the rows of both blocks' tiles: by one box that goes to both
// (`together`: both get the first block's tiles), or by a box for each. What has arrived goes out. in and out are
// (block, step, R, C). `ranks`: what each block calls itself; `others`: what the other one calls itself, once both met.
__global__ void __launch_bounds__(160) __cluster_dims__(CLUSTER)
    share(const __grid_constant__ CUtensorMap in, uint4* out, int* ranks, int* others, int steps, bool together) {
    smem_plan& s = shared_as<smem_plan>();
    const int rank = rank_in_cluster(), first_block = blockIdx.x / CLUSTER * CLUSTER;
    if (blockIdx.x % CLUSTER == 1) __nanosleep(200000); // nobody may arrive here before the semaphores are there
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) { init(s.arrived[i], 1); init(s.free[i], 4 * CLUSTER); }
        fence_init();
        ranks[blockIdx.x] = rank;
    }
    __syncthreads();
    sync_cluster();
    ring<STAGES> at;
    if (threadIdx.x == 128) {
        others[blockIdx.x] = ranks[blockIdx.x ^ 1];
        for (int i = 0; i < steps; i++, at.advance()) {
            wait(s.free[at.slot], at.parity ^ 1);
            semaphore& arrived = s.arrived[at.slot];
            expect(arrived, s.tile[0].bytes);
            const uint32_t dst = s.tile[at.slot].address() + rank * SHARE * 128;
            for (int b = 0; b < (together ? 1 : CLUSTER); b++)
                tma::load_multicast(dst, in, arrived, 0, rank * SHARE, 0, (first_block + b) * steps + i,
                                    together ? (1 << CLUSTER) - 1 : 1 << b, tma::KEEP);
        }
    } else if (threadIdx.x < 128) {
        for (int i = 0; i < steps; i++, at.advance()) {
            wait(s.arrived[at.slot], at.parity);
            if (i % CLUSTER == rank) __nanosleep(5000); // the other block must not load over what is not read yet
            for (int piece = threadIdx.x; piece < R * C / 8; piece += 128)
                out[(blockIdx.x * steps + i) * (R * C / 8) + piece] =
                    load_piece(s.tile[at.slot].address(piece / 8, piece % 8));
            __threadfence(); // arrive_at orders no ordinary reads
            __syncwarp();
            if ((threadIdx.x & 31) < CLUSTER) arrive_at(s.free[at.slot], threadIdx.x & 31);
        }
    }
    __syncwarp();
    sync_cluster(); // the other block may still arrive here
}

extern "C" int test_share(void* in, void* out, void* ranks, void* others, int blocks, int steps, int together) {
    return launch(share, blocks, 160, sizeof(smem_plan), plain_map(in, R, C, SHARE, C, 2, blocks * steps),
                  static_cast<uint4*>(out), static_cast<int*>(ranks), static_cast<int*>(others), steps, together != 0);
}

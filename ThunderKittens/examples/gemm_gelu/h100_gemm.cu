// h100_gemm.cu: a matrix product with GELU behind it, sm_90a        M rows, N columns, K summed over
//
// problem    pre = x w^T + bias, act = gelu(pre)      x (M, K), w (N, K), bias (N), pre and act (M, N), all bf16
// tiles      128 x 192 of the output a block, 64 rows a warpgroup, 64 of K a step; blocks stay on their
//            multiprocessor, two of them (a cluster) take tiles one above the other                          shapes.cuh
// pipeline   one producer thread keeps four steps in flight by TMA; each block of a cluster loads half of w's tile into
//            both. A finished tile is rounded to bf16 in shared memory and worked on while the next one's products run:
//            after a step's products are issued, a warp takes a few units (4 rows of 64 columns) of the last tile
// epilogue   a unit: 16 bytes a lane from shared memory, gelu.cuh, whole lines of pre and act out
// limits     sm_90a; N and K multiples of 8, M any; bases multiples of 16 bytes
#include "h100_gemm.cuh"

#include <algorithm>

#include "gelu.cuh"
#include "shapes.cuh"

namespace gemm {

using namespace kittens;

struct gemm_args {
    CUtensorMap x, w;
    const bf16* bias;                  // or null
    uint4 *pre, *act;                  // 8 elements each
    int M, N, steps, col_tiles, tiles; // tiles: of a cluster, CLUSTER x TILE_ROWS rows high
    int units_a_step;
};

struct gemm_smem {
    st_bf<TILE_ROWS, STEP> x[STAGES];
    st_bf<TILE_COLS, STEP> w[STAGES];
    st_bf<16, TILE_COLS> done[4 * WARPGROUPS]; // the last tile, a piece a warp
    semaphore arrived[STAGES], free[STAGES];
};
static_assert(sizeof(gemm_smem) <= SMEM_LIMIT, "fewer stages");

struct tile {
    int row, col;
};
KITTENS_DEVICE tile find_tile(const gemm_args& args, int number) {
    const int band = number / args.col_tiles;
    return {(band * CLUSTER + rank_in_cluster()) * TILE_ROWS, (number - band * args.col_tiles) * TILE_COLS};
}

// ---- producer ----------------------------------------------------------------------------------------------------

// One thread.
KITTENS_DEVICE void load_tiles(gemm_smem& smem, const gemm_args& args) {
    constexpr uint32_t bytes = sizeof(smem.x[0]) + sizeof(smem.w[0]);
    constexpr int share = TILE_COLS / CLUSTER; // rows of w's tile that this block loads
    const int share_row = rank_in_cluster() * share;
    ring<STAGES> at;
#pragma unroll 1
    for (int number = blockIdx.x / CLUSTER; number < args.tiles; number += gridDim.x / CLUSTER) {
        const tile t = find_tile(args, number);
#pragma unroll 1
        for (int k = 0; k < args.steps; k++, at.advance()) {
            wait(smem.free[at.slot], at.parity ^ 1);
            semaphore& arrived = smem.arrived[at.slot];
            expect(arrived, bytes);
            tma::load(smem.x[at.slot].address(), args.x, arrived, k * STEP, t.row, 0, 0);
            tma::load_multicast(smem.w[at.slot].address() + share_row * 128, args.w, arrived, k * STEP,
                                t.col + share_row, 0, 0, (1 << CLUSTER) - 1, tma::KEEP);
        }
    }
}

// ---- epilogue ----------------------------------------------------------------------------------------------------

KITTENS_DEVICE float element(const uint4& x, int i) {
    const uint32_t pair = i < 4 ? (i < 2 ? x.x : x.y) : (i < 6 ? x.z : x.w);
    return i % 2 ? high_bf16(pair) : low_bf16(pair);
}
KITTENS_DEVICE uint4 pack(const float (&x)[8]) {
    return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

// The last tile, as one warp finishes it.
template <bool tanh> struct finisher {
    const gemm_args& args;
    const st_bf<16, TILE_COLS>& done;
    int row = 0, col = 0; // of this lane's 8 elements in unit 0
    int unit = UNITS;     // that comes next

    KITTENS_DEVICE finisher(const gemm_args& args, const st_bf<16, TILE_COLS>& done) : args(args), done(done) {}
    KITTENS_DEVICE void begin(int warp_row, int tile_col) {
        const int lane = threadIdx.x & 31;
        row = warp_row + lane / 8;
        col = tile_col + lane % 8 * 8;
        unit = 0;
    }
    KITTENS_DEVICE void finish_unit() {
        const int lane = threadIdx.x & 31;
        const int unit_row = unit % (16 / UNIT_ROWS) * UNIT_ROWS, unit_col = unit / (16 / UNIT_ROWS) * UNIT_COLS;
        const uint4 x = load_piece(done.address(unit_row + lane / 8, unit_col / 8 + lane % 8));
        float a[8];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = gelu<tanh>(element(x, i));
        if (row + unit_row < args.M && col + unit_col < args.N) {
            const int64_t where = (static_cast<int64_t>(row + unit_row) * args.N + col + unit_col) >> 3;
            __stcs(args.pre + where, x);
            __stcs(args.act + where, pack(a));
        }
        unit++;
    }
};

// ---- consumer ----------------------------------------------------------------------------------------------------

using accumulator = rt_fl<TILE_COLS>;

KITTENS_DEVICE void add_bias(accumulator& d, const gemm_args& args, int tile_col) {
#pragma unroll
    for (int i = 0; i < TILE_COLS / 2; i += 4) {
        const int col = tile_col + 2 * i + col_of();
        if (col >= args.N) continue;
        const uint32_t pair = __ldg(reinterpret_cast<const uint32_t*>(args.bias + col));
        d.data[i] += low_bf16(pair), d.data[i + 1] += high_bf16(pair);
        d.data[i + 2] += low_bf16(pair), d.data[i + 3] += high_bf16(pair);
    }
}

// A tile as wgmma is told of it. In a cluster a shared address has the block's number above its 18 bits, where it would
// run into the descriptor's distance between panels.
template <class Tile> KITTENS_DEVICE auto operand(const Tile& t) {
    return st_window<Tile::rows, Tile::cols, Tile::panel_bytes>{t.address() & 0x3ffff};
}

// Every block of the cluster writes into this slot.
KITTENS_DEVICE void give_back(gemm_smem& smem, int slot) {
    if ((threadIdx.x & 31) < CLUSTER) arrive_at(smem.free[slot], threadIdx.x & 31);
}

template <bool tanh> KITTENS_DEVICE void compute(gemm_smem& smem, const gemm_args& args, int w) {
    const int warp = same_in_warp(threadIdx.x / 32);
    st_bf<16, TILE_COLS>& done = smem.done[warp];
    finisher<tanh> last(args, done);
    accumulator d;
    ring<STAGES> at;
#pragma unroll 1
    for (int number = blockIdx.x / CLUSTER; number < args.tiles; number += gridDim.x / CLUSTER) {
        const tile t = find_tile(args, number);
#pragma unroll 1
        for (int k = 0; k < args.steps; k++, at.advance()) {
            wait(smem.arrived[at.slot], at.parity);
            wgmma::fence();
            warpgroup::mma_ABt(d, operand(smem.x[at.slot].row_window<64>(64 * w)), operand(smem.w[at.slot]), k != 0);
            wgmma::commit();
#pragma unroll 1
            for (int n = 0; n < args.units_a_step && last.unit < UNITS; n++) last.finish_unit();
            wgmma::wait<1>();
            if (k > 0) give_back(smem, at.previous().slot);
        }
        wgmma::wait<0>();
        warpgroup::pin(d);
        give_back(smem, at.previous().slot);
        last.begin(t.row + 16 * warp, t.col);
        if (args.bias) add_bias(d, args, t.col);
        __syncwarp(); // all lanes have read what was there
        rt_bf<TILE_COLS> rounded;
        warp::copy(rounded, d);
        warp::store(done, 0, rounded);
        __syncwarp();
    }
#pragma unroll 1
    while (last.unit < UNITS) last.finish_unit();
}

// ---- kernel ------------------------------------------------------------------------------------------------------

template <bool tanh>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) __cluster_dims__(CLUSTER, 1, 1)
    linear_gelu(const __grid_constant__ gemm_args args) {
    extern __shared__ __align__(1024) unsigned char raw[];
    gemm_smem& smem = *reinterpret_cast<gemm_smem*>(raw);
    const int w = warpgroup_id();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init(smem.arrived[i], 1);
            init(smem.free[i], 4 * WARPGROUPS * CLUSTER); // one arrival a warp
        }
        fence_init();
    }
    sync_cluster();
    if (w == WARPGROUPS) {
        decrease_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == WARPGROUPS * 128) load_tiles(smem, args);
    } else {
        increase_registers<REGISTERS>();
        compute<tanh>(smem, args, w);
    }
    __syncwarp();
    sync_cluster(); // the other block may still write here
}

// ---- host --------------------------------------------------------------------------------------------------------

template <bool tanh> const char* launch(gemm_args& args, cudaStream_t stream) {
    static int multiprocessors[64] = {}; // by device; set once the kernel may use its shared memory there
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
    if (multiprocessors[device] == 0) {
        cudaError_t e = cudaFuncSetAttribute(linear_gelu<tanh>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             sizeof(gemm_smem));
        int count = 0;
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return cudaGetErrorString(e);
        multiprocessors[device] = count;
    }
    const int clusters = std::min(multiprocessors[device] / CLUSTER, args.tiles);
    linear_gelu<tanh><<<clusters * CLUSTER, (WARPGROUPS + 1) * 128, sizeof(gemm_smem), stream>>>(args);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// a (rows, cols) matrix in boxes of 64 columns
bool map_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t cols, int box_rows) {
    const gl matrix{const_cast<void*>(data), 1, 1, rows, cols, rows * cols, rows * cols, cols};
    return make_tensor_map(&map, matrix, box_rows, 64) == CUDA_SUCCESS;
}

} // namespace gemm

extern "C" const char* launch_linear_gelu(const gemm::linear_gelu_problem* problem, void* stream) {
    using namespace gemm;
    const linear_gelu_problem& x = *problem;
    const auto over = [](int n, int by) { return (n + by - 1) / by; };
    gemm_args args{};
    if (!map_matrix(args.x, x.x, x.M, x.K, TILE_ROWS)) return "no tensor map for x";
    if (!map_matrix(args.w, x.w, x.N, x.K, TILE_COLS / CLUSTER)) return "no tensor map for w";
    args.bias = static_cast<const bf16*>(x.bias);
    args.pre = static_cast<uint4*>(x.pre);
    args.act = static_cast<uint4*>(x.act);
    args.M = x.M;
    args.N = x.N;
    args.steps = over(x.K, STEP);
    args.units_a_step = over(UNITS, args.steps);
    args.col_tiles = over(x.N, TILE_COLS);
    args.tiles = over(x.M, TILE_ROWS * CLUSTER) * args.col_tiles;
    return x.tanh ? launch<true>(args, static_cast<cudaStream_t>(stream))
                  : launch<false>(args, static_cast<cudaStream_t>(stream));
}

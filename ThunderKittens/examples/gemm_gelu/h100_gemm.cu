// h100_gemm.cu: a matrix product with GELU behind it, and its backward, sm_90a        M rows, N columns, K summed over
//
// problem    forward   pre = x w^T + bias, act = gelu(pre)      x (M, K), w (N, K), pre and act (M, N), all bf16
//            backward  dpre = (dy w) gelu'(pre), act = gelu(pre) again where asked for     dy (M, K), w (K, N)
// tiles      128 x 192 of the output a block, 64 rows a warpgroup, 64 of K a step; blocks stay on their
//            multiprocessor, two of them (a cluster) take tiles one above the other                          shapes.cuh
// pipeline   one producer thread keeps four steps in flight by TMA; each block of a cluster loads half of w's tile into
//            both. Two warpgroups multiply, round a finished tile to bf16 into shared memory and go on with the next;
//            seven other warps finish it meanwhile
// epilogue   a unit of 16 rows and 64 columns: 64 bytes a lane from shared memory (and of pre, loaded a unit ahead),
//            gelu.cuh, whole lines out
// limits     sm_90a; N and K multiples of 8, M any; bases multiples of 16 bytes
#include "h100_gemm.cuh"

#include <algorithm>

#include "gelu.cuh"
#include "shapes.cuh"

namespace gemm {

using namespace kittens;

struct gemm_args {
    CUtensorMap a, b;
    const bf16* bias; // forward: or null
    const char* pre;  // backward
    char *out, *act;  // out: pre forward, dpre backward
    int M, N, steps, col_tiles, bands;
    int band_step, col_step; // from one tile of a block to its next
    uint32_t row_bytes;      // of N elements
};

template <bool forward> struct b_tile; // w's tile as it lies in memory
template <> struct b_tile<true> : st_bf<TILE_COLS, STEP> {};
template <> struct b_tile<false> : st_bf<STEP, TILE_COLS> {};

template <bool forward> struct gemm_smem {
    st_bf<TILE_ROWS, STEP> a[STAGES];
    b_tile<forward> b[STAGES];
    st_bf<16, TILE_COLS> done[STRIPS]; // a tile that waits to be finished
    semaphore arrived[STAGES], free[STAGES];
    semaphore done_full, done_free;
};
static_assert(sizeof(gemm_smem<true>) <= SMEM_LIMIT && sizeof(gemm_smem<false>) <= SMEM_LIMIT, "fewer stages");

// The tiles that a block works on, one after the other, from left to right and then down.
struct tile_walk {
    int band, col; // of tiles; a band is a cluster's rows
    KITTENS_DEVICE explicit tile_walk(const gemm_args& args) {
        const int number = blockIdx.x / CLUSTER;
        band = number / args.col_tiles;
        col = number - band * args.col_tiles;
    }
    KITTENS_DEVICE bool more(const gemm_args& args) const { return band < args.bands; }
    KITTENS_DEVICE void advance(const gemm_args& args) {
        band += args.band_step;
        col += args.col_step;
        if (col >= args.col_tiles) { col -= args.col_tiles; band++; }
    }
    KITTENS_DEVICE int first_row() const { return (band * CLUSTER + rank_in_cluster()) * TILE_ROWS; }
    KITTENS_DEVICE int first_col() const { return col * TILE_COLS; }
};

// ---- producer ----------------------------------------------------------------------------------------------------

// One thread.
template <bool forward> KITTENS_DEVICE void load_tiles(gemm_smem<forward>& smem, const gemm_args& args) {
    constexpr uint32_t bytes = sizeof(smem.a[0]) + sizeof(smem.b[0]);
    constexpr int share = (forward ? TILE_COLS : STEP) / CLUSTER; // rows of w's tile that this block loads
    const int share_row = rank_in_cluster() * share;
    ring<STAGES> at;
#pragma unroll 1
    for (tile_walk t(args); t.more(args); t.advance(args)) {
        const int row = t.first_row(), col = t.first_col();
#pragma unroll 1
        for (int k = 0; k < args.steps; k++, at.advance()) {
            wait(smem.free[at.slot], at.parity ^ 1);
            semaphore& arrived = smem.arrived[at.slot];
            expect(arrived, bytes);
            tma::load(smem.a[at.slot].address(), args.a, arrived, k * STEP, row, 0, 0);
            const uint32_t b = smem.b[at.slot].address() + share_row * 128;
            const auto load_share = [&](uint32_t dst, int c0, int c1) KITTENS_INLINE {
                if (CLUSTER == 1)
                    tma::load(dst, args.b, arrived, c0, c1, 0, 0, tma::KEEP);
                else
                    tma::load_multicast(dst, args.b, arrived, c0, c1, 0, 0, (1 << CLUSTER) - 1, tma::KEEP);
            };
            if (forward)
                load_share(b, k * STEP, col + share_row);
            else
                for (int c = 0; c < TILE_COLS; c += 64) load_share(b + c * STEP * 2, col + c, k * STEP + share_row);
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

// The units that a finisher takes: each FINISHERS-th of a tile's, first those at the left of every strip. Each finisher
// has some of every tile, so each waits for every tile: none can take one phase of a semaphore for another.
struct unit_walk {
    tile_walk tile;
    unsigned number;     // of the unit in its tile
    bool begins = true;  // the tile, for this finisher
    uint32_t parity = 0; // of the tile
    KITTENS_DEVICE unit_walk(const gemm_args& args, int first) : tile(args), number(first) {}
    KITTENS_DEVICE void advance(const gemm_args& args) {
        number += FINISHERS;
        begins = number >= STRIPS * UNITS;
        if (!begins) return;
        number -= STRIPS * UNITS;
        tile.advance(args);
        parity ^= 1;
    }
    KITTENS_DEVICE int strip() const { return number % STRIPS; }
    KITTENS_DEVICE int panel() const { return number / STRIPS; }
};

// A lane's pieces of a unit, 8 elements each and 4 rows apart.
constexpr int PIECES = 4;
struct lane_pieces {
    uint64_t first; // bytes from the beginning of a matrix to the first
    int rows;       // from the first on, in the matrix
    KITTENS_DEVICE lane_pieces(const gemm_args& args, const unit_walk& at) {
        const int lane = threadIdx.x & 31;
        const unsigned row = at.tile.first_row() + 16 * at.strip() + lane / 8;
        const unsigned col = at.tile.first_col() + 64 * at.panel() + lane % 8 * 8;
        first = static_cast<uint64_t>(row) * args.row_bytes + 2 * col;
        rows = 2 * col < args.row_bytes && at.tile.more(args) ? args.M - static_cast<int>(row) : 0;
    }
    KITTENS_DEVICE bool inside(int i) const { return 4 * i < rows; }
    // one addition a piece: left alone, the compiler takes three and has the pieces' distances once for all matrices
    template <class T> KITTENS_DEVICE T* in(T* matrix, const gemm_args& args, int i) const {
        return opaque(matrix + first) + static_cast<uint64_t>(args.row_bytes) * (4 * i);
    }
};

// One warp.
template <bool forward, bool tanh, bool act_too>
KITTENS_DEVICE void finish_tiles(gemm_smem<forward>& smem, const gemm_args& args, int finisher) {
    const int lane = threadIdx.x & 31;
    unit_walk next(args, finisher);
    lane_pieces mine(args, next), later = mine; // of this unit and the next one
    uint4 pre[PIECES] = {};                     // backward
    const auto load_pre = [&](int i) KITTENS_INLINE {
        if constexpr (!forward) load_once_if(later.inside(i), pre[i], later.in(args.pre, args, i));
    };
#pragma unroll
    for (int i = 0; i < PIECES; i++) load_pre(i);
#pragma unroll 1
    while (next.tile.more(args)) {
        if (next.begins) wait(smem.done_full, next.parity);
        const auto& done = smem.done[0];
        const uint32_t unit = next.strip() * done.bytes + next.panel() * done.panel_bytes;
        uint4 x[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) x[i] = load_piece(done.address(lane / 8 + 4 * i, lane % 8) + unit);
        __syncwarp();
        next.advance(args);
        if (next.begins && elected_lane()) arrive(smem.done_free);
        mine = later;
        later = lane_pieces(args, next);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            float y[8], act[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (forward || act_too) act[e] = gelu<tanh>(element(forward ? x[i] : pre[i], e));
                if (!forward) y[e] = element(x[i], e) * gelu_slope<tanh>(element(pre[i], e));
            }
            load_pre(i); // a unit before it is needed, into registers that are free
            store_once_if(mine.inside(i), mine.in(args.out, args, i), forward ? x[i] : pack(y));
            if (forward || act_too) store_once_if(mine.inside(i), mine.in(args.act, args, i), pack(act));
        }
    }
}

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

template <bool forward> KITTENS_DEVICE void give_back(gemm_smem<forward>& smem, int slot) {
    if (CLUSTER == 1) {
        if (elected_lane()) arrive(smem.free[slot]);
    } else if ((threadIdx.x & 31) < CLUSTER) { // every block of the cluster writes into this slot
        arrive_at(smem.free[slot], threadIdx.x & 31);
    }
}

template <bool forward> KITTENS_DEVICE void multiply(gemm_smem<forward>& smem, const gemm_args& args, int w) {
    const int warp = same_in_warp(threadIdx.x / 32);
    accumulator d;
    ring<STAGES> at;
    uint32_t done_parity = 1;
#pragma unroll 1
    for (tile_walk t(args); t.more(args); t.advance(args)) {
#pragma unroll 1
        for (int k = 0; k < args.steps; k++, at.advance()) {
            wait(smem.arrived[at.slot], at.parity);
            wgmma::fence();
            const auto a = operand(smem.a[at.slot].template row_window<64>(64 * w));
            if constexpr (forward)
                warpgroup::mma_ABt(d, a, operand(smem.b[at.slot]), k != 0);
            else
                warpgroup::mma_AB(d, a, operand(smem.b[at.slot]), k != 0);
            wgmma::commit();
            wgmma::wait<1>();
            if (k > 0) give_back(smem, at.previous().slot);
        }
        wgmma::wait<0>();
        warpgroup::pin(d);
        give_back(smem, at.previous().slot);
        if (forward && args.bias) add_bias(d, args, t.first_col());
        wait(smem.done_free, done_parity);
        done_parity ^= 1;
        rt_bf<TILE_COLS> rounded;
        warp::copy(rounded, d);
        warp::store(smem.done[warp], 0, rounded);
        __syncwarp();
        if (elected_lane()) arrive(smem.done_full);
    }
}

// ---- kernel ------------------------------------------------------------------------------------------------------

template <bool forward, bool tanh, bool act_too>
__global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    linear_gelu(const __grid_constant__ gemm_args args) {
    extern __shared__ __align__(1024) unsigned char raw[];
    gemm_smem<forward>& smem = *reinterpret_cast<gemm_smem<forward>*>(raw);
    const int w = warpgroup_id();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init(smem.arrived[i], 1);
            init(smem.free[i], 4 * WARPGROUPS * CLUSTER); // one arrival a warp
        }
        init(smem.done_full, STRIPS);
        init(smem.done_free, FINISHERS);
        fence_init();
    }
    if (CLUSTER > 1) sync_cluster();
    __syncthreads();
    if (w < WARPGROUPS) {
        increase_registers<MULTIPLIER_REGISTERS>();
        multiply<forward>(smem, args, w);
    } else {
        decrease_registers<OTHER_REGISTERS>();
        const int other = same_in_warp(threadIdx.x / 32) - STRIPS;
        if (other < FINISHERS)
            finish_tiles<forward, tanh, act_too>(smem, args, other);
        else if (elected_lane())
            load_tiles<forward>(smem, args);
    }
    if (CLUSTER > 1) { // the other block may still write here
        __syncwarp();
        sync_cluster();
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <bool forward, bool tanh, bool act_too>
const char* launch(gemm_args& args, int M, int K, cudaStream_t stream) {
    const auto kernel = linear_gelu<forward, tanh, act_too>;
    static int multiprocessors[64] = {}; // by device; set once the kernel may use its shared memory there
    int device;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
    if (multiprocessors[device] == 0) {
        cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             sizeof(gemm_smem<forward>));
        int count = 0;
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return cudaGetErrorString(e);
        multiprocessors[device] = count;
    }
    const auto over = [](int n, int by) { return (n + by - 1) / by; };
    args.M = M;
    args.row_bytes = 2u * args.N;
    args.steps = over(K, STEP);
    args.col_tiles = over(args.N, TILE_COLS);
    args.bands = over(M, TILE_ROWS * CLUSTER);
    const int clusters = std::min(multiprocessors[device] / CLUSTER, args.bands * args.col_tiles);
    args.band_step = clusters / args.col_tiles;
    args.col_step = clusters % args.col_tiles;
    kernel<<<clusters * CLUSTER, THREADS, sizeof(gemm_smem<forward>), stream>>>(args);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// a (rows, cols) matrix in boxes of 64 columns
bool map_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t cols, int box_rows) {
    const gl matrix{const_cast<void*>(data), 1, 1, rows, cols, rows * cols, rows * cols, cols};
    return make_tensor_map(&map, matrix, box_rows, 64) == CUDA_SUCCESS;
}

} // namespace gemm

extern "C" const char* launch_linear_gelu_fwd(const gemm::fwd_problem* problem, void* stream) {
    using namespace gemm;
    const fwd_problem& x = *problem;
    gemm_args args{};
    if (!map_matrix(args.a, x.x, x.M, x.K, TILE_ROWS)) return "no tensor map for x";
    if (!map_matrix(args.b, x.w, x.N, x.K, TILE_COLS / CLUSTER)) return "no tensor map for w";
    args.bias = static_cast<const bf16*>(x.bias);
    args.out = static_cast<char*>(x.pre);
    args.act = static_cast<char*>(x.act);
    args.N = x.N;
    const auto s = static_cast<cudaStream_t>(stream);
    return x.tanh ? launch<true, true, true>(args, x.M, x.K, s) : launch<true, false, true>(args, x.M, x.K, s);
}

extern "C" const char* launch_linear_gelu_bwd(const gemm::bwd_problem* problem, void* stream) {
    using namespace gemm;
    const bwd_problem& x = *problem;
    gemm_args args{};
    if (!map_matrix(args.a, x.dy, x.M, x.K, TILE_ROWS)) return "no tensor map for dy";
    if (!map_matrix(args.b, x.w, x.K, x.N, STEP / CLUSTER)) return "no tensor map for w";
    args.pre = static_cast<const char*>(x.pre);
    args.out = static_cast<char*>(x.dpre);
    args.act = static_cast<char*>(x.act);
    args.N = x.N;
    const auto s = static_cast<cudaStream_t>(stream);
    if (x.act != nullptr)
        return x.tanh ? launch<false, true, true>(args, x.M, x.K, s) : launch<false, false, true>(args, x.M, x.K, s);
    return x.tanh ? launch<false, true, false>(args, x.M, x.K, s) : launch<false, false, false>(args, x.M, x.K, s);
}

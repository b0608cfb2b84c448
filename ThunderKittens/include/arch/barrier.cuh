// Who waits for whom: mbarriers, named barriers, fences, and the registers a warpgroup may use.
// Names in brackets are sections of the PTX ISA 9.0.
#pragma once

#include <cstdint>

#define KITTENS_DEVICE __device__ __forceinline__
// On a lambda. A call inside a wgmma stage would serialise it (C7510), so everything is inlined.
#define KITTENS_INLINE __attribute__((always_inline))

namespace kittens {

// the 32-bit address that shared-memory instructions take
KITTENS_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A phase of an mbarrier ends when `arrivals` threads have arrived and every announced byte has landed.
// Shared memory only; init by one thread, then fence_init and __syncthreads.
struct semaphore {
    uint64_t word;
    KITTENS_DEVICE uint32_t address() const { return smem_address(&word); }
};

// [mbarrier.init] one thread
KITTENS_DEVICE void init(semaphore& bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar.address()), "r"(arrivals) : "memory");
}
// [mbarrier.arrive] release: what this thread wrote or read before is done for whoever waits
KITTENS_DEVICE void arrive(semaphore& bar) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar.address()) : "memory");
}
// [mbarrier.arrive.expect_tx] one arrival that also announces `bytes` to come by TMA
KITTENS_DEVICE void expect(semaphore& bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar.address()), "r"(bytes)
                 : "memory");
}
// [mbarrier.try_wait] returns once the phase of this parity is over. A fresh barrier is in phase 0: a consumer's first
// wait is for parity 0, a producer's first wait (for a free slot) is for parity 1 and returns at once.
// One asm block on purpose: with the loop in C++ ptxas 13.0 runs short of registers (C7512) and serialises wgmma.
// -DKITTENS_TRAP_POLLS=1000000 turns a deadlock into a trap.
KITTENS_DEVICE void wait(semaphore& bar, uint32_t parity) {
#ifdef KITTENS_TRAP_POLLS
    asm volatile(
        "{\n.reg .pred done, late;\n.reg .u32 n;\nmov.u32 n, 0;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni DONE;\n"
        "add.u32 n, n, 1;\nsetp.gt.u32 late, n, %2;\n@late trap;\nbra.uni AGAIN;\nDONE:\n}" ::"r"(bar.address()),
        "r"(parity), "n"(KITTENS_TRAP_POLLS)
        : "memory");
#else
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra.uni DONE;\nbra.uni AGAIN;\nDONE:\n}" ::"r"(bar.address()),
                 "r"(parity)
                 : "memory");
#endif
}

// Where in a ring of `stages` slots one stands, and the parity to wait for there.
template <int stages> struct ring {
    int slot = 0;
    uint32_t parity = 0;
    KITTENS_DEVICE void advance() {
        if (++slot == stages) { slot = 0; parity ^= 1; }
    }
    KITTENS_DEVICE ring next() const {
        ring r = *this;
        r.advance();
        return r;
    }
    // the slot handed out before this one
    KITTENS_DEVICE ring previous() const {
        ring r;
        r.slot = slot == 0 ? stages - 1 : slot - 1;
        r.parity = slot == 0 ? parity ^ 1 : parity;
        return r;
    }
};

// [bar.sync, bar.arrive] named barriers 1..15 (0 is __syncthreads); `threads` counts who waits and who only arrives
KITTENS_DEVICE void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
KITTENS_DEVICE void arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// [%cluster_ctarank] this block's number in its cluster
KITTENS_DEVICE int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}
// [mapa, mbarrier.arrive.shared::cluster] arrive at the same semaphore of block `rank` of the cluster. Relaxed: nothing
// this thread wrote becomes visible by it. That suits who has only read, by wgmma; a release would wait for every store
// of the thread to global memory.
KITTENS_DEVICE void arrive_at(semaphore& bar, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(bar.address()),
                 "r"(rank)
                 : "memory");
}
// [barrier.cluster] every thread of every block of the cluster
KITTENS_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// [fence.mbarrier_init] by the thread that ran init, before __syncthreads
KITTENS_DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// [fence.proxy.async] by each thread that wrote shared memory in the ordinary way, before the barrier behind which
// wgmma or TMA reads it
KITTENS_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// [setmaxnreg] a whole warpgroup gives registers back, or takes what others gave back; multiples of 8, 24 to 256
template <int registers> KITTENS_DEVICE void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> KITTENS_DEVICE void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// [griddepcontrol.launch_dependents] the next kernel of the stream, if launched as a dependent one, may start to take
// the multiprocessors that this one leaves
KITTENS_DEVICE void let_dependents_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// [griddepcontrol.wait] in a dependent kernel, before it reads what the one before it wrote
KITTENS_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// threadIdx.x, read where it stands: what follows from it is computed there again, not kept in registers over a loop.
// For code that runs seldom, inside or behind code that needs every register.
KITTENS_DEVICE int thread_here() {
    int t;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(t));
    return t;
}

// ptxas moves a wait for wgmma up above arithmetic that does not need it, and nothing overlaps. A branch that it cannot
// turn into predicates ends the basic block: what is before stays before. For what is seldom `taken`, and then short.
KITTENS_DEVICE void wall(bool taken) {
    if (taken)
        asm volatile("{\n.reg .u32 c;\n.reg .pred p;\nAGAIN:\nmov.u32 c, %clock;\nsetp.eq.u32 p, c, 0;\n"
                     "@p bra AGAIN;\n}" ::
                         : "memory");
}

// true in one lane of the warp, always the same one: who issues TMA and arrives for the warp
KITTENS_DEVICE bool elected_lane() { return (threadIdx.x & 31) == 0; }
// x, which is the same in all lanes of a full warp: the shuffle tells the compiler, which then keeps it out of the
// lanes' registers
KITTENS_DEVICE int same_in_warp(int x) { return __shfl_sync(~0u, x, 0); }
// which warpgroup this thread is in
KITTENS_DEVICE int warpgroup_id() { return same_in_warp(static_cast<int>(threadIdx.x >> 7)); }

} // namespace kittens

// Matrix products of a warpgroup (128 threads) on tiles. All are asynchronous:
//
//   wgmma::fence(); mma_ABt(scores, q, k, 0); wgmma::commit(); ...; wgmma::wait<0>(); pin(scores);
//
// A tile here is an st_bf or an st_window. `accumulate` = 0 overwrites d. K is the length that is summed over.
#pragma once

#include <cstdint>

#include "../arch/matrix.cuh"
#include "../arch/wgmma.cuh"
#include "../types/register.cuh"
#include "../types/shared.cuh"

namespace kittens {
namespace warpgroup {

// The compiler may not move what touches d across this point. After a wait, before reading; before an issue, after
// ordinary code wrote d. Without it ptxas may serialise every wgmma of the kernel (C7514, C7515).
template <int C> KITTENS_DEVICE void pin(rt_fl<C>& d) {
#pragma unroll
    for (int i = 0; i < C / 2; i++) asm volatile("" : "+f"(d.data[i])::"memory");
}

// d is computed before this point: a wait that is written behind it stays behind, where ptxas would move it up above
// arithmetic that does not need it. `never` must be 0, and the compiler must not know: stores that do not happen.
template <int C> KITTENS_DEVICE void hold(const rt_fl<C>& d, uint32_t never) {
#pragma unroll
    for (int i = 0; i < C / 2; i += 4) store_if(never, d.data[i], d.data[i + 1], d.data[i + 2], d.data[i + 3]);
}

// Descriptor of step k (16 of K) of an operand whose rows are contiguous along K ...
template <class Tile> KITTENS_DEVICE uint64_t along_k(const Tile& t, int k) {
    return wgmma::advance(wgmma::descriptor(t.address()), (k / 4) * Tile::panel_bytes + (k % 4) * 32);
}
// ... and of one whose rows run along K, each row contiguous along M or N.
template <class Tile> KITTENS_DEVICE uint64_t across_k(const Tile& t, int k) {
    return wgmma::advance(wgmma::descriptor(t.address(), Tile::panel_bytes), k * 2048);
}

// d[m][n] (+)= sum over k of a[m][k] b[n][k]
// scores: q k^T
template <int N, class A, class B> KITTENS_DEVICE void mma_ABt(rt_fl<N>& d, const A& a, const B& b, int accumulate) {
    static_assert(A::rows == 64 && B::rows == N && A::cols == B::cols, "a is 64 x K, b is N x K");
#pragma unroll
    for (int k = 0; k < A::cols / 16; k++) wgmma::ss<0, 0>(d.data, along_k(a, k), along_k(b, k), k != 0 || accumulate);
}
template <int N, int K, class B>
KITTENS_DEVICE void mma_ABt(rt_fl<N>& d, const rt_bf<K>& a, const B& b, int accumulate) {
    static_assert(B::rows == N && B::cols == K, "a is 64 x K, b is N x K");
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma::rs<0>(d.data, a.data[k], along_k(b, k), k != 0 || accumulate);
}

// d[m][n] (+)= sum over k of a[m][k] b[k][n]
// probabilities times v; gradients of scores times k
template <int N, class A, class B> KITTENS_DEVICE void mma_AB(rt_fl<N>& d, const A& a, const B& b, int accumulate) {
    static_assert(A::rows == 64 && B::cols == N && A::cols == B::rows, "a is 64 x K, b is K x N");
#pragma unroll
    for (int k = 0; k < A::cols / 16; k++) wgmma::ss<0, 1>(d.data, along_k(a, k), across_k(b, k), k != 0 || accumulate);
}
template <int N, int K, class B>
KITTENS_DEVICE void mma_AB(rt_fl<N>& d, const rt_bf<K>& a, const B& b, int accumulate) {
    static_assert(B::cols == N && B::rows == K, "a is 64 x K, b is K x N");
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma::rs<1>(d.data, a.data[k], across_k(b, k), k != 0 || accumulate);
}

// d[m][n] (+)= sum over k of a[k][m] b[k][n]
// a tile used transposed: dS^T k
template <int N, class A, class B> KITTENS_DEVICE void mma_AtB(rt_fl<N>& d, const A& a, const B& b, int accumulate) {
    static_assert(A::cols == 64 && B::cols == N && A::rows == B::rows, "a is K x 64, b is K x N");
#pragma unroll
    for (int k = 0; k < A::rows / 16; k++)
        wgmma::ss<1, 1>(d.data, across_k(a, k), across_k(b, k), k != 0 || accumulate);
}

} // namespace warpgroup
} // namespace kittens

// h100_frontend.cpp: the kernels as a Python module. Raw pointers, sizes and a stream: no torch headers. Every check
// that a caller can fail is here; what came is in the message.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "h100_gemm.cuh"

namespace py = pybind11;

namespace {

constexpr int COLS_STEP = 8; // rows of a matrix must be multiples of 16 bytes

void check_sizes(int64_t M, int64_t N, int64_t K) {
    if (N < 1 || K < 1 || N % COLS_STEP != 0 || K % COLS_STEP != 0)
        throw py::value_error("N and K must be multiples of " + std::to_string(COLS_STEP) + ", got N " +
                              std::to_string(N) + " and K " + std::to_string(K));
    if (M < 1 || M > INT32_MAX / 2 || N > INT32_MAX / 2 || K > INT32_MAX / 2 ||
        (M / 128 + 2) * (N / 128 + 2) > INT32_MAX / 2)
        throw py::value_error("at least one row, and not too many, got M " + std::to_string(M) + " and N " +
                              std::to_string(N));
}

void* matrix(const char* name, uintptr_t address, bool may_be_null = false) {
    if ((address == 0 && !may_be_null) || address % 16 != 0)
        throw py::value_error(std::string(name) + " must start at a multiple of 16 bytes, got address " +
                              std::to_string(address));
    return reinterpret_cast<void*>(address);
}

void raise_if(const char* error, const char* what) {
    if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}

void forward(uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t pre, uintptr_t act, int64_t M, int64_t N, int64_t K,
             bool tanh, uintptr_t stream) {
    check_sizes(M, N, K);
    const gemm::fwd_problem problem{matrix("x", x),     matrix("w", w),     matrix("bias", bias, true),
                                    matrix("pre", pre), matrix("act", act), static_cast<int>(M),
                                    static_cast<int>(N), static_cast<int>(K), tanh};
    raise_if(launch_linear_gelu_fwd(&problem, reinterpret_cast<void*>(stream)), "linear and gelu forward");
}

void backward(uintptr_t dy, uintptr_t w, uintptr_t pre, uintptr_t dpre, uintptr_t act, int64_t M, int64_t N, int64_t K,
              bool tanh, uintptr_t stream) {
    check_sizes(M, N, K);
    const gemm::bwd_problem problem{matrix("dy", dy),     matrix("w", w),           matrix("pre", pre),
                                    matrix("dpre", dpre), matrix("act", act, true), static_cast<int>(M),
                                    static_cast<int>(N),  static_cast<int>(K),      tanh};
    raise_if(launch_linear_gelu_bwd(&problem, reinterpret_cast<void*>(stream)), "linear and gelu backward");
}

} // namespace

PYBIND11_MODULE(h100_gemm_gelu, m) {
    m.doc() = "matrix products with GELU for sm_90a; see README.md";
    m.attr("sources") = SOURCES; // hash of what this was built from
    m.def("forward", &forward, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("pre"), py::arg("act"),
          py::arg("M"), py::arg("N"), py::arg("K"), py::arg("tanh"), py::arg("stream"),
          "Queue pre = x w^T + bias, act = gelu(pre) on `stream`: contiguous bf16 by address, x (M, K), w (N, K), bias "
          "(N) or 0.");
    m.def("backward", &backward, py::arg("dy"), py::arg("w"), py::arg("pre"), py::arg("dpre"), py::arg("act"),
          py::arg("M"), py::arg("N"), py::arg("K"), py::arg("tanh"), py::arg("stream"),
          "Queue dpre = (dy w) gelu'(pre), and act = gelu(pre) unless it is 0, on `stream`: contiguous bf16 by "
          "address, dy (M, K), w (K, N).");
}

// h100_frontend.cpp: the kernels as a Python module. Raw pointers, sizes, strides and a stream: no torch headers, so a
// new torch never breaks it. Every check that a caller can fail is here; what came is in the message.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "h100_bwd.cuh"
#include "h100_fwd.cuh"

namespace py = pybind11;

namespace {

constexpr int HEAD_DIM_STEP = 8, HEAD_DIM_MAX = 128;

std::string allowed_head_dims() {
    std::string list;
    for (int d = HEAD_DIM_STEP; d <= HEAD_DIM_MAX; d += HEAD_DIM_STEP)
        list += (list.empty() ? "" : ", ") + std::to_string(d);
    return list;
}

// A (B, H, N, D) tensor as Python gives it: address, and strides of B, H and N in elements
attn::fwd_tensor tensor(const char* name, uintptr_t address, const py::tuple& strides, const int64_t (&extents)[3]) {
    if (address == 0 || address % 16 != 0)
        throw py::value_error(std::string(name) + " must start at a multiple of 16 bytes, got address " +
                              std::to_string(address));
    if (strides.size() != 3)
        throw py::value_error(std::string(name) + ": strides of batch, head and row, got " +
                              std::to_string(strides.size()) + " numbers");
    int64_t s[3];
    for (int i = 0; i < 3; i++) {
        s[i] = strides[i].cast<int64_t>();
        if (extents[i] > 1 && (s[i] <= 0 || s[i] % 8 != 0))
            throw py::value_error(std::string(name) + ": strides must be positive multiples of 8 elements, got " +
                                  std::to_string(s[i]) + " for axis " + std::to_string(i));
    }
    return {reinterpret_cast<void*>(address), s[0], s[1], s[2]};
}

void check_sizes(int64_t B, int64_t H, int64_t N, int64_t D) {
    if (D < HEAD_DIM_STEP || D > HEAD_DIM_MAX || D % HEAD_DIM_STEP != 0)
        throw py::value_error("head dim must be one of " + allowed_head_dims() + ", got " + std::to_string(D));
    if (B < 1 || H < 1 || N < 1)
        throw py::value_error("batch, heads and rows must be at least 1, got " + std::to_string(B) + ", " +
                              std::to_string(H) + ", " + std::to_string(N));
    if (B * H > INT32_MAX / 64 || N > INT32_MAX - 256 || (B * H) * ((N + 63) / 64) > INT32_MAX)
        throw py::value_error("too many rows: batch x heads x rows is " + std::to_string(B) + " x " +
                              std::to_string(H) + " x " + std::to_string(N));
}

void check_dropout(float dropout, uintptr_t seed) {
    if (!(dropout >= 0.f && dropout < 1.f))
        throw py::value_error("dropout must be at least 0 and below 1, got " + std::to_string(dropout));
    if (dropout > 0.f && (seed == 0 || seed % 8 != 0))
        throw py::value_error("dropout needs the address of an int64 seed on the device");
}

void forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t lse, int64_t B, int64_t H, int64_t N,
             int64_t D, const py::tuple& q_strides, const py::tuple& k_strides, const py::tuple& v_strides,
             const py::tuple& o_strides, uintptr_t stream, float dropout, uintptr_t seed) {
    check_sizes(B, H, N, D);
    if (lse % 4 != 0) throw py::value_error("lse must be an aligned address of floats, or 0");
    const int64_t extents[3] = {B, H, N};
    attn::fwd_problem problem{};
    problem.q = tensor("q", q, q_strides, extents);
    problem.k = tensor("k", k, k_strides, extents);
    problem.v = tensor("v", v, v_strides, extents);
    problem.o = tensor("o", o, o_strides, extents);
    problem.lse = reinterpret_cast<float*>(lse);
    problem.B = static_cast<int>(B);
    problem.H = static_cast<int>(H);
    problem.N = static_cast<int>(N);
    problem.D = static_cast<int>(D);
    check_dropout(dropout, seed);
    problem.dropout = dropout;
    problem.seed = reinterpret_cast<const int64_t*>(seed);
    if (const char* error = launch_causal_forward(&problem, reinterpret_cast<void*>(stream)))
        throw std::runtime_error(std::string("causal attention forward: ") + error);
}

// dq, dk, dv of what forward wrote into o and lse. `stats`, `dq_sums`: scratch of stats_floats(B, H, N) and
// sums_floats(B, H, N, D) floats, any contents; dq_sums = 0 takes two passes, which give the same bits every time.
// dropout > 0: the forward's, and the address of its seed (int64, on the device; read when the kernels run).
void backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t dout, uintptr_t dq, uintptr_t dk,
              uintptr_t dv, uintptr_t lse, uintptr_t stats, uintptr_t dq_sums, int64_t B, int64_t H, int64_t N,
              int64_t D,
              const py::tuple& q_strides, const py::tuple& k_strides, const py::tuple& v_strides,
              const py::tuple& o_strides, const py::tuple& dout_strides, const py::tuple& dq_strides,
              const py::tuple& dk_strides, const py::tuple& dv_strides, uintptr_t stream, float dropout,
              uintptr_t seed) {
    check_sizes(B, H, N, D);
    if (lse == 0 || lse % 4 != 0) throw py::value_error("lse must be an aligned address of floats");
    if (stats == 0 || stats % 16 != 0) throw py::value_error("stats must start at a multiple of 16 bytes");
    if (dq_sums % 16 != 0) throw py::value_error("dq_sums must start at a multiple of 16 bytes");
    if (dq_sums != 0 && dropout > 0.f) throw py::value_error("one pass is without dropout: dq_sums must be 0");
    check_dropout(dropout, seed);
    const int64_t extents[3] = {B, H, N};
    attn::bwd_problem problem{};
    problem.q = tensor("q", q, q_strides, extents);
    problem.k = tensor("k", k, k_strides, extents);
    problem.v = tensor("v", v, v_strides, extents);
    problem.o = tensor("o", o, o_strides, extents);
    problem.dout = tensor("dout", dout, dout_strides, extents);
    problem.dq = tensor("dq", dq, dq_strides, extents);
    problem.dk = tensor("dk", dk, dk_strides, extents);
    problem.dv = tensor("dv", dv, dv_strides, extents);
    problem.lse = reinterpret_cast<const float*>(lse);
    problem.stats = reinterpret_cast<float*>(stats);
    problem.dq_sums = reinterpret_cast<float*>(dq_sums);
    problem.B = static_cast<int>(B);
    problem.H = static_cast<int>(H);
    problem.N = static_cast<int>(N);
    problem.D = static_cast<int>(D);
    problem.dropout = dropout;
    problem.seed = reinterpret_cast<const int64_t*>(seed);
    if (const char* error = launch_causal_backward(&problem, reinterpret_cast<void*>(stream)))
        throw std::runtime_error(std::string("causal attention backward: ") + error);
}

} // namespace

PYBIND11_MODULE(h100_attn_causal, m) {
    m.doc() = "causal attention for sm_90a; see README.md";
    m.attr("sources") = SOURCES; // hash of what this was built from
    m.def("forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("B"),
          py::arg("H"), py::arg("N"), py::arg("D"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
          py::arg("o_strides"), py::arg("stream"), py::arg("dropout") = 0.f, py::arg("seed") = 0,
          "Queue the forward on `stream`: bf16 q, k, v, o by address with strides (batch, head, row) in elements, "
          "float lse (B, H, N), or 0 where no backward follows.");
    m.def("backward", &backward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("dout"), py::arg("dq"),
          py::arg("dk"), py::arg("dv"), py::arg("lse"), py::arg("stats"), py::arg("dq_sums"), py::arg("B"),
          py::arg("H"), py::arg("N"), py::arg("D"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
          py::arg("o_strides"), py::arg("dout_strides"), py::arg("dq_strides"), py::arg("dk_strides"),
          py::arg("dv_strides"), py::arg("stream"), py::arg("dropout") = 0.f, py::arg("seed") = 0,
          "Queue the backward on `stream`: bf16 tensors by address with strides (batch, head, row) in elements.");
    m.def("stats_floats", &attn::bwd_stats_floats, py::arg("B"), py::arg("H"), py::arg("N"),
          "Floats of scratch that the backward needs.");
    m.def("sums_floats", &attn::bwd_sums_floats, py::arg("B"), py::arg("H"), py::arg("N"), py::arg("D"),
          "Floats of scratch that the backward's one pass needs besides.");
}

// shapes.cuh: what the kernels are cut into. Nothing else hard-codes a size.
#pragma once

#include "kittens.cuh"

namespace gemm {

constexpr int SMEM_LIMIT = 227 * 1024; // bytes one block may ask for on sm_90
constexpr int WARPGROUPS = 2;          // that multiply; each owns 64 rows of a tile
constexpr int FINISHERS = 7;           // warps for the epilogue; with the one that loads they make two warpgroups
constexpr int TILE_ROWS = 64 * WARPGROUPS;
constexpr int TILE_COLS = 192;         // 96 floats a thread; a finished tile in bf16 and four stages fit shared memory
constexpr int STEP = 64;               // of K
constexpr int STAGES = 4;              // steps in flight
constexpr int CLUSTER = 2;             // blocks one above the other that load their weights together
constexpr int THREADS = (4 * WARPGROUPS + FINISHERS + 1) * 32;
constexpr int MULTIPLIER_REGISTERS = 152, OTHER_REGISTERS = 104;
static_assert(THREADS % 128 == 0 && THREADS * 128 <= 65536, "whole warpgroups, 128 registers a thread to begin with");
static_assert(WARPGROUPS * 128 * MULTIPLIER_REGISTERS + (THREADS - WARPGROUPS * 128) * OTHER_REGISTERS <= THREADS * 128,
              "what some take others must have given");

// A tile is finished in units: the 16 rows that a warp has multiplied, its strip, and 64 columns of them, a panel.
constexpr int STRIPS = 4 * WARPGROUPS, UNITS = TILE_COLS / 64; // UNITS: of a strip
static_assert(FINISHERS <= STRIPS * UNITS, "a finisher has a unit of every tile");

} // namespace gemm

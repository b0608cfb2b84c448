// shapes.cuh: what the kernel is cut into. Nothing else hard-codes a size.
#pragma once

#include "kittens.cuh"

namespace gemm {

constexpr int SMEM_LIMIT = 227 * 1024; // bytes one block may ask for on sm_90
constexpr int WARPGROUPS = 2;          // that compute; each owns 64 rows of a tile
constexpr int TILE_ROWS = 64 * WARPGROUPS;
constexpr int TILE_COLS = 192;         // 96 floats a thread; a finished tile in bf16 and four stages fit shared memory
constexpr int STEP = 64;               // of K
constexpr int STAGES = 4;              // steps in flight
constexpr int CLUSTER = 2;             // blocks one above the other that load their weights together
constexpr int REGISTERS = 240, PRODUCER_REGISTERS = 24;

// A finished tile is worked on in units, between the products of the next one: 4 rows of 64 columns a warp.
constexpr int UNIT_ROWS = 4, UNIT_COLS = 64;
constexpr int UNITS = 16 / UNIT_ROWS * (TILE_COLS / UNIT_COLS);

} // namespace gemm

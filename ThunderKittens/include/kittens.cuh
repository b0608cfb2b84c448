// The one header a kernel includes: tiles, and what warps and warpgroups do with them, on sm_90a.
//
//   arch/   every inline PTX instruction, one function each
//   types/  what a tile is: registers, shared memory, global memory
//   ops/    what is done to it, by a warp or by a warpgroup
#pragma once

#include "arch/barrier.cuh"
#include "arch/matrix.cuh"
#include "arch/scalar.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "types/global.cuh"
#include "types/register.cuh"
#include "types/shared.cuh"
#include "ops/warp.cuh"
#include "ops/warpgroup.cuh"

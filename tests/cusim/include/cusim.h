// Compiles CUDA C++ kernel sources with g++: the language extensions, types and intrinsics that NVRTC has built in.
//
// The builder includes this header in front of every .cu file, which stays as it is. Kernels run under the fiber runtime
// (runtime/), one fiber for each CUDA thread. What is not declared here is not emulated: using it is a compile error.
#ifndef CUSIM
#define CUSIM 1
#define __CUDA_ARCH__ 900 // as the stand-in driver says

// The C library's own headers, and of them what is standard: to read more takes longer than to compile most kernels.
#undef _GNU_SOURCE
#include <float.h>
#include <limits.h>
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cusim/vector_types.h"

#include "cusim/runtime.h"

// The builder finds and replaces these two words in the preprocessed text (build.py).
#define __global__ __cusim_kernel__
#define __shared__ __cusim_shared__

#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __builtin_assume(condition) ((void)0)

#define threadIdx (cusim_current->thread_index)
#define blockIdx (cusim_current->block_index)
#define blockDim (cusim_current->block_dim)
#define gridDim (cusim_current->grid_dim)
static constexpr int warpSize = 32;

#undef assert
#define assert(condition) ((condition) ? (void)0 : cusim_fail("assertion failed: %s (%s:%d)", #condition, __FILE__, __LINE__))

#include "cusim/arithmetic.h"
#include "cusim/atomics.h"
#include "cusim/memory.h"
#include "cusim/warp.h"

#include "cusim/export.h"

#endif

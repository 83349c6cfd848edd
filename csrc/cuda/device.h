// Everything that CUDA calls by a name of its own: the kernels use these functions and plain C++, so that the tests can
// run them on a CPU (tests/cuda_shim/device.h offers the same functions there).
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "plan.h"

#define LSK_DEVICE static __device__ __forceinline__
// Of blocks that share a multiprocessor, at least. Left to itself, the assembler saves registers and spills a few.
#define LSK_KERNEL(blocks) __global__ void __launch_bounds__(kMaxThreads, blocks)

namespace lsk {

LSK_DEVICE int thread_id() { return threadIdx.x; }
LSK_DEVICE int block_threads() { return blockDim.x; }
LSK_DEVICE int64_t block_id() { return blockIdx.x; }
LSK_DEVICE int64_t grid_blocks() { return gridDim.x; }

LSK_DEVICE void warp_barrier() { __syncwarp(); }
LSK_DEVICE void block_barrier() { __syncthreads(); }

// The dynamic shared memory of the block.
LSK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The value of the lane whose number differs in the bits of `mask`.
template <class S>
LSK_DEVICE S exchange(S x, int mask) {
  static_assert(sizeof(S) % 4 == 0, "whole words");
  uint32_t words[sizeof(S) / 4];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (int i = 0; i < int(sizeof(S) / 4); ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], mask);
  memcpy(&x, words, sizeof x);
  return x;
}

// Clusters of thread blocks exist from compute capability 9.0 on; before, a block is a cluster of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
LSK_DEVICE int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
LSK_DEVICE int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
LSK_DEVICE void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
template <class S>
LSK_DEVICE S of_peer(S* shared, int rank) {
  return *cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
LSK_DEVICE int cluster_rank() { return 0; }
LSK_DEVICE int cluster_size() { return 1; }
LSK_DEVICE void cluster_barrier() { __syncthreads(); }
template <class S>
LSK_DEVICE S of_peer(S* shared, int) {
  return *shared;
}
#endif

// 16 bytes in one access; p is aligned to them.
using Bits16 = uint4;
LSK_DEVICE Bits16 load16(const void* p) { return *static_cast<const Bits16*>(p); }
// Streamed: what is written is not read again here, and should leave the cache to what is.
LSK_DEVICE void store16(void* p, Bits16 x) { __stcs(static_cast<Bits16*>(p), x); }

// 16 bytes into shared memory, past the registers. Copies are waited for in the order of their batches.
LSK_DEVICE void copy16(void* shared, const void* p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
#else
  *static_cast<Bits16*>(shared) = load16(p);
#endif
}
LSK_DEVICE void end_batch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLater>  // until no more than the kLater last batches of this thread are on their way
LSK_DEVICE void wait_for_batch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
}

// The capability that a kernel was compiled for, of the code that runs on the current GPU: what __CUDA_ARCH__ was, and
// with it whether there are clusters, also where a newer GPU makes its machine code from PTX. 0 where there is none.
template <class... Parameters>
int compiled_for(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess)
    return attributes.ptxVersion;
  cudaGetLastError();  // not for the next call to find
  return 0;
}

// False where the GPU, or the part of it that a process was given, never has room for such a cluster.
template <class... Parameters, class... Arguments>
bool launch_if_it_fits(const char* name, void (*kernel)(Parameters...), Grid grid, void* stream,
                       Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > 48 * 1024)  // what a kernel may have without asking
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.most_shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return true;
  cudaGetLastError();  // not for the next call to find
  if (error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources) return false;
  throw std::runtime_error(refused(name, grid) + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, void* stream, Arguments... arguments) {
  if (!launch_if_it_fits(name, kernel, grid, stream, arguments...))
    throw std::runtime_error(refused(name, grid) + "more than this GPU has room for");
}

}  // namespace lsk

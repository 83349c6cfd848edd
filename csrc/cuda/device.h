// Everything that CUDA calls by a name of its own: the kernels use these functions and plain C++, so that the tests can
// run them on a CPU (tests/cuda_shim/device.h offers the same functions there).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

// 2^x to 2 ulp of a float, 0 where it is below the normal numbers: one instruction, for which exp takes eight.
LSK_DEVICE float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
LSK_DEVICE double power_of_2(double x) { return exp2(x); }

// Of the 32 lanes of a warp, none of which is a NaN. One instruction on integers that sort as the floats do.
template <class V>
LSK_DEVICE V warp_max(V x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(V) == 4) {
    const int sorted = __float_as_int(x) ^ ((__float_as_int(x) >> 31) & 0x7fffffff);
    const int most = __reduce_max_sync(0xffffffffu, sorted);
    return __int_as_float(most ^ ((most >> 31) & 0x7fffffff));
  }
#endif
  for (int mask = 16; mask > 0; mask /= 2) x = fmax(x, exchange(x, mask));
  return x;
}

// 16 bytes in one access; p is aligned to them.
using Bits16 = uint4;
LSK_DEVICE Bits16 load16(const void* p) { return *static_cast<const Bits16*>(p); }
// Streamed: what is written is not read again here, and should leave the cache to what is.
LSK_DEVICE void store16(void* p, Bits16 x) { __stcs(static_cast<Bits16*>(p), x); }

// 16 bytes into shared memory, past the registers. Copies are waited for in the order of their batches. Before 8.0
// there are none, from 9.0 on clusters have better ones.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900)
constexpr bool kCopiesOnChip = true;
#else
constexpr bool kCopiesOnChip = false;
#endif
LSK_DEVICE void copy16(void* shared, const void* p) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
}
LSK_DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater>  // until no more than the kLater last batches of this thread are on their way
LSK_DEVICE void wait_for_batch() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Two numbers of 2 bytes in a word.
LSK_DEVICE uint32_t rounded_pair(c10::BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
LSK_DEVICE uint32_t rounded_pair(c10::Half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// What blocks of a cluster need, from compute capability 9.0 on. The instructions and their scopes are those of the
// prototype that an H100 has run (docs/gpu.md).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LSK_HAS_CLUSTERS 1
// In shared memory: who waits for it passes when all the bytes it was told to expect have come. Used once.
using Arrival = uint64_t;
LSK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
LSK_DEVICE uint32_t address_of_peer(const void* p, int rank) {
  uint32_t address = shared_address(p);
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  return address;
}
LSK_DEVICE void start_arrival(Arrival* a) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a)) : "memory");
}
LSK_DEVICE void arrivals_are_started() {  // for peers, and for the engine that copies
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
LSK_DEVICE void expect(Arrival* a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
}
LSK_DEVICE void copy_bulk(void* shared, const void* p, int bytes, Arrival* a) {
  expect(a, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(p), "r"(bytes), "r"(shared_address(a))
               : "memory");
}
#define LSK_TRY_WAIT(scope) \
  "{.reg .pred p; mbarrier.try_wait.parity" scope ".shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
LSK_DEVICE void wait(Arrival* a) {
  for (uint32_t done = 0; !done;) asm volatile(LSK_TRY_WAIT("") : "=r"(done) : "r"(shared_address(a)) : "memory");
}
LSK_DEVICE void wait_for_peers(Arrival* a) {
  for (uint32_t done = 0; !done;)
    asm volatile(LSK_TRY_WAIT(".acquire.cluster") : "=r"(done) : "r"(shared_address(a)) : "memory");
}
#undef LSK_TRY_WAIT
// 16 bytes into the shared memory of a peer, whose arrival counts them.
LSK_DEVICE void send16(void* shared, Bits16 x, int rank, Arrival* a) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_of_peer(shared, rank)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(address_of_peer(a, rank))
               : "memory");
}
// Their number is a power of two. (ptxas divides floats for %clusterid, which are too short for 2^24 blocks.)
LSK_DEVICE int cluster_id() { return blockIdx.x >> (__ffs(__clusterSizeInBlocks()) - 1); }
LSK_DEVICE int cluster_rank() { return __clusterRelativeBlockRank(); }
LSK_DEVICE int cluster_size() { return __clusterSizeInBlocks(); }
// Relaxed: what peers must find has a fence of its own.
LSK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
LSK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#else
#define LSK_HAS_CLUSTERS 0
#endif

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

inline cudaLaunchConfig_t config_of(const Grid& grid, void* stream, cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  config.attrs = cluster;
  config.numAttrs = grid.sends ? 1 : 0;  // st.async is an illegal instruction without, even in a cluster of one
  return config;
}

template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), const Grid& grid) {
  if (grid.most_shared_bytes <= 48 * 1024) return cudaSuccess;  // what a kernel may have without asking
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(grid.most_shared_bytes));
}

// How many clusters of such a grid the current GPU, or the part of it that a process was given, runs at a time.
template <class... Parameters>
int clusters_at_a_time(void (*kernel)(Parameters...), const Grid& grid) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(grid, nullptr, &cluster);
  int count = 0;
  cudaError_t error = allow_shared_memory(kernel, grid);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // not for the next call to find
  return 0;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, void* stream, Arguments... arguments) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(grid, stream, &cluster);
  cudaError_t error = allow_shared_memory(kernel, grid);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not for the next call to find
  throw std::runtime_error(refused(name, grid) + cudaGetErrorString(error));
}

}  // namespace lsk

// Label-smoothed cross-entropy of given logits, loss and gradient in one kernel: a cluster of blocks holds a row.
// Bytes: each logit is read once and its gradient written once, 2 N K itemsize, as a copy does; 24 more for each row.
// Why this shape: the rows in flight exceed L2, so a second read of a row misses it: the row stays in shared memory. A
// cluster has one row and ends, so that some blocks of an SM read while others write. Speed on an H100 in percent of a
// copy's (K = 32,000 and 128,256, bf16 and fp32): 98.7 to 100.2; persistent clusters that refill, 93 to 95; a cluster
// barrier and reads of the peers' sums instead of st.async, 93 to 99; two sweeps over the row, 75 to 96.
// Left out: edges of unaligned rows, strides between classes, class weights, priors, softcap, statistics, float16.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE __device__ __forceinline__
namespace {
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Loops of constant length unroll; tests/test_prototype.py holds that none of their arrays is left in memory.
constexpr int kUnroll = 4;           // 16-byte vectors that a thread takes at once: what its 64 to 80 registers hold
constexpr int kMaxCluster = 8;       // the largest that every device of sm_90 launches
constexpr int kOnChip = 227 * 1024;  // bytes of shared memory that a block can have; a row arrives in batches of
constexpr int kBatches = 15;         // 16 or 32 KiB, so that there are at most 15
constexpr int kLine = 128 / 16;      // vectors; blocks share a row at lines of memory

struct Call {
  const void* logits;  // (n, num_classes)
  void* grad;
  const int64_t* target;
  const float* scale;  // f, one factor of all gradients, such as 1 / n
  float *loss, *lse;   // (n)
  int64_t n, ignore_index;
  int num_classes, part;  // part: vectors of a row that a block holds
  float label_smoothing;
};
// The row in the log2 domain, relative to m = round(log2e max): e_k = fma(z_k, log2e, -m) rounds once, after the large
// numbers have cancelled, and m cancels in the loss, because it is one constant for all classes.
//   loss = ln2 (log2 s - (1 - eps) e_target - eps / K d)   grad_k = f (2^e_k / s - eps / K - (1 - eps) [k = target])
struct __align__(16) Sums {
  float m, s, d, n;  // s: sum of 2^e, d: sum of e, n: classes seen
};
INLINE Sums nothing() { return {-INFINITY, 0, 0, 0}; }
INLINE float origin(float m) { return m == -INFINITY ? 0.f : m; }  // -inf - -inf would be NaN

INLINE float ex2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
// One instruction, on integers that sort as the floats do, in place of five shuffles and maxima.
INLINE float warp_max(float v) {
  int i = __float_as_int(v);
  i = __reduce_max_sync(~0u, i ^ ((i >> 31) & 0x7fffffff));
  return __int_as_float(i ^ ((i >> 31) & 0x7fffffff));
}
INLINE float warp_sum(float v) {
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
  return v;
}

INLINE uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
INLINE uint32_t of_rank(uint32_t address, uint32_t rank) {
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  return address;
}
// Relaxed: the barriers that peers must find initialised have a fence of their own.
INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
INLINE void init(uint32_t barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory"); }
INLINE void init_fence() {  // for peers; for the engine that copies
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
INLINE void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
#define COPY "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
INLINE void copy_in(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  expect(barrier, bytes);
  asm volatile(COPY "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// An illegal instruction in a launch without the cluster attribute, even where a cluster is one block.
#define SEND "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
INLINE void send(uint32_t to, uint32_t barrier, Sums q) {
  asm volatile(SEND "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(q.m), "f"(q.s), "f"(q.d), "f"(q.n), "r"(barrier)
               : "memory");
}

// A wait of 0.2 s gives up: the first to do so writes which it was, and all go on, to a wrong result. A trap would end
// the process's context, and a wait without end the machine's use.
constexpr int kExchange = 100;              // code of the wait for peers; 1 + b: batch b
constexpr long long kPatience = 400000000;  // clock cycles; after 1/200 of them it sees that another gave up
__device__ unsigned gave_up[4];             // code, block, thread, rank
#define TRY(scope) "{.reg .pred p; mbarrier.try_wait.parity" scope ".shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
INLINE bool arrived(uint32_t barrier, bool from_peers) {
  uint32_t done;
  if (from_peers) asm volatile(TRY(".acquire.cluster") : "=r"(done) : "r"(barrier) : "memory");
  if (!from_peers) asm volatile(TRY("") : "=r"(done) : "r"(barrier) : "memory");
  return done;
}
INLINE void wait(uint32_t barrier, int code, bool from_peers) {
  if (arrived(barrier, from_peers)) return;
  for (const long long start = clock64(); !arrived(barrier, from_peers);) {
    const long long waited = clock64() - start;
    if (waited < kPatience / 200 || (waited < kPatience && !*static_cast<volatile unsigned*>(gave_up))) continue;
    const bool first = atomicCAS(gave_up, 0u, static_cast<unsigned>(code)) == 0;
    if (first) gave_up[1] = blockIdx.x, gave_up[2] = threadIdx.x, gave_up[3] = __clusterRelativeBlockRank();
    return;
  }
}

// 16 bytes of logits: 4 words, each a float or two bfloat16.
template <typename T>
constexpr int kSize = 16 / sizeof(T);
template <typename T>
INLINE void unpack(uint4 bits, float* z) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  for (int i = 0; i < kSize<T>; ++i) {
    z[i] = __uint_as_float(sizeof(T) == 4 ? words[i % 4] : i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
}
INLINE void round_to(float* word, const float* z) { *word = *z; }
INLINE void round_to(__nv_bfloat162* word, const float* z) { *word = __floats2bfloat162_rn(z[0], z[1]); }
INLINE float larger(float a, float b) { return fmaxf(a, b); }
INLINE __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }  // of two at once
INLINE float largest(float word) { return word; }
INLINE float largest(__nv_bfloat162 word) { return fmaxf(__low2float(word), __high2float(word)); }
template <typename T>
using Word = std::conditional_t<sizeof(T) == 4, float, __nv_bfloat162>;

// kCount vectors of the row on chip.
template <typename T, int kCount, int kStride>
INLINE void add(Sums& q, const uint4* row) {
  uint4 v[kCount];
  for (int u = 0; u < kCount; ++u) v[u] = row[u * kStride];
  Word<T> words[4 * kCount];
  memcpy(words, v, sizeof(v));
  for (int i = 1; i < 4 * kCount; ++i) words[0] = larger(words[0], words[i]);
  const float m = fmaxf(q.m, largest(words[0]) * kLog2e), o = origin(m);
  float s[2] = {q.s * ex2(q.m - o), 0}, d[2] = {fmaf(q.n, origin(q.m) - o, q.d), 0};  // two chains: half the latency
  for (int u = 0; u < kCount; ++u) {
    float z[kSize<T>];
    unpack<T>(v[u], z);
    for (int j = 0; j < kSize<T>; ++j) {
      const float e = fmaf(z[j], kLog2e, -o);
      s[j % 2] += ex2(e), d[j % 2] += e;
    }
  }
  q = {m, s[0] + s[1], d[0] + d[1], q.n + kCount * kSize<T>};
}
INLINE Sums at(Sums q, float m) {
  return {m, q.s * ex2(q.m - origin(m)), fmaf(q.n, origin(q.m) - origin(m), q.d), q.n};
}
INLINE Sums warp_sums(Sums q) {
  q = at(q, warp_max(q.m));
  return {q.m, warp_sum(q.s), warp_sum(q.d), warp_sum(q.n)};
}
// Every warp of every block merges the same sums in the same order: one set of bits for the row.
INLINE Sums merge(const Sums* sums, int count) {
  Sums q = nothing();
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const float m = fmaxf(q.m, sums[i].m);
    const Sums a = at(q, m), b = at(sums[i], m);
    q = {m, a.s + b.s, a.d + b.d, a.n + b.n};
  }
  return warp_sums(q);
}

template <typename T, int kThreads>
INLINE Sums part_sums(const uint4* row, int count, uint32_t batches) {
  Sums q = nothing();
  for (int b = 0, i = threadIdx.x; b * kThreads * kUnroll < count; ++b, i += kThreads * kUnroll) {
    wait(batches + 8 * b, 1 + b, false);
    const bool whole = i + (kUnroll - 1) * kThreads < count;
    if (whole) add<T, kUnroll, kThreads>(q, row + i);
    for (int k = i; !whole && k < count; k += kThreads) add<T, 1, 1>(q, row + k);
  }
  return warp_sums(q);
}

// The block's part of a row's gradient; the loss, by the thread that meets the target, of vector `hot` of the part.
template <typename T, int kThreads>
INLINE void gradient(const Call& call, const uint4* row, int count, Sums q, uint4* grad, float f, int hot, int64_t r) {
  const float o = origin(q.m), eps = call.label_smoothing, uniform = eps / static_cast<float>(call.num_classes);
  const float factor = f / q.s, shift = -f * uniform;
  const int in_vector = static_cast<int>(call.target[r]) % kSize<T>;
  float e_target = 0;
  if (hot >= count || hot % kThreads != threadIdx.x) hot = -1;
  const auto write = [&](int i) {
    float z[kSize<T>], g[kSize<T>];
    unpack<T>(row[i], z);
    for (int j = 0; j < kSize<T>; ++j) g[j] = fmaf(ex2(fmaf(z[j], kLog2e, -o)), factor, shift);
    if (i == hot) {  // a loop inside a branch does not unroll by itself: all of z and g would go to local memory
#pragma unroll
      for (int j = 0; j < kSize<T>; ++j) {
        if (j == in_vector) g[j] -= f * (1 - eps), e_target = fmaf(z[j], kLog2e, -o);
      }
    }
    __align__(16) Word<T> words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) round_to(words + j, g + j * kSize<T> / 4);
    __stcs(grad + i, *reinterpret_cast<uint4*>(words));  // streaming: L2 has no use for it
  };
  int i = threadIdx.x;
  for (; i + (kUnroll - 1) * kThreads < count; i += kUnroll * kThreads) {
    for (int u = 0; u < kUnroll; ++u) write(i + u * kThreads);
  }
  for (; i < count; i += kThreads) write(i);
  if (hot >= 0) call.loss[r] = kLn2 * (log2f(q.s) - (1 - eps) * e_target - uniform * q.d);
}

template <int kWarps>
struct Shared {
  Sums sums[kMaxCluster * kWarps];  // of every warp of the cluster, which sends them
  uint64_t batches[kBatches], exchange;
};

template <typename T, int kThreads, int kBlocksPerSm>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) cluster_row_kernel(const Call call) {
  constexpr int kWarps = kThreads / 32, kBatch = kThreads * kUnroll;
  extern __shared__ __align__(128) uint4 row[];
  __shared__ Shared<kWarps> shared;
  const int size = __clusterSizeInBlocks(), rank = __clusterRelativeBlockRank(), t = threadIdx.x;
  const int vectors = call.num_classes / kSize<T>, begin = rank * call.part;
  const int count = max(0, min(call.part, vectors - begin));
  const int64_t r = blockIdx.x / size, offset = r * vectors + begin;
  const uint32_t batches = address(shared.batches), exchange = address(&shared.exchange);
  if (t == 0) {
    const uint4* logits = static_cast<const uint4*>(call.logits) + offset;
    init(exchange);
    for (int b = 0; b * kBatch < count; ++b) init(batches + 8 * b);
    init_fence();
    for (int b = 0, i = 0; i < count; ++b, i += kBatch) {
      copy_in(address(row + i), logits + i, 16 * min(kBatch, count - i), batches + 8 * b);
    }
    expect(exchange, size * kWarps * static_cast<int>(sizeof(Sums)));
  }
  const int64_t target = call.target[r];
  const bool ignored = target == call.ignore_index, valid = !ignored && target >= 0 && target < call.num_classes;
  const float scale = call.scale[0];
  __syncthreads();
  cluster_arrive();
  Sums q = part_sums<T, kThreads>(row, count, batches);
  cluster_wait();  // every block of the cluster runs, its barriers are initialised
  const int peer = t % 32;
  if (peer < size) send(of_rank(address(&shared.sums[rank * kWarps + t / 32]), peer), of_rank(exchange, peer), q);
  __syncwarp();
  wait(exchange, kExchange, true);  // no block ends before what its peers send has arrived
  q = merge(shared.sums, size * kWarps);
  if (rank == 0 && t == 0) {
    if (!valid) call.loss[r] = ignored ? 0.f : NAN;
    call.lse[r] = (origin(q.m) + log2f(q.s)) * kLn2;
  }
  uint4* grad = static_cast<uint4*>(call.grad) + offset;
  for (int i = t; ignored && i < count; i += kThreads) __stcs(grad + i, uint4{0, 0, 0, 0});  // whatever its logits are
  if (ignored) return;
  const int hot = valid ? static_cast<int>(target) / kSize<T> - begin : -1;
  gradient<T, kThreads>(call, row, count, q, grad, valid ? scale : NAN, hot, r);
}

constexpr int kRoom = kOnChip - static_cast<int>(sizeof(Shared<16>));  // for the row
using Function = void (*)(Call);
Function find(int itemsize, int threads) {
  if (itemsize == 2 && threads == 256) return cluster_row_kernel<__nv_bfloat16, 256, 3>;
  if (itemsize == 2 && threads == 512) return cluster_row_kernel<__nv_bfloat16, 512, 2>;
  if (itemsize == 4 && threads == 256) return cluster_row_kernel<float, 256, 3>;
  return itemsize == 4 && threads == 512 ? cluster_row_kernel<float, 512, 2> : nullptr;
}
int64_t part_of(int64_t vectors, int cluster) { return (vectors + kLine * cluster - 1) / (kLine * cluster) * kLine; }
enum { kNoKernel = -1, kBadCluster = -2, kBadSize = -3, kHalfVector = -4, kTooLong = -5, kUnaligned = -6 };
}  // namespace

extern "C" {
// Why a call would be refused, or 0; asks no device. itemsize: 2 for bfloat16, 4 for float32.
int cluster_row_refusal(int itemsize, int threads, int cluster, int64_t n, int64_t num_classes) {
  if (!find(itemsize, threads)) return kNoKernel;
  if (cluster < 1 || cluster > kMaxCluster || (cluster & (cluster - 1))) return kBadCluster;
  if (n < 1 || n > INT32_MAX / cluster || num_classes < 1 || num_classes > INT32_MAX) return kBadSize;
  if (num_classes * itemsize % 16) return kHalfVector;
  return part_of(num_classes * itemsize / 16, cluster) * 16 > kRoom ? kTooLong : 0;
}

// 0, a refusal (negative) or an error of CUDA (positive).
int cluster_row_launch(int itemsize, int threads, int cluster, const void* logits, void* grad, const int64_t* target,
                       const float* scale, float* loss, float* lse, int64_t n, int64_t num_classes,
                       float label_smoothing, int64_t ignore_index, void* stream) {
  if (const int refusal = cluster_row_refusal(itemsize, threads, cluster, n, num_classes)) return refusal;
  if ((reinterpret_cast<uintptr_t>(logits) | reinterpret_cast<uintptr_t>(grad)) % 16) return kUnaligned;
  const Function kernel = find(itemsize, threads);
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom)) return e;
  const int k = static_cast<int>(num_classes), part = static_cast<int>(part_of(num_classes * itemsize / 16, cluster));
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension};
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(n * cluster)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = part * 16, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel,
                            Call{logits, grad, target, scale, loss, lse, n, ignore_index, k, part, label_smoothing});
}
// Waits for the device. out: code, block, thread and rank of the first wait that ever gave up, else 0.
int cluster_row_gave_up(unsigned* out) { return cudaMemcpyFromSymbol(out, gave_up, sizeof(gave_up)); }
}

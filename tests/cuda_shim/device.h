// The functions of csrc/cuda/device.h on a CPU, for tests: a thread per CUDA thread, real barriers.
//
// Modelled: threads, warps of 32 that exchange values, blocks, clusters whose blocks read each other's shared memory,
// shared memory that is NaNs before a block writes it and after the block ends, asynchronous copies (none is done
// before it is waited for), alignment of 16-byte accesses. Not modelled: several clusters at a time, the weak order of
// memory, divergence inside a warp, the GPU's exp and log, limits on registers and shared memory, and speed.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/plan.h"

#define __device__
#define LSK_DEVICE static inline
#define LSK_KERNEL(blocks) void

namespace lsk {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  char values[2][32][128];  // of this exchange and of the one before, which some may still be reading
};

struct Block {
  Block(int threads, int64_t shared_bytes) : barrier(threads), warps(threads / 32), shared(shared_bytes / 16 + 1) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Line> shared;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Here {
  int thread, threads, rank;
  int64_t block, blocks;
  Cluster* cluster;
  int exchanges;
  Block& own() const { return *cluster->blocks[rank]; }
};
inline thread_local Here here;

LSK_DEVICE int thread_id() { return here.thread; }
LSK_DEVICE int block_threads() { return here.threads; }
LSK_DEVICE int64_t block_id() { return here.block; }
LSK_DEVICE int64_t grid_blocks() { return here.blocks; }
LSK_DEVICE int cluster_rank() { return here.rank; }
LSK_DEVICE int cluster_size() { return static_cast<int>(here.cluster->blocks.size()); }

LSK_DEVICE void warp_barrier() { here.own().warps[here.thread / 32]->barrier.wait(); }
#ifdef LSK_SHIM_WITHOUT_BARRIERS  // what a race detector must notice
LSK_DEVICE void block_barrier() {}
#else
LSK_DEVICE void block_barrier() { here.own().barrier.wait(); }
#endif
LSK_DEVICE void cluster_barrier() { here.cluster->barrier.wait(); }

LSK_DEVICE char* shared_memory() { return reinterpret_cast<char*>(here.own().shared.data()); }

template <class S>
LSK_DEVICE S of_peer(S* shared, int rank) {
  const auto offset = reinterpret_cast<char*>(shared) - shared_memory();
  return *reinterpret_cast<S*>(reinterpret_cast<char*>(here.cluster->blocks[rank]->shared.data()) + offset);
}

template <class S>
LSK_DEVICE S exchange(S x, int mask) {
  static_assert(sizeof(S) <= sizeof(Warp::values[0][0]), "room for it");
  Warp& warp = *here.own().warps[here.thread / 32];
  auto& values = warp.values[here.exchanges++ % 2];
  memcpy(values[here.thread % 32], &x, sizeof x);
  warp.barrier.wait();
  memcpy(&x, values[here.thread % 32 ^ mask], sizeof x);
  return x;
}

struct alignas(16) Bits16 {
  uint32_t words[4];
};
LSK_DEVICE void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) abort();
}
LSK_DEVICE Bits16 load16(const void* p) {
  check_aligned(p);
  return *static_cast<const Bits16*>(p);
}
LSK_DEVICE void store16(void* p, Bits16 x) {
  check_aligned(p);
  *static_cast<Bits16*>(p) = x;
}
// As late as a GPU may: what is not waited for has not come.
inline thread_local std::deque<std::vector<std::pair<void*, const void*>>> batches(1);
LSK_DEVICE void copy16(void* shared, const void* p) { batches.back().emplace_back(shared, p); }
LSK_DEVICE void end_batch() { batches.emplace_back(); }
template <int kLater>
LSK_DEVICE void wait_for_batch() {
  for (; batches.size() > kLater + 1; batches.pop_front())
    for (const auto& [shared, p] : batches.front()) store16(shared, load16(p));
}

template <class... Parameters>
int compiled_for(void (*)(Parameters...)) {
  return 90;
}

// As a GPU would that cannot launch anything, or has no room for a cluster.
inline bool refuse_launches = false, refuse_clusters = false;
// Launches are written down instead of run.
struct Launched {
  std::string kernel;
  Grid grid;
};
inline bool only_write_down = false;
inline std::vector<Launched> written_down;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, void*, Arguments... arguments) {
  if (refuse_launches || grid.blocks <= 0 || grid.blocks % grid.cluster != 0 || grid.threads % 32 != 0)
    throw std::runtime_error(refused(name, grid) + "refused");
  if (only_write_down) return written_down.push_back({name, grid});
  Cluster cluster(grid.cluster * grid.threads);
  for (int rank = 0; rank < grid.cluster; ++rank)
    cluster.blocks.push_back(std::make_unique<Block>(grid.threads, grid.shared_bytes));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < grid.cluster; ++rank)
    for (int thread = 0; thread < grid.threads; ++thread)
      threads.emplace_back([&, rank, thread] {
        for (int64_t first = 0; first < grid.blocks; first += grid.cluster) {
          here = {thread, grid.threads, rank, first + rank, grid.blocks, &cluster, 0};
          auto& shared = here.own().shared;
          if (thread == 0) memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof shared[0]);
          cluster.barrier.wait();
          kernel(static_cast<Parameters>(arguments)...);
          here.own().barrier.wait();  // a block's shared memory ends with it, whoever still wants to read there
          if (thread == 0) memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof shared[0]);
          cluster.barrier.wait();
        }
      });
  for (std::thread& thread : threads) thread.join();
}

template <class... Parameters, class... Arguments>
bool launch_if_it_fits(const char* name, void (*kernel)(Parameters...), Grid grid, void* stream,
                       Arguments... arguments) {
  if (refuse_clusters && grid.cluster > 1) return false;
  launch(name, kernel, grid, stream, arguments...);
  return true;
}

}  // namespace lsk

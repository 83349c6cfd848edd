// The functions of csrc/cuda/device.h on a CPU, for tests: a thread per CUDA thread, real barriers.
//
// Modelled: threads, warps of 32 that exchange values, blocks, clusters whose blocks write to each other's shared
// memory, which is NaNs before a block writes it and after the block ends, asynchronous copies and sends (none is done
// before it is waited for), alignment of 16-byte accesses. Not modelled: several clusters at a time, the weak order of
// memory, divergence inside a warp, the GPU's exp and log, limits on registers and shared memory, and speed.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/plan.h"

#define __device__
#define LSK_DEVICE static inline
#define LSK_KERNEL(blocks) void
#define LSK_HAS_CLUSTERS 1

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
  // On its way to this block's shared memory, until somebody waits for its arrival.
  struct Delivery {
    const void* arrival;
    void* to;
    const void* from;        // read as late as it is written, or
    std::vector<char> sent;  // sent along
    int bytes;
  };
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Line> shared;
  std::mutex mutex;
  std::vector<Delivery> deliveries;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(threads), peers(threads) {}
  Barrier barrier;
  std::barrier<> peers;
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
LSK_DEVICE int64_t cluster_id() { return here.block / static_cast<int>(here.cluster->blocks.size()); }
LSK_DEVICE int cluster_rank() { return here.rank; }
LSK_DEVICE int cluster_size() { return static_cast<int>(here.cluster->blocks.size()); }

LSK_DEVICE void warp_barrier() { here.own().warps[here.thread / 32]->barrier.wait(); }
#ifdef LSK_SHIM_WITHOUT_BARRIERS  // what a race detector must notice
LSK_DEVICE void block_barrier() {}
#else
LSK_DEVICE void block_barrier() { here.own().barrier.wait(); }
#endif
LSK_DEVICE char* shared_memory() { return reinterpret_cast<char*>(here.own().shared.data()); }

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

// Units in the last place by which a float's power is off where a GPU's may be; 3: 2 up or down, by its last bit.
inline int ulps_of_powers = 0;
LSK_DEVICE float power_of_2(float x) {
  const float y = exp2f(x);
  if (ulps_of_powers == 0 || y == 1 || !(y < 0x1p127f)) return y;
  if (y < 0x1p-126f) return 0;
  int32_t bits;
  memcpy(&bits, &y, sizeof y);
  bits += ulps_of_powers == 3 ? (bits & 1 ? 2 : -2) : ulps_of_powers;
  float off;
  memcpy(&off, &bits, sizeof off);
  return off;
}
LSK_DEVICE double power_of_2(double x) { return exp2(x); }
template <class V>
LSK_DEVICE V warp_max(V x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmax(x, exchange(x, mask));
  return x;
}

template <class T>
LSK_DEVICE uint32_t rounded_pair(T, float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
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
constexpr bool kCopiesOnChip = true;
// As late as a GPU may: what is not waited for has not come.
inline thread_local std::deque<std::vector<std::pair<void*, const void*>>> batches(1);
LSK_DEVICE void copy16(void* shared, const void* p) { batches.back().emplace_back(shared, p); }
LSK_DEVICE void end_batch() { batches.emplace_back(); }
template <int kLater>
LSK_DEVICE void wait_for_batch() {
  for (; batches.size() > kLater + 1; batches.pop_front())
    for (const auto& [shared, p] : batches.front()) store16(shared, load16(p));
}

// A barrier in shared memory that counts bytes: what is expected less what has come, and a mark until `expect`.
using Arrival = int64_t;
constexpr Arrival kUntold = Arrival(1) << 40;
LSK_DEVICE std::atomic_ref<Arrival> counter(Arrival* a) { return std::atomic_ref<Arrival>(*a); }
LSK_DEVICE void start_arrival(Arrival* a) { counter(a) = kUntold; }
LSK_DEVICE void arrivals_are_started() {}
LSK_DEVICE void expect(Arrival* a, int bytes) { counter(a) += bytes - kUntold; }
LSK_DEVICE void check_started(Arrival* a) {
  if (counter(a) < 0 || counter(a) > 2 * kUntold) abort();  // the memory of a block that has not begun, or has ended
}
LSK_DEVICE void deliver_to(Block& block, Block::Delivery delivery, Arrival* a) {
  check_aligned(delivery.to);
  check_started(a);
  const std::lock_guard<std::mutex> guard(block.mutex);
  block.deliveries.push_back(std::move(delivery));
}
LSK_DEVICE void copy_bulk(void* shared, const void* p, int bytes, Arrival* a) {
  check_aligned(p);
  expect(a, bytes);
  deliver_to(here.own(), {a, shared, p, {}, bytes}, a);
}
LSK_DEVICE void send16(void* shared, Bits16 x, int rank, Arrival* a) {
  Block& peer = *here.cluster->blocks[rank];
  const auto there = [&](void* p) {
    return reinterpret_cast<char*>(peer.shared.data()) + (static_cast<char*>(p) - shared_memory());
  };
  const char* bytes = reinterpret_cast<const char*>(&x);
  auto* arrival = reinterpret_cast<Arrival*>(there(a));
  deliver_to(peer, {arrival, there(shared), nullptr, {bytes, bytes + sizeof x}, sizeof x}, arrival);
}
LSK_DEVICE void wait(Arrival* a) {
  while (true) {
    {
      const std::lock_guard<std::mutex> guard(here.own().mutex);
      auto& all = here.own().deliveries;
      for (auto& d : all) {
        if (d.arrival != a) continue;
        memcpy(d.to, d.from != nullptr ? d.from : d.sent.data(), d.bytes);
        counter(a) -= d.bytes;
      }
      std::erase_if(all, [&](const auto& d) { return d.arrival == a; });
    }
    if (counter(a) == 0) return;
    std::this_thread::yield();
  }
}
LSK_DEVICE void wait_for_peers(Arrival* a) { wait(a); }
inline thread_local std::optional<std::barrier<>::arrival_token> arrived;
LSK_DEVICE void cluster_arrive() { arrived = here.cluster->peers.arrive(); }
LSK_DEVICE void cluster_wait() { here.cluster->peers.wait(std::move(*arrived)); }

template <class... Parameters>
int compiled_for(void (*)(Parameters...)) {
  return 90;
}

// As a GPU would that cannot launch anything.
inline bool refuse_launches = false;
// Launches are written down, or that instead of run.
struct Launched {
  std::string kernel;
  Grid grid;
};
inline bool write_down = false, only_write_down = false;
inline std::vector<Launched> written_down;

template <class... Parameters>
int clusters_at_a_time(void (*)(Parameters...), const Grid& grid) {
  return 1000 / grid.cluster;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, void*, Arguments... arguments) {
  if (refuse_launches || grid.blocks <= 0 || grid.shared_bytes > grid.most_shared_bytes ||
      grid.blocks % grid.cluster != 0 || grid.threads % 32 != 0)
    throw std::runtime_error(refused(name, grid) + "refused");
  if (write_down) written_down.push_back({name, grid});
  if (only_write_down) return;
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

}  // namespace lsk

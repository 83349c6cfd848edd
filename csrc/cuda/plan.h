// Which form of a kernel runs, on how many blocks of how many threads: the only table of the CUDA kernels.
#pragma once

#include <string>

#include "../call.h"

namespace lsk {

constexpr int kWarp = 32, kMaxThreads = 256;
// Of shared memory, in front of what else lies there: the sums of each warp of a block.
constexpr int64_t kSlotBytes = kMaxThreads / kWarp * int64_t(sizeof(Stats<double>));
static_assert(kSlotBytes % 16 == 0, "what lies behind is accessed by 16 bytes");

// A row comes on chip in batches, of each of which a thread takes kInBatch accesses of 16 bytes: it is summed while the
// next ones arrive.
constexpr int kBatches = 4, kInBatch = 4;
constexpr int64_t kMostOnChip = int64_t(kBatches) * kInBatch * kMaxThreads * 16;
// In front of a row that a cluster holds: what each of its warps sends to each of its blocks, and who waits for that.
constexpr int kMostCluster = 8;  // the largest that every GPU with clusters launches
constexpr int kMostLetters = kMostCluster * kMaxThreads / kWarp;
constexpr int64_t kMailboxBytes = kMostLetters * 64 + 64;

// Vectors of 16 bytes that each of so many parts of a row has, if it can have whole lines of memory.
inline int64_t vectors_of_part(int64_t bytes, int64_t parts) {
  const int64_t lines = (bytes + 127) / 128;
  return (lines + parts - 1) / parts * 8;
}

// The device, and the numbers that a choice depends on. They follow from the shared memory and the registers of a
// multiprocessor, which two blocks and more should share, so that one loads while another computes; for clusters they
// are in the range that was best on an H100 (docs/gpu.md). The tests choose smaller ones, to take every path with few
// threads.
struct Device {
  int capability = 0;  // that the running code was compiled for, 90 for 9.0
  int multiprocessors = 1;
  int threads = 256;                 // of a block
  int few_threads = 128;             // of a block whose warps take a row each
  int64_t warp_bytes = 1 << 14;      // of such a row: 32 accesses of 16 bytes by each thread
  int64_t part_bytes = kMostOnChip;  // of a row in a block's shared memory, which three blocks should share; see room()
  int64_t least_bytes = 1 << 14;     // of a row in a block of a cluster, if more blocks are taken than hold it: a batch
  int64_t unit_bytes = 1 << 15;      // that a block takes of a row where rows are cut: 8 accesses by each thread
  int clusters[4] = {};              // of 1, 2, 4 and 8 blocks that run at a time, each block with part_bytes of a row

  // What of a row a block holds where a multiprocessor has so much shared memory.
  void room(int64_t shared_bytes) {
    const int64_t third = shared_bytes / 3 - 1024 - kMailboxBytes;  // CUDA keeps 1 KiB of each block
    part_bytes = third < part_bytes ? third / 128 * 128 : part_bytes;
  }
};

struct Grid {
  int64_t blocks = 0;
  int threads = 0, cluster = 1;
  int64_t shared_bytes = 0;
  int64_t most_shared_bytes = 0;  // of any launch of the kernel: its limit is set to this, by every thread alike
  bool sends = false;             // between the blocks of a cluster, which may be one
};

inline std::string refused(const char* kernel, const Grid& grid) {
  return std::string(kernel) + ": a launch of " + std::to_string(grid.blocks) + " blocks of " +
         std::to_string(grid.threads) + " threads, in clusters of " + std::to_string(grid.cluster) + ", with " +
         std::to_string(grid.shared_bytes) + " bytes of shared memory failed: ";
}

struct Plan {
  enum Form { kRows, kOnChip, kCluster, kSplit } form = kRows;
  int team_threads = 0;    // of a block, on one row
  int parts = 1;           // of a row, in blocks of their own
  int64_t each = 0;        // vectors of 16 bytes of a part
  Grid grid, second_grid;  // the second of the merge
  int64_t workspace_bytes = 0;
};

// Of a cluster with the largest part of a row: what decides how many run at a time.
inline Grid largest_cluster(int blocks, const Device& device) {
  return {blocks, device.threads, blocks, kMailboxBytes + device.part_bytes, kMailboxBytes + device.part_bytes, true};
}
Plan forward_plan(const Call& call, const Device& device);
Plan part_plan(int64_t n, int64_t k, int64_t element, const Device& device);  // where nothing is summed over a row

}  // namespace lsk

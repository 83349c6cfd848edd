// Loss and gradient of rows on a GPU of compute capability 9.0 or more: a cluster of blocks holds a row.
//
// Bytes: each logit is read once and its gradient written once, as a copy does. A cluster takes one row and ends, so
// that of the blocks that share a multiprocessor some read while others write. Each block copies its part of the row
// into shared memory in batches and sums one while the next ones arrive; each of its warps sends its sums to every
// block of the cluster and waits for theirs: the only exchange. Every warp then merges the same sums in the same order.
// bench/prototypes/cluster_row.cu is the measured form of this; docs/gpu.md says what else was tried.
#pragma once

#include "parts.h"

namespace lsk {

#if LSK_HAS_CLUSTERS
// What a warp sends, in units of 16 bytes: its sums, and the target's logit where it read that.
template <class V, bool kGeneral>
struct alignas(16) Letter {
  Stats<V> s;
  V hot;

  __device__ Letter(const Stats<V>& sums, V x) : s(sums), hot(x) {}
  __device__ Stats<V> stats() const { return s; }
};
template <class V>
struct alignas(16) Letter<V, false> {
  V max, sum, hot;
  Moments<V> rest;
  int64_t best;

  __device__ Letter(const Stats<V>& s, V x) : max(s.max), sum(s.sum), hot(x), rest(s.rest), best(s.best) {}
  __device__ Stats<V> stats() const { return {max, sum, {0, 0, 0}, rest, {0, 0}, {0, 0}, 0, best}; }
};

template <class T, bool kGeneral>
class ClusterRow {
  using V = Acc<T>;
  using Mail = Letter<V, kGeneral>;

 public:
  __device__ ClusterRow(const Call& c, int64_t each)
      : call(c), line(c.logits, row, c.k), part(part_of(line.vectors, each, rank, size)) {}

  __device__ void run() const {
    if (t == 0) start();
    const bool reads = !call.unread(row);
    if (t == 0 && reads) bring_the_rest();
    const Given<T, kGeneral> given(call, line, row);
    Hot<T, kGeneral> hot(row, given);
    if (rank == 0 && t < kWarp) hot.read(line);  // the warp whose letter is the first
    block_barrier();
    Stats<V> s = no_stats<V>();
    if (reads) {
      cluster_arrive();
      s = sums(given);
      cluster_wait();  // every block of the cluster runs, and has started its arrivals
      s = exchanged(s, hot.x);
      hot.join(s);
    } else if (part.count > 0) {
      wait(&mailbox().batches[0]);
    }
    const RowEnd<V> end = call.ended(row, s);
    if (rank == 0 && t == 0) call.template store<kGeneral>(row, call.ended(row, s));
    const Output<T> out(call.grad, line, row);
    if (call.ignored(row)) return clear_part(line, part, t, threads, out);
    const Rule<T, kGeneral> rule(given, row, end.zmax, end.logsum, end.mass, end.count);
    const bool has_target = writes(line, part, t, threads, hot.y);
    const V of_target = has_target ? rule.at_target(hot.x, hot.y) : V(0);
    write_on_chip(line, part, t, threads, on_chip(), rule, out);
    write_edges(line, part, t, threads, rule, out);
    if (has_target) out.row.store(hot.y, of_target);
  }

 private:
  // In the block's shared memory, in front of its part of the row.
  struct Mailbox {
    char letters[kMostLetters][sizeof(Mail)];  // of every warp of the cluster
    Arrival batches[kBatches], post;
  };
  static_assert(sizeof(Mailbox) <= kMailboxBytes, "the plan leaves room for it");

  const Call& call;
  const int t = thread_id(), threads = block_threads(), warps = threads / kWarp, in_batch = kInBatch * threads;
  const int rank = cluster_rank(), size = cluster_size();
  const int row = cluster_id();
  const Line<T> line;
  const Part part;

  __device__ static Mailbox& mailbox() { return *reinterpret_cast<Mailbox*>(shared_memory()); }
  __device__ static Bits16* on_chip() { return reinterpret_cast<Bits16*>(shared_memory() + kMailboxBytes); }

  __device__ void bring(int batch) const {
    const int i = batch * in_batch, rest = part.count - i, count = rest < in_batch ? rest : in_batch;
    if (count > 0) copy_bulk(on_chip() + i, line.vector(part.begin + i), 16 * count, &mailbox().batches[batch]);
  }
  __device__ void start() const {
    start_arrival(&mailbox().post);
    for (int batch = 0; batch < kBatches; ++batch) start_arrival(&mailbox().batches[batch]);
    arrivals_are_started();
    bring(0);  // before it is known whether the row is ignored
  }
  __device__ void bring_the_rest() const {
    for (int batch = 1; batch < kBatches; ++batch) bring(batch);
    expect(&mailbox().post, size * warps * static_cast<int>(sizeof(Mail)));
  }
  // Of this warp.
  __device__ Stats<V> sums(const Given<T, kGeneral>& given) const {
    Sums<T, kGeneral> mine;
    for (int batch = 0; batch * in_batch < part.count; ++batch) {
      wait(&mailbox().batches[batch]);
      sum_batch(batch, line, part, t, threads, on_chip(), given, mine);
    }
    find_on_chip(line, part, threads, on_chip(), given, mine);
    sum_edges(line, part, t, threads, given, mine);
    return of_warp<kGeneral>(mine.stats(), call.prediction != nullptr);
  }
  // The sums of the row, from this warp's; and its target's logit, from the warp that read it.
  __device__ Stats<V> exchanged(const Stats<V>& of_this_warp, V& hot) const {
    const int lane = t % kWarp, letters = size * warps;
    const Mail mine(of_this_warp, hot);
    if (lane < size) {
      Bits16 pieces[sizeof(Mail) / 16];
      memcpy(pieces, &mine, sizeof mine);
      char* to = mailbox().letters[rank * warps + t / kWarp];
      _Pragma("unroll") for (int i = 0; i < int(sizeof(Mail) / 16); ++i)
          send16(to + 16 * i, pieces[i], lane, &mailbox().post);
    }
    warp_barrier();
    wait_for_peers(&mailbox().post);  // no block ends before what its peers send has arrived
    const auto letter = [](int i) { return *reinterpret_cast<const Mail*>(mailbox().letters[i]); };
    Stats<V> s = no_stats<V>();
    for (int i = lane; i < letters; i += kWarp) s = i == lane ? letter(i).stats() : merge(s, letter(i).stats());
    hot = letter(0).hot;
    return of_warp<kGeneral>(s, call.prediction != nullptr);
  }
};
#endif

template <class T, bool kGeneral>
LSK_KERNEL((kGeneral ? 1 : 3))
cluster_kernel(const Call call, const int64_t each) {
#if LSK_HAS_CLUSTERS
  ClusterRow<T, kGeneral>(call, each).run();
#endif
}

}  // namespace lsk

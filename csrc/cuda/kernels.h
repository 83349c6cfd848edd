// The kernels: loss and gradient of the rows of logits, by teams of threads.
//
// row_kernel makes both. On chip, a row is read from memory once into the shared memory of a cluster of thread blocks,
// each of which holds an adjacent part, and its gradient is written once: 2 units of N·K elements. Elsewhere a team, a
// warp or a block, reads it a second time, backwards, from what of it the caches still hold: 2 to 3 units. part_kernel
// and merge_kernel spread few long rows over all multiprocessors. grad_kernel makes a gradient from what was saved.
// No atomics: every sum has one order, whatever runs when.
#pragma once

#include "rows.h"
#include "run.h"

namespace lsk {

template <bool kGeneral>
constexpr int kUnroll = kGeneral ? 1 : 4;  // loads ahead of their use; with options a class is several loads
template <bool kGeneral, bool kOnChip>
constexpr int kBlocks = kGeneral  ? 1
                        : kOnChip ? 3
                                  : 2;  // to a multiprocessor, for which registers must suffice
constexpr int kBatches = 4;  // in which a row comes on chip: the first is summed while the last is on its way

// The threads that work on one row.
struct Team {
  int rank, size, in_block, block;  // of the team; threads of it in this block; which block of its cluster this is
  int64_t first, step;              // row, and rows that all teams of the grid take at a time

  __device__ explicit Team(int threads)
      : rank(cluster_rank() * threads + thread_id() % threads),
        size(cluster_size() * threads),
        in_block(threads),
        block(cluster_rank()) {
    const int64_t teams = block_threads() / threads;
    first = block_id() / cluster_size() * teams + thread_id() / threads;
    step = grid_blocks() / cluster_size() * teams;
  }

  // The sums of all of the team's threads, in each of them; their numbers are powers of two.
  template <bool kGeneral, class V>
  __device__ Stats<V> merged(Stats<V> s) const {
    s = over_lanes<kGeneral>(s, kWarp);
    warp_barrier();
    if (in_block == kWarp) return s;
    Stats<V>* slots = reinterpret_cast<Stats<V>*>(shared_memory());
    const int lane = thread_id() % kWarp, warps = in_block / kWarp, blocks = cluster_size();
    if (lane == 0) slots[thread_id() / kWarp] = s;
    block_barrier();
    s = slots[lane % warps];  // a statement of its own: ThreadSanitizer does not see what a call reads for an argument
    s = over_lanes<kGeneral>(s, warps);
    if (blocks > 1) {
      if (thread_id() == 0) slots[warps] = s;
      cluster_barrier();
      s = of_peer(slots + warps, lane % blocks);
      s = over_lanes<kGeneral>(s, blocks);
      cluster_barrier();  // a block may end, and with it its shared memory, only after this
    } else {
      block_barrier();  // the slots are free for the next row
    }
    return s;
  }

 private:
  // Of `count` adjacent lanes.
  template <bool kGeneral, class V>
  __device__ static Stats<V> over_lanes(Stats<V> s, int count) {
    for (int mask = 1; mask < count; mask *= 2) {
      s = merge(s, kGeneral ? exchange(s, mask) : exchange_plain(s, mask));
      if (!kGeneral) s.spread = {0, 0, 0};
    }
    return s;
  }
  // Without the sums that only options have.
  template <class V>
  __device__ static Stats<V> exchange_plain(const Stats<V>& s, int mask) {
    struct Plain {
      V max, sum;
      Moments<V> rest;
      int64_t best;
    };
    const Plain p = exchange(Plain{s.max, s.sum, s.rest, s.best}, mask);
    return {p.max, p.sum, {0, 0, 0}, p.rest, {0, 0}, {0, 0}, 0, p.best};
  }
};

// One of the parts of a row: its vectors [begin, end), and in turns with the others the edges.
struct Part {
  int64_t begin, end, index, parts;
};

LSK_DEVICE Part part_of(int64_t vectors, int64_t i, int64_t parts) {
  const int64_t each = (vectors + parts - 1) / parts, begin = i * each;
  const int64_t end = begin + each < vectors ? begin + each : vectors;
  return {begin < end ? begin : end, end, i, parts};
}

// This thread's share, one of `threads`, of the sums over a part; several loads ahead of their use.
template <class T, bool kGeneral>
LSK_DEVICE void sum_part(const Line<T>& line, const Part& part, int rank, int threads, const Given<T, kGeneral>& given,
                         Sums<T, kGeneral>& sums) {
  constexpr int U = kUnroll<kGeneral>;
  for (int64_t i = part.begin + rank; i < part.end; i += int64_t(U) * threads) {
    Bits16 bits[U];
    _Pragma("unroll") for (int u = 0; u < U; ++u) if (i + u * threads < part.end) bits[u] =
        load16(line.vector(i + u * threads));
    _Pragma("unroll") for (int u = 0; u < U; ++u) if (i + u * threads < part.end)
        sums.add(unpack<T>(bits[u]), line.class_of_vector(i + u * threads), given);
  }
}

// The same of a part that this thread's copies bring into shared memory, batch by batch; no other thread reads them.
template <int kBatch, class T, bool kGeneral>
LSK_DEVICE void sum_batches(const Line<T>& line, const Part& part, int rank, int threads, const Bits16* on_chip,
                            int64_t per_batch, const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  wait_for_batch<kBatches - 1 - kBatch>();
  const int64_t last = part.begin + (kBatch + 1) * per_batch, end = last < part.end ? last : part.end;
  for (int64_t i = part.begin + kBatch * per_batch + rank; i < end; i += threads)
    sums.add(unpack<T>(on_chip[i - part.begin]), line.class_of_vector(i), given);
  if constexpr (kBatch + 1 < kBatches)
    sum_batches<kBatch + 1>(line, part, rank, threads, on_chip, per_batch, given, sums);
}

template <class T, bool kGeneral>
LSK_DEVICE void sum_on_chip(const Line<T>& line, const Part& part, int rank, int threads, Bits16* on_chip,
                            const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  const int64_t rounds = (part.end - part.begin + threads - 1) / threads;
  const int64_t per_batch = (rounds + kBatches - 1) / kBatches * threads;
  for (int batch = 0; batch < kBatches; ++batch) {
    const int64_t last = part.begin + (batch + 1) * per_batch, end = last < part.end ? last : part.end;
    for (int64_t i = part.begin + batch * per_batch + rank; i < end; i += threads)
      copy16(on_chip + (i - part.begin), line.vector(i));
    end_batch();
  }
  sum_batches<0>(line, part, rank, threads, on_chip, per_batch, given, sums);
}

template <class T, bool kGeneral>
LSK_DEVICE void sum_edges(const Line<T>& line, const Part& part, int rank, int threads, const Given<T, kGeneral>& given,
                          Sums<T, kGeneral>& sums) {
  for (int64_t e = part.index * threads + rank; e < line.edges(); e += part.parts * threads) {
    const int64_t k = line.class_of_edge(e);
    sums.add(Lanes<Acc<T>, 1>{{line.at(k)}}, k, given);
  }
}

// The index target's share, which no thread's sums hold; read before a gradient may overwrite it.
template <class T, bool kGeneral>
struct Hot {
  using V = Acc<T>;
  V z = 0, w = 1;
  bool here = false;

  __device__ Hot(const Line<T>& line, int64_t row, const Given<T, kGeneral>& given) {
    const Call& call = given.call;
    if (call.target == nullptr || call.ignored(row) || !call.valid(row)) return;
    here = true;
    z = given.transformed(line.at(call.target[row]));
    if (kGeneral) w = call.weight.get<V>(call.target[row]);
  }
  __device__ void join(Stats<V>& s) const {
    if (!here) return;
    const V dev = z - origin(s.max);
    s.t = {1, dev};
    s.wt = {w, weighted(w, dev)};
  }
};

// The gradient of a part; backwards, so that what was read last is read first. Loads go ahead of stores, which the
// compiler cannot do for them: the gradient may lie over the logits, each thread's over its own.
template <class T, bool kGeneral>
LSK_DEVICE void write_part(const Line<T>& line, const Part& part, int rank, int threads, const Bits16* on_chip,
                           const Rule<T, kGeneral>& rule, const Output<T>& out) {
  constexpr int U = kUnroll<kGeneral>;
  if (on_chip != nullptr) {
    for (int64_t i = part.begin + rank; i < part.end; i += threads) {
      const int64_t k = line.class_of_vector(i);
      out.store(k, rule.at(unpack<T>(rule.zero ? Bits16{} : on_chip[i - part.begin]), k));
    }
  } else {
    for (int64_t i = part.end - 1 - rank; i >= part.begin; i -= int64_t(U) * threads) {
      Bits16 bits[U] = {};
      _Pragma("unroll") for (int u = 0; u < U; ++u) if (!rule.zero && i - u * threads >= part.begin) bits[u] =
          load16(line.vector(i - u * threads));
      _Pragma("unroll") for (int u = 0; u < U; ++u) {
        const int64_t k = line.class_of_vector(i - u * threads);
        if (i - u * threads >= part.begin) out.store(k, rule.at(unpack<T>(bits[u]), k));
      }
    }
  }
  for (int64_t e = part.index * threads + rank; e < line.edges(); e += part.parts * threads) {
    const int64_t k = line.class_of_edge(e);
    out.row.store(k, rule.at(Lanes<Acc<T>, 1>{{line.at(k)}}, k).v[0]);
  }
}

template <class T, bool kGeneral, bool kOnChip>
LSK_KERNEL((kBlocks<kGeneral, kOnChip>))
row_kernel(const Call call, const int team_threads) {
  using V = Acc<T>;
  const Team team(team_threads);
  const int rank = thread_id() % team_threads;
  Bits16* on_chip = kOnChip ? reinterpret_cast<Bits16*>(shared_memory() + kSlotBytes) : nullptr;
  for (int64_t row = team.first; row < call.n; row += team.step) {
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    const Part part = part_of(line.vectors, team.block, cluster_size());
    const Hot<T, kGeneral> hot(line, row, given);
    Sums<T, kGeneral> sums;
    if (!call.unread(row)) {
      if (kOnChip)
        sum_on_chip(line, part, rank, team_threads, on_chip, given, sums);
      else
        sum_part(line, part, rank, team_threads, given, sums);
      sum_edges(line, part, rank, team_threads, given, sums);
    }
    Stats<V> s = team.template merged<kGeneral>(sums.stats());
    hot.join(s);
    const RowEnd<V> end = call.ended(row, s);
    if (team.rank == 0) call.store(row, end);
    if (!call.grad) continue;
    const Rule<T, kGeneral> rule(given, row, end.zmax, end.logsum, end.mass, end.count);
    const Output<T> out(call.grad, line, row);
    write_part(line, part, rank, team_threads, on_chip, rule, out);
  }
}

// The sums of one of `parts` parts of a row, a block each.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
part_kernel(const Call call, Stats<Acc<T>>* sums_of_parts, const int64_t parts) {
  const Team team(block_threads());
  for (int64_t unit = team.first; unit < call.n * parts; unit += team.step) {
    const int64_t row = unit / parts;
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    const Part part = part_of(line.vectors, unit % parts, parts);
    Sums<T, kGeneral> sums;
    if (!call.unread(row)) {
      sum_part(line, part, team.rank, team.size, given, sums);
      sum_edges(line, part, team.rank, team.size, given, sums);
    }
    const Stats<Acc<T>> s = team.template merged<kGeneral>(sums.stats());
    if (team.rank == 0) sums_of_parts[unit] = s;
  }
}

// A row from the sums of its parts, a warp each.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
merge_kernel(const Call call, const Stats<Acc<T>>* sums_of_parts, const int64_t parts) {
  const Team team(kWarp);
  for (int64_t row = team.first; row < call.n; row += team.step) {
    Stats<Acc<T>> s = no_stats<Acc<T>>();
    for (int64_t i = team.rank; i < parts; i += kWarp) s = merge(s, sums_of_parts[row * parts + i]);
    s = team.template merged<kGeneral>(s);
    const Line<T> line(call.logits, row, call.k);
    Hot<T, kGeneral>(line, row, Given<T, kGeneral>(call, line, row)).join(s);
    if (team.rank == 0) call.store(row, call.ended(row, s));
  }
}

// A gradient from what was saved, a team for each of `parts` parts of a row; it may lie over the logits.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
grad_kernel(const Call call, const int team_threads, const int64_t parts) {
  using V = Acc<T>;
  const Team team(team_threads);
  for (int64_t unit = team.first; unit < call.n * parts; unit += team.step) {
    const int64_t row = unit / parts;
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    const Rule<T, kGeneral> rule(given, row, call.zmax.get<V>(row), call.logsum.get<V>(row), call.mass.get<V>(row),
                                 call.count.get<V>(row));
    const Output<T> out(call.grad, line, row);
    write_part(line, part_of(line.vectors, unit % parts, parts), team.rank, team.size, nullptr, rule, out);
  }
}

// grad *= scale, which lies on the device: nothing is written where it is 1.
template <class T>
LSK_KERNEL((kBlocks<false, false>))
scale_kernel(const View grad, const Acc<T>* scale, const int64_t n, const int64_t k, const int64_t parts) {
  constexpr int U = 2;  // more of them spill on sm_100
  const Acc<T> factor = *scale;
  if (factor == 1) return;
  const int rank = thread_id(), threads = block_threads();
  for (int64_t unit = block_id(); unit < n * parts; unit += grid_blocks()) {
    const int64_t row = unit / parts;
    const Line<T> line(grad, row, k);
    const Part part = part_of(line.vectors, unit % parts, parts);
    const Output<T> out(grad, line, row);
    for (int64_t i = part.begin + rank; i < part.end; i += int64_t(U) * threads) {
      Bits16 bits[U] = {};
      _Pragma("unroll") for (int u = 0; u < U; ++u) if (i + u * threads < part.end) bits[u] =
          load16(line.vector(i + u * threads));
      _Pragma("unroll") for (int u = 0; u < U; ++u) {
        if (i + u * threads >= part.end) break;
        Lanes<Acc<T>, kLanes<T>> g = unpack<T>(bits[u]);
        _Pragma("unroll") for (int j = 0; j < kLanes<T>; ++j) g.v[j] *= factor;
        out.store(line.class_of_vector(i + u * threads), g);
      }
    }
    for (int64_t e = part.index * threads + rank; e < line.edges(); e += part.parts * threads)
      out.row.store(line.class_of_edge(e), line.at(line.class_of_edge(e)) * factor);
  }
}

template <class T, bool kGeneral>
void start_forward(const Call& call, const Plan& plan, void* workspace, void* stream) {
  if (plan.form == Plan::kSplit) {
    auto* sums = static_cast<Stats<Acc<T>>*>(workspace);
    launch("part_kernel", part_kernel<T, kGeneral>, plan.grid, stream, call, sums, plan.parts);
    launch("merge_kernel", merge_kernel<T, kGeneral>, plan.second_grid, stream, call, sums, plan.parts);
    return;
  }
  Grid grid = plan.grid;
  if constexpr (sizeof(T) < 8) {
    if (plan.form == Plan::kOnChip) {
      if (launch_if_it_fits("row_kernel, on chip", row_kernel<T, kGeneral, true>, grid, stream, call,
                            plan.team_threads))
        return;
      grid = plan.second_grid;
    }
  }
  launch("row_kernel", row_kernel<T, kGeneral, false>, grid, stream, call, plan.team_threads);
}

// The kernels of one dtype, for run.cpp: explicit instantiations in a translation unit for each.
template <class T>
void forward_of(const Call& call, const Plan& plan, void* workspace, void* stream) {
  call.general() ? start_forward<T, true>(call, plan, workspace, stream)
                 : start_forward<T, false>(call, plan, workspace, stream);
}

template <class T>
void backward_of(const Call& call, const Plan& plan, void* stream) {
  call.general() ? launch("grad_kernel", grad_kernel<T, true>, plan.grid, stream, call, plan.team_threads, plan.parts)
                 : launch("grad_kernel", grad_kernel<T, false>, plan.grid, stream, call, plan.team_threads, plan.parts);
}

template <class T>
void scale_of(const View& grad, const void* scale, int64_t n, int64_t k, const Plan& plan, void* stream) {
  launch("scale_kernel", scale_kernel<T>, plan.grid, stream, grad, static_cast<const Acc<T>*>(scale), n, k, plan.parts);
}

#define LSK_INSTANTIATE(T)                                             \
  template void forward_of<T>(const Call&, const Plan&, void*, void*); \
  template void backward_of<T>(const Call&, const Plan&, void*);       \
  template void scale_of<T>(const View&, const void*, int64_t, int64_t, const Plan&, void*);

}  // namespace lsk

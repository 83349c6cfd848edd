// The kernels for any GPU: loss and gradient of the rows of logits, by teams of threads.
//
// row_kernel makes both. A team, a warp or a block, reads a row a second time, backwards, from what of it the caches
// still hold: 2 to 3 units of N·K elements. Where the row fits, it stays in the shared memory of its block instead
// (8.0 to 8.9): 2 units. part_kernel and merge_kernel spread few long rows over all multiprocessors. grad_kernel makes
// a gradient from what was saved. No atomics: every sum has one order, whatever runs when.
#pragma once

#include "cluster.h"
#include "run.h"

namespace lsk {

template <bool kGeneral, bool kOnChip>
constexpr int kBlocks = kGeneral  ? 1
                        : kOnChip ? 3
                                  : 2;  // to a multiprocessor, for which registers must suffice

// The threads that work on one row.
struct Team {
  int rank, size;       // of the team
  int64_t first, step;  // row, and rows that all teams of the grid take at a time

  __device__ explicit Team(int threads) : rank(thread_id() % threads), size(threads) {
    const int64_t teams = block_threads() / threads;
    first = block_id() * teams + thread_id() / threads;
    step = grid_blocks() * teams;
  }

  // The sums of all of the team's threads, in each of them.
  template <bool kGeneral, class V>
  __device__ Stats<V> merged(Stats<V> s, bool finds) const {
    s = of_warp<kGeneral>(s, finds);
    warp_barrier();
    if (size == kWarp) return s;
    Stats<V>* slots = reinterpret_cast<Stats<V>*>(shared_memory());
    const int lane = thread_id() % kWarp;
    if (lane == 0) slots[thread_id() / kWarp] = s;
    block_barrier();
    s = lane < size / kWarp ? slots[lane] : no_stats<V>();
    s = of_warp<kGeneral>(s, finds);
    block_barrier();  // the slots are free for the next row
    return s;
  }
};

// This thread's share, one of `threads`, of the sums over a part; several loads ahead of their use.
template <class T, bool kGeneral>
LSK_DEVICE void sum_part(const Line<T>& line, const Part& part, int rank, int threads, const Given<T, kGeneral>& given,
                         Sums<T, kGeneral>& sums) {
  const T* first = line.vector(part.begin);
  for_vectors<kTogether<T, kGeneral>>(rank, part.count, threads, [&](int i, auto together) {
    constexpr int C = decltype(together)::value;
    Bits16 bits[C];
    LSK_GROUPS(c) bits[c] = load16(first + int64_t(i + c * threads) * kLanes<T>);
    sums.template add<C>(bits, i, line.class_of_vector(part.begin + i), threads * kLanes<T>, given);
  });
  const auto again = [&](int i) { return load16(first + int64_t(i) * kLanes<T>); };
  sums.template find<kTogether<T, kGeneral>>(again, part.count, threads, line.class_of_vector(part.begin), given);
}

// The same of a part that this thread's copies bring into shared memory, batch by batch; no other thread reads them.
template <int kBatch, class T, bool kGeneral>
LSK_DEVICE void sum_batches(const Line<T>& line, const Part& part, int rank, int threads, const Bits16* on_chip,
                            const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  wait_for_batch<kBatches - 1 - kBatch>();
  sum_batch(kBatch, line, part, rank, threads, on_chip, given, sums);
  if constexpr (kBatch + 1 < kBatches) sum_batches<kBatch + 1>(line, part, rank, threads, on_chip, given, sums);
}

template <class T, bool kGeneral>
LSK_DEVICE void sum_on_chip(const Line<T>& line, const Part& part, int rank, int threads, Bits16* on_chip,
                            const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  const T* first = line.vector(part.begin);
  for (int batch = 0, i = rank; batch < kBatches; ++batch) {
    for (int u = 0; u < kInBatch; ++u, i += threads)
      if (i < part.count) copy16(on_chip + i, first + int64_t(i) * kLanes<T>);
    end_batch();
  }
  sum_batches<0>(line, part, rank, threads, on_chip, given, sums);
  find_on_chip(line, part, threads, on_chip, given, sums);
}

template <class T, bool kGeneral, bool kOnChip>
LSK_DEVICE void rows(const Call& call, int team_threads) {
  using V = Acc<T>;
  const Team team(team_threads);
  Bits16* on_chip = kOnChip ? reinterpret_cast<Bits16*>(shared_memory() + kSlotBytes) : nullptr;
  for (int64_t row = team.first; row < call.n; row += team.step) {
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    const Part part = part_of(line.vectors, line.vectors, 0, 1);
    Hot<T, kGeneral> hot(row, given);
    hot.read(line);
    Sums<T, kGeneral> sums;
    if (!call.unread(row)) {
      if (kOnChip)
        sum_on_chip(line, part, team.rank, team.size, on_chip, given, sums);
      else
        sum_part(line, part, team.rank, team.size, given, sums);
      sum_edges(line, part, team.rank, team.size, given, sums);
    }
    Stats<V> s = team.template merged<kGeneral>(sums.stats(), call.prediction != nullptr);
    hot.join(s);
    const RowEnd<V> end = call.ended(row, s);
    if (team.rank == 0) call.template store<kGeneral>(row, call.ended(row, s));
    if (!call.grad) continue;
    const Output<T> out(call.grad, line, row);
    if (call.ignored(row)) {
      clear_part(line, part, team.rank, team.size, out);
      continue;
    }
    const Rule<T, kGeneral> rule(given, row, end.zmax, end.logsum, end.mass, end.count);
    const bool has_target = writes(line, part, team.rank, team.size, hot.y);
    const V of_target = has_target ? rule.at_target(hot.x, hot.y) : V(0);
    if (kOnChip)
      write_on_chip(line, part, team.rank, team.size, on_chip, rule, out);
    else
      write_part(line, part, team.rank, team.size, rule, out);
    write_edges(line, part, team.rank, team.size, rule, out);
    if (has_target) out.row.store(hot.y, of_target);
  }
}

template <class T, bool kGeneral, bool kOnChip>
LSK_KERNEL((kBlocks<kGeneral, kOnChip>))
row_kernel(const Call call, const int team_threads) {
  if constexpr (!kOnChip || kCopiesOnChip) rows<T, kGeneral, kOnChip>(call, team_threads);
}

// The sums of one of `parts` parts of a row, a block each.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
part_kernel(const Call call, Stats<Acc<T>>* sums_of_parts, const int parts, const int64_t each) {
  const Team team(block_threads());
  for (int64_t unit = team.first; unit < call.n * parts; unit += team.step) {
    const int64_t row = unit / parts;
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    const Part part = part_of(line.vectors, each, static_cast<unsigned>(unit % parts), parts);
    Sums<T, kGeneral> sums;
    if (!call.unread(row)) {
      sum_part(line, part, team.rank, team.size, given, sums);
      sum_edges(line, part, team.rank, team.size, given, sums);
    }
    const Stats<Acc<T>> s = team.template merged<kGeneral>(sums.stats(), call.prediction != nullptr);
    if (team.rank == 0) sums_of_parts[unit] = s;
  }
}

// A row from the sums of its parts, a warp each.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
merge_kernel(const Call call, const Stats<Acc<T>>* sums_of_parts, const int parts) {
  const Team team(kWarp);
  for (int64_t row = team.first; row < call.n; row += team.step) {
    Stats<Acc<T>> s = no_stats<Acc<T>>();
    for (int64_t i = team.rank; i < parts; i += kWarp) s = merge(s, sums_of_parts[row * parts + i]);
    s = team.template merged<kGeneral>(s, call.prediction != nullptr);
    const Line<T> line(call.logits, row, call.k);
    const Given<T, kGeneral> given(call, line, row);
    Hot<T, kGeneral> hot(row, given);
    hot.read(line);
    hot.join(s);
    if (team.rank == 0) call.template store<kGeneral>(row, call.ended(row, s));
  }
}

// A gradient from what was saved, a team for each of `parts` parts of a row; it may lie over the logits.
template <class T, bool kGeneral>
LSK_KERNEL((kBlocks<kGeneral, false>))
grad_kernel(const Call call, const int team_threads, const int parts, const int64_t each) {
  using V = Acc<T>;
  const Team team(team_threads);
  for (int64_t unit = team.first; unit < call.n * parts; unit += team.step) {
    const int64_t row = unit / parts;
    const Line<T> line(call.logits, row, call.k);
    const Part part = part_of(line.vectors, each, static_cast<unsigned>(unit % parts), parts);
    const Output<T> out(call.grad, line, row);
    if (call.ignored(row)) {
      clear_part(line, part, team.rank, team.size, out);
      continue;
    }
    const Given<T, kGeneral> given(call, line, row);
    const Rule<T, kGeneral> rule(given, row, call.zmax.get<V>(row), call.logsum.get<V>(row), call.mass.get<V>(row),
                                 call.count.get<V>(row));
    Hot<T, kGeneral> hot(row, given);
    const bool has_target = writes(line, part, team.rank, team.size, hot.y);
    if (has_target) hot.read(line);
    const V of_target = has_target ? rule.at_target(hot.x, hot.y) : V(0);
    write_part(line, part, team.rank, team.size, rule, out);
    write_edges(line, part, team.rank, team.size, rule, out);
    if (has_target) out.row.store(hot.y, of_target);
  }
}

// grad *= scale, which lies on the device: nothing is written where it is 1.
template <class T>
LSK_KERNEL((kBlocks<false, false>))
scale_kernel(const View grad, const Acc<T>* scale, const int64_t n, const int64_t k, const int parts,
             const int64_t each) {
  const Acc<T> factor = *scale;
  if (factor == 1) return;
  const int rank = thread_id(), threads = block_threads();
  for (int64_t unit = block_id(); unit < n * parts; unit += grid_blocks()) {
    const int64_t row = unit / parts;
    const Line<T> line(grad, row, k);
    const Part part = part_of(line.vectors, each, static_cast<unsigned>(unit % parts), parts);
    const Output<T> out(grad, line, row);
    const T* first = line.vector(part.begin);
    for_stores<2>(line, part, out, [&](auto store, auto most) {  // more of them at a time spill on sm_100
      const auto scale_vectors = [&](int i, auto together) {
        constexpr int C = decltype(together)::value;
        Bits16 bits[C];
        LSK_GROUPS(c) bits[c] = load16(first + int64_t(i + c * threads) * kLanes<T>);
        LSK_GROUPS(c) {
          Lanes<Acc<T>, kLanes<T>> g = unpack<T>(bits[c]);
          _Pragma("unroll") for (int j = 0; j < kLanes<T>; ++j) g.v[j] *= factor;
          store(i + c * threads, g);
        }
      };
      for_vectors<decltype(most)::value>(rank, part.count, threads, scale_vectors);
    });
    for_edges(line, part, rank, threads, [&](int64_t k) { out.row.store(k, line.at(k) * factor); });
  }
}

template <class T, bool kGeneral>
void start_forward(const Call& call, const Plan& plan, void* workspace, void* stream) {
  if (plan.form == Plan::kSplit) {
    auto* sums = static_cast<Stats<Acc<T>>*>(workspace);
    launch("part_kernel", part_kernel<T, kGeneral>, plan.grid, stream, call, sums, plan.parts, plan.each);
    launch("merge_kernel", merge_kernel<T, kGeneral>, plan.second_grid, stream, call, sums, plan.parts);
    return;
  }
  if constexpr (sizeof(T) < 8) {
    if (plan.form == Plan::kCluster)
      return launch("cluster_kernel", cluster_kernel<T, kGeneral>, plan.grid, stream, call, plan.each);
    if (plan.form == Plan::kOnChip)
      return launch("row_kernel, on chip", row_kernel<T, kGeneral, true>, plan.grid, stream, call, plan.team_threads);
  }
  launch("row_kernel", row_kernel<T, kGeneral, false>, plan.grid, stream, call, plan.team_threads);
}

// The kernels of one dtype, for run.cpp: explicit instantiations in a translation unit for each.
template <class T>
void forward_of(const Call& call, const Plan& plan, void* workspace, void* stream) {
  call.general() ? start_forward<T, true>(call, plan, workspace, stream)
                 : start_forward<T, false>(call, plan, workspace, stream);
}

template <class T>
void backward_of(const Call& call, const Plan& plan, void* stream) {
  call.general()
      ? launch("grad_kernel", grad_kernel<T, true>, plan.grid, stream, call, plan.team_threads, plan.parts, plan.each)
      : launch("grad_kernel", grad_kernel<T, false>, plan.grid, stream, call, plan.team_threads, plan.parts, plan.each);
}

template <class T>
void scale_of(const View& grad, const void* scale, int64_t n, int64_t k, const Plan& plan, void* stream) {
  launch("scale_kernel", scale_kernel<T>, plan.grid, stream, grad, static_cast<const Acc<T>*>(scale), n, k, plan.parts,
         plan.each);
}

#define LSK_INSTANTIATE(T)                                             \
  template void forward_of<T>(const Call&, const Plan&, void*, void*); \
  template void backward_of<T>(const Call&, const Plan&, void*);       \
  template void scale_of<T>(const View&, const void*, int64_t, int64_t, const Plan&, void*);

}  // namespace lsk

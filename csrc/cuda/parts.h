// The parts of a row that threads sum and write: what every form of a kernel is made of.
#pragma once

#include <type_traits>

#include "rule.h"
#include "sums.h"

namespace lsk {

template <class T, bool kGeneral>  // vectors that a thread takes at a time; with options a class is several loads
constexpr int kTogether = kGeneral         ? 1
                          : sizeof(T) == 8 ? 2
                                           : 4;

// One of the parts of a row: its vectors from `begin` on, and in turns with the others the edges.
struct Part {
  int64_t begin;
  int count;
  unsigned index, parts;
};

// `each`: vectors of a part, those of the last may be fewer.
LSK_DEVICE Part part_of(int64_t vectors, int64_t each, unsigned index, unsigned parts) {
  const int64_t begin = index * each < vectors ? index * each : vectors, rest = vectors - begin;
  return {begin, static_cast<int>(each < rest ? each : rest), index, parts};
}

template <int C>
using Several = std::integral_constant<int, C>;

// f(i, C) for i = rank, rank + threads, ... below `count`: C of them at a time, the last ones alone.
template <int C, class F>
LSK_DEVICE void for_vectors(int rank, int count, int threads, const F& f) {
  int i = rank;
  _Pragma("unroll 1") for (; i + (C - 1) * threads < count; i += C * threads) f(i, Several<C>());
  if constexpr (C > 1) _Pragma("unroll 1") for (; i < count; i += threads) f(i, Several<1>());
}

// f(k) for the edges that are this thread's.
template <class T, class F>
LSK_DEVICE void for_edges(const Line<T>& line, const Part& part, int rank, int threads, const F& f) {
  const int64_t step = int64_t(part.parts) * threads;
  for (int64_t e = int64_t(part.index) * threads + rank; e < line.edges(); e += step) f(line.class_of_edge(e));
}

// The sums over a batch of a part on chip.
template <class T, bool kGeneral>
LSK_DEVICE void sum_batch(int batch, const Line<T>& line, const Part& part, int rank, int threads,
                          const Bits16* on_chip, const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  const int begin = batch * kInBatch * threads, end = begin + kInBatch * threads;
  for_vectors<kTogether<T, kGeneral>>(
      begin + rank, end < part.count ? end : part.count, threads, [&](int v, auto together) {
        constexpr int C = decltype(together)::value;
        Bits16 bits[C];
        LSK_GROUPS(c) bits[c] = on_chip[v + c * threads];
        sums.template add<C>(bits, v, line.class_of_vector(part.begin + v), threads * kLanes<T>, given);
      });
}

template <class T, bool kGeneral>
LSK_DEVICE void find_on_chip(const Line<T>& line, const Part& part, int threads, const Bits16* on_chip,
                             const Given<T, kGeneral>& given, Sums<T, kGeneral>& sums) {
  const auto again = [&](int i) { return on_chip[i]; };
  sums.template find<kTogether<T, kGeneral>>(again, part.count, threads, line.class_of_vector(part.begin), given);
}

template <class T, bool kGeneral>
LSK_DEVICE void sum_edges(const Line<T>& line, const Part& part, int rank, int threads, const Given<T, kGeneral>& given,
                          Sums<T, kGeneral>& sums) {
  for_edges(line, part, rank, threads, [&](int64_t k) { sums.add_one(line.at(k), k, given); });
}

// f(store, C): store(i, g) stores the gradient of vector i of a part. C vectors at a time and each of them at once, or
// where the gradient's memory or dtype does not allow that, one number after the other.
template <int C, class T, class F>
LSK_DEVICE void for_stores(const Line<T>& line, const Part& part, const Output<T>& out, const F& f) {
  char* to = out.row.data + line.class_of_vector(part.begin) * sizeof(T);
  if (out.wide_accesses)
    f([=](int i, const Lanes<Acc<T>, kLanes<T>>& g) { store16(to + 16 * int64_t(i), pack<T>(g)); }, Several<C>());
  else
    f([&](int i, const Lanes<Acc<T>, kLanes<T>>& g) { out.store_one_by_one(line.class_of_vector(part.begin + i), g); },
      Several<1>());
}

template <class T, bool kGeneral>
LSK_DEVICE void write_on_chip(const Line<T>& line, const Part& part, int rank, int threads, const Bits16* on_chip,
                              const Rule<T, kGeneral>& rule, const Output<T>& out) {
  for_stores<kTogether<T, kGeneral>>(line, part, out, [&](auto store, auto most) {
    for_vectors<decltype(most)::value>(rank, part.count, threads, [&](int i, auto together) {
      constexpr int C = decltype(together)::value;
      LSK_GROUPS(c) {
        const int v = i + c * threads;
        store(v, rule.at(unpack<T>(on_chip[v]), line.class_of_vector(part.begin + v)));
      }
    });
  });
}

// The same of a part that is read again; backwards, so that what was read last is read first. Loads go ahead of stores,
// which the compiler cannot do for them: the gradient may lie over the logits, each thread's over its own.
template <class T, bool kGeneral>
LSK_DEVICE void write_part(const Line<T>& line, const Part& part, int rank, int threads, const Rule<T, kGeneral>& rule,
                           const Output<T>& out) {
  const Bits16* from = reinterpret_cast<const Bits16*>(line.vector(part.begin));
  const int last = rank + (part.count - 1 - rank) / threads * threads;  // of this thread's vectors, if there are any
  for_stores<kTogether<T, kGeneral>>(line, part, out, [&](auto store, auto most) {
    for_vectors<decltype(most)::value>(rank, part.count, threads, [&](int i, auto together) {
      constexpr int C = decltype(together)::value;
      Bits16 bits[C];
      LSK_GROUPS(c) bits[c] = load16(from + (last + rank - i - c * threads));
      LSK_GROUPS(c) {
        const int v = last + rank - i - c * threads;
        store(v, rule.at(unpack<T>(bits[c]), line.class_of_vector(part.begin + v)));
      }
    });
  });
}

template <class T, bool kGeneral>
LSK_DEVICE void write_edges(const Line<T>& line, const Part& part, int rank, int threads, const Rule<T, kGeneral>& rule,
                            const Output<T>& out) {
  for_edges(line, part, rank, threads,
            [&](int64_t k) { out.row.store(k, rule.at(Lanes<Acc<T>, 1>{{line.at(k)}}, k).v[0]); });
}

// Whether it is this thread that writes the gradient of class y, which is negative where there is none.
template <class T>
LSK_DEVICE bool writes(const Line<T>& line, const Part& part, int rank, int threads, int64_t y) {
  if (y < 0) return false;
  const int64_t behind = line.head + line.vectors * kLanes<T>;
  if (y < line.head || y >= behind) {
    const int64_t e = y < line.head ? y : y - behind + line.head;
    return e % (int64_t(part.parts) * threads) == int64_t(part.index) * threads + rank;
  }
  const int64_t i = (y - line.head) / kLanes<T> - part.begin;
  return i >= 0 && i < part.count && i % threads == rank;
}

// The gradient of an ignored row, whatever its logits are.
template <class T>
LSK_DEVICE void clear_part(const Line<T>& line, const Part& part, int rank, int threads, const Output<T>& out) {
  for_stores<1>(line, part, out, [&](auto store, auto) {
    for (int i = rank; i < part.count; i += threads) store(i, {});
  });
  for_edges(line, part, rank, threads, [&](int64_t k) { out.row.store(k, 0); });
}

}  // namespace lsk

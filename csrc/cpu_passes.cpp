// Loss, statistics and gradients, block by block.
//
// Bytes: the logits are read from memory once and the gradient is written once; nothing else of size N×K exists.
// Threads take rows, or blocks of rows where rows are few and long. Both sum the same blocks in the same order, so that
// the bits of a result do not depend on the number of threads.
#include "cpu_passes.h"

#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu_kernels.h"

namespace lsk {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth waking a thread for
constexpr int64_t kMaxRows = 32;

const RowKernels& rows_of(Dtype dtype) { return cpu_kernels().rows[dtype]; }
const BlockKernels& blocks_of(const Call& call) { return cpu_kernels().blocks[call.wide]; }

// How a call is cut. Where classes are not adjacent, a tile takes the rows that share its cache lines; with class
// vectors two rows, which find a block of them in the first-level cache. A block stays in
// a first-level cache between the sweeps over it (a second-level cache for a tile of many rows).
struct Plan {
  const Call& call;
  bool simple, strided;
  int64_t tile_rows, tiles_per_inner, tiles, block, blocks;
  std::vector<double> masses;  // Σ r of each block where it is every row's

  explicit Plan(const Call& c)
      : call(c),
        simple(c.simple()),
        strided(c.logits.class_stride != 1 || (c.grad && c.grad.class_stride != 1) ||
                c.probabilities.class_stride != 1),
        tile_rows(strided                    ? 64 / c.logits.element
                  : c.rest && c.softcap == 0 ? 2
                                             : 1),
        tiles_per_inner((c.logits.inner + tile_rows - 1) / tile_rows),
        tiles(c.logits.inner == 0 ? 0 : c.n / c.logits.inner * tiles_per_inner),
        block((strided ? 1 : 4) * 1024),
        blocks((c.k + block - 1) / block) {
    if (!call.rest || call.finite) return;
    for (int64_t k = 0; k < call.k; k += block)
      masses.push_back(blocks_of(call).sum(call.rest.at(k), std::min(block, call.k - k)));
  }

  // Too few tiles to keep the threads evenly busy.
  bool split() const { return blocks > 1 && tiles < 4 * at::get_num_threads(); }
};

struct Piece {
  int64_t row, rows, begin, n;

  Piece(const Plan& plan, int64_t tile, int64_t b) : row(tile), rows(1), begin(b * plan.block) {
    n = std::min(plan.block, plan.call.k - begin);
    if (plan.tile_rows == 1) return;
    const int64_t inner = plan.call.logits.inner, first = tile % plan.tiles_per_inner * plan.tile_rows;
    row = tile / plan.tiles_per_inner * inner + first;
    rows = std::min(plan.tile_rows, inner - first);
  }
};

struct Free {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// One thread's hands on a call, and the memory it works in.
class Worker {
 public:
  // `keep`: a tile's stats come before its gradients, which then find the transformed logits of the whole row.
  explicit Worker(const Plan& plan, bool keep = false);

  // parts[r] of every row of the piece.
  void stats(const Piece& p, Stats<double>* parts);

  void gradients(const Piece& p);

 private:
  int64_t offset(const Piece& p) const { return keep_ ? p.begin * width_ : 0; }
  char* own(const Piece& p, int64_t r) const { return z_ + r * pitch_ * width_ + offset(p); }
  char* slope(const Piece& p) const { return call_.softcap == 0 ? nullptr : slope_ + offset(p); }
  double masked() const { return call_.finite ? -INFINITY : NAN; }

  static Tile tile_of(const View& view, const Piece& p) { return {p.rows, p.n, view.row_stride, view.class_stride}; }

  void gather(const Piece& p, bool logits);

  // z of a row of the piece, where it lies or in memory of our own, with the cap's slope beside it.
  const char* transformed(const Piece& p, int64_t r) {
    const char* x = native_ ? call_.logits.at(p.row + r, p.begin) : own(p, r);
    if (!call_.transforms()) return x;
    blocks_.transform(x, own(p, r), slope(p), p.n, call_.logit_scale, call_.softcap);
    return own(p, r);
  }

  // The row's given targets without class weights; null for an index.
  const char* given(const Piece& p, int64_t r) const {
    if (!call_.probabilities) return nullptr;
    return given_moves_ ? t_ + r * pitch_ * width_ : call_.probabilities.at(p.row + r, p.begin);
  }

  // The same with them.
  const char* weighted_given(const Piece& p, int64_t r) {
    const char* t = given(p, r);
    if (t == nullptr || !call_.weight) return t;
    blocks_.multiply(t, call_.weight.at(p.begin), q_, p.n);
    return q_;
  }

  void mix(const Piece& p, int64_t r, const char* z, Weights<double> w) {
    blocks_.mix(z, weighted_given(p, r), call_.rest.at(p.begin), q_, p.n, w, masked());
  }

  // The class of the target in the piece; -1 where it is elsewhere or given by probabilities.
  int64_t hot(const Piece& p, int64_t row) const {
    const int64_t y = call_.target == nullptr ? -1 : call_.target[row] - p.begin;
    return y >= 0 && y < p.n && !call_.ignored(row) ? y : -1;
  }

  Stats<double> row_stats(const Piece& p, int64_t r);
  void row_gradient(const Piece& p, int64_t r, char* g);
  void row_target_gradient(const Piece& p, int64_t r, char* g);

  const Plan& plan_;
  const Call& call_;
  const bool keep_;
  const Dtype acc_;
  const int64_t width_;  // bytes of an element of the arithmetic
  const double scale_;   // the factor of what the kernels are given: 1 after a transform
  const BlockKernels& blocks_;
  const bool native_;  // the logits are worked on where they lie, in their dtype
  const RowKernels& rows_;
  const int64_t element_;   // bytes of an element of what rows_ works on
  const bool given_moves_;  // given targets are worked on in t_, not where they lie
  const int64_t pitch_;     // elements between rows of z_ and t_
  std::unique_ptr<char, Free> memory_;
  char *z_ = nullptr, *t_ = nullptr, *q_ = nullptr, *slope_ = nullptr;
};

Worker::Worker(const Plan& plan, bool keep)
    : plan_(plan),
      call_(plan.call),
      keep_(keep),
      acc_(call_.wide ? kFloat64 : kFloat32),
      width_(call_.wide ? 8 : 4),
      scale_(call_.transforms() ? 1 : call_.factor()),
      blocks_(blocks_of(call_)),
      native_(call_.logits.class_stride == 1 && (call_.logits.dtype == acc_ || (plan.simple && !plan.strided))),
      rows_(rows_of(native_ ? call_.logits.dtype : acc_)),
      element_(native_ ? call_.logits.element : width_),
      given_moves_(call_.probabilities && (call_.probabilities.class_stride != 1 || call_.probabilities.dtype != acc_)),
      pitch_((keep ? plan.blocks * plan.block : plan.block) + 32) {  // no power of two: it would strain few cache sets
  if (plan.simple && native_ && !plan.strided) return;
  const int64_t row = pitch_ * width_, tile = row * plan.tile_rows;
  memory_.reset(static_cast<char*>(::operator new(2 * tile + 2 * row, std::align_val_t(64))));
  z_ = memory_.get();
  t_ = z_ + tile;
  q_ = t_ + tile;
  slope_ = q_ + row;
}

void Worker::stats(const Piece& p, Stats<double>* parts) {
  gather(p, true);
  for (int64_t r = 0; r < p.rows; ++r) parts[r] = call_.unread(p.row + r) ? no_stats<double>() : row_stats(p, r);
}

void Worker::gradients(const Piece& p) {
  gather(p, !keep_);
  const bool direct = call_.grad.class_stride == 1 && call_.grad.element == element_;
  for (int64_t r = 0; r < p.rows; ++r) {
    char* g = direct ? call_.grad.at(p.row + r, p.begin) : own(p, r);
    if (call_.ignored(p.row + r))
      std::memset(g, 0, p.n * element_);
    else
      call_.grad_of_target ? row_target_gradient(p, r, g) : row_gradient(p, r, g);
  }
  const View& g = call_.grad;
  if (!direct) rows_of(g.dtype).scatter(g.at(p.row, p.begin), tile_of(g, p), own(p, 0), pitch_);
}

void Worker::gather(const Piece& p, bool logits) {
  const View &x = call_.logits, &t = call_.probabilities;
  if (logits && !native_) rows_of(x.dtype).gather(x.at(p.row, p.begin), tile_of(x, p), own(p, 0), pitch_);
  if (given_moves_) rows_of(t.dtype).gather(t.at(p.row, p.begin), tile_of(t, p), t_, pitch_);
}

Stats<double> Worker::row_stats(const Piece& p, int64_t r) {
  const char* z = transformed(p, r);
  const char* ahead = plan_.strided ? z : call_.logits.at(p.row + r, p.begin + p.n);
  const char* classes = call_.rest.at(p.begin);
  Stats<double> s = classes != nullptr || call_.finite || call_.probabilities
                        ? rows_.class_block(z, classes, weighted_given(p, r), p.n, scale_, masked(), ahead)
                        : rows_.block(z, p.n, scale_, ahead);
  if (!plan_.masses.empty()) s.rest.mass = plan_.masses[p.begin / plan_.block];
  const double shift = origin(s.max);
  s.cover = s.rest.mass;
  if (call_.finite && call_.weight)
    s.cover = rows_.class_block(z, call_.prior.at(p.begin), nullptr, p.n, scale_, masked(), z).rest.mass;
  const int64_t y = hot(p, p.row + r);
  if (y >= 0) {
    const double zy = std::fma(rows_.value(z + y * element_), scale_, -shift), wy = call_.weight[p.begin + y];
    s.t = {1, zy};
    s.wt = {wy, weighted(wy, zy)};
  } else if (call_.probabilities && call_.nll) {
    s.t = call_.weight ? rows_.class_block(z, nullptr, given(p, r), p.n, scale_, NAN, z).wt : s.wt;
  }
  if (call_.spreads()) s.spread = blocks_.spread(z, p.n, scale_, shift);
  if (call_.prediction != nullptr) s.best = p.begin + std::min(rows_.find(z, p.n, scale_, s.max), p.n - 1);
  return s;
}

void Worker::row_gradient(const Piece& p, int64_t r, char* g) {
  const int64_t row = p.row + r;
  const char* z = keep_ ? own(p, r) : transformed(p, r);
  const Weights<double> w = call_.row_weights(row, call_.count[row]);
  const double zmax = call_.zmax[row], logsum = call_.logsum[row];
  const double mass = call_.mass[row] + 2 * call_.z_loss * (zmax + logsum);
  GradientRow rule = {scale_, zmax, logsum, mass, 0, w.b, call_.scale[row] * call_.logit_scale, call_.penalty};
  const int64_t y = hot(p, row);
  if (y >= 0) {
    const bool covered = !call_.finite || rows_.value(z + y * element_) > -INFINITY;
    rule.q_target = w.a * call_.weight[p.begin + y] + (covered ? w.b * call_.rest[p.begin + y] : 0);
  }
  const char* classes = call_.rest.at(p.begin);
  if (call_.finite || call_.probabilities) {
    mix(p, r, z, w);
    classes = q_;
    rule.q_rest = 1;
  }
  if (classes != nullptr || call_.softcap != 0)
    rows_.class_gradient(z, classes, slope(p), g, p.n, y, rule);
  else
    rows_.gradient(z, g, p.n, y, rule);
}

void Worker::row_target_gradient(const Piece& p, int64_t r, char* g) {
  const int64_t row = p.row + r;
  const char* z = transformed(p, r);
  const Weights<double> w = call_.row_weights(row, call_.count[row]);
  mix(p, r, z, w);
  blocks_.target_gradient(z, q_, g, p.n,
                          {scale_, call_.zmax[row], call_.logsum[row], 0, 0, 0, call_.scale[row] * w.a, 0});
  if (call_.weight) blocks_.multiply(g, call_.weight.at(p.begin), g, p.n);
}

template <class F>
void for_tiles(const Plan& plan, bool keep, const F& f) {
  const int64_t each = std::max<int64_t>(1, plan.tile_rows * plan.call.k);
  at::parallel_for(0, plan.tiles, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
    Worker worker(plan, keep);
    for (int64_t tile = begin; tile < end; ++tile) f(worker, tile);
  });
}

template <class F>
void for_pieces(const Plan& plan, const F& f) {
  const int64_t each = plan.tile_rows * plan.block;
  at::parallel_for(0, plan.tiles * plan.blocks, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
    Worker worker(plan);
    for (int64_t i = begin; i < end; ++i) f(worker, Piece(plan, i / plan.blocks, i % plan.blocks), i % plan.blocks);
  });
}

}  // namespace

at::Tensor in_large_pages(at::Tensor fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return fresh;
}

void run_forward(const Call& call) {
  if (call.few()) return run_few(call, true);
  const Plan plan(call);
  if (plan.split()) {
    std::vector<Stats<double>> parts(call.n * plan.blocks);
    for_pieces(plan, [&](Worker& worker, const Piece& p, int64_t b) {
      Stats<double> part[kMaxRows];
      worker.stats(p, part);
      for (int64_t r = 0; r < p.rows; ++r) parts[(p.row + r) * plan.blocks + b] = part[r];
    });
    for (int64_t row = 0; row < call.n; ++row) {
      Stats<double> s = parts[row * plan.blocks];
      for (int64_t b = 1; b < plan.blocks; ++b) s = merge(s, parts[row * plan.blocks + b]);
      call.store(row, call.ended(row, s));
    }
    if (call.grad) run_backward(call);
    return;
  }
  const bool keep = call.grad && call.softcap != 0 && !plan.strided;  // a cap costs more than to store it
  for_tiles(plan, keep, [&](Worker& worker, int64_t tile) {
    Stats<double> total[kMaxRows], part[kMaxRows];
    const Piece first(plan, tile, 0);
    worker.stats(first, total);
    for (int64_t b = 1; b < plan.blocks; ++b) {
      worker.stats(Piece(plan, tile, b), part);
      for (int64_t r = 0; r < first.rows; ++r) total[r] = merge(total[r], part[r]);
    }
    for (int64_t r = 0; r < first.rows; ++r) call.store(first.row + r, call.ended(first.row + r, total[r]));
    for (int64_t b = 0; call.grad && b < plan.blocks; ++b) worker.gradients(Piece(plan, tile, b));
  });
}

void run_backward(const Call& call) {
  if (call.few()) return run_few(call, false);
  const Plan plan(call);
  if (plan.split()) return for_pieces(plan, [](Worker& worker, const Piece& p, int64_t) { worker.gradients(p); });
  for_tiles(plan, false, [&](Worker& worker, int64_t tile) {
    for (int64_t b = 0; b < plan.blocks; ++b) worker.gradients(Piece(plan, tile, b));
  });
}

void run_scale(const View& grad, int64_t n, int64_t k, double factor) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rows_of(grad.dtype).scale(grad.at(row, 0), k, factor);
  });
}

void run_add_split(uint16_t* high, uint8_t* low, const uint16_t* x, int64_t n, bool last) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    cpu_kernels().add_split(high + begin, low + begin, x + begin, end - begin, last);
  });
}

}  // namespace lsk

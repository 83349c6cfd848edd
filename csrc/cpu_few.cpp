// Loss, statistics and gradients of rows of few classes, block by block.
//
// Bytes: as in cpu_passes.cpp. What a long row spreads over its classes, such as its logarithm, is most of the time of
// two classes; lanes that are rows share it. Blocks are the same for any number of threads, and so are the bits.
#include <ATen/Parallel.h>

#include <memory>
#include <new>

#include "cpu_kernels.h"
#include "cpu_passes.h"

namespace lsk {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth waking a thread for
constexpr int64_t kWidest = 16;    // lanes of the widest vector
constexpr int64_t kBlock = 4096;   // elements of a block, in a first-level cache beside what they are read from
constexpr int64_t kLeast = 32, kMost = 256;  // rows of a block: two cache lines; where more of them gain nothing

struct Free {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// One thread's block of rows.
class Block {
 public:
  Block(const Call& call, int64_t rows)
      : call_(call),
        kernels_(cpu_kernels().blocks[call.wide]),
        // A vector may reach beyond the last row; and no power of two, which would strain few cache sets.
        pitch_(rows + kWidest),
        z_(fresh()),
        t_(call.probabilities ? fresh() : nullptr),
        block_{z_.get(), t_.get(), pitch_, 0, 0, call.rest ? kernels_.sum(call.rest.data, call.k) : double(call.k)} {}

  void run(int64_t row, int64_t rows, bool forward) {
    block_.row = row;
    block_.rows = rows;
    gather(call_.logits, z_);
    if (t_) gather(call_.probabilities, t_);
    if (call_.factor() != 1)
      for (int64_t k = 0; k < call_.k; ++k) {
        char* z = z_.get() + k * pitch_ * width();
        kernels_.transform(z, z, nullptr, rows, call_.logit_scale, 0);
      }
    (forward ? kernels_.few_forward : kernels_.few_backward)(call_, block_);
    if (!call_.grad) return;
    for_pieces(call_.grad, z_, [&](char* g, const Tile& tile, char* z) {
      cpu_kernels().rows[call_.grad.dtype].scatter(g, tile, z, pitch_);
    });
  }

 private:
  using Memory = std::unique_ptr<char, Free>;

  int64_t width() const { return call_.wide ? 8 : 4; }

  Memory fresh() const {
    return Memory(static_cast<char*>(::operator new(call_.k * pitch_ * width(), std::align_val_t(64))));
  }

  void gather(const View& view, const Memory& block) {
    for_pieces(view, block,
               [&](char* x, const Tile& tile, char* z) { cpu_kernels().rows[view.dtype].gather(x, tile, z, pitch_); });
  }

  // f of each part of the block whose rows are evenly spaced: with rows and classes exchanged, gather and scatter
  // transpose. What a vector writes beyond a part is the next one's, which comes later.
  template <class F>
  void for_pieces(const View& view, const Memory& block, const F& f) {
    for (int64_t r = 0, n; r < block_.rows; r += n) {
      const int64_t row = block_.row + r;
      n = std::min(block_.rows - r, view.inner - row % view.inner);
      f(view.at(row, 0), Tile{call_.k, n, view.class_stride, view.row_stride}, block.get() + r * width());
    }
  }

  const Call& call_;
  const BlockKernels& kernels_;
  const int64_t pitch_;
  const Memory z_, t_;
  FewRows block_;
};

}  // namespace

void run_few(const Call& call, bool forward) {
  const int64_t rows = std::clamp(kBlock / call.k / kLeast * kLeast, kLeast, kMost);
  const int64_t blocks = (call.n + rows - 1) / rows;
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / (rows * call.k)), [&](int64_t begin, int64_t end) {
    Block block(call, rows);
    for (int64_t b = begin; b < end; ++b) block.run(b * rows, std::min(rows, call.n - b * rows), forward);
  });
}

}  // namespace lsk

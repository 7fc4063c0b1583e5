// Adapters' low-rank additions to a linear layer: rows with the same adapter share the pass over its numbers.
// Source: Hu et al. 2021, arXiv:2106.09685.
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 16384;  // below this a thread costs more than it saves
constexpr int kRows = 4, kRanks = 4;                // of one tile of products
constexpr int kOutVectors = 4;                      // of one tile of sums
constexpr std::int64_t kRowsPerPiece = 64;

// Fetches the numbers of some groups into the second cache, one array after the other, while the products of earlier
// ones are computed: memory would rest meanwhile. A pass that leaps from rank to rank has no stream that the hardware
// would see coming.
class Ahead {
 public:
  Ahead() = default;

  // Fetches the first array of group `first` now; the others, up to those of group `end`, are left to operator().
  Ahead(const LowRankArgs& args, std::int64_t element, std::int64_t first, std::int64_t end)
      : args_(&args), element_(element), group_(first), end_(end) {
    enter_group();
    for (; next_ < last_; next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

  // Fetches about as many bytes as the products at hand read.
  __attribute__((always_inline)) void operator()(std::int64_t bytes) {
    if (group_ == end_) return;
    for (std::int64_t i = 0; i < bytes; i += kLine, next_ += kLine) {
      if (next_ >= last_) enter_array();
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;

  void enter_group() {
    const LowRankGroup& g = args_->groups[group_];
    part_ = 0;
    next_ = static_cast<const char*>(g.a);
    last_ = next_ + g.ranks * args_->in * element_;
  }

  __attribute__((noinline)) void enter_array() {
    if (group_ == end_) return;
    const LowRankGroup& g = args_->groups[group_];
    if (part_ < g.num_parts) {
      const LowRankPart& p = g.parts[part_++];
      next_ = static_cast<const char*>(p.b);
      last_ = next_ + p.ranks * p.outputs * element_;
    } else if (++group_ < end_) {
      enter_group();
    }
  }

  const LowRankArgs* args_ = nullptr;
  std::int64_t element_ = 0, group_ = 0, end_ = 0, part_ = 0;
  const char *next_ = nullptr, *last_ = nullptr;
};

// shrunk[i, j] = the product of row i of x and row j of a, for kR rows and kJ ranks.
template <class T, int kR, int kJ>
void shrink_tile(const T* const* x, const T* a, std::int64_t in, float* shrunk, std::int64_t stride, Ahead& ahead) {
  constexpr std::int64_t step = W * Pack<T>::per_lane;
  VF sums[kR][kJ] = {};
  std::int64_t k = 0;
  for (; k + step <= in; k += step) {
    ahead(kJ * W * 4);
    VU right[kJ];
    for (int j = 0; j < kJ; j++) right[j] = load_lanes(a + j * in + k);
    for (int i = 0; i < kR; i++) {
      const VU left = load_lanes(x[i] + k);
      for (int j = 0; j < kJ; j++) sums[i][j] = dot(tag<T>(), sums[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < kR; i++) {
    for (int j = 0; j < kJ; j++) {
      float total = sum(sums[i][j]);
      for (std::int64_t rest = k; rest < in; rest++) total += to_float(x[i][rest]) * to_float(a[j * in + rest]);
      shrunk[i * stride + j] = total;
    }
  }
}

template <class T, int kJ>
void shrink_rows(const T* const* x, const T* a, std::int64_t in, std::int64_t num_rows, float* shrunk,
                 std::int64_t stride, Ahead& ahead) {
  switch (num_rows) {
    case 1: return shrink_tile<T, 1, kJ>(x, a, in, shrunk, stride, ahead);
    case 2: return shrink_tile<T, 2, kJ>(x, a, in, shrunk, stride, ahead);
    case 3: return shrink_tile<T, 3, kJ>(x, a, in, shrunk, stride, ahead);
    default: shrink_tile<T, kRows, kJ>(x, a, in, shrunk, stride, ahead);
  }
}

// Ranks [begin, end) of a group for its rows [first, last).
template <class T>
void shrink(const LowRankArgs& args, const LowRankGroup& g, std::int64_t first, std::int64_t last,
            std::int64_t begin, std::int64_t end, Ahead& ahead) {
  for (std::int64_t row = first; row < last; row += kRows) {
    const T* x[kRows];
    const std::int64_t num_rows = least(kRows, last - row);
    for (std::int64_t i = 0; i < num_rows; i++) x[i] = static_cast<const T*>(args.x) + g.rows[row + i] * args.x_stride;
    const T* a = static_cast<const T*>(g.a);
    float* to = g.shrunk + row * g.ranks;
    std::int64_t rank = begin;
    for (; rank + kRanks <= end; rank += kRanks) {
      shrink_rows<T, kRanks>(x, a + rank * args.in, args.in, num_rows, to + rank, g.ranks, ahead);
    }
    for (; rank < end; rank++) {
      shrink_rows<T, 1>(x, a + rank * args.in, args.in, num_rows, to + rank, g.ranks, ahead);
    }
  }
}

// out[i] += the sum over the ranks of factors[i, rank] * b[rank], for kVectors vectors of kR rows.
template <class T, class Out, int kR, int kVectors>
void expand_tile(Out* const* out, const float* const* factors, const T* b, std::int64_t ranks, std::int64_t stride,
                 Ahead& ahead) {
  VF sums[kR][kVectors];
  for (int i = 0; i < kR; i++) {
    for (int v = 0; v < kVectors; v++) sums[i][v] = load(out[i] + v * W);
  }
  for (std::int64_t rank = 0; rank < ranks; rank++) {
    ahead(kVectors * W * static_cast<std::int64_t>(sizeof(T)));
    VF right[kVectors];
    for (int v = 0; v < kVectors; v++) right[v] = load(b + rank * stride + v * W);
    for (int i = 0; i < kR; i++) {
      const VF left = splat(factors[i][rank]);
      for (int v = 0; v < kVectors; v++) sums[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < kR; i++) {
    for (int v = 0; v < kVectors; v++) store(out[i] + v * W, sums[i][v]);
  }
}

template <class T, class Out, int kVectors>
void expand_rows(Out* const* out, const float* const* factors, const T* b, std::int64_t ranks, std::int64_t stride,
                 std::int64_t num_rows, Ahead& ahead) {
  switch (num_rows) {
    case 1: return expand_tile<T, Out, 1, kVectors>(out, factors, b, ranks, stride, ahead);
    case 2: return expand_tile<T, Out, 2, kVectors>(out, factors, b, ranks, stride, ahead);
    case 3: return expand_tile<T, Out, 3, kVectors>(out, factors, b, ranks, stride, ahead);
    default: expand_tile<T, Out, kRows, kVectors>(out, factors, b, ranks, stride, ahead);
  }
}

// Outputs [begin, end) of a part for the group's rows [first, last).
template <class T, class Out>
void expand(const LowRankArgs& args, const LowRankGroup& g, const LowRankPart& p, std::int64_t first,
            std::int64_t last, std::int64_t begin, std::int64_t end, Ahead& ahead) {
  const T* b = static_cast<const T*>(p.b);
  for (std::int64_t row = first; row < last; row += kRows) {
    const std::int64_t num_rows = least(kRows, last - row);
    const float* factors[kRows];
    Out* to[kRows];
    for (std::int64_t i = 0; i < num_rows; i++) {
      factors[i] = g.shrunk + (row + i) * g.ranks + p.first_rank;
      to[i] = static_cast<Out*>(args.out) + g.rows[row + i] * args.out_stride + p.first_out + begin;
    }
    std::int64_t column = begin;
    const auto forward = [&](std::int64_t by) {
      column += by;
      for (std::int64_t i = 0; i < num_rows; i++) to[i] += by;
    };
    for (; column + kOutVectors * W <= end; forward(kOutVectors * W)) {
      expand_rows<T, Out, kOutVectors>(to, factors, b + column, p.ranks, p.outputs, num_rows, ahead);
    }
    for (; column + W <= end; forward(W)) {
      expand_rows<T, Out, 1>(to, factors, b + column, p.ranks, p.outputs, num_rows, ahead);
    }
    for (; column < end; forward(1)) {
      for (std::int64_t i = 0; i < num_rows; i++) {
        float total = to_float(*to[i]);
        for (std::int64_t rank = 0; rank < p.ranks; rank++) {
          total += factors[i][rank] * to_float(b[rank * p.outputs + column]);
        }
        put(to[i], total);
      }
    }
  }
}

// Calls body(group, first row, last row, piece) for `pieces_of(group)` pieces of each block of `kRowsPerPiece` rows.
template <class Count, class Body>
void each_piece(const LowRankArgs& args, int threads, const Count& pieces_of, const Body& body) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < args.num_groups; i++) {
    total += (args.groups[i].num_rows + kRowsPerPiece - 1) / kRowsPerPiece * pieces_of(args.groups[i]);
  }
  run_pieces(args.team, threads, total, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < args.num_groups && at < end; i++) {
      const LowRankGroup& g = args.groups[i];
      const std::int64_t pieces = pieces_of(g);
      for (std::int64_t row = 0; row < g.num_rows && at < end; row += kRowsPerPiece, at += pieces) {
        const std::int64_t last = least(g.num_rows, row + kRowsPerPiece);
        for (std::int64_t piece = most(0, begin - at); piece < least(pieces, end - at); piece++) {
          body(g, row, last, piece);
        }
      }
    }
  });
}

// Blocks of up to `rows` rows, counted through all groups.
struct Blocks {
  const LowRankArgs& args;
  std::int64_t rows;

  std::int64_t of(const LowRankGroup& g) const { return (g.num_rows + rows - 1) / rows; }

  // The group of a block, which becomes a number among the group's.
  std::int64_t group_of(std::int64_t& block) const {
    std::int64_t group = 0;
    for (; block >= of(args.groups[group]); group++) block -= of(args.groups[group]);
    return group;
  }
};

constexpr std::int64_t kOutputsPerPiece = 256;

std::int64_t pieces_of_part(const LowRankPart& part) {
  return (part.outputs + kOutputsPerPiece - 1) / kOutputsPerPiece;
}

// The whole addition of a group to its rows [first, last).
template <class T, class Out>
void add_rows(const LowRankArgs& args, const LowRankGroup& g, std::int64_t first, std::int64_t last, Ahead& ahead) {
  shrink<T>(args, g, first, last, 0, g.ranks, ahead);
  for (const LowRankPart* part = g.parts; part < g.parts + g.num_parts; part++) {
    expand<T, Out>(args, g, *part, first, last, 0, part->outputs, ahead);
  }
}

// Adds pieces of neighbouring blocks; the thread of a piece fetches what follows in it.
template <class T, class Out>
void add_blocks(const LowRankArgs& args, const Blocks& blocks, std::int64_t num_blocks, int threads) {
  run_pieces(args.team, threads, num_blocks, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t block = begin, last_block = end - 1;
    std::int64_t group = blocks.group_of(block);
    Ahead ahead(args, static_cast<std::int64_t>(sizeof(T)), group, blocks.group_of(last_block) + 1);
    for (std::int64_t i = begin; i < end; i++, block++) {
      if (block == blocks.of(args.groups[group])) {
        block = 0;
        group++;
      }
      const LowRankGroup& g = args.groups[group];
      const std::int64_t first = block * blocks.rows;
      add_rows<T, Out>(args, g, first, least(g.num_rows, first + blocks.rows), ahead);
    }
  });
}

// The products of some rows of a group with `a`; those with b are about as many.
std::int64_t work_of(const LowRankArgs& args, const LowRankGroup& g, std::int64_t num_rows) {
  return g.ranks * args.in * ((num_rows + kRows - 1) / kRows);
}

template <class T, class Out>
void add_all(const LowRankArgs& args) {
  std::int64_t rows = 0, elements = 0;
  for (std::int64_t i = 0; i < args.num_groups; i++) {
    rows += args.groups[i].num_rows;
    elements += work_of(args, args.groups[i], args.groups[i].num_rows);
  }
  const int threads = worth_threads(args.team.threads, elements, kElementsPerThread);
  const std::int64_t share = ((rows + threads - 1) / threads + kRows - 1) / kRows * kRows;
  const Blocks blocks{args, least(kRowsPerPiece, share)};
  std::int64_t num_blocks = 0, largest = 0;
  for (std::int64_t i = 0; i < args.num_groups; i++) {
    const LowRankGroup& g = args.groups[i];
    num_blocks += blocks.of(g);
    largest = most(largest, work_of(args, g, least(g.num_rows, blocks.rows)));
  }
  // Threads with rows of their own meet once, after the addition; else also between its two products.
  if (num_blocks >= threads && 4 * largest * threads <= 5 * elements) {
    return add_blocks<T, Out>(args, blocks, num_blocks, threads);
  }
  each_piece(
      args, threads, [](const LowRankGroup& g) { return (g.ranks + kRanks - 1) / kRanks; },
      [&](const LowRankGroup& g, std::int64_t first, std::int64_t last, std::int64_t piece) {
        Ahead none;
        shrink<T>(args, g, first, last, piece * kRanks, least(g.ranks, (piece + 1) * kRanks), none);
      });
  each_piece(
      args, threads,
      [](const LowRankGroup& g) {
        std::int64_t pieces = 0;
        for (std::int64_t i = 0; i < g.num_parts; i++) pieces += pieces_of_part(g.parts[i]);
        return pieces;
      },
      [&](const LowRankGroup& g, std::int64_t first, std::int64_t last, std::int64_t piece) {
        Ahead none;
        const LowRankPart* part = g.parts;
        for (; piece >= pieces_of_part(*part); part++) piece -= pieces_of_part(*part);
        expand<T, Out>(args, g, *part, first, last, piece * kOutputsPerPiece,
                       least(part->outputs, (piece + 1) * kOutputsPerPiece), none);
      });
}

}  // namespace

void low_rank(DType dtype, const LowRankArgs& args) {
  if (dtype == DType::f32) {
    add_all<float, float>(args);
  } else if (args.wide) {
    add_all<bf16, float>(args);
  } else {
    add_all<bf16, bf16>(args);
  }
}

}  // namespace sapwood::SAPWOOD_ISA

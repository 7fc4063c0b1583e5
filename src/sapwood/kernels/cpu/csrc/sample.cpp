#include "sample.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>

namespace sapwood {
namespace {

constexpr float kLeastWeight = std::numeric_limits<float>::min();  // what is lighter counts as 0
constexpr std::int32_t kLastToken = std::numeric_limits<std::int32_t>::max();

// A token that may be drawn. Ranked by weight; of equal ones the first comes first.
struct Candidate {
  float weight;
  std::int32_t token;
  bool operator<(const Candidate& other) const {
    return weight != other.weight ? weight > other.weight : token < other.token;
  }
};

// The weights of a row, relative to its largest, and what is known of blocks of them.
struct Weights {
  const float* weight;     // [vocab]
  const float* block_sum;  // [blocks]
  const float* block_top;  // [blocks]
  std::int64_t vocab, blocks;
  double total;
};

double sum_of(const Candidate* begin, const Candidate* end) {
  double sum = 0;
  for (; begin != end; begin++) sum += begin->weight;
  return sum;
}

std::int64_t block_end(const Weights& w, std::int64_t block) {
  return std::min(w.vocab, (block + 1) * kSamplingBlock);
}

// The token at `number` of the whole distribution, in the order of the vocabulary.
std::int64_t draw_any(const Weights& w, double number) {
  const double target = number * w.total;
  double before = 0;
  std::int64_t last = 0;  // where rounding leaves nothing beyond the target
  for (std::int64_t block = 0; block < w.blocks; block++) {
    if (w.block_top[block] <= 0.0f) continue;
    if (before + w.block_sum[block] <= target && block + 1 < w.blocks) {
      before += w.block_sum[block];
      last = block * kSamplingBlock;
      continue;
    }
    for (std::int64_t i = block * kSamplingBlock; i < block_end(w, block); i++) {
      before += w.weight[i];
      if (w.weight[i] > 0.0f) last = i;
      if (w.weight[i] > 0.0f && before > target) return i;
    }
  }
  while (last + 1 < w.vocab && w.weight[last] <= 0.0f) last++;
  return last;
}

// No token lighter than this can be kept, so that few need to be looked at.
double lightest_kept(const Weights& w, const Draw& draw, float* tops) {
  if (draw.top_k > 0) {
    if (draw.top_k > w.blocks) return 0;
    // The k-th largest of all is at least the k-th largest of the blocks' largest.
    std::copy(w.block_top, w.block_top + w.blocks, tops);
    std::nth_element(tops, tops + draw.top_k - 1, tops + w.blocks, std::greater<float>());
    return tops[draw.top_k - 1];
  }
  // All tokens lighter than this together are less than what top-p leaves out.
  const double tail = draw.top_p < 1 ? 0.999 * (1 - draw.top_p) * w.total / static_cast<double>(w.vocab) : 0;
  return std::max(draw.min_p, tail);
}

// Tokens of at least the weight `lightest`, above 0, in the order of the vocabulary; their end.
Candidate* collect(const Weights& w, float lightest, Candidate* to) {
  for (std::int64_t block = 0; block < w.blocks; block++) {
    if (!(w.block_top[block] >= lightest)) continue;
    for (std::int64_t i = block * kSamplingBlock; i < block_end(w, block); i++) {
      *to = {w.weight[i], static_cast<std::int32_t>(i)};  // no branch: which are kept looks random
      to += w.weight[i] >= lightest;
    }
  }
  return to;
}

// 32 bins for each power of two, in the order of the weights, which are at most 1.
constexpr int kBinShift = 18;
constexpr std::size_t kBins = (0x3f800000u >> kBinShift) + 1;  // up to that of 1

std::size_t bin_of(float weight) {
  std::uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return std::min<std::size_t>(bits >> kBinShift, kBins - 1);  // rounding may make 1 a little more
}

// The end of the highest ranked that are kept: each one before which there is less than `mass`.
Candidate* cut_mass(Candidate* begin, Candidate* end, double mass) {
  double before = 0;
  while (end - begin > 1) {  // *begin's rank is kept, end's is not, or there is none
    Candidate* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end);
    const double half = sum_of(begin, middle);
    if (before + half < mass) {
      before += half;
      begin = middle;
    } else {
      end = middle;
    }
  }
  return end;
}

// The last token that is kept, if those are which have less than `mass` before them. Bins of the
// weights' leading bits say in which of them it is: only that one's tokens are ranked, in `ranked`.
Candidate last_of_mass(const Candidate* begin, const Candidate* end, double mass, double* bins, Candidate* ranked) {
  std::fill(bins, bins + kBins, 0.0);
  for (const Candidate* c = begin; c != end; c++) bins[bin_of(c->weight)] += c->weight;
  std::size_t bin = kBins - 1;
  double before = 0;
  for (; bin > 0 && before + bins[bin] < mass; bin--) before += bins[bin];
  Candidate* last = ranked;
  for (const Candidate* c = begin; c != end; c++) {
    *last = *c;
    last += bin_of(c->weight) == bin;
  }
  if (last == ranked) return {0, kLastToken};
  return *std::max_element(ranked, cut_mass(ranked, last, mass - before));
}

Candidate last_kept(const Candidate* begin, const Candidate* end, const Draw& draw, double total, double* bins,
                    Candidate* ranked) {
  if (draw.top_k < 1) {
    return draw.top_p < 1 ? last_of_mass(begin, end, draw.top_p * total, bins, ranked) : Candidate{0, kLastToken};
  }
  Candidate* last = std::copy(begin, end, ranked);
  if (last - ranked > draw.top_k) {
    std::nth_element(ranked, ranked + draw.top_k, last);
    last = ranked + draw.top_k;
  }
  if (draw.top_p < 1) last = cut_mass(ranked, last, draw.top_p * sum_of(ranked, last));
  return *std::max_element(ranked, last);
}

// `candidates` and `ranked` have room for the vocabulary, and one more.
std::int64_t draw_filtered(const Weights& w, const Draw& draw, float* tops, double* bins, Candidate* candidates,
                           Candidate* ranked) {
  const float lightest = std::max(static_cast<float>(lightest_kept(w, draw, tops)), kLeastWeight);
  const Candidate* end = collect(w, lightest, candidates);
  if (end == candidates) return 0;  // every logit is NaN
  Candidate last = last_kept(candidates, end, draw, w.total, bins, ranked);
  if (draw.min_p > last.weight) last = {static_cast<float>(draw.min_p), kLastToken};
  Candidate* kept = ranked;
  for (const Candidate* c = candidates; c != end; c++) {
    *kept = *c;
    kept += (c->weight > last.weight) | ((c->weight == last.weight) & (c->token <= last.token));
  }
  const double target = draw.number * sum_of(ranked, kept);
  double before = 0;
  const Candidate* drawn = ranked;
  for (const Candidate* c = ranked; c != kept && before <= target; c++) {
    before += c->weight;
    drawn = c;
  }
  return drawn->token;
}

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void sample(Context& context, DType dtype, const void* logits, std::int64_t vocab,
            const std::vector<Draw>& draws, std::int64_t* out) {
  const std::int64_t blocks = (vocab + kSamplingBlock - 1) / kSamplingBlock;
  const std::size_t weight_bytes = aligned(static_cast<std::size_t>(blocks * kSamplingBlock) * sizeof(float));
  const std::size_t block_bytes = aligned(static_cast<std::size_t>(blocks) * sizeof(float));
  const std::size_t bin_bytes = aligned(kBins * sizeof(double));
  const std::size_t candidate_bytes = aligned(static_cast<std::size_t>(vocab + 1) * sizeof(Candidate));
  const std::size_t stride = weight_bytes + 3 * block_bytes + bin_bytes + 2 * candidate_bytes;
  std::byte* scratch = context.scratch.at_least(stride * static_cast<std::size_t>(context.threads()));
  const std::size_t row_bytes = static_cast<std::size_t>(vocab) * (dtype == DType::f32 ? 4 : 2);
  const std::int64_t rows = static_cast<std::int64_t>(draws.size());
  std::atomic<std::int64_t> next{0};
  const auto body = [&](int thread) {
    std::byte* base = scratch + stride * static_cast<std::size_t>(thread);
    float* weight = reinterpret_cast<float*>(base);
    float* block_sum = reinterpret_cast<float*>(base + weight_bytes);
    float* block_top = reinterpret_cast<float*>(base + weight_bytes + block_bytes);
    float* tops = reinterpret_cast<float*>(base + weight_bytes + 2 * block_bytes);
    double* bins = reinterpret_cast<double*>(base + weight_bytes + 3 * block_bytes);
    Candidate* candidates = reinterpret_cast<Candidate*>(base + weight_bytes + 3 * block_bytes + bin_bytes);
    Candidate* ranked = candidates + candidate_bytes / sizeof(Candidate);
    for (std::int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) {
      Draw draw = draws[static_cast<std::size_t>(row)];
      if (draw.top_k >= vocab) draw.top_k = 0;
      context.ops().sampling_weights(dtype, static_cast<const std::byte*>(logits) + static_cast<std::size_t>(row) * row_bytes,
                                     vocab, static_cast<float>(1 / draw.temperature), weight, block_sum, block_top);
      double total = 0;
      for (std::int64_t i = 0; i < blocks; i++) total += block_sum[i];
      const Weights weights{weight, block_sum, block_top, vocab, blocks, total};
      const bool filtered = draw.top_k > 0 || draw.top_p < 1 || draw.min_p > 0;
      out[row] = filtered ? draw_filtered(weights, draw, tops, bins, candidates, ranked) : draw_any(weights, draw.number);
    }
  };
  if (rows == 1) {
    body(0);
    return;
  }
  const Team team = context.team();
  const auto run = [](const void* b, int thread) { (*static_cast<const decltype(body)*>(b))(thread); };
  team.launch(team.pool, static_cast<int>(std::min<std::int64_t>(team.threads, rows)), run, &body);
}

}  // namespace sapwood

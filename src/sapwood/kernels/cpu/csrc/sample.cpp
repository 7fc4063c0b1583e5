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

// A weight such that no lighter token can be kept: only the others need to be looked at.
double lightest_kept(const Weights& w, const SamplingSettings& settings, float* tops) {
  if (settings.top_k > 0) {
    if (settings.top_k > w.blocks) return 0;
    // The k-th largest weight is at least the k-th largest of block_top.
    std::copy(w.block_top, w.block_top + w.blocks, tops);
    std::nth_element(tops, tops + settings.top_k - 1, tops + w.blocks, std::greater<float>());
    return tops[settings.top_k - 1];
  }
  // All tokens lighter than `tail` together weigh less than the tokens that top-p leaves out.
  const double tail =
      settings.top_p < 1 ? 0.999 * (1 - settings.top_p) * w.total / static_cast<double>(w.vocab) : 0;
  return std::max(settings.min_p, tail);
}

// Writes the tokens that weigh at least `lightest`, which is above 0, in the order of the vocabulary;
// returns their end.
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

// Weights, which are at most 1, have bins in their order: 32 for each power of two.
constexpr int kBinShift = 18;
constexpr std::size_t kBins = (0x3f800000u >> kBinShift) + 1;  // up to the bin of 1

std::size_t bin_of(float weight) {
  std::uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return std::min<std::size_t>(bits >> kBinShift, kBins - 1);  // rounding may make 1 a little more
}

// The end of the tokens that are kept when a token is kept if all that rank before it weigh less than
// `mass` together. Moves the kept ones to the front.
Candidate* cut_mass(Candidate* begin, Candidate* end, double mass) {
  double before = 0;
  while (end - begin > 1) {  // the token ranked at begin is kept; that at end is not, or there is none
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

// The last token that cut_mass would keep. The sums of all bins tell which bin has it, so that only that
// bin's tokens need to be ranked, in `ranked`.
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

Candidate last_kept(const Candidate* begin, const Candidate* end, const SamplingSettings& settings, double total,
                    double* bins, Candidate* ranked) {
  if (settings.top_k < 1) {
    return settings.top_p < 1 ? last_of_mass(begin, end, settings.top_p * total, bins, ranked)
                              : Candidate{0, kLastToken};
  }
  Candidate* last = std::copy(begin, end, ranked);
  if (last - ranked > settings.top_k) {
    std::nth_element(ranked, ranked + settings.top_k, last);
    last = ranked + settings.top_k;
  }
  if (settings.top_p < 1) last = cut_mass(ranked, last, settings.top_p * sum_of(ranked, last));
  return *std::max_element(ranked, last);
}

// `candidates` and `ranked` have room for the vocabulary, and one more.
std::int64_t draw_filtered(const Weights& w, const SamplingSettings& settings, float* tops, double* bins,
                           Candidate* candidates, Candidate* ranked) {
  const float lightest = std::max(static_cast<float>(lightest_kept(w, settings, tops)), kLeastWeight);
  const Candidate* end = collect(w, lightest, candidates);
  if (end == candidates) return 0;  // every logit is NaN
  Candidate last = last_kept(candidates, end, settings, w.total, bins, ranked);
  if (settings.min_p > last.weight) last = {static_cast<float>(settings.min_p), kLastToken};
  Candidate* kept = ranked;
  for (const Candidate* c = candidates; c != end; c++) {
    *kept = *c;
    kept += (c->weight > last.weight) | ((c->weight == last.weight) & (c->token <= last.token));
  }
  const double target = settings.number * sum_of(ranked, kept);
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
            const std::vector<SamplingSettings>& settings_of_rows, std::int64_t* out) {
  const std::int64_t blocks = (vocab + kSamplingBlock - 1) / kSamplingBlock;
  const std::size_t weight_bytes = aligned(static_cast<std::size_t>(blocks * kSamplingBlock) * sizeof(float));
  const std::size_t block_bytes = aligned(static_cast<std::size_t>(blocks) * sizeof(float));
  const std::size_t bin_bytes = aligned(kBins * sizeof(double));
  const std::size_t candidate_bytes = aligned(static_cast<std::size_t>(vocab + 1) * sizeof(Candidate));
  const std::size_t stride = weight_bytes + 3 * block_bytes + bin_bytes + 2 * candidate_bytes;
  std::byte* scratch = context.scratch.at_least(stride * static_cast<std::size_t>(context.threads()));
  const std::size_t row_bytes = static_cast<std::size_t>(vocab) * (dtype == DType::f32 ? 4 : 2);
  const std::int64_t rows = static_cast<std::int64_t>(settings_of_rows.size());
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
      SamplingSettings settings = settings_of_rows[static_cast<std::size_t>(row)];
      if (settings.top_k >= vocab) settings.top_k = 0;
      context.ops().sampling_weights(dtype, static_cast<const std::byte*>(logits) + static_cast<std::size_t>(row) * row_bytes,
                                     vocab, static_cast<float>(1 / settings.temperature), weight, block_sum,
                                     block_top);
      double total = 0;
      for (std::int64_t i = 0; i < blocks; i++) total += block_sum[i];
      const Weights weights{weight, block_sum, block_top, vocab, blocks, total};
      const bool filtered = settings.top_k > 0 || settings.top_p < 1 || settings.min_p > 0;
      out[row] = filtered ? draw_filtered(weights, settings, tops, bins, candidates, ranked)
                          : draw_any(weights, settings.number);
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

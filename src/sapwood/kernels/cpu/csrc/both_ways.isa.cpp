// Attention of every token to all tokens of its text, earlier and later ones, without a cache: of the patches of a
// picture in a tower, or of the texts of an encoder.
//
// A task has some queries of one head of one text. It packs the text's keys and values kKeysAtOnce at a time, as the
// products read them, and goes over its queries kQueryRows at a time: scores, their softmax, the product with values.
// What was summed over earlier keys is rescaled when later ones have a larger score (online softmax).
// A query's result depends on its text alone, bit by bit: not on the other texts, the other queries or the threads.
// Probabilities are rounded to the activations' dtype before they meet the values; all sums are fp32.
// Sources: Vaswani et al. 2017, arXiv:1706.03762; Milakov and Gimelshein 2018, arXiv:1805.02867.
#include "matrix.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::size_t kAlign = 64;
constexpr int kStep = 32;            // heads and keys are padded to multiples of it, so that every product has whole tiles
constexpr int kQueryRows = 32;       // two tiles of a matrix unit
constexpr int kKeysAtOnce = 1024;    // their scores, packed keys and values stay in the second-level cache
constexpr int kScoreStride = kKeysAtOnce + 16;        // no power of 2: rows would share their place in the cache
constexpr int kProbabilityStride = kKeysAtOnce + 32;
constexpr std::int64_t kProductsPerThread = 1 << 16;  // below this a thread costs more than it saves

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// 2^x as it is good enough for a number that is rounded to T: within 2e-4 for bf16.
template <class T>
SAPWOOD_INLINE VF power_of_two(VF x) {
#if defined(__AVX512F__)
  if constexpr (Pack<T>::per_lane == 2) {
    const __m512 n = _mm512_roundscale_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    const VF r = x - bits_as<VF>(n);
    VF p = splat(5.5504109e-2f);  // as vexp2, with fewer terms
    p = p * r + splat(0.24022651f);
    p = p * r + splat(0.69314718f);
    p = p * r + splat(1.0f);
    return bits_as<VF>(_mm512_scalef_ps(bits_as<__m512>(p), n));
  }
#endif
  return vexp2(x);
}

template <class T>
class BothWays {
 public:
  BothWays(const BothWaysArgs& args, std::byte* scratch)
      : a_(args),
        d_(args.head_dim),
        wide_((args.head_dim + kStep - 1) / kStep * kStep),
        lanes_(wide_ / Pack<T>::per_lane),
        scale_(args.scale * kLog2E) {
    std::size_t used = 0;
    const auto cut = [&](auto*& field, std::size_t count) {
      using Element = __typeof__(*field);
      field = reinterpret_cast<Element*>(scratch + used);
      used += aligned(count * sizeof(Element));
    };
    const std::size_t wide = static_cast<std::size_t>(wide_);
    const std::size_t queries = static_cast<std::size_t>(args.queries_of_task);
    cut(keys_, static_cast<std::size_t>(lanes_) * kKeysAtOnce);
    cut(values_, kKeysAtOnce / Pack<T>::per_lane * wide);
    cut(scores_, kQueryRows * kScoreStride);
    cut(probabilities_, kQueryRows * kProbabilityStride);
    cut(padded_, (kKeyTile + 1) * wide);
    cut(queries_, kQueryRows * wide);
    cut(sums_, queries * wide);
    cut(largest_, queries);
    cut(totals_, queries);
    bytes = used;
  }

  void run(const BothWaysTask& task) {
    text_ = &a_.texts[task.text];
    head_ = task.head;
    // What pads a head, and the row of zeros behind the last one, which odd numbers of keys pair with.
    __builtin_memset(padded_, 0, sizeof(T) * static_cast<std::size_t>((kKeyTile + 1) * wide_));
    __builtin_memset(queries_, 0, sizeof(T) * static_cast<std::size_t>(kQueryRows * wide_));
    for (std::int64_t begin = 0; begin < text_->length; begin += kKeysAtOnce) {
      const int n = static_cast<int>(least(kKeysAtOnce, text_->length - begin));
      pack_keys(begin, n);
      pack_values(begin, n);
      for (std::int64_t query = task.begin; query < task.end; query += kQueryRows) {
        add(task, query, begin, n);
      }
    }
  }

  std::size_t bytes;  // of scratch

 private:
  static int padded(int n) { return (n + kStep - 1) / kStep * kStep; }

  std::int64_t token(std::int64_t i) const { return text_->rows == nullptr ? text_->first + i : text_->rows[i]; }

  const T* row(const void* x, std::int64_t stride, std::int64_t i) const {
    return static_cast<const T*>(x) + token(i) * stride + head_ * d_;
  }

  // The i-th of some rows, whole: where it lies, or copied to padded_[slot].
  const T* whole_row(const void* x, std::int64_t stride, std::int64_t i, int slot) {
    const T* from = row(x, stride, i);
    if (d_ == wide_) return from;
    T* to = padded_ + slot * wide_;
    __builtin_memcpy(to, from, sizeof(T) * static_cast<std::size_t>(d_));
    return to;
  }

  // keys_: tiles [lanes, kKeyTile], one after the other.
  void pack_keys(std::int64_t begin, int n) {
    const void* rows[kKeyTile];
    for (int first = 0; first < n; first += kKeyTile) {
      const int count = static_cast<int>(least(kKeyTile, n - first));
      for (int i = 0; i < count; i++) rows[i] = whole_row(a_.k, a_.k_stride, begin + first + i, i);
      transpose_lanes(rows, count, lanes_, keys_ + first * lanes_, kKeyTile);
    }
  }

  // values_: [keys / per_lane, wide] lanes; of keys beyond n, zeros.
  void pack_values(std::int64_t begin, int n) {
    const T* zeros = padded_ + kKeyTile * wide_;
    const auto value = [&](int i, int slot) { return i < n ? whole_row(a_.v, a_.v_stride, begin + i, slot) : zeros; };
    constexpr int per_lane = Pack<T>::per_lane;
    for (int i = 0; i < padded(n); i += per_lane) {
      std::uint32_t* to = values_ + i / per_lane * wide_;
      const T* even = value(i, 0);
      if constexpr (per_lane == 1) {
        __builtin_memcpy(to, even, sizeof(T) * static_cast<std::size_t>(wide_));
      } else {
        const T* odd = value(i + 1, 1);
        for (int column = 0; column < wide_; column += 2 * W) {
          VU pair[2];
          interleave(even + column, odd + column, pair);
          store_lanes(to + column, pair[0]);
          store_lanes(to + column + W, pair[1]);
        }
      }
    }
  }

  // The queries [query, query + kQueryRows) of the task meet the packed keys, n from `begin` on.
  void add(const BothWaysTask& task, std::int64_t query, std::int64_t begin, int n) {
    const int rows = static_cast<int>(least(kQueryRows, task.end - query));
    const std::int64_t place = query - task.begin;
    for (int r = 0; r < rows; r++) {
      __builtin_memcpy(queries_ + r * wide_, row(a_.q, a_.q_stride, query + r), sizeof(T) * static_cast<std::size_t>(d_));
    }
    const auto* left = reinterpret_cast<const std::uint32_t*>(queries_);
    for (int first = 0; first < n; first += kKeyTile) {
      const int columns = static_cast<int>(least(kKeyTile, padded(n) - first));
      multiply_on<T, false>(unit_, left, lanes_, keys_ + first * lanes_, kKeyTile, scores_ + first, kScoreStride, rows,
                            columns, lanes_);
    }
    float* sums = sums_ + place * wide_;
    const bool is_first = begin == 0;
    for (int r = 0; r < rows; r++) soften(r, place + r, n, is_first);
    const auto* weights = reinterpret_cast<const std::uint32_t*>(probabilities_);
    constexpr int stride = kProbabilityStride / Pack<T>::per_lane;
    const int depth = padded(n) / Pack<T>::per_lane;
    if (is_first) {
      multiply_on<T, false>(unit_, weights, stride, values_, wide_, sums, wide_, rows, wide_, depth);
    } else {
      multiply_on<T, true>(unit_, weights, stride, values_, wide_, sums, wide_, rows, wide_, depth);
    }
    if (begin + n == text_->length) {
      for (int r = 0; r < rows; r++) write(query + r, place + r);
    }
  }

  // Row r of the scores becomes probabilities, not yet divided by their total; sums before it are rescaled.
  void soften(int r, std::int64_t place, int n, bool is_first) {
    float* scores = scores_ + r * kScoreStride;
    T* out = probabilities_ + r * kProbabilityStride;
    const int end = padded(n);
    for (int i = n; i < end; i++) scores[i] = kMinusInfinity;
    VF top = load(scores), other = load(scores + W);
    for (int i = 2 * W; i < end; i += 2 * W) {
      top = vmax(top, load(scores + i));
      other = vmax(other, load(scores + i + W));
    }
    float largest = maximum(vmax(top, other)) * scale_;
    VF total{}, second{};
    if (!is_first) {
      const float before = largest_[place];
      largest = largest > before ? largest : before;
      const float factor = exp2_1(before - largest);
      float* sums = sums_ + place * wide_;
      for (int i = 0; i < wide_; i += W) store(sums + i, load(sums + i) * splat(factor));
      totals_[place] *= factor;
    } else {
      totals_[place] = 0.0f;
    }
    largest_[place] = largest;
    const VF scale = splat(scale_), shift = splat(-largest);
    for (int i = 0; i < end; i += 2 * W) {
      const VF x = power_of_two<T>(load(scores + i) * scale + shift);
      const VF y = power_of_two<T>(load(scores + i + W) * scale + shift);
      total += x;
      second += y;
      store(out + i, x);
      store(out + i + W, y);
    }
    totals_[place] += sum(total + second);
  }

  void write(std::int64_t query, std::int64_t place) const {
    const float* sums = sums_ + place * wide_;
    const VF factor = splat(1.0f / totals_[place]);
    T* out = static_cast<T*>(a_.out) + (token(query) * a_.num_heads + head_) * d_;
    int i = 0;
    for (; i + W <= d_; i += W) store(out + i, load(sums + i) * factor);
    for (; i < d_; i++) put(out + i, sums[i] * factor[0]);
  }

  const BothWaysArgs& a_;
  const int d_, wide_, lanes_;
  const float scale_;
  std::uint32_t* keys_;
  std::uint32_t* values_;
  float* scores_;     // [kQueryRows, kScoreStride]
  T* probabilities_;  // [kQueryRows, kProbabilityStride]
  T* padded_;         // [kKeyTile + 1, wide]
  T* queries_;        // [kQueryRows, wide]
  float* sums_;       // [queries of the task, wide]
  float* largest_;    // by query: of the scores, as powers of 2
  float* totals_;     // by query
  const BothWaysText* text_ = nullptr;
  std::int64_t head_ = 0;
  MatrixUnit unit_;
};

template <class T>
void attend(const BothWaysArgs& a) {
  const int threads = worth_threads(a.team.threads, a.num_products, kProductsPerThread);
  std::int64_t next = 0;
  run_parallel(a.team, least(threads, a.num_tasks), [&](int thread) {
    BothWays<T> attention(a, a.scratch + static_cast<std::size_t>(thread) * a.scratch_stride);
    for (std::int64_t i; (i = take(&next)) < a.num_tasks;) attention.run(a.tasks[i]);
  });
}

}  // namespace

void both_ways(DType dtype, const BothWaysArgs& args) {
  dtype == DType::f32 ? attend<float>(args) : attend<bf16>(args);
}

std::size_t both_ways_scratch(DType dtype, const BothWaysArgs& args) {
  return dtype == DType::f32 ? BothWays<float>(args, nullptr).bytes : BothWays<bf16>(args, nullptr).bytes;
}

}  // namespace sapwood::SAPWOOD_ISA

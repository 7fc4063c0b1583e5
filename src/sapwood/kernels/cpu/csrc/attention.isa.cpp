// Causal attention over paged keys and values with an online softmax.
//
// A query's result depends on its keys alone, bit by bit: its keys are taken in tiles and segments that begin at
// multiples of their lengths (kKeyTile, kKeySegment), every way to multiply adds in the same order, and a segment's
// sums are added to those of the segments before it in one way. So it makes no difference how many queries a task has,
// which of their keys they share with others, or which thread computes what.
//
// Two kernels, chosen per task by its number of query rows (tokens x heads of the kv group):
//   few rows of one token   each key row is read once and multiplied with all rows, as it lies (decode)
//   many rows               key and value tiles are repacked once for all rows, and both products
//                           run on register tiles or the matrix unit (prefill)
// The matrix unit of x86 has an order of its own, so it has all rows of bf16: a few multiply keys as they lie there, too.
// Keys and values may be one row, of which the value is the first part: it is read, and decoded, once.
// Keys and values in 8 bits become the activations' dtype tile by tile, and are then like any others.
// Probabilities are rounded to the activations' dtype before they meet the values; all sums are fp32.
// What a layer's attention does beyond that happens to a row of scores at a time, between the two
// products; keys that no query of a task sees are in none of its tiles.
// Sources: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao et al. 2022,
// arXiv:2205.14135 (tiling); merging of parts by their log-sum-exp as in Flash-Decoding (2023).
#include "attention_results.h"
#include "attention_scratch.h"
#include "functions.h"
#include "matrix.h"
#include "pages.h"
#include "row_tiles.h"
#include "simd.h"
#include "table.h"
#include "tile.h"
#include "tile_apart.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr float kCounts[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static_assert(W <= 16);
// Fetched before they are used, for tasks that memory limits; rows that are keys and values are long.
constexpr int kTilesAhead = 4, kLongTilesAhead = 2;
constexpr int kRowsInCache = 16;  // of queries, beside some keys in the first-level cache
constexpr std::int64_t kTasksForLookahead = 8;    // per thread; fewer would not end together
constexpr std::int64_t kEntriesPerThread = 8192;  // of keys, times query rows

template <class T>
class Attention {
 public:
  Attention(const AttentionArgs& args, std::byte* scratch)
      : a_(args), s_(scratch, args.rows_per_tile, args.head_dim), d_(args.head_dim), v_(args.value_dim),
        is_one_row_(args.keys == args.values),
        group_(args.num_heads / args.num_kv_heads),
        adjusts_(args.traits.soft_cap > 0.0f || args.traits.alibi != nullptr),
        scale_(adjusts_ ? kLog2E : args.scale * kLog2E),
        is_dense_(args.kv == KvFormat::dense), element_(is_dense_ ? sizeof(T) : 1),
        results_(args),
        keys_(is_dense_ ? static_cast<const T*>(args.keys) : s_.dense),
        values_(is_dense_     ? static_cast<const T*>(args.values)
                : is_one_row_ ? s_.dense
                              : s_.dense + kKeyTile * d_) {}

  // `next`: the task that this thread runs after `task`, or null if that is not known.
  void run(const AttentionTask& task, const AttentionTask* next) {
    task_ = &task;
    next_ = next;
    rows_ = task.num_queries * group_;
    has_earlier_ = !results_.add_parts(task.before, s_.earlier, true, s_.sums, rows_);
    results_.clear(s_.sums, rows_);
    is_first_tile_ = task.resumed < 0;
    if (!is_first_tile_) results_.load_rows(task.resumed, s_.sums, rows_);
    if constexpr (is_only_on_unit<T>()) {
      run_on_unit();
    } else {
      task.num_queries == 1 && has_few_rows() ? run_rows() : run_tiles();
    }
    const bool is_open = task.open >= 0;
    if (is_open) {
      results_.save_rows(task.open, s_.sums, rows_);
    } else if (has_earlier_) {
      results_.add(s_.earlier, s_.sums, rows_);
    }
    const Sums& whole = has_earlier_ || is_open ? s_.earlier : s_.sums;
    if (task.partial == kWholeResult) results_.write(whole, task.kv_head, task.first_row, rows_);
    if (task.partial >= 0) results_.save_rows(task.partial, whole, rows_);
  }

  void merge(const AttentionMerge& m) { results_.merge(m, s_.earlier, s_.sums); }

 private:
  // Before the tile that begins there: if it begins another segment, that of the tiles before is finished.
  void open_segment(std::int64_t begin) {
    if (begin % kKeySegment != 0 || begin <= task_->kv_begin) return;
    if (has_earlier_) {
      results_.add(s_.earlier, s_.sums, rows_);
    } else {
      const Sums first = s_.sums;
      s_.sums = s_.earlier;
      s_.earlier = first;
      has_earlier_ = true;
    }
    results_.clear(s_.sums, rows_);
    is_first_tile_ = true;
  }

  const T* query(int row) const {
    const std::int64_t token = task_->shared < 0 ? task_->first_row + row / group_
                                                 : a_.shared_tokens[task_->shared + row / group_];
    const std::int64_t head = static_cast<std::int64_t>(task_->kv_head) * group_ + row % group_;
    return static_cast<const T*>(a_.q) + token * a_.q_stride + head * d_;
  }

  // Its place in its request.
  std::int64_t position(int row) const {
    return task_->shared < 0 ? task_->first_position + row / group_ : a_.shared_positions[task_->shared + row / group_];
  }

  // Calls body(t, count, offset, key_tile, value_tile) for each page of tokens [begin, begin + n): of
  // these, `count` from the t-th on lie in one page, from its token `offset` on; the tiles are where
  // this head's part of the page begins in the caches, in elements.
  template <class Body>
  __attribute__((always_inline)) void walk(const AttentionTask& task, std::int64_t begin, int n, const Body& body) const {
    const std::int64_t head = static_cast<std::int64_t>(task.kv_head) * a_.page_size * kv_width(a_.kv, d_);
    const auto walk_pages = [&](std::int64_t from, int length, int first) __attribute__((always_inline)) {
      each_page(a_.page_table + task.request * a_.page_table_stride, a_.entry_size, a_.page_size, from, length,
                [&](int t, int count, std::int64_t page, std::int64_t offset) {
                  body(first + t, count, offset, page * a_.key_stride + head, page * a_.value_stride + head);
                });
    };
    if (task.sees == 0 || begin + n <= task.first_new) return walk_pages(begin, n, 0);
    const int before = static_cast<int>(most(0, task.first_new - begin));
    if (before > 0) walk_pages(begin, before, 0);
    std::uint64_t seen = static_cast<std::uint64_t>(task.sees);
    for (std::int64_t skipped = task.first_new; skipped < begin; skipped++) seen &= seen - 1;
    for (int t = before; t < n; t++, seen &= seen - 1) walk_pages(task.first_new + __builtin_ctzll(seen), 1, t);
  }

  // Makes key(s_.rows[t]) and values_ + s_.rows[kKeyTile + t] the rows of tokens [begin, begin + n); of those before
  // the task's first key, which may be in no page, that key's.
  // Where the tile has to be dequantised, also fetches the keys of the `num_ahead` rows found ahead.
  void open_tile(std::int64_t begin, int n, int num_ahead = 0) {
    std::int64_t* key_rows = s_.rows;
    std::int64_t* value_rows = s_.rows + kKeyTile;
    const int skipped = num_skipped(*task_, begin);
    walk(*task_, begin + skipped, n - skipped, [&](int from, int count, std::int64_t offset, std::int64_t key, std::int64_t value) {
      const int t = skipped + from;
      if (!is_dense_) {
        prefetch_rows(a_.keys, s_.ahead, t, t + count < n ? least(t + count, num_ahead) : num_ahead);
        dequantize(a_.kv, a_.keys, key, a_.page_size, offset, count, d_, s_.dense + t * d_);
        if (!is_one_row_) {
          dequantize(a_.kv, a_.values, value, a_.page_size, offset, count, d_, s_.dense + (kKeyTile + t) * d_);
        }
        key = value = (t - offset) * d_;
      }
      for (int i = 0; i < count; i++) {
        key_rows[t + i] = key + (offset + i) * d_;
        value_rows[t + i] = value + (offset + i) * d_;
      }
    });
    for (int t = 0; t < skipped; t++) {
      key_rows[t] = key_rows[skipped];
      value_rows[t] = value_rows[skipped];
    }
  }

  // Of the tile that begins there: how many of its keys come before the task's first one.
  static int num_skipped(const AttentionTask& task, std::int64_t begin) {
    return static_cast<int>(most(0, task.kv_begin - begin));
  }
  // The tiles of a task begin here, and end at its kv_end.
  static std::int64_t first_tile(const AttentionTask& task) { return task.kv_begin / kKeyTile * kKeyTile; }

  const T* key(std::int64_t offset) const { return keys_ + offset; }

  // Inlined by force, as its callers are: a function that only prefetches has no effect that GCC knows
  // of, and calls to it are dropped.
  __attribute__((always_inline)) void prefetch_row(const void* cache, std::int64_t offset) const {
    const char* p = static_cast<const char*>(cache) + offset;
    const std::int64_t bytes = d_ * element_;
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, kFetchTo);
  }

  // Scales, caps and biases scores[row][0 .. n), whose keys begin at position `begin`.
  void adjust(int row, std::int64_t begin, int n) {
    const AttentionTraits& traits = a_.traits;
    float* score = s_.scores + row * kKeyTile;
    const std::int64_t head = static_cast<std::int64_t>(task_->kv_head) * group_ + row % group_;
    const VF slope = splat(traits.alibi == nullptr ? 0.0f : traits.alibi[head]);
    VF distance = load(kCounts) + splat(static_cast<float>(begin - position(row)));
    for (int i = 0; i < n; i += W) {
      VF x = load(score + i) * splat(a_.scale);
      if (traits.soft_cap > 0.0f) x = vtanh(x * splat(1.0f / traits.soft_cap)) * splat(traits.soft_cap);
      store(score + i, x + slope * distance);
      distance = distance + splat(static_cast<float>(W));
    }
  }

  // Of a row of scores, those before the window or before the task's first key.
  void hide(int row, std::int64_t begin, int n) {
    const std::int64_t window = a_.traits.window;
    const std::int64_t first_seen = window > 0 ? most(task_->kv_begin, position(row) + 1 - window) : task_->kv_begin;
    const std::int64_t first = least(n, first_seen - begin);
    for (std::int64_t i = 0; i < first; i++) s_.scores[row * kKeyTile + i] = kMinusInfinity;
  }

  // Turns scores[row][0 .. n) into probabilities relative to the new maximum, rescales what was
  // summed before, and zeroes the row up to `padded` columns.
  void soften(int row, int n, int padded) {
    float* score = s_.scores + row * kKeyTile;
    T* probability = s_.probabilities + row * kKeyTile;
    for (int i = n; i < padded; i++) score[i] = kMinusInfinity;
    VF top = splat(kMinusInfinity);
    for (int i = 0; i < padded; i += W) top = vmax(top, load(score + i));
    const float old_max = s_.sums.max[row];
    const float tile_max = maximum(top) * scale_;
    const float new_max = tile_max > old_max ? tile_max : old_max;
    if (new_max == kMinusInfinity) {  // every key of the tile is masked for this row
      for (int i = 0; i < padded; i += W) store(probability + i, VF{});
      return;
    }
    VF total = load(s_.sums.total + row * W);
    if (old_max == kMinusInfinity) {  // what was summed before is 0, or nothing yet
      s_.sums.max[row] = new_max;
    } else if (new_max > old_max) {
      const float factor = exp2_1(old_max - new_max);
      total = total * splat(factor);
      float* out = s_.sums.out + row * d_;
      for (int i = 0; i < v_; i += W) store(out + i, load(out + i) * splat(factor));
      s_.sums.max[row] = new_max;
    }
    for (int i = 0; i < padded; i += W) {
      const VF p = vexp2(load(score + i) * splat(scale_) - splat(new_max));
      store(probability + i, p);
      total = total + p;
    }
    store(s_.sums.total + row * W, total);
  }

  // ---- few rows ----

  bool has_few_rows() const {
    return group_ <= kRowKernelRows ||
           (is_one_row_ && group_ <= kLongRowKernelRows && !multiplies_on_unit<T>(group_));
  }

  // Fetches the first tiles of this task, unless that happened during the task before.
  __attribute__((always_inline)) void begin_fetching() {
    if (ahead_task_ == task_) return;
    ahead_task_ = task_;
    ahead_ = first_tile(*task_);
    for (int i = 0; i < (is_one_row_ ? kLongTilesAhead : kTilesAhead); i++) {
      const int num_rows = find_ahead();
      prefetch_rows(a_.keys, s_.ahead, 0, num_rows);
      if (!is_one_row_) prefetch_rows(a_.values, s_.ahead + kKeyTile, 0, num_rows);
    }
  }

  void run_rows() {
    std::int64_t* value_rows = s_.rows + kKeyTile;
    const T* q = query(0);  // the heads of a group are neighbours: [group, D]
    begin_fetching();
    for (std::int64_t begin = first_tile(*task_); begin < task_->kv_end; begin += kKeyTile) {
      open_segment(begin);
      const int n = tile_length(*task_, begin);
      const int num_ahead = find_ahead();
      // Rows that are keys and values are fetched half during each product; keys in 8 bits, which take longest to
      // decode, before.
      const int with_scores = is_one_row_ ? num_ahead / 2 : is_dense_ ? num_ahead : 0;
      open_tile(begin, n, is_one_row_ ? 0 : num_ahead);
      score_rows(q, s_.rows, n, with_scores);
      constexpr int pack = Pack<T>::per_lane;
      if (is_first_tile_) __builtin_memset(s_.sums.out, 0, sizeof(float) * static_cast<std::size_t>(rows_ * d_));
      is_first_tile_ = false;
      soften_tile(begin, n, (n + W - 1) / W * W);
      if (n % pack != 0) value_rows[n] = value_rows[n - 1];  // its probability is 0
      add_values(value_rows, (n + pack - 1) / pack, is_one_row_ ? with_scores : 0, num_ahead);
    }
  }

  // Finds the rows of the tile to fetch next, which belongs to this task or to the task after it, and
  // fetches their scales. Returns the number of rows.
  __attribute__((always_inline)) int find_ahead() {
    if (ahead_ >= ahead_task_->kv_end && ahead_task_ == task_ && next_ != nullptr && next_->num_queries == 1) {
      ahead_task_ = next_;
      ahead_ = first_tile(*next_);
    }
    const int n = tile_length(*ahead_task_, ahead_);
    std::int64_t* key_rows = s_.ahead;
    std::int64_t* value_rows = s_.ahead + kKeyTile;
    const int skipped = num_skipped(*ahead_task_, ahead_);
    walk(*ahead_task_, ahead_ + skipped, n - skipped, [&](int t, int count, std::int64_t offset, std::int64_t key, std::int64_t value) {
      for (int i = 0; i < count; i++) {
        key_rows[t + i] = (key + (offset + i) * d_) * element_;
        value_rows[t + i] = (value + (offset + i) * d_) * element_;
      }
      if (!is_dense_) {
        const std::int64_t scales = a_.page_size * static_cast<std::int64_t>(d_) + offset * kScaleBytes;
        __builtin_prefetch(static_cast<const char*>(a_.keys) + key + scales);
        __builtin_prefetch(static_cast<const char*>(a_.values) + value + scales);
      }
    });
    ahead_ += kKeyTile;
    return n - skipped;
  }

  // Rows [first, last) of the tile found ahead, whose places in the cache are `rows`.
  __attribute__((always_inline)) void prefetch_rows(const void* cache, const std::int64_t* rows,
                                                    std::int64_t first, std::int64_t last) const {
    for (std::int64_t i = first; i < last; i++) prefetch_row(cache, rows[i]);
  }

  static int tile_length(const AttentionTask& task, std::int64_t begin) {
    return static_cast<int>(most(0, least(kKeyTile, task.kv_end - begin)));
  }

  // Scores the rows of this tile, and meanwhile fetches the keys of the first num_ahead rows of the tile found
  // ahead, evenly: of a burst of fetches the processor drops what it has no room for.
  void score_rows(const T* q, const std::int64_t* rows, int n, int num_ahead) {
    const int num_tiles =
        ((rows_ + kScoredRows - 1) / kScoredRows) * ((n + kScoredKeys - 1) / kScoredKeys);
    int fetched = 0, tiles = 0;
    for (int first = 0; first < rows_; first += kRowsInCache) {
      const int last = static_cast<int>(least(first + kRowsInCache, rows_));
      for (int t = 0; t < n; t += kScoredKeys) {
        const T* keys[kScoredKeys];  // beyond n the last one again
        for (int i = 0; i < kScoredKeys; i++) keys[i] = key(rows[least(t + i, n - 1)]);
        for (int row = first; row < last; row += kScoredRows) {
          for (tiles++; fetched * num_tiles < num_ahead * tiles; fetched++) prefetch_row(a_.keys, s_.ahead[fetched]);
          switch (last - row) {
            case 3: score<least(3, kScoredRows)>(q, keys, row, t); break;
            case 2: score<2>(q, keys, row, t); break;
            case 1: score<1>(q, keys, row, t); break;
            default: score<kScoredRows>(q, keys, row, t); break;
          }
        }
      }
    }
  }

  template <int R>
  void score(const T* q, const T* const* keys, int row, int t) {
    score_tile<T, R>(q + row * d_, keys, d_, s_.scores + row * kKeyTile + t, kKeyTile);
  }

  // Adds the values of this tile, and meanwhile fetches the values of the rows [first, last) found ahead: a cache
  // line of each with each register tile, so that the last tiles fetch nothing where rows are short.
  void add_values(const std::int64_t* rows, int pairs, int first, int last) {
    const char* line = static_cast<const char*>(a_.values);
    const char* const end = line + d_ * element_;
    FetchedLines lines{line, s_.ahead + (is_one_row_ ? 0 : kKeyTile) + first, last - first};
    const auto next_line = [&] {
      lines.line += kLineBytes;
      if (lines.line >= end) lines.count = 0;
    };
    for (int d = 0; d < v_; d += kSummedVectors * W) {
      for (int row = 0; row < rows_; row += kSummedRows, next_line()) {
        switch (rows_ - row) {
          case 1: add_to<1>(rows, pairs, row, d, lines); break;
          case 2: add_to<2>(rows, pairs, row, d, lines); break;
          case 3: add_to<3>(rows, pairs, row, d, lines); break;
          case 4: add_to<4>(rows, pairs, row, d, lines); break;
          case 5: add_to<least(5, kSummedRows)>(rows, pairs, row, d, lines); break;
          case 6: add_to<least(6, kSummedRows)>(rows, pairs, row, d, lines); break;
          case 7: add_to<least(7, kSummedRows)>(rows, pairs, row, d, lines); break;
          default: add_to<kSummedRows>(rows, pairs, row, d, lines); break;
        }
      }
    }
    for (; lines.count > 0; next_line()) fetch(lines, 0, lines.count);
  }

  // To the sums of R rows from `row` on, in the columns from d on.
  template <int R>
  void add_to(const std::int64_t* rows, int pairs, int row, int d, const FetchedLines& lines) {
    add_tile<T, R>(s_.probabilities + row * kKeyTile, kKeyTile, values_ + d, rows, pairs, s_.sums.out + row * d_ + d, d_,
                   lines);
  }

  // ---- many rows ----

  void run_tiles() {
    // Rows that are keys and values are long: transposing queries and scores costs less than transposing keys.
    const bool scores_by_key = is_one_row_ && !multiplies_on_unit<T>(rows_);
    const int stride = (rows_ + 31) / 32 * 32;
    scores_by_key ? transpose_queries(stride) : sort_queries();
    // A single token's keys are read as fast as memory gives them.
    const bool fetches = task_->num_queries == 1;
    if (fetches) begin_fetching();
    for (std::int64_t begin = first_tile(*task_); begin < task_->kv_end; begin += kKeyTile) {
      open_segment(begin);
      const int n = tile_length(*task_, begin);
      const int num_ahead = fetches ? find_ahead() : 0;
      open_tile(begin, n, num_ahead);
      const int padded = static_cast<int>(least(kKeyTile, (n + 31) / 32 * 32));
      if (scores_by_key) {
        score_by_key(stride, n, is_dense_ ? num_ahead : 0);
      } else {
        if (is_dense_) prefetch_rows(a_.keys, s_.ahead, 0, num_ahead / 2);
        pack_keys(n);
        if (is_dense_) prefetch_rows(a_.keys, s_.ahead, num_ahead / 2, num_ahead);
        if (!is_one_row_) prefetch_rows(a_.values, s_.ahead + kKeyTile, 0, num_ahead);
        score_packed(padded);
      }
      soften_tile(begin, n, padded);
      add_packed(n, padded);
    }
  }

  // Makes s_.q the rows' lanes, of each row first those that make up the first of a score's sums.
  void sort_queries() {
    const int each = d_ / Pack<T>::per_lane / kScoreSums;
    for (int row = 0; row < rows_; row++) {
      const void* from = query(row);
      std::uint32_t* to = reinterpret_cast<std::uint32_t*>(s_.q + row * d_);
      for (int i = 0; i < each; i++) {
        for (int part = 0; part < kScoreSums; part++) {
          to[part * each + i] = load_lane(static_cast<const char*>(from) + (i * kScoreSums + part) * 4);
        }
      }
    }
  }

  // The scores of this tile, of the rows of sort_queries.
  void score_packed(int padded) {
    const int each = d_ / Pack<T>::per_lane / kScoreSums;
    const std::uint32_t* queries = reinterpret_cast<const std::uint32_t*>(s_.q);
    if constexpr (kWideRowTiles) {
      score_packed_rows<T>(queries, kScoreSums * each, s_.keys, s_.scores, rows_, padded);
      return;
    }
    const auto multiply = [&]<int kAdd>(int part) {
      multiply_on<T, kAdd>(unit_, queries + part * each, kScoreSums * each, s_.keys + part * kKeyTile,
                           kScoreSums * kKeyTile, s_.scores, kKeyTile, rows_, padded, each);
    };
    multiply.template operator()<0>(0);
    for (int part = 1; part < kScoreSums; part++) multiply.template operator()<kAddAfter>(part);
  }

  // Adds the values of this tile.
  void add_packed(int n, int padded) {
    constexpr int pack = Pack<T>::per_lane;
    const auto multiply = [&]<int kAdd> {
      multiply_on<T, kAdd>(unit_, reinterpret_cast<const std::uint32_t*>(s_.probabilities), kKeyTile / pack, s_.values,
                           d_, s_.sums.out, d_, rows_, v_, padded / pack);
    };
    pack_values(n);
    is_first_tile_ ? multiply.template operator()<0>() : multiply.template operator()<1>();
    is_first_tile_ = false;
  }

  void soften_tile(std::int64_t begin, int n, int padded) {
    const bool hides = a_.traits.window > 0 || num_skipped(*task_, begin) > 0;
    for (int row = 0; row < rows_; row++) {
      if (adjusts_) adjust(row, begin, n);
      if (hides) hide(row, begin, n);
      // A query sees itself.
      soften(row, static_cast<int>(most(0, least(n, position(row) + 1 - begin))), padded);
    }
  }

  // Makes s_.q lanes [D / per_lane, stride]: all rows side by side.
  void transpose_queries(int stride) {
    const void* from[32];
    for (int row = 0; row < rows_; row += 32) {
      const int count = static_cast<int>(least(32, rows_ - row));
      for (int i = 0; i < count; i++) from[i] = query(row + i);
      transpose_lanes(from, count, d_ / Pack<T>::per_lane, reinterpret_cast<std::uint32_t*>(s_.q) + row, stride);
    }
  }

  // The scores of this tile: keys are the left factor as they lie, and the rows of transpose_queries the right one.
  // Meanwhile the rows of the tile found ahead are fetched.
  void score_by_key(int stride, int n, int num_ahead) {
    const int lanes = d_ / Pack<T>::per_lane;
    const std::uint32_t* queries = reinterpret_cast<const std::uint32_t*>(s_.q);
    float* by_key = reinterpret_cast<float*>(s_.keys);
    const int room = static_cast<int>(least(kTileVectors, lanes / W));  // of by_key, in vectors per key
    const void *keys[kKeyTile], *from[kKeyTile];
    for (int t = 0; t < n; t++) keys[t] = key(s_.rows[t]);
    for (int row = 0; row < rows_; num_ahead = 0) {
      const int vectors = static_cast<int>(least(room, (rows_ - row + W - 1) / W));
      multiply_apart<T>(keys, n, queries + row, stride, lanes, by_key, vectors, [&](int first, int last) {
        prefetch_rows(a_.keys, s_.ahead, least(first, num_ahead), least(last, num_ahead));
      });
      prefetch_rows(a_.keys, s_.ahead, n, num_ahead);
      for (int t = 0; t < n; t++) from[t] = by_key + t * vectors * W;
      transpose_lanes(from, n, vectors * W, reinterpret_cast<std::uint32_t*>(s_.scores) + row * kKeyTile, kKeyTile);
      row += vectors * W;
    }
  }

  // ---- on the matrix unit of x86, which has all rows of its dtype ----

#if defined(SAPWOOD_AMX)
  // For a few rows, or long ones, keys are the left factor as they lie and queries, which are fewer, the right one: the
  // scores are transposed instead of the keys. The unit adds in the same order.
  void run_on_unit() {
    const bool as_they_lie = is_one_row_ || task_->num_queries == 1;
    const int stride = (rows_ + 31) / 32 * 32;
    if (as_they_lie) {
      transpose_queries(stride);
    } else {
      for (int row = 0; row < rows_; row++) {
        __builtin_memcpy(s_.q + row * d_, query(row), sizeof(T) * static_cast<std::size_t>(d_));
      }
    }
    const bool fetches = task_->num_queries == 1;
    if (fetches) begin_fetching();
    for (std::int64_t begin = first_tile(*task_); begin < task_->kv_end; begin += kKeyTile) {
      open_segment(begin);
      const int n = tile_length(*task_, begin), num_ahead = fetches ? find_ahead() : 0;
      const int padded = static_cast<int>(least(kKeyTile, (n + 31) / 32 * 32));
      open_tile(begin, n, num_ahead);
      if (is_dense_) prefetch_rows(a_.keys, s_.ahead, 0, num_ahead / 2);
      as_they_lie ? score_blocks(stride, n) : score_on_unit(n, padded);
      if (is_dense_) prefetch_rows(a_.keys, s_.ahead, num_ahead / 2, num_ahead);
      if (!is_one_row_) prefetch_rows(a_.values, s_.ahead + kKeyTile, 0, num_ahead);
      soften_tile(begin, n, padded);
      if (!as_they_lie || rows_ > kUnitRows) {
        add_packed(n, padded);
        continue;
      }
      constexpr int pack = Pack<T>::per_lane;
      pack_values(n);
      unit_.add_few(reinterpret_cast<const std::uint32_t*>(s_.probabilities), kKeyTile / pack, s_.values, d_,
                    s_.sums.out, d_, v_, padded / pack, !is_first_tile_);
      is_first_tile_ = false;
    }
  }

  void score_on_unit(int n, int padded) {
    const int lanes = d_ / Pack<T>::per_lane;
    pack_keys(n);
    multiply_on<T, 0>(unit_, reinterpret_cast<const std::uint32_t*>(s_.q), lanes, s_.keys, kKeyTile, s_.scores,
                      kKeyTile, rows_, padded, lanes);
  }

  // Of the rows of transpose_queries.
  void score_blocks(int stride, int n) {
    const int num_blocks = (n + kUnitRows - 1) / kUnitRows;
    const void *blocks[kUnitBlocks], *from[kKeyTile];
    for (int i = 0; i < kUnitBlocks; i++) blocks[i] = i < num_blocks ? block(i * kUnitRows, n) : blocks[0];
    float* by_key = reinterpret_cast<float*>(s_.keys);
    for (int t = 0; t < kKeyTile; t++) from[t] = by_key + t * kUnitLanes;
    for (int row = 0; row < rows_; row += kUnitLanes) {
      float* scores = s_.scores + row * kKeyTile;
      unit_.multiply_blocks(blocks, d_ * sizeof(T), reinterpret_cast<const std::uint32_t*>(s_.q) + row, stride, by_key,
                            d_ / Pack<T>::per_lane);
      if (rows_ - row > 4) {
        transpose_lanes(from, n, kUnitLanes, reinterpret_cast<std::uint32_t*>(scores), kKeyTile);
        continue;
      }
      for (int t = 0; t < n; t += W) {
        VF four[4];
        for (int i = 0; i < 4; i++) four[i] = load_apart(by_key + (t + i) * kUnitLanes, 4 * kUnitLanes);
        transpose_blocks(four);
        for (int i = 0; i < 4; i++) store(scores + i * kKeyTile + t, four[i]);
      }
    }
  }

  // The first four of 16, of rows `stride` apart.
  static VF load_apart(const float* rows, int stride) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + stride), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + 2 * stride), 2);
    return bits_as<VF>(_mm512_insertf32x4(v, _mm_loadu_ps(rows + 3 * stride), 3));
  }

  // Where kUnitRows neighbouring keys lie one after the other: those of the tile from the t-th on, then any.
  const void* block(int t, int n) {
    const std::int64_t* rows = s_.rows + t;
    const int count = static_cast<int>(least(n - t, kUnitRows));
    bool is_whole = count == kUnitRows;
    for (int i = 1; i < count; i++) is_whole &= rows[i] == rows[0] + i * d_;
    if (is_whole) return key(rows[0]);
    T* own = s_.apart;
    own += t * d_;
    for (int i = 0; i < count; i++) __builtin_memcpy(own + i * d_, key(rows[i]), static_cast<std::size_t>(d_) * sizeof(T));
    return own;
  }
#else
  void run_on_unit() {}
#endif

  void pack_keys(int n) {
    const int lanes = d_ / Pack<T>::per_lane;
    const void* rows[kKeyTile];
    for (int t = 0; t < n; t++) rows[t] = key(s_.rows[t]);
    transpose_lanes(rows, n, lanes, s_.keys, kKeyTile);
  }

  void pack_values(int n) {
    constexpr int pack = Pack<T>::per_lane;
    const std::int64_t* rows = s_.rows + kKeyTile;
    const int padded = static_cast<int>(least(kKeyTile, (n + 31) / 32 * 32));
    for (int t = 0; t < padded; t += pack) {
      std::uint32_t* to = s_.values + t / pack * d_;
      if (t >= n) {  // instead of the cache's bytes: 0 x NaN would reach the sums
        __builtin_memset(to, 0, sizeof(std::uint32_t) * static_cast<std::size_t>(d_));
        continue;
      }
      std::int64_t pair[2] = {rows[t], rows[t + 1 < n ? t + 1 : t]};
      for (int d = 0; d < v_; d += 2 * W) {
        VU lanes[2];
        load_pair(values_, pair, d, lanes);
        store_lanes(to + d, lanes[0]);
        store_lanes(to + d + W, lanes[1]);
      }
    }
  }

  const AttentionArgs& a_;
  Scratch<T> s_;
  const int d_, v_;  // entries of a key, and of a result
  const bool is_one_row_;  // keys and values
  const int group_;
  const bool adjusts_;  // scores, row by row; else they are only scaled
  const float scale_;   // of scores, such that probabilities are powers of 2
  const bool is_dense_;
  const std::int64_t element_;  // bytes
  const AttentionResults<T> results_;
  const T *const keys_, *const values_;  // the caches, or the dequantised tile: s_.rows are offsets in them
  const AttentionTask* task_ = nullptr;
  const AttentionTask* next_ = nullptr;
  const AttentionTask* ahead_task_ = nullptr;  // whose keys and values are fetched up to ahead_
  std::int64_t ahead_ = 0;
  int rows_ = 0;
  bool has_earlier_ = false;  // segments before this one
  bool is_first_tile_ = false;  // of this segment: there is no output yet
  [[maybe_unused]] MatrixUnit unit_;
};

// Tasks [begin, end).
template <class T>
void run_tasks(const AttentionArgs& a, int threads, std::int64_t begin, std::int64_t end) {
  if (begin == end) return;
  std::int64_t next_task = begin;
  run_parallel(a.team, least(threads, end - begin), [&](int thread) {
    Attention<T> attention(a, a.scratch + static_cast<std::size_t>(thread) * a.scratch_stride);
    if (end - begin < kTasksForLookahead * threads) {
      for (std::int64_t i; (i = take(&next_task)) < end;) attention.run(a.tasks[i], nullptr);
      return;
    }
    // Many short tasks: what the next one reads first is fetched during the one before.
    std::int64_t next = take(&next_task);
    while (next < end) {
      const std::int64_t i = next;
      next = take(&next_task);
      attention.run(a.tasks[i], next < end ? a.tasks + next : nullptr);
    }
  });
}

template <class T>
void attend(const AttentionArgs& a) {
  // A tiny step is done before another thread has woken.
  const int threads = worth_threads(a.team.threads, a.num_key_entries, kEntriesPerThread);
  run_tasks<T>(a, threads, 0, a.num_first_tasks);
  run_tasks<T>(a, threads, a.num_first_tasks, a.num_tasks);
  std::int64_t next_merge = 0;
  run_parallel(a.team, least(threads, a.num_merges), [&](int thread) {
    Attention<T> attention(a, a.scratch + static_cast<std::size_t>(thread) * a.scratch_stride);
    for (std::int64_t i; (i = take(&next_merge)) < a.num_merges;) attention.merge(a.merges[i]);
  });
}

}  // namespace

void paged_attention(DType dtype, const AttentionArgs& args) {
  dtype == DType::f32 ? attend<float>(args) : attend<bf16>(args);
}

std::size_t attention_scratch(DType dtype, int rows, int head_dim) {
  return dtype == DType::f32 ? Scratch<float>(nullptr, rows, head_dim).bytes
                             : Scratch<bf16>(nullptr, rows, head_dim).bytes;
}

}  // namespace sapwood::SAPWOOD_ISA

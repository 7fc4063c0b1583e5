// The scores by which an indexer chooses keys: of each new token and each key that its block sees, the sum over heads
// of weight * relu(query * key). A tile of keys is repacked once for several tokens, whose heads are the rows of
// one product.
// Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp (lightning indexer).
#include "matrix.h"
#include "pages.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::size_t kAlign = 64;
constexpr std::int64_t kProductsPerThread = 1 << 18;

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

template <class T>
class IndexScores {
 public:
  IndexScores(const IndexArgs& args, std::byte* scratch)
      : a_(args), d_(args.head_dim), lanes_(args.head_dim / Pack<T>::per_lane) {
    const std::size_t keys = aligned(sizeof(std::uint32_t) * static_cast<std::size_t>(lanes_ * kKeyTile));
    keys_ = reinterpret_cast<std::uint32_t*>(scratch);
    products_ = reinterpret_cast<float*>(scratch + keys);
    const std::size_t products = aligned(sizeof(float) * static_cast<std::size_t>(args.most_rows * kKeyTile));
    dense_ = reinterpret_cast<T*>(scratch + keys + products);
    bytes = keys + products + aligned(sizeof(T) * static_cast<std::size_t>(kKeyTile * d_));
  }

  void run(const IndexTask& task) {
    const std::int64_t heads = a_.num_heads;
    const T* q = static_cast<const T*>(a_.q) + task.first_row * heads * d_;
    for (std::int64_t begin = task.kv_begin; begin < task.kv_end; begin += kKeyTile) {
      const int n = static_cast<int>(least(kKeyTile, task.kv_end - begin));
      const int padded = (n + 31) / 32 * 32;
      pack_keys(task, begin, n);
      multiply_on<T, false>(unit_, reinterpret_cast<const std::uint32_t*>(q), lanes_, keys_, kKeyTile, products_,
                            kKeyTile, static_cast<int>(task.num_rows * heads), padded, lanes_);
      for (std::int64_t row = 0; row < task.num_rows; row++) {
        add_heads(products_ + row * heads * kKeyTile, a_.weights + (task.first_row + row) * heads, padded,
                  task.scores + row * task.score_stride + begin);
      }
    }
  }

  std::size_t bytes;  // of scratch

 private:
  void pack_keys(const IndexTask& task, std::int64_t begin, int n) {
    const void* rows[kKeyTile];
    const std::int32_t* pages = a_.page_table + task.request * a_.page_table_stride;
    each_page(pages, a_.page_size, a_.page_size, begin, n,
              [&](int t, int count, std::int64_t page, std::int64_t offset) {
                const T* first = static_cast<const T*>(a_.keys) + page * a_.page_stride + offset * d_;
                if (a_.kv != KvFormat::dense) {
                  T* own = dense_ + t * d_;
                  dequantize(a_.kv, a_.keys, page * a_.page_stride, a_.page_size, offset, count, d_, own);
                  first = own;
                }
                for (int i = 0; i < count; i++) rows[t + i] = first + i * d_;
              });
    transpose_lanes(rows, n, lanes_, keys_, kKeyTile);
  }

  void add_heads(const float* products, const float* weights, int padded, float* out) const {
    for (int column = 0; column < padded; column += W) {
      VF total{};
      for (std::int64_t head = 0; head < a_.num_heads; head++) {
        total += splat(weights[head]) * vmax(load(products + head * kKeyTile + column), VF{});
      }
      store(out + column, total);
    }
  }

  const IndexArgs& a_;
  const int d_, lanes_;
  std::uint32_t* keys_;  // [lanes, kKeyTile]
  float* products_;      // [rows, kKeyTile]
  T* dense_;             // [kKeyTile, D]: keys that are stored in 8 bits
  MatrixUnit unit_;
};

template <class T>
void score(const IndexArgs& a) {
  const int threads = worth_threads(a.team.threads, a.num_products, kProductsPerThread);
  std::int64_t next = 0;
  run_parallel(a.team, least(threads, a.num_tasks), [&](int thread) {
    IndexScores<T> scores(a, a.scratch + static_cast<std::size_t>(thread) * a.scratch_stride);
    for (std::int64_t i; (i = take(&next)) < a.num_tasks;) scores.run(a.tasks[i]);
  });
}

}  // namespace

void index_scores(DType dtype, const IndexArgs& args) {
  dtype == DType::f32 ? score<float>(args) : score<bf16>(args);
}

std::size_t index_scratch(DType dtype, const IndexArgs& args) {
  return dtype == DType::f32 ? IndexScores<float>(args, nullptr).bytes : IndexScores<bf16>(args, nullptr).bytes;
}

}  // namespace sapwood::SAPWOOD_ISA

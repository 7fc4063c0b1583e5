// Products on the matrix unit of Intel processors (AMX), where an instruction set has it.
//
// Eight registers hold tiles of up to 16 rows of 64 bytes. Four are sums of 16 x 16; the other four
// are two tiles of a, one above the other, and two of b, side by side: each that is loaded is used
// twice. What lies in memory needs no other layout: 16 rows of lanes (see simd.h) are a tile of b.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and
// volume 2, LDTILECFG, TILELOADD, TDPBF16PS and TDPBSUD.
//
// The matrix instructions of ARM processors (mmla.h) serve through the same class.
//
// With SAPWOOD_AMX_EMULATED the instructions are functions of this file, so that machines without
// the unit test all that is around them. Included only by *.isa.cpp.
#pragma once

#include "tile.h"
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "mmla.h"
#endif
#if defined(SAPWOOD_AMX) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SAPWOOD_UNIT
#endif

namespace sapwood::SAPWOOD_ISA {
namespace {

#if defined(SAPWOOD_AMX)

constexpr int kUnitRows = 16;         // of a tile
constexpr int kUnitBytes = 64;        // of a row of a tile
constexpr int kUnitLanes = 16;        // of a row of a tile; and the rows of a tile of b
constexpr int kLeastUnitRows = 5;     // with fewer rows, memory is the limit, and vectors do
constexpr int kMostPassRows = 2 * kUnitRows;
constexpr int kUnitBlocks = 4;        // of rows, in multiply_blocks
constexpr std::int64_t kCacheLine = 64;

// Which register is which.
constexpr int kSums = 0, kLeft = 4, kRight = 6;

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#if defined(SAPWOOD_AMX_EMULATED)

struct Tiles {
  std::uint32_t lanes[8][kUnitRows][kUnitLanes];
  TileShapes shapes;

  void configure(const TileShapes& to) {
    shapes = to;
    __builtin_memset(lanes, 0, sizeof(lanes));
  }
  void release() { configure(TileShapes{}); }

  template <int kTile>
  void zero() {
    __builtin_memset(lanes[kTile], 0, sizeof(lanes[kTile]));
  }

  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < shapes.rows[kTile]; r++) {
      __builtin_memcpy(lanes[kTile][r], static_cast<const char*>(from) + r * stride, shapes.row_bytes[kTile]);
    }
  }

  template <int kTile>
  void save(void* to, std::int64_t stride) const {
    for (int r = 0; r < shapes.rows[kTile]; r++) {
      __builtin_memcpy(static_cast<char*>(to) + r * stride, lanes[kTile][r], shapes.row_bytes[kTile]);
    }
  }

  // Even and odd inputs have sums of their own, which meet at the end.
  template <int kSum, int kA, int kB>
  void add_bf16() {
    for (int r = 0; r < shapes.rows[kA]; r++) {
      VF even{}, odd{};
      for (int k = 0; k < shapes.rows[kB]; k++) {
        const VU a = splat_lane(lanes[kA][r][k]), b = load_lanes(lanes[kB][k]);
        even += bits_as<VF>(a << 16) * bits_as<VF>(b << 16);
        odd += bits_as<VF>(a & 0xffff0000u) * bits_as<VF>(b & 0xffff0000u);
      }
      store_lanes(lanes[kSum][r], bits_as<VU>(bits_as<VF>(load_lanes(lanes[kSum][r])) + (even + odd)));
    }
  }

  // a's bytes are signed, b's unsigned.
  template <int kSum, int kA, int kB>
  void add_bytes() {
    for (int r = 0; r < shapes.rows[kA]; r++) {
      VI sum = bits_as<VI>(load_lanes(lanes[kSum][r]));
      for (int k = 0; k < shapes.rows[kB]; k++) {
        const VI a = bits_as<VI>(splat_lane(lanes[kA][r][k]));
        const VU b = load_lanes(lanes[kB][k]);
        for (int byte = 0; byte < 4; byte++) {
          sum += ((a << (24 - 8 * byte)) >> 24) * bits_as<VI>((b >> (8 * byte)) & 255u);
        }
      }
      store_lanes(lanes[kSum][r], bits_as<VU>(sum));
    }
  }
};

#else

// In assembly, since GCC's own functions do not say that a load reads memory.
struct Tiles {
  void configure(const TileShapes& to) { asm volatile("ldtilecfg %0" ::"m"(to)); }
  void release() { asm volatile("tilerelease"); }

  template <int kTile>
  __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  __attribute__((always_inline)) void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  __attribute__((always_inline)) void save(void* to, std::int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>
  __attribute__((always_inline)) void add_bf16() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kSum));
  }
  template <int kSum, int kA, int kB>
  __attribute__((always_inline)) void add_bytes() {  // a's are signed, b's unsigned
    asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kSum));
  }
};

#endif

// One thread's use of the unit, from the first product to the object's end.
class MatrixUnit {
 public:
  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() {
    if (rows_ > 0) tiles_.release();
  }

  // c[rows, columns] (+)= a[rows, lanes] x b[lanes, columns] of bf16; columns is a multiple of 32.
  // Strides in lanes. Fetches `lines` cache lines from `ahead` on for each 16 lanes of a pass over up to
  // 32 rows and columns.
  template <bool kAdd>
  void multiply(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b,
                std::int64_t b_stride, float* c, std::int64_t c_stride, int rows, int columns,
                int lanes, const std::byte* ahead = nullptr, int lines = 0) {
    const int whole = lanes / kUnitLanes * kUnitLanes;
    if (whole == 0) {
      multiply_tile<bf16, kAdd>(a, a_stride, b, b_stride, c, c_stride, rows, columns, lanes);
      return;
    }
    const int passes = (rows + kMostPassRows - 1) / kMostPassRows;
    const int height = (rows + passes - 1) / passes;  // equal heights: shapes change seldom
    for (int column = 0; column < columns; column += 2 * kUnitLanes) {
      for (int r = 0; r < rows; r += height) {
        set_rows(static_cast<int>(least(height, rows - r)));
        const auto pass = rows_ > kUnitRows ? &MatrixUnit::pass<kAdd, true> : &MatrixUnit::pass<kAdd, false>;
        (this->*pass)(a + r * a_stride, a_stride * 4, b + column, b_stride, c + r * c_stride + column,
                      c_stride * 4, whole, ahead, lines);
        ahead += whole / kUnitLanes * lines * kCacheLine;
      }
    }
    if (whole < lanes) {
      multiply_tile<bf16, true>(a + whole, a_stride, b + whole * b_stride, b_stride, c, c_stride, rows,
                                columns, lanes - whole);
    }
  }

  // Sums of a few rows, in steps: tile pair 0 has the first 16 rows, pair 1 the others; with 16 rows or fewer either
  // pair has them, so that one can be at work while the other is saved. `rows` of begin_steps() serve until its
  // next call.
  void begin_steps(int rows) { set_rows(rows, kUnitLanes, true); }

  // b [16, 32], which the next calls of add_step() multiply.
  void load_right(const std::uint32_t* b) {
    tiles_.load<kRight>(b, 2 * kUnitBytes);
    tiles_.load<kRight + 1>(b + kUnitLanes, 2 * kUnitBytes);
  }

  // The rows of a pair, 16 lanes of each, `stride` bytes apart.
  template <int kPair>
  void load_left(const void* a, std::int64_t stride) {
    tiles_.load<kLeft + kPair>(a, stride);
  }

  template <int kPair>
  void zero_pair() {
    tiles_.zero<kSums + 2 * kPair>();
    tiles_.zero<kSums + 2 * kPair + 1>();
  }

  template <int kPair>
  void add_step() {
    tiles_.add_bf16<kSums + 2 * kPair, kLeft + kPair, kRight>();
    tiles_.add_bf16<kSums + 2 * kPair + 1, kLeft + kPair, kRight + 1>();
  }

  // -> sums [rows of the pair, 32]
  template <int kPair>
  void save_pair(float* sums) const {
    save_two<kSums + 2 * kPair>(sums, 2 * kUnitBytes);
  }

  // sums[16 * block + row, 16] = a x b of bf16: of kUnitBlocks blocks of kUnitRows rows each, a_stride bytes apart.
  // lanes is a multiple of 16, and so are those of b [lanes, 16], whose rows are b_stride lanes apart.
  void multiply_blocks(const void* const* a, std::int64_t a_stride, const std::uint32_t* b, std::int64_t b_stride,
                       float* sums, int lanes) {
    constexpr int kOther = kRight + 1;
    const auto at = [&](int block, int lane) { return static_cast<const std::uint32_t*>(a[block]) + lane; };
    set_rows(kMostPassRows);
    tiles_.zero<kSums>();
    tiles_.zero<kSums + 1>();
    tiles_.zero<kSums + 2>();
    tiles_.zero<kSums + 3>();
    for (int lane = 0; lane < lanes; lane += kUnitLanes) {
      tiles_.load<kRight>(b + lane * b_stride, b_stride * 4);
      tiles_.load<kLeft>(at(0, lane), a_stride);
      tiles_.load<kLeft + 1>(at(1, lane), a_stride);
      tiles_.load<kOther>(at(2, lane), a_stride);
      tiles_.add_bf16<kSums, kLeft, kRight>();
      tiles_.add_bf16<kSums + 1, kLeft + 1, kRight>();
      tiles_.load<kLeft>(at(3, lane), a_stride);
      tiles_.add_bf16<kSums + 2, kOther, kRight>();
      tiles_.add_bf16<kSums + 3, kLeft, kRight>();
    }
    constexpr int kBlock = kUnitRows * kUnitLanes;
    tiles_.save<kSums>(sums, kUnitBytes);
    tiles_.save<kSums + 1>(sums + kBlock, kUnitBytes);
    tiles_.save<kSums + 2>(sums + 2 * kBlock, kUnitBytes);
    tiles_.save<kSums + 3>(sums + 3 * kBlock, kUnitBytes);
  }

  // c[16, columns] (+)= a[16, lanes] x b[lanes, columns] of bf16: as multiply, for the shapes of multiply_blocks, so that
  // these are not set anew. lanes is a multiple of 16, columns one of 32.
  void add_few(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b, std::int64_t b_stride, float* c,
               std::int64_t c_stride, int columns, int lanes, bool adds) {
    set_rows(kMostPassRows);
    const auto one_pass = adds ? &MatrixUnit::pass<true, false> : &MatrixUnit::pass<false, false>;
    for (int column = 0; column < columns; column += 2 * kUnitLanes) {
      (this->*one_pass)(a, a_stride * 4, b + column, b_stride, c + column, c_stride * 4, lanes, nullptr, 0);
    }
  }

  // sums[rows, 32] = a x b of bytes: rows of 64 signed ones a_stride bytes apart, up to
  // kMostPassRows; and 16 x 32 lanes of four unsigned ones each, one after the other. With another `depth` than 16,
  // rows of a have as many lanes, and there are so many rows of lanes of b.
  void multiply_bytes(const std::byte* a, std::int64_t a_stride, const std::byte* b, std::int32_t* sums,
                      int rows, int depth = kUnitLanes) {
    constexpr std::int64_t stride = 2 * kUnitBytes;  // of b and of the sums
    set_rows(rows, depth);
    tiles_.zero<kSums>();
    tiles_.zero<kSums + 1>();
    tiles_.load<kLeft>(a, a_stride);
    tiles_.load<kRight>(b, stride);
    tiles_.load<kRight + 1>(b + kUnitBytes, stride);
    tiles_.add_bytes<kSums, kLeft, kRight>();
    tiles_.add_bytes<kSums + 1, kLeft, kRight + 1>();
    tiles_.save<kSums>(sums, stride);
    tiles_.save<kSums + 1>(sums + kUnitLanes, stride);
    if (rows <= kUnitRows) return;
    std::int32_t* lower = sums + kUnitRows * 2 * kUnitLanes;
    tiles_.zero<kSums + 2>();
    tiles_.zero<kSums + 3>();
    tiles_.load<kLeft + 1>(a + kUnitRows * a_stride, a_stride);
    tiles_.add_bytes<kSums + 2, kLeft + 1, kRight>();
    tiles_.add_bytes<kSums + 3, kLeft + 1, kRight + 1>();
    tiles_.save<kSums + 2>(lower, stride);
    tiles_.save<kSums + 3>(lower + kUnitLanes, stride);
  }

 private:
  // Two neighbouring sums.
  template <int kFirst>
  void save_two(float* c, std::int64_t c_stride) const {
    tiles_.save<kFirst>(c, c_stride);
    tiles_.save<kFirst + 1>(c + kUnitLanes, c_stride);
  }

  // The rows of a pass, over one or two tiles. Setting shapes empties all tiles.
  // depth: lanes of a row of a, and rows of a tile of b. twice: up to 16 rows are in either of two tiles.
  void set_rows(int rows, int depth = kUnitLanes, bool twice = false) {
    if (rows == rows_ && depth == depth_ && twice == twice_) return;
    rows_ = rows;
    depth_ = depth;
    twice_ = twice;
    TileShapes shapes{};
    shapes.palette = 1;
    const auto set = [&](int tile, int count, int lanes = kUnitLanes) {
      shapes.rows[tile] = static_cast<std::uint8_t>(count);
      shapes.row_bytes[tile] = static_cast<std::uint16_t>(count > 0 ? lanes * 4 : 0);
    };
    const int upper = static_cast<int>(least(rows, kUnitRows)), lower = twice && rows <= kUnitRows ? upper : rows - upper;
    for (int i = 0; i < 2; i++) {
      set(kSums + i, upper);
      set(kSums + 2 + i, lower);
      set(kLeft + i, i == 0 ? upper : lower, depth);
      set(kRight + i, depth);
    }
    tiles_.configure(shapes);
  }

  // Up to kMostPassRows rows x 32 columns; strides of a and c in bytes. kLower: more than kUnitRows.
  template <bool kAdd, bool kLower>
  void pass(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b, std::int64_t b_stride,
            float* c, std::int64_t c_stride, int lanes, const std::byte* ahead, int lines) {
    const std::uint32_t* lower_a = a + kUnitRows * (a_stride / 4);
    float* lower_c = c + kUnitRows * (c_stride / 4);
    open<kAdd, kSums>(c, c_stride);
    if (kLower) open<kAdd, kSums + 2>(lower_c, c_stride);
    for (int lane = 0; lane < lanes; lane += kUnitLanes) {
      const std::uint32_t* right = b + lane * b_stride;
      tiles_.load<kRight>(right, b_stride * 4);
      tiles_.load<kLeft>(a + lane, a_stride);
      tiles_.load<kRight + 1>(right + kUnitLanes, b_stride * 4);
      for (int i = 0; i < lines; i++, ahead += kCacheLine) __builtin_prefetch(ahead, 0, 2);
      tiles_.add_bf16<kSums, kLeft, kRight>();
      tiles_.add_bf16<kSums + 1, kLeft, kRight + 1>();
      if (kLower) {
        tiles_.load<kLeft + 1>(lower_a + lane, a_stride);
        tiles_.add_bf16<kSums + 2, kLeft + 1, kRight>();
        tiles_.add_bf16<kSums + 3, kLeft + 1, kRight + 1>();
      }
    }
    save_two<kSums>(c, c_stride);
    if (kLower) save_two<kSums + 2>(lower_c, c_stride);
  }

  // Two neighbouring sums: what c holds, or 0.
  template <bool kAdd, int kFirst>
  void open(const float* c, std::int64_t c_stride) {
    if (kAdd) {
      tiles_.load<kFirst>(c, c_stride);
      tiles_.load<kFirst + 1>(c + kUnitLanes, c_stride);
    } else {
      tiles_.zero<kFirst>();
      tiles_.zero<kFirst + 1>();
    }
  }

  Tiles tiles_;
  int rows_ = 0, depth_ = 0;  // that the shapes are set for
  bool twice_ = false;
};

// Whether the unit multiplies so many rows of T.
template <class T>
constexpr bool uses_unit(std::int64_t rows) {
  return Pack<T>::per_lane == 2 && rows >= kLeastUnitRows;
}

#elif !defined(SAPWOOD_UNIT)

struct MatrixUnit {};

#endif

// Whether one unit has all products of T, since its order of adding is not that of vectors.
template <class T>
constexpr bool is_only_on_unit() {
#if defined(SAPWOOD_AMX)
  return Pack<T>::per_lane == 2;
#else
  return false;
#endif
}

// multiply_tile, on the matrix unit where it serves: a row's result does not depend on the number of rows. With a unit
// of x86, a product of bf16 has 16 lanes or more, and kAdd is no kAddAfter.
template <class T, int kAdd>
SAPWOOD_INLINE void multiply_on([[maybe_unused]] MatrixUnit& unit, const std::uint32_t* a, std::int64_t a_stride,
                                const std::uint32_t* b, std::int64_t b_stride, float* c,
                                std::int64_t c_stride, int rows, int columns, int lanes) {
#if defined(SAPWOOD_AMX)
  if constexpr (is_only_on_unit<T>() && kAdd != kAddAfter) {
    unit.template multiply<kAdd == 1>(a, a_stride, b, b_stride, c, c_stride, rows, columns, lanes);
    return;
  }
#elif defined(SAPWOOD_UNIT)
  if (uses_unit<T>(rows)) {
    unit.multiply<kAdd>(a, a_stride, b, b_stride, c, c_stride, rows, columns, lanes);
    return;
  }
#endif
  multiply_tile<T, kAdd>(a, a_stride, b, b_stride, c, c_stride, rows, columns, lanes);
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA

// Numbers as ops take and give them, and how they are compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "context.h"
#include "quantized.h"

namespace sapwood {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kThreads = 2;

// ---- numbers ----

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 1) {}

  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  int below(int limit) { return static_cast<int>(bits() % static_cast<std::uint32_t>(limit)); }
  double unit() { return bits() / 2147483648.0 * 2 - 1; }  // in [-1, 1)

 private:
  std::uint64_t state_;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

double from_bf16(std::uint16_t bits) { return bits_as<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t to_bf16(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -size : size;
}

// Sign, exponent and `mantissa` bits; no infinities or NaN.
double from_fp8(int code, int mantissa, int bias) {
  const int exponent = (code & 127) >> mantissa, fraction = code & ((1 << mantissa) - 1);
  const double size = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                    : std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
  return code & 128 ? -size : size;
}

double from_e4m3(int code) { return from_fp8(code, 3, 7); }
double from_e5m2(int code) { return from_fp8(code, 2, 15); }

// Numbers as an op takes and gives them.
struct Array {
  DType dtype;
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;

  Array(DType type, std::size_t size) : dtype(type) {
    type == DType::f32 ? wide.resize(size) : narrow.resize(size);
  }
  Array(DType type, std::size_t size, Random& random, double extent = 1) : Array(type, size) {
    for (std::size_t i = 0; i < size; i++) set(i, random.unit() * extent);
  }

  void* data() { return dtype == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  std::size_t size() const { return wide.size() + narrow.size(); }
  double operator[](std::size_t i) const { return dtype == DType::f32 ? wide[i] : from_bf16(narrow[i]); }
  void set(std::size_t i, double x) {
    dtype == DType::f32 ? void(wide[i] = static_cast<float>(x)) : void(narrow[i] = to_bf16(static_cast<float>(x)));
  }
  std::vector<double> numbers() const {
    std::vector<double> all(size());
    for (std::size_t i = 0; i < all.size(); i++) all[i] = (*this)[i];
    return all;
  }
};

const char* name_of(DType dtype) { return dtype == DType::f32 ? "fp32" : "bf16"; }

// ---- comparisons ----

int failures = 0;
std::string set_name;  // of the instruction set whose turn it is

void fail(const std::string& what, const std::string& why) {
  failures++;
  std::printf("FAILED %s %s: %s\n", set_name.c_str(), what.c_str(), why.c_str());
}

// Entry by entry: off by `tolerance` times the largest expected number at most; an infinity as it is, and
// for NaN anything that is no finite number.
void check(const std::string& what, const std::vector<double>& actual, const std::vector<double>& expected,
           double tolerance) {
  double largest = 1e-3;
  for (const double x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  if (actual.size() != expected.size()) return fail(what, "another size");
  for (std::size_t i = 0; i < expected.size(); i++) {
    const double a = actual[i], e = expected[i];
    const bool agree = std::isfinite(e) ? std::fabs(a - e) <= tolerance * largest : e != e ? !std::isfinite(a) : a == e;
    if (agree) continue;
    return fail(what, "entry " + std::to_string(i) + " is " + std::to_string(a) + ", not " + std::to_string(e) +
                          "; the largest is " + std::to_string(largest));
  }
}

// Of sums, and of what is rounded to the dtype in the end.
double tolerance_of(DType dtype) { return dtype == DType::f32 ? 2e-6 : 0.00391; }

}  // namespace
}  // namespace sapwood

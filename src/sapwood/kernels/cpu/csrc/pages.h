// Where the tokens of a request lie in a paged cache. Included only by *.isa.cpp.
#pragma once

#include "kv8.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Calls body(t, count, page, offset) for the tokens [begin, begin + n) of a request: of these, `count` from the
// t-th on lie in one page of the cache, from its token `offset` on. `entries` is the request's row of a page table,
// an entry of which is a page of page_size tokens; or a single token (entry_size 1), number page * page_size + offset.
template <class Body>
SAPWOOD_INLINE void each_page(const std::int32_t* entries, std::int64_t entry_size, std::int64_t page_size,
                              std::int64_t begin, int n, const Body& body) {
  std::int64_t index = begin / entry_size, offset = begin % entry_size;
  for (int t = 0; t < n; index++, offset = 0) {
    const std::int64_t entry = entries[index];
    const int count = static_cast<int>(least(n - t, entry_size - offset));
    if (entry_size == page_size) {
      body(t, count, entry, offset);
    } else {
      body(t, count, entry / page_size, entry % page_size);
    }
    t += count;
  }
}

// `count` tokens from `offset` on of a page in 8 bits -> [count, d]; `tile`: where a head's part of the page begins.
template <class T>
SAPWOOD_INLINE void dequantize(KvFormat format, const void* cache, std::int64_t tile, std::int64_t page_size,
                               std::int64_t offset, int count, int d, T* to) {
  const std::uint8_t* numbers = static_cast<const std::uint8_t*>(cache) + tile;
  const std::uint8_t* scales = numbers + page_size * d;
  dequantize_rows(format, numbers + offset * d, scales + offset * kScaleBytes, count, d, to);
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA

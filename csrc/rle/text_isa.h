// The two builds of the text core: text.h calls one or the other. Not for callers of text.h; the
// fuzzer compares them.
#pragma once

#include "rle/text.h"

#define PMVIS_RLE_FUNCTIONS                                                                    \
  int64_t decode_ends(const char* text, int64_t length, int64_t pixels, uint32_t* out);        \
  Decoded decode_intervals(const char* text, int64_t length, int64_t pixels, Interval* out);   \
  int64_t decode_area(const char* text, int64_t length, int64_t pixels);                       \
  int64_t overlap(const Interval* a, int64_t a_number, const Interval* b, int64_t b_number);

namespace pmvis {

// Reads a number of a text that goes on to `end`, which is not reached yet; false if malformed.
// Each build has its own, so that none runs the other's instructions.
static inline bool read_number(const char** text, const char* end, int64_t* number) {
  const char* at = *text;
  unsigned code = static_cast<unsigned char>(*at++) - 48u;
  int64_t value = code & 31u;
  int shift = 5;
  for (; code & 32u; shift += 5) {
    if (code > 63u || at == end || shift == 5 * kMaxGroups) return false;
    code = static_cast<unsigned char>(*at++) - 48u;
    value |= static_cast<int64_t>(code & 31u) << shift;
  }
  if (code > 63u) return false;
  *number = (code & 16u) != 0 ? value - (int64_t{1} << shift) : value;
  *text = at;
  return true;
}

namespace scalar {
PMVIS_RLE_FUNCTIONS
}
#if defined(PMVIS_X86_ISA)
namespace avx2 {
PMVIS_RLE_FUNCTIONS
}
#endif
}  // namespace pmvis

#undef PMVIS_RLE_FUNCTIONS

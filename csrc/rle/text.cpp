#include "rle/text.h"

#include "rle/text_isa.h"

namespace pmvis {
namespace {

// Calls visit(start, end, foreground) for each run; false if the text is malformed.
template <typename Visit>
bool each_run(const char* text, int64_t length, int64_t pixels, const Visit& visit) {
  if (pixels < 0 || pixels > kMaxPixels) return false;
  if (length == 0) {
    visit(0u, 0u, false);
    return pixels == 0;
  }
  const char* const end = text + length;
  int64_t total = 0, last = 0, before_last = 0;
  for (int64_t index = 0; text != end; ++index) {
    int64_t value;
    if (!read_number(&text, end, &value)) return false;
    if (index > 2) value += before_last;
    if (value < 0 || value > pixels - total) return false;
    visit(static_cast<uint32_t>(total), static_cast<uint32_t>(total + value), index % 2 != 0);
    total += value;
    before_last = last;
    last = value;
  }
  return total == pixels;
}

// Asked once, before main: the answer cannot change.
bool find_avx2() {
#if defined(PMVIS_X86_ISA)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("popcnt");
#else
  return false;
#endif
}

const bool kAvx2 = find_avx2();

}  // namespace

namespace scalar {

int64_t decode_ends(const char* text, int64_t length, int64_t pixels, uint32_t* out) {
  int64_t number = 0;
  const bool good = each_run(text, length, pixels,
                             [&](uint32_t, uint32_t end, bool) { out[number++] = end; });
  return good ? number : -1;
}

Decoded decode_intervals(const char* text, int64_t length, int64_t pixels, Interval* out) {
  int64_t number = 0, area = 0;
  const bool good =
      each_run(text, length, pixels, [&](uint32_t start, uint32_t end, bool foreground) {
        if (!foreground || start == end) return;
        area += end - start;
        if (number > 0 && out[number - 1].end == start) {
          out[number - 1].end = end;
        } else {
          out[number++] = {start, end};
        }
      });
  return good ? Decoded{number, area} : Decoded{-1, 0};
}

int64_t decode_area(const char* text, int64_t length, int64_t pixels) {
  int64_t area = 0;
  const bool good =
      each_run(text, length, pixels, [&](uint32_t start, uint32_t end, bool foreground) {
        area += foreground ? end - start : 0;
      });
  return good ? area : -1;
}

int64_t overlap(const Interval* a, int64_t a_number, const Interval* b, int64_t b_number) {
  int64_t common = 0, i = 0, j = 0;
  while (i < a_number && j < b_number) {
    const Interval x = a[i], y = b[j];
    const uint32_t start = x.start > y.start ? x.start : y.start;
    const uint32_t end = x.end < y.end ? x.end : y.end;
    common += end > start ? end - start : 0;
    i += x.end <= y.end;
    j += y.end <= x.end;
  }
  return common;
}

}  // namespace scalar

#if defined(PMVIS_X86_ISA)
#define PMVIS_CHOOSE(call) (kAvx2 ? avx2::call : scalar::call)
#else
#define PMVIS_CHOOSE(call) (scalar::call)
#endif

int64_t decode_ends(const char* text, int64_t length, int64_t pixels, uint32_t* out) {
  return PMVIS_CHOOSE(decode_ends(text, length, pixels, out));
}

Decoded decode_intervals(const char* text, int64_t length, int64_t pixels, Interval* out) {
  return PMVIS_CHOOSE(decode_intervals(text, length, pixels, out));
}

int64_t decode_area(const char* text, int64_t length, int64_t pixels) {
  return PMVIS_CHOOSE(decode_area(text, length, pixels));
}

int64_t overlap(const Interval* a, int64_t a_number, const Interval* b, int64_t b_number) {
  return PMVIS_CHOOSE(overlap(a, a_number, b, b_number));
}

bool has_avx2() { return kAvx2; }

char* write_text(const uint32_t* ends, int64_t number, char* out) {
  int64_t at = 0, last = 0, before_last = 0;
  for (int64_t k = 0; k < number; ++k) {
    const int64_t run = int64_t{ends[k]} - at;
    int64_t rest = k > 2 ? run - before_last : run;
    at = ends[k];
    before_last = last;
    last = run;
    if (rest >= -512 && rest < 512) {
      // Nearly all runs. Both characters are written, whether one or two count: no branch.
      const bool two = rest < -16 || rest > 15;
      out[0] = static_cast<char>((rest & 31) + (two ? 80 : 48));
      out[1] = static_cast<char>((rest >> 5 & 31) + 48);
      out += two ? 2 : 1;
      continue;
    }
    for (bool more = true; more;) {
      const auto low = static_cast<unsigned>(rest & 31);
      rest >>= 5;
      more = rest != ((low & 16u) != 0 ? -1 : 0);
      *out++ = static_cast<char>(low + (more ? 80u : 48u));
    }
  }
  return out;
}

}  // namespace pmvis

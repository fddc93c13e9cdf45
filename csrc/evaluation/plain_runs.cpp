// Plain runs: lists of whole numbers, 64 characters at a time.
#include <algorithm>
#include <cstring>

#include "evaluation/track_masks.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pmvis {
namespace {

// What 64 characters of a list of whole numbers hold; bit k belongs to character k.
struct Characters {
  uint64_t digits, zeros, commas, spaces;
  uint16_t values[64];  // of the number, up to three digits long, whose last digit stands here
};

#if defined(__SSE2__)

constexpr bool kHasValues = true;

// Returns what is left of characters when '0' is taken away, 0 if they are no digits.
__m128i digits_of(__m128i c, __m128i* is_digit) {
  const __m128i value = _mm_sub_epi8(c, _mm_set1_epi8('0'));
  *is_digit = _mm_cmpeq_epi8(_mm_min_epu8(value, _mm_set1_epi8(9)), value);
  return _mm_and_si128(value, *is_digit);
}

// Reads the 64 characters from `text` on; two in front of it are readable, too.
void read_characters(const char* text, Characters* out) {
  out->digits = out->zeros = out->commas = out->spaces = 0;
  const __m128i none = _mm_setzero_si128(), hundred = _mm_set1_epi16(100);
  for (int k = 0; k < 64; k += 16) {
    const auto load = [&](int at) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(text + at));
    };
    const __m128i c = load(k);
    const auto bits = [k](__m128i lanes) {
      return static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(lanes))) << k;
    };
    const auto is = [c](char wanted) { return _mm_cmpeq_epi8(c, _mm_set1_epi8(wanted)); };
    __m128i here, one, two;
    const __m128i ones = digits_of(c, &here);
    const __m128i tens = digits_of(load(k - 1), &one);
    const __m128i hundreds = _mm_and_si128(digits_of(load(k - 2), &two), one);
    const __m128i doubled = _mm_add_epi8(tens, tens);
    const __m128i fourfold = _mm_add_epi8(doubled, doubled);
    const __m128i low = _mm_add_epi8(_mm_add_epi8(ones, doubled), _mm_add_epi8(fourfold, fourfold));
    const auto store = [&](int at, __m128i l, __m128i h) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out->values + k + at),
                       _mm_add_epi16(l, _mm_mullo_epi16(h, hundred)));
    };
    store(0, _mm_unpacklo_epi8(low, none), _mm_unpacklo_epi8(hundreds, none));
    store(8, _mm_unpackhi_epi8(low, none), _mm_unpackhi_epi8(hundreds, none));
    out->digits |= bits(here);
    out->zeros |= bits(is('0'));
    out->commas |= bits(is(','));
    out->spaces |=
        bits(_mm_or_si128(_mm_or_si128(is(' '), is('\n')), _mm_or_si128(is('\r'), is('\t'))));
  }
}

#else

constexpr bool kHasValues = false;

void read_characters(const char* text, Characters* out) {
  out->digits = out->zeros = out->commas = out->spaces = 0;
  for (int k = 0; k < 64; ++k) {
    const char c = text[k];
    const uint64_t bit = uint64_t{1} << k;
    if (c >= '0' && c <= '9') out->digits |= bit;
    if (c == '0') out->zeros |= bit;
    if (c == ',') out->commas |= bit;
    if (c == ' ' || c == '\n' || c == '\r' || c == '\t') out->spaces |= bit;
  }
}

#endif

// Bit k: whether an odd number of bits up to k is set.
uint64_t parities(uint64_t bits) {
  for (int shift = 1; shift < 64; shift *= 2) bits ^= bits << shift;
  return bits;
}

// Returns the number whose last digit is *last; eleven characters in front are readable. Above 32
// bits the value is any that is too large.
uint64_t number_at(const char* last) {
  constexpr int kMostDigits = 12;
  uint64_t value = 0, unit = 1;
  for (int k = 0; k < kMostDigits && *last >= '0' && *last <= '9'; ++k, unit *= 10) {
    value += unit * static_cast<uint64_t>(*last-- - '0');
  }
  return value;
}

// Checks and reads plain runs block by block into the ends of runs.
class RunReader {
 public:
  RunReader(const char* text, int64_t length, uint32_t* ends)
      : text_(text), length_(length), ends_(ends) {}

  // Returns the number of runs, -1 if the text is no list of whole numbers or they do not sum to
  // `pixels`. An empty list has none.
  int64_t read(int64_t pixels) {
    for (int64_t at = 0; at < length_; at += kBlock) {
      if (!block(at)) return -1;
    }
    if (number_ == 0 ? open_ != 0 || pixels != 0 : open_ == 0) return -1;
    return total_ == static_cast<uint64_t>(pixels) ? number_ : -1;
  }

  bool has_empty() const { return has_empty_; }

 private:
  static constexpr int64_t kBlock = 64;
  static constexpr int64_t kBefore = 16;

  // Reads a block; one at an end of the text from a copy between spaces.
  bool block(int64_t at) {
    const int64_t left = length_ - at;
    if (at >= kBefore && left > kBlock) return read_block(text_ + at);
    char copy[kBefore + kBlock + 1];
    std::memset(copy, ' ', sizeof(copy));
    const int64_t before = std::min(at, kBefore), behind = std::min(left, kBlock + 1);
    std::memcpy(copy + kBefore - before, text_ + at - before,
                static_cast<size_t>(before + behind));
    return read_block(copy + kBefore);
  }

  bool read_block(const char* text) {
    Characters c;
    read_characters(text, &c);
    if ((c.digits | c.commas | c.spaces) != ~uint64_t{0}) return false;
    const bool goes_on = text[kBlock] >= '0' && text[kBlock] <= '9';
    const uint64_t next = c.digits >> 1 | uint64_t{goes_on} << 63;
    const uint64_t first = c.digits & ~(c.digits << 1 | digits_before_ >> 63);
    const uint64_t last = c.digits & ~next;
    // A number and a comma must take turns, and no number begins with a zero.
    const uint64_t marks = last | c.commas;
    const uint64_t open = parities(marks) ^ open_;
    if ((open & marks) != last || (c.zeros & first & next) != 0) return false;
    open_ = static_cast<uint64_t>(static_cast<int64_t>(open) >> 63);
    const auto before = [&](int k) { return c.digits << k | digits_before_ >> (64 - k); };
    const bool any_long = (last & before(1) & before(2) & before(3)) != 0;
    if (kHasValues && !any_long) {
      add_all(last, [&](int place) { return uint64_t{c.values[place]}; });
    } else {
      add_all(last, [&](int place) { return number_at(text + place); });
    }
    digits_before_ = c.digits;
    return true;
  }

  // Adds the numbers that end at the places of set bits.
  template <typename Value>
  void add_all(uint64_t places, const Value& value) {
    uint64_t total = total_;
    uint32_t* out = ends_ + number_;
    bool empty = false;
    for (; places != 0; places &= places - 1) {
      const uint64_t run = value(__builtin_ctzll(places));
      empty |= run == 0;
      total += run;
      *out++ = static_cast<uint32_t>(total);
    }
    total_ = total;
    number_ = out - ends_;
    has_empty_ |= empty;
  }

  const char* text_;
  int64_t length_;
  uint32_t* ends_;
  uint64_t open_ = 0;       // all bits: a number came last, not a comma
  uint64_t digits_before_ = 0;  // where the block in front has digits
  uint64_t total_ = 0;
  int64_t number_ = 0;
  bool has_empty_ = false;
};

// Drops empty intervals and joins those that touch. Returns how many are left.
int64_t join(Interval* intervals, int64_t number) {
  int64_t kept = 0;
  for (const Interval* next = intervals; next != intervals + number; ++next) {
    const bool touches = kept > 0 && intervals[kept - 1].end == next->start;
    if (touches) intervals[kept - 1].end = next->end;
    if (!touches && next->start != next->end) intervals[kept++] = *next;
  }
  return kept;
}

}  // namespace

Decoded decode_runs(const char* text, int64_t length, int64_t pixels, Interval* out) {
  // The runs at 2 k and 2 k + 1 end where interval k begins and ends.
  RunReader reader(text, length, reinterpret_cast<uint32_t*>(out));
  const int64_t runs = reader.read(pixels);
  if (runs < 0) return {-1, 0};
  int64_t area = 0;
  for (int64_t k = 0; k < runs / 2; ++k) area += out[k].end - out[k].start;
  return {reader.has_empty() ? join(out, runs / 2) : runs / 2, area};
}

}  // namespace pmvis

// The text core for processors with AVX2; compiled with -mavx2 and the bit instructions.
//
// Texts are read 32 characters at a time. A "window" is 8 characters, and owns the runs whose last
// character lies in it; so windows begin at fixed places, and none waits for the one before. The
// bits "another character follows" of a window and of two characters before it look up a shuffle
// that brings the characters of each run into its own 16-bit lane. Runs are then sums of every
// other lane, and ends of runs are sums of runs. A block that 16 bits cannot hold (a run of
// kLongRun pixels or of four characters) or that looks malformed is read again, run by run.
#include <immintrin.h>

#include <cstddef>
#include <cstring>

#include "rle/text_isa.h"

namespace pmvis {
namespace avx2 {
namespace {

constexpr int kBlock = 32;        // characters read at once: four windows
constexpr int kReach = 40;        // characters from a block's begin that its loads may touch
constexpr int kTail = 48;         // characters at a text's end that are read from a copy
constexpr int64_t kShortest = 64;  // characters of a text that vectors are worth
constexpr int64_t kScratch = 8192;  // characters whose runs fit the stack
constexpr int64_t kMostPixels = 0xff000000;  // so that no sum wraps before it is checked
constexpr int64_t kLongRun = 8192;  // eight shorter runs sum to less than 2^16

// Shuffles of a window, by its more-bits; lane k gets the characters of the window's k-th run.
// Byte 0 is the character two places before the window.
struct Shuffle {
  alignas(32) uint8_t first_two[16], third[16];
};

// Shuffles of a window's eight lanes, by the number of runs in it.
struct Lasts {
  alignas(32) uint8_t two_runs[16];  // the last two runs, repeated
  uint8_t end[16];                   // the last run's end in every 32-bit lane
};

struct Tables {
  Shuffle shuffles[512];
  Lasts lasts[9];
};

constexpr Shuffle shuffle_of(int more) {
  Shuffle s{};
  for (int k = 0; k < 16; ++k) s.first_two[k] = s.third[k] = 0x80;
  int lane = 0;
  for (int at = 2; at < 10; ++at) {
    const bool goes_on = at < 9 && (more >> at & 1) != 0;
    if (goes_on) continue;
    const bool two = (more >> (at - 1) & 1) != 0;
    const bool three = two && (more >> (at - 2) & 1) != 0;
    const int first = at - (two ? 1 : 0) - (three ? 1 : 0);
    s.first_two[2 * lane] = static_cast<uint8_t>(first);
    if (two) s.first_two[2 * lane + 1] = static_cast<uint8_t>(first + 1);
    if (three) s.third[2 * lane] = static_cast<uint8_t>(at);
    ++lane;
  }
  return s;
}

constexpr Lasts lasts_of(int number) {
  Lasts l{};
  // Fewer than two there are only where the text ends, and nobody asks for the last two.
  const int before_last = number > 1 ? number - 2 : 0;
  const int last = number > 0 ? number - 1 : 0;
  for (int k = 0; k < 4; ++k) {
    for (int byte = 0; byte < 2; ++byte) {
      l.two_runs[4 * k + byte] = static_cast<uint8_t>(2 * before_last + byte);
      l.two_runs[4 * k + 2 + byte] = static_cast<uint8_t>(2 * last + byte);
      l.end[4 * k + byte] = static_cast<uint8_t>(number == 0 ? 0x80 : 2 * last + byte);
      l.end[4 * k + 2 + byte] = 0x80;
    }
  }
  return l;
}

constexpr Tables make_tables() {
  Tables t{};
  for (int more = 0; more < 512; ++more) t.shuffles[more] = shuffle_of(more);
  for (int number = 0; number < 9; ++number) t.lasts[number] = lasts_of(number);
  return t;
}

constexpr Tables kTables = make_tables();

inline bool all_short(__m256i any) {
  return _mm256_testz_si256(any, _mm256_set1_epi16(static_cast<short>(-kLongRun))) != 0;
}

inline bool has_no_zero(__m256i lanes) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi16(lanes, _mm256_setzero_si256())) == 0;
}

inline __m128i load16(const void* at) {
  return _mm_loadu_si128(static_cast<const __m128i*>(at));
}

inline __m256i load32(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

inline __m256i load_two(const void* low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(low)), load16(high), 1);
}

// What the vector code carries from window to window.
struct Carry {
  __m128i two_runs;  // the last two runs, repeated; 16 bits
  __m256i end;       // the last end in every lane; 32 bits
  __m256i any;       // bits that any run has
  __m256i least;     // least run of each lane
};

// Reads two windows at `text`. Bit 2 of `more` and bit 0 of `last`, the characters that end a run,
// belong to text[0]. Returns where the ends go on.
inline uint32_t* two_windows(const char* text, uint64_t more, uint64_t last, uint32_t* out,
                             Carry* c) {
  const Shuffle& low = kTables.shuffles[more & 511];
  const Shuffle& high = kTables.shuffles[more >> 8 & 511];
  const int64_t low_number = _mm_popcnt_u32(static_cast<uint32_t>(last & 255));
  const int64_t high_number = _mm_popcnt_u32(static_cast<uint32_t>(last & 0xff00));
  const Lasts& low_lasts = kTables.lasts[low_number];
  const Lasts& high_lasts = kTables.lasts[high_number];

  // Five bits of each character, signed where bit 4 is set and bit 5 is not.
  const __m256i chars = load_two(text - 2, text + 6);
  const __m256i lower = _mm256_and_si256(_mm256_cmpgt_epi8(chars, _mm256_set1_epi8(63)),
                                         _mm256_set1_epi8(32));
  const __m256i digits =
      _mm256_sub_epi8(_mm256_sub_epi8(chars, _mm256_set1_epi8(48)), lower);
  const __m256i first_two =
      _mm256_shuffle_epi8(digits, load_two(low.first_two, high.first_two));
  const __m256i third = _mm256_shuffle_epi8(digits, load_two(low.third, high.third));
  __m256i runs = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_set1_epi16(0x2001), first_two),
                                  _mm256_slli_epi16(third, 10));
  runs = _mm256_add_epi16(runs, _mm256_slli_si256(runs, 4));
  runs = _mm256_add_epi16(runs, _mm256_slli_si256(runs, 8));

  const __m128i low_runs = _mm_add_epi16(_mm256_castsi256_si128(runs), c->two_runs);
  const __m128i two_runs = _mm_shuffle_epi8(low_runs, load16(low_lasts.two_runs));
  const __m128i high_runs = _mm_add_epi16(_mm256_extracti128_si256(runs, 1), two_runs);
  c->two_runs = _mm_shuffle_epi8(high_runs, load16(high_lasts.two_runs));
  runs = _mm256_inserti128_si256(_mm256_castsi128_si256(low_runs), high_runs, 1);
  c->any = _mm256_or_si256(c->any, runs);
  c->least = _mm256_min_epu16(c->least, runs);

  __m256i ends = _mm256_add_epi16(runs, _mm256_slli_si256(runs, 2));
  ends = _mm256_add_epi16(ends, _mm256_slli_si256(ends, 4));
  ends = _mm256_add_epi16(ends, _mm256_slli_si256(ends, 8));
  const __m256i sums = _mm256_shuffle_epi8(ends, load_two(low_lasts.end, high_lasts.end));
  const __m256i middle = _mm256_add_epi32(c->end, _mm256_permute4x64_epi64(sums, 0x44));
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(out),
      _mm256_add_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(ends)), c->end));
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(out + low_number),
      _mm256_add_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(ends, 1)), middle));
  c->end = _mm256_add_epi32(middle, _mm256_permute4x64_epi64(sums, 0xee));
  return out + low_number + high_number;
}


// A text being read: runs before `text` have their ends in front of `out`.
struct Reader {
  const char* text;
  uint32_t* out;
  bool empty;  // whether a run but the first has no pixels
};

// Joins the characters of a run, least significant first; bits above bit 5 are ignored.
inline int64_t join(uint64_t chars, unsigned length) {
  const uint64_t used = _bzhi_u64(chars - 0x3030303030303030u, 8 * length) & 0x1f1f1f1f1f1f1f1fu;
  const __m128i tens = _mm_maddubs_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(used)),
                                         _mm_set1_epi16(0x2001));
  const auto twenties = static_cast<uint64_t>(
      _mm_cvtsi128_si64(_mm_madd_epi16(tens, _mm_set1_epi32(0x04000001))));
  const uint64_t value = (twenties & 0xfffff) | twenties >> 32 << 20;
  const unsigned unused = 64 - 5 * length;
  return static_cast<int64_t>(value << unused) >> unused;
}

// Reads 32 characters; false if one is not in the alphabet. Bit k of more: so is text[k].
inline bool read_more(const char* text, uint32_t* more) {
  const __m256i codes = _mm256_sub_epi8(load32(text), _mm256_set1_epi8(48));
  *more = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(codes, 2)));
  return _mm256_testz_si256(codes, _mm256_set1_epi8(static_cast<char>(0xc0))) != 0;
}

// Reads the first three runs, which are no differences.
bool read_head(Reader* r, int64_t pixels) {
  uint32_t more;
  if (!read_more(r->text, &more)) return false;
  int64_t total = 0;
  for (int k = 0; k < 3; ++k) {
    const unsigned length = _tzcnt_u32(~more) + 1;
    if (length > kMaxGroups) return false;
    uint64_t chars;
    std::memcpy(&chars, r->text, 8);
    const int64_t run = join(chars, length);
    if (run < 0 || run > pixels - total) return false;
    r->empty |= k > 0 && run == 0;
    total += run;
    *r->out++ = static_cast<uint32_t>(total);
    r->text += length;
    more >>= length;
  }
  return true;
}

// Reads run after run, at least until `text` passes `until` and then until the last two runs are
// short, or to `end`. At least three runs must have been read.
bool read_runs(Reader* r, const char* until, const char* end, int64_t pixels) {
  const char* text = r->text;
  uint32_t* out = r->out;
  int64_t total = out[-1], last = total - out[-2], before_last = int64_t{out[-2]} - out[-3];
  while (text != end && (text < until || last >= kLongRun || before_last >= kLongRun)) {
    int64_t value;
    if (!read_number(&text, end, &value)) return false;
    value += before_last;
    if (value < 0 || value > pixels - total) return false;
    r->empty |= value == 0;
    total += value;
    *out++ = static_cast<uint32_t>(total);
    before_last = last;
    last = value;
  }
  r->text = text;
  r->out = out;
  return true;
}

inline Carry carry_of(const uint32_t* out) {
  const uint32_t last = out[-1] - out[-2], before_last = out[-2] - out[-3];
  return {_mm_set1_epi32(static_cast<int>(last << 16 | before_last)),
          _mm256_set1_epi32(static_cast<int>(out[-1])), _mm256_setzero_si256(),
          _mm256_set1_epi16(-1)};
}

// The end of a text, copied so that whole vectors can be read; zeros follow, which are runs of one
// character.
struct Tail {
  alignas(32) char text[kTail + 2 * kBlock];

  Tail(const char* end, const char* stop) {
    for (int k = 0; k < kTail; k += 16) {
      _mm_store_si128(reinterpret_cast<__m128i*>(text + k), load16(end - kTail + k));
    }
    const __m256i zeros = _mm256_set1_epi8('0');
    const int64_t used = kTail - (end - stop);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(text + used), zeros);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(text + used + 32), zeros);
  }
};

// Where reading by blocks stands.
struct Blocks {
  uint32_t* out;
  uint64_t before;  // more-bits of the three characters before
  Carry carry;
  int64_t awkward;  // characters that must be passed run by run
};

enum class Block { kRead, kMalformed, kAwkward };

// Reads a block, of which characters with a bit in `valid` count; the others are zeros.
inline Block read_block(const char* text, uint64_t valid, Blocks* b) {
  uint32_t mask;
  if (!read_more(text, &mask)) return Block::kMalformed;
  const uint64_t more = uint64_t{mask} << 3 | b->before;
  const auto fours = static_cast<uint32_t>(more & more >> 1 & more >> 2);
  if (fours != 0) {
    b->awkward = _tzcnt_u32(fours) + 1;
    return Block::kAwkward;
  }
  const uint64_t last = ~uint64_t{mask} & valid;
  uint32_t* next = two_windows(text, more >> 1, last, b->out, &b->carry);
  next = two_windows(text + 16, more >> 17, last >> 16, next, &b->carry);
  if (!all_short(b->carry.any)) {
    b->awkward = kBlock;
    return Block::kAwkward;
  }
  b->out = next;
  b->before = more >> kBlock;
  return Block::kRead;
}

// Reads blocks up to `stop`, where a run begins; `end` is the text's end. Stops early in front of
// an awkward block; *until is behind what is awkward then. False: malformed.
bool read_blocks(Reader* r, const char* stop, const char* end, int64_t pixels,
                 const char** until) {
  const char* text = r->text;
  Blocks b{r->out, 0, carry_of(r->out), kBlock};
  Block found = Block::kRead;
  for (; end - text >= kReach; text += kBlock) {
    found = read_block(text, ~uint64_t{0}, &b);
    if (found != Block::kRead) break;
    if (b.out[-1] > pixels) return false;
  }
  if (found == Block::kRead) {
    const Tail tail(end, stop);
    for (; text < stop; text += kBlock) {
      const auto left = static_cast<unsigned>(stop - text);
      found = read_block(tail.text + kTail - (end - text), _bzhi_u64(~uint64_t{0}, left), &b);
      if (found != Block::kRead) break;
    }
  }
  if (found == Block::kMalformed) return false;
  *until = text + b.awkward;
  r->text = found == Block::kRead ? stop
                                  : text - _lzcnt_u32(~static_cast<uint32_t>(b.before << 29));
  r->out = b.out;
  r->empty |= !has_no_zero(b.carry.least);
  return b.out[-1] <= pixels;
}

// Reads a text of kShortest characters or more into ends of runs; false if it is malformed.
bool read(Reader* r, int64_t length, int64_t pixels) {
  const char* const end = r->text + length;
  uint32_t more;
  if (!read_more(end - 32, &more) || (more & 0x80000000u) != 0) return false;
  const unsigned last_length = _lzcnt_u32(~(more << 1)) + 1;
  if (last_length > kMaxGroups || !read_head(r, pixels)) return false;
  const char* const stop = end - last_length;
  const char* until = r->text;
  while (r->text != stop) {
    if (!read_runs(r, until, stop, pixels)) return false;
    if (r->text != stop && !read_blocks(r, stop, end, pixels, &until)) return false;
  }
  uint64_t chars;
  std::memcpy(&chars, end - 8, 8);
  const int64_t difference = join(chars >> 8 * (8 - last_length), last_length);
  const int64_t run = difference + (int64_t{r->out[-2]} - r->out[-3]);
  if (run != pixels - r->out[-1]) return false;  // not negative: no end has passed `pixels`
  r->empty |= run == 0;
  *r->out++ = static_cast<uint32_t>(pixels);
  return true;
}

// The sum of four 64-bit numbers; it may wrap.
int64_t sum_of(__m256i four) {
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

// Four intervals of one list beside four of another.
struct Pairs {
  __m256i common;  // common pixels of each pair, in the upper halves of 64 bits
  unsigned alone;  // bit k: pair k ends before the next interval of either list begins
};

inline Pairs pair_up(const Interval* a, const Interval* b) {
  const __m256i x = load32(a), y = load32(b);
  const __m256i most = _mm256_max_epu32(x, y), least = _mm256_min_epu32(x, y);
  const __m256i start = _mm256_slli_epi64(most, 32);
  const __m256i next = _mm256_slli_epi64(_mm256_min_epu32(load32(a + 1), load32(b + 1)), 32);
  const __m256i alone = _mm256_cmpeq_epi32(_mm256_min_epu32(most, next), most);
  return {_mm256_sub_epi32(_mm256_max_epu32(least, start), start),
          static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(alone)))};
}

// 64 bytes from byte 64 - 8 k on keep the first k of eight 64-bit numbers.
alignas(64) constexpr int64_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

// Adds up the lengths of intervals, which fit into 32 bits.
int64_t area_of(const Interval* intervals, int64_t number) {
  __m256i sums = _mm256_setzero_si256();  // of starts in even lanes, of ends in odd; they may wrap
  int64_t k = 0;
  for (; k + 4 <= number; k += 4) sums = _mm256_add_epi32(sums, load32(intervals + k));
  const __m256i used = load32(reinterpret_cast<const char*>(kFirst) + 64 - 8 * (number - k));
  sums = _mm256_add_epi32(sums, _mm256_and_si256(load32(intervals + k), used));
  const __m256i lengths = _mm256_sub_epi32(_mm256_srli_epi64(sums, 32), sums);
  return static_cast<uint32_t>(sum_of(lengths));
}

// Drops empty intervals and joins those that touch. Returns how many are left.
int64_t shorten(Interval* intervals, int64_t number) {
  int64_t kept = 0;
  for (int64_t k = 0; k < number; ++k) {
    const Interval next = intervals[k];
    if (next.start == next.end) continue;
    if (kept > 0 && intervals[kept - 1].end == next.start) {
      intervals[kept - 1].end = next.end;
    } else {
      intervals[kept++] = next;
    }
  }
  return kept;
}

// Returns the first interval that ends after `position`, or `number`.
int64_t skip(const Interval* intervals, int64_t number, uint32_t position) {
  if (intervals[0].end > position) return 0;
  const Interval* first = intervals;
  for (int64_t left = number; left > 1;) {
    const int64_t half = left / 2;
    first += first[half - 1].end <= position ? half : 0;
    left -= half;
  }
  return first - intervals + (first->end <= position ? 1 : 0);
}

}  // namespace

int64_t decode_ends(const char* text, int64_t length, int64_t pixels, uint32_t* out) {
  if (length < kShortest || pixels > kMostPixels) {
    return scalar::decode_ends(text, length, pixels, out);
  }
  Reader r{text, out, false};
  return read(&r, length, pixels) ? r.out - out : -1;
}

Decoded decode_intervals(const char* text, int64_t length, int64_t pixels, Interval* out) {
  if (length < kShortest || pixels > kMostPixels) {
    return scalar::decode_intervals(text, length, pixels, out);
  }
  const auto ends = reinterpret_cast<uint32_t*>(out);
  Reader r{text, ends, false};
  if (!read(&r, length, pixels)) return {-1, 0};
  const int64_t number = (r.out - ends) / 2;
  const int64_t area = area_of(out, number);
  return {r.empty ? shorten(out, number) : number, area};
}

int64_t decode_area(const char* text, int64_t length, int64_t pixels) {
  if (length < kShortest || length > kScratch || pixels > kMostPixels) {
    return scalar::decode_area(text, length, pixels);
  }
  Interval scratch[interval_room(kScratch)];
  const auto ends = reinterpret_cast<uint32_t*>(scratch);
  Reader r{text, ends, false};
  return read(&r, length, pixels) ? area_of(scratch, (r.out - ends) / 2) : -1;
}

// Pairs interval i + k with j + k as long as neither meets the other's next, which is the rule for
// two masks of one interval per column; where that fails, one list goes on alone.
int64_t overlap(const Interval* a, int64_t a_number, const Interval* b, int64_t b_number) {
  if (a_number == 0 || b_number == 0) return 0;
  int64_t i = skip(a, a_number, b[0].start), j = skip(b, b_number, a[0].start);
  __m256i sums = _mm256_setzero_si256();
  while (i + 8 < a_number && j + 8 < b_number) {
    const Pairs low = pair_up(a + i, b + j), high = pair_up(a + i + 4, b + j + 4);
    const unsigned good = low.alone | high.alone << 4;
    const unsigned leading = _tzcnt_u32(~good);
    if (leading == 8) {
      sums = _mm256_add_epi32(sums, _mm256_add_epi32(low.common, high.common));
      i += 8;
      j += 8;
      continue;
    }
    const auto* mask = reinterpret_cast<const char*>(kFirst) + 64 - 8 * (leading + 1);
    sums = _mm256_add_epi32(sums, _mm256_and_si256(low.common, load32(mask)));
    sums = _mm256_add_epi32(sums, _mm256_and_si256(high.common, load32(mask + 32)));
    const uint32_t a_end = a[i + leading].end, b_end = b[j + leading].end;
    i += leading + (a_end <= b_end ? 1 : 0);
    j += leading + (b_end <= a_end ? 1 : 0);
  }
  return sum_of(_mm256_srli_epi64(sums, 32)) +
         scalar::overlap(a + i, a_number - i, b + j, b_number - j);
}

}  // namespace avx2
}  // namespace pmvis

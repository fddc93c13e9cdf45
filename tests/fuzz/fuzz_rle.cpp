// Fuzzes csrc/rle/text.h: both instruction sets against a plain reader written here, and the round trip.
// An input is 4 bytes, the number of pixels, and then the text; in most inputs the number
// that the text has is taken instead.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "rle/text_isa.h"

namespace {

using pmvis::Decoded;
using pmvis::Interval;

using Ends = std::vector<uint64_t>;

struct Isa {
  decltype(&pmvis::decode_ends) decode_ends;
  decltype(&pmvis::decode_intervals) decode_intervals;
  decltype(&pmvis::decode_area) decode_area;
  decltype(&pmvis::overlap) overlap;
};

std::vector<Isa> isas() {
  std::vector<Isa> all = {{pmvis::scalar::decode_ends, pmvis::scalar::decode_intervals,
                           pmvis::scalar::decode_area, pmvis::scalar::overlap}};
#if defined(PMVIS_X86_ISA)
  if (pmvis::has_avx2()) {
    all.push_back({pmvis::avx2::decode_ends, pmvis::avx2::decode_intervals,
                   pmvis::avx2::decode_area, pmvis::avx2::overlap});
  }
#endif
  return all;
}

// The ends of a text's runs, or none if it is malformed.
bool read_plainly(const std::string& text, Ends* ends) {
  std::vector<__int128> runs;
  for (size_t at = 0; at < text.size();) {
    std::string digits;
    bool more = true;
    while (more) {
      if (at == text.size() || digits.size() == 7) return false;
      const int code = static_cast<unsigned char>(text[at++]) - 48;
      if (code < 0 || code > 63) return false;
      digits.insert(digits.begin(), static_cast<char>(code % 32));
      more = code >= 32;
    }
    __int128 run = digits[0] >= 16 ? -1 : 0;
    for (const char digit : digits) run = run * 32 + digit;
    if (runs.size() > 2) run += runs[runs.size() - 2];
    if (run < 0 || run > 0xffffffff) return false;
    runs.push_back(run);
  }
  if (runs.empty()) runs.push_back(0);
  ends->clear();
  __int128 total = 0;
  for (const __int128 run : runs) {
    total += run;
    ends->push_back(static_cast<uint64_t>(total));
  }
  return true;
}

std::vector<Interval> intervals_plainly(const Ends& ends) {
  std::vector<Interval> all;
  for (size_t k = 1; k < ends.size(); k += 2) {
    const auto start = static_cast<uint32_t>(ends[k - 1]), end = static_cast<uint32_t>(ends[k]);
    if (start == end) continue;
    if (!all.empty() && all.back().end == start) {
      all.back().end = end;
    } else {
      all.push_back({start, end});
    }
  }
  return all;
}

bool same(const Interval& a, const Interval& b) { return a.start == b.start && a.end == b.end; }

// One text through one instruction set.
void check_reading(const Isa& isa, const std::string& text, int64_t pixels, bool good,
                   const Ends& ends) {
  const auto length = static_cast<int64_t>(text.size());
  const std::unique_ptr<char[]> exact(new char[text.size()]);
  std::copy(text.begin(), text.end(), exact.get());
  std::vector<uint32_t> out(static_cast<size_t>(pmvis::ends_room(length)));
  std::vector<Interval> found(static_cast<size_t>(pmvis::interval_room(length)));

  const int64_t number = isa.decode_ends(exact.get(), length, pixels, out.data());
  const Decoded decoded = isa.decode_intervals(exact.get(), length, pixels, found.data());
  const int64_t area = isa.decode_area(exact.get(), length, pixels);
  if (!good) {
    EXPECT(number == -1 && decoded.number == -1 && area == -1);
    return;
  }
  EXPECT(number == static_cast<int64_t>(ends.size()));
  EXPECT(std::equal(ends.begin(), ends.end(), out.begin()));
  const std::vector<Interval> intervals = intervals_plainly(ends);
  EXPECT(decoded.number == static_cast<int64_t>(intervals.size()));
  EXPECT(std::equal(intervals.begin(), intervals.end(), found.begin(), same));
  int64_t expected = 0;
  for (const Interval& run : intervals) expected += run.end - run.start;
  EXPECT(decoded.area == expected && area == expected);
}

// What write_text writes is read back the same, by code that is not under test.
void check_writing(const Ends& ends) {
  const std::vector<uint32_t> given(ends.begin(), ends.end());
  const auto number = static_cast<int64_t>(given.size());
  const std::unique_ptr<char[]> room(new char[static_cast<size_t>(pmvis::text_room(number))]);
  const char* const end = pmvis::write_text(given.data(), number, room.get());
  const std::string text(static_cast<const char*>(room.get()), end);
  Ends again;
  EXPECT(read_plainly(text, &again) && again == ends);
  std::string plain;
  for (size_t k = 0; k < ends.size(); ++k) {
    const auto run = [&](size_t n) {
      return static_cast<int64_t>(n == 0 ? ends[0] : ends[n] - ends[n - 1]);
    };
    fuzz::put_number(k > 2 ? run(k) - run(k - 2) : run(k), &plain);
  }
  EXPECT(text == plain);
}

int64_t overlap_plainly(const std::vector<Interval>& a, const std::vector<Interval>& b) {
  int64_t common = 0;
  size_t from = 0;
  for (const Interval& x : a) {
    while (from < b.size() && b[from].end <= x.start) ++from;
    for (size_t k = from; k < b.size() && b[k].start < x.end; ++k) {
      common += std::min(x.end, b[k].end) - std::max(x.start, b[k].start);
    }
  }
  return common;
}

// The mask against one of the last masks, and against itself moved a little.
void check_overlap(const std::vector<Isa>& all, const std::vector<Interval>& mask,
                   uint32_t choice) {
  static std::deque<std::vector<Interval>> lasts(8);
  std::vector<Interval> other = lasts[choice % 8];
  if (choice % 3 == 0) {
    other = mask;
    for (size_t k = 0; k < other.size(); ++k) {
      const uint32_t length = other[k].end - other[k].start;
      if (length > 2 && (choice >> k % 20 & 1) != 0) other[k].start += 1 + k % (length - 1);
    }
    if (choice % 2 == 0 && other.size() > 4) other.erase(other.begin() + choice % 4);
  }
  const int64_t expected = overlap_plainly(mask, other);
  const auto a_number = static_cast<int64_t>(mask.size());
  const auto b_number = static_cast<int64_t>(other.size());
  for (const Isa& isa : all) {
    EXPECT(isa.overlap(mask.data(), a_number, other.data(), b_number) == expected);
    EXPECT(isa.overlap(other.data(), b_number, mask.data(), a_number) == expected);
  }
  lasts.pop_front();
  lasts.push_back(mask);
}

// Runs whose sum passes 2^32 and comes back to `pixels`: `first`, then `number` of 8191, then what
// is missing. No random input gets there.
void check_wrapping(const std::vector<Isa>& all, int64_t first, int64_t number, int64_t pixels) {
  std::string text;
  fuzz::put_number(first, &text);
  for (int64_t k = 0; k < number; ++k) fuzz::put_number(k < 2 ? 8191 : 0, &text);
  const int64_t missing = (pixels - first - 8191 * number) & 0xffffffff;
  fuzz::put_number(missing - 8191, &text);
  for (const Isa& isa : all) check_reading(isa, text, pixels, false, {});
}

}  // namespace

const char* const fuzz::kLetters = "0123456789:;<=>?@ABCMNOPQabcmno\\/p";

std::string fuzz::fresh_input(Random* random) {
  int64_t pixels = 0;
  const std::string text = random_counts(random, random->one_in(40) ? 12000 : 300, &pixels);
  std::string input(4, '\0');
  for (int k = 0; k < 4; ++k) input[k] = static_cast<char>(pixels >> 8 * k);
  return input + text;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<Isa> all = [] {
    const std::vector<Isa> found = isas();
    check_wrapping(found, 0xffffffff - 100000, 200, 0xffffffff);
    check_wrapping(found, 0xfeffffff - 100000, 200, 0xfeffffff);
    check_wrapping(found, 10, 600000, 900000);
    check_wrapping(found, 10, 600000, 0xfe000000);
    return found;
  }();
  if (size < 4) return 0;
  uint32_t word;
  std::memcpy(&word, data, 4);
  const std::string text(data + 4, data + size);
  Ends ends;
  const bool readable = read_plainly(text, &ends);
  int64_t pixels = word;
  // Mutations rarely keep the sum: often let the text be right, or a little wrong, or negative.
  if (readable && (text.size() + word) % 5 != 0) pixels = static_cast<int64_t>(ends.back());
  if (word % 97 == 0) pixels += static_cast<int64_t>(word / 97 % 5) - 2;
  const bool good =
      readable && static_cast<int64_t>(ends.back()) == pixels && pixels <= pmvis::kMaxPixels;
  for (const Isa& isa : all) check_reading(isa, text, pixels, good, ends);
  if (!good) return 0;
  check_writing(ends);
  check_overlap(all, intervals_plainly(ends), word);
  return 0;
}

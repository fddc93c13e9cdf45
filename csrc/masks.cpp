// Run-length encoded masks: plain C ABI for pmvis_core/native.py, without torch or Python.
//
// COCO's text holds the runs of a column-major mask, background first; pmvis_core/rle_numpy.py
// describes it and is the twin of this file. Every function checks each text first: characters,
// length of a run's code, and that the runs cover the mask exactly. So nothing after `parse` can
// leave its bounds or fail to end. Functions return kDone, kNoMemory or the index of the first
// malformed text; the caller asks the twin what is wrong with it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define PMVIS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kDone = -1;
constexpr int64_t kNoMemory = -2;
constexpr int kMaxGroups = 7;  // characters of a run: 35 bits hold every 32-bit difference

using Runs = std::vector<uint32_t>;

struct Interval {
  uint32_t start, end;  // foreground pixels [start, end), never empty
};

// Several texts, one after the other, without separators.
struct Texts {
  const char* data;
  const int64_t* lengths;
  int64_t number;
};

// Reads a text into runs; false if it is malformed or does not cover `pixels` pixels exactly.
bool parse(const char* text, int64_t length, int64_t pixels, Runs* runs) {
  runs->resize(length > 0 ? length : 1);  // a run takes at least one character
  uint32_t* const first = runs->data();
  uint32_t* run = first;
  if (length == 0) {
    *run = 0;
    return pixels == 0;
  }
  const char* const end = text + length;
  int64_t total = 0;
  while (text != end) {
    unsigned code = static_cast<unsigned char>(*text++) - 48u;
    int64_t value = code & 31u;
    int shift = 5;
    for (; code & 32u; shift += 5) {
      if (code > 63u || text == end || shift == 5 * kMaxGroups) return false;
      code = static_cast<unsigned char>(*text++) - 48u;
      value |= static_cast<int64_t>(code & 31u) << shift;
    }
    if (code > 63u) return false;
    if (code & 16u) value -= int64_t{1} << shift;
    if (run - first > 2) value += run[-2];
    if (value < 0 || value > pixels - total) return false;
    total += value;
    *run++ = static_cast<uint32_t>(value);
  }
  runs->resize(run - first);
  return total == pixels;
}

// Writes runs as text, one at a time.
class Writer {
 public:
  explicit Writer(std::string* text) : text_(text) {}

  void put(int64_t run) {
    int64_t rest = count_ > 2 ? run - before_last_ : run;
    bool more = true;
    while (more) {
      const unsigned low = static_cast<unsigned>(rest & 31);
      rest >>= 5;
      more = (low & 16u) != 0 ? rest != -1 : rest != 0;
      text_->push_back(static_cast<char>(low + (more ? 32u : 0u) + 48u));
    }
    before_last_ = last_;
    last_ = run;
    ++count_;
  }

 private:
  std::string* text_;
  int64_t count_ = 0, last_ = 0, before_last_ = 0;
};

int64_t area_of(const Runs& runs) {
  int64_t area = 0;
  for (size_t k = 1; k < runs.size(); k += 2) area += runs[k];
  return area;
}

void intervals_of(const Runs& runs, std::vector<Interval>* intervals) {
  intervals->clear();
  uint32_t position = 0;
  for (size_t k = 0; k < runs.size(); ++k) {
    const uint32_t end = position + runs[k];
    if (k % 2 == 1 && end > position) intervals->push_back({position, end});
    position = end;
  }
}

int64_t overlap(const std::vector<Interval>& first, const std::vector<Interval>& second) {
  int64_t common = 0;
  size_t i = 0, j = 0;
  while (i < first.size() && j < second.size()) {
    const Interval a = first[i], b = second[j];
    const uint32_t start = a.start > b.start ? a.start : b.start;
    const uint32_t end = a.end < b.end ? a.end : b.end;
    common += end > start ? end - start : 0;
    i += a.end <= b.end;
    j += b.end <= a.end;
  }
  return common;
}

// One operand of a merge: where its current run ends, and its value there.
struct Cursor {
  const Runs* runs;
  size_t index;
  int64_t end;
  bool value;

  void pass(int64_t position) {
    if (end != position || index + 1 == runs->size()) return;
    end += (*runs)[++index];
    value = !value;
  }
};

// Sweeps two masks of one size from change to change. Each operand passes one run a step, so runs
// of length zero survive, as they do in pycocotools.
void merge_two(const Runs& first, const Runs& second, int64_t pixels, bool intersect, Runs* merged) {
  Cursor a{&first, 0, first[0], false}, b{&second, 0, second[0], false};
  merged->clear();
  bool value = false;
  for (int64_t start = 0, at = -1; at < pixels;) {
    at = a.end < b.end ? a.end : b.end;
    a.pass(at);
    b.pass(at);
    const bool now = intersect ? a.value && b.value : a.value || b.value;
    if (now == value && at != pixels) continue;
    merged->push_back(static_cast<uint32_t>(at - start));
    start = at;
    value = now;
  }
}

// Marks nonzero bytes: bit k of word w is set where bytes[64 * w + k] != 0.
void nonzero_bits(const uint8_t* bytes, int64_t length, uint64_t* words) {
  int64_t at = 0;
#if defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  for (; at + 64 <= length; at += 64) {
    uint64_t zeros = 0;
    for (int part = 0; part < 4; ++part) {
      const __m128i block =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at + 16 * part));
      const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(block, zero)));
      zeros |= static_cast<uint64_t>(mask) << (16 * part);
    }
    words[at / 64] = ~zeros;
  }
#endif
  for (; at < length; at += 64) {
    const int64_t left = length - at < 64 ? length - at : 64;
    uint64_t word = 0;
    for (int64_t k = 0; k < left; ++k) word |= static_cast<uint64_t>(bytes[at + k] != 0) << k;
    words[at / 64] = word;
  }
}

// Room that encoding one mask after the other uses again.
struct Scratch {
  std::vector<uint64_t> bits, above;
  std::vector<uint32_t> columns, rows, row_ends, starts;
};

// Calls found(k) for each set bit of `word`.
template <typename Found>
void each_bit(uint64_t word, const Found& found) {
  for (; word != 0; word &= word - 1) found(__builtin_ctzll(word));
}

// Encodes a row-major mask without transposing it: a pixel that differs from the one above (for the
// first row: from the last row of the column before) starts a run. Those changes are found row by
// row and put in column-major order by a counting sort.
void encode_rows(const uint8_t* mask, int64_t height, int64_t width, Scratch* s, Writer* writer) {
  const int64_t words = (width + 63) / 64;
  s->bits.assign(words, 0);
  s->above.assign(words, 0);
  s->columns.clear();
  s->row_ends.clear();
  s->starts.assign(width + 1, 0);
  nonzero_bits(mask + (height - 1) * width, width, s->bits.data());
  for (int64_t w = 0; w < words; ++w) {
    s->above[w] = s->bits[w] << 1 | (w > 0 ? s->bits[w - 1] >> 63 : 0);
  }
  if (width % 64 != 0) s->above[words - 1] &= (uint64_t{1} << width % 64) - 1;
  for (int64_t y = 0; y < height; ++y) {
    nonzero_bits(mask + y * width, width, s->bits.data());
    for (int64_t w = 0; w < words; ++w) {
      each_bit(s->bits[w] ^ s->above[w], [&](int k) {
        const auto x = static_cast<uint32_t>(64 * w + k);
        s->columns.push_back(x);
        ++s->starts[x + 1];
      });
    }
    s->row_ends.push_back(static_cast<uint32_t>(s->columns.size()));
    s->bits.swap(s->above);
  }
  for (int64_t x = 0; x < width; ++x) s->starts[x + 1] += s->starts[x];
  s->rows.resize(s->columns.size());
  std::vector<uint32_t>& next = s->starts;
  uint32_t at = 0;
  for (int64_t y = 0; y < height; ++y) {
    for (; at < s->row_ends[y]; ++at) s->rows[next[s->columns[at]]++] = static_cast<uint32_t>(y);
  }
  // `next[x]` is now where column x ends.
  int64_t last = 0;
  uint32_t event = 0;
  for (int64_t x = 0; x < width; ++x) {
    for (; event < next[x]; ++event) {
      const int64_t position = x * height + s->rows[event];
      writer->put(position - last);
      last = position;
    }
  }
  writer->put(height * width - last);
}

// Encodes a mask that lies column by column.
void encode_columns(const uint8_t* mask, int64_t pixels, Scratch* s, Writer* writer) {
  const int64_t words = (pixels + 63) / 64;
  s->bits.resize(words);
  nonzero_bits(mask, pixels, s->bits.data());
  int64_t last = 0;
  uint64_t carry = 0;
  for (int64_t w = 0; w < words; ++w) {
    uint64_t changes = s->bits[w] ^ (s->bits[w] << 1 | carry);
    carry = s->bits[w] >> 63;
    if (w == words - 1 && pixels % 64 != 0) changes &= (uint64_t{1} << pixels % 64) - 1;
    each_bit(changes, [&](int k) {
      writer->put(64 * w + k - last);
      last = 64 * w + k;
    });
  }
  writer->put(pixels - last);
}

// Smallest rectangle that holds the foreground, far edges exclusive; zeros if there is none.
struct Rectangle {
  int64_t x1, y1, x2, y2;
};

Rectangle rectangle_of(const std::vector<Interval>& intervals, int64_t height) {
  if (intervals.empty()) return {0, 0, 0, 0};
  Rectangle box{intervals.front().start / height, height, (intervals.back().end - 1) / height + 1,
                0};
  for (const Interval& run : intervals) {
    const int64_t last = run.end - 1;
    int64_t top = run.start % height, bottom = last % height;
    if (run.start / height != last / height) {
      top = 0;
      bottom = height - 1;
    }
    if (top < box.y1) box.y1 = top;
    if (bottom + 1 > box.y2) box.y2 = bottom + 1;
  }
  return box;
}

// Fills a cleared row-major mask: marks each pixel that differs from the one above it, then adds
// the marks up along the columns, inside the foreground's rectangle only.
void fill(const std::vector<Interval>& intervals, int64_t height, int64_t width, uint8_t* mask) {
  const Rectangle box = rectangle_of(intervals, height);
  for (const Interval& run : intervals) {
    for (int64_t at = run.start; at < run.end;) {
      const int64_t x = at / height, column_end = (x + 1) * height;
      const int64_t stop = run.end < column_end ? run.end : column_end;
      mask[(at - x * height) * width + x] ^= 1;
      if (stop != column_end) mask[(stop - x * height) * width + x] ^= 1;
      at = stop;
    }
  }
  for (int64_t y = box.y1 + 1; y < height && y <= box.y2; ++y) {
    const uint8_t* above = mask + (y - 1) * width;
    uint8_t* row = mask + y * width;
    for (int64_t x = box.x1; x < box.x2; ++x) row[x] ^= above[x];
  }
}

// Calls visit(index, runs) for each text; returns the first malformed one.
template <typename Visit>
int64_t for_each(const Texts& texts, int64_t pixels, const Visit& visit) {
  Runs runs;
  const char* text = texts.data;
  for (int64_t k = 0; k < texts.number; ++k) {
    if (!parse(text, texts.lengths[k], pixels, &runs)) return k;
    visit(k, runs);
    text += texts.lengths[k];
  }
  return kDone;
}

// Runs body and keeps exceptions from crossing the C boundary.
template <typename Body>
int64_t guarded(const Body& body) {
  try {
    return body();
  } catch (...) {
    return kNoMemory;
  }
}

// Copies text into memory that the caller frees with pmvis_free.
int64_t hand_over(const std::string& text, char** out) {
  *out = static_cast<char*>(std::malloc(text.size() + 1));
  if (*out == nullptr) return kNoMemory;
  std::memcpy(*out, text.data(), text.size());
  return kDone;
}

}  // namespace

PMVIS_EXPORT void pmvis_free(char* text) { std::free(text); }

// masks: (N, H, W), or (N, W, H) if by_columns. Texts come one after the other in *out.
PMVIS_EXPORT int64_t pmvis_rle_encode(const uint8_t* masks, int64_t number, int64_t height,
                                      int64_t width, int by_columns, char** out, int64_t* lengths) {
  return guarded([&] {
    std::string text;
    Scratch scratch;
    for (int64_t n = 0; n < number; ++n) {
      const size_t before = text.size();
      const uint8_t* mask = masks + n * height * width;
      Writer writer(&text);
      if (by_columns != 0 || height * width == 0) {
        encode_columns(mask, height * width, &scratch, &writer);
      } else {
        encode_rows(mask, height, width, &scratch, &writer);
      }
      lengths[n] = static_cast<int64_t>(text.size() - before);
    }
    return hand_over(text, out);
  });
}

// out: (N, H, W), written; `cleared`: it is all zeros already.
PMVIS_EXPORT int64_t pmvis_rle_decode(const char* data, const int64_t* lengths, int64_t number,
                                      int64_t height, int64_t width, int cleared, uint8_t* out) {
  return guarded([&] {
    const int64_t pixels = height * width;
    std::vector<Interval> intervals;
    return for_each({data, lengths, number}, pixels, [&](int64_t k, const Runs& runs) {
      intervals_of(runs, &intervals);
      uint8_t* mask = out + k * pixels;
      if (cleared == 0 && pixels > 0) std::memset(mask, 0, pixels);
      fill(intervals, height, width, mask);
    });
  });
}

// areas: (N,), written.
PMVIS_EXPORT int64_t pmvis_rle_areas(const char* data, const int64_t* lengths, int64_t number,
                                     int64_t pixels, int64_t* areas) {
  return guarded([&] {
    return for_each({data, lengths, number}, pixels,
                    [&](int64_t k, const Runs& runs) { areas[k] = area_of(runs); });
  });
}

// boxes: (N, 4) x1, y1, x2, y2, written.
PMVIS_EXPORT int64_t pmvis_rle_boxes(const char* data, const int64_t* lengths, int64_t number,
                                     int64_t height, int64_t width, int64_t* boxes) {
  return guarded([&] {
    std::vector<Interval> intervals;
    return for_each({data, lengths, number}, height * width, [&](int64_t k, const Runs& runs) {
      intervals_of(runs, &intervals);
      const Rectangle box = rectangle_of(intervals, height);
      boxes[4 * k] = box.x1;
      boxes[4 * k + 1] = box.y1;
      boxes[4 * k + 2] = box.x2;
      boxes[4 * k + 3] = box.y2;
    });
  });
}

// Union or intersection of number >= 1 masks, as one text in *out.
PMVIS_EXPORT int64_t pmvis_rle_merge(const char* data, const int64_t* lengths, int64_t number,
                                     int64_t pixels, int intersect, char** out, int64_t* length) {
  return guarded([&] {
    Runs sum, next;
    const int64_t bad =
        for_each({data, lengths, number}, pixels, [&](int64_t k, const Runs& runs) {
          if (k == 0) {
            sum = runs;
          } else {
            merge_two(sum, runs, pixels, intersect != 0, &next);
            sum.swap(next);
          }
        });
    if (bad != kDone) return bad;
    std::string text;
    Writer writer(&text);
    for (const uint32_t run : sum) writer.put(run);
    *length = static_cast<int64_t>(text.size());
    return hand_over(text, out);
  });
}

// common: (D, G) pixels, written. A malformed text of the second list counts on from the first.
PMVIS_EXPORT int64_t pmvis_rle_intersections(const char* first, const int64_t* first_lengths,
                                             int64_t first_number, const char* second,
                                             const int64_t* second_lengths, int64_t second_number,
                                             int64_t pixels, int64_t* common) {
  return guarded([&] {
    std::vector<std::vector<Interval>> columns(second_number);
    int64_t bad = for_each({second, second_lengths, second_number}, pixels,
                           [&](int64_t g, const Runs& runs) { intervals_of(runs, &columns[g]); });
    if (bad != kDone) return bad >= 0 ? first_number + bad : bad;
    std::vector<Interval> row;
    return for_each({first, first_lengths, first_number}, pixels, [&](int64_t d, const Runs& runs) {
      intervals_of(runs, &row);
      for (int64_t g = 0; g < second_number; ++g) {
        common[d * second_number + g] = overlap(row, columns[g]);
      }
    });
  });
}

// Summed intersection and union of frames that both tracks hold. Frame k's texts have pixels[k]
// pixels; a malformed text is reported as 2 * k (first track) or 2 * k + 1.
PMVIS_EXPORT int64_t pmvis_rle_track_overlap(const char* first, const int64_t* first_lengths,
                                             const char* second, const int64_t* second_lengths,
                                             int64_t number, const int64_t* pixels,
                                             int64_t* intersection_and_union) {
  return guarded([&] {
    Runs a_runs, b_runs;
    std::vector<Interval> a, b;
    int64_t inter = 0, sum = 0;
    for (int64_t k = 0; k < number; ++k) {
      if (!parse(first, first_lengths[k], pixels[k], &a_runs)) return 2 * k;
      if (!parse(second, second_lengths[k], pixels[k], &b_runs)) return 2 * k + 1;
      intervals_of(a_runs, &a);
      intervals_of(b_runs, &b);
      inter += overlap(a, b);
      sum += area_of(a_runs) + area_of(b_runs);
      first += first_lengths[k];
      second += second_lengths[k];
    }
    intersection_and_union[0] = inter;
    intersection_and_union[1] = sum - inter;
    return kDone;
  });
}

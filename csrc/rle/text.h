// The text core of run-length encoded masks: what `_masks.so` and `_eval.so` share.
//
// COCO's text holds the runs of a column-major mask, background first; pmvis_core/rle_numpy.py
// describes it. Everything here checks as it reads: characters, length of a run's code, no run
// below zero, and that the runs cover the mask exactly. No character past the text is read.
// Masks have at most kMaxPixels pixels. With AVX2 (chosen at run time) or without, results are the
// same.
#pragma once

#include <cstdint>

namespace pmvis {

constexpr int64_t kMaxPixels = 0xffffffff;
constexpr int kMaxGroups = 7;  // characters of a run: 35 bits hold every 32-bit difference

struct Interval {
  uint32_t start, end;  // foreground pixels [start, end) of the column-major mask
};

struct Decoded {
  int64_t number;  // of intervals; -1: the text is malformed
  int64_t area;    // foreground pixels
};

// Entries that `out` of decode_ends (of decode_intervals) needs, room for whole vectors included.
constexpr int64_t ends_room(int64_t length) { return length + 64; }
constexpr int64_t interval_room(int64_t length) { return length / 2 + 32; }

// Writes the end of each run, that is the sums of the runs; run k is foreground if k is odd, and
// may be empty. Returns the number of runs (one at least), or -1 if the text is malformed.
int64_t decode_ends(const char* text, int64_t length, int64_t pixels, uint32_t* out);

// Writes the foreground in its one shortest form: ascending intervals, none empty, none touching.
Decoded decode_intervals(const char* text, int64_t length, int64_t pixels, Interval* out);

// Returns the number of foreground pixels, or -1 if the text is malformed.
int64_t decode_area(const char* text, int64_t length, int64_t pixels);

// Returns the number of common pixels of two lists that decode_intervals wrote, or of parts of
// them. Reads nothing outside the lists.
int64_t overlap(const Interval* a, int64_t a_number, const Interval* b, int64_t b_number);

// Characters that write_text may touch for `number` runs.
constexpr int64_t text_room(int64_t number) { return kMaxGroups * number + 1; }

// Writes the text of runs that are given by their ends, as decode_ends writes them: ascending, the
// last one the number of pixels. Returns where the text ends; `out` needs text_room(number).
char* write_text(const uint32_t* ends, int64_t number, char* out);

// Whether this processor runs the AVX2 code.
bool has_avx2();

}  // namespace pmvis

// Pixels to runs and back, for masks that lie row by row or column by column; without Python.
//
// Runs are given by their ends, as in rle/text.h. Neither direction transposes the mask: only the few
// pixels where something changes are brought from one order into the other, by a counting sort.
#pragma once

#include <cstdint>
#include <vector>

#include "rle/text.h"

namespace pmvis {

// Room that one mask after the other uses again.
struct Dense {
  std::vector<uint32_t> ends;       // result of the `encode` functions, `number` of them
  int64_t number = 0;
  std::vector<uint32_t> places, next;
  std::vector<uint8_t> line;
};

// mask: (height, width) bytes row by row, foreground where nonzero; at most kMaxPixels pixels.
void encode_rows(const uint8_t* mask, int64_t height, int64_t width, Dense* dense);

// mask: the same column by column.
void encode_columns(const uint8_t* mask, int64_t pixels, Dense* dense);

// Columns [x1, x2) and rows [y1, y2) of a mask.
struct Crop {
  int64_t x1, y1, x2, y2;
};

// Writes a part of a mask, row by row without gaps: 1 in the foreground, 0 elsewhere. `intervals`
// are what decode_intervals wrote for a mask of this height that has all of the part's pixels.
void decode_rows(const Interval* intervals, int64_t number, int64_t height, const Crop& part,
                 uint8_t* out, Dense* dense);

}  // namespace pmvis

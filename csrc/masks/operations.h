// What is asked of masks once their texts are read: boxes, merges, overlaps; without Python.
#pragma once

#include <cstdint>
#include <vector>

#include "rle/text.h"

namespace pmvis {

using Ends = std::vector<uint32_t>;          // of runs, as decode_ends writes them
using Intervals = std::vector<Interval>;     // as decode_intervals writes them

// Smallest rectangle that holds the foreground, far edges exclusive; zeros if there is none.
struct Box {
  int64_t x1, y1, x2, y2;
};

Box box_of(const Interval* intervals, int64_t number, int64_t height);

// Union (or intersection) of one mask or more of one size. Empty runs survive as they do in
// pycocotools, which merges one mask after the other. `masks` is used up.
void merge(std::vector<Ends>* masks, bool intersect, Ends* out);

// common: (first, second), written: pixels that two masks share. All masks have one size.
void intersections(const std::vector<Intervals>& first, const std::vector<Intervals>& second,
                   int64_t height, int64_t* common);

}  // namespace pmvis

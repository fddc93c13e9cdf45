// How much tracks overlap.
#pragma once

#include <cstdint>
#include <vector>

#include "evaluation/track_masks.h"

namespace pmvis {

// The frames of a track, and the intervals that they point into.
struct TrackView {
  const std::vector<Frame>& frames;
  const Interval* intervals;
};

struct Overlap {
  double iou;
  bool comparable;  // false: the union is empty
};

// Returns the IoU of two tracks by the official rules: frames beyond the shorter track do not
// count, a frame that only one track holds adds to the union, and one whose masks differ in size
// adds to neither. Without `exact` an IoU below 1/2 is given as 0, mostly without computing it.
Overlap track_iou(const TrackView& a, const TrackView& b, bool exact);

// The mean area of the frames whose mask is not empty, in pixels; 0 if there is none.
double mean_area(const std::vector<Frame>& frames);

}  // namespace pmvis

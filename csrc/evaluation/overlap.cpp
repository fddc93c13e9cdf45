#include "evaluation/overlap.h"

#include <algorithm>

namespace pmvis {
namespace {

// The most pixels that two masks can share, by their areas and reach; 0 if they are not compared.
int64_t most_common(const Frame& a, const Frame& b) {
  if (!a.present() || !b.present() || a.size != b.size) return 0;
  return a.last <= b.first || b.last <= a.first ? 0 : std::min(a.area, b.area);
}

// Pixels that two masks add to the union and to the intersection together.
int64_t pixels_of(const Frame& a, const Frame& b) {
  if (a.present() && b.present()) return a.size == b.size ? a.area + b.area : 0;
  return std::max<int64_t>(a.area, 0) + std::max<int64_t>(b.area, 0);
}

}  // namespace

// With I common pixels and S = area of one + area of the other, I / (S - I) < 1/2 just if 3 I < S.
Overlap track_iou(const TrackView& a, const TrackView& b, bool exact) {
  const size_t length = std::min(a.frames.size(), b.frames.size());
  int64_t both = 0, most = 0;
  for (size_t t = 0; t < length; ++t) {
    both += pixels_of(a.frames[t], b.frames[t]);
    most += most_common(a.frames[t], b.frames[t]);
  }
  if (both == 0) return {0.0, false};
  int64_t common = 0;
  for (size_t t = 0; t < length && (exact || 3 * most >= both); ++t) {
    const Frame& x = a.frames[t];
    const Frame& y = b.frames[t];
    const int64_t bound = most_common(x, y);
    if (bound == 0) continue;
    const int64_t here =
        overlap(a.intervals + x.begin, x.number, b.intervals + y.begin, y.number);
    common += here;
    most -= bound - here;
  }
  if (!exact && 3 * most < both) return {0.0, true};
  return {static_cast<double>(common) / static_cast<double>(both - common), true};
}

double mean_area(const std::vector<Frame>& frames) {
  int64_t sum = 0, number = 0;
  for (const Frame& frame : frames) {
    if (frame.area <= 0) continue;
    sum += frame.area;
    ++number;
  }
  return number == 0 ? 0.0 : static_cast<double>(sum) / static_cast<double>(number);
}

}  // namespace pmvis

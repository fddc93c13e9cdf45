#include "masks/operations.h"

#include <algorithm>

#include "masks/fast_division.h"

namespace pmvis {
namespace {

constexpr size_t kPairsForBoxes = 9;  // from so many pairs on, boxes are worth their divisions

// Walks over the ends of two masks, below `stop`, and keeps those at which the merge changes. Each
// operand passes one run a step, so empty runs survive as in pycocotools. A run's index tells its
// value: odd ones are foreground.
class Sweep {
 public:
  Sweep(const uint32_t* a, const uint32_t* b, size_t i, size_t j, uint32_t stop, bool intersect,
        uint32_t* out)
      : a_(a + i), b_(b + j), a_value_(i & 1), b_value_(j & 1), stop_(stop), out_(out) {
    value_ = intersect ? a_value_ & b_value_ : a_value_ | b_value_;
  }

  // Passes one end without a branch; false, and nothing done, at the stop.
  template <bool kIntersect>
  bool step() {
    const uint32_t a_end = *a_, b_end = *b_;
    const uint32_t at = a_end < b_end ? a_end : b_end;
    if (at >= stop_) return false;
    const unsigned a_passes = a_end == at ? 1 : 0, b_passes = b_end == at ? 1 : 0;
    a_ += a_passes;
    b_ += b_passes;
    a_value_ ^= a_passes;
    b_value_ ^= b_passes;
    const unsigned now = kIntersect ? a_value_ & b_value_ : a_value_ | b_value_;
    *out_ = at;
    out_ += now ^ value_;
    value_ = now;
    return true;
  }

  uint32_t* out() const { return out_; }

 private:
  const uint32_t *a_, *b_;
  unsigned a_value_, b_value_, value_;
  uint32_t stop_;
  uint32_t* out_;
};

// Two halves in turns: a step waits for the one before it, but not for the other half's.
template <bool kIntersect>
void merge_two(const Ends& a, const Ends& b, Ends* out) {
  const uint32_t pixels = a.back(), middle = a[a.size() / 2];
  const auto index = [&](const Ends& ends) {
    return static_cast<size_t>(std::lower_bound(ends.begin(), ends.end(), middle) - ends.begin());
  };
  const size_t i = index(a), j = index(b);
  out->resize(a.size() + b.size() + 1);
  uint32_t* const second = out->data() + i + j;
  Sweep low(a.data(), b.data(), 0, 0, middle, kIntersect, out->data());
  Sweep high(a.data(), b.data(), i, j, pixels, kIntersect, second);
  while (low.step<kIntersect>() && high.step<kIntersect>()) {
  }
  while (low.step<kIntersect>()) {
  }
  while (high.step<kIntersect>()) {
  }
  uint32_t* const last = std::copy(second, high.out(), low.out());
  *last = pixels;
  out->resize(last + 1 - out->data());
}

void merge_two(const Ends& a, const Ends& b, bool intersect, Ends* out) {
  intersect ? merge_two<true>(a, b, out) : merge_two<false>(a, b, out);
}

// Whether no run but the first is empty. The order of merging does not matter then.
bool shortest(const Ends& ends) {
  bool empty = false;
  for (size_t k = 1; k < ends.size(); ++k) empty |= ends[k] == ends[k - 1];
  return !empty;
}

bool apart(const Box& a, const Box& b) {
  return a.x2 <= b.x1 || b.x2 <= a.x1 || a.y2 <= b.y1 || b.y2 <= a.y1;
}

}  // namespace

Box box_of(const Interval* intervals, int64_t number, int64_t height) {
  if (number == 0) return {0, 0, 0, 0};
  const Divisor by_height(static_cast<uint32_t>(height));
  const auto bottom_row = static_cast<uint32_t>(height - 1);
  uint32_t least = bottom_row, most = 0;
  for (int64_t k = 0; k < number; ++k) {
    const uint32_t start = intervals[k].start, last = intervals[k].end - 1;
    const uint32_t x = by_height.quotient(start);
    uint32_t top = by_height.rest(start, x);
    // Beyond the column's last row, the interval covers that row and the next column's first.
    uint32_t bottom = top + (last - start);
    if (bottom > bottom_row) {
      top = 0;
      bottom = bottom_row;
    }
    least = std::min(least, top);
    most = std::max(most, bottom);
  }
  return {by_height.quotient(intervals[0].start), least,
          int64_t{by_height.quotient(intervals[number - 1].end - 1)} + 1, int64_t{most} + 1};
}

void merge(std::vector<Ends>* masks, bool intersect, Ends* out) {
  size_t left = masks->size();
  Ends merged;
  if (left > 2 && !std::all_of(masks->begin(), masks->end(), shortest)) {
    for (size_t k = 1; k < left; ++k) {
      merge_two((*masks)[0], (*masks)[k], intersect, &merged);
      (*masks)[0].swap(merged);
    }
    left = 1;
  }
  // Neighbours first: lists stay short for longer than if one grew.
  for (; left > 1; left = (left + 1) / 2) {
    for (size_t k = 0; 2 * k < left; ++k) {
      if (2 * k + 1 < left) {
        merge_two((*masks)[2 * k], (*masks)[2 * k + 1], intersect, &merged);
        (*masks)[k].swap(merged);
      } else {
        (*masks)[k].swap((*masks)[2 * k]);
      }
    }
  }
  out->swap((*masks)[0]);
}

void intersections(const std::vector<Intervals>& first, const std::vector<Intervals>& second,
                   int64_t height, int64_t* common) {
  const bool many = first.size() * second.size() >= kPairsForBoxes;
  const auto number = [](const Intervals& list) { return static_cast<int64_t>(list.size()); };
  std::vector<Box> boxes;
  for (size_t g = 0; many && g < second.size(); ++g) {
    boxes.push_back(box_of(second[g].data(), number(second[g]), height));
  }
  for (const Intervals& one : first) {
    const Box box = many ? box_of(one.data(), number(one), height) : Box{0, 0, 0, 0};
    for (size_t g = 0; g < second.size(); ++g) {
      const Intervals& other = second[g];
      *common++ = many && apart(box, boxes[g])
                      ? 0
                      : overlap(one.data(), number(one), other.data(), number(other));
    }
  }
}

}  // namespace pmvis

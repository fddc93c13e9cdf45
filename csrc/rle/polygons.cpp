#include "rle/polygons.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace pmvis {
namespace {

constexpr int64_t kFine = 5;  // grid points to a pixel

struct Point {
  int64_t x, y;
};

// A change of sides: column x changes from row y on; y may be the height.
struct Crossing {
  uint32_t x, y;
};

// Where crossings go, and the frame that bounds them.
struct Frame {
  int64_t height, width;
  std::vector<Crossing>* crossings;

  // First and last pixel column whose middle lies between two grid columns (first <= last).
  int64_t first_column(int64_t fine_x) const { return fine_x <= 2 ? 0 : (fine_x + 2) / kFine; }
  int64_t last_column(int64_t fine_x) const {
    return fine_x < 3 ? -1 : std::min((fine_x - 3) / kFine, width - 1);
  }

  void add(int64_t column, int64_t fine_y) {
    const int64_t row = fine_y <= 2 ? 0 : std::min((fine_y + 2) / kFine, height);
    crossings->push_back({static_cast<uint32_t>(column), static_cast<uint32_t>(row)});
  }
};

// An edge that is at least as wide as tall, from left to right: one grid point a grid column.
void cross_flat(Point from, Point to, Frame* frame) {
  const double slope = static_cast<double>(to.y - from.y) / static_cast<double>(to.x - from.x);
  const auto y_at = [&](int64_t x) {
    return static_cast<int64_t>(static_cast<double>(from.y) +
                                slope * static_cast<double>(x - from.x) + .5);
  };
  const int64_t last = frame->last_column(to.x);
  for (int64_t c = frame->first_column(from.x); c <= last; ++c) {
    frame->add(c, std::min(y_at(kFine * c + 2), y_at(kFine * c + 3)));
  }
}

// An edge that is taller than wide, from top to bottom: one grid point a grid row. The crossings
// are where x, which changes by one at most, passes a column's middle.
void cross_steep(Point from, Point to, Frame* frame) {
  const double slope = static_cast<double>(to.x - from.x) / static_cast<double>(to.y - from.y);
  const int64_t rows = to.y - from.y;
  const auto x_at = [&](int64_t t) {
    return static_cast<int64_t>(static_cast<double>(from.x) + slope * static_cast<double>(t) + .5);
  };
  const bool right = to.x > from.x;
  const int64_t last = frame->last_column(std::max(from.x, to.x));
  for (int64_t c = frame->first_column(std::min(from.x, to.x)); c <= last; ++c) {
    const auto passed = [&](int64_t t) { return right == (x_at(t) > kFine * c + 2); };
    // The quotient is right but for rounding; the steps after it make the answer exact.
    const double middle = static_cast<double>(kFine * c + 2) + .5;
    auto t = static_cast<int64_t>((middle - static_cast<double>(from.x)) / slope);
    t = std::clamp<int64_t>(t, 1, rows);
    while (t > 1 && passed(t - 1)) --t;
    while (t < rows && !passed(t)) ++t;
    frame->add(c, from.y + t - 1);
  }
}

void cross(Point from, Point to, Frame* frame) {
  if (from.x == to.x) return;
  const int64_t wide = std::abs(to.x - from.x), tall = std::abs(to.y - from.y);
  if (wide >= tall) {
    if (from.x > to.x) std::swap(from, to);
    cross_flat(from, to, frame);
  } else {
    if (from.y > to.y) std::swap(from, to);
    cross_steep(from, to, frame);
  }
}

// Puts the crossings in column-major order and drops pairs at one place.
void order(const std::vector<Crossing>& crossings, int64_t height, int64_t pixels,
           std::vector<uint32_t>* ends) {
  ends->clear();
  if (!crossings.empty()) {
    uint32_t first = crossings[0].x, last = first;
    for (const Crossing& c : crossings) {
      first = std::min(first, c.x);
      last = std::max(last, c.x);
    }
    std::vector<uint32_t> next(last - first + 2, 0);
    for (const Crossing& c : crossings) ++next[c.x - first + 1];
    for (size_t x = 1; x < next.size(); ++x) next[x] += next[x - 1];
    std::vector<uint32_t> places(crossings.size());
    for (const Crossing& c : crossings) {
      places[next[c.x - first]++] = static_cast<uint32_t>(c.x * height + c.y);
    }
    // `next[x]` is now where column x ends.
    uint32_t begin = 0;
    for (uint32_t x = 0; x <= last - first; begin = next[x++]) {
      std::sort(places.begin() + begin, places.begin() + next[x]);
    }
    for (const uint32_t place : places) {
      if (!ends->empty() && ends->back() == place) {
        ends->pop_back();
      } else {
        ends->push_back(place);
      }
    }
    if (!ends->empty() && ends->back() == pixels) ends->pop_back();
  }
  ends->push_back(static_cast<uint32_t>(pixels));
}

}  // namespace

bool polygon_ends(const double* xy, int64_t points, int64_t height, int64_t width,
                  std::vector<uint32_t>* ends) {
  std::vector<Crossing> crossings;
  Frame frame{height, width, &crossings};
  for (int64_t k = 0; k < 2 * points; ++k) {
    if (!(std::fabs(xy[k]) <= kMaxCoordinate)) return false;
  }
  const auto vertex = [&](int64_t k) {
    return Point{static_cast<int64_t>(kFine * xy[2 * k] + .5),
                 static_cast<int64_t>(kFine * xy[2 * k + 1] + .5)};
  };
  if (points > 0 && height > 0) {
    Point from = vertex(points - 1);
    for (int64_t k = 0; k < points; ++k) {
      const Point to = vertex(k);
      cross(from, to, &frame);
      from = to;
    }
  }
  order(crossings, height, height * width, ends);
  return true;
}

int64_t polygon_union(const double* xy, const int64_t* points, int64_t polygons, int64_t height,
                      int64_t width, std::vector<Interval>* out) {
  std::vector<uint32_t> ends;
  out->clear();
  for (int64_t k = 0; k < polygons; ++k) {
    if (!polygon_ends(xy, points[k], height, width, &ends)) return -1;
    for (size_t run = 1; run < ends.size(); run += 2) out->push_back({ends[run - 1], ends[run]});
    xy += 2 * points[k];
  }
  if (polygons > 1) {
    std::sort(out->begin(), out->end(),
              [](const Interval& a, const Interval& b) { return a.start < b.start; });
  }
  int64_t area = 0;
  size_t kept = 0;
  for (const Interval& run : *out) {
    if (kept > 0 && run.start <= (*out)[kept - 1].end) {
      Interval* const last = &(*out)[kept - 1];
      if (run.end > last->end) {
        area += run.end - last->end;
        last->end = run.end;
      }
    } else {
      area += run.end - run.start;
      (*out)[kept++] = run;
    }
  }
  out->resize(kept);
  return area;
}

}  // namespace pmvis

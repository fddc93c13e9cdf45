// Polygons as COCO rasterises them, without a boundary walk: time grows with the columns that an
// edge crosses inside the frame, not with its length.
//
// The rule (COCO's frPoly, found equal on random polygons): vertices are rounded to a grid five
// times finer than the pixels, int(5 v + 0.5), towards zero. An edge visits one grid point a step
// along its longer axis. Where it steps between the grid columns 5 c + 2 and 5 c + 3, it crosses
// the middle of pixel column c, and from the upper one of the two grid points on, the column
// changes sides. A pixel is inside if an odd number of crossings lies at or above it.
#pragma once

#include <cstdint>
#include <vector>

#include "rle/text.h"

namespace pmvis {

constexpr double kMaxCoordinate = 1e6;  // pixels; also of negative coordinates

// Rasterises one polygon, xy = x0 y0 x1 y1 ..., closed by itself. `ends` gets the ends of all runs
// of the column-major mask, background first: what decode_ends gives and write_text takes.
// height * width is at most kMaxPixels. Returns false if a coordinate is not finite or beyond
// kMaxCoordinate.
bool polygon_ends(const double* xy, int64_t points, int64_t height, int64_t width,
                  std::vector<uint32_t>* ends);

// The union of polygons that lie one after the other in `xy`, as decode_intervals would write it;
// returns its area, or -1 if a coordinate is not finite or beyond kMaxCoordinate.
int64_t polygon_union(const double* xy, const int64_t* points, int64_t polygons, int64_t height,
                      int64_t width, std::vector<Interval>* out);

}  // namespace pmvis

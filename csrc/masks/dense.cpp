#include "masks/dense.h"

#include <algorithm>
#include <cstring>

#include "masks/dense_isa.h"
#include "masks/fast_division.h"

namespace pmvis {

namespace scalar {

uint32_t* changes(const uint8_t* mask, int64_t stride, int64_t first, int64_t last,
                  uint32_t* out) {
  int64_t k = first;
  for (; k + 8 <= last; k += 8) {
    uint64_t here, before;
    std::memcpy(&here, mask + k, 8);
    std::memcpy(&before, mask + k - stride, 8);
    if (here == before) continue;
    for (int64_t i = k; i < k + 8; ++i) {
      *out = static_cast<uint32_t>(i);
      out += (mask[i] != 0) != (mask[i - stride] != 0);
    }
  }
  for (; k < last; ++k) {
    *out = static_cast<uint32_t>(k);
    out += (mask[k] != 0) != (mask[k - stride] != 0);
  }
  return out;
}

}  // namespace scalar

namespace {

constexpr int64_t kBlock = 1 << 14;  // pixels whose changes are listed at once
constexpr int64_t kRoom = kBlock + 32;

uint32_t* changes(const uint8_t* mask, int64_t stride, int64_t first, int64_t last,
                  uint32_t* out) {
#if defined(PMVIS_X86_ISA)
  static const bool vectors = has_avx2();
  if (vectors) return avx2::changes(mask, stride, first, last, out);
#endif
  return scalar::changes(mask, stride, first, last, out);
}

void grow(std::vector<uint32_t>* list, int64_t used) {
  if (static_cast<int64_t>(list->size()) < used + kRoom) list->resize(2 * used + kRoom);
}

// Lists all changes against the pixel `stride` before, in ascending order, after `used` entries.
int64_t list_changes(const uint8_t* mask, int64_t stride, int64_t first, int64_t last,
                     int64_t used, std::vector<uint32_t>* list) {
  for (int64_t from = first; from < last; from += kBlock) {
    grow(list, used);
    uint32_t* const out = list->data() + used;
    used += changes(mask, stride, from, std::min(from + kBlock, last), out) - out;
  }
  return used;
}

// A mask without pixels is one empty run.
void no_pixels(Dense* d) {
  grow(&d->ends, 0);
  d->ends[0] = 0;
  d->number = 1;
}

}  // namespace

void encode_columns(const uint8_t* mask, int64_t pixels, Dense* d) {
  if (pixels == 0) return no_pixels(d);
  grow(&d->ends, 0);
  int64_t used = 0;
  if (mask[0] != 0) d->ends[used++] = 0;
  used = list_changes(mask, 1, 1, pixels, used, &d->ends);
  grow(&d->ends, used);
  d->ends[used] = static_cast<uint32_t>(pixels);
  d->number = used + 1;
}

// A pixel that differs from the one above it (in the first row: from the last pixel of the column
// before) ends a run. The changes are found row by row and then put into column-major order.
void encode_rows(const uint8_t* mask, int64_t height, int64_t width, Dense* d) {
  const int64_t pixels = height * width;
  if (pixels == 0) return no_pixels(d);
  grow(&d->places, 0);
  int64_t number = 0;
  if (mask[0] != 0) d->places[number++] = 0;
  number = list_changes(mask, 1 + width - pixels, 1, width, number, &d->places);
  number = list_changes(mask, width, width, pixels, number, &d->places);
  const uint32_t* const places = d->places.data();
  const auto each = [&](const auto& visit) {
    int64_t y = 0, row = 0;
    for (int64_t k = 0; k < number; ++k) {
      for (; places[k] >= row + width; row += width) ++y;
      visit(places[k] - row, y);
    }
  };
  d->next.assign(width + 1, 0);
  uint32_t* const next = d->next.data();
  each([&](int64_t x, int64_t) { ++next[x + 1]; });
  for (int64_t x = 0; x < width; ++x) next[x + 1] += next[x];
  grow(&d->ends, number);
  uint32_t* const ends = d->ends.data();
  each([&](int64_t x, int64_t y) { ends[next[x]++] = static_cast<uint32_t>(x * height + y); });
  ends[number] = static_cast<uint32_t>(pixels);
  d->number = number + 1;
}

namespace {

// Calls visit(x, top, bottom) for the pieces of the intervals in each column: rows [top, bottom),
// not empty, inside the part.
template <typename Visit>
void each_piece(const Interval* intervals, int64_t number, int64_t height, const Crop& part,
                const Visit& visit) {
  const Divisor by_height(static_cast<uint32_t>(height));
  const auto after = [](uint32_t place, const Interval& run) { return place < run.end; };
  const Interval* run = std::upper_bound(intervals, intervals + number,
                                         static_cast<uint32_t>(part.x1 * height), after);
  const int64_t stop = part.x2 * height;
  for (; run != intervals + number && run->start < stop; ++run) {
    const int64_t start = std::max<int64_t>(run->start, part.x1 * height);
    const int64_t end = std::min<int64_t>(run->end, stop);
    int64_t x = by_height.quotient(static_cast<uint32_t>(start));
    for (int64_t at = start, column = x * height; at < end; column += height, ++x) {
      const int64_t top = std::max(at - column, part.y1);
      const int64_t bottom = std::min({end - column, height, part.y2});
      if (top < bottom) visit(x, top, bottom);
      at = column + height;
    }
  }
}

}  // namespace

// The pixels that differ from the one above are listed column by column and brought into the order
// of rows. One row then follows from the row before by its few changes, and is copied out.
void decode_rows(const Interval* intervals, int64_t number, int64_t height, const Crop& part,
                 uint8_t* out, Dense* d) {
  const int64_t rows = part.y2 - part.y1, width = part.x2 - part.x1;
  if (rows == 0 || width == 0) return;
  d->next.assign(rows, 0);
  uint32_t* const next = d->next.data();
  int64_t left = part.x2, right = part.x1;
  each_piece(intervals, number, height, part, [&](int64_t x, int64_t top, int64_t bottom) {
    left = std::min(left, x);
    right = x + 1;
    ++next[top - part.y1];
    if (bottom < part.y2) ++next[bottom - part.y1];
  });
  if (left >= right) {
    std::memset(out, 0, rows * width);
    return;
  }
  left -= part.x1;
  right -= part.x1;
  int64_t total = 0;
  for (int64_t y = 0; y < rows; ++y) {
    const uint32_t here = next[y];
    next[y] = static_cast<uint32_t>(total);
    total += here;
  }
  if (static_cast<int64_t>(d->places.size()) < total) d->places.resize(2 * total);
  uint32_t* const places = d->places.data();
  each_piece(intervals, number, height, part, [&](int64_t x, int64_t top, int64_t bottom) {
    const auto column = static_cast<uint32_t>(x - part.x1 - left);
    places[next[top - part.y1]++] = column;
    if (bottom < part.y2) places[next[bottom - part.y1]++] = column;
  });
  // `next[y]` is now where row y ends.
  d->line.assign(right - left, 0);
  uint8_t* const line = d->line.data();
  uint32_t at = 0;
  int64_t blank = left;  // zeros to write before the line
  for (int64_t y = 0; y < rows; ++y) {
    if (next[y] == 0) {  // nothing so far
      blank += width;
      continue;
    }
    for (; at < next[y]; ++at) line[places[at]] ^= 1;
    std::memset(out, 0, blank);
    out += blank;
    std::memcpy(out, line, right - left);
    out += right - left;
    blank = width - (right - left);
  }
  std::memset(out, 0, width - right);
}

}  // namespace pmvis

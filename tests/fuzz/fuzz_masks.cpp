// Fuzzes what `_masks.so` does with masks once their texts are read: csrc/masks/dense.h and
// operations.h, and csrc/rle/polygons.h, against pixels that are set one by one. An input is height and width from 1 to 64, a
// byte each, and the texts of masks with zero bytes between; polygons are made of the same bytes.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "masks/dense.h"
#include "masks/dense_isa.h"
#include "masks/operations.h"
#include "rle/polygons.h"

namespace {

using pmvis::Ends;
using pmvis::Interval;
using pmvis::Intervals;
using Pixels = std::vector<uint8_t>;  // column by column

constexpr size_t kMostMasks = 6;

struct Mask {
  Ends ends;
  Intervals intervals;
  Pixels pixels;
};

bool read(const std::string& text, int64_t pixels, Mask* mask) {
  const auto length = static_cast<int64_t>(text.size());
  mask->ends.resize(static_cast<size_t>(pmvis::ends_room(length)));
  const int64_t number = pmvis::decode_ends(text.data(), length, pixels, mask->ends.data());
  if (number < 0) return false;
  mask->ends.resize(static_cast<size_t>(number));
  mask->intervals.resize(static_cast<size_t>(pmvis::interval_room(length)));
  mask->intervals.resize(static_cast<size_t>(
      pmvis::decode_intervals(text.data(), length, pixels, mask->intervals.data()).number));
  mask->intervals.shrink_to_fit();
  mask->pixels.assign(static_cast<size_t>(pixels), 0);
  for (size_t k = 1; k < mask->ends.size(); k += 2) {
    std::fill(mask->pixels.begin() + mask->ends[k - 1], mask->pixels.begin() + mask->ends[k], 1);
  }
  return true;
}

Ends ends_of(const Pixels& pixels) {
  Ends ends;
  uint8_t value = 0;
  for (size_t k = 0; k < pixels.size(); ++k) {
    if ((pixels[k] != 0) == (value != 0)) continue;
    ends.push_back(static_cast<uint32_t>(k));
    value ^= 1;
  }
  ends.push_back(static_cast<uint32_t>(pixels.size()));
  return ends;
}

Pixels by_rows(const Pixels& columns, int64_t height, int64_t width) {
  Pixels rows(columns.size());
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t y = 0; y < height; ++y) rows[y * width + x] = columns[x * height + y];
  }
  return rows;
}

bool same_ends(const pmvis::Dense& dense, const Ends& ends) {
  return dense.number == static_cast<int64_t>(ends.size()) &&
         std::equal(ends.begin(), ends.end(), dense.ends.begin());
}

void check_dense(const Mask& mask, int64_t height, int64_t width, uint8_t value) {
  pmvis::Dense dense;
  const Ends expected = ends_of(mask.pixels);
  Pixels columns = mask.pixels;
  for (uint8_t& pixel : columns) pixel = pixel != 0 ? value : 0;
  pmvis::encode_columns(columns.data(), height * width, &dense);
  EXPECT(same_ends(dense, expected));
  const Pixels rows = by_rows(mask.pixels, height, width);
  Pixels valued = by_rows(columns, height, width);
  pmvis::encode_rows(valued.data(), height, width, &dense);
  EXPECT(same_ends(dense, expected));

  const int64_t x1 = value % width, y1 = value / 3 % height;
  const pmvis::Crop parts[] = {
      {0, 0, width, height}, {x1, y1, width, height}, {0, 0, x1 + 1, y1 + 1}};
  for (const pmvis::Crop& part : parts) {
    const int64_t part_width = part.x2 - part.x1;
    Pixels out(static_cast<size_t>(part_width * (part.y2 - part.y1)), 7);
    pmvis::decode_rows(mask.intervals.data(), static_cast<int64_t>(mask.intervals.size()), height,
                       part, out.data(), &dense);
    for (int64_t y = part.y1; y < part.y2; ++y) {
      EXPECT(std::equal(rows.begin() + y * width + part.x1, rows.begin() + y * width + part.x2,
                        out.begin() + (y - part.y1) * part_width));
    }
  }
}

void check_box(const Mask& mask, int64_t height) {
  const pmvis::Box box = pmvis::box_of(mask.intervals.data(),
                                       static_cast<int64_t>(mask.intervals.size()), height);
  int64_t x1 = 1 << 20, y1 = x1, x2 = 0, y2 = 0;
  for (size_t k = 0; k < mask.pixels.size(); ++k) {
    if (mask.pixels[k] == 0) continue;
    const auto x = static_cast<int64_t>(k) / height, y = static_cast<int64_t>(k) % height;
    x1 = std::min(x1, x), y1 = std::min(y1, y), x2 = std::max(x2, x + 1), y2 = std::max(y2, y + 1);
  }
  if (x2 == 0) x1 = y1 = 0;
  EXPECT(box.x1 == x1 && box.y1 == y1 && box.x2 == x2 && box.y2 == y2);
}

void check_all(const std::vector<Mask>& masks, int64_t height, int64_t pixels) {
  for (const bool intersect : {false, true}) {
    Pixels expected = masks[0].pixels;
    std::vector<Ends> ends;
    for (const Mask& mask : masks) {
      for (size_t k = 0; k < expected.size(); ++k) {
        expected[k] = intersect ? expected[k] & mask.pixels[k] : expected[k] | mask.pixels[k];
      }
      ends.push_back(mask.ends);
    }
    Ends merged;
    pmvis::merge(&ends, intersect, &merged);
    Pixels found(expected.size(), 0);
    EXPECT(std::is_sorted(merged.begin(), merged.end()) && merged.back() == pixels);
    for (size_t k = 1; k < merged.size(); k += 2) {
      std::fill(found.begin() + merged[k - 1], found.begin() + merged[k], 1);
    }
    EXPECT(found == expected);
  }
  std::vector<Intervals> lists;
  for (const Mask& mask : masks) lists.push_back(mask.intervals);
  std::vector<int64_t> common(lists.size() * lists.size());
  pmvis::intersections(lists, lists, height, common.data());
  for (size_t a = 0; a < masks.size(); ++a) {
    for (size_t b = 0; b < masks.size(); ++b) {
      int64_t expected = 0;
      for (size_t k = 0; k < masks[a].pixels.size(); ++k) {
        expected += masks[a].pixels[k] & masks[b].pixels[k];
      }
      EXPECT(common[a * masks.size() + b] == expected);
    }
  }
}

// Two polygons of any coordinates, infinite ones included, stay inside the mask.
void check_polygons(const uint8_t* data, size_t size, int64_t height, int64_t width) {
  std::vector<double> xy;
  for (size_t k = 0; k + 2 <= size && k < 64; k += 2) {
    const int value = data[k] * 256 + data[k + 1];
    double coordinate = value % 997 * 0.1 - 10;
    if (value % 101 == 0) coordinate *= 1e4;
    if (value % 1009 == 0) coordinate *= 1e300 * (value % 2 == 0 ? 1 : 1e300);
    xy.push_back(coordinate);
  }
  const auto points = static_cast<int64_t>(xy.size() / 2);
  Ends ends;
  if (!pmvis::polygon_ends(xy.data(), points, height, width, &ends)) return;
  EXPECT(!ends.empty() && ends.back() == height * width);
  EXPECT(std::is_sorted(ends.begin(), ends.end()));
  const int64_t parts[] = {points / 2, points - points / 2};
  Intervals joined;
  const int64_t area = pmvis::polygon_union(xy.data(), parts, 2, height, width, &joined);
  int64_t sum = 0;
  uint32_t last = 0;
  for (const Interval& run : joined) {
    EXPECT(run.start < run.end && (sum == 0 || run.start > last) && run.end <= height * width);
    sum += run.end - run.start;
    last = run.end;
  }
  EXPECT(sum == area);
}

}  // namespace

const char* const fuzz::kLetters = "0123456789:;<=>?@ABCMNOPQabcmno\\/p";

std::string fuzz::fresh_input(Random* random) {
  const uint64_t height = 1 + random->below(40), width = 1 + random->below(40);
  const uint64_t pixels = height * width;
  std::string input = {static_cast<char>(height), static_cast<char>(width)};
  for (uint64_t k = 0, most = 1 + random->below(kMostMasks); k < most; ++k) {
    int64_t last = 0, before_last = 0;
    const uint64_t usual = random->below(2 * height) + 1;
    for (uint64_t at = 0, run_index = 0; at < pixels; ++run_index) {
      uint64_t run = random->one_in(20) ? 0 : random->below(usual + 1);
      if (run_index == 0) run = random->below(pixels + 1);
      run = std::min(run, pixels - at);
      const auto signed_run = static_cast<int64_t>(run);
      put_number(run_index > 2 ? signed_run - before_last : signed_run, &input);
      before_last = last;
      last = signed_run;
      at += run;
    }
    input += '\0';
  }
  return input;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const int64_t height = 1 + (data[0] + 63) % 64, width = 1 + (data[1] + 63) % 64;
  check_polygons(data + 2, size - 2, height, width);
  std::vector<Mask> masks;
  std::string text;
  for (size_t k = 2; k < size && masks.size() < kMostMasks; ++k) {
    if (data[k] != 0) {
      text += static_cast<char>(data[k]);
      continue;
    }
    Mask mask;
    if (read(text, height * width, &mask)) masks.push_back(mask);
    text.clear();
  }
  for (const Mask& mask : masks) {
    check_dense(mask, height, width, static_cast<uint8_t>(data[size - 1] | 1));
    check_box(mask, height);
  }
  if (!masks.empty()) check_all(masks, height, height * width);
  return 0;
}

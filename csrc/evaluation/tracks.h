// Tracks as the evaluator needs them, read from the bytes of YouTube-VIS JSON.
//
// Masks are decoded as they are read, and nothing is read twice. What is malformed, or odd in a way
// that the readers in Python judge, throws Refused.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "evaluation/track_masks.h"

namespace pmvis {

// What annotations and predictions share.
struct Track {
  int64_t id, video_id, category_id;
  int64_t length;           // frames
  std::vector<Size> sizes;  // as of sizes_of; polygons state none
  bool converted;           // whether a mask is no text
};

// An annotation.
struct Truth : Track {
  bool has_areas;    // whether areas are stated
  double area;       // mean of the stated areas
  double occlusion;  // mean of the more occluded half; NaN if not stated
  bool crowd;
  Masks masks;
};

// A prediction, compared with the ground truths of its video and category.
struct Prediction : Track {
  double score;
  double area;               // mean of its masks
  std::vector<double> ious;  // with each ground truth
  bool comparable;           // false: a union is empty
};

struct Video {
  int64_t id, height, width, length;
};

// A file in the dataset form.
struct Dataset {
  std::vector<Video> videos;        // in the file's order
  std::vector<int64_t> categories;  // their ids, in the file's order
  std::vector<Truth> annotations;   // in the file's order
  std::string_view vocabulary;      // the list of categories as JSON
};

// Reads ground truth. With `occlusions`, that key is read, too. Polygons are left to do.
Dataset read_truth(std::string_view text, bool occlusions, int threads);

// Fills in area and IoUs of a prediction, whose masks the reader has decoded.
using Measure = std::function<void(MaskReader*, Prediction*)>;

// Reads a results list. Ids are places from 1 on.
std::vector<Prediction> read_results(std::string_view text, int threads, const Measure& measure);

// Returns the sizes of masks in order; one that goes on for several frames once.
std::vector<Size> sizes_of(const std::vector<Frame>& frames);

// The sum of doubles as numpy adds them up, so that means have its last digit.
double pairwise_sum(const double* values, int64_t number);

}  // namespace pmvis

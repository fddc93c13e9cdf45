// Matching the predictions of each video and category with its ground truth.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "evaluation/tracks.h"

namespace pmvis {

// Kinds of oddities, numbered as in pmvis_core/evaluation/oddities.py; what the numbers of a doubt
// mean stands there, too.
enum Oddity : int64_t {
  kUnlistedVideo,
  kUnlistedCategory,
  kNoAnnotation,
  kVideoTwice,
  kAnnotationTwice,
  kIdZero,
  kNoAreas,
  kUnknownCategory,
  kConverted,
  kNoPrediction,
  kNoCommonCategory,
  kTruthLength,
  kPredictionLength,
  kTruthSize,
  kPredictionSize,
  kNotComparable,
};

struct Doubt {
  int64_t kind;
  int64_t numbers[5];
};

// Ground truths and predictions of one video and category.
struct Pair {
  Video video;
  int64_t category_id;
  int64_t truth_begin, truth_end;  // in Problem::truths
  int64_t begin, end;              // in Problem::predictions, by falling score
  int64_t iou_begin, iou_end;      // in the IoUs of all pairs
};

// All that is to be matched.
struct Problem {
  std::vector<Pair> pairs;  // by category id, then video id
  std::vector<const Truth*> truths;
  std::vector<const Prediction*> predictions;
  std::vector<Doubt> doubts;

  // What the pointers point into.
  Dataset dataset;
  std::vector<Prediction> results;
};

// What the protocol fixes. S groups = areas x occlusions, areas slowest.
struct Range {
  double low, high;  // both ends belong to it
};

struct Protocol {
  const double* thresholds;  // (T,) ascending
  int64_t threshold_number;
  const Range* areas;
  int64_t area_number;
  const Range* occlusions;
  int64_t occlusion_number;
  int64_t most;        // predictions of a pair that count
  int64_t shard;       // of files: every shards-th video by ascending id, from the shard-th on, the
  int64_t shards;      // first being 1
  bool equal_lengths;  // whether tracks of unequal length are an error, as for OVIS
  bool exact;          // whether IoUs below the first threshold are wanted, too; else they are 0

  bool by_occlusion() const { return occlusion_number > 1; }
  int64_t groups() const { return area_number * occlusion_number; }
};

// Reads ground truth and results, and pairs them up as the official evaluators index them.
void read_problem(std::string_view truth, std::string_view results, const Protocol& protocol,
                  int threads, Problem* problem);

// Fills in what comparing a prediction with the ground truths of its video and category shows; the
// reader holds its masks.
void compare(const MaskReader& masks, const std::vector<const Truth*>& truths, bool exact,
             Prediction* row);

// Puts the begins of pairs into their places once their sizes are known.
void lay_out(Problem* problem);

// Where results go: the columns of `Matches` in pmvis_core/evaluation/matches.py.
struct Columns {
  int64_t* video_ids;
  int64_t* category_ids;
  uint8_t* comparable;
  int64_t* starts;
  double* scores;
  int64_t* rows;
  int64_t* matches;  // zeros before
  uint8_t* ignored;  // zeros before
  int64_t* truth_starts;
  int64_t* truth_ids;
  uint8_t* truth_ignored;
  int64_t* iou_starts;
  double* ious;
};

// Matches all pairs; the same bits for any number of threads. Adds doubts.
void match(const Protocol& protocol, int threads, Problem* problem, const Columns& columns);

}  // namespace pmvis

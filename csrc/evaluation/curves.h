// From matches to curves of precision and recall.
#pragma once

#include <cstdint>

namespace pmvis {

// The columns of `Matches` that curves are made of; P pairs by category, N predictions, G ground
// truths, S groups, T thresholds, 64 at
// most.
struct Matched {
  int64_t categories, groups, thresholds;
  const int64_t* pairs;            // (categories, 2) first pair of each, and the one behind
  const int64_t* starts;           // (P + 1,)
  const double* scores;            // (N,)
  const int64_t* matches;          // (N, S, T)
  const uint8_t* ignored;          // (N, S, T)
  const int64_t* truth_starts;     // (P + 1,)
  const uint8_t* truth_ignored;    // (G, S)
  const int64_t* weights;          // (P,) or null: every pair counts once
};

struct Axes {
  const double* points;   // (R,) recalls at which curves are read, ascending
  int64_t point_number;
  const int64_t* limits;  // (M,) predictions of a video that count
  int64_t limit_number;
};

// Where curves go; -1 in categories without ground truth.
struct Curves {
  double* precision;  // (T, R, K, S, M)
  double* recall;     // (T, K, S, M)
  double* scores;     // (T, R, K, S, M)
};

// Accumulates all categories; the same bits for any number of threads.
void accumulate(const Matched& matched, const Axes& axes, int threads, const Curves& curves);

}  // namespace pmvis

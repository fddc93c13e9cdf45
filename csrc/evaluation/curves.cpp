#include "evaluation/curves.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "formats/parallel.h"

namespace pmvis {
namespace {

// A prediction in the order of falling scores.
struct Ranked {
  double score;
  int64_t row;     // of the columns
  int64_t rank;    // within its pair
  int64_t weight;
};

// What a prediction is in a group; bit t belongs to threshold t. Neither: it does not count.
struct Outcome {
  uint64_t hit, fault;
};

// A prediction that is a hit: only there recall rises and precision can peak.
struct Hit {
  double recall, precision, score;
};

class Accumulator {
 public:
  Accumulator(const Matched& matched, const Axes& axes, const Curves& out)
      : matched_(matched), axes_(axes), out_(out),
        cells_(matched.groups * axes.limit_number) {}

  // Writes all curves of a category.
  void run(int64_t k) {
    rank(k);
    const int64_t rows = matched_.thresholds * axes_.point_number;
    precision_.assign(static_cast<size_t>(rows * cells_), -1.0);
    scores_.assign(static_cast<size_t>(rows * cells_), -1.0);
    recall_.assign(static_cast<size_t>(matched_.thresholds * cells_), -1.0);
    for (int64_t group = 0; group < matched_.groups; ++group) {
      const int64_t truths = count_truths(k, group);
      if (truths == 0) continue;
      judge(group);
      for (int64_t m = 0; m < axes_.limit_number; ++m) curves(group, m, truths);
    }
    copy_out(k, rows, precision_, out_.precision);
    copy_out(k, rows, scores_, out_.scores);
    copy_out(k, matched_.thresholds, recall_, out_.recall);
  }

 private:
  int64_t weight_of(int64_t pair) const {
    return matched_.weights == nullptr ? 1 : matched_.weights[pair];
  }

  // Sorts the predictions of a category; equal scores keep the order of their videos.
  void rank(int64_t k) {
    ranked_.clear();
    for (int64_t p = matched_.pairs[2 * k]; p < matched_.pairs[2 * k + 1]; ++p) {
      for (int64_t row = matched_.starts[p]; row < matched_.starts[p + 1]; ++row) {
        ranked_.push_back({matched_.scores[row], row, row - matched_.starts[p], weight_of(p)});
      }
    }
    std::stable_sort(ranked_.begin(), ranked_.end(),
                     [](const Ranked& a, const Ranked& b) { return a.score > b.score; });
  }

  // Returns how many ground truths of a category count in a group.
  int64_t count_truths(int64_t k, int64_t group) const {
    int64_t number = 0;
    for (int64_t p = matched_.pairs[2 * k]; p < matched_.pairs[2 * k + 1]; ++p) {
      int64_t counted = 0;
      for (int64_t g = matched_.truth_starts[p]; g < matched_.truth_starts[p + 1]; ++g) {
        counted += matched_.truth_ignored[g * matched_.groups + group] == 0;
      }
      number += counted * weight_of(p);
    }
    return number;
  }

  // Tells what each prediction is in a group.
  void judge(int64_t group) {
    outcomes_.clear();
    for (const Ranked& ranked : ranked_) {
      const int64_t place = (ranked.row * matched_.groups + group) * matched_.thresholds;
      Outcome found{0, 0};
      for (int64_t t = 0; t < matched_.thresholds; ++t) {
        const uint64_t counts = matched_.ignored[place + t] == 0 && ranked.weight != 0;
        const uint64_t matched = matched_.matches[place + t] != 0;
        found.hit |= (counts & matched) << t;
        found.fault |= (counts & ~matched & 1) << t;
      }
      outcomes_.push_back(found);
    }
  }

  // Writes the curves of one group and limit, for each threshold.
  void curves(int64_t group, int64_t m, int64_t truths) {
    const int64_t thresholds = matched_.thresholds, limit = axes_.limits[m];
    const uint64_t all = ~uint64_t{0} >> (64 - thresholds);
    hits_.resize(static_cast<size_t>(thresholds));
    for (std::vector<Hit>& hits : hits_) hits.clear();
    right_.assign(static_cast<size_t>(thresholds), 0);
    wrong_.assign(static_cast<size_t>(thresholds), 0);
    int64_t wrong_at_all = 0;  // counted once instead of at each threshold
    const Ranked* first = nullptr;
    for (size_t k = 0; k < ranked_.size(); ++k) {
      const Ranked& ranked = ranked_[k];
      if (ranked.rank >= limit) continue;
      if (first == nullptr) first = &ranked;
      const Outcome& outcome = outcomes_[k];
      if (outcome.fault == all) {
        wrong_at_all += ranked.weight;
        continue;
      }
      each_bit(outcome.fault, [&](int t) { wrong_[t] += ranked.weight; });
      each_bit(outcome.hit, [&](int t) {
        right_[t] += ranked.weight;
        const auto hit = static_cast<double>(right_[t]);
        const auto fault = static_cast<double>(wrong_[t] + wrong_at_all);
        hits_[t].push_back({hit / static_cast<double>(truths),
                            hit / (fault + hit + std::numeric_limits<double>::epsilon()),
                            ranked.score});
      });
    }
    const int64_t cell = group * axes_.limit_number + m;
    for (int64_t t = 0; t < thresholds; ++t) {
      recall_[t * cells_ + cell] =
          static_cast<double>(right_[t]) / static_cast<double>(truths);
      read_curve(&hits_[t], first, t * axes_.point_number, cell);
    }
  }

  template <typename Visit>
  static void each_bit(uint64_t bits, const Visit& visit) {
    for (; bits != 0; bits &= bits - 1) visit(__builtin_ctzll(bits));
  }

  // Reads a curve at each recall: the best precision from the first prediction on that reaches it,
  // and the score of that prediction.
  void read_curve(std::vector<Hit>* hits, const Ranked* first, int64_t row, int64_t cell) {
    for (size_t k = hits->size(); k-- > 1;) {
      (*hits)[k - 1].precision = std::max((*hits)[k - 1].precision, (*hits)[k].precision);
    }
    size_t at = 0;
    for (int64_t r = 0; r < axes_.point_number; ++r) {
      const int64_t place = (row + r) * cells_ + cell;
      const double point = axes_.points[r];
      while (at < hits->size() && (*hits)[at].recall < point) ++at;
      const bool reached = at < hits->size();
      precision_[place] = reached ? (*hits)[at].precision : 0.0;
      scores_[place] = reached ? (*hits)[at].score : 0.0;
      // Recall 0 is reached by the very first prediction, whatever it is.
      if (point <= 0) scores_[place] = first == nullptr ? 0.0 : first->score;
    }
  }

  void copy_out(int64_t k, int64_t rows, const std::vector<double>& cells, double* out) const {
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(cells.data() + row * cells_, cells_,
                  out + (row * matched_.categories + k) * cells_);
    }
  }

  const Matched& matched_;
  const Axes& axes_;
  const Curves& out_;
  int64_t cells_;  // groups x limits
  std::vector<Ranked> ranked_;
  std::vector<Outcome> outcomes_;             // of `ranked_`, in the current group
  std::vector<std::vector<Hit>> hits_;        // of each threshold
  std::vector<int64_t> right_, wrong_;        // so far, of each threshold
  std::vector<double> precision_, scores_;    // (T, R, cells)
  std::vector<double> recall_;                // (T, cells)
};

}  // namespace

void accumulate(const Matched& matched, const Axes& axes, int threads, const Curves& curves) {
  std::vector<Accumulator> workers(static_cast<size_t>(threads),
                                   Accumulator(matched, axes, curves));
  parallel(threads, matched.categories,
           [&](int64_t k, int thread) { workers[static_cast<size_t>(thread)].run(k); });
}

}  // namespace pmvis

#include "evaluation/match.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "evaluation/overlap.h"
#include "formats/parallel.h"

namespace pmvis {
namespace {

constexpr double kAlmostOne = 1 - 1e-10;  // no threshold asks for more

bool outside(const Range& range, double value) { return value < range.low || value > range.high; }

// What one thread needs to match a pair, used again for the next.
struct Scratch {
  std::vector<int64_t> candidates;
  std::vector<uint8_t> taken;
};

class Matcher {
 public:
  Matcher(const Protocol& protocol, const Problem& problem, const Columns& out)
      : protocol_(protocol), problem_(problem), out_(out), doubts_(problem.pairs.size()) {}

  void match(int64_t p, Scratch* s) {
    const Pair& pair = problem_.pairs[static_cast<size_t>(p)];
    std::vector<Doubt>* const doubts = &doubts_[static_cast<size_t>(p)];
    doubt_shapes(pair, doubts);
    out_.video_ids[p] = pair.video.id;
    out_.category_ids[p] = pair.category_id;
    out_.starts[p + 1] = pair.end;
    out_.truth_starts[p + 1] = pair.truth_end;
    out_.iou_starts[p + 1] = pair.iou_end;
    bool comparable = true;
    for (int64_t g = pair.truth_begin; g < pair.truth_end; ++g) write_truth(g);
    for (int64_t d = pair.begin; d < pair.end; ++d) {
      const Prediction& row = prediction(d);
      out_.scores[d] = row.score;
      out_.rows[d] = row.id;
      std::copy(row.ious.begin(), row.ious.end(), ious_of(pair, d));
      comparable &= row.comparable;
    }
    out_.comparable[p] = comparable;
    if (!comparable) doubts->push_back({kNotComparable, {pair.video.id, pair.category_id}});
    assign(pair, s);
  }

  const std::vector<std::vector<Doubt>>& doubts() const { return doubts_; }

 private:
  const Truth& truth(int64_t g) const { return *problem_.truths[static_cast<size_t>(g)]; }
  const Prediction& prediction(int64_t d) const {
    return *problem_.predictions[static_cast<size_t>(d)];
  }
  double* ious_of(const Pair& pair, int64_t d) const {
    return out_.ious + pair.iou_begin + (d - pair.begin) * (pair.truth_end - pair.truth_begin);
  }

  // Tells in which groups a ground truth does not count.
  void write_truth(int64_t g) const {
    const Truth& row = truth(g);
    if (protocol_.by_occlusion() && std::isnan(row.occlusion)) throw Refused();
    const double area = row.has_areas ? row.area : mean_area(row.masks.frames);
    out_.truth_ids[g] = row.id;
    uint8_t* ignored = out_.truth_ignored + g * protocol_.groups();
    for (int64_t a = 0; a < protocol_.area_number; ++a) {
      for (int64_t o = 0; o < protocol_.occlusion_number; ++o) {
        const bool hidden =
            protocol_.by_occlusion() && outside(protocol_.occlusions[o], row.occlusion);
        *ignored++ = row.crowd || hidden || outside(protocol_.areas[a], area);
      }
    }
  }

  // In order of falling score each prediction takes, of the ground truths that reach the threshold
  // and are free, the one with the largest IoU, the later of equals; one that counts before any
  // that is ignored. Crowds are never used up.
  void assign(const Pair& pair, Scratch* s) const {
    const int64_t number = pair.truth_end - pair.truth_begin;
    const int64_t thresholds = protocol_.threshold_number, groups = protocol_.groups();
    s->taken.assign(static_cast<size_t>(groups * thresholds * number), 0);
    for (int64_t d = pair.begin; d < pair.end; ++d) {
      const double* const ious = ious_of(pair, d);
      s->candidates.clear();
      for (int64_t g = 0; g < number; ++g) {
        if (ious[g] >= floor_of(0)) s->candidates.push_back(g);
      }
      for (int64_t group = 0; group < groups; ++group) {
        const Range& areas = protocol_.areas[group / protocol_.occlusion_number];
        const int64_t place = (d * groups + group) * thresholds;
        const bool too_far = outside(areas, prediction(d).area);
        std::fill_n(out_.ignored + place, thresholds, too_far);
        if (s->candidates.empty()) continue;
        for (int64_t t = 0; t < thresholds; ++t) {
          uint8_t* const taken = s->taken.data() + (group * thresholds + t) * number;
          const int64_t best = choose(pair, s->candidates, ious, group, t, taken);
          if (best < 0) continue;
          taken[best] = 1;
          const int64_t g = pair.truth_begin + best, id = out_.truth_ids[g];
          out_.matches[place + t] = id;
          // A match with id 0 looks like none.
          out_.ignored[place + t] = out_.truth_ignored[g * groups + group] || (too_far && id == 0);
        }
      }
    }
  }

  double floor_of(int64_t t) const { return std::min(protocol_.thresholds[t], kAlmostOne); }

  // Returns the ground truth that a prediction takes, -1 for none.
  int64_t choose(const Pair& pair, const std::vector<int64_t>& candidates, const double* ious,
                 int64_t group, int64_t threshold, const uint8_t* taken) const {
    int64_t best = -1;
    bool best_counts = false;
    for (const int64_t g : candidates) {
      const int64_t row = pair.truth_begin + g;
      if (ious[g] < floor_of(threshold) || (taken[g] && !truth(row).crowd)) continue;
      const bool counts = !out_.truth_ignored[row * protocol_.groups() + group];
      const bool better = best < 0 || (counts == best_counts ? ious[g] >= ious[best] : counts);
      if (!better) continue;
      best = g;
      best_counts = counts;
    }
    return best;
  }

  // Notes tracks whose length or mask sizes are not those of their video.
  void doubt_shapes(const Pair& pair, std::vector<Doubt>* doubts) const {
    const bool both = pair.truth_end > pair.truth_begin && pair.end > pair.begin;
    const int64_t length = pair.end > pair.begin ? prediction(pair.begin).length : 0;
    bool equal = true;
    for (int64_t g = pair.truth_begin; g < pair.truth_end; ++g) {
      doubt_shape(truth(g), pair.video, kTruthLength, kTruthSize, doubts);
      equal &= truth(g).length == length;
    }
    for (int64_t d = pair.begin; d < pair.end; ++d) {
      doubt_shape(prediction(d), pair.video, kPredictionLength, kPredictionSize, doubts);
      equal &= prediction(d).length == length;
    }
    if (protocol_.equal_lengths && both && !equal) throw Refused();
  }

  static void doubt_shape(const Track& track, const Video& video, Oddity length, Oddity size,
                          std::vector<Doubt>* doubts) {
    if (track.length != video.length) {
      doubts->push_back({length, {video.id, track.length, video.length}});
    }
    const auto as_video = [&](const Size& s) {
      return s.height == video.height && s.width == video.width;
    };
    if (std::all_of(track.sizes.begin(), track.sizes.end(), as_video)) return;
    std::unordered_set<uint64_t> told;
    for (const Size& s : track.sizes) {
      if (as_video(s) || !told.insert(uint64_t{s.height} << 32 | s.width).second) continue;
      doubts->push_back({size, {video.id, s.height, s.width, video.height, video.width}});
    }
  }

  const Protocol& protocol_;
  const Problem& problem_;
  const Columns& out_;
  std::vector<std::vector<Doubt>> doubts_;  // of each pair
};

}  // namespace

void match(const Protocol& protocol, int threads, Problem* problem, const Columns& columns) {
  columns.starts[0] = columns.truth_starts[0] = columns.iou_starts[0] = 0;
  Matcher matcher(protocol, *problem, columns);
  std::vector<Scratch> scratch(static_cast<size_t>(threads));
  parallel(threads, static_cast<int64_t>(problem->pairs.size()), [&](int64_t p, int thread) {
    matcher.match(p, &scratch[static_cast<size_t>(thread)]);
  });
  for (const std::vector<Doubt>& doubts : matcher.doubts()) {
    problem->doubts.insert(problem->doubts.end(), doubts.begin(), doubts.end());
  }
}

}  // namespace pmvis

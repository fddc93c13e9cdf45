// Which tracks are compared with which.
#include <algorithm>
#include <unordered_map>

#include "evaluation/match.h"
#include "evaluation/overlap.h"
#include "formats/parallel.h"

namespace pmvis {
namespace {

// Finds ids in a list; of equal ones the last.
class Places {
 public:
  void add(int64_t id, int64_t place) { places_.push_back({id, place}); }

  void sort() { std::sort(places_.begin(), places_.end()); }

  // Returns the place of an id, or -1.
  int64_t find(int64_t id) const {
    const auto behind = std::upper_bound(places_.begin(), places_.end(), id,
                                         [](int64_t a, const Place& b) { return a < b.id; });
    return behind == places_.begin() || (behind - 1)->id != id ? -1 : (behind - 1)->place;
  }

 private:
  struct Place {
    int64_t id, place;
    bool operator<(const Place& other) const {
      return id != other.id ? id < other.id : place < other.place;
    }
  };
  std::vector<Place> places_;
};

// A row under the pair it belongs to.
template <typename Row>
struct Entry {
  int64_t category_id, video_id;
  double score;
  int64_t order;
  const Row* row;
};

template <typename One, typename Other>
bool same_pair(const One& a, const Other& b) {
  return a.category_id == b.category_id && a.video_id == b.video_id;
}

template <typename One, typename Other>
bool before(const One& a, const Other& b) {
  return a.category_id != b.category_id ? a.category_id < b.category_id : a.video_id < b.video_id;
}

// By pair, then falling score, then order.
template <typename Row>
void sort(std::vector<Entry<Row>>* entries) {
  std::sort(entries->begin(), entries->end(), [](const Entry<Row>& a, const Entry<Row>& b) {
    if (!same_pair(a, b)) return before(a, b);
    return a.score != b.score ? a.score > b.score : a.order < b.order;
  });
}

// Calls visit(id, times) for each distinct id, in order of appearance.
template <typename Visit>
void each_count(const std::vector<int64_t>& ids, const Visit& visit) {
  std::unordered_map<int64_t, int64_t> times;
  for (const int64_t id : ids) ++times[id];
  for (const int64_t id : ids) {
    int64_t& number = times[id];
    if (number > 0) visit(id, number);
    number = 0;
  }
}

class Grouping {
 public:
  Grouping(const Protocol& protocol, Problem* problem)
      : protocol_(protocol), problem_(*problem), dataset_(problem->dataset) {
    for (size_t k = 0; k < dataset_.videos.size(); ++k) {
      videos_.add(dataset_.videos[k].id, static_cast<int64_t>(k));
    }
    videos_.sort();
    for (const int64_t id : dataset_.categories) categories_.add(id, 0);
    categories_.sort();
    choose_shard();
  }

  // Rasterises polygons, now that the sizes of all videos are known.
  void rasterise(int threads) {
    std::vector<MaskReader> readers(static_cast<size_t>(threads));
    const auto number = static_cast<int64_t>(dataset_.annotations.size());
    parallel(threads, number, [&](int64_t k, int thread) {
      Truth& row = dataset_.annotations[static_cast<size_t>(k)];
      if (row.masks.polygons.empty() || !lists_video(row.video_id)) return;
      MaskReader& reader = readers[static_cast<size_t>(thread)];
      reader.resume(row.masks);
      reader.rasterise(video(row.video_id).height, video(row.video_id).width);
      row.masks = reader.keep();
    });
  }

  // The official index goes by id: of annotations that share one, the last stands in the place of
  // each. It hands out videos by ascending id.
  void group_truth() {
    const std::vector<Truth>& rows = dataset_.annotations;
    std::unordered_map<int64_t, const Truth*> last;
    for (const Truth& row : rows) last[row.id] = &row;
    std::vector<Entry<Truth>> listed;
    for (const Truth& row : rows) {
      const auto order = static_cast<int64_t>(listed.size());
      if (!lists_video(row.video_id)) {
        doubt(kUnlistedVideo, row.id, row.video_id);
      } else if (!lists_category(row.category_id)) {
        doubt(kUnlistedCategory, row.id, row.video_id);
      } else {
        listed.push_back({0, row.video_id, 0, order, &row});
      }
    }
    doubt_truth();
    sort(&listed);
    for (const Entry<Truth>& entry : listed) {
      const Truth* const row = last[entry.row->id];
      if (!lists_video(row->video_id) || !lists_category(row->category_id)) continue;
      const auto order = static_cast<int64_t>(truths_.size());
      truths_.push_back({row->category_id, row->video_id, 0, order, row});
    }
    sort(&truths_);
  }

  // Compares a prediction with the ground truths of its video and category, if the video is one of
  // the shard's.
  void measure(MaskReader* masks, Prediction* row) const {
    if (!lists_video(row->video_id)) throw Refused();
    const Video& here = video(row->video_id);
    masks->rasterise(here.height, here.width);
    if (!is_mine(row->video_id)) return;
    const auto first = std::lower_bound(
        truths_.begin(), truths_.end(), *row,
        [](const Entry<Truth>& a, const Prediction& b) { return before(a, b); });
    std::vector<const Truth*> found;
    for (auto at = first; at != truths_.end() && same_pair(*at, *row); ++at) {
      found.push_back(at->row);
    }
    compare(*masks, found, protocol_.exact, row);
  }

  void group_predictions() {
    bool converted = false;
    for (const Prediction& row : problem_.results) {
      if (!lists_category(row.category_id)) {
        doubt(kUnknownCategory, row.category_id);
        continue;
      }
      if (row.converted && !converted) doubt(kConverted);
      converted |= row.converted;
      predictions_.push_back({row.category_id, row.video_id, row.score, row.id, &row});
    }
    if (problem_.results.empty()) doubt(kNoPrediction);
    doubt_categories();
    sort(&predictions_);
  }

  void pair_up() {
    auto g = truths_.begin();
    auto d = predictions_.begin();
    while (g != truths_.end() || d != predictions_.end()) {
      const bool by_truth =
          d == predictions_.end() || (g != truths_.end() && before(*g, *d));
      Pair pair{};
      pair.video = video(by_truth ? g->video_id : d->video_id);
      pair.category_id = by_truth ? g->category_id : d->category_id;
      const Entry<Track> key{pair.category_id, pair.video.id, 0, 0, nullptr};
      const bool mine = is_mine(pair.video.id);
      for (; g != truths_.end() && same_pair(*g, key); ++g) {
        if (!mine) continue;
        problem_.truths.push_back(g->row);
        ++pair.truth_end;
      }
      for (; d != predictions_.end() && same_pair(*d, key); ++d) {
        if (!mine || pair.end == protocol_.most) continue;
        problem_.predictions.push_back(d->row);
        ++pair.end;
      }
      if (pair.truth_end + pair.end > 0) problem_.pairs.push_back(pair);
    }
    lay_out(&problem_);
  }

 private:
  bool lists_video(int64_t id) const { return videos_.find(id) >= 0; }
  bool lists_category(int64_t id) const { return categories_.find(id) >= 0; }
  const Video& video(int64_t id) const { return dataset_.videos[videos_.find(id)]; }

  bool is_mine(int64_t id) const { return std::binary_search(mine_.begin(), mine_.end(), id); }

  void choose_shard() {
    std::vector<int64_t> ids;
    for (const Video& video : dataset_.videos) ids.push_back(video.id);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    for (auto k = static_cast<size_t>(protocol_.shard - 1); k < ids.size();
         k += static_cast<size_t>(protocol_.shards)) {
      mine_.push_back(ids[k]);
    }
  }

  void doubt(Oddity kind, int64_t first = 0, int64_t second = 0) {
    problem_.doubts.push_back({kind, {first, second, 0, 0, 0}});
  }

  void doubt_truth() {
    const std::vector<Truth>& rows = dataset_.annotations;
    if (rows.empty()) doubt(kNoAnnotation);
    std::vector<int64_t> ids;
    for (const Video& video : dataset_.videos) ids.push_back(video.id);
    each_count(ids, [&](int64_t id, int64_t times) {
      if (times > 1) doubt(kVideoTwice, id);
    });
    ids.clear();
    for (const Truth& row : rows) ids.push_back(row.id);
    each_count(ids, [&](int64_t id, int64_t times) {
      if (times > 1) doubt(kAnnotationTwice, id);
      if (id == 0) doubt(kIdZero);
    });
    for (const Truth& row : rows) {
      if (!row.has_areas) doubt(kNoAreas, row.id, row.video_id);
    }
  }

  void doubt_categories() {
    if (dataset_.annotations.empty() || predictions_.empty()) return;
    Places used;
    for (const Truth& row : dataset_.annotations) used.add(row.category_id, 0);
    used.sort();
    for (const Entry<Prediction>& entry : predictions_) {
      if (used.find(entry.category_id) >= 0) return;
    }
    doubt(kNoCommonCategory);
  }

  const Protocol& protocol_;
  Problem& problem_;
  Dataset& dataset_;
  Places videos_, categories_;
  std::vector<int64_t> mine_;  // ids of the shard's videos, ascending
  std::vector<Entry<Truth>> truths_;            // by pair
  std::vector<Entry<Prediction>> predictions_;  // by pair and falling score
};

}  // namespace

void read_problem(std::string_view truth, std::string_view results, const Protocol& protocol,
                  int threads, Problem* problem) {
  problem->dataset = read_truth(truth, protocol.by_occlusion(), threads);
  Grouping grouping(protocol, problem);
  grouping.rasterise(threads);
  grouping.group_truth();
  problem->results = read_results(results, threads, [&](MaskReader* masks, Prediction* row) {
    grouping.measure(masks, row);
  });
  grouping.group_predictions();
  grouping.pair_up();
}

void compare(const MaskReader& masks, const std::vector<const Truth*>& truths, bool exact,
             Prediction* row) {
  row->area = mean_area(masks.frames());
  row->comparable = true;
  for (const Truth* truth : truths) {
    const Overlap found = track_iou({masks.frames(), masks.intervals()},
                                    {truth->masks.frames, truth->masks.intervals}, exact);
    row->ious.push_back(found.iou);
    row->comparable &= found.comparable;
  }
}

void lay_out(Problem* problem) {
  int64_t truths = 0, predictions = 0, ious = 0;
  for (Pair& pair : problem->pairs) {
    const int64_t truth_number = pair.truth_end - pair.truth_begin;
    const int64_t number = pair.end - pair.begin;
    pair.truth_begin = truths;
    pair.begin = predictions;
    pair.iou_begin = ious;
    pair.truth_end = truths += truth_number;
    pair.end = predictions += number;
    pair.iou_end = ious += truth_number * number;
  }
}

}  // namespace pmvis

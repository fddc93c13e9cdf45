#include "evaluation/tracks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/json_lists.h"

namespace pmvis {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// Reads a list of numbers and nulls; returns the mean of the numbers that are not 0, 0 if there is
// none. `areas` is room for them.
double read_areas(Json* json, std::vector<double>* areas) {
  areas->clear();
  json->array([&] {
    if (json->accept_word("null")) return;
    const double area = json->real();
    // Whole numbers that no double holds are averaged otherwise in Python.
    if (std::fabs(area) > 9e15) throw Refused();
    if (area != 0) areas->push_back(area);
  });
  const auto number = static_cast<int64_t>(areas->size());
  return number == 0 ? 0.0 : pairwise_sum(areas->data(), number) / static_cast<double>(number);
}

// Returns what the levels of occlusion mean: the mean over the more occluded half of the frames.
// NaN if they are not as OVIS states them.
double read_occlusion(Json* json) {
  int64_t counts[3] = {0, 0, 0};
  bool usable = true;
  if (json->peek() != '[') {
    json->skip();
    return kNone;
  }
  json->array([&] {
    if (json->accept_word("null")) return;
    if (json->peek() != '"') {
      usable = false;
      json->skip();
      return;
    }
    const std::string_view level = json->string().view();
    const int place = level == "no_occlusion"       ? 0
                      : level == "slight_occlusion" ? 1
                      : level == "severe_occlusion" ? 2
                                                    : -1;
    if (place < 0) throw Refused();
    ++counts[place];
  });
  const int64_t half = (counts[0] + counts[1] + counts[2] + 1) / 2;
  if (!usable || half == 0) return kNone;
  const int64_t severe = std::min(half, counts[2]), slight = std::min(half - severe, counts[1]);
  return (static_cast<double>(severe) * .75 + static_cast<double>(slight) * .25) /
         static_cast<double>(half);
}

bool read_truth_value(Json* json) {
  if (json->accept_word("true")) return true;
  if (json->accept_word("false") || json->accept_word("null")) return false;
  return json->real() != 0;
}

// Checks what pmvis itself keeps with an annotation.
void read_block(Json* json) {
  json->object([&](std::string_view key) {
    const char first = json->peek();
    if (key == "track_id" || key == "instance" || key == "keyframe") {
      json->integer();
    } else if (key == "supervision") {
      const std::string_view kind = json->string().view();
      if (kind != "mask" && kind != "box" && kind != "point" && kind != "pseudo") throw Refused();
    } else {
      if (key == "frame_scores" && first != '[') throw Refused();
      if (key == "lineage" && first != '{') throw Refused();
      json->skip();
    }
  });
}

// Reads entries of a list of annotations or of results, one after the other.
class EntryReader {
 public:
  EntryReader(Json* json, MaskReader* masks, bool truth, bool occlusions)
      : json_(*json), masks_(*masks), truth_(truth), occlusions_(occlusions) {}

  // Reads an annotation; polygons are left to do.
  void read(Truth* row) {
    read_object(row);
    row->masks = masks_.keep();
  }

  // Reads a prediction, whose masks the reader of masks then holds.
  void read(Prediction* row) {
    Truth found{};
    read_object(&found);
    if (std::isnan(score_)) throw Refused();
    static_cast<Track&>(*row) = std::move(found);
    row->score = score_;
  }

 private:
  void read_object(Truth* row) {
    masks_.clear();
    score_ = row->occlusion = kNone;
    bool has_id = !truth_, has_video = false, has_category = false, has_masks = false;
    json_.object([&](std::string_view key) {
      if (key == "segmentations") {
        masks_.clear();
        masks_.read(&json_);
        has_masks = true;
      } else if (key == "video_id") {
        row->video_id = json_.whole();
        has_video = true;
      } else if (key == "category_id") {
        row->category_id = json_.whole();
        has_category = true;
      } else if (key == "id" && truth_) {
        row->id = json_.whole();
        has_id = true;
      } else {
        read_rest(key, row);
      }
    });
    if (!has_id || !has_video || !has_category || !has_masks) throw Refused();
    row->length = static_cast<int64_t>(masks_.frames().size());
    row->sizes = sizes_of(masks_.frames());
    row->converted = masks_.converted();
  }

  // Reads what need not be there.
  void read_rest(std::string_view key, Truth* row) {
    if (key == "score") {
      score_ = json_.accept_word("null") ? kNone : json_.real();
    } else if (key == "areas") {
      row->has_areas = !json_.accept_word("null");
      if (row->has_areas) row->area = read_areas(&json_, &areas_);
    } else if (key == "iscrowd" && truth_) {
      row->crowd = read_truth_value(&json_);
    } else if (key == "occlusion" && occlusions_) {
      row->occlusion = read_occlusion(&json_);
    } else if (key == "pmvis") {
      read_block(&json_);
    } else {
      json_.skip();
    }
  }

  Json& json_;
  MaskReader& masks_;
  std::vector<double> areas_;
  double score_ = kNone;
  bool truth_, occlusions_;
};

Video read_video(Json* json) {
  Video video{0, 0, 0, -1};
  bool has_id = false, has_length = false;
  int64_t files = 0;
  json->object([&](std::string_view key) {
    if (key == "id") {
      video.id = json->whole();
      has_id = true;
    } else if (key == "height") {
      video.height = json->whole();
    } else if (key == "width") {
      video.width = json->whole();
    } else if (key == "length") {
      video.length = json->whole();
      has_length = true;
    } else if (key == "file_names") {
      files = 0;
      if (json->accept_word("null")) return;
      json->array([&] {
        if (json->peek() != '"') throw Refused();
        json->skip();
        ++files;
      });
    } else {
      json->skip();
    }
  });
  if (!has_length) video.length = files;
  if (!has_id || video.height <= 0 || video.width <= 0 || video.length < 0) throw Refused();
  return video;
}

int64_t read_category(Json* json) {
  int64_t id = 0;
  bool has_id = false;
  json->object([&](std::string_view key) {
    if (key == "id") {
      id = json->whole();
      has_id = true;
    } else {
      json->skip();
    }
  });
  if (!has_id) throw Refused();
  return id;
}

// Makes sure that nothing follows.
void expect_end(Json* json) {
  json->peek();
  if (json->at() != json->end()) throw Refused();
}

bool has_twice(std::vector<int64_t> ids) {
  std::sort(ids.begin(), ids.end());
  return std::adjacent_find(ids.begin(), ids.end()) != ids.end();
}

}  // namespace

Dataset read_truth(std::string_view text, bool occlusions, int threads) {
  Dataset found;
  Json json(text.data(), text.data() + text.size());
  bool has_videos = false, has_categories = false, has_annotations = false;
  json.object([&](std::string_view key) {
    if (key == "videos" && !has_videos) {
      has_videos = true;
      json.array([&] { found.videos.push_back(read_video(&json)); });
    } else if (key == "categories" && !has_categories) {
      has_categories = true;
      const char* const begin = (json.peek(), json.at());
      json.array([&] { found.categories.push_back(read_category(&json)); });
      found.vocabulary = {begin, static_cast<size_t>(json.at() - begin)};
    } else if (key == "annotations" && !has_annotations) {
      has_annotations = true;
      std::vector<MaskReader> masks(static_cast<size_t>(threads));
      found.annotations = read_list<Truth>(&json, threads, [&](Json* at, int thread) {
        EntryReader entries(at, &masks[static_cast<size_t>(thread)], true, occlusions);
        return [entries](Truth* row) mutable { entries.read(row); };
      });
    } else if (key == "videos" || key == "categories" || key == "annotations") {
      throw Refused();
    } else {
      json.skip();
    }
  });
  expect_end(&json);
  if (!has_videos || !has_categories || !has_annotations) throw Refused();
  if (has_twice(found.categories)) throw Refused();
  return found;
}

std::vector<Prediction> read_results(std::string_view text, int threads, const Measure& measure) {
  Json json(text.data(), text.data() + text.size());
  std::vector<MaskReader> readers(static_cast<size_t>(threads));
  auto found = read_list<Prediction>(&json, threads, [&](Json* at, int thread) {
    MaskReader* const masks = &readers[static_cast<size_t>(thread)];
    EntryReader entries(at, masks, false, false);
    return [&measure, masks, entries](Prediction* row) mutable {
      entries.read(row);
      measure(masks, row);
    };
  });
  expect_end(&json);
  int64_t place = 0;
  for (Prediction& row : found) row.id = ++place;
  return found;
}

std::vector<Size> sizes_of(const std::vector<Frame>& frames) {
  std::vector<Size> found;
  for (const Frame& frame : frames) {
    if (frame.present() && (found.empty() || found.back() != frame.size)) {
      found.push_back(frame.size);
    }
  }
  return found;
}

double pairwise_sum(const double* values, int64_t number) {
  constexpr int64_t kBlock = 128;
  if (number < 8) {
    double sum = 0;
    for (int64_t k = 0; k < number; ++k) sum += values[k];
    return sum;
  }
  if (number <= kBlock) {
    double sums[8];
    for (int k = 0; k < 8; ++k) sums[k] = values[k];
    int64_t at = 8;
    for (; at + 8 <= number; at += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += values[at + k];
    }
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                 ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; at < number; ++at) sum += values[at];
    return sum;
  }
  const int64_t half = number / 2 / 8 * 8;
  return pairwise_sum(values, half) + pairwise_sum(values + half, number - half);
}

}  // namespace pmvis

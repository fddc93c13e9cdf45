// The evaluator's plain C ABI for pmvis_core/evaluation/compiled.py, without torch or Python.
//
// A problem is read from the bytes of two files, or taken from columns; its sizes are asked for,
// the caller makes room, and matching fills it. Functions return kDone, kRefused (the input is
// malformed, or nothing this code judges: the readers in Python say which) or kNoMemory.
#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>

#include "evaluation/curves.h"
#include "evaluation/match.h"
#include "evaluation/overlap.h"
#include "evaluation/tracks.h"
#include "formats/json.h"
#include "formats/parallel.h"
#include "rle/text.h"

#define PMVIS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Goes up with every change of a structure, of a function or of what one does;
// pmvis_core/evaluation/compiled.py asks for the same.
constexpr int64_t kVersion = 1;

constexpr int64_t kDone = 0;
constexpr int64_t kRefused = 1;
constexpr int64_t kNoMemory = 2;

template <typename Work>
int64_t guarded(const Work& work) {
  try {
    work();
    return kDone;
  } catch (const pmvis::Refused&) {
    return kRefused;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {
    return kNoMemory;
  }
}

}  // namespace

// Pairs and tracks of a problem that is in memory: P pairs by category id, then video id; G ground
// truths, then N predictions by falling score, both in the order of their pairs; F masks.
struct PmvisTracks {
  int64_t pairs;
  const int64_t* video_ids;      // (P,)
  const int64_t* category_ids;   // (P,)
  const int64_t* shapes;         // (P, 3) height, width, length of the video
  const int64_t* truth_starts;   // (P + 1,)
  const int64_t* starts;         // (P + 1,)
  const int64_t* ids;            // (G + N,)
  const double* scores;          // (N,)
  const double* areas;           // (G,) mean stated area, NaN if none is stated
  const double* occlusions;      // (G,) NaN if not stated
  const uint8_t* crowd;          // (G,)
  const int64_t* mask_starts;    // (G + N + 1,)
  const int64_t* sizes;          // (F, 2) height and width, -1 where there is no mask
  const int64_t* text_starts;    // (F + 1,)
  const char* text;
};

struct PmvisSizes {
  int64_t pairs, predictions, truths, ious, doubts, videos;
  const char* vocabulary;  // the list of categories in the ground truth's bytes
  int64_t vocabulary_length;
};

namespace {

using pmvis::Problem;
using pmvis::Protocol;

// Decodes the masks of track k.
void decode(const PmvisTracks& in, int64_t k, pmvis::MaskReader* masks) {
  masks->clear();
  for (int64_t f = in.mask_starts[k]; f < in.mask_starts[k + 1]; ++f) {
    const int64_t height = in.sizes[2 * f], width = in.sizes[2 * f + 1];
    if (height < 0 || width < 0) {
      masks->add_absent();
    } else {
      masks->add_text(in.text + in.text_starts[f], in.text_starts[f + 1] - in.text_starts[f],
                      pmvis::checked_size(height, width));
    }
  }
}

// Fills in what a track is apart from its masks.
void describe(const PmvisTracks& in, int64_t k, const pmvis::MaskReader& masks,
              pmvis::Track* row) {
  row->id = in.ids[k];
  row->length = in.mask_starts[k + 1] - in.mask_starts[k];
  row->sizes = pmvis::sizes_of(masks.frames());
}

void take_pair(const PmvisTracks& in, int64_t p, const Protocol& protocol,
               pmvis::MaskReader* masks, Problem* problem) {
  const int64_t truths = in.truth_starts[in.pairs];
  std::vector<pmvis::Truth>& annotations = problem->dataset.annotations;
  std::vector<const pmvis::Truth*> ours;
  for (int64_t g = in.truth_starts[p]; g < in.truth_starts[p + 1]; ++g) {
    pmvis::Truth& row = annotations[static_cast<size_t>(g)];
    decode(in, g, masks);
    describe(in, g, *masks, &row);
    row.masks = masks->keep();
    row.has_areas = !std::isnan(in.areas[g]);
    row.area = in.areas[g];
    row.occlusion = in.occlusions[g];
    row.crowd = in.crowd[g] != 0;
    ours.push_back(&row);
  }
  for (int64_t d = in.starts[p]; d < in.starts[p + 1]; ++d) {
    pmvis::Prediction& row = problem->results[static_cast<size_t>(d)];
    decode(in, truths + d, masks);
    describe(in, truths + d, *masks, &row);
    row.score = in.scores[d];
    pmvis::compare(*masks, ours, protocol.exact, &row);
  }
}

void take(const PmvisTracks& in, const Protocol& protocol, int threads, Problem* problem) {
  problem->dataset.annotations.resize(static_cast<size_t>(in.truth_starts[in.pairs]));
  problem->results.resize(static_cast<size_t>(in.starts[in.pairs]));
  std::vector<pmvis::MaskReader> readers(static_cast<size_t>(threads));
  pmvis::parallel(threads, in.pairs, [&](int64_t p, int thread) {
    take_pair(in, p, protocol, &readers[static_cast<size_t>(thread)], problem);
  });
  for (const pmvis::Truth& row : problem->dataset.annotations) problem->truths.push_back(&row);
  for (const pmvis::Prediction& row : problem->results) problem->predictions.push_back(&row);
  for (int64_t p = 0; p < in.pairs; ++p) {
    const int64_t* const shape = in.shapes + 3 * p;
    problem->pairs.push_back({{in.video_ids[p], shape[0], shape[1], shape[2]}, in.category_ids[p],
                              in.truth_starts[p], in.truth_starts[p + 1], in.starts[p],
                              in.starts[p + 1], 0, 0});
  }
  pmvis::lay_out(problem);
}

}  // namespace

PMVIS_EXPORT int64_t pmvis_eval_version() { return kVersion; }

// Reads the bytes of ground truth and results, which must stay while the problem lives, and
// compares all tracks.
PMVIS_EXPORT int64_t pmvis_eval_read(const char* truth, int64_t truth_length, const char* results,
                                     int64_t results_length, const Protocol* protocol,
                                     int threads, Problem** out) {
  return guarded([&] {
    auto problem = std::make_unique<Problem>();
    pmvis::read_problem({truth, static_cast<size_t>(truth_length)},
                        {results, static_cast<size_t>(results_length)}, *protocol, threads,
                        problem.get());
    *out = problem.release();
  });
}

// The same with tracks from columns.
PMVIS_EXPORT int64_t pmvis_eval_take(const PmvisTracks* tracks, const Protocol* protocol,
                                     int threads, Problem** out) {
  return guarded([&] {
    auto problem = std::make_unique<Problem>();
    take(*tracks, *protocol, threads, problem.get());
    *out = problem.release();
  });
}

PMVIS_EXPORT void pmvis_eval_sizes(const Problem* problem, PmvisSizes* out) {
  const std::string_view vocabulary = problem->dataset.vocabulary;
  *out = {static_cast<int64_t>(problem->pairs.size()),
          static_cast<int64_t>(problem->predictions.size()),
          static_cast<int64_t>(problem->truths.size()),
          problem->pairs.empty() ? 0 : problem->pairs.back().iou_end,
          static_cast<int64_t>(problem->doubts.size()),
          static_cast<int64_t>(problem->dataset.videos.size()),
          vocabulary.data(),
          static_cast<int64_t>(vocabulary.size())};
}

// Matches; `columns` are as large as the sizes say. May add doubts.
PMVIS_EXPORT int64_t pmvis_eval_match(const pmvis::Protocol* protocol, int threads,
                                      Problem* problem, const pmvis::Columns* columns) {
  return guarded([&] { pmvis::match(*protocol, threads, problem, *columns); });
}

// Writes (doubts, 6) numbers: kind and details.
PMVIS_EXPORT void pmvis_eval_doubts(const Problem* problem, int64_t* out) {
  for (const pmvis::Doubt& doubt : problem->doubts) {
    *out++ = doubt.kind;
    for (const int64_t number : doubt.numbers) *out++ = number;
  }
}

// Writes the (videos,) ids that the ground truth lists, in its order.
PMVIS_EXPORT void pmvis_eval_videos(const Problem* problem, int64_t* out) {
  for (const pmvis::Video& video : problem->dataset.videos) *out++ = video.id;
}

PMVIS_EXPORT void pmvis_eval_free(Problem* problem) { delete problem; }

// Accumulates curves of the columns of `Matches`.
PMVIS_EXPORT int64_t pmvis_eval_curves(const pmvis::Matched* matched, const pmvis::Axes* axes,
                                       int threads, const pmvis::Curves* curves) {
  return guarded([&] { pmvis::accumulate(*matched, *axes, threads, *curves); });
}

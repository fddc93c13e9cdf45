// Fuzzes the evaluator: JSON reader, matching, curves, through the C ABI of csrc/evaluation.
// An input is ground truth and results with a zero byte between. One and three threads must give
// the same bytes, and no IoU may leave [0, 1].
#include <cstring>
#include <memory>
#include <vector>

#include "evaluation/curves.h"
#include "evaluation/match.h"
#include "fuzz.h"

struct PmvisSizes {
  int64_t pairs, predictions, truths, ious, doubts, videos;
  const char* vocabulary;
  int64_t vocabulary_length;
};

extern "C" {
int64_t pmvis_eval_read(const char* truth, int64_t truth_length, const char* results,
                        int64_t results_length, const pmvis::Protocol* protocol, int threads,
                        pmvis::Problem** out);
void pmvis_eval_sizes(const pmvis::Problem* problem, PmvisSizes* out);
int64_t pmvis_eval_match(const pmvis::Protocol* protocol, int threads, pmvis::Problem* problem,
                         const pmvis::Columns* columns);
void pmvis_eval_doubts(const pmvis::Problem* problem, int64_t* out);
void pmvis_eval_free(pmvis::Problem* problem);
int64_t pmvis_eval_curves(const pmvis::Matched* matched, const pmvis::Axes* axes, int threads,
                          const pmvis::Curves* curves);
}

namespace {

constexpr double kThresholds[] = {0.5, 0.75, 0.9};
constexpr pmvis::Range kAreas[] = {{0, 1e10}, {0, 300}};
constexpr pmvis::Range kOcclusions[] = {{0, 1}, {0.25, 0.5}};
constexpr double kPoints[] = {0, 0.25, 0.5, 1};
constexpr int64_t kLimits[] = {1, 100};

template <typename T>
using List = std::vector<T>;

size_t times(int64_t a, int64_t b = 1, int64_t c = 1) { return static_cast<size_t>(a * b * c); }

// All that one evaluation writes.
struct Results {
  int64_t code = 0;
  List<int64_t> integers[8];
  List<uint8_t> bytes[3];
  List<double> numbers[5];

  bool operator==(const Results& other) const {
    if (code != other.code) return false;
    for (int k = 0; k < 8; ++k) {
      if (integers[k] != other.integers[k]) return false;
    }
    for (int k = 0; k < 3; ++k) {
      if (bytes[k] != other.bytes[k]) return false;
    }
    for (int k = 0; k < 5; ++k) {
      const List<double>&ours = numbers[k], &theirs = other.numbers[k];
      if (ours.size() != theirs.size()) return false;
      // Bytes, not values: NaN equals itself then.
      const size_t size = 8 * ours.size();
      if (size > 0 && std::memcmp(ours.data(), theirs.data(), size) != 0) return false;
    }
    return true;
  }
};

void curves_of(const Results& from, const PmvisSizes& sizes, int64_t groups, int threads,
               Results* out) {
  List<int64_t> begins;
  const List<int64_t>& categories = from.integers[1];
  for (size_t p = 0; p < categories.size(); ++p) {
    if (p == 0 || categories[p] != categories[p - 1]) begins.push_back(static_cast<int64_t>(p));
  }
  const auto number = static_cast<int64_t>(begins.size());
  begins.push_back(sizes.pairs);
  const int64_t cells = number * groups * 2;
  out->numbers[2].assign(times(3, 4, cells), 0);
  out->numbers[3].assign(times(3, cells), 0);
  out->numbers[4].assign(times(3, 4, cells), 0);
  const pmvis::Matched matched{number, groups, 3, begins.data(), from.integers[2].data(),
                               from.numbers[0].data(), from.integers[4].data(),
                               from.bytes[1].data(), from.integers[5].data(),
                               from.bytes[2].data(), nullptr};
  const pmvis::Axes axes{kPoints, 4, kLimits, 2};
  const pmvis::Curves curves{out->numbers[2].data(), out->numbers[3].data(),
                             out->numbers[4].data()};
  EXPECT(pmvis_eval_curves(&matched, &axes, threads, &curves) == 0);
}

Results evaluate(const std::string& truth, const std::string& results, bool occlusions,
                 int threads) {
  Results r;
  pmvis::Problem* problem = nullptr;
  const bool second_shard = truth.size() % 3 == 0;
  const pmvis::Protocol protocol{
      kThresholds, 3, kAreas, 2, kOcclusions, occlusions ? 2 : 1, 3, second_shard ? 2 : 1,
      second_shard ? 2 : 1, occlusions, truth.size() % 2 == 0};
  r.code = pmvis_eval_read(truth.data(), static_cast<int64_t>(truth.size()), results.data(),
                           static_cast<int64_t>(results.size()), &protocol, threads, &problem);
  if (r.code != 0) return r;
  const std::unique_ptr<pmvis::Problem, decltype(&pmvis_eval_free)> owned(problem, pmvis_eval_free);
  PmvisSizes sizes;
  pmvis_eval_sizes(problem, &sizes);
  const int64_t groups = occlusions ? 4 : 2;
  const int64_t pairs = sizes.pairs, predictions = sizes.predictions, truths = sizes.truths;
  for (const int k : {0, 1}) r.integers[k].assign(times(pairs), 0);
  for (const int k : {2, 5, 7}) r.integers[k].assign(times(pairs + 1), 0);
  r.integers[3].assign(times(predictions), 0);
  r.integers[4].assign(times(predictions, groups, 3), 0);
  r.integers[6].assign(times(truths), 0);
  r.bytes[0].assign(times(pairs), 0);
  r.bytes[1].assign(times(predictions, groups, 3), 0);
  r.bytes[2].assign(times(truths, groups), 0);
  r.numbers[0].assign(times(predictions), 0);
  r.numbers[1].assign(times(sizes.ious), 0);
  const pmvis::Columns columns{
      r.integers[0].data(), r.integers[1].data(), r.bytes[0].data(),    r.integers[2].data(),
      r.numbers[0].data(),  r.integers[3].data(), r.integers[4].data(), r.bytes[1].data(),
      r.integers[5].data(), r.integers[6].data(), r.bytes[2].data(),    r.integers[7].data(),
      r.numbers[1].data()};
  r.code = pmvis_eval_match(&protocol, threads, problem, &columns);
  if (r.code != 0) return {r.code, {}, {}, {}};
  for (const double iou : r.numbers[1]) EXPECT(iou >= 0 && iou <= 1);
  pmvis_eval_sizes(problem, &sizes);
  List<int64_t> doubts(times(sizes.doubts, 6));
  pmvis_eval_doubts(problem, doubts.data());
  curves_of(r, sizes, groups, threads, &r);
  return r;
}

// --- inputs ---

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) out += c == '\\' ? "\\\\" : std::string(1, c);
  return out + "\"";
}

std::string number(uint64_t value) { return std::to_string(value); }

// The mask of one frame: text, runs, polygons or nothing.
std::string mask(fuzz::Random* random, uint64_t height, uint64_t width, bool truth) {
  const uint64_t pixels = height * width;
  if (random->one_in(8)) return "null";
  if (truth && random->one_in(8)) {
    std::string xy;
    for (int k = 0; k < 8; ++k) xy += (k > 0 ? ", " : "") + number(random->below(80)) + ".5";
    return "[[" + xy + "]]";
  }
  std::string text, runs;
  int64_t last = 0, before_last = 0;
  const bool plain = random->one_in(6);
  const uint64_t step = height / 2;
  for (uint64_t at = 0, k = 0; at < pixels; ++k) {
    uint64_t run = step - 2 + random->below(5);
    if (k == 0) run = random->below(pixels);
    if (run > pixels - at || random->one_in(60)) run = pixels - at;
    const auto signed_run = static_cast<int64_t>(run);
    fuzz::put_number(k > 2 ? signed_run - before_last : signed_run, &text);
    runs += (k > 0 ? "," : "") + number(run);
    before_last = last;
    last = signed_run;
    at += run;
  }
  const std::string counts = plain ? "[" + runs + "]" : quoted(text);
  return "{\"size\": [" + number(height) + ", " + number(width) + "], \"counts\": " + counts + "}";
}

std::string track(fuzz::Random* random, uint64_t height, uint64_t width, uint64_t id, bool truth) {
  std::string out = "{\"video_id\": " + number(1 + random->below(2)) +
                    ", \"category_id\": " + number(1 + random->below(2));
  if (truth) {
    out += ", \"id\": " + number(id) + ", \"iscrowd\": " + number(random->one_in(5) ? 1 : 0) +
           ", \"areas\": [10, 200.5, null], \"occlusion\": [\"no_occlusion\", " +
           "\"severe_occlusion\", null]";
  } else {
    out += ", \"score\": 0." + number(random->below(20));
  }
  out += ", \"segmentations\": [";
  for (int t = 0; t < 3; ++t) out += (t > 0 ? ", " : "") + mask(random, height, width, truth);
  return out + "]}";
}

}  // namespace

const char* const fuzz::kLetters = "{}[],:\"\\ 0123456789.eE+-nulltrue\n";

std::string fuzz::fresh_input(Random* random) {
  const uint64_t height = 6 + random->below(60), width = 1 + random->below(60);
  std::string videos, truths, results;
  for (uint64_t id = 1; id < 3; ++id) {
    videos += (id > 1 ? ", " : "") + std::string("{\"id\": ") + number(id) + ", \"height\": " +
              number(height) + ", \"width\": " + number(width) +
              ", \"length\": 3, \"file_names\": [\"a\", \"b\", \"c\"]}";
  }
  for (uint64_t k = 0, most = random->below(4); k < most; ++k) {
    truths += (k > 0 ? ", " : "") + track(random, height, width, k, true);
  }
  for (uint64_t k = 0, most = random->below(6); k < most; ++k) {
    results += (k > 0 ? ", " : "") + track(random, height, width, k, false);
  }
  return "{\"videos\": [" + videos +
         "], \"categories\": [{\"id\": 1, \"name\": \"a\"}, {\"id\": 2, \"name\": \"b\"}], "
         "\"annotations\": [" + truths + "]}" + std::string(1, '\0') + "[" + results + "]";
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input(reinterpret_cast<const char*>(data), size);
  const size_t middle = input.find('\0');
  if (middle == std::string::npos) return 0;
  // Copies of exact size, so that a read past the end is seen.
  std::string truth = input.substr(0, middle), results = input.substr(middle + 1);
  truth.shrink_to_fit();
  results.shrink_to_fit();
  for (const bool occlusions : {false, true}) {
    const Results one = evaluate(truth, results, occlusions, 1);
    if (size % 8 == 0) EXPECT(one == evaluate(truth, results, occlusions, 3));
  }
  return 0;
}

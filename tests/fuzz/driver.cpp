// Runs a fuzz target without libFuzzer: `target [-runs=N] [-max_total_time=SECONDS] [-seed=S]`, or
// `target FILE...` to repeat single inputs. The input that is being run is kept in
// `crash-<target>`, which is removed at the end; so after an abort it is there.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "fuzz.h"

namespace {

constexpr size_t kMost = 1 << 16;  // bytes of an input
constexpr size_t kPool = 64;       // inputs that mutations start from

struct Options {
  uint64_t runs = 1000000;
  uint64_t seconds = 60;
  uint64_t seed = 1;
  std::vector<std::string> files;
};

Options options_of(int count, char** arguments) {
  Options options;
  for (int k = 1; k < count; ++k) {
    const std::string argument = arguments[k];
    const auto is = [&](const char* name, uint64_t* value) {
      if (argument.rfind(name, 0) != 0) return false;
      *value = std::strtoull(argument.c_str() + std::strlen(name), nullptr, 10);
      return true;
    };
    if (is("-runs=", &options.runs) || is("-max_total_time=", &options.seconds) ||
        is("-seed=", &options.seed)) {
      continue;
    }
    options.files.push_back(argument);
  }
  return options;
}

void run(const std::string& input) {
  // A copy of exact size on the heap: the sanitizer sees a read of one byte too many.
  const std::vector<uint8_t> copy(input.begin(), input.end());
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

// Keeps the input that is being run, so that an abort leaves it on disk.
std::string* g_input = nullptr;
std::string g_name;

void keep_input() {
  if (g_input == nullptr) return;
  std::ofstream(g_name, std::ios::binary) << *g_input;
  std::fprintf(stderr, "the input is in %s\n", g_name.c_str());
}

}  // namespace

extern "C" void __sanitizer_set_death_callback(void (*callback)());

int main(int count, char** arguments) {
  const Options options = options_of(count, arguments);
  for (const std::string& name : options.files) {
    std::ifstream file(name, std::ios::binary);
    run(std::string(std::istreambuf_iterator<char>(file), {}));
  }
  if (!options.files.empty()) return 0;

  const std::string target = arguments[0];
  g_name = "crash-" + target.substr(target.rfind('/') + 1);
  __sanitizer_set_death_callback(keep_input);
  fuzz::Random random(options.seed);
  std::vector<std::string> pool(kPool);
  std::vector<uint8_t> buffer(kMost);
  std::string input;
  g_input = &input;
  const auto start = std::chrono::steady_clock::now();
  uint64_t done = 0;
  for (; done < options.runs; ++done) {
    if (done % 256 == 0 && std::chrono::steady_clock::now() - start >
                               std::chrono::seconds(options.seconds)) {
      break;
    }
    std::string& base = pool[random.below(kPool)];
    std::copy(base.begin(), base.end(), buffer.begin());
    const size_t size = LLVMFuzzerCustomMutator(buffer.data(), base.size(), kMost,
                                                static_cast<unsigned>(random.next() >> 32));
    input.assign(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(size));
    run(input);
    base = input;
  }
  std::printf("%s: %llu inputs, seed %llu, nothing found\n", target.c_str(),
              static_cast<unsigned long long>(done), static_cast<unsigned long long>(options.seed));
  return 0;
}

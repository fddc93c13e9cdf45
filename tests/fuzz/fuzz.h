// What the fuzz targets share: a random source, mutations, and the entries of libFuzzer, which
// driver.cpp calls where there is no clang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

// Ends the process as a finding. Sanitizers and both drivers take an abort for one.
#define EXPECT(condition)                                                             \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

namespace fuzz {

// xorshift64*: the same inputs for the same seed on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u | 1) {}

  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }

  // A number below `limit`, which is at least 1.
  uint64_t below(uint64_t limit) { return (next() >> 16) % limit; }

  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// Runs as text, written without the code under test; with more characters than needed if `least`
// asks for them.
inline void put_number(int64_t value, std::string* text, int least = 1) {
  bool more = true;
  for (int length = 1; more; ++length) {
    const int64_t low = value & 31;
    value >>= 5;
    more = !((value == 0 && (low & 16) == 0) || (value == -1 && (low & 16) != 0)) ||
           length < least;
    *text += static_cast<char>(48 + low + (more ? 32 : 0));
  }
}

// A run of about the lengths that masks have, with the rare ones often.
inline int64_t random_run(Random* random, int64_t usual) {
  switch (random->below(40)) {
    case 0: return 0;
    case 1: return static_cast<int64_t>(random->below(2));
    case 2: return static_cast<int64_t>(random->below(40000));
    case 3: return static_cast<int64_t>(8190 + random->below(5));
    case 4: return random->one_in(8) ? static_cast<int64_t>(random->below(1u << 31)) : 7;
    default: break;
  }
  const int64_t spread = random->one_in(12) ? 900 : 20;
  return usual + static_cast<int64_t>(random->below(static_cast<uint64_t>(spread)));
}

// A valid text, mostly; its pixels are written to *pixels.
inline std::string random_counts(Random* random, uint64_t most_runs, int64_t* pixels) {
  const uint64_t number = 1 + random->below(most_runs);
  const int64_t usual = static_cast<int64_t>(random->below(random->one_in(4) ? 2000 : 60));
  const bool tame = random->below(3) != 0;  // few exceptions: long stretches for the vector code
  std::string text;
  int64_t last = 0, before_last = 0, total = 0;
  for (uint64_t k = 0; k < number; ++k) {
    const bool odd_one = !tame || random->one_in(60);
    const int64_t run = odd_one ? random_run(random, usual)
                                : usual + 1 + static_cast<int64_t>(random->below(40));
    if (total + run > 0xffffffff) break;
    const int least = random->one_in(200) ? static_cast<int>(1 + random->below(8)) : 1;
    put_number(k > 2 ? run - before_last : run, &text, least);
    before_last = last;
    last = run;
    total += run;
  }
  if (number > 3 && random->one_in(30)) {
    // Malformed, although the sum is right: the last run is negative.
    const int64_t run = -1 - static_cast<int64_t>(random->below(static_cast<uint64_t>(total) + 1));
    put_number(run - before_last, &text);
    total += run;
  }
  *pixels = total;
  return text;
}

// One change: flip, replace, insert, repeat, cut, truncate, or copy a part elsewhere. `letters` are
// what inserted bytes are drawn from, half the time.
inline void mutate_once(Random* random, const std::string& letters, std::string* data) {
  const auto byte = [&] {
    return random->one_in(2) ? static_cast<char>(random->below(256))
                             : letters[random->below(letters.size())];
  };
  const size_t size = data->size(), at = random->below(size + 1);
  const size_t length = size > at ? 1 + random->below(size - at < 40 ? size - at : 40) : 0;
  switch (random->below(7)) {
    case 0:
      if (at < size) (*data)[at] = static_cast<char>((*data)[at] ^ (1 << random->below(8)));
      return;
    case 1:
      if (at < size) (*data)[at] = byte();
      return;
    case 2: data->insert(at, 1 + random->below(4), byte()); return;
    case 3: data->insert(random->below(size + 1), data->substr(at, length)); return;
    case 4: data->erase(at, length); return;
    case 5: data->resize(at); return;
    default:
      if (length > 0) data->replace(random->below(size), length, data->substr(at, length));
      return;
  }
}

// What each target defines: a fresh input that is valid as a rule, and the letters of its grammar.
std::string fresh_input(Random* random);
extern const char* const kLetters;

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// libFuzzer's entry, and the driver's: mutates in place and returns the new size.
extern "C" inline __attribute__((used)) size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size,
                                                                       size_t most,
                                                                       unsigned seed) {
  fuzz::Random random(seed + 1);
  std::string input(reinterpret_cast<const char*>(data), size);
  if (size == 0 || random.one_in(3)) input = fuzz::fresh_input(&random);
  const uint64_t changes = random.below(4);
  for (uint64_t k = 0; k < changes; ++k) fuzz::mutate_once(&random, fuzz::kLetters, &input);
  if (input.size() > most) input.resize(most);
  for (size_t k = 0; k < input.size(); ++k) data[k] = static_cast<uint8_t>(input[k]);
  return input.size();
}

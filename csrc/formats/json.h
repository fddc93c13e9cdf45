// A pull parser of JSON: values are read in place, one after the other; nothing is built of them.
//
// Strict: what Python's json module refuses throws Refused. So does the little that it takes and
// no data set holds: keys with escapes, deep nesting, numbers beyond a double. Whoever catches it
// lets the readers in Python look at the text; they accept it or say what is wrong.
// Nothing outside [begin, end) is read.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pmvis {

struct Refused {};

// A string as it stands between its quotes.
struct JsonText {
  const char* data;
  int64_t length;
  bool escaped;  // whether it may hold a backslash

  std::string_view view() const { return {data, static_cast<size_t>(length)}; }
};

class Json {
 public:
  Json(const char* at, const char* end) : at_(at), end_(end) {}

  const char* at() const { return at_; }
  const char* end() const { return end_; }
  void jump(const char* at) { at_ = at; }

  // Returns the next character that is no space, 0 at the end; stays in front of it.
  char peek() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
    return at_ == end_ ? '\0' : *at_;
  }

  bool accept(char wanted) {
    if (peek() != wanted || at_ == end_) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!accept(wanted)) throw Refused();
  }

  // Calls visit() in front of each element, which it must read.
  template <typename Visit>
  void array(const Visit& visit) {
    expect('[');
    if (accept(']')) return;
    do visit();
    while (accept(','));
    expect(']');
  }

  // Calls visit(key) in front of each value, which it must read.
  template <typename Visit>
  void object(const Visit& visit) {
    expect('{');
    if (accept('}')) return;
    do {
      const JsonText key = string();
      if (key.escaped && key.view().find('\\') != std::string_view::npos) throw Refused();
      expect(':');
      visit(key.view());
    } while (accept(','));
    expect('}');
  }

  // Reads `null`, `true` or `false` if it stands here.
  bool accept_word(std::string_view word) {
    peek();
    if (static_cast<size_t>(end_ - at_) < word.size()) return false;
    if (std::memcmp(at_, word.data(), word.size()) != 0) return false;
    at_ += word.size();
    return true;
  }

  JsonText string() {
    expect('"');
    return rest_of_string();
  }

  // Reads a string whose characters its reader will judge: copies it without its escapes, and
  // returns its length. What is not ASCII becomes 0xff where it is escaped. `out` only grows.
  int64_t copy_string(std::vector<char>* out);

  // Reads a whole number that is written as one.
  int64_t integer() {
    const Number token = number();
    if (!token.plain) throw Refused();
    return whole_of(token);
  }

  // Reads a whole number; 3.0 and 3e0 are whole, too.
  int64_t whole() {
    const Number token = number();
    if (token.plain) return whole_of(token);
    const double value = real_of(token);
    constexpr double kExact = 9007199254740992.0;  // 2^53
    if (!(value > -kExact && value < kExact)) throw Refused();
    const auto whole = static_cast<int64_t>(value);
    if (static_cast<double>(whole) != value) throw Refused();
    return whole;
  }

  // Reads a number as the nearest double.
  double real() { return real_of(number()); }

  // Reads past any value.
  void skip() { skip(0); }

  // Reads past a string, or past a list up to the first `]`, whose content its reader will judge.
  void skip_counts() {
    if (peek() == '"') {
      string();
      return;
    }
    expect('[');
    const auto* const close = static_cast<const char*>(std::memchr(at_, ']', end_ - at_));
    if (close == nullptr) throw Refused();
    at_ = close + 1;
  }

 private:
  struct Number {
    const char* begin;
    const char* end;
    bool plain;  // without point and exponent
  };

  static constexpr int kMostNested = 200;
  static constexpr int64_t kMostDigits = 4000;  // Python refuses longer whole numbers

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  void digits() {
    if (at_ == end_ || !is_digit(*at_)) throw Refused();
    while (at_ != end_ && is_digit(*at_)) ++at_;
  }

  Number number() {
    peek();
    Number token{at_, at_, true};
    if (at_ != end_ && *at_ == '-') ++at_;
    if (at_ != end_ && *at_ == '0') {
      ++at_;
    } else {
      digits();
    }
    if (at_ != end_ && *at_ == '.') {
      token.plain = false;
      ++at_;
      digits();
    }
    if (at_ != end_ && (*at_ == 'e' || *at_ == 'E')) {
      token.plain = false;
      ++at_;
      if (at_ != end_ && (*at_ == '+' || *at_ == '-')) ++at_;
      digits();
    }
    token.end = at_;
    if (token.plain && token.end - token.begin > kMostDigits) throw Refused();
    return token;
  }

  static int64_t whole_of(const Number& token) {
    int64_t value = 0;
    const auto read = std::from_chars(token.begin, token.end, value);
    if (read.ec != std::errc() || read.ptr != token.end) throw Refused();
    return value;
  }

  static double real_of(const Number& token) {
    double value = 0;
    const auto read = std::from_chars(token.begin, token.end, value);
    if (read.ec != std::errc() || read.ptr != token.end) throw Refused();
    return token.plain && value == 0 ? 0.0 : value;  // -0 is a whole number, and has no sign
  }

  void skip(int depth) {
    if (depth > kMostNested) throw Refused();
    switch (peek()) {
      case '"':
        check(string());
        break;
      case '[':
        array([&] { skip(depth + 1); });
        break;
      case '{':
        expect('{');
        if (accept('}')) break;
        do {
          check(string());
          expect(':');
          skip(depth + 1);
        } while (accept(','));
        expect('}');
        break;
      case 'n':
        if (!accept_word("null")) throw Refused();
        break;
      case 't':
        if (!accept_word("true")) throw Refused();
        break;
      case 'f':
        if (!accept_word("false")) throw Refused();
        break;
      default:
        number();
    }
  }

  JsonText rest_of_string();

  // Throws if a string has a malformed escape.
  static void check(const JsonText& text);

  const char* at_;
  const char* end_;
};

// Reads one escape, `at` behind the backslash. Returns its UTF-16 unit, -1 if it is malformed.
inline int read_escape(const char** at, const char* end) {
  if (*at == end) return -1;
  const char kind = *(*at)++;
  switch (kind) {
    case '"':
    case '\\':
    case '/':
      return kind;
    case 'b':
      return '\b';
    case 'f':
      return '\f';
    case 'n':
      return '\n';
    case 'r':
      return '\r';
    case 't':
      return '\t';
    case 'u':
      break;
    default:
      return -1;
  }
  if (end - *at < 4) return -1;
  unsigned unit = 0;
  const auto read = std::from_chars(*at, *at + 4, unit, 16);
  if (read.ec != std::errc() || read.ptr != *at + 4) return -1;
  *at += 4;
  return static_cast<int>(unit);
}

inline void Json::check(const JsonText& text) {
  if (!text.escaped) return;
  const char* at = text.data;
  const char* const end = text.data + text.length;
  while ((at = static_cast<const char*>(std::memchr(at, '\\', end - at))) != nullptr) {
    ++at;
    if (read_escape(&at, end) < 0) throw Refused();
  }
}

// Whether bytes are UTF-8 without characters below the space: what a JSON string may hold.
inline bool is_string_text(const char* at, const char* end) {
  while (at != end) {
    const auto lead = static_cast<unsigned char>(*at++);
    if (lead < 0x20) return false;
    if (lead < 0x80) continue;
    const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    if (lead < 0xc2 || lead > 0xf4 || end - at < more) return false;
    const auto next = static_cast<unsigned char>(*at);
    const unsigned least = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (next < least || next > most) return false;
    for (int k = 1; k < more; ++k) {
      if ((static_cast<unsigned char>(at[k]) & 0xc0) != 0x80) return false;
    }
    at += more;
  }
  return true;
}

inline JsonText Json::rest_of_string() {
  const char* const begin = at_;
  const char* at = at_;
  bool escaped = false, rare = false;  // rare: a character that is not printable ASCII
  const auto close = [&](const char* quote) {
    const char* before = quote;
    while (before != begin && before[-1] == '\\') --before;
    if ((quote - before) % 2 != 0) return false;
    if (rare && !is_string_text(begin, quote)) throw Refused();
    at_ = quote + 1;
    return true;
  };
#if defined(__SSE2__)
  const __m128i quotes = _mm_set1_epi8('"'), slashes = _mm_set1_epi8('\\');
  const __m128i space = _mm_set1_epi8(' ');
  for (; end_ - at >= 32; at += 32) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16));
    const auto bits = [](__m128i a, __m128i b) {
      return static_cast<uint32_t>(_mm_movemask_epi8(a)) |
             static_cast<uint32_t>(_mm_movemask_epi8(b)) << 16;
    };
    const __m128i slash = _mm_or_si128(_mm_cmpeq_epi8(low, slashes), _mm_cmpeq_epi8(high, slashes));
    const __m128i odd = _mm_or_si128(_mm_cmplt_epi8(low, space), _mm_cmplt_epi8(high, space));
    escaped |= _mm_movemask_epi8(slash) != 0;
    rare |= _mm_movemask_epi8(odd) != 0;
    uint32_t found = bits(_mm_cmpeq_epi8(low, quotes), _mm_cmpeq_epi8(high, quotes));
    for (; found != 0; found &= found - 1) {
      const char* const quote = at + __builtin_ctz(found);
      if (close(quote)) return {begin, quote - begin, escaped};
    }
  }
#endif
  for (; at != end_; ++at) {
    if (*at == '"' && close(at)) return {begin, at - begin, escaped};
    escaped |= *at == '\\';
    rare |= static_cast<signed char>(*at) < ' ';
  }
  throw Refused();
}

inline int64_t Json::copy_string(std::vector<char>* out) {
  constexpr size_t kStep = 32, kAhead = 2048;
  expect('"');
  size_t length = 0;
  const char* at = at_;
  while (true) {
    if (out->size() < length + kStep) out->resize(2 * out->size() + 4 * kStep);
    char* const to = out->data() + length;
#if defined(__SSE2__)
    if (static_cast<size_t>(end_ - at) >= kStep) {
      __builtin_prefetch(at + kAhead);  // across pages, where the processor does not look ahead
      const __m128i quotes = _mm_set1_epi8('"'), slashes = _mm_set1_epi8('\\');
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), high);
      const auto marks = [&](__m128i c) {
        return static_cast<uint32_t>(_mm_movemask_epi8(
            _mm_or_si128(_mm_cmpeq_epi8(c, quotes), _mm_cmpeq_epi8(c, slashes))));
      };
      const uint32_t found = marks(low) | marks(high) << 16;
      const int plain = found == 0 ? static_cast<int>(kStep) : __builtin_ctz(found);
      at += plain;
      length += static_cast<size_t>(plain);
      if (found == 0) continue;
    }
#endif
    if (at == end_) throw Refused();
    if (*at == '"') break;
    int unit = static_cast<unsigned char>(*at++);
    if (unit == '\\') {
      unit = read_escape(&at, end_);
      if (unit < 0) throw Refused();
      if (unit > 0x7f) unit = 0xff;
    }
    (*out)[length++] = static_cast<char>(unit);
  }
  at_ = at + 1;
  return static_cast<int64_t>(length);
}

}  // namespace pmvis

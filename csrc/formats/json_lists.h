// A JSON list of many entries, read by several threads.
//
// Each thread begins a part of the bytes where the text looks like the begin of an entry. That
// guess holds if the thread in front arrives there; what was read upon a wrong guess is read again.
// So the entries are those of one reader that goes from begin to end, whatever stands in the text.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/json.h"
#include "formats/parallel.h"

namespace pmvis {

// What a thread reads of a list: whole entries, one after the other.
template <typename Row>
struct Chunk {
  const char* begin = nullptr;  // of the first entry; null: none was found
  const char* end = nullptr;    // of the entry behind the last, or behind the list
  bool closed = false;          // whether the list ends here
  bool refused = false;
  std::vector<Row> rows;
};

// make(json, thread) returns what is called with a row to fill, `json` in front of its entry.
template <typename Row, typename Make>
class ListReader {
 public:
  ListReader(int threads, const Make& make) : threads_(threads), make_(make) {}

  // Reads the list in front of which `json` stands.
  std::vector<Row> read(Json* json) {
    json->expect('[');
    if (json->accept(']')) return {};
    json->peek();
    const char* const begin = json->at();
    const char* const end = json->end();
    look_at_first_key(begin, end);
    const int64_t parts = part_number(end - begin);
    const auto limit_of = [&](int64_t part) {
      return part == parts ? end : begin + (end - begin) / parts * part;
    };
    std::vector<Chunk<Row>> chunks(static_cast<size_t>(parts));
    parallel(threads_, parts, [&](int64_t part, int thread) {
      const char* const limit = limit_of(part + 1);
      const char* const first = part == 0 ? begin : guess(limit_of(part), limit);
      Chunk<Row>* const chunk = &chunks[static_cast<size_t>(part)];
      if (first != nullptr) read_chunk(first, limit, end, thread, chunk);
    });
    std::vector<Row> found;
    const char* at = begin;
    for (int64_t part = 0; part < parts; ++part) {
      Chunk<Row>& chunk = chunks[static_cast<size_t>(part)];
      if (at >= limit_of(part + 1)) continue;
      if (chunk.begin != at) {
        chunk = Chunk<Row>();
        read_chunk(at, limit_of(part + 1), end, 0, &chunk);
      }
      if (chunk.refused) throw Refused();
      std::move(chunk.rows.begin(), chunk.rows.end(), std::back_inserter(found));
      at = chunk.end;
      if (chunk.closed) {
        json->jump(at);
        return found;
      }
    }
    throw Refused();
  }

 private:
  // Bytes that one thread reads at a time.
  static constexpr int64_t kLeastPart = 1 << 10;
  static constexpr int64_t kMostPart = 1 << 20;
  static constexpr int64_t kPartsPerThread = 16;  // at least, where bytes suffice

  int64_t part_number(int64_t bytes) const {
    if (threads_ == 1) return 1;
    const int64_t part = bytes / (kPartsPerThread * threads_);
    return std::max<int64_t>(1, bytes / std::clamp(part, kLeastPart, kMostPart));
  }

  // Keeps the bytes with which the first entry begins, up to the end of its first key.
  void look_at_first_key(const char* begin, const char* end) {
    Json json(begin, end);
    json.expect('{');
    if (json.peek() == '"') json.string();
    pattern_ = std::string_view(begin, static_cast<size_t>(json.at() - begin));
  }

  const char* guess(const char* begin, const char* limit) const {
    const std::string_view part(begin, static_cast<size_t>(limit - begin));
    const size_t place = part.find(pattern_);
    return place == std::string_view::npos ? nullptr : begin + place;
  }

  // Reads the entries that begin in front of `limit`.
  void read_chunk(const char* begin, const char* limit, const char* end, int thread,
                  Chunk<Row>* chunk) {
    chunk->begin = begin;
    Json json(begin, end);
    auto reader = make_(&json, thread);
    try {
      do {
        json.peek();
        if (json.at() >= limit) {
          chunk->end = json.at();
          return;
        }
        chunk->rows.emplace_back();
        reader(&chunk->rows.back());
      } while (json.accept(','));
      json.expect(']');
      chunk->closed = true;
      chunk->end = json.at();
    } catch (const Refused&) {
      chunk->refused = true;
    }
  }

  int threads_;
  const Make& make_;
  std::string_view pattern_;
};

// Reads the list in front of which `json` stands.
template <typename Row, typename Make>
std::vector<Row> read_list(Json* json, int threads, const Make& make) {
  return ListReader<Row, Make>(threads, make).read(json);
}

}  // namespace pmvis

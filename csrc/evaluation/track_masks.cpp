#include "evaluation/track_masks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rle/polygons.h"

namespace pmvis {
namespace {

constexpr size_t kLeastVertices = 3;
constexpr int64_t kBlock = 1 << 19;  // intervals of a block, at least
constexpr size_t kPage = 1 << 21;    // bytes of a large page

Size read_size(Json* json) {
  json->expect('[');
  const int64_t height = json->integer();
  json->expect(',');
  const int64_t width = json->integer();
  json->expect(']');
  return checked_size(height, width);
}

int64_t pixels_of(Size size) { return int64_t{size.height} * size.width; }

}  // namespace

Size checked_size(int64_t height, int64_t width) {
  if (height < 0 || width < 0 || height > kMaxPixels || width > kMaxPixels) throw Refused();
  if (height != 0 && width > kMaxPixels / height) throw Refused();
  return {static_cast<uint32_t>(height), static_cast<uint32_t>(width)};
}

Block::Block(int64_t size) : size_(size) {
  // Whole large pages, where the system has them: touching small ones takes longer than decoding.
  const size_t bytes = (static_cast<size_t>(size) * sizeof(Interval) + kPage - 1) / kPage * kPage;
  data_ = static_cast<Interval*>(std::aligned_alloc(kPage, bytes));
  if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data_, bytes, MADV_HUGEPAGE);
#endif
}

Block::~Block() { std::free(data_); }

void MaskReader::clear() {
  frames_.clear();
  polygons_.clear();
  used_ = 0;
  converted_ = false;
}

void MaskReader::read(Json* json) {
  json->array([&] { read_frame(json); });
}

void MaskReader::read_frame(Json* json) {
  const char first = json->peek();
  if (first == '{') {
    if (!read_alike(json)) read_encoded(json);
  } else if (first == '[') {
    read_polygons(json);
  } else {
    if (!json->accept_word("null")) throw Refused();
    add_absent();
  }
}

// Reads a mask whose size and spelling are those of the last one.
bool MaskReader::read_alike(Json* json) {
  const char* const begin = json->at();
  if (alike_ == 0 || json->end() - begin < alike_) return false;
  if (std::memcmp(begin, pattern_, static_cast<size_t>(alike_)) != 0) return false;
  json->jump(begin + alike_ - 1);
  const int64_t length = json->copy_string(&text_);
  if (json->at() == json->end() || *json->at() != '}') {
    json->jump(begin);
    return false;
  }
  json->jump(json->at() + 1);
  add_text(text_.data(), length, last_size_);
  return true;
}

// Reads run-length encoding: text or plain runs, with its size before or behind it.
void MaskReader::read_encoded(Json* json) {
  const char* const begin = json->at();
  const char* counts = nullptr;
  const char* end = nullptr;
  Size size{0, 0};
  bool any = false, sized = false;
  json->object([&](std::string_view key) {
    any = true;
    if (key == "size") {
      size = read_size(json);
      sized = true;
    } else if (key == "counts") {
      json->peek();
      counts = json->at();
      json->skip_counts();
      end = json->at();
    } else {
      json->skip();
    }
  });
  if (!any) return add_absent();
  if (!sized || counts == nullptr) throw Refused();
  if (*counts == '[') {
    const int64_t length = end - counts - 2;
    add(decode_runs(counts + 1, length, pixels_of(size), room(runs_room(length))), size);
    converted_ = true;
    return;
  }
  Json text(counts, end);
  const int64_t length = text.copy_string(&text_);
  add_text(text_.data(), length, size);
  remember(begin, counts, json->at() == end + 1 ? end : nullptr, size);
}

// Keeps what stands from `begin` to the opening quote of the text, if the text comes last.
void MaskReader::remember(const char* begin, const char* counts, const char* end, Size size) {
  const int64_t length = counts + 1 - begin;
  alike_ = end != nullptr && length <= kMostAlike ? length : 0;
  std::memcpy(pattern_, begin, static_cast<size_t>(alike_));
  last_size_ = size;
}

void MaskReader::read_polygons(Json* json) {
  const char* const begin = json->at();
  json->skip();
  if (Json(begin + 1, json->at()).accept(']')) return add_absent();
  polygons_.push_back({static_cast<int64_t>(frames_.size()),
                       {begin, static_cast<size_t>(json->at() - begin)}});
  add_absent();
  converted_ = true;
}

void MaskReader::add_absent() { frames_.push_back({used_, 0, -1, {0, 0}, 0, 0}); }

void MaskReader::add_text(const char* text, int64_t length, Size size) {
  add(decode_intervals(text, length, pixels_of(size), room(interval_room(length))), size);
}

void MaskReader::add(Decoded found, Size size) {
  if (found.number < 0) throw Refused();
  const Interval* const here = intervals() + used_;
  const bool any = found.number > 0;
  frames_.push_back({used_, found.number, found.area, size, any ? here[0].start : 0,
                     any ? here[found.number - 1].end : 0});
  used_ += found.number;
}

void MaskReader::rasterise(int64_t height, int64_t width) {
  if (polygons_.empty()) return;
  const Size size = checked_size(height, width);
  std::vector<double> vertices;
  std::vector<int64_t> parts;
  std::vector<Interval> found;
  for (const Polygons& polygons : polygons_) {
    vertices.clear();
    parts.clear();
    Json json(polygons.text.data(), polygons.text.data() + polygons.text.size());
    json.array([&] {
      const size_t before = vertices.size();
      json.array([&] { vertices.push_back(json.real()); });
      const size_t numbers = vertices.size() - before;
      if (numbers % 2 != 0 || numbers < 2 * kLeastVertices) throw Refused();
      parts.push_back(static_cast<int64_t>(numbers / 2));
    });
    const int64_t area = polygon_union(vertices.data(), parts.data(),
                                       static_cast<int64_t>(parts.size()), height, width, &found);
    if (area < 0) throw Refused();
    const auto number = static_cast<int64_t>(found.size());
    if (number > 0) std::memcpy(room(number), found.data(), found.size() * sizeof(Interval));
    add({number, area}, size);
    frames_[static_cast<size_t>(polygons.frame)] = frames_.back();
    frames_.pop_back();
  }
  polygons_.clear();
}

Masks MaskReader::keep() {
  Masks masks{frames_, intervals(), block_, polygons_, converted_};
  base_ += used_;
  used_ = 0;
  return masks;
}

void MaskReader::resume(const Masks& masks) {
  clear();
  int64_t number = 0;
  for (const Frame& frame : masks.frames) number += frame.number;
  if (number > 0) std::copy_n(masks.intervals, number, room(number));
  used_ = number;
  frames_ = masks.frames;
  polygons_ = masks.polygons;
  converted_ = masks.converted;
}

Interval* MaskReader::room(int64_t number) {
  if (!block_ || block_->size() < base_ + used_ + number) {
    auto larger = std::make_shared<Block>(std::max(kBlock, 2 * (used_ + number)));
    if (used_ > 0) std::copy_n(intervals(), used_, larger->data());
    block_ = std::move(larger);
    base_ = 0;
  }
  return block_->data() + base_ + used_;
}

}  // namespace pmvis

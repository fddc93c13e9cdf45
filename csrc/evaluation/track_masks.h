// The masks of a track: read from JSON and decoded at once into foreground intervals.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "formats/json.h"
#include "rle/text.h"

namespace pmvis {

struct Size {
  uint32_t height, width;

  bool operator==(const Size& other) const {
    return height == other.height && width == other.width;
  }
  bool operator!=(const Size& other) const { return !(*this == other); }
};

// The mask of one frame.
struct Frame {
  int64_t begin, number;  // its intervals among the track's: ascending, none empty, none touching
  int64_t area;           // pixels; -1: there is no mask
  Size size;
  uint32_t first, last;   // the foreground lies in [first, last)

  bool present() const { return area >= 0; }
};

// Polygons that are not rasterised yet, as they stand in the file.
struct Polygons {
  int64_t frame;
  std::string_view text;
};

// Room for many intervals.
class Block {
 public:
  explicit Block(int64_t size);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  Interval* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  Interval* data_;
  int64_t size_;
};

// The masks of one track.
struct Masks {
  std::vector<Frame> frames;
  const Interval* intervals = nullptr;
  std::shared_ptr<Block> block;  // where they lie
  std::vector<Polygons> polygons;
  bool converted = false;  // whether a mask was given as plain runs or polygons
};

// Returns a size that a mask can have; throws Refused if none can.
Size checked_size(int64_t height, int64_t width);

// Decodes track after track. What is malformed throws Refused.
class MaskReader {
 public:
  // Begins a track.
  void clear();

  // Reads `segmentations`, in front of which `json` stands.
  void read(Json* json);

  // Adds a frame from COCO's text, or one without a mask.
  void add_text(const char* text, int64_t length, Size size);
  void add_absent();

  // Rasterises what is left to do, at the size of the video.
  void rasterise(int64_t height, int64_t width);

  const std::vector<Frame>& frames() const { return frames_; }
  const Interval* intervals() const { return block_ ? block_->data() + base_ : nullptr; }
  bool converted() const { return converted_; }

  // Ends the track and keeps its masks; takes them back to go on with them.
  Masks keep();
  void resume(const Masks& masks);

 private:
  void read_frame(Json* json);
  bool read_alike(Json* json);
  void read_encoded(Json* json);
  void read_polygons(Json* json);
  void remember(const char* begin, const char* counts, const char* end, Size size);
  void add(Decoded found, Size size);
  Interval* room(int64_t number);

  std::vector<Frame> frames_;
  std::shared_ptr<Block> block_;  // those kept end at base_, `used_` of the track follow
  int64_t base_ = 0, used_ = 0;
  std::vector<Polygons> polygons_;
  bool converted_ = false;
  std::vector<char> text_;  // a text without its escapes

  // Frames of a file look alike: what stood in front of the last text is compared at once with what
  // stands in front of the next.
  static constexpr int64_t kMostAlike = 64;
  char pattern_[kMostAlike];
  int64_t alike_ = 0;
  Size last_size_{0, 0};
};

// Reads plain runs as they stand in a JSON list, from behind `[` up to `]`; like decode_intervals.
Decoded decode_runs(const char* text, int64_t length, int64_t pixels, Interval* out);

// Entries that `out` of decode_runs needs.
constexpr int64_t runs_room(int64_t length) { return length / 4 + 2; }

}  // namespace pmvis

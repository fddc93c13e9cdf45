// `_data.so`: where the entries of a COCO instances file stand, and the numbers in them.
//
// Masks are not copied: of a segmentation the place in the text is kept, and whoever draws the
// picture reads it there. Plain C for ctypes (pmvis_core/formats/coco_tables.py). Text that is not
// as expected is refused whole; the reader in Python then says what is wrong with it, or takes it.
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "formats/json.h"

namespace pmvis {
namespace {

// A picture; texts are places [begin, end) with their quotes, 0 where absent.
struct Image {
  int64_t id, height, width, name_begin, name_end, source_begin, source_end;
};

// What is known of an instance.
enum Kind : uint8_t { kBox = 0, kPolygons = 1, kHollow = 2, kRuns = 3, kMalformed = 4 };

// An instance; the layout is that of `ANNOTATION` in coco_tables.py.
struct Annotation {
  int64_t id, image_id, category_id, begin, end;  // [begin, end): the segmentation's text
  double x, y, width, height, area;
  int32_t image_row;
  uint8_t kind, crowd;
  uint8_t unused[2];
};

static_assert(sizeof(Image) == 56 && sizeof(Annotation) == 88, "as IMAGE and ANNOTATION say");

struct Found {
  std::vector<Image> images;
  std::vector<Annotation> annotations;
  int64_t categories_begin = 0, categories_end = 0;
};

bool is_number(char c) { return c == '-' || (c >= '0' && c <= '9'); }

class Reader {
 public:
  Reader(const char* begin, const char* end) : begin_(begin), json_(begin, end) {}

  void read(Found* out) {
    bool images = false, annotations = false, categories = false;
    const auto once = [](bool* seen) {
      if (*seen) throw Refused();
      *seen = true;
    };
    json_.object([&](std::string_view key) {
      if (key == "images") {
        once(&images);
        json_.array([&] { out->images.push_back(image()); });
      } else if (key == "annotations") {
        once(&annotations);
        json_.array([&] { out->annotations.push_back(annotation()); });
      } else if (key == "categories") {
        once(&categories);
        place(&out->categories_begin, &out->categories_end);
      } else {
        json_.skip();
      }
    });
    json_.peek();
    if (!images || !annotations || !categories || json_.at() != json_.end()) throw Refused();
  }

 private:
  int64_t here() const { return json_.at() - begin_; }

  // Reads past any value and keeps where it stands.
  void place(int64_t* begin, int64_t* end) {
    json_.peek();
    *begin = here();
    json_.skip();
    *end = here();
  }

  Image image() {
    Image found{};
    bool id = false, height = false, width = false;
    json_.object([&](std::string_view key) {
      if (key == "id") {
        found.id = json_.integer(), id = true;
      } else if (key == "height") {
        found.height = json_.integer(), height = true;
      } else if (key == "width") {
        found.width = json_.integer(), width = true;
      } else if (key == "file_name") {
        if (json_.peek() != '"') throw Refused();
        place(&found.name_begin, &found.name_end);
      } else if (key == "source") {
        const bool named = json_.peek() == '"';
        place(&found.source_begin, &found.source_end);
        if (!named) found.source_begin = found.source_end = 0;
      } else {
        json_.skip();
      }
    });
    const bool whole = id && height && width && found.name_end - found.name_begin > 2;
    if (!whole || found.height <= 0 || found.width <= 0) throw Refused();
    return found;
  }

  Annotation annotation() {
    Annotation found{};
    found.area = std::numeric_limits<double>::quiet_NaN();
    found.image_row = -1;
    bool id = false, image = false, category = false, box = false;
    json_.object([&](std::string_view key) {
      if (key == "id") {
        found.id = json_.integer(), id = true;
      } else if (key == "image_id") {
        found.image_id = json_.integer(), image = true;
      } else if (key == "category_id") {
        found.category_id = json_.integer(), category = true;
      } else if (key == "bbox") {
        bbox(&found), box = true;
      } else if (key == "area") {
        found.area = area();
      } else if (key == "iscrowd") {
        found.crowd = truth();
      } else if (key == "segmentation") {
        segmentation(&found);
      } else {
        json_.skip();
      }
    });
    if (!id || !image || !category || !box) throw Refused();
    return found;
  }

  void bbox(Annotation* out) {
    double* const edges[] = {&out->x, &out->y, &out->width, &out->height};
    int number = 0;
    json_.array([&] {
      if (number == 4) throw Refused();
      *edges[number++] = json_.real();
    });
    if (number != 4) throw Refused();
  }

  // Reads a number; what is none, is not a number.
  double area() {
    if (is_number(json_.peek())) return json_.real();
    json_.skip();
    return std::numeric_limits<double>::quiet_NaN();
  }

  bool truth() {
    if (json_.accept_word("true")) return true;
    if (json_.accept_word("false") || json_.accept_word("null")) return false;
    return json_.integer() != 0;
  }

  void segmentation(Annotation* out) {
    const char first = json_.peek();
    out->begin = here();
    out->kind = kBox;
    if (first == '[') {
      out->kind = polygons();
    } else if (first == '{') {
      bool empty = true;
      json_.object([&](std::string_view) {
        empty = false;
        json_.skip();
      });
      if (!empty) out->kind = kRuns;
    } else if (!json_.accept_word("null")) {
      throw Refused();
    }
    out->end = here();
    if (out->kind == kBox) out->begin = out->end = 0;
  }

  Kind polygons() {
    bool any = false, solid = false, malformed = false;
    json_.array([&] {
      any = true;
      if (json_.peek() != '[') {
        malformed = true;
        json_.skip();
        return;
      }
      int64_t numbers = 0;
      json_.array([&] { malformed |= !finite(), ++numbers; });
      malformed |= numbers % 2 != 0;
      solid |= numbers >= 6;
    });
    if (!any) return kBox;
    return malformed ? kMalformed : solid ? kPolygons : kHollow;
  }

  // Reads past a value; tells whether it is a number that a double can hold.
  bool finite() {
    const bool number = is_number(json_.peek());
    const char* const begin = json_.at();
    json_.skip();
    const std::string_view text(begin, static_cast<size_t>(json_.at() - begin));
    if (number && (text.size() > 300 || text.find_first_of("eE") != std::string_view::npos)) {
      json_.jump(begin);
      json_.real();  // refuses what overflows
    }
    return number;
  }

  const char* begin_;
  Json json_;
};

// Goes up with every change of a row, of a function or of what one does;
// pmvis_core/formats/coco_tables.py asks for the same.
constexpr int64_t kVersion = 1;

enum Status { kRead = 0, kRefused = 1, kNoMemory = 2 };

}  // namespace
}  // namespace pmvis

#define PMVIS_API extern "C" __attribute__((visibility("default")))

PMVIS_API int64_t pmvis_coco_version() { return pmvis::kVersion; }

// Reads a text; `sizes` gets the numbers of pictures and instances and the place of the categories.
PMVIS_API int pmvis_coco_read(const char* text, int64_t length, void** out, int64_t* sizes) {
  using namespace pmvis;
  Found* found = nullptr;
  try {
    found = new Found();
    Reader(text, text + length).read(found);
  } catch (const Refused&) {
    delete found;
    return kRefused;
  } catch (const std::bad_alloc&) {
    delete found;
    return kNoMemory;
  }
  sizes[0] = static_cast<int64_t>(found->images.size());
  sizes[1] = static_cast<int64_t>(found->annotations.size());
  sizes[2] = found->categories_begin;
  sizes[3] = found->categories_end;
  *out = found;
  return kRead;
}

// Copies what was read into arrays of the sizes that were told, and forgets it.
PMVIS_API void pmvis_coco_take(void* handle, void* images, void* annotations) {
  using namespace pmvis;
  auto* const found = static_cast<Found*>(handle);
  if (images != nullptr && !found->images.empty()) {
    std::memcpy(images, found->images.data(), found->images.size() * sizeof(Image));
  }
  if (annotations != nullptr && !found->annotations.empty()) {
    std::memcpy(annotations, found->annotations.data(),
                found->annotations.size() * sizeof(Annotation));
  }
  delete found;
}

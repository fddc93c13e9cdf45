// Fuzzes the reader of COCO files through the C ABI of csrc/formats/coco_index.cpp. Whatever is
// read, the places that it states lie in the text, in order, and texts of names have their quotes.
#include <memory>
#include <vector>

#include "fuzz.h"

extern "C" {
int pmvis_coco_read(const char* text, int64_t length, void** out, int64_t* sizes);
void pmvis_coco_take(void* handle, void* images, void* annotations);
}

namespace {

struct Image {
  int64_t id, height, width, name_begin, name_end, source_begin, source_end;
};

struct Annotation {
  int64_t id, image_id, category_id, begin, end;
  double numbers[5];
  int32_t image_row;
  uint8_t kind, crowd, unused[2];
};

std::string number(uint64_t value) { return std::to_string(value); }

std::string mask(fuzz::Random* random) {
  switch (random->below(6)) {
    case 0: return "null";
    case 1: return "[]";
    case 2: return "{\"size\": [4, 5], \"counts\": \"0}\\u0041\"}";
    case 3: return "{\"counts\": [3, 17], \"size\": [4, 5]}";
    case 4: return "[[1, 2.5, 3e0], [], [null]]";
    default: break;
  }
  std::string text = "[[0.5";
  for (uint64_t k = 0, most = random->below(9); k < most; ++k) text += ", " + number(k) + ".25";
  return text + "]]";
}

}  // namespace

const char* const fuzz::kLetters = "{}[],:\"\\ 0123456789.eE+-nulltrue\n";

std::string fuzz::fresh_input(Random* random) {
  std::string images, annotations;
  for (uint64_t k = 0, most = random->below(4); k < most; ++k) {
    images += (k > 0 ? ", " : "") + std::string("{\"id\": ") + number(k) + ", \"file_name\": \"a" +
              number(k) + "\\n.jpg\", \"height\": 4, \"width\": 5, \"source\": " +
              (random->one_in(2) ? "\"coco\"" : "null") + "}";
  }
  for (uint64_t k = 0, most = random->below(5); k < most; ++k) {
    annotations += (k > 0 ? ", " : "") + std::string("{\"segmentation\": ") + mask(random) +
                   ", \"id\": " + number(k) + ", \"image_id\": 0, \"category_id\": 1, " +
                   "\"iscrowd\": " + (random->one_in(3) ? "true" : "0") +
                   ", \"bbox\": [0, 1.5, 2, -3], \"area\": 1e1}";
  }
  return "{\"info\": {\"x\": [1]}, \"images\": [" + images + "], \"annotations\": [" + annotations +
         "], \"categories\": [{\"id\": 1, \"name\": \"a\"}]}";
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy of exact size, so that a read past the end is seen.
  const std::vector<char> text(data, data + size);
  const auto length = static_cast<int64_t>(size);
  void* handle = nullptr;
  int64_t sizes[4] = {};
  if (pmvis_coco_read(text.data(), length, &handle, sizes) != 0) return 0;
  std::vector<Image> images(static_cast<size_t>(sizes[0]));
  std::vector<Annotation> annotations(static_cast<size_t>(sizes[1]));
  pmvis_coco_take(handle, images.data(), annotations.data());
  const auto inside = [&](int64_t begin, int64_t end) {
    return 0 <= begin && begin < end && end <= length;
  };
  EXPECT(inside(sizes[2], sizes[3]));
  for (const Image& image : images) {
    EXPECT(image.height > 0 && image.width > 0);
    EXPECT(inside(image.name_begin, image.name_end));
    EXPECT(text[static_cast<size_t>(image.name_begin)] == '"');
    EXPECT(text[static_cast<size_t>(image.name_end - 1)] == '"');
    EXPECT(image.source_end == 0 || inside(image.source_begin, image.source_end));
  }
  for (const Annotation& row : annotations) {
    EXPECT(row.kind <= 4 && row.crowd <= 1);
    EXPECT(row.kind == 0 ? row.end == 0 : inside(row.begin, row.end));
  }
  return 0;
}

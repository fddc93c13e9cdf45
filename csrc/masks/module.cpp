// `_masks.so`: mask operations as a Python extension that needs neither torch nor numpy.
//
// Why an extension and no ctypes: an area takes a third of a microsecond, a call through ctypes and
// its conversions takes three. Functions take RLE dicts, lists of them and arrays as buffers;
// pmvis_core/masks.py is their one caller and documents what they do. Each returns None where the
// arguments are not the usual ones or malformed, and masks.py falls back on rle_numpy.py, which
// answers or explains. Nothing is read or written before its bounds were checked.
#include <algorithm>
#include <new>

#include "masks/dense.h"
#include "masks/python_rle.h"
#include "rle/polygons.h"

namespace pmvis {
namespace {

constexpr int64_t kWorthUnlocking = 1 << 16;  // pixels

// Room that calls use again, one after the other.
struct Scratch {
  Dense dense;
  Intervals intervals;
  Ends ends;
};

Scratch& scratch() {
  static thread_local Scratch room;
  return room;
}

PyObject* none() { Py_RETURN_NONE; }

// Keeps C++ exceptions from Python.
template <typename Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// --- pixels ---

// One or more masks of an array.
struct Stack {
  const uint8_t* first;
  int64_t number, height, width, step;  // `step` bytes from one mask to the next
  bool by_columns;
};

// False if a mask has gaps or runs backwards.
bool read_stack(const Py_buffer& view, Stack* out) {
  const int axes = view.ndim;
  const int64_t height = view.shape[axes - 2], width = view.shape[axes - 1];
  const int64_t down = view.strides[axes - 2], right = view.strides[axes - 1];
  const bool fits = height == 0 || width <= kMaxPixels / height;
  const bool by_columns = (height <= 1 || down == 1) && (width <= 1 || right == height);
  const bool by_rows = (width <= 1 || right == 1) && (height <= 1 || down == width);
  *out = {static_cast<const uint8_t*>(view.buf), axes == 3 ? view.shape[0] : 1, height, width,
          axes == 3 ? view.strides[0] : 0, by_columns};
  return fits && (by_rows || by_columns || height * width == 0);
}

PyObject* encode_one(const uint8_t* mask, const Stack& stack) {
  Dense& dense = scratch().dense;
  const int64_t pixels = stack.height * stack.width;
  {
    const Unlocked unlocked(pixels > kWorthUnlocking);
    if (stack.by_columns) {
      encode_columns(mask, pixels, &dense);
    } else {
      encode_rows(mask, stack.height, stack.width, &dense);
    }
  }
  return make_rle(dense.ends.data(), dense.number, stack.height, stack.width);
}

// encode(array) -> dict of (H, W), list of dicts of (N, H, W)
PyObject* encode(PyObject*, PyObject* array) {
  return guarded([&]() -> PyObject* {
    const Bytes bytes(array, PyBUF_STRIDES);
    Stack stack;
    if (!bytes.good() || !read_stack(bytes.view(), &stack)) return none();
    if (bytes.view().ndim == 2) return encode_one(stack.first, stack);
    Owned list(PyList_New(stack.number));
    if (list == nullptr) return nullptr;
    for (int64_t n = 0; n < stack.number; ++n) {
      PyObject* const rle = encode_one(stack.first + n * stack.step, stack);
      if (rle == nullptr || PyList_SetItem(list.get(), n, rle) != 0) return nullptr;
    }
    return list.release();
  });
}

bool read_crop(PyObject* const* edges, int64_t height, int64_t width, Crop* out) {
  int64_t* const found[] = {&out->x1, &out->y1, &out->x2, &out->y2};
  for (int k = 0; k < 4; ++k) {
    *found[k] = PyLong_AsLongLong(edges[k]);
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  return 0 <= out->x1 && out->x1 <= out->x2 && out->x2 <= width && 0 <= out->y1 &&
         out->y1 <= out->y2 && out->y2 <= height;
}

// decode(rles, out, height, width, x1, y1, x2, y2) -> True; writes (N, y2 - y1, x2 - x1)
PyObject* decode(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 8) return none();
    const Items rles(arguments[0]);
    const Bytes bytes(arguments[1], PyBUF_ND | PyBUF_WRITABLE);
    Rle frame;
    Crop part;
    if (!rles.good() || !bytes.good() || !read_size(arguments[2], arguments[3], &frame) ||
        !read_crop(arguments + 4, frame.height, frame.width, &part)) {
      return none();
    }
    const Py_ssize_t* const shape = bytes.view().shape;
    if (bytes.view().ndim != 3 || shape[0] != rles.size() || shape[1] != part.y2 - part.y1 ||
        shape[2] != part.x2 - part.x1) {
      return none();
    }
    auto* out = static_cast<uint8_t*>(bytes.view().buf);
    Scratch& s = scratch();
    const int64_t pixels = (part.y2 - part.y1) * (part.x2 - part.x1);
    for (Py_ssize_t k = 0; k < rles.size(); ++k, out += pixels) {
      Rle rle;
      int64_t area;
      if (!read_rle(rles[k], &rle) || rle.height != frame.height || rle.width != frame.width ||
          !read_intervals(rle, &s.intervals, &area)) {
        return none();
      }
      const Unlocked unlocked(pixels > kWorthUnlocking);
      decode_rows(s.intervals.data(), static_cast<int64_t>(s.intervals.size()), rle.height, part,
                  out, &s.dense);
    }
    Py_RETURN_TRUE;
  });
}

// --- areas and boxes ---

PyObject* make_box(const Box& box) {
  return Py_BuildValue("(dddd)", static_cast<double>(box.x1), static_cast<double>(box.y1),
                       static_cast<double>(box.x2), static_cast<double>(box.y2));
}

// area(rle) -> int
PyObject* area(PyObject*, PyObject* object) {
  Rle rle;
  if (!read_rle(object, &rle)) return none();
  const int64_t pixels = decode_area(rle.text, rle.length, rle.pixels());
  return pixels < 0 ? none() : PyLong_FromLongLong(pixels);
}

// box(rle) -> tuple
PyObject* box(PyObject*, PyObject* object) {
  return guarded([&]() -> PyObject* {
    Rle rle;
    int64_t pixels;
    Intervals& intervals = scratch().intervals;
    if (!read_rle(object, &rle) || !read_intervals(rle, &intervals, &pixels)) return none();
    return make_box(
        box_of(intervals.data(), static_cast<int64_t>(intervals.size()), rle.height));
  });
}

// Returns a list of what `one` makes of each RLE, None where there is no mask; None if one fails.
PyObject* each(PyObject* objects, PyCFunction one) {
  const Items rles(objects);
  if (!rles.good()) return none();
  Owned list(PyList_New(rles.size()));
  if (list == nullptr) return nullptr;
  for (Py_ssize_t k = 0; k < rles.size(); ++k) {
    PyObject* const rle = rles[k];
    Owned answer(rle == Py_None ? none() : one(nullptr, rle));
    if (answer == nullptr) return nullptr;
    if (answer.get() == Py_None && rle != Py_None) return none();
    if (PyList_SetItem(list.get(), k, answer.release()) != 0) return nullptr;
  }
  return list.release();
}

// areas(rles) -> list of int or None
PyObject* areas(PyObject*, PyObject* objects) {
  return guarded([&] { return each(objects, area); });
}

// boxes(rles) -> list of tuples or None
PyObject* boxes(PyObject*, PyObject* objects) {
  return guarded([&] { return each(objects, box); });
}

// faulty(rles, first) -> index of the next that is no usual mask, or -1; absent masks are none
PyObject* faulty(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 2) return none();
  const Items rles(arguments[0]);
  const Py_ssize_t first = PyLong_AsSsize_t(arguments[1]);
  if (!rles.good() || first < 0) {
    PyErr_Clear();
    return none();
  }
  for (Py_ssize_t k = first; k < rles.size(); ++k) {
    Rle rle;
    if (rles[k] == Py_None) continue;
    if (!read_rle(rles[k], &rle) || decode_area(rle.text, rle.length, rle.pixels()) < 0) {
      return PyLong_FromSsize_t(k);
    }
  }
  return PyLong_FromLong(-1);
}

// --- several masks ---

// merge(rles, intersect) -> dict
PyObject* merge(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 2) return none();
    const Items rles(arguments[0]);
    const int intersect = PyObject_IsTrue(arguments[1]);
    if (!rles.good() || rles.size() == 0 || intersect < 0) {
      PyErr_Clear();
      return none();
    }
    std::vector<Ends> masks(rles.size());
    Rle first{}, rle;
    for (Py_ssize_t k = 0; k < rles.size(); ++k) {
      if (!read_rle(rles[k], &rle) || !read_ends(rle, &masks[k])) return none();
      if (k == 0) first = rle;
      if (rle.height != first.height || rle.width != first.width) return none();
    }
    Ends& merged = scratch().ends;
    pmvis::merge(&masks, intersect != 0, &merged);
    return make_rle(merged.data(), static_cast<int64_t>(merged.size()), first.height, first.width);
  });
}

// Masks of one size.
struct Group {
  std::vector<Intervals> masks;
  std::vector<int64_t> areas;

  bool read(const Items& rles, int64_t* height, int64_t* width) {
    masks.resize(rles.size());
    areas.resize(rles.size());
    for (Py_ssize_t k = 0; k < rles.size(); ++k) {
      Rle rle;
      if (!read_rle(rles[k], &rle) || !read_intervals(rle, &masks[k], &areas[k])) return false;
      if (*height < 0) {
        *height = rle.height;
        *width = rle.width;
      }
      if (rle.height != *height || rle.width != *width) return false;
    }
    return true;
  }
};

// iou(dts, gts, crowd, out) -> True; crowd: None or G bytes; out: (D, G) float64
PyObject* iou(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 4) return none();
    const Items dts(arguments[0]), gts(arguments[1]);
    if (!dts.good() || !gts.good()) return none();
    const size_t pairs = static_cast<size_t>(dts.size()) * static_cast<size_t>(gts.size());
    const Numbers array(arguments[3]);
    auto* const out = array.room<double>(pairs);
    const char* const crowd = arguments[2] == Py_None ? nullptr : PyBytes_AsString(arguments[2]);
    if (out == nullptr || PyErr_Occurred() != nullptr ||
        (crowd != nullptr && PyBytes_Size(arguments[2]) != gts.size())) {
      PyErr_Clear();
      return none();
    }
    Group first, second;
    int64_t height = -1, width = -1;
    if (!first.read(dts, &height, &width) || !second.read(gts, &height, &width)) return none();
    std::vector<int64_t> common(pairs);
    const Unlocked unlocked(pairs > 64);
    intersections(first.masks, second.masks, height, common.data());
    for (size_t d = 0, k = 0; d < first.areas.size(); ++d) {
      for (size_t g = 0; g < second.areas.size(); ++g, ++k) {
        const bool alone = crowd != nullptr && crowd[g] != 0;
        const int64_t all = first.areas[d] + (alone ? 0 : second.areas[g] - common[k]);
        out[k] = common[k] > 0 ? static_cast<double>(common[k]) / static_cast<double>(all) : 0.0;
      }
    }
    Py_RETURN_TRUE;
  });
}

// One frame of several tracks.
struct TrackFrame {
  std::vector<Rle> sizes;  // height < 0: the track is absent
  std::vector<Intervals> masks;
  std::vector<int64_t> areas;

  explicit TrackFrame(size_t number) : sizes(number), masks(number), areas(number) {}

  bool read(const std::vector<Items>& tracks, Py_ssize_t frame) {
    for (size_t k = 0; k < tracks.size(); ++k) {
      sizes[k].height = -1;
      if (frame >= tracks[k].size()) continue;
      PyObject* const rle = tracks[k][frame];
      if (rle == Py_None) continue;
      if (!read_rle(rle, &sizes[k])) return false;
      if (!read_intervals(sizes[k], &masks[k], &areas[k])) return false;
    }
    return true;
  }
};

bool read_tracks(PyObject* objects, std::vector<Items>* out) {
  const Items tracks(objects);
  if (!tracks.good()) return false;
  for (Py_ssize_t k = 0; k < tracks.size(); ++k) {
    out->emplace_back(tracks[k]);
    if (!out->back().good()) return false;
  }
  return true;
}

// track_overlaps(dts, gts, inter, union) -> True; both (D, G) int64, zeros, are added to
PyObject* track_overlaps(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 4) return none();
    std::vector<Items> dts, gts;
    if (!read_tracks(arguments[0], &dts) || !read_tracks(arguments[1], &gts)) return none();
    const Numbers inter_array(arguments[2]), union_array(arguments[3]);
    auto* const inters = inter_array.room<int64_t>(dts.size() * gts.size());
    auto* const unions = union_array.room<int64_t>(dts.size() * gts.size());
    if (inters == nullptr || unions == nullptr) return none();
    TrackFrame a(dts.size()), b(gts.size());
    const auto longest = [](const std::vector<Items>& tracks) {
      Py_ssize_t most = 0;
      for (const Items& track : tracks) most = std::max(most, track.size());
      return most;
    };
    const Py_ssize_t frames = std::max(longest(dts), longest(gts));
    for (Py_ssize_t frame = 0; frame < frames; ++frame) {
      if (!a.read(dts, frame) || !b.read(gts, frame)) return none();
      for (size_t d = 0, k = 0; d < dts.size(); ++d) {
        for (size_t g = 0; g < gts.size(); ++g, ++k) {
          // Frames beyond the shorter track do not count.
          if (frame >= dts[d].size() || frame >= gts[g].size()) continue;
          const Rle &one = a.sizes[d], &other = b.sizes[g];
          if (one.height < 0 || other.height < 0) {
            unions[k] += (one.height < 0 ? 0 : a.areas[d]) + (other.height < 0 ? 0 : b.areas[g]);
          } else if (one.height == other.height && one.width == other.width) {
            const int64_t common =
                overlap(a.masks[d].data(), static_cast<int64_t>(a.masks[d].size()),
                        b.masks[g].data(), static_cast<int64_t>(b.masks[g].size()));
            inters[k] += common;
            unions[k] += a.areas[d] + b.areas[g] - common;
          }
        }
      }
    }
    Py_RETURN_TRUE;
  });
}

// --- polygons and plain runs ---

// A list of numbers as doubles.
bool read_polygon(PyObject* object, std::vector<double>* out) {
  const Items values(object);
  if (!values.good() || values.size() < 6 || values.size() % 2 != 0) return false;
  out->resize(values.size());
  for (Py_ssize_t k = 0; k < values.size(); ++k) {
    PyObject* const value = values[k];
    if (value == nullptr) return false;
    (*out)[k] = PyFloat_AsDouble(value);
    if ((*out)[k] == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

// from_polygons(polygons, height, width) -> dict
PyObject* from_polygons(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 3) return none();
    const Items polygons(arguments[0]);
    Rle frame;
    if (!polygons.good() || polygons.size() == 0) return none();
    if (!read_size(arguments[1], arguments[2], &frame)) return none();
    std::vector<Ends> parts(polygons.size());
    std::vector<double> xy;
    for (Py_ssize_t k = 0; k < polygons.size(); ++k) {
      if (!read_polygon(polygons[k], &xy) ||
          !polygon_ends(xy.data(), static_cast<int64_t>(xy.size() / 2), frame.height, frame.width,
                        &parts[k])) {
        return none();
      }
    }
    Ends& all = scratch().ends;
    pmvis::merge(&parts, false, &all);
    return make_rle(all.data(), static_cast<int64_t>(all.size()), frame.height, frame.width);
  });
}

// from_runs(counts, height, width) -> dict
PyObject* from_runs(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    if (number != 3) return none();
    const Items runs(arguments[0]);
    Rle frame;
    if (!runs.good() || !read_size(arguments[1], arguments[2], &frame)) return none();
    Ends& ends = scratch().ends;
    ends.clear();
    int64_t at = 0;
    for (Py_ssize_t k = 0; k < runs.size(); ++k) {
      if (runs[k] == nullptr || !PyLong_CheckExact(runs[k])) return none();
      const long long run = PyLong_AsLongLong(runs[k]);
      if (run == -1) PyErr_Clear();
      if (run < 0 || run > frame.pixels() - at) return none();
      at += run;
      ends.push_back(static_cast<uint32_t>(at));
    }
    if (at != frame.pixels()) return none();
    if (ends.empty()) ends.push_back(0);
    return make_rle(ends.data(), static_cast<int64_t>(ends.size()), frame.height, frame.width);
  });
}

// to_runs(rle) -> list of int
PyObject* to_runs(PyObject*, PyObject* object) {
  return guarded([&]() -> PyObject* {
    Rle rle;
    Ends& ends = scratch().ends;
    if (!read_rle(object, &rle) || !read_ends(rle, &ends)) return none();
    Owned list(PyList_New(static_cast<Py_ssize_t>(ends.size())));
    if (list == nullptr) return nullptr;
    for (size_t k = 0; k < ends.size(); ++k) {
      PyObject* const run = PyLong_FromLongLong(int64_t{ends[k]} - (k > 0 ? ends[k - 1] : 0));
      if (run == nullptr) return nullptr;
      if (PyList_SetItem(list.get(), static_cast<Py_ssize_t>(k), run) != 0) return nullptr;
    }
    return list.release();
  });
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast(const char* name, Fast function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    {"encode", encode, METH_O, nullptr},
    fast("decode", decode),
    {"area", area, METH_O, nullptr},
    {"box", box, METH_O, nullptr},
    {"areas", areas, METH_O, nullptr},
    {"boxes", boxes, METH_O, nullptr},
    fast("faulty", faulty),
    fast("merge", merge),
    fast("iou", iou),
    fast("track_overlaps", track_overlaps),
    fast("from_polygons", from_polygons),
    fast("from_runs", from_runs),
    {"to_runs", to_runs, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// Goes up with every change of a function or of what one does; pmvis_core/native.py asks for the same.
constexpr int64_t kVersion = 1;

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_masks", nullptr, -1, methods,
                          nullptr,               nullptr,  nullptr, nullptr};

}  // namespace
}  // namespace pmvis

PyMODINIT_FUNC PyInit__masks() {
  if (!pmvis::make_keys()) return nullptr;
  PyObject* const module = PyModule_Create(&pmvis::definition);
  if (module == nullptr) return nullptr;
  const char* const instructions = pmvis::has_avx2() ? "avx2" : "base";
  if (PyModule_AddStringConstant(module, "instructions", instructions) != 0 ||
      PyModule_AddIntConstant(module, "version", pmvis::kVersion) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

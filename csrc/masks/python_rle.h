// Python objects to masks and back, with the stable ABI of CPython.
//
// Everything here expects the usual: a dict with `size` [height, width] and `counts` as str or
// bytes, a list or tuple of such, a uint8 or bool array. Whatever is unusual or malformed is
// reported as false, without a Python exception: the caller's twin in Python then does the work or
// says what is wrong. So there is one place only that words errors.
#pragma once

#include <patchlevel.h>
#include <pyconfig.h>
// Buffers are in the stable ABI since 3.11; for 3.10, and without a global lock (where importing
// the library brings it back), the library fits that version alone.
#if PY_VERSION_HEX >= 0x030B0000 && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "masks/operations.h"

namespace pmvis {

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// Lets other Python threads run while it lives, if the work is worth it.
class Unlocked {
 public:
  explicit Unlocked(bool worth_it) : state_(worth_it ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// A list or tuple; any other iterable becomes one.
class Items {
 public:
  explicit Items(PyObject* iterable);
  bool good() const { return list_ != nullptr; }
  Py_ssize_t size() const { return size_; }
  PyObject* operator[](Py_ssize_t k) const;  // borrowed; null if the list has shrunk

 private:
  Owned list_;
  Py_ssize_t size_ = 0;
  bool is_list_ = false;
};

// The memory of an array of bytes; released at the end.
class Bytes {
 public:
  // flags: PyBUF_...; the array may have 2 or 3 axes.
  Bytes(PyObject* array, int flags);
  ~Bytes();
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  bool good() const { return good_; }
  const Py_buffer& view() const { return view_; }

 private:
  Py_buffer view_;
  bool held_, good_;
};

// The memory of a C-contiguous, writable array of numbers; released at the end.
class Numbers {
 public:
  explicit Numbers(PyObject* array);
  ~Numbers();
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  // Null unless the array has exactly this many bytes.
  template <typename Number>
  Number* room(size_t numbers) const {
    const bool fits = held_ && static_cast<size_t>(view_.len) == numbers * sizeof(Number);
    return fits ? static_cast<Number*>(view_.buf) : nullptr;
  }

 private:
  Py_buffer view_;
  bool held_;
};

// A mask as Python holds it. The text belongs to the dict.
struct Rle {
  const char* text;
  int64_t length, height, width;
  int64_t pixels() const { return height * width; }
};

bool read_rle(PyObject* rle, Rle* out);
bool read_intervals(const Rle& rle, Intervals* out, int64_t* area);
bool read_ends(const Rle& rle, Ends* out);

// height, width: at most kMaxPixels pixels.
bool read_size(PyObject* height, PyObject* width, Rle* out);

// A dict of the mask whose runs have these ends; null and an exception if there is no memory.
PyObject* make_rle(const uint32_t* ends, int64_t number, int64_t height, int64_t width);

// Interned keys; called once.
bool make_keys();

}  // namespace pmvis

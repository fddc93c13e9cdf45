#include "masks/python_rle.h"

namespace pmvis {
namespace {

PyObject *size_key, *counts_key;

// A whole number from 0 to kMaxPixels; no bool.
bool read_whole(PyObject* value, int64_t* out) {
  if (value == nullptr || !PyLong_CheckExact(value)) return false;
  const long long number = PyLong_AsLongLong(value);
  if (number == -1) PyErr_Clear();
  *out = number;
  return number >= 0 && number <= kMaxPixels;
}

}  // namespace

Items::Items(PyObject* iterable)
    : list_(iterable == nullptr ? nullptr : PySequence_Fast(iterable, "")) {
  if (list_ == nullptr) {
    PyErr_Clear();
    return;
  }
  is_list_ = PyList_Check(list_.get());
  size_ = is_list_ ? PyList_Size(list_.get()) : PyTuple_Size(list_.get());
}

PyObject* Items::operator[](Py_ssize_t k) const {
  PyObject* const item =
      is_list_ ? PyList_GetItem(list_.get(), k) : PyTuple_GetItem(list_.get(), k);
  if (item == nullptr) PyErr_Clear();
  return item;
}

Bytes::Bytes(PyObject* array, int flags)
    : held_(PyObject_GetBuffer(array, &view_, flags | PyBUF_FORMAT) == 0), good_(held_) {
  if (!held_) {
    PyErr_Clear();
    return;
  }
  const char* const format = view_.format == nullptr ? "B" : view_.format;
  good_ = view_.itemsize == 1 && (format[0] == 'B' || format[0] == '?') && format[1] == '\0' &&
          (view_.ndim == 2 || view_.ndim == 3);
}

Bytes::~Bytes() {
  if (held_) PyBuffer_Release(&view_);
}

Numbers::Numbers(PyObject* array)
    : held_(PyObject_GetBuffer(array, &view_, PyBUF_ND | PyBUF_WRITABLE) == 0) {
  if (!held_) PyErr_Clear();
}

Numbers::~Numbers() {
  if (held_) PyBuffer_Release(&view_);
}

bool read_size(PyObject* height, PyObject* width, Rle* out) {
  // Neither factor is above 2^32, but the product of two might pass 2^63.
  return read_whole(height, &out->height) && read_whole(width, &out->width) &&
         (out->height == 0 || out->width <= kMaxPixels / out->height);
}

bool read_rle(PyObject* rle, Rle* out) {
  if (rle == nullptr || !PyDict_Check(rle)) return false;
  PyObject* const size = PyDict_GetItem(rle, size_key);
  PyObject* const counts = PyDict_GetItem(rle, counts_key);
  if (size == nullptr || counts == nullptr) return false;
  if (PyList_Check(size) && PyList_Size(size) == 2) {
    if (!read_size(PyList_GetItem(size, 0), PyList_GetItem(size, 1), out)) return false;
  } else if (PyTuple_Check(size) && PyTuple_Size(size) == 2) {
    if (!read_size(PyTuple_GetItem(size, 0), PyTuple_GetItem(size, 1), out)) return false;
  } else {
    return false;
  }
  Py_ssize_t length = 0;
  if (PyUnicode_Check(counts)) {
    // Of a text outside ASCII, the UTF-8 bytes lie outside COCO's alphabet: malformed either way.
    out->text = PyUnicode_AsUTF8AndSize(counts, &length);
    if (out->text == nullptr) PyErr_Clear();
  } else if (PyBytes_Check(counts)) {
    out->text = PyBytes_AsString(counts);
    length = PyBytes_Size(counts);
  } else {
    return false;
  }
  out->length = length;
  return out->text != nullptr;
}

bool read_intervals(const Rle& rle, Intervals* out, int64_t* area) {
  out->resize(interval_room(rle.length));
  const Decoded decoded = decode_intervals(rle.text, rle.length, rle.pixels(), out->data());
  if (decoded.number < 0) return false;
  out->resize(decoded.number);
  *area = decoded.area;
  return true;
}

bool read_ends(const Rle& rle, Ends* out) {
  out->resize(ends_room(rle.length));
  const int64_t number = decode_ends(rle.text, rle.length, rle.pixels(), out->data());
  if (number < 0) return false;
  out->resize(number);
  return true;
}

PyObject* make_rle(const uint32_t* ends, int64_t number, int64_t height, int64_t width) {
  static thread_local std::vector<char> room;
  if (static_cast<int64_t>(room.size()) < text_room(number)) room.resize(text_room(number));
  const char* const end = write_text(ends, number, room.data());
  Owned dict(PyDict_New());
  const Owned counts(PyUnicode_FromStringAndSize(room.data(), end - room.data()));
  const Owned size(Py_BuildValue("[LL]", static_cast<long long>(height),
                                 static_cast<long long>(width)));
  if (dict == nullptr || counts == nullptr || size == nullptr) return nullptr;
  if (PyDict_SetItem(dict.get(), size_key, size.get()) != 0) return nullptr;
  if (PyDict_SetItem(dict.get(), counts_key, counts.get()) != 0) return nullptr;
  return dict.release();
}

bool make_keys() {
  size_key = PyUnicode_InternFromString("size");
  counts_key = PyUnicode_InternFromString("counts");
  return size_key != nullptr && counts_key != nullptr;
}

}  // namespace pmvis

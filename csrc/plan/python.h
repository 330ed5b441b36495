// Small helpers for Python objects, held as bare pointers so that Python's collector sees every reference.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace rvsm {

namespace py = pybind11;

// Borrowed; null where the key is missing.
inline PyObject* get(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Replace an owned reference.
inline void reset(PyObject*& held, PyObject* value) {
  Py_XINCREF(value);
  PyObject* old = std::exchange(held, value);
  Py_XDECREF(old);
}

}  // namespace rvsm

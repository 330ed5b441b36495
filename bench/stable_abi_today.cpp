// For bench/stable_abi.py: looks at the tensors of parameters as csrc/plan/slot.cpp does, through torch's C++ classes
// and Python's own objects, and does nothing with them.
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <vector>

namespace {

std::vector<void*> table;  // the addresses of the last call

bool equal(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}

bool agree(const at::Tensor& t, const at::Tensor& w) {
  const c10::TensorImpl *x = t.unsafeGetTensorImpl(), *y = w.unsafeGetTensorImpl();
  return x->key_set() == y->key_set() && x->device() == y->device() && x->dtype() == y->dtype() &&
         equal(x->sizes(), y->sizes()) && equal(x->strides(), y->strides());
}

void* address_of(const at::Tensor& t) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  return static_cast<char*>(impl->unsafe_storage().mutable_data()) + impl->storage_offset() * int64_t(impl->itemsize());
}

// look(params, states, names): the dict of a parameter is states[param]; `names` are three of its keys. Counts a write
// to the parameter and to each state.
PyObject* look(PyObject*, PyObject* arguments) {
  PyObject *params, *states, *names;
  if (!PyArg_ParseTuple(arguments, "O!O!O!", &PyList_Type, &params, &PyDict_Type, &states, &PyTuple_Type, &names))
    return nullptr;
  table.clear();
  const Py_ssize_t count = PyList_GET_SIZE(params), wanted = PyTuple_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* param = PyList_GET_ITEM(params, i);
    PyObject* dict = PyDict_GetItemWithError(states, param);
    if (dict == nullptr || !PyDict_Check(dict)) return PyErr_Format(PyExc_ValueError, "a parameter without states");
    const at::Tensor& w = THPVariable_Unpack(param);
    const at::Tensor& g = w.grad();
    bool fits = g.defined() && agree(g, w);
    table.push_back(address_of(w));
    if (fits) table.push_back(address_of(g));
    PyObject *key, *value;
    for (Py_ssize_t at = 0; fits && PyDict_Next(dict, &at, &key, &value);)
      for (Py_ssize_t k = 0; fits && k < wanted; ++k) {
        if (key != PyTuple_GET_ITEM(names, k)) continue;
        fits = THPVariable_Check(value) && agree(THPVariable_Unpack(value), w);
        if (!fits) break;
        table.push_back(address_of(THPVariable_Unpack(value)));
        THPVariable_Unpack(value).unsafeGetTensorImpl()->bump_version();
      }
    if (!fits) return PyErr_Format(PyExc_ValueError, "tensors of one parameter do not agree");
    w.unsafeGetTensorImpl()->bump_version();
  }
  return PyLong_FromSize_t(table.size());
}

PyMethodDef methods[] = {{"look", look, METH_VARARGS, "How many addresses there are."}, {nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "stable_abi_today", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_stable_abi_today() { return PyModule_Create(&module); }

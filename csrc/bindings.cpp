// gapg._csrc: the numpy face of packing.h. Arguments are checked for shape here and for meaning in gapg/packing.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "packing.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<int64_t, py::array::c_style>;

template <typename T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
  return {array.data(), static_cast<size_t>(array.size())};
}

// Hands a vector's memory to numpy without a copy.
Int64s to_numpy(std::vector<int64_t>&& values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  const auto* raw = owned.get();
  py::capsule owner(owned.release(), [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return Int64s(static_cast<py::ssize_t>(raw->size()), raw->data(), owner);
}

std::pair<Int64s, Int64s> pack(const Int64s& lengths, int64_t cap, int64_t ranks) {
  const auto lengths_view = view(lengths, "lengths");
  gapg::Packing packing;
  {
    py::gil_scoped_release unlocked;
    packing = gapg::pack(lengths_view, cap, ranks);
  }
  return {to_numpy(std::move(packing.order)), to_numpy(std::move(packing.offsets))};
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  m.doc() = "Sequence packing in C++; use it through gapg.packing.";
  m.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("cap"), py::arg("ranks") = 1,
        "int64 lengths [n] -> (order int64 [n], offsets int64 [bins + 1]); ValueError on lengths outside 1..cap.");
}

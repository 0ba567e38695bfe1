// gapg._csrc: the numpy face of packing.h. Arguments are checked for shape here and for meaning in gapg/packing.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "packing.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<int64_t, py::array::c_style>;
using Int32s = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <typename T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
  return {array.data(), static_cast<size_t>(array.size())};
}

// A caller's buffer of exactly `size` elements, written through.
template <typename T>
std::span<T> buffer(py::array_t<T, py::array::c_style>& array, int64_t size, const char* name) {
  if (array.ndim() != 1 || array.size() != size) {
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(size) + "]");
  }
  return {array.mutable_data(), static_cast<size_t>(size)};
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

gapg::Sequences sequences(const Int64s& tokens, const Int64s& starts, const Int64s& prompts,
                          const Floats& coefficients) {
  return {view(tokens, "tokens"), view(starts, "starts"), view(prompts, "prompts"), view(coefficients, "coefficients")};
}

std::pair<int64_t, int64_t> measure(const Int64s& tokens, const Int64s& starts, const Int64s& prompts,
                                    const Floats& coefficients, const Int64s& members) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto chosen = view(members, "members");
  py::gil_scoped_release unlocked;
  const gapg::Sizes sizes = gapg::measure(all, chosen);
  return {sizes.tokens, sizes.responses};
}

void lay_out(const Int64s& tokens, const Int64s& starts, const Int64s& prompts, const Floats& coefficients,
             const Int64s& members, Int64s input_ids, Int64s position_ids, Int32s cu_seqlens, Int64s response_index,
             Int64s targets, Int64s sequence_ids, Floats response_coefficients) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto chosen = view(members, "members");
  const gapg::Sizes sizes = gapg::measure(all, chosen);
  const gapg::Layout out{buffer(input_ids, sizes.tokens, "input_ids"),
                         buffer(position_ids, sizes.tokens, "position_ids"),
                         buffer(cu_seqlens, static_cast<int64_t>(chosen.size()) + 1, "cu_seqlens"),
                         buffer(response_index, sizes.responses, "response_index"),
                         buffer(targets, sizes.responses, "targets"),
                         buffer(sequence_ids, sizes.responses, "sequence_ids"),
                         buffer(response_coefficients, sizes.responses, "response_coefficients")};
  py::gil_scoped_release unlocked;
  gapg::lay_out(all, chosen, out);
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  m.doc() = "Sequence packing in C++; use it through gapg.packing.";
  m.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("cap"), py::arg("ranks") = 1,
        "int64 lengths [n] -> (order int64 [n], offsets int64 [bins + 1]); ValueError on lengths outside 1..cap.");
  m.def("measure", &measure, py::arg("tokens").noconvert(), py::arg("starts").noconvert(),
        py::arg("prompts").noconvert(), py::arg("coefficients").noconvert(), py::arg("members").noconvert(),
        "The bin's (tokens T, response tokens R): the sizes of the buffers that lay_out fills.");
  m.def("lay_out", &lay_out, py::arg("tokens").noconvert(), py::arg("starts").noconvert(),
        py::arg("prompts").noconvert(), py::arg("coefficients").noconvert(), py::arg("members").noconvert(),
        py::arg("input_ids").noconvert(), py::arg("position_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
        py::arg("response_index").noconvert(), py::arg("targets").noconvert(), py::arg("sequence_ids").noconvert(),
        py::arg("response_coefficients").noconvert(),
        "Fills the caller's buffers with one bin's arrays; see gapg.packing.lay_out for shapes and meaning.");
}

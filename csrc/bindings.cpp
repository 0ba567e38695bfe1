// gapg._csrc: the numpy face of packing.h. Arguments are checked for shape here and for meaning in gapg/packing.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <tuple>
#include <utility>

#include "layout.h"
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

// Runs packer(order) without the GIL; it fills `order` [count] and returns the offsets.
template <typename Packer>
std::pair<Int64s, Int64s> packed(size_t count, const Packer& packer) {
  Int64s order(static_cast<py::ssize_t>(count));
  const std::span<int64_t> order_view{order.mutable_data(), count};
  std::vector<int64_t> offsets;
  {
    py::gil_scoped_release unlocked;
    offsets = packer(order_view);
  }
  return {std::move(order), to_numpy(std::move(offsets))};
}

std::pair<Int64s, Int64s> pack(const Int64s& lengths, int64_t cap, int64_t ranks, double linear, double quadratic) {
  const auto all = view(lengths, "lengths");
  return packed(all.size(), [&](std::span<int64_t> order) {
    return gapg::pack(all, cap, ranks, {linear, quadratic}, order);
  });
}

std::pair<Int64s, Int64s> pack_groups(const Int64s& lengths, const Int64s& prompts, const Int64s& groups, int64_t cap,
                                      int64_t ranks, double linear, double quadratic) {
  const auto all = view(lengths, "lengths"), shared = view(prompts, "prompts"), ids = view(groups, "groups");
  return packed(all.size(), [&](std::span<int64_t> order) {
    return gapg::pack_groups(all, shared, ids, cap, ranks, {linear, quadratic}, order);
  });
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

std::tuple<int64_t, int64_t, int64_t> measure_shared(const Int64s& tokens, const Int64s& starts, const Int64s& prompts,
                                                     const Floats& coefficients, const Int64s& groups,
                                                     const Int64s& members) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto groups_view = view(groups, "groups"), chosen = view(members, "members");
  py::gil_scoped_release unlocked;
  const gapg::SharedSizes sizes = gapg::measure_shared(all, groups_view, chosen);
  return {sizes.tokens, sizes.responses, sizes.prompts};
}

void lay_out_shared(const Int64s& tokens, const Int64s& starts, const Int64s& prompts, const Floats& coefficients,
                    const Int64s& groups, const Int64s& members, Int64s input_ids, Int64s position_ids,
                    Int32s cu_segments, Int32s cu_responses, Int64s response_index, Int64s targets, Int64s sequence_ids,
                    Floats response_coefficients) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto groups_view = view(groups, "groups"), chosen = view(members, "members");
  const gapg::SharedSizes sizes = gapg::measure_shared(all, groups_view, chosen);
  const auto segments = sizes.prompts + static_cast<int64_t>(chosen.size());
  const gapg::SharedLayout out{buffer(input_ids, sizes.tokens, "input_ids"),
                               buffer(position_ids, sizes.tokens, "position_ids"),
                               buffer(cu_segments, segments + 1, "cu_segments"),
                               buffer(cu_responses, sizes.prompts + 1, "cu_responses"),
                               buffer(response_index, sizes.responses, "response_index"),
                               buffer(targets, sizes.responses, "targets"),
                               buffer(sequence_ids, sizes.responses, "sequence_ids"),
                               buffer(response_coefficients, sizes.responses, "response_coefficients")};
  py::gil_scoped_release unlocked;
  gapg::lay_out_shared(all, groups_view, chosen, sizes.prompts, out);
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "Sequence packing in C++; use it through gapg.packing, which says what everything means.";
  const auto array = [](const char* name) { return arg(name).noconvert(); };
  m.def("pack", &pack, array("lengths"), arg("cap"), arg("ranks") = 1, arg("linear") = 1.0, arg("quadratic") = 0.0,
        "int64 lengths [n] -> (order int64 [n], offsets int64 [bins + 1]); ValueError on lengths outside 1..cap.");
  m.def("pack_groups", &pack_groups, array("lengths"), array("prompts"), array("groups"), arg("cap"), arg("ranks"),
        arg("linear"), arg("quadratic"), "pack, where sequences of one group share one copy of their prompt.");
  m.def("measure", &measure, array("tokens"), array("starts"), array("prompts"), array("coefficients"),
        array("members"), "The bin's (tokens T, response tokens R): the sizes of the buffers that lay_out fills.");
  m.def("lay_out", &lay_out, array("tokens"), array("starts"), array("prompts"), array("coefficients"),
        array("members"), array("input_ids"), array("position_ids"), array("cu_seqlens"), array("response_index"),
        array("targets"), array("sequence_ids"), array("response_coefficients"),
        "Fills the caller's buffers with one bin's arrays.");
  m.def("measure_shared", &measure_shared, array("tokens"), array("starts"), array("prompts"), array("coefficients"),
        array("groups"), array("members"), "measure where prompts are shared: (T, R, prompts P).");
  m.def("lay_out_shared", &lay_out_shared, array("tokens"), array("starts"), array("prompts"), array("coefficients"),
        array("groups"), array("members"), array("input_ids"), array("position_ids"), array("cu_segments"),
        array("cu_responses"), array("response_index"), array("targets"), array("sequence_ids"),
        array("response_coefficients"), "lay_out with one copy of each prompt.");
}

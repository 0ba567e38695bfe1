// gapg_packing._csrc: the numpy face of packing.h and layout.h. Whatever the arguments, and whatever other threads
// write to the arrays during a call, a call is right or raises; with arrays that change it may be right for neither
// state.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>

#include "layout.h"
#include "packing.h"

namespace py = pybind11;

namespace {

// Pointers into numpy's memory are only held with the GIL, under which no array can be resized. Values may change all
// the same: numpy and torch write without it.
template <typename T>
std::span<const T> view(const py::object& value, const char* name) {
  using Array = py::array_t<T, py::array::c_style>;
  if (Array::check_(value)) {
    const auto array = py::reinterpret_borrow<Array>(value);
    const bool aligned = array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (array.ndim() == 1 && aligned) return {array.data(), static_cast<size_t>(array.size())};
  }
  const auto dtype = py::str(py::dtype::of<T>()).template cast<std::string>();
  throw std::invalid_argument(std::string(name) + " must have one dimension and be an aligned, contiguous array of " +
                              dtype + ": numpy.require(" + name + ", '" + dtype + "', 'CA') makes one");
}

std::span<const int64_t> int64s(const py::object& value, const char* name) { return view<int64_t>(value, name); }

// Out of the reach of other threads, which may write to the array.
std::vector<int64_t> copied(const py::object& value, const char* name) {
  const auto all = int64s(value, name);
  return {all.begin(), all.end()};
}

// Any integer; one that is too large becomes the largest, which is out of every range here.
int64_t whole(const py::object& value) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  return overflow == 0 ? found : overflow > 0 ? INT64_MAX : INT64_MIN;
}

using Int64s = py::array_t<int64_t, py::array::c_style>;

// Runs packer(order) without the GIL: it finds the lengths in `order`, fills it and returns the offsets. So the lengths
// are a copy too, in memory that is needed anyway.
template <typename Packer>
std::pair<Int64s, Int64s> packed(std::span<const int64_t> lengths, const Packer& packer) {
  Int64s order(static_cast<py::ssize_t>(lengths.size()));
  const std::span<int64_t> order_view{order.mutable_data(), lengths.size()};
  std::ranges::copy(lengths, order_view.begin());
  std::vector<int64_t> offsets;
  {
    py::gil_scoped_release unlocked;
    offsets = packer(order_view);
  }
  return {std::move(order), Int64s(static_cast<py::ssize_t>(offsets.size()), offsets.data())};
}

std::pair<Int64s, Int64s> pack(const py::object& lengths, const py::object& cap, const py::object& ranks,
                               double linear, double quadratic) {
  const int64_t most = whole(cap), parts = whole(ranks);
  const gapg::Cost cost(linear, quadratic);
  return packed(int64s(lengths, "lengths"),
                [&](std::span<int64_t> order) { return gapg::pack(order, most, parts, cost, order); });
}

std::pair<Int64s, Int64s> pack_groups(const py::object& lengths, const py::object& prompts, const py::object& groups,
                                      const py::object& cap, const py::object& ranks, double linear,
                                      double quadratic) {
  const int64_t most = whole(cap), parts = whole(ranks);
  const gapg::Cost cost(linear, quadratic);
  const auto shared = copied(prompts, "prompts"), ids = copied(groups, "groups");
  return packed(int64s(lengths, "lengths"), [&](std::span<int64_t> order) {
    return gapg::pack_groups(order, shared, ids, most, parts, cost, order);
  });
}

// An array to return, and what it holds.
template <typename T>
std::span<T> added(py::list& arrays, int64_t size) {
  py::array_t<T> made(size);
  arrays.append(made);
  return {made.mutable_data(), static_cast<size_t>(size)};
}

py::tuple lay_out(const py::object& tokens, const py::object& starts, const py::object& prompts,
                  const py::object& coefficients, const py::object& members, const py::object& groups) {
  py::list made;
  const gapg::Sequences all{int64s(tokens, "tokens"), int64s(starts, "starts"), int64s(prompts, "prompts"),
                            view<float>(coefficients, "coefficients")};
  const auto ids = int64s(members, "members");
  const bool shared = !groups.is_none();
  const auto chosen = shared ? gapg::read_members(all, int64s(groups, "groups"), ids) : gapg::read_members(all, ids);
  const gapg::Sizes sizes = gapg::measure(all.tokens, chosen);
  const auto t = sizes.tokens, r = sizes.responses, segments = static_cast<int64_t>(chosen.size());
  // in the order of the braces
  const gapg::Layout out{added<int64_t>(made, t), added<int64_t>(made, t),
                         added<int32_t>(made, segments + (shared ? sizes.prompts : 0) + 1),
                         added<int64_t>(made, r), added<int64_t>(made, r), added<int64_t>(made, r),
                         added<float>(made, r)};
  if (shared) {
    gapg::lay_out_shared(all.tokens, chosen, out, added<int32_t>(made, sizes.prompts + 1));
  } else {
    gapg::lay_out(all.tokens, chosen, out);
  }
  return py::tuple(made);
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "Sequence packing in C++; use it through gapg_packing.pack, which says what everything means.";
  m.def("pack", &pack, arg("lengths"), arg("cap"), arg("ranks") = 1, arg("linear") = 1.0, arg("quadratic") = 0.0,
        "int64 lengths [n] -> (order int64 [n], offsets int64 [bins + 1]); ValueError on lengths outside 1..cap.");
  m.def("pack_groups", &pack_groups, arg("lengths"), arg("prompts"), arg("groups"), arg("cap"), arg("ranks"),
        arg("linear"), arg("quadratic"), "pack, where sequences of one group share one copy of their prompt.");
  m.def("lay_out", &lay_out, arg("tokens"), arg("starts"), arg("prompts"), arg("coefficients"), arg("members"),
        arg("groups") = py::none(), "One bin's arrays; with groups, those that share prompts, and cu_responses.");
}

// gapg_packing._csrc: the numpy face of packing.h and layout.h. Whatever the arguments, and whatever other threads write to the
// arrays during a call, a call is right or raises; with arrays that change it may be right for neither state.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "packing.h"

namespace py = pybind11;

namespace {

// Pointers into numpy's memory are only held with the GIL, under which no array can be resized. Values may change all
// the same: numpy and torch write without it.
template <typename T>
std::span<T> view(const py::object& value, const char* name) {
  using Array = py::array_t<std::remove_const_t<T>, py::array::c_style>;
  if (Array::check_(value)) {
    auto array = py::reinterpret_borrow<Array>(value);
    const bool aligned = array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (array.ndim() == 1 && aligned && (std::is_const_v<T> || array.writeable())) {
      return {const_cast<T*>(array.data()), static_cast<size_t>(array.size())};
    }
  }
  const auto dtype = py::str(py::dtype::of<std::remove_const_t<T>>()).template cast<std::string>();
  throw std::invalid_argument(std::string(name) + " must have one dimension and be an aligned, contiguous" +
                              (std::is_const_v<T> ? "" : ", writeable") + " array of " + dtype + ": numpy.require(" +
                              name + ", '" + dtype + "', 'CA" + (std::is_const_v<T> ? "" : "W") + "') makes one");
}

// The caller's buffer of exactly `size` elements.
template <typename T>
std::span<T> buffer(const py::object& value, int64_t size, const char* name) {
  const std::span<T> whole = view<T>(value, name);
  if (static_cast<int64_t>(whole.size()) != size) {
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(size) + "]");
  }
  return whole;
}

std::span<const int64_t> int64s(const py::object& value, const char* name) { return view<const int64_t>(value, name); }

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

// Hands a vector's memory to numpy without a copy.
Int64s to_numpy(std::vector<int64_t>&& values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  const auto* raw = owned.get();
  py::capsule owner(owned.release(), [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return Int64s(static_cast<py::ssize_t>(raw->size()), raw->data(), owner);
}

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
  return {std::move(order), to_numpy(std::move(offsets))};
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

gapg::Sequences sequences(const py::object& tokens, const py::object& starts, const py::object& prompts,
                          const py::object& coefficients) {
  return {int64s(tokens, "tokens"), int64s(starts, "starts"), int64s(prompts, "prompts"),
          view<const float>(coefficients, "coefficients")};
}

std::pair<int64_t, int64_t> measure(const py::object& tokens, const py::object& starts, const py::object& prompts,
                                    const py::object& coefficients, const py::object& members) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const gapg::Sizes sizes = gapg::measure(gapg::read_members(all, int64s(members, "members")));
  return {sizes.tokens, sizes.responses};
}

void lay_out(const py::object& tokens, const py::object& starts, const py::object& prompts,
             const py::object& coefficients, const py::object& members, const py::object& input_ids,
             const py::object& position_ids, const py::object& cu_seqlens, const py::object& response_index,
             const py::object& targets, const py::object& sequence_ids, const py::object& response_coefficients) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto chosen = gapg::read_members(all, int64s(members, "members"));
  const gapg::Sizes sizes = gapg::measure(chosen);
  gapg::lay_out(all.tokens, chosen,
                {buffer<int64_t>(input_ids, sizes.tokens, "input_ids"),
                 buffer<int64_t>(position_ids, sizes.tokens, "position_ids"),
                 buffer<int32_t>(cu_seqlens, static_cast<int64_t>(chosen.size()) + 1, "cu_seqlens"),
                 buffer<int64_t>(response_index, sizes.responses, "response_index"),
                 buffer<int64_t>(targets, sizes.responses, "targets"),
                 buffer<int64_t>(sequence_ids, sizes.responses, "sequence_ids"),
                 buffer<float>(response_coefficients, sizes.responses, "response_coefficients")});
}

std::tuple<int64_t, int64_t, int64_t> measure_shared(const py::object& tokens, const py::object& starts,
                                                     const py::object& prompts, const py::object& coefficients,
                                                     const py::object& groups, const py::object& members) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto chosen = gapg::read_members(all, int64s(groups, "groups"), int64s(members, "members"));
  const gapg::SharedSizes sizes = gapg::measure_shared(all.tokens, chosen);
  return {sizes.tokens, sizes.responses, sizes.prompts};
}

void lay_out_shared(const py::object& tokens, const py::object& starts, const py::object& prompts,
                    const py::object& coefficients, const py::object& groups, const py::object& members,
                    const py::object& input_ids, const py::object& position_ids, const py::object& cu_segments,
                    const py::object& cu_responses, const py::object& response_index, const py::object& targets,
                    const py::object& sequence_ids, const py::object& response_coefficients) {
  const auto all = sequences(tokens, starts, prompts, coefficients);
  const auto chosen = gapg::read_members(all, int64s(groups, "groups"), int64s(members, "members"));
  const gapg::SharedSizes sizes = gapg::measure_shared(all.tokens, chosen);
  const auto segments = sizes.prompts + static_cast<int64_t>(chosen.size());
  gapg::lay_out_shared(all.tokens, chosen, sizes.prompts,
                       {buffer<int64_t>(input_ids, sizes.tokens, "input_ids"),
                        buffer<int64_t>(position_ids, sizes.tokens, "position_ids"),
                        buffer<int32_t>(cu_segments, segments + 1, "cu_segments"),
                        buffer<int32_t>(cu_responses, sizes.prompts + 1, "cu_responses"),
                        buffer<int64_t>(response_index, sizes.responses, "response_index"),
                        buffer<int64_t>(targets, sizes.responses, "targets"),
                        buffer<int64_t>(sequence_ids, sizes.responses, "sequence_ids"),
                        buffer<float>(response_coefficients, sizes.responses, "response_coefficients")});
}

}  // namespace

PYBIND11_MODULE(_csrc, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "Sequence packing in C++; use it through gapg_packing.pack, which says what everything means.";
  m.def("pack", &pack, arg("lengths"), arg("cap"), arg("ranks") = 1, arg("linear") = 1.0, arg("quadratic") = 0.0,
        "int64 lengths [n] -> (order int64 [n], offsets int64 [bins + 1]); ValueError on lengths outside 1..cap.");
  m.def("pack_groups", &pack_groups, arg("lengths"), arg("prompts"), arg("groups"), arg("cap"), arg("ranks"),
        arg("linear"), arg("quadratic"), "pack, where sequences of one group share one copy of their prompt.");
  m.def("measure", &measure, arg("tokens"), arg("starts"), arg("prompts"), arg("coefficients"), arg("members"),
        "The bin's (tokens T, response tokens R): the sizes of the buffers that lay_out fills.");
  m.def("lay_out", &lay_out, arg("tokens"), arg("starts"), arg("prompts"), arg("coefficients"), arg("members"),
        arg("input_ids"), arg("position_ids"), arg("cu_seqlens"), arg("response_index"), arg("targets"),
        arg("sequence_ids"), arg("response_coefficients"),
        "Fills the caller's buffers, which overlap no other array, with one bin's arrays.");
  m.def("measure_shared", &measure_shared, arg("tokens"), arg("starts"), arg("prompts"), arg("coefficients"),
        arg("groups"), arg("members"), "measure where prompts are shared: (T, R, prompts P).");
  m.def("lay_out_shared", &lay_out_shared, arg("tokens"), arg("starts"), arg("prompts"), arg("coefficients"),
        arg("groups"), arg("members"), arg("input_ids"), arg("position_ids"), arg("cu_segments"), arg("cu_responses"),
        arg("response_index"), arg("targets"), arg("sequence_ids"), arg("response_coefficients"),
        "lay_out with one copy of each prompt.");
}

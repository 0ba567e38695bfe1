// Laying a bin of sequences out as the flat arrays that a packed forward and its loss need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace gapg {

// What is laid out: S sequences, back to back in `tokens`. Sequence s is tokens[starts[s] .. starts[s + 1]], its first
// prompts[s] tokens the prompt and the rest the response.
struct Sequences {
  std::span<const int64_t> tokens, starts, prompts;
  std::span<const float> coefficients;  // one per sequence
};

// The caller's buffers: T tokens and R response tokens in the bin, B sequences.
struct Layout {
  std::span<int64_t> input_ids, position_ids;                // [T]
  std::span<int32_t> cu_seqlens;                             // [B + 1]
  std::span<int64_t> response_index, targets, sequence_ids;  // [R]
  std::span<float> coefficients;                             // [R]
};

struct Sizes {
  int64_t tokens = 0, responses = 0;
};

// Throws std::invalid_argument, naming the sequence, unless s is one of 0..S-1, lies inside `tokens` and has a prompt
// of 1..length tokens.
inline void check_member(const Sequences& all, int64_t s) {
  if (s < 0 || s >= static_cast<int64_t>(all.prompts.size())) {
    throw std::invalid_argument("there is no sequence " + std::to_string(s));
  }
  const int64_t begin = all.starts[s], end = all.starts[s + 1];
  const std::string_view problem =
      begin < 0 || begin > end || end > static_cast<int64_t>(all.tokens.size()) ? "lies outside the tokens"
      : all.prompts[s] < 1                                                      ? "has no prompt token"
      : all.prompts[s] > end - begin ? "has a prompt longer than itself"
                                     : "";
  if (!problem.empty()) throw std::invalid_argument("sequence " + std::to_string(s) + " " + std::string(problem));
}

inline void check_shapes(const Sequences& all) {
  if (all.starts.size() != all.prompts.size() + 1 || all.coefficients.size() != all.prompts.size()) {
    throw std::invalid_argument("want one more start than prompt lengths, and as many coefficients");
  }
}

inline void check_tokens(int64_t tokens) {
  if (tokens > INT32_MAX) throw std::invalid_argument("a bin holds at most 2^31-1 tokens");
}

// T and R of a bin. Throws std::invalid_argument; where it does not, lay_out with buffers of these sizes stays inside
// every array.
inline Sizes measure(const Sequences& all, std::span<const int64_t> members) {
  check_shapes(all);
  Sizes sizes;
  for (const int64_t s : members) {
    check_member(all, s);
    const int64_t length = all.starts[s + 1] - all.starts[s];
    sizes.tokens += length;
    sizes.responses += length - all.prompts[s];
    check_tokens(sizes.tokens);
  }
  return sizes;
}

// Lays a bin's sequences end to end, in the order given. The hidden state at position p - 1 predicts the token at p, so
// a response token at p gets response_index p - 1; that is why a prompt needs at least one token. Call measure first.
inline void lay_out(const Sequences& all, std::span<const int64_t> members, const Layout& out) {
  int64_t position = 0, response = 0;
  out.cu_seqlens[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    const int64_t s = members[b];
    const int64_t length = all.starts[s + 1] - all.starts[s];
    const int64_t answered = length - all.prompts[s];
    const auto source = all.tokens.subspan(all.starts[s], length);
    std::ranges::copy(source, out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + length, int64_t{0});
    const auto first = out.response_index.begin() + response;
    std::iota(first, first + answered, position + all.prompts[s] - 1);
    std::ranges::copy(source.subspan(all.prompts[s]), out.targets.begin() + response);
    std::fill_n(out.sequence_ids.begin() + response, answered, s);
    std::fill_n(out.coefficients.begin() + response, answered, all.coefficients[s]);
    position += length;
    response += answered;
    out.cu_seqlens[b + 1] = static_cast<int32_t>(position);
  }
}

// As Layout, where prompts are shared: P prompts, then the B responses, in as many segments.
struct SharedLayout {
  std::span<int64_t> input_ids, position_ids;                // [T]
  std::span<int32_t> cu_segments;                            // [P + B + 1]
  std::span<int32_t> cu_responses;                           // [P + 1]
  std::span<int64_t> response_index, targets, sequence_ids;  // [R]
  std::span<float> coefficients;                             // [R]
};

struct SharedSizes {
  int64_t tokens = 0, responses = 0, prompts = 0;
};

// Whether members[b] has the prompt of the member before it: those that share one are adjacent.
inline bool shares_prompt(std::span<const int64_t> groups, std::span<const int64_t> members, size_t b) {
  return b > 0 && groups[members[b]] == groups[members[b - 1]];
}

// T, R and P of a bin. Throws as measure does, and where members that should share a prompt have different ones.
inline SharedSizes measure_shared(const Sequences& all, std::span<const int64_t> groups,
                                  std::span<const int64_t> members) {
  check_shapes(all);
  if (groups.size() != all.prompts.size()) throw std::invalid_argument("want as many groups as prompt lengths");
  SharedSizes sizes;
  for (size_t b = 0; b < members.size(); ++b) {
    const int64_t s = members[b];
    check_member(all, s);
    const int64_t prompt = all.prompts[s], answered = all.starts[s + 1] - all.starts[s] - prompt;
    if (shares_prompt(groups, members, b)) {
      const int64_t before = members[b - 1];
      if (!std::ranges::equal(all.tokens.subspan(all.starts[s], prompt),
                              all.tokens.subspan(all.starts[before], all.prompts[before]))) {
        throw std::invalid_argument("sequences " + std::to_string(before) + " and " + std::to_string(s) + " of group " +
                                    std::to_string(groups[s]) + " have different prompts");
      }
    } else {
      sizes.tokens += prompt;
      ++sizes.prompts;
    }
    sizes.tokens += answered;
    sizes.responses += answered;
    check_tokens(sizes.tokens);
  }
  return sizes;
}

// Lays a bin out with one copy of each prompt: first all prompts, then all responses, both in the members' order.
// A response's first token is predicted at its prompt's last position, the others one position before their own.
// Call measure_shared first.
inline void lay_out_shared(const Sequences& all, std::span<const int64_t> groups, std::span<const int64_t> members,
                           int64_t prompts, const SharedLayout& out) {
  int64_t position = 0, prompt = 0;
  out.cu_segments[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    if (shares_prompt(groups, members, b)) continue;
    const int64_t s = members[b], length = all.prompts[s];
    std::ranges::copy(all.tokens.subspan(all.starts[s], length), out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + length, int64_t{0});
    position += length;
    out.cu_segments[++prompt] = static_cast<int32_t>(position);
  }
  int64_t response = 0;
  prompt = 0;
  out.cu_responses[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    const int64_t s = members[b], length = all.prompts[s], answered = all.starts[s + 1] - all.starts[s] - length;
    if (!shares_prompt(groups, members, b)) ++prompt;
    const auto source = all.tokens.subspan(all.starts[s] + length, answered);
    std::ranges::copy(source, out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + answered, length);
    const auto index = out.response_index.begin() + response;
    std::iota(index, index + answered, position - 1);
    if (answered > 0) *index = out.cu_segments[prompt] - 1;
    std::ranges::copy(source, out.targets.begin() + response);
    std::fill_n(out.sequence_ids.begin() + response, answered, s);
    std::fill_n(out.coefficients.begin() + response, answered, all.coefficients[s]);
    position += answered;
    response += answered;
    out.cu_segments[prompts + 1 + static_cast<int64_t>(b)] = static_cast<int32_t>(position);
    out.cu_responses[prompt] = static_cast<int32_t>(response);
  }
}

}  // namespace gapg

// Laying a bin of sequences out as the flat arrays that a packed forward and its loss need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

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

// A sequence of the bin: all that is known of it but its tokens.
struct Member {
  int64_t sequence, start, length, prompt;  // prompt and response are `length` tokens, `prompt` of them the prompt
  float coefficient;
  int64_t group = 0;
};

// One read, even where another thread writes to the arrays meanwhile: what was checked is what is used.
template <typename T>
T read_once(std::span<const T> values, int64_t at) {
  return *static_cast<const volatile T*>(values.data() + at);
}

// Throws std::invalid_argument, naming the sequence, unless s is one of 0..S-1, lies inside `tokens` and has a prompt
// of 1..length tokens.
inline Member read_member(const Sequences& all, int64_t s) {
  if (s < 0 || s >= static_cast<int64_t>(all.prompts.size())) {
    throw std::invalid_argument("there is no sequence " + std::to_string(s));
  }
  const int64_t begin = read_once(all.starts, s), end = read_once(all.starts, s + 1);
  const int64_t prompt = read_once(all.prompts, s);
  const std::string_view problem =
      begin < 0 || begin > end || end > static_cast<int64_t>(all.tokens.size()) ? "lies outside the tokens"
      : prompt < 1                                                              ? "has no prompt token"
      : prompt > end - begin ? "has a prompt longer than itself"
                             : "";
  if (!problem.empty()) throw std::invalid_argument("sequence " + std::to_string(s) + " " + std::string(problem));
  return {s, begin, end - begin, prompt, all.coefficients[s]};
}

// The bin's sequences, in the order of `members`. Throws std::invalid_argument; where it does not, all of them lie
// inside `tokens`, whatever becomes of the other arrays.
inline std::vector<Member> read_members(const Sequences& all, std::span<const int64_t> members) {
  if (all.starts.size() != all.prompts.size() + 1 || all.coefficients.size() != all.prompts.size()) {
    throw std::invalid_argument("want one more start than prompt lengths, and as many coefficients");
  }
  std::vector<Member> read;
  read.reserve(members.size());
  for (size_t b = 0; b < members.size(); ++b) read.push_back(read_member(all, read_once(members, b)));
  return read;
}

// The same with their groups.
inline std::vector<Member> read_members(const Sequences& all, std::span<const int64_t> groups,
                                        std::span<const int64_t> members) {
  if (groups.size() != all.prompts.size()) throw std::invalid_argument("want as many groups as prompt lengths");
  std::vector<Member> read = read_members(all, members);
  for (Member& member : read) member.group = read_once(groups, member.sequence);
  return read;
}

inline void check_tokens(int64_t tokens) {
  if (tokens > INT32_MAX) throw std::invalid_argument("a bin holds at most 2^31-1 tokens");
}

// T and R of a bin. Throws std::invalid_argument on more than 2^31-1 tokens.
inline Sizes measure(std::span<const Member> members) {
  Sizes sizes;
  for (const Member& member : members) {
    sizes.tokens += member.length;
    sizes.responses += member.length - member.prompt;
    check_tokens(sizes.tokens);
  }
  return sizes;
}

// Lays a bin's sequences end to end, in the order given, into buffers of the sizes that measure says. The hidden state
// at position p - 1 predicts the token at p, so a response token at p gets response_index p - 1; that is why a prompt
// needs at least one token.
inline void lay_out(std::span<const int64_t> tokens, std::span<const Member> members, const Layout& out) {
  int64_t position = 0, response = 0;
  out.cu_seqlens[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    const Member& member = members[b];
    const int64_t length = member.length, answered = length - member.prompt;
    const auto source = tokens.subspan(member.start, length);
    std::ranges::copy(source, out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + length, int64_t{0});
    const auto first = out.response_index.begin() + response;
    std::iota(first, first + answered, position + member.prompt - 1);
    std::ranges::copy(source.subspan(member.prompt), out.targets.begin() + response);
    std::fill_n(out.sequence_ids.begin() + response, answered, member.sequence);
    std::fill_n(out.coefficients.begin() + response, answered, member.coefficient);
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
inline bool shares_prompt(std::span<const Member> members, size_t b) {
  return b > 0 && members[b].group == members[b - 1].group;
}

// T, R and P of a bin. Throws as measure does, and where members that should share a prompt have different ones.
inline SharedSizes measure_shared(std::span<const int64_t> tokens, std::span<const Member> members) {
  const auto prompt_of = [&](const Member& member) { return tokens.subspan(member.start, member.prompt); };
  SharedSizes sizes;
  for (size_t b = 0; b < members.size(); ++b) {
    const Member& member = members[b];
    if (shares_prompt(members, b)) {
      if (!std::ranges::equal(prompt_of(member), prompt_of(members[b - 1]))) {
        throw std::invalid_argument("sequences " + std::to_string(members[b - 1].sequence) + " and " +
                                    std::to_string(member.sequence) + " of group " + std::to_string(member.group) +
                                    " have different prompts");
      }
    } else {
      sizes.tokens += member.prompt;
      ++sizes.prompts;
    }
    sizes.tokens += member.length - member.prompt;
    sizes.responses += member.length - member.prompt;
    check_tokens(sizes.tokens);
  }
  return sizes;
}

// Lays a bin out with one copy of each of its `prompts` prompts: first all prompts, then all responses, both in the
// members' order, into buffers of the sizes that measure_shared says. A response's first token is predicted at its
// prompt's last position, the others one position before their own.
inline void lay_out_shared(std::span<const int64_t> tokens, std::span<const Member> members, int64_t prompts,
                           const SharedLayout& out) {
  int64_t position = 0, prompt = 0;
  out.cu_segments[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    if (shares_prompt(members, b)) continue;
    const int64_t length = members[b].prompt;
    std::ranges::copy(tokens.subspan(members[b].start, length), out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + length, int64_t{0});
    position += length;
    out.cu_segments[++prompt] = static_cast<int32_t>(position);
  }
  int64_t response = 0;
  prompt = 0;
  out.cu_responses[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    const Member& member = members[b];
    const int64_t answered = member.length - member.prompt;
    if (!shares_prompt(members, b)) ++prompt;
    const auto source = tokens.subspan(member.start + member.prompt, answered);
    std::ranges::copy(source, out.input_ids.begin() + position);
    std::iota(out.position_ids.begin() + position, out.position_ids.begin() + position + answered, member.prompt);
    const auto index = out.response_index.begin() + response;
    std::iota(index, index + answered, position - 1);
    if (answered > 0) *index = out.cu_segments[prompt] - 1;
    std::ranges::copy(source, out.targets.begin() + response);
    std::fill_n(out.sequence_ids.begin() + response, answered, member.sequence);
    std::fill_n(out.coefficients.begin() + response, answered, member.coefficient);
    position += answered;
    response += answered;
    out.cu_segments[prompts + 1 + static_cast<int64_t>(b)] = static_cast<int32_t>(position);
    out.cu_responses[prompt] = static_cast<int32_t>(response);
  }
}

}  // namespace gapg

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

// The caller's buffers: T tokens and R response tokens in the bin, S segments.
struct Layout {
  std::span<int64_t> input_ids, position_ids;                // [T]
  std::span<int32_t> cu_segments;                            // [S + 1]
  std::span<int64_t> response_index, targets, sequence_ids;  // [R]
  std::span<float> coefficients;                             // [R]
};

struct Sizes {
  int64_t tokens = 0, responses = 0, prompts = 0;
};

// A sequence of the bin: all that is known of it but its tokens.
struct Member {
  int64_t sequence, start, length, prompt;  // prompt and response are `length` tokens, `prompt` of them the prompt
  float coefficient;
  int64_t group;

  int64_t answered() const { return length - prompt; }
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
  return {s, begin, end - begin, prompt, all.coefficients[s], 0};
}

// The bin's sequences, in the order of `members`, each a group of its own. Throws std::invalid_argument; where it does
// not, all of them lie inside `tokens`, whatever becomes of the other arrays.
inline std::vector<Member> read_members(const Sequences& all, std::span<const int64_t> members) {
  if (all.starts.size() != all.prompts.size() + 1 || all.coefficients.size() != all.prompts.size()) {
    throw std::invalid_argument("want one more start than prompt lengths, and as many coefficients");
  }
  std::vector<Member> read;
  read.reserve(members.size());
  for (size_t b = 0; b < members.size(); ++b) {
    read.push_back(read_member(all, read_once(members, b)));
    read.back().group = static_cast<int64_t>(b);
  }
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

// Whether members[b] has the prompt of the member before it: those that share one are adjacent.
inline bool shares_prompt(std::span<const Member> members, size_t b) {
  return b > 0 && members[b].group == members[b - 1].group;
}

// A bin's tokens, response tokens and prompts. Throws std::invalid_argument on more than 2^31-1 tokens, and where
// members that should share a prompt have different ones.
inline Sizes measure(std::span<const int64_t> tokens, std::span<const Member> members) {
  const auto prompt_of = [&](const Member& member) { return tokens.subspan(member.start, member.prompt); };
  Sizes sizes;
  for (size_t b = 0; b < members.size(); ++b) {
    const Member& member = members[b];
    if (!shares_prompt(members, b)) {
      sizes.tokens += member.prompt;
      ++sizes.prompts;
    } else if (!std::ranges::equal(prompt_of(member), prompt_of(members[b - 1]))) {
      throw std::invalid_argument("sequences " + std::to_string(members[b - 1].sequence) + " and " +
                                  std::to_string(member.sequence) + " of group " + std::to_string(member.group) +
                                  " have different prompts");
    }
    sizes.tokens += member.answered();
    sizes.responses += member.answered();
    if (sizes.tokens > INT32_MAX) throw std::invalid_argument("a bin holds at most 2^31-1 tokens");
  }
  return sizes;
}

// Fills a layout from left to right.
class Writer {
 public:
  explicit Writer(const Layout& out) : out_(out) { out_.cu_segments[0] = 0; }

  // A segment of these tokens, the first of them at `position` of its sequence.
  void segment(std::span<const int64_t> tokens, int64_t position) {
    std::ranges::copy(tokens, out_.input_ids.begin() + tokens_);
    const auto first = out_.position_ids.begin() + tokens_;
    std::iota(first, first + static_cast<int64_t>(tokens.size()), position);
    tokens_ += static_cast<int64_t>(tokens.size());
    out_.cu_segments[++segments_] = static_cast<int32_t>(tokens_);
  }

  // A row for each token of the member's response, which ends the segment before. The hidden state at p - 1 predicts
  // the token at p; that is why a prompt needs at least one token.
  void rows(const Member& member, std::span<const int64_t> response) {
    const int64_t answered = member.answered();
    const auto index = out_.response_index.begin() + responses_;
    std::iota(index, index + answered, tokens_ - answered - 1);
    std::ranges::copy(response, out_.targets.begin() + responses_);
    std::fill_n(out_.sequence_ids.begin() + responses_, answered, member.sequence);
    std::fill_n(out_.coefficients.begin() + responses_, answered, member.coefficient);
    responses_ += answered;
  }

  int64_t responses() const { return responses_; }

 private:
  Layout out_;
  int64_t tokens_ = 0, segments_ = 0, responses_ = 0;
};

// Lays a bin's sequences end to end, in the order given, each a segment.
inline void lay_out(std::span<const int64_t> tokens, std::span<const Member> members, const Layout& out) {
  Writer writer(out);
  for (const Member& member : members) {
    const auto source = tokens.subspan(member.start, member.length);
    writer.segment(source, 0);
    writer.rows(member, source.subspan(member.prompt));
  }
}

// Lays a bin out with one copy of each of its P prompts: first all prompts, then all responses, both in the members'
// order, each a segment. A response's first token is predicted at its prompt's last position. cu_responses [P + 1]:
// the response tokens before each prompt's first.
inline void lay_out_shared(std::span<const int64_t> tokens, std::span<const Member> members, const Layout& out,
                           std::span<int32_t> cu_responses) {
  Writer writer(out);
  for (size_t b = 0; b < members.size(); ++b) {
    if (!shares_prompt(members, b)) writer.segment(tokens.subspan(members[b].start, members[b].prompt), 0);
  }
  int64_t prompt = 0;
  cu_responses[0] = 0;
  for (size_t b = 0; b < members.size(); ++b) {
    const Member& member = members[b];
    if (!shares_prompt(members, b)) ++prompt;
    const auto response = tokens.subspan(member.start + member.prompt, member.answered());
    const int64_t first = writer.responses();
    writer.segment(response, member.prompt);
    writer.rows(member, response);
    if (!response.empty()) out.response_index[first] = out.cu_segments[prompt] - 1;
    cu_responses[prompt] = static_cast<int32_t>(writer.responses());
  }
}

}  // namespace gapg

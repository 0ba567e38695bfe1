// Groups of sequences that share a prompt, as parts that fit the cap.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "best_fit.h"

namespace gapg {

// The modelled cost of a sequence of n tokens: linear * n + quadratic * n^2. Of a part of a group: the prompt's once,
// and of each response what it adds to the prompt's.
struct Cost {
  double linear = 1, quadratic = 0;

  Cost() = default;
  // Throws std::invalid_argument on weights that are no cost. The scale changes nothing, so no sum need overflow.
  Cost(double per_token, double per_square) {
    if (!std::isfinite(per_token) || !std::isfinite(per_square) || std::min(per_token, per_square) < 0 ||
        per_token + per_square == 0) {
      throw std::invalid_argument("linear and quadratic must be finite and at least 0, and one of them above 0");
    }
    const double largest = std::max(per_token, per_square);
    linear = per_token / largest, quadratic = per_square / largest;
  }

  double operator()(int64_t n) const {
    const auto tokens = static_cast<double>(n);
    return tokens * (linear + quadratic * tokens);
  }
};

struct Parts {
  std::vector<int64_t> tokens;            // [parts] prompt once, and the part's responses
  std::vector<int64_t> sequences, start;  // part p holds sequences[start[p] .. start[p + 1]]

  std::span<const int64_t> sequences_of(int64_t part) const {
    return std::span(sequences).subspan(start[part], start[part + 1] - start[part]);
  }
};

// Each sequence's group as a number 0, 1, … by first appearance, and how many groups there are.
inline std::pair<std::vector<int32_t>, int32_t> numbered(std::span<const int64_t> groups) {
  std::vector<int32_t> number(groups.size());
  std::unordered_map<int64_t, int32_t> known;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (i > 0 && groups[i] == groups[i - 1]) {
      number[i] = number[i - 1];
    } else {
      number[i] = known.try_emplace(groups[i], static_cast<int32_t>(known.size())).first->second;
    }
  }
  return {std::move(number), static_cast<int32_t>(known.size())};
}

// Throws std::invalid_argument, naming the sequence, unless each prompt lies in 1..length and is as long as the others
// of its group.
inline void check_prompts(std::span<const int64_t> lengths, std::span<const int64_t> prompts,
                          std::span<const int64_t> groups, std::span<const int32_t> number, int32_t count) {
  std::vector<size_t> first(count, SIZE_MAX);  // sequence of each group
  for (size_t i = 0; i < lengths.size(); ++i) {
    size_t& other = first[number[i]];
    if (other == SIZE_MAX) other = i;
    if (prompts[i] >= 1 && prompts[i] <= lengths[i] && prompts[i] == prompts[other]) continue;
    const auto text = [](auto n) { return std::to_string(n); };
    const std::string found = "sequence " + text(i) + " has a prompt of " + text(prompts[i]) + " tokens";
    if (prompts[i] < 1 || prompts[i] > lengths[i]) {
      throw std::invalid_argument(found + "; it must lie in 1.." + text(lengths[i]) + ", its length");
    }
    throw std::invalid_argument(found + ", but sequence " + text(other) + " of the same group (" + text(groups[i]) +
                                ") one of " + text(prompts[other]) + ": give different prompts different groups");
  }
}

// Every group as one part, or where prompt and responses are over the cap as parts found by best-fit decreasing of the
// responses under cap - prompt. No two parts of a group fit one bin: best fit opens a part for a response only when no
// open part holds it. O(n + cap).
inline Parts split_groups(const Items& items, std::span<const int64_t> lengths, std::span<const int64_t> prompts,
                          std::span<const int64_t> groups, int64_t cap) {
  const size_t n = items.count();
  const auto [number, count] = numbered(groups);
  check_prompts(lengths, prompts, groups, number, count);
  cap = std::min(cap, items.total());  // a cap above the sum changes nothing but the memory
  std::vector<int64_t> prompt(count, 0), total(count, 0), start(count + 1, 0);
  for (size_t k = 0; k < n; ++k) {
    const int64_t i = items.source(k);
    const int32_t g = number[i];
    prompt[g] = prompts[i];
    total[g] += items.size(k) - prompts[i];
    ++start[g + 1];
  }
  for (int32_t g = 0; g < count; ++g) start[g + 1] += start[g];
  const auto grouped = uninitialized<int32_t>(n);  // items by group, by decreasing length
  std::vector<int64_t> next = start;
  for (size_t k = 0; k < n; ++k) grouped[next[number[items.source(k)]]++] = static_cast<int32_t>(k);

  Parts parts{{}, std::vector<int64_t>(n), {0}};
  BestFit fit(cap, 0);
  std::vector<int32_t> part_of;
  for (int32_t g = 0; g < count; ++g) {
    const std::span<const int32_t> members{&grouped[start[g]], static_cast<size_t>(start[g + 1] - start[g])};
    const int64_t capacity = cap - prompt[g];
    const auto first = static_cast<int32_t>(parts.tokens.size());
    part_of.assign(members.size(), 0);
    if (total[g] > capacity) {
      for (size_t m = 0; m < members.size(); ++m) part_of[m] = fit.place(items.size(members[m]) - prompt[g], capacity);
      for (size_t b = 0; b < fit.count(); ++b) parts.tokens.push_back(cap - fit.room(b));
      fit.clear();
    } else {
      parts.tokens.push_back(prompt[g] + total[g]);
    }
    // within the group, a counting sort by part
    parts.start.resize(parts.tokens.size() + 1, 0);
    for (const int32_t part : part_of) ++parts.start[first + part + 1];
    for (size_t p = first; p < parts.tokens.size(); ++p) parts.start[p + 1] += parts.start[p];
    next.assign(parts.start.begin() + first, parts.start.end());
    for (size_t m = 0; m < members.size(); ++m) parts.sequences[next[part_of[m]]++] = items.source(members[m]);
  }
  return parts;
}

}  // namespace gapg

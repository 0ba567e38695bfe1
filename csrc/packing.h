// Packing sequences into bins under a hard token cap, each with its own prompt or with prompts shared in groups.
// Nothing in csrc but bindings.cpp knows Python or numpy, so all of it runs without the GIL.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "balance.h"
#include "best_fit.h"
#include "groups.h"

namespace gapg {

namespace detail {

inline void check_limits(size_t count, int64_t cap, int64_t ranks) {
  if (cap < 1 || cap > INT32_MAX) {
    throw std::invalid_argument("the token cap is " + std::to_string(cap) +
                                "; it must lie in 1..2^31-1 (set token_cap)");
  }
  if (ranks < 1 || ranks > 1 << 20) {
    throw std::invalid_argument("ranks is " + std::to_string(ranks) + "; it must lie in 1..2^20");
  }
  if (count > INT32_MAX) throw std::invalid_argument("pack at most 2^31-1 sequences at once");
}

// Names the first length that is not in 1..cap, and the fix.
[[noreturn]] inline void refuse_length(std::span<const int64_t> lengths, int64_t cap) {
  const auto wrong = std::ranges::find_if(lengths, [&](int64_t length) { return length < 1 || length > cap; });
  const std::string found = "sequence " + std::to_string(wrong - lengths.begin()) + " has " + std::to_string(*wrong) +
                            " tokens";
  if (*wrong < 1) throw std::invalid_argument(found + "; drop empty sequences before packing");
  throw std::invalid_argument(found + ", more than the cap of " + std::to_string(cap) +
                              ": raise token_cap or lower rollout.max_new_tokens");
}

// Throws std::invalid_argument unless every length lies in 1..cap.
inline Items sorted_items(std::span<const int64_t> lengths, int64_t cap) {
  int64_t smallest = 1, largest = 0;
  uint64_t total = 0;  // unsigned: it may wrap before a wrong length is noticed
  for (const int64_t length : lengths) {
    smallest = std::min(smallest, length);
    largest = std::max(largest, length);
    total += static_cast<uint64_t>(length);
  }
  if (smallest < 1 || largest > cap) refuse_length(lengths, cap);
  return Items(lengths, largest, static_cast<int64_t>(total));
}

// Bins by decreasing cost, ties by number; costs that a float cannot tell apart are ties.
inline std::vector<int32_t> by_decreasing_cost(const Items& items, std::span<const int32_t> bin_of,
                                               std::span<const int64_t> loads) {
  std::vector<uint32_t> rising(loads.begin(), loads.end());
  if (items.priced()) {
    std::vector<double> costs(loads.size(), 0);
    for (size_t k = 0; k < items.count(); ++k) costs[bin_of[k]] += items.cost(k);
    // floats of one sign order as their bits do
    std::ranges::transform(costs, rising.begin(), [](double cost) { return std::bit_cast<uint32_t>(float(cost)); });
  }
  const uint32_t largest = rising.empty() ? 0 : std::ranges::max(rising);
  const auto keyed = sorted_by_key(rising.size(), largest, [&](size_t b) { return largest - rising[b]; });
  std::vector<int32_t> order(rising.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(keyed[i] & 0xffffffff);
  return order;
}

// Packs items and writes the sequences they stand for, bin by bin, to `order`. sequences_of(k): those of item k.
template <typename SequencesOf>
std::vector<int64_t> pack_items(const Items& items, int64_t cap, int64_t ranks, const SequencesOf& sequences_of,
                                std::span<int64_t> order) {
  cap = std::max<int64_t>(std::min(cap, items.total()), 1);  // a cap above the sum changes nothing but the memory
  const auto memory = uninitialized<int32_t>(items.count());
  const std::span<int32_t> bin_of{memory.get(), items.count()};
  std::vector<int32_t> bins;
  if (ranks == 1) {
    bins = by_decreasing_cost(items, bin_of, fill_bins(items, cap, bin_of));
  } else {
    bins = Balancer(items, cap, ranks, bin_of).run();
  }
  std::vector<int64_t> cursor(bins.size(), 0), offsets(bins.size() + 1, 0);
  for (size_t k = 0; k < items.count(); ++k) cursor[bin_of[k]] += static_cast<int64_t>(sequences_of(k).size());
  for (size_t i = 0; i < bins.size(); ++i) {
    offsets[i + 1] = offsets[i] + cursor[bins[i]];
    cursor[bins[i]] = offsets[i];
  }
  for (size_t k = 0; k < items.count(); ++k) {
    int64_t& next = cursor[bin_of[k]];
    for (const int64_t sequence : sequences_of(k)) order[next++] = sequence;
  }
  return offsets;
}

}  // namespace detail

// Packs sequences into bins of at most `cap` tokens (hard), the number of bins divisible by `ranks`.
//
// Writes every sequence index once to `order` [n]; bin b is order[offsets[b] .. offsets[b + 1]], with the offsets that
// are returned. Sequences in a bin come by decreasing length, ties by index. With one rank, bins come by decreasing
// cost; with more, see Balancer. The same input gives the same output everywhere. O(n + cap) time and memory.
// Throws std::invalid_argument unless 1 <= every length <= cap < 2^31, n < 2^31 and 1 <= ranks <= 2^20. `order` is
// written last: it may be where the lengths are. Else the input must not change during the call.
inline std::vector<int64_t> pack(std::span<const int64_t> lengths, int64_t cap, int64_t ranks, const Cost& cost,
                                 std::span<int64_t> order) {
  detail::check_limits(lengths.size(), cap, ranks);
  Items items = detail::sorted_items(lengths, cap);
  if (cost.quadratic > 0) items.price([&](size_t k) { return cost(items.size(k)); });
  const auto itself = [&](size_t k) { return std::array<int64_t, 1>{items.source(k)}; };
  return detail::pack_items(items, cap, ranks, itself, order);
}

// The same for sequences that share prompts: those of one group are packed as one item of P + sum R tokens, or as few
// such parts as best-fit decreasing finds where that is over the cap, each with a copy of the prompt.
//
// lengths[i] counts prompt and response, prompts[i] the prompt. Parts in a bin come by decreasing tokens; a part's
// sequences are adjacent in `order`, by decreasing length, ties by index. O(n + cap).
// Throws std::invalid_argument as above, and unless 1 <= prompts[i] <= lengths[i], the same in the whole group.
inline std::vector<int64_t> pack_groups(std::span<const int64_t> lengths, std::span<const int64_t> prompts,
                                        std::span<const int64_t> groups, int64_t cap, int64_t ranks, const Cost& cost,
                                        std::span<int64_t> order) {
  detail::check_limits(lengths.size(), cap, ranks);
  if (prompts.size() != lengths.size() || groups.size() != lengths.size()) {
    throw std::invalid_argument(std::to_string(lengths.size()) + " lengths, but " + std::to_string(groups.size()) +
                                " groups and " + std::to_string(prompts.size()) + " prompt_lengths");
  }
  const Parts parts = split_groups(detail::sorted_items(lengths, cap), lengths, prompts, groups, cap);
  Items items = detail::sorted_items(parts.tokens, cap);
  if (cost.quadratic > 0) {
    items.price([&](size_t k) {
      const auto sequences = parts.sequences_of(items.source(k));
      const int64_t prompt = prompts[sequences.front()];
      double sum = cost(prompt);
      for (const int64_t sequence : sequences) sum += cost(lengths[sequence]) - cost(prompt);
      return sum;
    });
  }
  const auto sequences_of = [&](size_t k) { return parts.sequences_of(items.source(k)); };
  return detail::pack_items(items, cap, ranks, sequences_of, order);
}

}  // namespace gapg

// Packing sequences into bins under a hard token cap, and laying a bin out as flat arrays.
// Integers in, integers out: nothing here knows Python, numpy or torch, so all of it runs without the GIL.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace gapg {

// A set of the integers 0..limit that answers "smallest member >= x" by looking at one word, then at a summary that has
// one bit per non-empty word: a few instructions for caps up to 2^18, cap / 4096 words at worst.
class CapacitySet {
 public:
  explicit CapacitySet(int64_t limit) : words_(limit / 64 + 1, 0), summary_(words_.size() / 64 + 1, 0) {}

  void insert(int64_t x) {
    words_[x >> 6] |= bit(x);
    summary_[x >> 12] |= bit(x >> 6);
  }

  void erase(int64_t x) {
    words_[x >> 6] &= ~bit(x);
    if (words_[x >> 6] == 0) summary_[x >> 12] &= ~bit(x >> 6);
  }

  // The smallest member >= x, or -1. Requires 0 <= x <= limit.
  int64_t at_least(int64_t x) const {
    const uint64_t here = words_[x >> 6] & from(x);
    if (here != 0) return (x & ~int64_t{63}) + std::countr_zero(here);
    const int64_t next_word = (x >> 6) + 1;
    for (size_t s = next_word >> 6; s < summary_.size(); ++s) {
      const bool first = s == static_cast<size_t>(next_word >> 6);
      const uint64_t filled = first ? summary_[s] & from(next_word) : summary_[s];
      if (filled == 0) continue;
      const int64_t word = static_cast<int64_t>(s) * 64 + std::countr_zero(filled);
      return word * 64 + std::countr_zero(words_[word]);
    }
    return -1;
  }

 private:
  static uint64_t bit(int64_t x) { return uint64_t{1} << (x & 63); }
  static uint64_t from(int64_t x) { return ~uint64_t{0} << (x & 63); }

  std::vector<uint64_t> words_, summary_;
};

// order[offsets[b] .. offsets[b + 1]] are the sequences of bin b.
struct Packing {
  std::vector<int64_t> order, offsets;
};

// Indices by decreasing key, equal keys by increasing index. Keys lie in 0..limit. O(n + limit).
inline std::vector<int32_t> sorted_decreasing(std::span<const int64_t> keys, int64_t limit) {
  std::vector<int32_t> start(limit + 2, 0);
  for (const int64_t key : keys) ++start[limit - key + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<int32_t> order(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) order[start[limit - keys[i]]++] = static_cast<int32_t>(i);
  return order;
}

// Best-fit decreasing: every sequence, longest first, into the fullest bin that still holds it.
// Writes each sequence's bin and returns the number of bins. Bins with equal room form a chain (last in, first out).
inline int32_t best_fit(std::span<const int64_t> lengths, std::span<const int32_t> decreasing, int64_t cap,
                        std::span<int32_t> bin_of) {
  CapacitySet rooms(cap);
  std::vector<int32_t> head(cap + 1, -1), next;
  const int64_t shortest = decreasing.empty() ? 0 : lengths[decreasing.back()];
  for (const int32_t sequence : decreasing) {
    const int64_t length = lengths[sequence];
    int64_t room = rooms.at_least(length);
    int32_t bin;
    if (room < 0) {
      bin = static_cast<int32_t>(next.size());
      next.push_back(-1);
      room = cap;
    } else {
      bin = head[room];
      head[room] = next[bin];
      if (head[room] < 0) rooms.erase(room);
    }
    bin_of[sequence] = bin;
    room -= length;
    if (room < shortest) continue;  // nothing fits any more
    if (head[room] < 0) rooms.insert(room);
    next[bin] = head[room];
    head[room] = bin;
  }
  return static_cast<int32_t>(next.size());
}

// Bins as lists of sequences with their loads, for the few operations that are not on the hot path.
struct Bins {
  std::vector<int64_t> load, count;
  std::span<int32_t> bin_of;

  void move(int32_t sequence, int64_t length, int32_t to) {
    const int32_t from = bin_of[sequence];
    load[from] -= length, --count[from];
    load[to] += length, ++count[to];
    bin_of[sequence] = to;
  }
};

// Opens bins until their number divides by `ranks`: the fullest bin with at least two sequences gives every second one
// to a new bin; empty bins are opened only when every bin is down to one sequence. O(ranks * n) at worst.
inline void make_divisible(Bins& bins, std::span<const int64_t> lengths, std::span<const int32_t> decreasing,
                           int64_t ranks) {
  while (bins.load.size() % ranks != 0) {
    int32_t fullest = -1;
    for (size_t b = 0; b < bins.load.size(); ++b) {
      if (bins.count[b] > 1 && (fullest < 0 || bins.load[b] > bins.load[fullest])) fullest = static_cast<int32_t>(b);
    }
    const auto opened = static_cast<int32_t>(bins.load.size());
    bins.load.push_back(0);
    bins.count.push_back(0);
    if (fullest < 0) continue;
    bool moves = false;
    for (const int32_t sequence : decreasing) {
      if (bins.bin_of[sequence] != fullest) continue;
      if (moves) bins.move(sequence, lengths[sequence], opened);
      moves = !moves;
    }
  }
}

// Packs sequences into bins of at most `cap` tokens (hard), the number of bins divisible by `ranks`.
// Bins come by decreasing load, sequences in a bin by decreasing length, ties by index: the same input gives the same
// output everywhere. O(n + cap) time and memory (plus make_divisible, when ranks > 1).
// Throws std::invalid_argument unless 1 <= every length <= cap < 2^31, n < 2^31 and ranks >= 1.
inline Packing pack(std::span<const int64_t> lengths, int64_t cap, int64_t ranks) {
  constexpr int64_t most = INT32_MAX;
  if (cap < 1 || cap > most) throw std::invalid_argument("cap must lie in 1..2^31-1");
  if (ranks < 1 || ranks > most) throw std::invalid_argument("ranks must lie in 1..2^31-1");
  if (lengths.size() > static_cast<size_t>(most)) throw std::invalid_argument("at most 2^31-1 sequences");
  int64_t total = 0, longest = 0;
  for (const int64_t length : lengths) {
    if (length < 1 || length > cap) throw std::invalid_argument("every length must lie in 1..cap");
    total = std::min(cap, total + length);
    longest = std::max(longest, length);
  }
  cap = std::max<int64_t>(total, 1);  // a cap above the sum changes nothing but the memory

  const std::vector<int32_t> decreasing = sorted_decreasing(lengths, longest);
  std::vector<int32_t> bin_of(lengths.size());
  const int32_t filled = best_fit(lengths, decreasing, cap, bin_of);
  Bins bins{std::vector<int64_t>(filled, 0), std::vector<int64_t>(filled, 0), bin_of};
  for (size_t i = 0; i < lengths.size(); ++i) bins.load[bin_of[i]] += lengths[i], ++bins.count[bin_of[i]];
  make_divisible(bins, lengths, decreasing, ranks);

  const std::vector<int32_t> by_load = sorted_decreasing(bins.load, cap);
  Packing packing{std::vector<int64_t>(lengths.size()), std::vector<int64_t>(by_load.size() + 1, 0)};
  std::vector<int64_t> cursor(by_load.size());
  for (size_t rank = 0; rank < by_load.size(); ++rank) {
    cursor[by_load[rank]] = packing.offsets[rank];
    packing.offsets[rank + 1] = packing.offsets[rank] + bins.count[by_load[rank]];
  }
  for (const int32_t sequence : decreasing) packing.order[cursor[bin_of[sequence]]++] = sequence;
  return packing;
}

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

// T and R of a bin. Throws std::invalid_argument on members outside 0..S-1, starts that leave `tokens` or decrease, and
// prompts outside 1..length: after this check, lay_out with buffers of these sizes stays inside every array.
inline Sizes measure(const Sequences& all, std::span<const int64_t> members) {
  const auto count = static_cast<int64_t>(all.prompts.size());
  if (static_cast<int64_t>(all.starts.size()) != count + 1 || static_cast<int64_t>(all.coefficients.size()) != count) {
    throw std::invalid_argument("want one more start than prompt lengths, and as many coefficients");
  }
  Sizes sizes;
  for (const int64_t s : members) {
    if (s < 0 || s >= count) throw std::invalid_argument("there is no sequence " + std::to_string(s));
    const int64_t begin = all.starts[s], end = all.starts[s + 1];
    const std::string_view problem =
        begin < 0 || begin > end || end > static_cast<int64_t>(all.tokens.size()) ? "lies outside the tokens"
        : all.prompts[s] < 1                                                      ? "has no prompt token"
        : all.prompts[s] > end - begin ? "has a prompt longer than itself"
                                       : "";
    if (!problem.empty()) throw std::invalid_argument("sequence " + std::to_string(s) + " " + std::string(problem));
    sizes.tokens += end - begin;
    sizes.responses += end - begin - all.prompts[s];
    if (sizes.tokens > INT32_MAX) throw std::invalid_argument("a bin holds at most 2^31-1 tokens");
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

}  // namespace gapg

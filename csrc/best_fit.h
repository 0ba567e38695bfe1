// Best-fit decreasing in linear time: a radix sort by size, then for each size the smallest room that holds it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace gapg {

// Memory that is written before it is read: at these sizes zeroing would cost as much as a pass of the sort.
template <typename T>
std::unique_ptr<T[]> uninitialized(size_t count) {
  return std::make_unique_for_overwrite<T[]>(count);
}

// The indices 0..count-1 in the low 32 bits, by increasing key(i), which stays in the high 32; ties by index.
// Keys lie in 0..largest < 2^31. A radix sort whose digits widen with the count, so most lengths take one pass.
template <typename Key>
std::unique_ptr<uint64_t[]> sorted_by_key(size_t count, uint64_t largest, const Key& key) {
  const int bits = std::max(1, static_cast<int>(std::bit_width(largest)));
  const int widest = std::clamp(static_cast<int>(std::bit_width(count)) + 1, 8, 16);
  const int passes = (bits + widest - 1) / widest, digit = (bits + passes - 1) / passes;
  const size_t buckets = size_t{1} << digit;
  std::vector<uint32_t> starts(passes * buckets);
  for (size_t i = 0; i < count; ++i) {
    uint64_t rest = key(i);
    for (int pass = 0; pass < passes; ++pass, rest >>= digit) ++starts[pass * buckets + (rest & (buckets - 1))];
  }
  auto to = uninitialized<uint64_t>(count), from = uninitialized<uint64_t>(passes > 1 ? count : 0);
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::span(starts).subspan(pass * buckets, buckets);
    uint32_t sum = 0;
    for (uint32_t& bucket : start) sum += std::exchange(bucket, sum);
    const auto distribute = [&](const auto& value) {
      const int shift = 32 + pass * digit;
      for (size_t i = 0; i < count; ++i) to[start[value(i) >> shift & (buckets - 1)]++] = value(i);
    };
    if (pass == 0) {
      distribute([&](size_t i) { return static_cast<uint64_t>(key(i)) << 32 | i; });
    } else {
      std::swap(from, to);
      distribute([&](size_t i) { return from[i]; });
    }
  }
  return to;
}

// What is packed, numbered by decreasing size; source(k) is the index it had. An item without costs costs its size.
class Items {
 public:
  // Values lie in 1..largest < 2^31, `total` is their sum.
  Items(std::span<const int64_t> values, int64_t largest, int64_t total)
      : total_(total), largest_(largest), count_(values.size()) {
    keyed_ = sorted_by_key(count_, largest, [&](size_t i) { return largest - values[i]; });
  }

  size_t count() const { return count_; }
  int64_t total() const { return total_; }
  int64_t longest() const { return count_ == 0 ? 0 : size(0); }
  int64_t shortest() const { return count_ == 0 ? 0 : size(count_ - 1); }
  int64_t size(size_t k) const { return largest_ - static_cast<int64_t>(keyed_[k] >> 32); }
  int64_t source(size_t k) const { return static_cast<int64_t>(keyed_[k] & 0xffffffff); }

  bool priced() const { return !costs_.empty(); }
  double cost(size_t k) const { return priced() ? costs_[k] : static_cast<double>(size(k)); }
  template <typename CostOf>
  void price(const CostOf& cost_of) {
    costs_.resize(count_);
    for (size_t k = 0; k < count_; ++k) costs_[k] = cost_of(k);
  }

 private:
  int64_t total_, largest_;
  size_t count_;
  std::unique_ptr<uint64_t[]> keyed_;
  std::vector<double> costs_;
};

// A set of the integers 0..limit that answers "smallest member >= x" by looking at one word, then at a summary that has
// one bit per non-empty word: a few instructions for caps up to 2^18, cap / 4096 words at worst.
class CapacitySet {
 public:
  explicit CapacitySet(int64_t limit) : words_(limit / 64 + 1, 0), summary_(words_.size() / 64 + 1, 0) {}

  bool contains(int64_t x) const { return (words_[x >> 6] & bit(x)) != 0; }

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
    auto s = static_cast<size_t>(next_word >> 6);
    uint64_t filled = s < summary_.size() ? summary_[s] & from(next_word) : 0;
    while (filled == 0) {
      if (++s >= summary_.size()) return -1;
      filled = summary_[s];
    }
    const int64_t word = static_cast<int64_t>(s) * 64 + std::countr_zero(filled);
    return word * 64 + std::countr_zero(words_[word]);
  }

 private:
  static uint64_t bit(int64_t x) { return uint64_t{1} << (x & 63); }
  static uint64_t from(int64_t x) { return ~uint64_t{0} << (x & 63); }

  std::vector<uint64_t> words_, summary_;
};

// Puts sizes into bins, each into the fullest bin that still holds it. Bins of equal room form a chain, last in first
// out, so the same sizes in the same order always land in the same bins.
class BestFit {
 public:
  // `cap`: the largest capacity that place() will name. `shortest`: the smallest size; a bin with less room is closed.
  BestFit(int64_t cap, int64_t shortest) : shortest_(shortest), rooms_(cap), head_(uninitialized<int32_t>(cap + 1)) {}

  // The bin that `size` went into; a bin opened for it holds `capacity`.
  //
  // The bin of the call before is held out of the set: sizes that follow each other often go into the same bin, equal
  // ones always do while it has room, and then nothing is searched.
  int32_t place(int64_t size, int64_t capacity) {
    if (size != last_ || size > room_) choose(size, capacity);
    last_ = size;
    room_ -= size;
    bins_[held_].room = static_cast<int32_t>(room_);
    return held_;
  }

  // How many bins there are, and how much room bin b has left.
  size_t count() const { return bins_.size(); }
  int64_t room(size_t b) const { return bins_[b].room; }

  // Forgets all bins, in time linear in their number.
  void clear() {
    for (const Bin& bin : bins_) rooms_.erase(bin.room);
    bins_.clear();
    held_ = -1, room_ = -1, last_ = -1;
  }

 private:
  struct Bin {
    int32_t room, next;
  };

  void choose(int64_t size, int64_t capacity) {
    const int64_t room = rooms_.at_least(size);
    if (size <= room_ && (room < 0 || room_ <= room)) return;
    if (room_ >= shortest_) {
      bins_[held_].next = rooms_.contains(room_) ? head_[room_] : -1;
      rooms_.insert(room_);
      head_[room_] = held_;
    }
    if (room < 0) {
      held_ = static_cast<int32_t>(bins_.size());
      bins_.push_back({});
      room_ = capacity;
    } else {
      held_ = head_[room];
      head_[room] = bins_[held_].next;
      if (head_[room] < 0) rooms_.erase(room);
      room_ = room;
    }
  }

  int64_t shortest_;
  int64_t room_ = -1, last_ = -1;  // the held bin's room, and the size it got last
  int32_t held_ = -1;
  CapacitySet rooms_;                // of the bins that are neither closed nor held
  std::unique_ptr<int32_t[]> head_;  // by room; valid where rooms_ has that room
  std::vector<Bin> bins_;
};

// Best-fit decreasing: writes each item's bin and returns the bins' loads. Items must fit the cap.
inline std::vector<int64_t> fill_bins(const Items& items, int64_t cap, std::span<int32_t> bin_of) {
  BestFit fit(cap, items.shortest());
  for (size_t k = 0; k < items.count(); ++k) bin_of[k] = fit.place(items.size(k), cap);
  std::vector<int64_t> loads(fit.count());
  for (size_t b = 0; b < loads.size(); ++b) loads[b] = cap - fit.room(b);
  return loads;
}

}  // namespace gapg

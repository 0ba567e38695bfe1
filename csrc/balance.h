// Bins to ranks: a number of bins that divides by the ranks, every rank the same number, at nearly the same cost.
#pragma once

#include <numeric>

#include "best_fit.h"

namespace gapg {

// Packs, deals the bins to ranks, then trades bins and items between ranks until the dearest is within `tolerance` of
// the mean, or no trade helps, or the budget is spent: O(n), sorting aside. Ties go to the lower number.
class Balancer {
 public:
  Balancer(const Items& items, int64_t cap, int64_t ranks, std::span<int32_t> bin_of)
      : items_(items), cap_(cap), ranks_(static_cast<size_t>(ranks)), bin_of_(bin_of) {}

  // Writes bin_of and returns the bins in an order in which [p * ranks, (p + 1) * ranks) are the ranks' p-th bins.
  std::vector<int32_t> run() {
    const size_t fewest = divisible(static_cast<size_t>((items_.total() + cap_ - 1) / cap_));
    if (!level(fewest)) {
      load_ = fill_bins(items_, cap_, bin_of_);
      if (divisible(load_.size()) > fewest) level(divisible(load_.size()));
    }
    gather();
    split();
    deal();
    trade();
    return by_position();
  }

 private:
  using List = std::vector<int32_t>;
  static constexpr double tolerance = 1e-3;
  static constexpr size_t looks_per_item = 64;  // the budget of trade()

  size_t divisible(size_t bins) const { return (bins + ranks_ - 1) / ranks_ * ranks_; }

  // Packs under the smallest of a few lowered caps that needs at most so many bins: then all are about equally full,
  // instead of full ones and a few that are split or nearly empty. Changes nothing where none of them does.
  bool level(size_t most) {
    if (items_.count() < most || most == 0) return false;
    const auto trial = uninitialized<int32_t>(items_.count());
    const auto bins = static_cast<int64_t>(most);
    const int64_t even = (items_.total() + bins - 1) / bins;
    for (const int64_t half_bins : {1, 2, 4}) {
      const int64_t cap = std::max(items_.longest(), even + even * half_bins / (2 * bins) + 1);
      if (cap >= cap_) return false;
      std::vector<int64_t> loads = fill_bins(items_, cap, {trial.get(), items_.count()});
      if (loads.size() > most) continue;
      load_ = std::move(loads);
      std::copy_n(trial.get(), items_.count(), bin_of_.begin());
      return true;
    }
    return false;
  }

  // Rising values, ties by number.
  static auto by(const std::vector<double>& values) {
    return [&values](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] < values[b] : a < b; };
  }

  void gather() {
    members_.resize(load_.size());
    for (size_t k = 0; k < items_.count(); ++k) members_[bin_of_[k]].push_back(static_cast<int32_t>(k));
  }

  // The fullest bin with at least two items gives every second one to a new bin, until the number divides. Empty bins
  // are opened only when every bin is down to one item.
  void split() {
    const size_t bins = divisible(load_.size());
    const auto emptier = [this](int32_t a, int32_t b) { return load_[a] != load_[b] ? load_[a] < load_[b] : a > b; };
    List heap;
    for (size_t b = 0; b < load_.size() && load_.size() < bins; ++b) {
      if (members_[b].size() > 1) heap.push_back(static_cast<int32_t>(b));
    }
    std::ranges::make_heap(heap, emptier);
    while (load_.size() < bins) {
      const auto opened = static_cast<int32_t>(load_.size());
      load_.push_back(0);
      members_.emplace_back();
      if (heap.empty()) continue;
      std::ranges::pop_heap(heap, emptier);
      const int32_t fullest = heap.back();
      heap.pop_back();
      const List all = std::exchange(members_[fullest], {});
      load_[fullest] = 0;
      for (size_t i = 0; i < all.size(); ++i) {
        const int32_t bin = i % 2 == 0 ? fullest : opened;
        bin_of_[all[i]] = bin;
        members_[bin].push_back(all[i]);
        load_[bin] += items_.size(all[i]);
      }
      for (const int32_t bin : {fullest, opened}) {
        if (members_[bin].size() < 2) continue;
        heap.push_back(bin);
        std::ranges::push_heap(heap, emptier);
      }
    }
  }

  // Rows of `ranks` bins of neighbouring cost; row by row, the widest first, the dearest bin goes to the cheapest rank.
  void deal() {
    cost_.assign(load_.size(), 0);
    for (size_t b = 0; b < cost_.size(); ++b) {
      for (const int32_t item : members_[b]) cost_[b] += items_.cost(item);
    }
    List bins(cost_.size());
    std::iota(bins.begin(), bins.end(), 0);
    sort_by_cost(bins);
    const size_t rows = bins.size() / ranks_;
    std::vector<size_t> widest(rows);
    std::iota(widest.begin(), widest.end(), size_t{0});
    const auto width = [&](size_t row) { return cost_[bins[row * ranks_]] - cost_[bins[(row + 1) * ranks_ - 1]]; };
    std::ranges::stable_sort(widest, [&](size_t a, size_t b) { return width(a) > width(b); });
    rank_bins_.assign(ranks_, {});
    total_.assign(ranks_, 0);
    List cheapest(ranks_);
    std::iota(cheapest.begin(), cheapest.end(), 0);
    for (const size_t row : widest) {
      std::ranges::sort(cheapest, by(total_));
      for (size_t i = 0; i < ranks_; ++i) {
        const int32_t bin = bins[row * ranks_ + i];
        rank_bins_[cheapest[i]].push_back(bin);
        total_[cheapest[i]] += cost_[bin];
      }
    }
  }

  struct Trade {
    double gain = 0;               // how far the dearer of the two ranks comes down
    double moved = 0;              // the cost that changes hands
    int32_t give = -1, take = -1;  // bins or items; take may be -1: nothing in return
    int32_t emptiest = -1;         // where a gift without return goes
    bool bins = false;
  };

  // The dearest rank trades with the cheapest rank it can, until it is near the mean or nobody can help. Every trade
  // lowers the dearer of its two ranks.
  void trade() {
    const double mean = std::accumulate(total_.begin(), total_.end(), 0.0) / static_cast<double>(ranks_);
    List cheapest(ranks_);
    std::iota(cheapest.begin(), cheapest.end(), 0);
    for (auto left = static_cast<int64_t>(looks_per_item * (items_.count() + ranks_)); left > 0;) {
      std::ranges::sort(cheapest, by(total_));
      left -= static_cast<int64_t>(ranks_);
      const int32_t giver = cheapest.back();
      const double excess = total_[giver] - mean;
      if (excess <= mean * tolerance) return;
      Trade best;
      int32_t with = -1;
      for (size_t i = 0; i + 1 < ranks_ && best.gain < excess / 2; ++i) {
        const int32_t taker = cheapest[i];
        const double gap = total_[giver] - total_[taker];
        if (gap / 2 <= best.gain) break;
        Trade found = best_item_trade(giver, taker, gap);
        if (found.gain < excess / 2) {  // bins of unlike cost at the same position are the price of trading bins
          const Trade of_bins = best_bin_trade(giver, taker, gap);
          if (of_bins.gain > found.gain) found = of_bins;
        }
        if (found.gain > best.gain) best = found, with = taker;
        left -= static_cast<int64_t>(items_.count() / ranks_);
      }
      if (best.gain <= excess * 1e-2) return;
      apply(best, giver, with);
    }
  }

  // For each bin of the giver, the taker's bins that make up half the gap best.
  Trade best_bin_trade(int32_t giver, int32_t taker, double gap) {
    Trade best{.bins = true};
    List offers = rank_bins_[taker];
    sort_by_cost(offers);
    for (const int32_t give : rank_bins_[giver]) {
      const double ideal = cost_[give] - gap / 2;
      const auto half = std::ranges::partition_point(offers, [&](int32_t bin) { return cost_[bin] >= ideal; });
      for (const int32_t take : around(offers, half, 1)) {
        const double moved = cost_[give] - cost_[take], gain = std::min(moved, gap - moved);
        if (gain > best.gain) best = {gain, moved, give, take, -1, true};
      }
    }
    return best;
  }

  // At most `reach` values on either side of `middle`.
  static std::span<const int32_t> around(const List& values, List::const_iterator middle, ptrdiff_t reach) {
    return {middle - std::min(reach, middle - values.begin()), middle + std::min(reach, values.end() - middle)};
  }

  // The same for items, where both bins must keep the cap: the few best partners on either side are tried.
  Trade best_item_trade(int32_t giver, int32_t taker, double gap) {
    Trade best;
    List offers;
    for (const int32_t bin : rank_bins_[taker]) offers.insert(offers.end(), members_[bin].begin(), members_[bin].end());
    std::ranges::sort(offers, [&](int32_t a, int32_t b) {
      return items_.cost(a) != items_.cost(b) ? items_.cost(a) > items_.cost(b) : a < b;
    });
    const int32_t emptiest = *std::ranges::min_element(rank_bins_[taker], {}, [&](int32_t bin) { return load_[bin]; });
    for (const int32_t bin : rank_bins_[giver]) {
      for (const int32_t give : members_[bin]) {
        const double cost = items_.cost(give), gift = std::min(cost, gap - cost);
        const int64_t size = items_.size(give);
        if (gift > best.gain && members_[bin].size() > 1 && load_[emptiest] + size <= cap_) {
          best = {gift, cost, give, -1, emptiest, false};
        }
        const double ideal = cost - gap / 2;
        const auto half = std::ranges::partition_point(offers, [&](int32_t k) { return items_.cost(k) >= ideal; });
        for (const int32_t take : around(offers, half, 8)) {
          const double moved = cost - items_.cost(take), gain = std::min(moved, gap - moved);
          if (gain <= best.gain) continue;
          const int64_t growth = size - items_.size(take);
          if (load_[bin_of_[take]] + growth > cap_ || load_[bin] - growth > cap_) continue;
          best = {gain, moved, give, take, -1, false};
        }
        if (best.gain >= gap * 0.45) return best;
      }
    }
    return best;
  }

  void apply(const Trade& trade, int32_t giver, int32_t taker) {
    if (trade.bins) {
      std::ranges::replace(rank_bins_[giver], trade.give, trade.take);
      std::ranges::replace(rank_bins_[taker], trade.take, trade.give);
    } else {
      const int32_t from = bin_of_[trade.give], to = trade.take < 0 ? trade.emptiest : bin_of_[trade.take];
      move(trade.give, to);
      if (trade.take >= 0) move(trade.take, from);
    }
    total_[giver] -= trade.moved;
    total_[taker] += trade.moved;
  }

  void move(int32_t item, int32_t to) {
    const int32_t from = bin_of_[item];
    std::erase(members_[from], item);
    members_[to].push_back(item);
    load_[from] -= items_.size(item), cost_[from] -= items_.cost(item);
    load_[to] += items_.size(item), cost_[to] += items_.cost(item);
    bin_of_[item] = to;
  }

  void sort_by_cost(List& bins) const {
    std::ranges::sort(bins, [&](int32_t a, int32_t b) { return cost_[a] != cost_[b] ? cost_[a] > cost_[b] : a < b; });
  }

  std::vector<int32_t> by_position() {
    for (List& bins : rank_bins_) sort_by_cost(bins);
    List order(load_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = rank_bins_[i % ranks_][i / ranks_];
    return order;
  }

  const Items& items_;
  int64_t cap_;
  size_t ranks_;
  std::span<int32_t> bin_of_;
  std::vector<int64_t> load_;
  std::vector<double> cost_;        // per bin
  std::vector<List> members_;       // per bin
  std::vector<List> rank_bins_;     // per rank
  std::vector<double> total_;       // per rank
};

}  // namespace gapg

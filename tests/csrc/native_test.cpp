// The algorithms of csrc without Python, for sanitizers: `make test-native`. Every array has exactly the size that is
// promised to be enough, so a step outside is seen. Exits with 1 and the failed check's line.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "../../csrc/layout.h"
#include "../../csrc/packing.h"

namespace {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (false)

template <typename Call>
bool refuses(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

using Ints = std::vector<int64_t>;

struct Random {
  std::mt19937_64 bits;
  // mt19937_64 gives the same numbers everywhere, std's distributions do not
  int64_t from(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % (high - low + 1)); }
};

size_t textbook(Ints sizes, int64_t cap) {
  std::ranges::sort(sizes, std::greater{});
  std::multiset<int64_t> rooms;
  for (const int64_t size : sizes) {
    const auto best = rooms.lower_bound(size);
    const int64_t room = best == rooms.end() ? cap : *best;
    if (best != rooms.end()) rooms.erase(best);
    rooms.insert(room - size);
  }
  return rooms.size();
}

const gapg::Cost costs[] = {{1, 0}, {1, 1.0 / 4096}, {0, 1}};

void check_bins(const Ints& order, const Ints& offsets, size_t n, int64_t ranks) {
  CHECK(offsets.front() == 0 && offsets.back() == static_cast<int64_t>(n) && std::ranges::is_sorted(offsets));
  CHECK((offsets.size() - 1) % ranks == 0);
  Ints once = order, all(n);
  std::ranges::sort(once);
  std::iota(all.begin(), all.end(), 0);
  CHECK(once == all);
}

void check_plain(const Ints& lengths, int64_t cap, int64_t ranks, const gapg::Cost& cost) {
  Ints order(lengths.size(), -1), again = lengths;
  const Ints offsets = gapg::pack(lengths, cap, ranks, cost, order);
  CHECK(gapg::pack(again, cap, ranks, cost, again) == offsets && again == order);
  check_bins(order, offsets, lengths.size(), ranks);
  const size_t bins = offsets.size() - 1, least = textbook(lengths, cap);
  CHECK(bins < least + ranks);
  for (size_t b = 0; b < bins; ++b) {
    int64_t load = 0;
    for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) load += lengths[order[i]];
    CHECK(load <= cap);
    CHECK(ranks > 1 || load > 0);
  }
}

void plain() {
  Random random{std::mt19937_64(1)};
  for (const int64_t cap : {1, 2, 7, 63, 64, 65, 127, 128, 4095, 4096, 4097, 8193, 300'001}) {
    for (int round = 0; round < 60; ++round) {
      Ints lengths(random.from(0, round < 50 ? 40 : 600));
      const int64_t longest = round % 3 == 0 ? cap : std::min<int64_t>(cap, 1 + cap / random.from(1, 20));
      for (int64_t& length : lengths) length = random.from(round % 2 == 0 ? 1 : (longest + 1) / 2, longest);
      check_plain(lengths, cap, random.from(1, 9), costs[round % 3]);
      check_plain(lengths, cap, 1, costs[round % 3]);
    }
  }
  Ints order(8);
  CHECK(gapg::pack(Ints(8, 7), 8, 1, {}, order).size() == 9);  // eight sequences that only fit alone
  order.assign(3, -1);
  CHECK(gapg::pack(Ints{1, 5, 3}, INT32_MAX, 1, {}, order) == Ints({0, 3}) && order == Ints({1, 2, 0}));
  Ints many(5000);
  for (int64_t& length : many) length = random.from(1, 70'000);  // more than one pass of the sort
  for (const int64_t ranks : {1, 8, 64}) check_plain(many, 1 << 17, ranks, costs[1]);
  for (const Ints& wrong : {Ints{0}, Ints{9}, Ints{-1}, Ints{INT64_MAX, INT64_MAX}, Ints{INT64_MIN}}) {
    Ints out(wrong.size());
    CHECK(refuses([&] { gapg::pack(wrong, 8, 1, {}, out); }));
  }
  for (const int64_t cap : {int64_t{0}, int64_t{-1}, int64_t{INT32_MAX} + 1}) {
    CHECK(refuses([&] { gapg::pack(Ints{1}, cap, 1, {}, order); }));
  }
  for (const int64_t ranks : {0, -1, (1 << 20) + 1}) CHECK(refuses([&] { gapg::pack(Ints{1}, 8, ranks, {}, order); }));
}

struct Batch {
  Ints tokens, starts{0}, prompts, groups, lengths;
  std::vector<float> coefficients;

  gapg::Sequences sequences() const { return {tokens, starts, prompts, coefficients}; }
};

// Groups in mixed order; their ids are large and negative, their prompts of 1..12 tokens.
Batch batch(Random& random) {
  std::vector<std::pair<int64_t, int64_t>> rows;  // group, response tokens
  for (int64_t g = random.from(0, 8); g > 0; --g) {
    for (int64_t r = random.from(1, 12); r > 0; --r) rows.emplace_back(g, random.from(0, 30));
  }
  for (size_t i = rows.size(); i > 1; --i) std::swap(rows[i - 1], rows[random.from(0, static_cast<int64_t>(i) - 1)]);
  Batch made;
  for (const auto& [g, response] : rows) {
    const int64_t prompt = 1 + g * 7 % 12;
    for (int64_t t = 0; t < prompt + response; ++t) made.tokens.push_back(t < prompt ? 100 * g + t : random.from(0, 99));
    made.starts.push_back(static_cast<int64_t>(made.tokens.size()));
    made.prompts.push_back(prompt);
    made.groups.push_back(g % 2 == 0 ? g - (int64_t{1} << 60) : g);
    made.lengths.push_back(prompt + response);
    made.coefficients.push_back(static_cast<float>(g));
  }
  return made;
}

void check_shared_bin(const Batch& all, std::span<const int64_t> members, int64_t cap) {
  const auto read = gapg::read_members(all.sequences(), all.groups, members);
  const auto sizes = gapg::measure(all.tokens, read);
  CHECK(sizes.tokens <= cap);
  Ints ids(sizes.tokens, -1), positions(sizes.tokens, -1), index(sizes.responses, -1), targets(sizes.responses, -1),
      sequence(sizes.responses, -1);
  std::vector<int32_t> segments(sizes.prompts + members.size() + 1, -1), responses(sizes.prompts + 1, -1);
  std::vector<float> coefficients(sizes.responses, -1);
  gapg::lay_out_shared(all.tokens, read, {ids, positions, segments, index, targets, sequence, coefficients}, responses);
  CHECK(segments.back() == sizes.tokens && responses.back() == sizes.responses);
  CHECK(std::ranges::is_sorted(segments) && std::ranges::is_sorted(responses));
  for (int64_t r = 0; r < sizes.responses; ++r) {
    CHECK(coefficients[r] == all.coefficients[sequence[r]]);
    CHECK(ids[segments[sizes.prompts] + r] == targets[r]);
    CHECK(positions[index[r]] + 1 == positions[segments[sizes.prompts] + r]);
  }
  // the same sequences with their own prompts
  const auto alone = gapg::read_members(all.sequences(), members);
  const auto apart = gapg::measure(all.tokens, alone);
  CHECK(apart.responses == sizes.responses && apart.tokens >= sizes.tokens);
  Ints plain_ids(apart.tokens, -1), plain_positions(apart.tokens, -1), plain_index(apart.responses, -1),
      plain_targets(apart.responses, -1), plain_sequence(apart.responses, -1);
  std::vector<int32_t> seqlens(members.size() + 1, -1);
  gapg::lay_out(all.tokens, alone,
                {plain_ids, plain_positions, seqlens, plain_index, plain_targets, plain_sequence, coefficients});
  CHECK(plain_targets == targets && plain_sequence == sequence && seqlens.back() == apart.tokens);
}

void shared() {
  Random random{std::mt19937_64(2)};
  for (int round = 0; round < 600; ++round) {
    const Batch all = batch(random);
    const int64_t longest = all.lengths.empty() ? 1 : std::ranges::max(all.lengths);
    const int64_t cap = longest + random.from(0, round % 2 == 0 ? 20 : 400), ranks = random.from(1, 5);
    Ints order(all.lengths.size(), -1), again = all.lengths;
    const auto& cost = costs[round % 3];
    const Ints offsets = gapg::pack_groups(all.lengths, all.prompts, all.groups, cap, ranks, cost, order);
    CHECK(gapg::pack_groups(again, all.prompts, all.groups, cap, ranks, cost, again) == offsets && again == order);
    check_bins(order, offsets, order.size(), ranks);
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      const auto members = std::span<const int64_t>(order).subspan(offsets[b], offsets[b + 1] - offsets[b]);
      check_shared_bin(all, members, cap);
      std::map<int64_t, int> runs;
      for (size_t m = 0; m < members.size(); ++m) {
        if (m == 0 || all.groups[members[m]] != all.groups[members[m - 1]]) CHECK(++runs[all.groups[members[m]]] == 1);
      }
    }
  }
  Ints order(2);
  const Ints lengths{5, 6}, groups{1, 1};
  for (const Ints& prompts : {Ints{2, 3}, Ints{0, 0}, Ints{6, 6}, Ints{2}}) {
    CHECK(refuses([&] { gapg::pack_groups(lengths, prompts, groups, 10, 1, {}, order); }));
  }
  CHECK(refuses([&] { gapg::pack_groups(lengths, Ints{2, 2}, Ints{1}, 10, 1, {}, order); }));
  CHECK(refuses([&] { gapg::pack_groups(lengths, Ints{2, 2}, groups, 5, 1, {}, order); }));
}

void refused_layouts() {
  const Ints tokens{1, 2, 3, 1, 5}, starts{0, 3, 5}, prompts{1, 1}, groups{0, 0};
  const std::vector<float> coefficients{0, 1};
  const gapg::Sequences good{tokens, starts, prompts, coefficients};
  const auto shared = [](const gapg::Sequences& all, const Ints& groups, const Ints& members) {
    return gapg::measure(all.tokens, gapg::read_members(all, groups, members)).tokens;
  };
  CHECK(shared(good, groups, {0, 1}) == 4);
  for (const int64_t member : {int64_t{-1}, int64_t{2}, INT64_MAX, INT64_MIN}) {
    CHECK(refuses([&] { gapg::read_members(good, Ints{member}); }));
    CHECK(refuses([&] { shared(good, groups, {0, member}); }));
  }
  for (const Ints& wrong : {Ints{0, 3, 6}, Ints{-1, 3, 5}, Ints{4, 3, 5}, Ints{0, 3}, Ints{0, 3, INT64_MAX}}) {
    CHECK(refuses([&] { gapg::read_members({tokens, wrong, prompts, coefficients}, Ints{0, 1}); }));
  }
  for (const Ints& wrong : {Ints{0, 1}, Ints{4, 1}, Ints{1}}) {
    CHECK(refuses([&] { gapg::read_members({tokens, starts, wrong, coefficients}, Ints{0, 1}); }));
  }
  CHECK(refuses([&] { shared({tokens, starts, Ints{2, 2}, coefficients}, groups, {0, 1}); }));
  CHECK(refuses([&] { shared(good, {0}, {0, 1}); }));
  const Ints many(size_t{1} << 21, 0);  // 2^21 times 2^11 tokens
  const Ints long_one(2048, 7), around{0, 2048}, one{1};
  const std::vector<float> zero{0};
  CHECK(refuses([&] { gapg::measure(long_one, gapg::read_members({long_one, around, one, zero}, many)); }));
}

void refused_costs() {
  const double nan = std::nan(""), inf = INFINITY;
  for (const double bad : {nan, inf, -inf, -1.0, -1e-300}) {
    CHECK(refuses([&] { gapg::Cost(bad, 1); }) && refuses([&] { gapg::Cost(1, bad); }));
  }
  CHECK(refuses([] { gapg::Cost(0, 0); }) && refuses([] { gapg::Cost(-0.0, 0); }));
  const int64_t cap = 1 << 20;
  Ints lengths{cap, 1, cap}, order(3);
  for (const double weight : {5e-324, 1e-300, 1e300, 1.7e308}) {
    for (const gapg::Cost& cost : {gapg::Cost(weight, weight), gapg::Cost(0, weight), gapg::Cost(weight, 0)}) {
      CHECK(cost.linear <= 1 && cost.quadratic <= 1 && std::max(cost.linear, cost.quadratic) == 1);
      for (const int64_t ranks : {1, 4}) gapg::pack(lengths, cap, ranks, cost, order);
    }
  }
}

}  // namespace

int main() {
  plain();
  shared();
  refused_layouts();
  refused_costs();
  std::puts("csrc: all checks hold");
}

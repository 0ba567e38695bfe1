// Packs n lognormal lengths once, in a function that callgrind can be told to count: instructions CASE N.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numbers>
#include <random>

#include "../../csrc/packing.h"

namespace {

using Ints = std::vector<int64_t>;
constexpr int64_t cap = 16'384, group_size = 8;

// median 900, sigma 0.9, within 16..8192; not std::lognormal_distribution, which differs from library to library
Ints lengths(size_t n) {
  std::mt19937_64 bits(0);
  const auto uniform = [&] { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; };
  Ints made(n);
  for (int64_t& length : made) {
    const double normal = std::sqrt(-2 * std::log(uniform())) * std::cos(2 * std::numbers::pi * uniform());
    length = static_cast<int64_t>(std::clamp(900 * std::exp(0.9 * normal), 16.0, 8192.0));
  }
  return made;
}

}  // namespace

// The name is what --toggle-collect looks for.
extern "C" [[gnu::noinline]] size_t counted(const char* which, const Ints& all, const Ints& prompts, const Ints& groups,
                                            Ints& order) {
  const gapg::Cost cost{1, 1.0 / 4000};
  if (std::strcmp(which, "plain") == 0) return gapg::pack(all, cap, 1, {}, order).size();
  if (std::strcmp(which, "cost") == 0) return gapg::pack(all, cap, 1, cost, order).size();
  if (std::strcmp(which, "8 ranks") == 0) return gapg::pack(all, cap, 8, cost, order).size();
  if (std::strcmp(which, "groups of 8") == 0) return gapg::pack_groups(all, prompts, groups, cap, 1, {}, order).size();
  return 0;
}

int main(int, char** arguments) {
  const auto n = static_cast<size_t>(std::atoll(arguments[2]));
  const Ints all = lengths(n);
  Ints prompts(n, 16), groups(n), order(n);
  for (size_t i = 0; i < n; ++i) groups[i] = static_cast<int64_t>(i) / group_size;
  return counted(arguments[1], all, prompts, groups, order) == 0;
}

#include "policies/gap.hpp"

#include <algorithm>

namespace modelyard {

void Gap::on_add(EntryIndex entry) {
  if (histories_.size() <= entry) histories_.resize(entry + std::size_t{1});
  histories_[entry] = History{};
}

void Gap::on_request(EntryIndex entry, RequestClock now) {
  History& history = histories_[entry];
  history.times[history.next] = now;
  history.next = history.next + 1 == kRing ? 0 : history.next + 1;
  history.count = std::min(history.count + 1, kRing);
}

double Gap::score(const Candidate& candidate, RequestClock now) const {
  const History& history = histories_[candidate.entry];
  // A model nobody ever asked for (loaded by hand) counts as seen once, at the beginning of time.
  const RequestClock last = history.count == 0 ? 0 : history.times[before(history.next, 1)];
  const auto age = static_cast<double>(now - std::min(last, now));
  if (history.count < 2) return 0.3 * candidate.reload_seconds / (candidate.weight * (age + 1));

  constexpr std::array<double, kRing> kMean{0, 1.0, 1.0 / 2, 1.0 / 3, 1.0 / 4};
  const std::uint32_t gaps = history.count - 1;
  const auto span = static_cast<double>(last - history.times[before(history.next, history.count)]);
  const double late = std::max(0.0, age - span * kMean[gaps]);
  return candidate.reload_seconds * gaps / (candidate.weight * std::max(1.0, span + late));
}

}  // namespace modelyard

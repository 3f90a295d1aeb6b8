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
  const double value = candidate.reload_seconds / candidate.weight;
  // A model nobody ever asked for (loaded by hand) counts as seen once, at the beginning of time.
  const RequestClock last =
      history.count == 0 ? 0 : history.times[(history.next + kRing - 1) % kRing];
  const auto age = static_cast<double>(now - std::min(last, now));
  if (history.count < 2) return value * 0.3 / (age + 1);

  const double gaps = history.count - 1;
  const RequestClock first = history.times[(history.next + kRing - history.count) % kRing];
  const auto span = static_cast<double>(last - first);
  return value * gaps / std::max(1.0, span + std::max(0.0, age - span / gaps));
}

}  // namespace modelyard

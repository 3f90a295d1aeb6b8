#include "policies/gap.hpp"

#include <algorithm>

namespace modelyard {

void Gap::on_add(EntryIndex entry) {
  if (rings_.size() <= entry) {
    rings_.resize(entry + std::size_t{1});
    recent_.resize(entry + std::size_t{1});
  }
  rings_[entry] = Ring{};
  recent_[entry] = Recent{};
}

void Gap::on_request(EntryIndex entry, RequestClock now) {
  Ring& ring = rings_[entry];
  ring.times[ring.next] = now;
  ring.next = ring.next + 1 == kRing ? 0 : ring.next + 1;
  ring.count = std::min(ring.count + 1, kRing);

  constexpr std::array<double, kRing> kMean{0, 1.0, 1.0 / 2, 1.0 / 3, 1.0 / 4};
  const RequestClock first = ring.times[ring.count == kRing ? ring.next : 0];
  Recent& recent = recent_[entry];
  recent.last = now;
  recent.span = static_cast<double>(now - first);
  recent.gaps = ring.count - 1;
  recent.mean_gap = recent.span * kMean[ring.count - 1];
}

double Gap::score(const Candidate& candidate, RequestClock now) const {
  const Recent& recent = recent_[candidate.entry];
  const auto age = static_cast<double>(now - std::min(recent.last, now));
  if (recent.gaps == 0) return 0.3 * candidate.reload_seconds / (candidate.weight * (age + 1));
  const double late = std::max(0.0, age - recent.mean_gap);
  return candidate.reload_seconds * recent.gaps /
         (candidate.weight * std::max(1.0, recent.span + late));
}

}  // namespace modelyard

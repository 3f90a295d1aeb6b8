#include "policies/history.hpp"

namespace modelyard {

void History::request(EntryIndex entry, RequestClock now) {
  Ring& ring = rings_[entry];
  ring.times[ring.next] = now;
  ring.next = ring.next + 1 == kRing ? 0 : ring.next + 1;
  ring.count = std::min(ring.count + 1, kRing);

  constexpr std::array<double, kRing> kMean{0, 1.0, 1.0 / 2, 1.0 / 3, 1.0 / 4};
  const RequestClock first = ring.times[ring.count == kRing ? ring.next : 0];
  Seen& seen = seen_[entry];
  constexpr RequestClock kLongest = 500'000;  // 2^500 of the shortest half-life.
  if (now - std::min(base_, now) > kLongest) rebase(now);
  now_ = now;
  for (std::size_t i = 0; i < kHalfLives.size(); ++i) {
    faded_[i] = fading(i, now);
    seen.counts[i] += 1 / faded_[i];
  }
  seen.last = now;
  seen.span = static_cast<double>(now - first);
  seen.gaps = ring.count - 1;
  seen.mean_gap = seen.span * kMean[ring.count - 1];
}

void History::rebase(RequestClock now) {
  for (std::size_t i = 0; i < kHalfLives.size(); ++i) {
    const double faded = fading(i, now);
    for (Seen& seen : seen_) seen.counts[i] *= faded;
  }
  base_ = now;
}

}  // namespace modelyard

#pragma once

#include <algorithm>
#include <span>

#include "policies/footprints.hpp"

namespace modelyard {

/// A member of a shadow cache that may have to go, and what it is worth there.
struct Leaving {
  double worth;
  EntryIndex entry;
};

/// True if `a` goes after `b`: the lowest worth goes first, among equals the lowest entry, as in
/// the planner.
[[nodiscard]] inline bool goes_later(const Leaving& a, const Leaving& b) {
  return a.worth != b.worth ? a.worth > b.worth : a.entry > b.entry;
}

/// What a cache that uses `used` of each budget lacks to take in `wanted`.
[[nodiscard]] inline Charge missing_for(const Charge& wanted, std::span<const std::int64_t> used,
                                        std::span<const Bytes> budgets) {
  Charge missing;
  for (std::size_t i = 0; i < budgets.size(); ++i) {
    const auto device = static_cast<DeviceIndex>(i);
    const std::int64_t over = used[i] + wanted.on(device).value - budgets[i].value;
    // Also what it does not touch, if a budget was lowered.
    if (over > 0) missing.set(device, Bytes{std::min(over, kMaxBytes)});
  }
  return missing;
}

/// Calls f(Leaving) for those of `leavers`, who free `need` together, that are needed for it: gives
/// back, the last one first, whoever turned out not to be.
template <typename F>
void each_needed(std::span<const Leaving> leavers, const Footprints& footprints, const Charge& need,
                 F&& f) {
  Charge spare;
  need.for_each([&](DeviceIndex d, Bytes amount) {
    Bytes freed{};
    for (const Leaving& each : leavers) freed += footprints.of(each.entry).held.on(d);
    spare.set(d, std::min(freed - amount, Bytes{kMaxBytes}));
  });
  for (auto it = leavers.rbegin(); it != leavers.rend(); ++it) {
    const Charge& held = footprints.of(it->entry).held;
    bool needed = false;
    need.for_each([&](DeviceIndex d, Bytes) { needed = needed || held.on(d) > spare.on(d); });
    if (needed) {
      f(*it);
    } else {
      spare.reduce(held);
    }
  }
}

}  // namespace modelyard

#include "modelyard/planner.hpp"

#include <algorithm>
#include <array>

namespace modelyard {
namespace {

struct Scored {
  double score;
  std::uint32_t resident;  // Position in the span given.
  bool leased;
};

// Orders a heap so that its top is the one to go first. Ties go by entry: the same snapshot gives
// the same plan.
struct GoesLater {
  std::span<const Resident> residents;

  bool operator()(const Scored& a, const Scored& b) const {
    if (a.leased != b.leased) return a.leased;
    if (a.score != b.score) return a.score > b.score;
    return residents[a.resident].entry > residents[b.resident].entry;
  }
};

// What a byte weighs on each device. The loop over all residents is what a plan costs: it
// multiplies.
struct Weights {
  explicit Weights(std::span<const Bytes> budgets) {
    for (std::size_t i = 0; i < budgets.size(); ++i) {
      // A budget of zero makes any byte the whole of it.
      per_byte[i] = 1 / static_cast<double>(std::max<std::int64_t>(budgets[i].value, 1));
    }
  }

  // The share of the short devices' budgets that a model holds.
  [[nodiscard]] double of(const Charge& held, const Charge& shortfall) const {
    double sum = 0;
    held.for_each_shared(shortfall, [&](DeviceIndex d, Bytes amount) {
      sum += static_cast<double>(amount.value) * per_byte[position(d)];
    });
    return sum;
  }

  std::array<double, kMaxDevices> per_byte{};
};

}  // namespace

std::optional<Plan> plan_eviction(std::span<const Resident> residents, const Charge& shortfall,
                                  std::span<const Bytes> budgets, const Policy& policy,
                                  RequestClock now) {
  Plan plan;
  if (shortfall.empty()) return plan;

  const Weights weights(budgets);
  std::vector<Scored> heap;
  heap.reserve(residents.size());
  for (std::uint32_t i = 0; i < residents.size(); ++i) {
    const Resident& resident = residents[i];
    const double weight = weights.of(*resident.held, shortfall);
    if (weight <= 0) continue;
    const Candidate candidate{resident.entry, weight, resident.reload_seconds};
    heap.push_back({policy.score(candidate, now), i, resident.leased});
  }
  const GoesLater later{residents};
  std::make_heap(heap.begin(), heap.end(), later);

  Charge missing = shortfall;
  std::vector<Scored> chosen;
  while (!missing.empty() && !heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Scored next = heap.back();
    heap.pop_back();
    const Charge& held = *residents[next.resident].held;
    if (!held.overlaps(missing)) continue;  // What it holds is not short any more.
    missing.reduce(held);
    chosen.push_back(next);
  }
  if (!missing.empty()) return std::nullopt;

  // Give back who turned out not to be needed, the most valuable first. `spare` is what the chosen
  // ones free beyond the shortfall; a victim can stay if all it frees on the short devices is
  // spare.
  Charge spare;
  shortfall.for_each([&](DeviceIndex device, Bytes need) {
    Bytes freed{};
    for (const Scored& victim : chosen) {
      freed = saturating_add(freed, residents[victim.resident].held->on(device));
    }
    spare.set(device, freed - need);
  });
  for (std::size_t i = chosen.size(); i-- > 0;) {
    const Charge& held = *residents[chosen[i].resident].held;
    bool needed = false;
    shortfall.for_each(
        [&](DeviceIndex device, Bytes) { needed = needed || held.on(device) > spare.on(device); });
    if (needed) continue;
    shortfall.for_each(
        [&](DeviceIndex device, Bytes) { spare.set(device, spare.on(device) - held.on(device)); });
    chosen.erase(chosen.begin() + static_cast<std::ptrdiff_t>(i));
  }

  plan.victims.reserve(chosen.size());
  for (const Scored& victim : chosen) {
    plan.victims.push_back({residents[victim.resident].entry, victim.score, victim.leased});
    plan.cost += victim.score;
  }
  return plan;
}

}  // namespace modelyard

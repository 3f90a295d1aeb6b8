#include "modelyard/planner.hpp"

#include <algorithm>
#include <array>

namespace modelyard {
namespace {

struct Scored {
  double score;
  std::uint32_t resident;  // Position in the span given.
  bool leased;
  bool kept;  // The policy would rather have it stay.
};

// Orders a heap so that its top is the one to go first. Ties go by entry: the same snapshot gives
// the same plan.
struct GoesLater {
  std::span<const Resident> residents;

  bool operator()(const Scored& a, const Scored& b) const {
    if (a.leased != b.leased) return a.leased;
    if (a.kept != b.kept) return a.kept;
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

// Counts, for each share, the holders that have not been chosen, while a plan is made.
class SharesLeft {
 public:
  explicit SharesLeft(const Sharing& sharing) : sharing_(sharing) {
    if (sharing.table != nullptr) taken_.resize(sharing.table->slot_count() * kMaxDevices);
  }

  [[nodiscard]] bool concern(const Resident& resident) const {
    return sharing_.table != nullptr && !resident.shares.empty();
  }

  // A model is chosen: adds to `freed` the shares of which it was the last holder.
  void take(const Resident& resident, Charge& freed) {
    each(resident, [&](const Share& share, std::uint32_t& taken) {
      if (++taken == holders(share, resident.shares_on)) add(share, resident.shares_on, freed);
    });
  }

  // What would not come back if a chosen model stayed after all.
  [[nodiscard]] Charge lost_without(const Resident& resident) {
    Charge lost;
    each(resident, [&](const Share& share, const std::uint32_t& taken) {
      if (taken == holders(share, resident.shares_on)) add(share, resident.shares_on, lost);
    });
    return lost;
  }

  void put_back(const Resident& resident) {
    each(resident, [](const Share&, std::uint32_t& taken) { --taken; });
  }

  // A model's part of what it holds with others.
  [[nodiscard]] Charge part_of(const Resident& resident) {
    Charge part;
    Bytes sum{};
    each(resident, [&](const Share& share, const std::uint32_t&) {
      const auto count = std::max(holders(share, resident.shares_on), 1U);
      sum += Bytes{(share.bytes.value + count - 1) / count};  // Rounded up: a byte is not nothing.
    });
    if (!resident.shares.empty()) {
      part.set(resident.shares_on, std::min(sum, Bytes{kMaxBytes}));
    }
    return part;
  }

 private:
  [[nodiscard]] std::uint32_t holders(const Share& share, DeviceIndex device) const {
    const Holders& all = share.on(device);
    return sharing_.count_leaving ? all.firm() : all.staying();
  }

  [[nodiscard]] bool wanted(ShareId id, DeviceIndex device) const {
    return device == sharing_.wanted_on &&
           std::find(sharing_.wanted.begin(), sharing_.wanted.end(), id) != sharing_.wanted.end();
  }

  // Calls f(share, number of its chosen holders) for what a model frees if it is the last; what the
  // waiting model is made of, nobody frees.
  template <typename F>
  void each(const Resident& resident, F&& f) {
    if (!concern(resident)) return;
    for (const ShareId id : resident.shares) {
      if (wanted(id, resident.shares_on)) continue;
      const std::size_t slot =
          ShareTable::index_of(id) * kMaxDevices + position(resident.shares_on);
      f(*sharing_.table->find(id), taken_[slot]);
    }
  }

  static void add(const Share& share, DeviceIndex device, Charge& sum) {
    sum.set(device, saturating_add(sum.on(device), share.bytes));
  }

  const Sharing& sharing_;
  std::vector<std::uint32_t> taken_;  // By slot of the share and device.
};

// Gives back who turned out not to be needed, the most valuable first, until everybody is.
//
// `freed` is what the chosen ones free together. Where shares are in play one who is given back may
// make others needless, who held with it what does not come back now; hence the repetition.
void give_back(std::span<const Resident> residents, const Charge& shortfall, const Charge& freed,
               SharesLeft& left, std::vector<Scored>& chosen) {
  Charge spare;
  shortfall.for_each(
      [&](DeviceIndex device, Bytes need) { spare.set(device, freed.on(device) - need); });
  bool again = true;
  while (again) {
    again = false;
    for (std::size_t i = chosen.size(); i-- > 0;) {
      const Resident& resident = residents[chosen[i].resident];
      const bool shares = left.concern(resident);
      const Charge lost =
          shares ? resident.held->saturating_plus(left.lost_without(resident)) : *resident.held;
      bool needed = false;
      shortfall.for_each([&](DeviceIndex device, Bytes) {
        needed = needed || lost.on(device) > spare.on(device);
      });
      if (needed) continue;
      shortfall.for_each([&](DeviceIndex device, Bytes) {
        spare.set(device, spare.on(device) - lost.on(device));
      });
      if (shares) {
        left.put_back(resident);
        again = true;
      }
      chosen.erase(chosen.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

}  // namespace

Charge freed_by_all(std::span<const Resident> residents, const Sharing& sharing) {
  SharesLeft left(sharing);
  Charge freed;
  for (const Resident& resident : residents) {
    freed = freed.saturating_plus(*resident.held);
    left.take(resident, freed);
  }
  return freed;
}

std::optional<Plan> plan_eviction(std::span<const Resident> residents, const Charge& shortfall,
                                  std::span<const Bytes> budgets, const Policy& policy,
                                  RequestClock now, const Sharing& sharing) {
  Plan plan;
  if (shortfall.empty()) return plan;

  const Weights weights(budgets);
  SharesLeft left(sharing);
  std::vector<Scored> heap;
  heap.reserve(residents.size());
  for (std::uint32_t i = 0; i < residents.size(); ++i) {
    const Resident& resident = residents[i];
    double weight = weights.of(*resident.held, shortfall);
    if (left.concern(resident)) weight += weights.of(left.part_of(resident), shortfall);
    if (weight <= 0) continue;
    const Candidate candidate{resident.entry, weight, resident.reload_seconds};
    heap.push_back(
        {policy.score(candidate, now), i, resident.leased, policy.keeps(resident.entry)});
  }
  const GoesLater later{residents};
  std::make_heap(heap.begin(), heap.end(), later);

  Charge missing = shortfall;
  Charge freed;  // On the short devices.
  std::vector<Scored> chosen;
  while (!missing.empty() && !heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Scored next = heap.back();
    heap.pop_back();
    const Resident& resident = residents[next.resident];
    const bool shares = left.concern(resident) && missing.on(resident.shares_on) > Bytes{0};
    if (!resident.held->overlaps(missing) && !shares) {
      continue;  // What it holds is not short any more.
    }
    Charge back;
    resident.held->for_each_shared(shortfall,
                                   [&](DeviceIndex d, Bytes amount) { back.set(d, amount); });
    left.take(resident, back);
    missing.reduce(back);
    freed = freed.saturating_plus(back);
    chosen.push_back(next);
  }
  if (!missing.empty()) return std::nullopt;
  give_back(residents, shortfall, freed, left, chosen);

  plan.victims.reserve(chosen.size());
  for (const Scored& victim : chosen) {
    plan.victims.push_back({residents[victim.resident].entry, victim.score, victim.leased});
    plan.cost += victim.score;
  }
  return plan;
}

}  // namespace modelyard

#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/policy.hpp"

namespace modelyard {

/// What a model held, or would have, and what loading it took, when it was last asked for.
struct Footprint {
  Charge held;
  double weight{0};  ///< Share of all devices' budgets, summed.
  double reload_seconds{0};
};

/// The footprints of all models, and the budgets they are measured by: what the shadow caches of an
/// ensemble have in common.
class Footprints {
 public:
  /// A slot starts anew.
  void add(EntryIndex entry) {
    if (all_.size() <= entry) all_.resize(entry + std::size_t{1});
    all_[entry] = Footprint{};
  }
  void set_budgets(std::span<const Bytes> budgets) {
    budgets_.assign(budgets.begin(), budgets.end());
    for (Footprint& each : all_) {
      if (!each.held.empty()) each.weight = weight(each.held);
    }
  }
  /// A model was asked for.
  void set(const Wish& wish) {
    Footprint& known = all_[wish.entry];
    if (known.held != *wish.held) known.held = *wish.held;
    known.weight = wish.weight;
    known.reload_seconds = wish.reload_seconds;
  }

  [[nodiscard]] const Footprint& of(EntryIndex entry) const { return all_[entry]; }
  [[nodiscard]] std::span<const Bytes> budgets() const { return budgets_; }
  /// The share of the budgets that a charge is, summed over the devices it charges.
  [[nodiscard]] double weight(const Charge& held) const { return weight(held, held); }
  /// The same, only over the devices that `short_of` charges.
  [[nodiscard]] double weight(const Charge& held, const Charge& short_of) const {
    double sum = 0;
    held.for_each_shared(short_of, [&](DeviceIndex d, Bytes amount) {
      // A budget of zero makes any byte the whole of it.
      sum += static_cast<double>(amount.value) /
             static_cast<double>(std::max<std::int64_t>(budgets_[position(d)].value, 1));
    });
    return sum;
  }

 private:
  std::vector<Footprint> all_;  // By entry.
  std::vector<Bytes> budgets_;
};

}  // namespace modelyard

#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "modelyard/yard.hpp"

namespace modelyard {

/// What one scheduling pass has left for the models it has not looked at yet. A pass looks at the
/// waiting models in the order of their oldest ticket and takes from here what each of them gets or
/// keeps, so that nothing is promised twice and no younger model takes what an older one waits for.
/// Made anew for every pass: there is no state to leak.
struct Yard::Pass {
  std::array<Bytes, kMaxDevices> available{};  // Free now.
  std::array<Bytes, kMaxDevices> unloading{};  // Free soon: nobody uses them any more.
  std::array<Bytes, kMaxDevices> leaving{};    // Free when their requests have ended.
  std::array<std::uint32_t, kMaxDevices> channels{};
  std::vector<Resident> idle;
  bool idle_known{false};

  [[nodiscard]] bool has_channels(const Charge& need) const {
    bool all = true;
    need.for_each([&](DeviceIndex d, Bytes) { all = all && channels[position(d)] > 0; });
    return all;
  }

  enum class Reach { kNow, kSoon, kLater, kNot };

  // When the bytes will be there without another victim.
  [[nodiscard]] Reach reach(const Charge& need) const {
    Reach worst = Reach::kNow;
    need.for_each([&](DeviceIndex d, Bytes amount) {
      const std::size_t i = position(d);
      Reach here = Reach::kNot;
      if (amount <= available[i]) {
        here = Reach::kNow;
      } else if (amount <= available[i] + unloading[i]) {
        here = Reach::kSoon;
      } else if (amount <= available[i] + unloading[i] + leaving[i]) {
        here = Reach::kLater;
      }
      worst = std::max(worst, here);
    });
    return worst;
  }

  // What is missing when what is free and being unloaded is counted, and, with `leaving`, what
  // leaves when its requests have ended.
  [[nodiscard]] Charge shortfall(const Charge& need, bool with_leaving) const {
    Charge missing;
    need.for_each([&](DeviceIndex d, Bytes amount) {
      const std::size_t i = position(d);
      const Bytes coming = unloading[i] + (with_leaving ? leaving[i] : Bytes{0});
      missing.set(d, saturating_sub(amount, available[i] + coming));
    });
    return missing;
  }

  // The least room it leaves on a device it touches.
  [[nodiscard]] Bytes room_after(const Charge& need) const {
    Bytes least{kMaxBytes};
    need.for_each([&](DeviceIndex d, Bytes amount) {
      least = std::min(least, saturating_sub(available[position(d)], amount));
    });
    return least;
  }

  // Counts what victims will give back.
  void count_on(std::span<const Victim> victims, const Yard& yard) {
    for (const Victim& victim : victims) {
      auto& kind = victim.leased ? leaving : unloading;
      yard.entry_at(victim.entry).held.for_each([&](DeviceIndex d, Bytes b) {
        kind[position(d)] += b;
      });
    }
  }

  // Keeps the bytes from whoever is looked at later.
  void claim(const Charge& need) { take(need, {&available, &unloading, &leaving}); }
  // The same for one that has to wait for an unload: what is free now it leaves to others as far as
  // it can, since they may use it in the meantime.
  void claim_later(const Charge& need) { take(need, {&unloading, &available, &leaving}); }

  void claim_channels(const Charge& need) {
    need.for_each([&](DeviceIndex d, Bytes) {
      std::uint32_t& left = channels[position(d)];
      if (left > 0) --left;
    });
  }

 private:
  using Kinds = std::array<std::array<Bytes, kMaxDevices>*, 3>;

  static void take(const Charge& need, const Kinds& kinds) {
    need.for_each([&](DeviceIndex d, Bytes amount) {
      for (auto* kind : kinds) {
        Bytes& there = (*kind)[position(d)];
        const Bytes taken = std::min(there, amount);
        there -= taken;
        amount -= taken;
      }
    });
  }
};

}  // namespace modelyard

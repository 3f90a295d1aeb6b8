#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "modelyard/yard.hpp"

namespace modelyard {

/// What one scheduling pass has left for the models it has not looked at yet. A pass looks at the
/// waiting models in the order of their turns and takes from here what each of them gets or keeps,
/// so that nothing is promised twice and no model takes what one before it waits for.
/// Made anew for every pass: there is no state to leak.
struct Yard::Pass {
  Room room;
  std::array<std::uint32_t, kMaxDevices> channels{};
  // A free channel that is kept for a model which has to wait for another one until then.
  std::array<Tick, kMaxDevices> kept_from;
  std::vector<Resident> idle;
  bool idle_known{false};
  std::vector<double> demands;  // Of each device; known with idle, where there are several.

  Pass() { kept_from.fill(kNever); }

  // True if a channel is free on all devices that a load touches, kept or not.
  [[nodiscard]] bool has_channels(const Charge& need) const {
    bool all = true;
    need.for_each([&](DeviceIndex d, Bytes) { all = all && channels[position(d)] > 0; });
    return all;
  }

  // What is asked of a device; 0 where there is only one.
  [[nodiscard]] double demand_on(DeviceIndex device) const {
    return device == kNoDevice || demands.empty() ? 0 : demands[position(device)];
  }

  // True if one is free on some device that it touches.
  [[nodiscard]] bool has_a_channel(const Charge& need) const {
    bool any = false;
    need.for_each([&](DeviceIndex d, Bytes) { any = any || channels[position(d)] > 0; });
    return any;
  }

  // True if a load that takes so long may begin on all devices that it touches.
  [[nodiscard]] bool has_channels(const Charge& need, Tick now, Duration takes) const {
    bool in_time = has_channels(need);
    need.for_each([&](DeviceIndex d, Bytes) {
      const Tick from = kept_from[position(d)];
      in_time = in_time && (from == kNever || saturating_add(now, takes) <= from);
    });
    return in_time;
  }

  [[nodiscard]] bool has_any_channel() const {
    return std::any_of(channels.begin(), channels.end(), [](std::uint32_t n) { return n > 0; });
  }

  // What a load needs of a device, given what older models keep: a share of models that drain is
  // there for it only if nobody waits for these bytes to come back and no deficit is owed them.
  [[nodiscard]] Need unclaimed(const Need& need) const {
    bool there = true;
    need.later.for_each([&](DeviceIndex d, Bytes later) {
      there = there && saturating_sub(later, need.now.on(d)) <= room.leaving[position(d)];
    });
    return there ? need : Need{.now = need.later, .later = need.later};
  }

  enum class Reach { kNow, kSoon, kLater, kNot };

  // When the bytes will be there without another victim.
  [[nodiscard]] Reach reach(const Need& need) const {
    Reach worst = Reach::kNow;
    const Charge most = need.now.max(need.later);
    most.for_each([&](DeviceIndex d, Bytes) {
      const std::size_t i = position(d);
      const Bytes soon = room.available[i] + room.unloading[i];
      Reach here = Reach::kNot;
      if (need.now.on(d) <= room.available[i]) {
        here = Reach::kNow;
      } else if (need.now.on(d) <= soon) {
        here = Reach::kSoon;
      } else if (need.later.on(d) <= soon + room.leaving[i]) {
        here = Reach::kLater;
      }
      worst = std::max(worst, here);
    });
    return worst;
  }

  // What is missing when what is free and being unloaded is counted, and, with `leaving`, what
  // leaves when its requests have ended.
  [[nodiscard]] Charge shortfall(const Need& need, bool with_leaving) const {
    Charge missing;
    (with_leaving ? need.later : need.now).for_each([&](DeviceIndex d, Bytes amount) {
      const std::size_t i = position(d);
      const Bytes coming = room.unloading[i] + (with_leaving ? room.leaving[i] : Bytes{0});
      missing.set(d, saturating_sub(amount, room.available[i] + coming));
    });
    return missing;
  }

  // The least room it leaves on a device it touches.
  [[nodiscard]] Bytes room_after(const Charge& need) const {
    Bytes least{kMaxBytes};
    need.for_each([&](DeviceIndex d, Bytes amount) {
      least = std::min(least, saturating_sub(room.available[position(d)], amount));
    });
    return least;
  }

  // Something was loaded or made to leave: what that changed, this has more or less of.
  void follow(const Room& before, const Room& after) {
    for (std::size_t i = 0; i < room.available.size(); ++i) {
      // A share that was taken over does not come back. If an older model counts on it, what the
      // younger one had ready for it is the older one's now.
      const Bytes kept =
          saturating_sub(before.unloading[i], room.unloading[i] + after.unloading[i]);
      room.available[i] =
          saturating_sub(room.available[i] + after.available[i], before.available[i] + kept);
      room.unloading[i] =
          saturating_sub(room.unloading[i] + after.unloading[i], before.unloading[i]);
      room.leaving[i] = saturating_sub(room.leaving[i] + after.leaving[i], before.leaving[i]);
    }
  }

  // Keeps the bytes from whoever is looked at later.
  void claim(const Charge& need) { take(need, {&room.available, &room.unloading, &room.leaving}); }
  // The same for one that has to wait for an unload: what is free now it leaves to others as far as
  // it can, since they may use it in the meantime.
  void claim_later(const Charge& need) {
    take(need, {&room.unloading, &room.available, &room.leaving});
  }

  // Keeps the free ones of the channels that a load needs, from when the others are free too.
  void keep_channels(const Charge& need, Tick from) {
    need.for_each([&](DeviceIndex d, Bytes) {
      const std::size_t i = position(d);
      if (channels[i] > 1) {
        --channels[i];
      } else {
        kept_from[i] = std::min(kept_from[i], from);
      }
    });
  }

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

#pragma once

#include <algorithm>
#include <chrono>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>

// The core's vocabulary: bytes, devices, times and ids, each a type of its own so that one cannot
// be passed for another.

namespace modelyard {

/// Most devices one yard manages. A charge is an array of this length, so a copy is a few cache
/// lines and never allocates.
inline constexpr std::size_t kMaxDevices = 16;

/// Most bytes a single amount (a budget, or one model on one device) may have: 64 TiB. With
/// kMaxModels it bounds every sum in the core by 2^62, so that sums of valid amounts never
/// overflow.
inline constexpr std::int64_t kMaxBytes = (std::int64_t{1} << 46) - 1;

/// Most models one yard manages.
inline constexpr std::size_t kMaxModels = std::size_t{1} << 16;

/// Most alternatives a model's placement has.
inline constexpr std::size_t kMaxPlacements = 16;

/// An amount of memory, never negative. Single amounts that come from outside are checked with
/// is_valid; sums of valid ones cannot overflow (see kMaxBytes). Differences that could be negative
/// go through saturating_sub.
struct Bytes {
  std::int64_t value{0};

  friend constexpr auto operator<=>(Bytes, Bytes) = default;
  constexpr Bytes& operator+=(Bytes other) {
    value += other.value;
    return *this;
  }
  constexpr Bytes& operator-=(Bytes other) {
    value -= other.value;
    return *this;
  }
  friend constexpr Bytes operator+(Bytes a, Bytes b) { return a += b; }
  friend constexpr Bytes operator-(Bytes a, Bytes b) { return a -= b; }
};

[[nodiscard]] constexpr bool is_valid(Bytes amount) {
  return amount.value >= 0 && amount.value <= kMaxBytes;
}

/// a + b, or nothing if the sum is above kMaxBytes. Both must be valid.
[[nodiscard]] constexpr std::optional<Bytes> checked_add(Bytes a, Bytes b) {
  if (b.value > kMaxBytes - a.value) return std::nullopt;
  return a + b;
}

/// a + b, but not above kMaxBytes. Both must be valid.
[[nodiscard]] constexpr Bytes saturating_add(Bytes a, Bytes b) {
  return checked_add(a, b).value_or(Bytes{kMaxBytes});
}

/// a - b, but not below zero.
[[nodiscard]] constexpr Bytes saturating_sub(Bytes a, Bytes b) { return a > b ? a - b : Bytes{0}; }

/// Position of a device in the yard's list of budgets.
enum class DeviceIndex : std::uint32_t {};

/// Where no device is meant.
inline constexpr DeviceIndex kNoDevice{0xffffffffU};

[[nodiscard]] constexpr std::size_t position(DeviceIndex device) {
  return static_cast<std::size_t>(device);
}

/// Position of an entry in the table; used inside the core only. Outside, a ModelId carries the
/// generation as well.
using EntryIndex = std::uint32_t;

/// Ids handed out by the yard: the low 32 bits are a slot, the high ones its generation, so that an
/// id whose slot has been given to somebody else is recognised as stale. Zero is never an id. All
/// ids are below 2^63.
enum class ModelId : std::uint64_t {};
enum class TicketId : std::uint64_t {};
enum class LeaseId : std::uint64_t {};

/// Counts requests. Policies measure time in requests, so that a quiet night does not age what is
/// resident.
using RequestClock = std::uint64_t;

/// Time as the caller counts it, in nanoseconds from a start of its choice. The core has no clock
/// of its own: a simulation's time works as well as the machine's.
struct YardClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<YardClock>;
  static constexpr bool is_steady = true;
};
using Duration = YardClock::duration;
using Tick = YardClock::time_point;

/// A time that never comes: the deadline of a request that has none.
inline constexpr Tick kNever = Tick{Duration{std::numeric_limits<std::int64_t>::max()}};

[[nodiscard]] inline double seconds_of(Duration duration) {
  return std::chrono::duration<double>(duration).count();
}

/// Not below zero. Beyond some 290 years the cast would overflow; nobody waits that long.
[[nodiscard]] inline Duration from_seconds(double value) {
  constexpr double kMost = 9e9;
  return std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(std::clamp(value, 0.0, kMost)));
}

/// at + wait, or kNever if that is beyond it. `wait` must not be negative.
[[nodiscard]] constexpr Tick saturating_add(Tick at, Duration wait) {
  if (at.time_since_epoch().count() > std::numeric_limits<std::int64_t>::max() - wait.count()) {
    return kNever;
  }
  return at + wait;
}

}  // namespace modelyard

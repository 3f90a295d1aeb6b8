#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "modelyard/result.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// Bytes per device.
///
/// Invariants: every amount is valid (see Bytes); `mask` has a bit for exactly the devices with a
/// non-zero amount. Value type. Thread-compatible: concurrent reads are fine, writes need the
/// owner's protection.
class Charge {
 public:
  Charge() = default;

  /// A charge on one device. `amount` must be valid.
  Charge(DeviceIndex device, Bytes amount) { set(device, amount); }

  [[nodiscard]] Bytes on(DeviceIndex device) const { return amounts_[position(device)]; }

  /// Replaces the amount on one device. `device` must be below kMaxDevices and `amount` valid.
  void set(DeviceIndex device, Bytes amount);

  [[nodiscard]] bool empty() const { return mask_ == 0; }

  /// True if both charge some device.
  [[nodiscard]] bool overlaps(const Charge& other) const { return (mask_ & other.mask_) != 0; }

  /// Calls f(DeviceIndex, Bytes) for every device with a non-zero amount that `other` charges too.
  template <typename F>
  void for_each_shared(const Charge& other, F&& f) const {
    each(mask_ & other.mask_, f);
  }

  /// Sum over the devices. May be above kMaxBytes.
  [[nodiscard]] Bytes total() const;

  /// True if no device beyond the first `device_count` is charged.
  [[nodiscard]] bool within(std::size_t device_count) const {
    return (std::uint64_t{mask_} >> device_count) == 0;
  }

  /// The larger amount of the two on every device.
  [[nodiscard]] Charge max(const Charge& other) const;

  /// True if this charge has no more than `other` on every device.
  [[nodiscard]] bool fits_within(const Charge& other) const;

  /// The sum of the two on every device, not above kMaxBytes on any.
  [[nodiscard]] Charge saturating_plus(const Charge& other) const;

  /// This charge less `other`, not below zero on any device.
  [[nodiscard]] Charge saturating_minus(const Charge& other) const;

  /// Takes `other` off this charge, not below zero on any device.
  void reduce(const Charge& other) {
    each(mask_ & other.mask_, [&](DeviceIndex device, Bytes amount) {
      set(device, saturating_sub(amount, other.on(device)));
    });
  }

  /// Calls f(DeviceIndex, Bytes) for every device with a non-zero amount, in order.
  template <typename F>
  void for_each(F&& f) const {
    each(mask_, f);
  }

  friend bool operator==(const Charge&, const Charge&) = default;

 private:
  template <typename F>
  void each(std::uint32_t mask, F&& f) const {
    for (std::uint32_t left = mask; left != 0; left &= left - 1) {
      const auto device = static_cast<DeviceIndex>(std::countr_zero(left));
      f(device, amounts_[position(device)]);
    }
  }

  std::uint32_t mask_{
      0};  // First, beside the first amounts: a scan reads both from one cache line.
  std::array<Bytes, kMaxDevices> amounts_{};
  static_assert(kMaxDevices <= 32, "the mask has one bit for each device");
};

}  // namespace modelyard

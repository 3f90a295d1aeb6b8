#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/result.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// What charged bytes are for.
enum class Kind : std::uint8_t { kNone, kReserved, kResident, kDraining };

/// What one device has promised and holds.
struct Account {
  Bytes budget;
  Bytes reserved;  ///< Promised to loads that run.
  Bytes resident;  ///< Held by resident models.
  Bytes draining;  ///< Held by models that are leaving. Counts until the memory is measurably back.
  Bytes quarantined;  ///< Should have come back and did not.
  Bytes deficit;      ///< How far `used` may be above `budget`, and why is on record: see Ledger.
  Bytes peak;         ///< Highest `used` so far.

  [[nodiscard]] Bytes used() const { return reserved + resident + draining + quarantined; }
  [[nodiscard]] Bytes free() const { return saturating_sub(budget, used()); }
};

/// The bytes of every device, by what they are for.
///
/// Invariants, for every device after every call:
///   used <= budget + deficit, and deficit == max(0, used - budget).
///   A reservation never makes or widens a deficit. Only three things do, because they report facts
///   that are already so: commit and remeasure with more bytes than were reserved, and a lower
///   budget.
/// Every call that can fail changes all devices or none.
/// Not thread-safe.
class Ledger {
 public:
  /// One account a budget, at most kMaxDevices; all budgets valid.
  explicit Ledger(std::span<const Bytes> budgets);

  [[nodiscard]] std::size_t device_count() const { return accounts_.size(); }
  [[nodiscard]] const Account& account(DeviceIndex device) const {
    return accounts_[position(device)];
  }

  /// True if some device is above its budget.
  [[nodiscard]] bool any_deficit() const;

  /// True if `charge` is within the free bytes of every device it touches.
  [[nodiscard]] bool fits(const Charge& charge) const;

  /// Promises the bytes of a load. Fails with kCapacity, changing nothing, unless fits(charge).
  Status reserve(const Charge& charge);
  /// Takes a promise back, all of it.
  void cancel_reservation(const Charge& reserved);
  /// A load has ended: what was promised is gone, what is really held is resident.
  void commit(const Charge& reserved, const Charge& actual);
  /// A resident (or, with `leaving`, draining) model holds other bytes than thought.
  void remeasure(const Charge& before, const Charge& actual, bool leaving);
  /// A resident model is leaving.
  void begin_drain(const Charge& held);
  /// A model has left: `freed` is back, the rest of `held` is quarantined. `freed` must fit within
  /// `held`.
  void finish_drain(const Charge& held, const Charge& freed);
  /// Quarantined bytes have come back after all.
  void reclaim(const Charge& charge);
  /// Bytes that several models hold together are now for something else. From kNone they must fit;
  /// to kNone they are back.
  void shift(DeviceIndex device, Bytes bytes, Kind from, Kind to);
  /// Sets a device's budget. `budget` must be valid.
  void set_budget(DeviceIndex device, Bytes budget);

 private:
  void settle(DeviceIndex device);

  std::vector<Account> accounts_;
};

}  // namespace modelyard

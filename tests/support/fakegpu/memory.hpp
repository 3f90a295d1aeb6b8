#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace fakegpu {

inline constexpr int kDeviceCount = 4;

// The bytes of one device: how many there are, how many are taken, how many were at most.
//
// Invariants: used <= peak; no reservation makes used exceed the budget. A budget may be set below
// what is used: what is there stays, and nothing new fits until enough is given back.
// Thread-safe.
class Ledger {
 public:
  struct Totals {
    std::uint64_t budget;
    std::uint64_t used;
    std::uint64_t peak;
  };

  // Takes all the bytes or none.
  [[nodiscard]] bool reserve(std::uint64_t bytes);
  void release(std::uint64_t bytes) noexcept;

  void set_budget(std::uint64_t bytes);
  // The highest use from now on begins at what is used now.
  void reset_peak();
  [[nodiscard]] Totals totals() const;

 private:
  mutable std::mutex mutex_;
  Totals totals_{INT64_MAX, 0, 0};
};

// The ledger of fakegpu:<device>, 0 <= device < kDeviceCount. Lives as long as the process.
Ledger& ledger(int device);

}  // namespace fakegpu

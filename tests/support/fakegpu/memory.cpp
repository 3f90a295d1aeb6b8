#include "memory.hpp"

#include <algorithm>
#include <array>

namespace fakegpu {

bool Ledger::reserve(std::uint64_t bytes) {
  const std::scoped_lock lock(mutex_);
  // By subtraction: a sum could overflow.
  if (totals_.used > totals_.budget || bytes > totals_.budget - totals_.used) return false;
  totals_.used += bytes;
  totals_.peak = std::max(totals_.peak, totals_.used);
  return true;
}

void Ledger::release(std::uint64_t bytes) noexcept {
  const std::scoped_lock lock(mutex_);
  totals_.used -= bytes;
}

void Ledger::set_budget(std::uint64_t bytes) {
  const std::scoped_lock lock(mutex_);
  totals_.budget = bytes;
}

void Ledger::reset_peak() {
  const std::scoped_lock lock(mutex_);
  totals_.peak = totals_.used;
}

Ledger::Totals Ledger::totals() const {
  const std::scoped_lock lock(mutex_);
  return totals_;
}

Ledger& ledger(int device) {
  // Never destroyed: tensors may outlive every static object.
  static auto* const ledgers = new std::array<Ledger, kDeviceCount>;
  return ledgers->at(static_cast<std::size_t>(device));
}

}  // namespace fakegpu

// What Python reaches by ctypes. Not torch operators: those would be seen by dispatch modes. The
// caller checks the device's number.
extern "C" {

int fakegpu_device_count() { return fakegpu::kDeviceCount; }

std::uint64_t fakegpu_budget_bytes(int device) { return fakegpu::ledger(device).totals().budget; }

std::uint64_t fakegpu_used_bytes(int device) { return fakegpu::ledger(device).totals().used; }

std::uint64_t fakegpu_peak_bytes(int device) { return fakegpu::ledger(device).totals().peak; }

void fakegpu_set_budget(int device, std::uint64_t bytes) {
  fakegpu::ledger(device).set_budget(bytes);
}

void fakegpu_reset_peak(int device) { fakegpu::ledger(device).reset_peak(); }

}  // extern "C"

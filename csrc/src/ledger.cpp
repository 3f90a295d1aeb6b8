#include "modelyard/ledger.hpp"

#include <algorithm>
#include <cassert>

namespace modelyard {

Ledger::Ledger(std::span<const Bytes> budgets) {
  assert(!budgets.empty() && budgets.size() <= kMaxDevices);
  accounts_.resize(budgets.size());
  for (std::size_t i = 0; i < budgets.size(); ++i) accounts_[i].budget = budgets[i];
}

bool Ledger::any_deficit() const {
  return std::any_of(accounts_.begin(), accounts_.end(),
                     [](const Account& account) { return account.deficit > Bytes{0}; });
}

bool Ledger::fits(const Charge& charge) const {
  bool fits = true;
  charge.for_each(
      [&](DeviceIndex device, Bytes amount) { fits = fits && amount <= account(device).free(); });
  return fits;
}

Status Ledger::reserve(const Charge& charge) {
  if (!fits(charge))
    return Error{ErrorCode::kCapacity, "the charge is above a device's free bytes"};
  charge.for_each([this](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].reserved += amount;
    settle(device);
  });
  return Done{};
}

void Ledger::cancel_reservation(const Charge& reserved) {
  reserved.for_each([this](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].reserved -= amount;
    settle(device);
  });
}

void Ledger::commit(const Charge& reserved, const Charge& actual) {
  // Both sides of a device change before it is settled, so that the peak never sees the model
  // twice.
  reserved.for_each(
      [this](DeviceIndex device, Bytes amount) { accounts_[position(device)].reserved -= amount; });
  actual.for_each([this](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].resident += amount;
    settle(device);
  });
  reserved.for_each([this](DeviceIndex device, Bytes) { settle(device); });
}

void Ledger::remeasure(const Charge& before, const Charge& actual, bool leaving) {
  Bytes Account::* const kind = leaving ? &Account::draining : &Account::resident;
  before.for_each(
      [&](DeviceIndex device, Bytes amount) { accounts_[position(device)].*kind -= amount; });
  actual.for_each([&](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].*kind += amount;
    settle(device);
  });
  before.for_each([this](DeviceIndex device, Bytes) { settle(device); });
}

void Ledger::begin_drain(const Charge& held) {
  held.for_each([this](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].resident -= amount;
    accounts_[position(device)].draining += amount;
  });
}

void Ledger::finish_drain(const Charge& held, const Charge& freed) {
  assert(freed.fits_within(held));
  held.for_each([&](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].draining -= amount;
    accounts_[position(device)].quarantined += amount - freed.on(device);
    settle(device);
  });
}

void Ledger::reclaim(const Charge& charge) {
  charge.for_each([this](DeviceIndex device, Bytes amount) {
    accounts_[position(device)].quarantined -= amount;
    settle(device);
  });
}

void Ledger::shift(DeviceIndex device, Bytes bytes, Kind from, Kind to) {
  Account& account = accounts_[position(device)];
  const auto bytes_of = [&](Kind kind) -> Bytes* {
    switch (kind) {
      case Kind::kReserved:
        return &account.reserved;
      case Kind::kResident:
        return &account.resident;
      case Kind::kDraining:
        return &account.draining;
      case Kind::kNone:
        break;
    }
    return nullptr;
  };
  if (Bytes* less = bytes_of(from)) *less -= bytes;
  if (Bytes* more = bytes_of(to)) *more += bytes;
  settle(device);
}

void Ledger::set_budget(DeviceIndex device, Bytes budget) {
  accounts_[position(device)].budget = budget;
  settle(device);
}

void Ledger::settle(DeviceIndex device) {
  Account& account = accounts_[position(device)];
  account.deficit = saturating_sub(account.used(), account.budget);
  account.peak = std::max(account.peak, account.used());
}

}  // namespace modelyard

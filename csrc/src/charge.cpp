#include "modelyard/charge.hpp"

#include <algorithm>
#include <cassert>

namespace modelyard {

void Charge::set(DeviceIndex device, Bytes amount) {
  assert(position(device) < kMaxDevices && is_valid(amount));
  amounts_[position(device)] = amount;
  const std::uint32_t bit = std::uint32_t{1} << position(device);
  mask_ = amount.value == 0 ? mask_ & ~bit : mask_ | bit;
}

Bytes Charge::total() const {
  Bytes sum{};
  for_each([&sum](DeviceIndex, Bytes amount) { sum += amount; });
  return sum;
}

Charge Charge::max(const Charge& other) const {
  Charge larger = *this;
  other.for_each([&larger](DeviceIndex device, Bytes amount) {
    larger.set(device, std::max(larger.on(device), amount));
  });
  return larger;
}

bool Charge::fits_within(const Charge& other) const {
  bool fits = true;
  for_each([&](DeviceIndex device, Bytes amount) { fits = fits && amount <= other.on(device); });
  return fits;
}

Charge Charge::saturating_plus(const Charge& other) const {
  Charge sum = *this;
  other.for_each([&sum](DeviceIndex device, Bytes amount) {
    sum.set(device, saturating_add(sum.on(device), amount));
  });
  return sum;
}

Charge Charge::saturating_minus(const Charge& other) const {
  Charge rest;
  for_each([&](DeviceIndex device, Bytes amount) {
    rest.set(device, saturating_sub(amount, other.on(device)));
  });
  return rest;
}

}  // namespace modelyard

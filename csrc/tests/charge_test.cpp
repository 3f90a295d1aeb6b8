#include "modelyard/charge.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"

namespace modelyard::test {
namespace {

std::vector<std::pair<std::size_t, std::int64_t>> listed(const Charge& held) {
  std::vector<std::pair<std::size_t, std::int64_t>> result;
  held.for_each(
      [&](DeviceIndex at, Bytes bytes) { result.emplace_back(position(at), bytes.value); });
  return result;
}

TEST(Bytes, AreValidFromZeroToTheLargestAmount) {
  EXPECT_TRUE(is_valid(Bytes{0}));
  EXPECT_TRUE(is_valid(Bytes{kMaxBytes}));
  EXPECT_FALSE(is_valid(Bytes{-1}));
  EXPECT_FALSE(is_valid(Bytes{kMaxBytes + 1}));
}

TEST(Bytes, CheckedSumStopsAtTheLargestAmount) {
  EXPECT_EQ(checked_add(Bytes{kMaxBytes - 1}, Bytes{1}), Bytes{kMaxBytes});
  EXPECT_EQ(checked_add(Bytes{kMaxBytes}, Bytes{1}), std::nullopt);
  EXPECT_EQ(checked_add(Bytes{kMaxBytes}, Bytes{kMaxBytes}), std::nullopt);
  EXPECT_EQ(saturating_add(Bytes{kMaxBytes}, Bytes{kMaxBytes}), Bytes{kMaxBytes});
  EXPECT_EQ(saturating_add(Bytes{1}, Bytes{2}), Bytes{3});
}

TEST(Bytes, DifferenceStopsAtZero) {
  EXPECT_EQ(saturating_sub(Bytes{5}, Bytes{3}), Bytes{2});
  EXPECT_EQ(saturating_sub(Bytes{3}, Bytes{5}), Bytes{0});
}

TEST(Ticks, SumStopsAtNever) {
  EXPECT_EQ(saturating_add(Tick{seconds{1}}, seconds{2}), Tick{seconds{3}});
  EXPECT_EQ(saturating_add(kNever, seconds{1}), kNever);
  EXPECT_EQ(saturating_add(Tick{seconds{-1}}, Duration::max()), kNever - seconds{1});
}

TEST(Charge, IsEmptyAtFirst) {
  const Charge nothing;
  EXPECT_TRUE(nothing.empty());
  EXPECT_EQ(nothing.total(), Bytes{0});
  EXPECT_TRUE(listed(nothing).empty());
}

TEST(Charge, ListsChargedDevicesInOrder) {
  const Charge held = charge({{15, 4}, {0, 1}, {7, 2}});
  EXPECT_EQ(listed(held),
            (std::vector<std::pair<std::size_t, std::int64_t>>{{0, 1}, {7, 2}, {15, 4}}));
  EXPECT_EQ(held.on(device(7)), Bytes{2});
  EXPECT_EQ(held.on(device(8)), Bytes{0});
}

TEST(Charge, ForgetsADeviceThatIsSetToZero) {
  Charge held = charge({{0, 1}, {3, 2}});
  held.set(device(3), Bytes{0});
  EXPECT_EQ(held, Charge(device(0), Bytes{1}));
  held.set(device(0), Bytes{0});
  EXPECT_TRUE(held.empty());
  EXPECT_EQ(held, Charge{});
}

TEST(Charge, ReplacesAnAmountInsteadOfAddingToIt) {
  Charge held = charge({{2, 5}});
  held.set(device(2), Bytes{3});
  EXPECT_EQ(held.on(device(2)), Bytes{3});
  EXPECT_EQ(held.total(), Bytes{3});
}

TEST(Charge, OfZeroBytesIsEmpty) { EXPECT_TRUE(Charge(device(5), Bytes{0}).empty()); }

TEST(Charge, TotalIsTheSumEvenWhereItIsNoValidAmount) {
  EXPECT_EQ(charge({{0, 3}, {1, 4}}).total(), Bytes{7});
  Charge held;
  for (std::uint32_t i = 0; i < kMaxDevices; ++i) held.set(device(i), Bytes{kMaxBytes});
  EXPECT_EQ(held.total(), Bytes{kMaxBytes * static_cast<std::int64_t>(kMaxDevices)});
}

TEST(Charge, SumStopsAtTheLargestAmountOnEveryDevice) {
  const Charge total = charge({{0, kMaxBytes}, {1, 2}}).saturating_plus(charge({{0, 1}, {2, 3}}));
  EXPECT_EQ(total, charge({{0, kMaxBytes}, {1, 2}, {2, 3}}));
}

TEST(Bytes, NoSumInTheCoreCanOverflow) {
  // The largest sums: every model on every device, and the budgets.
  constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
  static_assert(kMaxBytes <= largest / static_cast<std::int64_t>(kMaxModels));
  static_assert(kMaxBytes <= largest / static_cast<std::int64_t>(kMaxDevices));
}

TEST(Charge, KnowsWhetherItStaysWithinTheDevices) {
  const Charge held = charge({{0, 1}, {3, 1}});
  EXPECT_FALSE(held.within(3));
  EXPECT_TRUE(held.within(4));
  EXPECT_TRUE(charge({{15, 1}}).within(kMaxDevices));
  EXPECT_TRUE(Charge{}.within(0));
}

TEST(Charge, FitsWithinComparesEveryDevice) {
  const Charge small = charge({{0, 1}, {1, 2}});
  EXPECT_TRUE(small.fits_within(charge({{0, 1}, {1, 2}, {2, 9}})));
  EXPECT_FALSE(small.fits_within(charge({{0, 9}, {1, 1}})));
  EXPECT_FALSE(small.fits_within(charge({{0, 9}})));
  EXPECT_TRUE(Charge{}.fits_within(Charge{}));
}

TEST(Charge, ArithmeticAgreesWithPlainArraysOnRandomCharges) {
  for (std::uint32_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto draw = [&] {
      Charge made;
      for (std::uint32_t i = 0; i < kMaxDevices; ++i) {
        if (random() % 2 == 0) made.set(device(i), Bytes{static_cast<std::int64_t>(random() % 5)});
      }
      return made;
    };
    const Charge a = draw();
    const Charge b = draw();
    const Charge larger = a.max(b);
    const Charge less = a.saturating_minus(b);
    const Charge more = a.saturating_plus(b);
    bool fits = true;
    std::int64_t total = 0;
    for (std::uint32_t i = 0; i < kMaxDevices; ++i) {
      const DeviceIndex at = device(i);
      EXPECT_EQ(larger.on(at), std::max(a.on(at), b.on(at)));
      EXPECT_EQ(more.on(at), a.on(at) + b.on(at));
      EXPECT_EQ(less.on(at), saturating_sub(a.on(at), b.on(at)));
      fits = fits && a.on(at) <= b.on(at);
      total += a.on(at).value;
    }
    EXPECT_EQ(a.fits_within(b), fits);
    EXPECT_EQ(a.total(), Bytes{total});
    // The mask names exactly the devices with bytes, or for_each would visit others.
    for (const Charge& each : {larger, less, more}) {
      for (const auto& [at, bytes] : listed(each)) EXPECT_GT(bytes, 0) << "device " << at;
      EXPECT_EQ(each.empty(), listed(each).empty());
    }
    EXPECT_EQ(a == b, a.fits_within(b) && b.fits_within(a));
  }
}

}  // namespace
}  // namespace modelyard::test

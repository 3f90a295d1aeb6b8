#include "policies/shadow.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "policy_reference.hpp"

namespace modelyard::test {
namespace {

// 1 to `most`.
Bytes some(std::mt19937& random, std::int64_t most) {
  return Bytes{std::uniform_int_distribution<std::int64_t>(1, most)(random)};
}

class EveryExpert : public ::testing::TestWithParam<std::string_view> {
 protected:
  static constexpr EntryIndex kEntries = 40;

  // A world of `devices` with a shadow and the slow one beside it.
  void run(std::uint32_t seed, std::size_t devices, std::int64_t budget) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    std::vector<Bytes> budgets(devices, Bytes{budget});
    History history;
    Footprints footprints;
    footprints.set_budgets(budgets);
    Shadow shadow(make_expert(GetParam()));
    SlowShadow slow(make_expert(GetParam()));
    std::vector<Charge> held(kEntries);
    std::vector<double> seconds(kEntries);
    const auto add = [&](EntryIndex entry) {
      history.add(entry);
      shadow.add(footprints, entry);
      footprints.add(entry);
      slow.add(entry);
      held[entry] = Charge{};
      for (std::size_t d = 0; d < devices; ++d) {
        if (d != entry % devices && random() % 3 != 0) continue;
        // One in fifteen is larger than the budget.
        held[entry].set(static_cast<DeviceIndex>(d),
                        some(random, random() % 15 == 0 ? 2 * budget : 150));
      }
      seconds[entry] = 0.1 + 1e-3 * static_cast<double>(random() % 5000);
    };
    for (EntryIndex entry = 0; entry < kEntries; ++entry) add(entry);
    RequestClock clock = 0;
    std::size_t most_held = 0;
    double paid = 0;
    for (int step = 0; step < 1500; ++step) {
      const auto entry =
          static_cast<EntryIndex>(std::min(random() % kEntries, random() % kEntries));
      clock += random() % 100 == 0 ? 1 + random() % 100'000 : 1;
      if (random() % 100 == 0) {
        budgets[random() % devices] = Bytes{budget / 2} + some(random, budget);
        footprints.set_budgets(budgets);
        shadow.reweigh(history, footprints);
      }
      if (random() % 60 == 0) add(entry);
      if (random() % 60 == 0) {
        held[entry].set(static_cast<DeviceIndex>(entry % devices), some(random, 150));
      }
      if (random() % 30 == 0) seconds[entry] *= 0.9;
      history.request(entry, clock);
      const Wish wish{.entry = entry,
                      .held = &held[entry],
                      .weight = footprints.weight(held[entry]),
                      .reload_seconds = seconds[entry]};
      const double fast = shadow.access(history, footprints, wish, clock);
      footprints.set(wish);
      const double expected = slow.access(history, wish, budgets, clock);
      ASSERT_EQ(fast, expected) << "step " << step;
      paid += fast;
      for (EntryIndex each = 0; each < kEntries; ++each) {
        ASSERT_EQ(shadow.holds(each), slow.holds(each)) << "entry " << each << ", step " << step;
      }
      ASSERT_NEAR(shadow.content_seconds(), slow.content_seconds(), 1e-6);
      most_held = std::max(most_held, slow.size());
    }
    EXPECT_GT(most_held, 3U);
    EXPECT_GT(paid, 0);
  }
};

TEST_P(EveryExpert, AShadowOfOneDeviceIsTheSlowOne) {
  for (std::uint32_t seed = 1; seed <= 6; ++seed) run(seed, 1, 800);
}

TEST_P(EveryExpert, AShadowOfSeveralDevicesIsTheSlowOne) {
  for (std::uint32_t seed = 1; seed <= 6; ++seed) run(seed, 3, 600);
}

TEST_P(EveryExpert, SmallOnesGoTogetherForALargeOne) {
  // Budgets of some thousands: a large one takes the place of more than are looked for one by one.
  for (std::uint32_t seed = 1; seed <= 3; ++seed) run(seed, 1, 2500);
}

TEST_P(EveryExpert, ACloneGoesItsOwnWay) {
  const Bytes budget{100};
  const Charge held(DeviceIndex{0}, Bytes{60});
  History history;
  Footprints footprints;
  footprints.set_budgets(std::span(&budget, 1));
  Shadow shadow(make_expert(GetParam()));
  for (const EntryIndex entry : {0U, 1U}) {
    history.add(entry);
    shadow.add(footprints, entry);
    footprints.add(entry);
  }
  const auto wish = [&](EntryIndex entry) {
    return Wish{.entry = entry, .held = &held, .weight = 0.6, .reload_seconds = 2};
  };
  history.request(0, 1);
  EXPECT_EQ(shadow.access(history, footprints, wish(0), 1), 2);
  footprints.set(wish(0));
  Shadow other(shadow);
  history.request(1, 2);
  EXPECT_EQ(other.access(history, footprints, wish(1), 2), 2);
  EXPECT_TRUE(other.holds(1));
  EXPECT_FALSE(other.holds(0));
  EXPECT_TRUE(shadow.holds(0));
  EXPECT_FALSE(shadow.holds(1));
  EXPECT_EQ(shadow.content_seconds(), 2);
}

INSTANTIATE_TEST_SUITE_P(Shadow, EveryExpert, ::testing::ValuesIn(kExperts), [](const auto& each) {
  std::string name(each.param);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace modelyard::test

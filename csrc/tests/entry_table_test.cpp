#include "modelyard/entry_table.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace modelyard::test {
namespace {

using Slots = SlotMap<std::string, ModelId>;

TEST(SlotMap, FindsWhatItWasGiven) {
  Slots slots;
  const ModelId a = slots.insert("a");
  const ModelId b = slots.insert("b");
  ASSERT_NE(slots.find(a), nullptr);
  EXPECT_EQ(*slots.find(a), "a");
  EXPECT_EQ(*slots.find(b), "b");
  EXPECT_EQ(slots.size(), 2U);
  EXPECT_EQ(slots.id_at(Slots::index_of(b)), b);
  EXPECT_EQ(*slots.at(Slots::index_of(b)), "b");
}

TEST(SlotMap, ZeroAndUnknownIdsNameNothing) {
  Slots slots;
  EXPECT_EQ(slots.find(ModelId{}), nullptr);
  EXPECT_NE(slots.insert("a"), ModelId{});
  EXPECT_EQ(slots.find(ModelId{}), nullptr);
  EXPECT_EQ(slots.find(static_cast<ModelId>(~std::uint64_t{0})), nullptr);
  EXPECT_EQ(slots.find(static_cast<ModelId>(std::uint64_t{1} << 32 | 77)), nullptr);
  EXPECT_FALSE(slots.erase(ModelId{}));
}

TEST(SlotMap, AnErasedIdIsStaleEvenWhenItsSlotIsGivenAway) {
  Slots slots;
  const ModelId old = slots.insert("old");
  EXPECT_TRUE(slots.erase(old));
  EXPECT_FALSE(slots.erase(old));
  EXPECT_EQ(slots.find(old), nullptr);
  EXPECT_EQ(slots.at(Slots::index_of(old)), nullptr);
  const ModelId young = slots.insert("young");
  EXPECT_EQ(Slots::index_of(young), Slots::index_of(old));
  EXPECT_NE(young, old);
  EXPECT_EQ(slots.find(old), nullptr);
  EXPECT_EQ(*slots.find(young), "young");
  EXPECT_FALSE(slots.erase(old));
  EXPECT_EQ(slots.size(), 1U);
}

TEST(SlotMap, IdsFitASignedInteger) {
  Slots slots;
  for (int i = 0; i < 1000; ++i) {
    const ModelId id = slots.insert("x");
    EXPECT_LT(static_cast<std::uint64_t>(id), std::uint64_t{1} << 63);
    EXPECT_NE(id, ModelId{});
    if (i % 3 != 0) slots.erase(id);
  }
}

TEST(SlotMap, AgreesWithAMapOnRandomUse) {
  for (std::uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Slots slots;
    std::map<ModelId, std::string> expected;
    std::set<ModelId> gone;
    for (int step = 0; step < 500; ++step) {
      if (expected.empty() || random() % 5 < 3) {
        const std::string value = std::to_string(step);
        const ModelId id = slots.insert(value);
        ASSERT_TRUE(expected.emplace(id, value).second) << "an id was given out twice";
        ASSERT_FALSE(gone.contains(id)) << "an id came back";
      } else {
        const auto victim =
            std::next(expected.begin(), static_cast<std::ptrdiff_t>(random() % expected.size()));
        ASSERT_TRUE(slots.erase(victim->first));
        gone.insert(victim->first);
        expected.erase(victim);
      }
      ASSERT_EQ(slots.size(), expected.size());
    }
    for (const auto& [id, value] : expected) {
      ASSERT_NE(slots.find(id), nullptr);
      EXPECT_EQ(*slots.find(id), value);
    }
    for (const ModelId id : gone) EXPECT_EQ(slots.find(id), nullptr);
    std::size_t used = 0;
    for (std::uint32_t i = 0; i < slots.slot_count(); ++i) used += slots.at(i) != nullptr ? 1 : 0;
    EXPECT_EQ(used, expected.size());
  }
}

TEST(State, EveryStateHasANameOfItsOwn) {
  std::set<std::string_view> names;
  for (const State state : {State::kCold, State::kQueued, State::kLoading, State::kResident,
                            State::kDraining, State::kUnloading, State::kFailed}) {
    EXPECT_FALSE(to_string(state).empty());
    EXPECT_TRUE(names.insert(to_string(state)).second) << to_string(state);
  }
}

TEST(Entry, IsColdAndHoldsNothingAtFirst) {
  const Entry entry;
  EXPECT_EQ(entry.state, State::kCold);
  EXPECT_TRUE(entry.held.empty());
  EXPECT_TRUE(entry.quarantined.empty());
  EXPECT_EQ(entry.lease_count, 0U);
  EXPECT_EQ(entry.waiting_count, 0U);
  EXPECT_EQ(entry.oldest, TicketId{});
}

}  // namespace
}  // namespace modelyard::test

#include "modelyard/departures.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "harness.hpp"

namespace modelyard::test {
namespace {

constexpr Tick at(int second) { return Tick{seconds{second}}; }

TEST(Departures, AVictimsAgeIsSinceItWasAskedForAndSinceItWasLoaded) {
  Departures departures;
  departures.add(0);
  departures.asked(0, at(1));
  departures.loaded(0, at(3));
  departures.asked(0, at(10));
  const Age age = departures.left(0, Why::kModel, at(25));
  EXPECT_EQ(age.idle, seconds{15});
  EXPECT_EQ(age.stayed, seconds{22});
  ASSERT_EQ(departures.ages().size(), 1U);
  EXPECT_EQ(departures.ages()[0].idle, seconds{15});
}

TEST(Departures, OnlyTheLastVictimsAreRemembered) {
  Departures departures;
  departures.add(0);
  const int count = static_cast<int>(Departures::kRecent) + 3;
  for (int i = 1; i <= count; ++i) departures.left(0, Why::kBudget, at(i));
  EXPECT_EQ(departures.count(Why::kBudget), Departures::kRecent + 3);
  ASSERT_EQ(departures.ages().size(), Departures::kRecent);
  Duration least = seconds{count}, sum{};
  for (const Age& age : departures.ages()) {
    least = std::min(least, age.idle);
    sum += age.idle;
  }
  EXPECT_EQ(least, seconds{4}) << "the first three are forgotten";
  EXPECT_EQ(sum, seconds{(4 + count) * (count - 3) / 2});
}

TEST(Departures, OfModelsThatNobodyChoseOnlyTheNumberIsTold) {
  Departures departures;
  departures.add(0);
  for (const Why why : {Why::kAsked, Why::kRemoved, Why::kDeviceClosed, Why::kLost}) {
    departures.left(0, why, at(1));
    EXPECT_EQ(departures.count(why), 1U) << to_string(why);
  }
  EXPECT_TRUE(departures.ages().empty());
  EXPECT_EQ(departures.count(Why::kModel), 0U);
}

class Leaving : public ::testing::Test {
 protected:
  static YardOptions lru() {
    YardOptions made = options({100});
    made.policy = "lru";
    return made;
  }
  void touch(ModelId model) {
    const Outcome hit = h_.try_acquire(model);
    ASSERT_TRUE(hit.lease);
    EXPECT_FALSE(h_.release(*hit.lease));
  }
  [[nodiscard]] std::uint64_t count(Why why) const { return h_.yard().departures().count(why); }

  Harness h_{lru()};
  ModelId a_{h_.add("a", 60)};
  ModelId b_{h_.add("b", 60)};
};

TEST_F(Leaving, AnEvictionTellsHowOldItsVictimWasAndWhatItIsExpectedToCost) {
  const TicketId ticket = h_.request(a_);
  EXPECT_FALSE(h_.load_done(a_, h_.held(a_), seconds{3}));
  EXPECT_FALSE(h_.release(ticket));
  h_.skip(seconds{4});
  touch(a_);
  h_.skip(seconds{16});
  h_.request(b_);
  const std::vector<Explanation> told = h_.explained(Decision::kEvicted);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(told[0].model, a_);
  EXPECT_EQ(told[0].idle, seconds{16});
  EXPECT_EQ(told[0].stayed, seconds{20});
  EXPECT_EQ(told[0].expected_seconds, 3);
  EXPECT_EQ(told[0].rule, "lru");
  EXPECT_EQ(count(Why::kModel), 1U);
  ASSERT_EQ(h_.yard().departures().ages().size(), 1U);
  EXPECT_EQ(h_.yard().departures().ages()[0].stayed, seconds{20});
}

TEST_F(Leaving, ALoadTellsWhoWaitedForIt) {
  h_.request(a_);
  h_.skip(seconds{2});
  h_.request(a_);
  h_.skip(seconds{3});
  EXPECT_FALSE(h_.load_done(a_));
  const std::vector<Explanation> told = h_.explained(Decision::kLoadDone);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(told[0].waiting_count, 2U);
  EXPECT_EQ(told[0].waited, seconds{5});
  EXPECT_EQ(told[0].waited_sum, seconds{8});
}

TEST_F(Leaving, EachCauseIsCountedOnceForAModel) {
  h_.warm(a_);
  EXPECT_FALSE(h_.unload(a_));
  EXPECT_EQ(count(Why::kAsked), 1U);
  h_.finish_io();
  h_.warm(a_);
  EXPECT_FALSE(h_.set_closed(0, true));
  EXPECT_EQ(count(Why::kDeviceClosed), 1U);
  EXPECT_FALSE(h_.set_closed(0, false));
  h_.finish_io();
  h_.warm(a_);
  EXPECT_FALSE(h_.set_budget(0, 10));
  EXPECT_EQ(count(Why::kBudget), 1U);
  EXPECT_FALSE(h_.set_budget(0, 100));
  h_.finish_io();
  const LeaseId lease = h_.use(a_);
  EXPECT_FALSE(h_.unload(a_));
  ASSERT_EQ(h_.state(a_), State::kDraining);
  EXPECT_FALSE(h_.lost(a_));  // It was on its way out.
  EXPECT_EQ(count(Why::kLost), 0U);
  EXPECT_EQ(count(Why::kAsked), 2U);
  EXPECT_FALSE(h_.release(lease));
  h_.finish_io();
  h_.warm(a_);
  EXPECT_FALSE(h_.lost(a_));
  EXPECT_EQ(count(Why::kLost), 1U);
  h_.finish_io();
  h_.warm(a_);
  EXPECT_FALSE(h_.remove(a_));
  EXPECT_EQ(count(Why::kRemoved), 1U);
  EXPECT_EQ(h_.yard().departures().ages().size(), 1U) << "the one of the budget";
  h_.finish_io();
}

TEST_F(Leaving, ASlotIsUsedAgainWithoutItsPast) {
  h_.warm(a_);
  EXPECT_FALSE(h_.remove(a_));
  h_.finish_io();
  h_.skip(seconds{50});
  const ModelId c = h_.add("c", 60);
  h_.warm(c);
  h_.skip(seconds{1});
  h_.request(b_);
  EXPECT_EQ(h_.explained(Decision::kEvicted).back().model, c);
  EXPECT_EQ(h_.explained(Decision::kEvicted).back().idle, seconds{1});
  EXPECT_EQ(h_.explained(Decision::kEvicted).back().stayed, seconds{1});
}

}  // namespace
}  // namespace modelyard::test

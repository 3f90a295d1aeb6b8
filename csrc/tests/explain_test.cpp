#include "modelyard/explain.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string_view>

#include "modelyard/action.hpp"

namespace modelyard::test {
namespace {

TEST(ExplainLog, NumbersDecisionsInTheirOrder) {
  ExplainLog log(8);
  for (int i = 0; i < 3; ++i) {
    Explanation explanation;
    explanation.decision = Decision::kEvicted;
    explanation.sequence = 99;
    log.add(explanation);
  }
  ASSERT_EQ(log.entries().size(), 3U);
  EXPECT_GT(log.entries()[0].sequence, 0U);
  EXPECT_EQ(log.entries()[1].sequence, log.entries()[0].sequence + 1);
  EXPECT_EQ(log.entries()[2].sequence, log.entries()[0].sequence + 2);
}

TEST(ExplainLog, DropsTheOldestForANewOne) {
  ExplainLog log(3);
  for (std::int64_t i = 0; i < 10; ++i) {
    Explanation explanation;
    explanation.bytes = Bytes{i};
    log.add(explanation);
  }
  ASSERT_EQ(log.entries().size(), 3U);
  EXPECT_EQ(log.entries().front().bytes, Bytes{7});
  EXPECT_EQ(log.entries().back().bytes, Bytes{9});
  EXPECT_EQ(log.entries().back().sequence, log.entries().front().sequence + 2);
}

TEST(ExplainLog, KeepsTheFieldsOfADecision) {
  ExplainLog log(1);
  Explanation explanation;
  explanation.at = Tick{std::chrono::seconds{5}};
  explanation.decision = Decision::kDrained;
  explanation.model = static_cast<ModelId>(7);
  explanation.cause = static_cast<ModelId>(8);
  explanation.score = 0.25;
  explanation.bytes = Bytes{60};
  explanation.waited = std::chrono::seconds{31};
  log.add(explanation);
  const Explanation& kept = log.entries().front();
  EXPECT_EQ(kept.at, explanation.at);
  EXPECT_EQ(kept.decision, explanation.decision);
  EXPECT_EQ(kept.model, explanation.model);
  EXPECT_EQ(kept.cause, explanation.cause);
  EXPECT_EQ(kept.score, explanation.score);
  EXPECT_EQ(kept.bytes, explanation.bytes);
  EXPECT_EQ(kept.waited, explanation.waited);
}

TEST(ExplainLog, OfNoCapacityKeepsNothing) {
  ExplainLog log(0);
  log.add(Explanation{});
  log.add(Explanation{});
  EXPECT_TRUE(log.entries().empty());
}

TEST(Decision, EveryDecisionHasANameOfItsOwn) {
  std::set<std::string_view> names;
  for (const Decision decision :
       {Decision::kLoadStarted, Decision::kLoadDone, Decision::kLoadFailed, Decision::kEvicted,
        Decision::kDrained, Decision::kUnloaded, Decision::kQuarantined, Decision::kRefused,
        Decision::kOvershoot, Decision::kBudgetChanged, Decision::kPinned, Decision::kUnpinned,
        Decision::kDeviceClosed, Decision::kDeviceOpened, Decision::kQueued, Decision::kLost}) {
    EXPECT_FALSE(to_string(decision).empty());
    EXPECT_TRUE(names.insert(to_string(decision)).second) << to_string(decision);
  }
}

TEST(Why, EveryReasonToLeaveHasANameOfItsOwn) {
  std::set<std::string_view> names;
  for (const Why why : {Why::kNone, Why::kModel, Why::kBudget, Why::kDeviceClosed, Why::kAsked,
                        Why::kRemoved, Why::kLost}) {
    EXPECT_FALSE(to_string(why).empty());
    EXPECT_TRUE(names.insert(to_string(why)).second) << to_string(why);
  }
}

TEST(RefuseReason, EveryReasonHasANameOfItsOwn) {
  std::set<std::string_view> names;
  for (const RefuseReason reason :
       {RefuseReason::kNeverFits, RefuseReason::kBudgetExhausted, RefuseReason::kQueueFull,
        RefuseReason::kLoadFailed, RefuseReason::kDeadlineInQueue, RefuseReason::kDeadlineInLoad,
        RefuseReason::kRemoved}) {
    EXPECT_FALSE(to_string(reason).empty());
    EXPECT_TRUE(names.insert(to_string(reason)).second) << to_string(reason);
  }
}

}  // namespace
}  // namespace modelyard::test

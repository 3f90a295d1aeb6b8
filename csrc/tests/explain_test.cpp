// Decisions on record: the log that keeps them, and what the yard writes into it.

#include "modelyard/explain.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <string_view>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/action.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- The log ------------------------------------------------------------------------------------

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

// --- What the yard explains ---------------------------------------------------------------------

TEST(Yard, ExplainsAnEviction) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 70);
  h.warm(a);
  h.set_clock(Harness::at(seconds{7}));
  const double score = h.yard().plan_for(b).value().victims.at(0).score;
  h.request(b);
  const auto evicted = h.explained(Decision::kEvicted);
  ASSERT_EQ(evicted.size(), 1U);
  EXPECT_EQ(evicted[0].model, a);
  EXPECT_EQ(evicted[0].cause, b);
  EXPECT_EQ(evicted[0].bytes, Bytes{60});
  EXPECT_EQ(evicted[0].at, Harness::at(seconds{7}));
  EXPECT_GT(evicted[0].score, 0);
  EXPECT_LE(evicted[0].score, score * 10) << "the score by which it was chosen";
  EXPECT_FALSE(h.unload_done(a));
  const auto unloaded = h.explained(Decision::kUnloaded);
  ASSERT_EQ(unloaded.size(), 1U);
  EXPECT_EQ(unloaded[0].model, a);
  EXPECT_EQ(unloaded[0].bytes, Bytes{60});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_EQ(h.explained(Decision::kLoadStarted).back().model, b);
  EXPECT_EQ(h.explained(Decision::kLoadStarted).back().bytes, Bytes{70});
  EXPECT_EQ(h.explained(Decision::kLoadDone).back().model, b);
}

TEST(Yard, ExplainsHowLongTheOldestWaited) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 60);
  const ModelId cold = h.add("cold", 60);
  const LeaseId lease = h.use(hot);
  h.request(cold);
  h.pass(seconds{30});
  const auto drained = h.explained(Decision::kDrained);
  ASSERT_EQ(drained.size(), 1U);
  EXPECT_EQ(drained[0].model, hot);
  EXPECT_EQ(drained[0].cause, cold);
  EXPECT_FALSE(h.release(lease));
  h.skip(seconds{2});
  EXPECT_FALSE(h.unload_done(hot));
  const auto started = h.explained(Decision::kLoadStarted);
  EXPECT_EQ(started.back().model, cold);
  EXPECT_EQ(started.back().waited, Duration{seconds{32}});
}

TEST(Yard, ExplainsFailuresOvershootsQuarantinesRefusalsAndBudgets) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  ASSERT_EQ(h.explained(Decision::kLoadFailed).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kLoadFailed)[0].model, a);
  EXPECT_FALSE(h.explained(Decision::kRefused).empty());
  EXPECT_EQ(h.explained(Decision::kRefused)[0].model, a);
  h.skip(seconds{10});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 75}})));
  ASSERT_EQ(h.explained(Decision::kOvershoot).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kOvershoot)[0].model, a);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 70}})));
  ASSERT_EQ(h.explained(Decision::kQuarantined).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kQuarantined)[0].bytes, Bytes{5});
  EXPECT_FALSE(h.set_budget(0, 200));
  EXPECT_EQ(h.explained(Decision::kBudgetChanged).size(), 1U);
}

TEST(Yard, AnOvershootWithinTheBudgetIsStillOnRecord) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 61}})));
  EXPECT_EQ(h.explained(Decision::kOvershoot).size(), 1U);
  EXPECT_EQ(h.account().deficit, Bytes{0});
}

TEST(Yard, TheExplainLogIsBounded) {
  YardOptions wanted = options({100});
  wanted.explain_capacity = 5;
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  for (int i = 0; i < 10; ++i) {
    h.warm(a);
    h.warm(b);
  }
  const auto& log = h.yard().explanations().entries();
  ASSERT_EQ(log.size(), 5U);
  for (std::size_t i = 1; i < log.size(); ++i) EXPECT_EQ(log[i].sequence, log[i - 1].sequence + 1);
  EXPECT_GT(log.front().sequence, 40U);
}

TEST(Yard, ExplainsWhyAModelWasSentAway) {
  Harness h(options({100, 100}));
  const ModelId asked = h.add("asked", 20);
  const ModelId removed = h.add("removed", 20);
  const ModelId large = h.add("large", 50);
  const ModelId closed = h.add("closed", charge({{1, 30}}));
  for (const ModelId model : {asked, removed, large, closed}) h.warm(model);
  EXPECT_FALSE(h.unload(asked));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kAsked);
  EXPECT_FALSE(h.remove(removed));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kRemoved);
  EXPECT_FALSE(h.set_closed(1, true));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kDeviceClosed);
  EXPECT_EQ(h.explained(Decision::kEvicted).back().device, device(1));
  EXPECT_EQ(h.explained(Decision::kDeviceClosed).size(), 1U);
  EXPECT_FALSE(h.set_closed(1, true));
  EXPECT_EQ(h.explained(Decision::kDeviceClosed).size(), 1U) << "it was closed already";
  h.finish_io();
  EXPECT_FALSE(h.set_budget(0, 40));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kBudget);
  EXPECT_EQ(h.explained(Decision::kEvicted).back().device, device(0));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().model, large);
}

TEST(Yard, ExplainsPinsAndTheBeginningOfAWait) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_FALSE(h.pin(a));
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(h.explained(Decision::kPinned).size(), 1U);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_EQ(h.explained(Decision::kUnpinned).size(), 1U);
  h.request(a);
  h.request(a);
  EXPECT_EQ(h.explained(Decision::kQueued).size(), 1U) << "one wait, whoever joins it";
}

TEST(Yard, APinnedModelThatLoadsDoesNotStandInItsOwnWay) {
  Harness h(options({150}));
  const ModelId a = h.add("a", 100);
  const TicketId first = h.request(a);
  EXPECT_FALSE(h.pin(a));
  const TicketId second = h.request(a);
  EXPECT_TRUE(h.waiting(second)) << "it waits for the load that runs";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(first));
  EXPECT_TRUE(h.granted(second));
  const ModelId b = h.add("b", 100);
  EXPECT_EQ(h.refusal(h.request(b)).reason, RefuseReason::kBudgetExhausted)
      << "it does stand in the way of others";
  EXPECT_FALSE(h.release(first));
  EXPECT_FALSE(h.release(second));
}

}  // namespace
}  // namespace modelyard::test

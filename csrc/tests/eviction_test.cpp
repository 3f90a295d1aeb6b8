// Who makes room: idle models, as few as suffice, and those in use when their requests have ended.
// What the yard would do can be asked.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Eviction -----------------------------------------------------------------------------------

TEST(Yard, AnIdleModelMakesRoom) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.said(), Lines{"unload a"}) << "b may load only when a's memory is measurably back";
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(h.state(b), State::kQueued);
  EXPECT_EQ(h.used(), 60);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_FALSE(h.load_done(b));
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, NobodyLeavesWhileThereIsRoom) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 40);
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.count("unload a"), 0U);
  EXPECT_EQ(h.used(), 100);
}

TEST(Yard, LeasedModelsAreNeverVictims) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  const ModelId c = h.add("c", 50);
  const LeaseId lease = h.use(a);
  h.warm(b);
  const TicketId ticket = h.request(c);
  EXPECT_EQ(h.said(), Lines{"unload b"}) << "a is older, but in use";
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, EvictsTheSmallestSetThatSuffices) {
  Harness h(lru({100}));
  const ModelId small = h.add("small", 10);
  const ModelId large = h.add("large", 60);
  const ModelId rest = h.add("rest", 30);
  for (const ModelId each : {small, large, rest}) h.warm(each);
  const ModelId wanted = h.add("wanted", 55);
  h.request(wanted);
  EXPECT_EQ(h.said(), Lines{"unload large"}) << "with large gone, small need not go";
}

TEST(Yard, AVictimMustHoldBytesWhereTheyAreShort) {
  Harness h(lru({100, 100}));
  const ModelId elsewhere = h.add("elsewhere", charge({{1, 90}}));
  const ModelId here = h.add("here", charge({{0, 90}}));
  h.warm(elsewhere);
  h.warm(here);
  h.request(h.add("wanted", charge({{0, 50}})));
  EXPECT_EQ(h.said(), Lines{"unload here"});
}

TEST(Yard, AllDevicesOfAModelAreReservedTogetherOrNone) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 60}}));
  const LeaseId lease = h.use(a);
  const ModelId gang = h.add("gang", charge({{0, 50}, {1, 50}}));
  const TicketId ticket = h.request(gang);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_EQ(h.account(0).used(), Bytes{0}) << "half a reservation helps nobody";
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(h.account(0).used(), Bytes{0});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account(0).reserved, Bytes{50});
  EXPECT_EQ(h.account(1).reserved, Bytes{50});
}

TEST(Yard, NobodyIsUnloadedIfTheIdleModelsDoNotSuffice) {
  Harness h(options({100}));
  const ModelId idle = h.add("idle", 40);
  const ModelId busy = h.add("busy", 60);
  h.warm(idle);
  const LeaseId lease = h.use(busy);
  h.forget();
  const TicketId ticket = h.request(h.add("wanted", 80));
  EXPECT_TRUE(h.said().empty()) << "evicting idle would not be enough";
  EXPECT_EQ(h.state(idle), State::kResident);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_FALSE(h.release(lease));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, TheLongestUnwantedGoesFirstUnderLru) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  h.warm(a);
  h.warm(b);
  h.warm(a);
  h.request(h.add("c", 50));
  EXPECT_EQ(h.said(), Lines{"unload b"});
}

TEST(Yard, AHitOfTheFastWayKeepsAModelYoung) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.release(h.try_acquire(a).lease.value()));
  h.request(h.add("c", 50));
  EXPECT_EQ(h.said(), Lines{"unload b"});
}

TEST(Yard, PlanForSaysWhoWouldLeaveAndTouchesNobody) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  const ModelId c = h.add("c", 50);
  EXPECT_FALSE(h.yard().plan_for(c)) << "needs nobody to leave";
  h.warm(a);
  const LeaseId lease = h.use(b);
  const auto plan = h.yard().plan_for(c);
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->victims.size(), 1U);
  EXPECT_EQ(plan->victims[0].entry, EntryTable::index_of(a));
  EXPECT_FALSE(plan->victims[0].leased);
  EXPECT_EQ(h.state(a), State::kResident);
  const ModelId d = h.add("d", 80);
  EXPECT_FALSE(h.yard().plan_for(d)) << "the idle models do not suffice";
  EXPECT_FALSE(h.yard().plan_for(static_cast<ModelId>(12345)));
  EXPECT_FALSE(h.release(lease));
  h.forget();
  h.request(c);
  EXPECT_EQ(h.said(), Lines{"unload a"}) << "the scheduler acts upon the very plan";
}

TEST(Yard, PlanForCountsBytesThatAreOnTheirWayBack) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  h.warm(a);
  h.warm(h.add("b", 50));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.yard().plan_for(h.add("c", 50))) << "the scheduler would wait for a's bytes";
}

TEST(Yard, PlanForLeavesClosedDevicesAlone) {
  Harness h(lru({100, 100}));
  const ModelId p = h.add("p", charge({{0, 80}}));
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId b = h.add("b", charge({{1, 80}}));
  h.warm(b);
  EXPECT_FALSE(h.set_closed(0, true));
  const auto plan = h.yard().plan_for(h.add("c", {charge({{0, 20}}), charge({{1, 50}})}));
  ASSERT_TRUE(plan) << "there is room on device 0, but nothing is loaded there";
  ASSERT_EQ(plan->victims.size(), 1U);
  EXPECT_EQ(plan->victims[0].entry, EntryTable::index_of(b));
}

TEST(Yard, PlanForAModelThatIsThereNeedsNobody) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.yard().plan_for(a));
}

// --- Draining -----------------------------------------------------------------------------------

TEST(Yard, ADrainingModelIsNeverResurrected) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kDraining);
  const TicketId late = h.request(a);
  EXPECT_TRUE(h.waiting(late)) << "a late hit does not bring it back";
  EXPECT_EQ(h.state(a), State::kDraining);
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load a"}) << "and the wish for it is not lost";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(late));
}

TEST(Yard, AWishForAModelThatIsBeingUnloadedIsNotLost) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId ticket = h.request(a);
  EXPECT_EQ(h.state(a), State::kUnloading);
  h.forget();
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, AWaiterOfADrainingModelMayGiveUp) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId ticket = h.request(a, Harness::at(seconds{5}));
  const TicketId other = h.request(a);
  h.pass(seconds{6});
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kDeadlineInQueue);
  EXPECT_FALSE(h.cancel(other));
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, TheLastReleaseOfManyUnloadsADrainingModel) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId one = h.use(a);
  const LeaseId two = h.use(a);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  EXPECT_FALSE(h.release(one));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(two));
  EXPECT_EQ(h.said(), Lines{"unload a"});
}

TEST(Yard, AReleaseThatMakesRoomFundsAWaitingLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 60));
  EXPECT_TRUE(h.waiting(ticket));
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

}  // namespace
}  // namespace modelyard::test

// Room on the host tier: which copies go for another one, who waits for that, and dropped copies in
// whose memory somebody still is.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "tiered.hpp"

namespace modelyard::test {
namespace {

// --- Room is made -------------------------------------------------------------------------------

TEST(TierRoom, TheCopyThatIsWorthLeastGoesAndTheUnloadWaitsForItsRoom) {
  FullTier t;
  t.h.request(t.d);
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"})) << "and no unload yet";
  EXPECT_EQ(t.h.state(t.c), State::kUnloading);
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kAwaited);
  EXPECT_EQ(t.h.tier().draining, Bytes{60});
  ASSERT_EQ(t.h.explained(Decision::kCopyDropped).size(), 1U);
  EXPECT_EQ(t.h.explained(Decision::kCopyDropped)[0].model, t.a);
  EXPECT_EQ(t.h.explained(Decision::kCopyDropped)[0].cause, t.c);
  EXPECT_EQ(t.h.unload_done(t.c), ErrorCode::kWrongState) << "nobody was told to unload";
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"unload c keep"}));
  EXPECT_FALSE(t.h.unload_done(t.c));
  EXPECT_EQ(t.h.said(), (Lines{"load d"}));
  EXPECT_EQ(t.h.copy_state(t.a), CopyState::kNone);
  EXPECT_EQ(t.h.yard().counters().copy_drop_count, 1U);
}

TEST(TierRoom, NoCopyGoesForOneThatIsWorthLess) {
  FullTier t;
  wish(t.h, t.a);
  wish(t.h, t.b);
  t.h.request(t.d);
  EXPECT_EQ(t.h.said(), (Lines{"unload c"})) << "both copies were asked for later than it";
  EXPECT_EQ(t.h.tier().resident, Bytes{120});
}

TEST(TierRoom, OneOfThoseThatHaveToGoIsWorthMoreThenNoneGoes) {
  Harness h(tiered({120}, 120));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  const ModelId big = h.add("big", 120);
  const ModelId next = h.add("next", 120);
  h.warm(a);
  h.warm(b);
  h.warm(big);
  EXPECT_EQ(h.tier().resident, Bytes{120});
  wish(h, b);
  h.request(next);
  EXPECT_EQ(h.said(), (Lines{"unload big"}));
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
}

TEST(TierRoom, ACopyFromWhichALoadReadsIsNoVictim) {
  Harness h(tiered({60, 60}, 60));
  const ModelId a = on(h, "a", 0);
  const ModelId e = on(h, "e", 0);
  const ModelId b = on(h, "b", 1);
  const ModelId x = on(h, "x", 1);
  h.warm(b);
  h.warm(a);
  h.warm(e);
  ASSERT_EQ(h.copy_state(a), CopyState::kKept);
  h.request(a);
  EXPECT_FALSE(h.unload_done(e, charge({{0, 60}})));
  ASSERT_EQ(h.state(a), State::kLoading);
  EXPECT_FALSE(h.release(*h.try_acquire(b).lease));
  h.forget();
  h.request(x);
  EXPECT_EQ(h.said(), (Lines{"unload b"})) << "though it was used after a was asked for";
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
}

TEST(TierRoom, ADeficitWaitsForTheLoadThatReadsFromACopy) {
  Harness h(tiered({60}, 60));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  h.request(a);
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  h.forget();
  EXPECT_FALSE(h.set_tier_budget(30));
  EXPECT_EQ(h.said(), Lines{});
  EXPECT_EQ(h.tier().deficit, Bytes{30});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.said(), (Lines{"grant a", "drop_copy a"}));
}

TEST(TierRoom, TheCopyOfAModelThatIsThereCountsAQuarter) {
  Harness h(tiered({60, 60}, 120, "gap"));
  const ModelId a = on(h, "a", 0);
  const ModelId b = on(h, "b", 1);
  const ModelId c = on(h, "c", 1);
  const ModelId d = on(h, "d", 1);
  h.warm(a);  // Request 1.
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);                                         // 2
  EXPECT_FALSE(h.release(*h.try_acquire(b).lease));  // 3
  h.warm(c);                                         // 4: c seen once, a rate of 0.1 at 6.
  h.warm(a);                                         // 5: a every 4 requests, b more often.
  ASSERT_EQ(h.state(a), State::kResident);
  ASSERT_EQ(h.tier().resident, Bytes{120});
  h.request(d);  // 6
  EXPECT_EQ(h.said(), (Lines{"drop_copy a"})) << "0.25 a request, but it is on a device";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.said(), (Lines{"unload c keep"}));
}

TEST(TierRoom, TheSameCopyWouldStayIfItsModelWereAway) {
  Harness h(tiered({60, 60}, 120, "gap"));
  const ModelId a = on(h, "a", 0);
  const ModelId b = on(h, "b", 1);
  const ModelId c = on(h, "c", 1);
  const ModelId d = on(h, "d", 1);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  h.warm(b);
  EXPECT_FALSE(h.release(*h.try_acquire(b).lease));
  h.warm(c);
  wish(h, a);
  h.request(d);
  EXPECT_EQ(h.said(), (Lines{"unload c"}));
  EXPECT_FALSE(h.set_closed(0, false));
}

TEST(TierRoom, WhatACopyHoldsCountsAgainstIt) {
  // Two copies that were asked for equally often and save the same; the larger one goes.
  Harness h(tiered({100, 60}, 130, "gap"));
  const ModelId small = on(h, "small", 0, 30);
  const ModelId large = on(h, "large", 0, 100);
  const ModelId c = on(h, "c", 1, 60);
  const ModelId d = on(h, "d", 1, 60);
  h.warm(small);
  h.warm(large);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(large));
  ASSERT_EQ(h.tier().resident, Bytes{130});
  h.warm(c);
  EXPECT_FALSE(h.release(*h.try_acquire(c).lease));
  h.forget();
  h.request(d);
  EXPECT_EQ(h.said(), (Lines{"drop_copy large"})) << "least recently used is small";
  EXPECT_FALSE(h.set_closed(0, false));
}

TEST(TierRoom, WhoWaitsIsSentInOrder) {
  Harness h(tiered({60, 60}, 120));
  const ModelId a = on(h, "a", 0);
  const ModelId b = on(h, "b", 1);
  const ModelId c = on(h, "c", 0);
  const ModelId d = on(h, "d", 1);
  for (const ModelId each : {a, b, c, d}) h.warm(each);
  ASSERT_EQ(h.tier().resident, Bytes{120});
  h.request(on(h, "e", 0));
  h.request(on(h, "f", 1));
  EXPECT_EQ(h.said(), (Lines{"drop_copy a", "drop_copy b"}));
  EXPECT_FALSE(h.copy_dropped(b));
  EXPECT_EQ(h.said(), (Lines{"unload c keep"})) << "the first room is for who came first";
  EXPECT_EQ(h.copy_state(d), CopyState::kAwaited);
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.said(), (Lines{"unload d keep"}));
}

TEST(TierRoom, AYoungerOneDoesNotTakeWhatAnOlderOneWaitsFor) {
  Harness h(tiered({100, 60}, 120));
  const ModelId a = on(h, "a", 1);
  const ModelId b = on(h, "b", 1);
  const ModelId c = on(h, "c", 0, 100);
  const ModelId d = on(h, "d", 1, 20);
  for (const ModelId each : {a, b, c, d}) h.warm(each);
  ASSERT_EQ(h.tier().resident, Bytes{120});
  h.request(on(h, "e", 0, 100));
  EXPECT_EQ(h.said(), (Lines{"drop_copy a", "drop_copy b"}));
  h.request(on(h, "f", 1, 60));
  EXPECT_EQ(h.said(), Lines{}) << "what c leaves is enough for d, once it is there";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.said(), Lines{}) << "d would fit now, and c would not any more";
  EXPECT_FALSE(h.copy_dropped(b));
  EXPECT_EQ(h.said(), (Lines{"unload c keep", "unload d keep"}));
}

TEST(TierRoom, WhoWillGetNoRoomIsSentWithoutACopy) {
  FullTier t;
  t.h.request(t.d);
  t.h.forget();
  EXPECT_FALSE(t.h.copy_dropped(t.a, 59));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"}));
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kNone);
  EXPECT_EQ(t.h.tier().quarantined, Bytes{1});
  EXPECT_EQ(t.h.entry(t.a).quarantined, charge({{2, 1}}));
  ASSERT_EQ(t.h.explained(Decision::kQuarantined).size(), 1U);
  EXPECT_EQ(t.h.explained(Decision::kQuarantined)[0].device, t.h.yard().tier());
  EXPECT_EQ(t.h.reclaimed(t.a, charge({{2, 2}})), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(t.h.reclaimed(t.a, charge({{2, 1}})));
  EXPECT_EQ(t.h.tier().quarantined, Bytes{0});
}

TEST(TierRoom, ALowerBudgetGivesUpWhoWaits) {
  FullTier t;
  t.h.request(t.d);
  t.h.forget();
  EXPECT_FALSE(t.h.set_tier_budget(119));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"}));
}

TEST(TierRoom, AModelThatCanNeverFitDropsNobody) {
  Harness h(tiered({200}, 120));
  const ModelId a = h.add("a", 100);
  const ModelId big = h.add("big", 150);
  h.warm(a);
  h.warm(big);
  ASSERT_EQ(h.copy_state(a), CopyState::kKept);
  h.request(a);
  EXPECT_EQ(h.said(), (Lines{"unload big"}));
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
}

// --- Somebody is still in the memory of a dropped copy ------------------------------------------

TEST(TierInUse, WhoWaitsForItIsSentWithoutACopyAndItsBytesStayOnTheBooks) {
  FullTier t;
  t.h.request(t.d);
  t.h.forget();
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"}));
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kNone);
  EXPECT_EQ(t.h.copy_state(t.a), CopyState::kDropping);
  EXPECT_TRUE(t.h.entry(t.a).copy.in_use);
  EXPECT_EQ(t.h.tier().draining, Bytes{60});
  EXPECT_EQ(t.h.tier().quarantined, Bytes{0});
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  EXPECT_EQ(t.h.said(), Lines{}) << "said again it changes nothing";
  EXPECT_EQ(t.h.tier().draining, Bytes{60});
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(t.h.tier().used(), Bytes{60});
  EXPECT_FALSE(t.h.entry(t.a).copy.in_use);
}

TEST(TierInUse, NobodyBeginsToWaitForIt) {
  FullTier t;
  EXPECT_FALSE(t.h.unload(t.a));
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  t.h.forget();
  t.h.request(t.d);
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b"})) << "its room will come, and that of a may not";
  EXPECT_FALSE(t.h.copy_dropped(t.b));
  EXPECT_EQ(t.h.said(), (Lines{"unload c keep"}));
}

TEST(TierInUse, WhoWaitsForAnotherOneGoesOnWaiting) {
  FullTier t;
  EXPECT_FALSE(t.h.unload(t.b));
  t.h.request(t.d);
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b"})) << "c waits for that";
  EXPECT_FALSE(t.h.unload(t.a));
  t.h.forget();
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  EXPECT_EQ(t.h.said(), Lines{});
  EXPECT_FALSE(t.h.copy_dropped(t.b));
  EXPECT_EQ(t.h.said(), (Lines{"unload c keep"}));
}

TEST(TierInUse, ItRepaysNoDeficit) {
  FullTier t;
  EXPECT_FALSE(t.h.set_tier_budget(60));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"}));
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b"}));
  EXPECT_FALSE(t.h.copy_dropped(t.b));
  EXPECT_EQ(t.h.tier().deficit, Bytes{0});
  EXPECT_EQ(t.h.tier().used(), Bytes{60});
}

TEST(TierInUse, ARemovedModelKeepsItsIdUntilItsMemoryIsBack) {
  FullTier t;
  EXPECT_FALSE(t.h.remove(t.a));
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  ASSERT_TRUE(t.h.exists(t.a));
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_FALSE(t.h.exists(t.a));
  EXPECT_EQ(t.h.copy_in_use(t.a), ErrorCode::kStaleId);
}

TEST(TierInUse, WhatNeverComesBackIsQuarantinedInTheEnd) {
  FullTier t;
  EXPECT_FALSE(t.h.unload(t.a));
  EXPECT_FALSE(t.h.copy_in_use(t.a));
  EXPECT_FALSE(t.h.copy_dropped(t.a, 20));
  EXPECT_EQ(t.h.copy_state(t.a), CopyState::kNone);
  EXPECT_EQ(t.h.tier().draining, Bytes{0});
  EXPECT_EQ(t.h.tier().quarantined, Bytes{40});
  EXPECT_FALSE(t.h.reclaimed(t.a, charge({{2, 40}})));
}

TEST(TierInUse, OnlyOneThatIsBeingDroppedIs) {
  FullTier t;
  EXPECT_EQ(t.h.copy_in_use(t.a), ErrorCode::kWrongState) << "KEPT";
  EXPECT_EQ(t.h.copy_in_use(t.c), ErrorCode::kWrongState) << "NONE";
  t.h.request(t.d);
  EXPECT_EQ(t.h.copy_in_use(t.c), ErrorCode::kWrongState) << "AWAITED";
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(t.h.copy_in_use(t.c), ErrorCode::kWrongState) << "MAKING";
}

}  // namespace
}  // namespace modelyard::test

// Models that leave for good or are lost, and what becomes of their copies on the host tier.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "tiered.hpp"

namespace modelyard::test {
namespace {

// --- Who leaves for good ------------------------------------------------------------------------

TEST(TierDepartures, AnUnloadByHandTakesTheCopyAlong) {
  FullTier t;
  EXPECT_FALSE(t.h.unload(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"})) << "cold, with a copy";
  EXPECT_FALSE(t.h.unload(t.a));
  EXPECT_EQ(t.h.said(), Lines{}) << "once";
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_FALSE(t.h.unload(t.c));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"})) << "resident, without one: none is made";
  EXPECT_FALSE(t.h.unload_done(t.c));
  t.h.warm(t.b);
  EXPECT_FALSE(t.h.unload(t.b));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b", "unload b"})) << "resident, with one";
}

TEST(TierDepartures, AnUnloadByHandWhileTheCopyIsMadeDropsItThen) {
  Harness h(tiered({60}, 120));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.request(b);
  h.forget();
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.said(), Lines{});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), (Lines{"drop_copy a", "load b"}));
  EXPECT_EQ(h.explained(Decision::kCopyDropped).back().why, Why::kAsked);
}

TEST(TierDepartures, AnUnloadByHandEndsTheWaitForRoom) {
  FullTier t;
  t.h.request(t.d);
  t.h.forget();
  EXPECT_FALSE(t.h.unload(t.c));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"}));
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kNone);
}

TEST(TierDepartures, ALoadThatIsStoppedByHandTakesTheCopyAlong) {
  for (const LoadFailure failure : {LoadFailure::kCancelled, LoadFailure::kTransient}) {
    FullTier t;
    const TicketId ticket = t.h.request(t.a);
    t.h.finish_io();
    EXPECT_FALSE(t.h.release(ticket));
    EXPECT_FALSE(t.h.set_closed(0, true));
    t.h.finish_io();
    EXPECT_FALSE(t.h.set_closed(0, false));
    ASSERT_EQ(t.h.copy_state(t.a), CopyState::kKept);
    const TicketId again = t.h.request(t.a);
    ASSERT_EQ(t.h.state(t.a), State::kLoading);
    EXPECT_FALSE(t.h.cancel(again));
    t.h.forget();
    EXPECT_FALSE(t.h.unload(t.a));
    EXPECT_EQ(t.h.said(), (Lines{"cancel_load a"})) << "the load may be reading from it";
    EXPECT_FALSE(t.h.load_failed(t.a, failure));
    EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"}));
  }
}

TEST(TierDepartures, ALoadedModelThatWasAskedToLeaveTakesTheCopyAlong) {
  Harness h(tiered({60}, 120));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload_done(b));
  EXPECT_FALSE(h.unload(a));
  h.forget();
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.said(), (Lines{"grant a", "drop_copy a", "drain a"}));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.said(), (Lines{"unload a"}));
}

TEST(TierDepartures, ARemovedModelKeepsItsIdUntilItsCopyHasGone) {
  FullTier t;
  EXPECT_FALSE(t.h.remove(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"}));
  ASSERT_TRUE(t.h.exists(t.a));
  EXPECT_EQ(t.h.try_request(t.a).error, ErrorCode::kStaleId);
  EXPECT_EQ(t.h.unload(t.a), ErrorCode::kStaleId);
  EXPECT_EQ(t.h.forgive(t.a), ErrorCode::kStaleId);
  EXPECT_FALSE(t.h.copy_dropped(t.a, 20));
  ASSERT_TRUE(t.h.exists(t.a)) << "for what did not come back";
  EXPECT_FALSE(t.h.reclaimed(t.a, charge({{2, 40}})));
  EXPECT_FALSE(t.h.exists(t.a));
  EXPECT_EQ(t.h.copy_dropped(t.a, 0), ErrorCode::kStaleId);
  EXPECT_EQ(t.h.copy_lost(t.a), ErrorCode::kStaleId);
}

TEST(TierDepartures, AModelRemovedWhileItsCopyIsDroppedKeepsItsId) {
  FullTier t;
  EXPECT_FALSE(t.h.unload(t.a));
  EXPECT_FALSE(t.h.remove(t.a));
  ASSERT_TRUE(t.h.exists(t.a));
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_FALSE(t.h.exists(t.a));
}

TEST(TierDepartures, AModelRemovedWhileItsCopyIsMadeOrAwaitedLeavesNone) {
  FullTier t;
  t.h.request(t.d);
  t.h.forget();
  EXPECT_FALSE(t.h.remove(t.c));
  EXPECT_EQ(t.h.said(), (Lines{"unload c"}));
  EXPECT_FALSE(t.h.unload_done(t.c));
  EXPECT_FALSE(t.h.exists(t.c));
  t.h.finish_io();
  for (const LeaseId lease : t.h.yard().leases_of(t.d)) EXPECT_FALSE(t.h.release(lease));
  t.h.forget();
  t.h.request(t.b);
  EXPECT_EQ(t.h.said(), (Lines{"unload d keep"}));
  EXPECT_FALSE(t.h.remove(t.d));
  EXPECT_FALSE(t.h.unload_done(t.d));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy d", "load b"}));
  ASSERT_TRUE(t.h.exists(t.d));
  EXPECT_FALSE(t.h.copy_dropped(t.d));
  EXPECT_FALSE(t.h.exists(t.d));
}

// --- Losses -------------------------------------------------------------------------------------

TEST(TierLosses, ALostModelIsNotCopied) {
  Harness h(tiered({60}, 120));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.lost(a));
  EXPECT_EQ(h.said(), (Lines{"unload a"}));
  EXPECT_FALSE(h.unload_done(a));
  h.warm(a);
  const ModelId b = h.add("b", 60);
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a keep"})) << "once loaded again it is like any other";
}

TEST(TierLosses, TheCopyOfALostModelStays) {
  FullTier t;
  t.h.warm(t.a);
  EXPECT_FALSE(t.h.lost(t.a));
  EXPECT_EQ(t.h.said(), (Lines{"unload a"}));
  EXPECT_FALSE(t.h.unload_done(t.a));
  EXPECT_EQ(t.h.said(), Lines{}) << "what held the copy has not died";
  EXPECT_EQ(t.h.copy_state(t.a), CopyState::kKept);
}

TEST(TierLosses, ACopyIsLostOnlyWhileItIsKept) {
  FullTier t;
  EXPECT_EQ(t.h.copy_lost(t.c), ErrorCode::kWrongState) << "NONE";
  t.h.request(t.d);
  t.h.forget();
  EXPECT_EQ(t.h.copy_lost(t.a), ErrorCode::kWrongState) << "DROPPING";
  EXPECT_EQ(t.h.copy_lost(t.c), ErrorCode::kWrongState) << "AWAITED";
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(t.h.copy_lost(t.c), ErrorCode::kWrongState) << "MAKING";
  t.h.forget();
  EXPECT_FALSE(t.h.copy_lost(t.b));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b"})) << "to be told when its memory is back";
  EXPECT_EQ(t.h.tier().draining, Bytes{60});
  EXPECT_EQ(t.h.copy_lost(t.b), ErrorCode::kWrongState) << "once";
  EXPECT_EQ(t.h.explained(Decision::kCopyDropped).back().why, Why::kLost);
}

TEST(TierLosses, ACopyFromWhichALoadReadsMayBeLost) {
  Harness h(tiered({60}, 60));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  h.request(a);
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  h.forget();
  EXPECT_FALSE(h.copy_lost(a));
  EXPECT_EQ(h.said(), (Lines{"drop_copy a"}));
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1) << "from files from now on";
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.state(a), State::kFailed);
}

}  // namespace
}  // namespace modelyard::test

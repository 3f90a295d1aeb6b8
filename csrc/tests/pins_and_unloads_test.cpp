// Whose stay somebody decides: pinned models stay, and those that are asked to leave go.

#include <gtest/gtest.h>

#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Pins ---------------------------------------------------------------------------------------

TEST(Yard, APinnedModelIsNeverAVictim) {
  Harness h(lru({100}));
  const ModelId p = h.add("p", 50);
  const ModelId a = h.add("a", 50);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  h.warm(a);
  h.request(h.add("b", 50));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.state(p), State::kResident);
}

TEST(Yard, PinningDoesNotLoad) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  EXPECT_FALSE(h.pin(p));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.state(p), State::kCold);
}

TEST(Yard, APinnedModelThatHoldsNothingTakesNoRoom) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  EXPECT_FALSE(h.pin(p));
  const ModelId b = h.add("b", 100);
  const TicketId ticket = h.request(b);
  EXPECT_FALSE(h.refused(ticket));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, APinnedModelInUseIsNotDrainedForAnOverdueOne) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 40);
  const LeaseId lease = h.use(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId busy = h.add("busy", 40);
  const LeaseId other = h.use(busy);
  h.request(h.add("b", 50));
  h.pass(seconds{60});
  EXPECT_EQ(h.count("drain p"), 0U);
  EXPECT_EQ(h.count("drain busy"), 1U);
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.release(other));
}

TEST(Yard, AnUnpinnedModelMakesRoomForWhoWaits) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId busy = h.add("busy", 40);
  const LeaseId lease = h.use(busy);
  const TicketId ticket = h.request(h.add("b", 40));
  EXPECT_TRUE(h.waiting(ticket));
  h.forget();
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.said(), Lines{"unload p"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, PinningTwiceIsPinningOnce) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.unpin(p));
  EXPECT_FALSE(h.unpin(p));
  h.request(h.add("b", 60));
  EXPECT_EQ(h.said(), Lines{"unload p"});
}

TEST(Yard, AModelPinnedWhileItLoadsStays) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  const TicketId ticket = h.request(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.load_done(p));
  EXPECT_FALSE(h.release(ticket));
  const TicketId refused = h.request(h.add("b", 60));
  ASSERT_TRUE(h.refused(refused));
  EXPECT_EQ(h.refusal(refused).reason, RefuseReason::kBudgetExhausted);
}

TEST(Yard, AModelPinnedWhileItIsUnloadedCanBeLoadedAgain) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.unload(p));
  EXPECT_FALSE(h.pin(p));
  const TicketId ticket = h.request(p);
  EXPECT_TRUE(h.waiting(ticket)) << "its own bytes are on their way back";
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

// --- Being asked to leave -----------------------------------------------------------------------

TEST(Yard, UnloadOfAnIdleModelUnloadsIt) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty()) << "it is on its way already";
}

TEST(Yard, UnloadOfAModelInUseDrainsItFirst) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  h.forget();
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.said(), Lines{"drain a"});
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
}

TEST(Yard, UnloadOfAModelThatHoldsNothingDoesNothing) {
  Harness h(options({100}));
  const ModelId cold = h.add("cold", 60);
  EXPECT_FALSE(h.unload(cold));
  EXPECT_EQ(h.state(cold), State::kCold);
  const LeaseId lease = h.use(h.add("busy", 60));
  const TicketId ticket = h.request(cold);
  h.forget();
  EXPECT_FALSE(h.unload(cold));
  EXPECT_EQ(h.state(cold), State::kQueued);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(lease));
  const ModelId failed = h.add("failed", 10);
  h.request(failed);
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, UnloadOfAFailedModelDoesNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  h.forget();
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.state(a), State::kFailed);
}

TEST(Yard, AModelAskedToLeaveWhileItLoadsGoesWhenTheLoadHasEnded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(ticket)) << "whoever waits is granted when the load ends";
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.state(a), State::kUnloading);
}

TEST(Yard, AModelThatNobodyWaitsForLeavesAtTheEndOfItsLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, TheWishToLeaveEndsWithTheLoadItWasMadeIn) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_TRUE(h.refused(ticket));
  h.skip(seconds{10});
  const LeaseId lease = h.use(a);
  EXPECT_EQ(h.state(a), State::kResident) << "an old wish does not drain the next load";
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, APinnedModelCannotBeAskedToLeave) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  const LeaseId lease = h.use(a);
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kUnloading);
}

}  // namespace
}  // namespace modelyard::test

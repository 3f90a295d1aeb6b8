// Budgets that change, and devices that are closed.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Budgets and devices ------------------------------------------------------------------------

TEST(Yard, ALowerBudgetEvictsIdleModelsAndNoMoreThanNeeded) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 30);
  const ModelId b = h.add("b", 30);
  const ModelId c = h.add("c", 30);
  for (const ModelId each : {a, b, c}) h.warm(each);
  EXPECT_FALSE(h.set_budget(0, 70));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.account().deficit, Bytes{20});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_TRUE(h.said().empty());
}

TEST(Yard, ALowerBudgetDrainsModelsInUseAfterIdleOnes) {
  Harness h(lru({100}));
  const ModelId busy = h.add("busy", 40);
  const ModelId idle = h.add("idle", 40);
  const LeaseId lease = h.use(busy);
  h.warm(idle);
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_EQ(h.said(), Lines{"unload idle"});
  EXPECT_FALSE(h.set_budget(0, 30));
  EXPECT_EQ(h.said(), Lines{"drain busy"});
  EXPECT_FALSE(h.unload_done(idle));
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload busy"});
  EXPECT_FALSE(h.unload_done(busy));
  EXPECT_EQ(h.account().deficit, Bytes{0});
}

TEST(Yard, ALowerBudgetLeavesPinnedModelsAndTheDeficitStays) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  h.forget();
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.said(), Lines{"unload p"}) << "the deficit is repaid as soon as it can be";
}

TEST(Yard, ABudgetBelowARunningLoadIsRepaidWhenItHasEnded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_EQ(h.account().deficit, Bytes{30});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.release(h.granted(ticket) ? h.lease_of(ticket) : LeaseId{}));
  h.finish_io();
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, AHigherBudgetFundsAWaitingLoad) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const TicketId ticket = h.request(h.add("b", 60));
  h.forget();
  EXPECT_FALSE(h.set_budget(0, 120));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ADeficitOnOneDeviceDisturbsNobodyOnAnother) {
  Harness h(lru({100, 100}));
  const ModelId other = h.add("other", charge({{1, 50}}));
  const ModelId here = h.add("here", charge({{0, 50}}));
  h.warm(other);
  h.warm(here);
  EXPECT_FALSE(h.set_budget(0, 10));
  EXPECT_EQ(h.said(), Lines{"unload here"});
}

TEST(Yard, BadBudgetsAndDevicesAreErrors) {
  Harness h(options({100}));
  EXPECT_EQ(h.set_budget(1, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_budget(0, -1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_budget(0, kMaxBytes + 1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_closed(1, true), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.account().budget, Bytes{100});
}

TEST(Yard, AClosedDeviceEmptiesExceptForPinnedModels) {
  Harness h(options({100, 100}));
  const ModelId idle = h.add("idle", charge({{0, 20}}));
  const ModelId busy = h.add("busy", charge({{0, 20}}));
  const ModelId pinned = h.add("pinned", charge({{0, 20}}));
  const ModelId across = h.add("across", charge({{0, 20}, {1, 20}}));
  const ModelId other = h.add("other", charge({{1, 20}}));
  for (const ModelId each : {idle, pinned, across, other}) h.warm(each);
  const LeaseId lease = h.use(busy);
  EXPECT_FALSE(h.pin(pinned));
  h.forget();
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_TRUE(h.yard().device_closed(device(0)));
  EXPECT_EQ(h.count("unload idle"), 1U);
  EXPECT_EQ(h.count("unload across"), 1U);
  EXPECT_EQ(h.count("drain busy"), 1U);
  EXPECT_EQ(h.state(pinned), State::kResident);
  EXPECT_EQ(h.state(other), State::kResident);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.state(busy), State::kUnloading);
  h.finish_io();
  EXPECT_EQ(h.used(0), 20);
}

TEST(Yard, NothingIsLoadedOntoAClosedDevice) {
  Harness h(options({100, 100}));
  EXPECT_FALSE(h.set_closed(0, true));
  const ModelId there = h.add("there", charge({{0, 20}}));
  const ModelId either = h.add("either", {charge({{0, 20}}), charge({{1, 20}})});
  const TicketId waits = h.request(there);
  h.request(either);
  EXPECT_EQ(h.said(), Lines{"load either"});
  EXPECT_EQ(h.entry(either).placement, 1U);
  EXPECT_TRUE(h.waiting(waits));
  EXPECT_FALSE(h.set_closed(0, false));
  EXPECT_EQ(h.said(), Lines{"load there"});
}

TEST(Yard, NobodyIsEvictedForALoadOntoAClosedDevice) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 80}}));
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  h.request(h.add("gang", charge({{0, 50}, {1, 50}})));
  h.pass(seconds{100});
  EXPECT_EQ(h.count("unload a"), 0U);
}

TEST(Yard, ALoadThatEndsOnAClosedDeviceLeavesItAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 50);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.load_done(a));
  if (h.granted(ticket)) {
    EXPECT_FALSE(h.release(ticket));
  }
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.used(), 0);
}

TEST(Yard, AModelUnpinnedOnAClosedDeviceLeavesIt) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.state(p), State::kResident);
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.state(p), State::kUnloading);
}

}  // namespace
}  // namespace modelyard::test

// What becomes of a request: a hit is granted at once, a miss when its load has ended, and what
// cannot be served is refused with a reason. What the yard counts of it.

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Hits and misses ----------------------------------------------------------------------------

TEST(Yard, AMissLoadsAndGrantsWhenTheLoadHasEnded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_EQ(h.state(a), State::kCold);
  const TicketId ticket = h.request(a);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.state(a), State::kLoading);
  EXPECT_EQ(h.account().reserved, Bytes{60});
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.said(), Lines{"grant a"});
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_EQ(h.account().resident, Bytes{60});
  EXPECT_EQ(h.entry(a).lease_count, 1U);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.entry(a).lease_count, 0U);
  EXPECT_EQ(h.state(a), State::kResident) << "nobody needs the room";
  EXPECT_TRUE(h.said().empty());
}

TEST(Yard, AHitIsGrantedAtOnce) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  const TicketId ticket = h.request(a);
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.said(), Lines{"grant a"});
}

TEST(Yard, TryAcquireLeasesWhatIsResidentAndChangesNothingElse) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  Outcome miss = h.try_acquire(a);
  EXPECT_FALSE(miss.error);
  EXPECT_FALSE(miss.lease);
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_EQ(h.yard().counters().request_count, 0U);
  h.warm(a);
  const std::uint64_t requests = h.yard().counters().request_count;
  const std::uint64_t hits = h.yard().counters().hit_count;
  const Outcome hit = h.try_acquire(a);
  ASSERT_TRUE(hit.lease);
  EXPECT_EQ(h.yard().counters().request_count, requests + 1);
  EXPECT_EQ(h.yard().counters().hit_count, hits + 1);
  EXPECT_FALSE(h.release(*hit.lease));
}

TEST(Yard, TryAcquireGivesNothingWhileAModelLoadsDrainsOrUnloads) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.try_acquire(a).lease);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_FALSE(h.try_acquire(a).lease);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.try_acquire(a).lease);
}

TEST(Yard, ManyRequestsForOneModelShareOneLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  std::vector<TicketId> tickets;
  for (int i = 0; i < 50; ++i) tickets.push_back(h.request(a));
  EXPECT_EQ(h.count("load a"), 1U);
  EXPECT_EQ(h.entry(a).waiting_count, 50U);
  EXPECT_FALSE(h.load_done(a));
  for (const TicketId ticket : tickets) EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.entry(a).lease_count, 50U);
  EXPECT_EQ(h.count("load a"), 1U);
  std::set<LeaseId> distinct;
  for (const TicketId ticket : tickets) distinct.insert(h.lease_of(ticket));
  EXPECT_EQ(distinct.size(), 50U);
}

TEST(Yard, CountsWhatHappened) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), milliseconds{1500}));
  const TicketId hit = h.request(a);
  EXPECT_FALSE(h.release(hit));
  const YardCounters& counters = h.yard().counters();
  EXPECT_EQ(counters.request_count, 2U);
  EXPECT_EQ(counters.hit_count, 1U);
  EXPECT_EQ(counters.load_count, 1U);
  EXPECT_EQ(counters.load_failure_count, 0U);
  EXPECT_EQ(counters.eviction_count, 0U);
  EXPECT_DOUBLE_EQ(counters.load_seconds, 1.5);
  EXPECT_EQ(h.entry(a).load_count, 1U);
  EXPECT_EQ(h.yard().device_counters(device(0)).load_count, 1U);
  const ModelId c = h.add("c", 10);
  h.request(c);
  EXPECT_FALSE(h.load_failed(c, LoadFailure::kTransient));
  EXPECT_EQ(counters.load_failure_count, 1U);
  static_cast<void>(b);
}

TEST(Yard, AnEvictionIsCountedForTheModelAndTheDevice) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 60}}));
  const ModelId b = h.add("b", charge({{1, 60}}));
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.entry(a).eviction_count, 1U);
  EXPECT_EQ(h.entry(b).eviction_count, 0U);
  EXPECT_EQ(h.yard().counters().eviction_count, 1U);
  EXPECT_EQ(h.yard().device_counters(device(0)).eviction_count, 0U);
  EXPECT_EQ(h.yard().device_counters(device(1)).eviction_count, 1U);
}

TEST(Yard, LearnsWhatAReloadCosts) {
  Harness h(options({100}));
  const ModelId a = h.add("a", charge({{0, 60}}), 100);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), seconds{2}));
  EXPECT_LT(h.entry(a).reload_seconds, 100);
  EXPECT_GE(h.entry(a).reload_seconds, 2);
}

// Loads a model, which takes so long, and lets it go again.
void load(Harness& h, ModelId model, Duration took) {
  const TicketId ticket = h.request(model);
  EXPECT_FALSE(h.load_done(model, h.held(model), took));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload(model));
  h.finish_io();
}

TEST(FirstLoad, IsThePriceUntilTheSecondOnly) {
  Harness h(options({100}));
  const ModelId a = h.add("a", charge({{0, 60}}));
  load(h, a, milliseconds{1137});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1.137);
  load(h, a, milliseconds{6});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 0.006);
  load(h, a, milliseconds{10});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 0.7 * 0.006 + 0.3 * 0.010);
}

TEST(FirstLoad, OfAModelThatStaysIsDoubtedOnceAReloadOfAnotherWasMeasured) {
  Harness h(options({200}));
  const ModelId a = h.add("a", charge({{0, 60}}));
  const ModelId b = h.add("b", charge({{0, 60}}));
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), milliseconds{1137}));
  load(h, b, milliseconds{200});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1.137) << "another first load is no measure";
  load(h, b, milliseconds{6});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 4 * 0.006);
  load(h, b, seconds{1});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1.137) << "that is what reloads may take after all";
  EXPECT_FALSE(h.release(ticket));
}

TEST(FirstLoad, ThatIsNotThatMuchDearerIsBelieved) {
  Harness h(options({200}));
  const ModelId a = h.add("a", charge({{0, 60}}));
  const ModelId b = h.add("b", charge({{0, 60}}));
  load(h, a, milliseconds{3900});
  load(h, b, seconds{1});
  load(h, b, seconds{1});
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 3.9);
}

TEST(FirstLoad, PutsADeadlineOutOfReachOnlyUntilReloadsAreKnown) {
  for (const bool is_known : {false, true}) {
    Harness h(options({200}));
    const ModelId a = h.add("a", charge({{0, 60}}));
    const ModelId b = h.add("b", charge({{0, 60}}));
    load(h, a, seconds{60});
    load(h, b, seconds{1});
    if (is_known) load(h, b, seconds{1});
    const TicketId ticket = h.request(a, h.now() + seconds{9});
    EXPECT_EQ(h.refused(ticket), !is_known);
    EXPECT_EQ(h.waiting(ticket), is_known);
  }
}

// --- Refusals -----------------------------------------------------------------------------------

TEST(Yard, WhatCanNeverFitIsRefusedAtOnceAndDisturbsNobody) {
  Harness h(options({100, 200}));
  const ModelId idle = h.add("idle", charge({{0, 50}}));
  h.warm(idle);
  const ModelId huge = h.add("huge", {charge({{0, 101}}), charge({{1, 201}})});
  const TicketId ticket = h.request(huge);
  ASSERT_TRUE(h.refused(ticket));
  const Refuse refusal = h.refusal(ticket);
  EXPECT_EQ(refusal.reason, RefuseReason::kNeverFits);
  EXPECT_EQ(refusal.retry_after, Duration::zero());
  EXPECT_GT(refusal.needed, refusal.budget);
  EXPECT_EQ(h.said(), Lines{"refuse huge"});
  EXPECT_EQ(h.state(idle), State::kResident);
  EXPECT_EQ(h.state(huge), State::kCold);
}

TEST(Yard, AModelThatFitsOneOfItsPlacementsIsNotRefused) {
  Harness h(options({100, 200}));
  const ModelId a = h.add("a", {charge({{0, 101}}), charge({{1, 150}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.entry(a).placement, 1U);
  EXPECT_EQ(h.account(1).reserved, Bytes{150});
}

TEST(Yard, PinnedBytesThatLeaveNoRoomAreNamed) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  const ModelId q = h.add("q", 20);
  const ModelId r = h.add("r", 5);
  const ModelId s = h.add("s", 10);
  for (const ModelId each : {p, q, r, s}) h.warm(each);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.pin(q));
  EXPECT_FALSE(h.pin(r));
  EXPECT_FALSE(h.pin(s));
  h.forget();
  const TicketId ticket = h.request(h.add("wanted", 40));
  ASSERT_TRUE(h.refused(ticket));
  const Refuse refusal = h.refusal(ticket);
  EXPECT_EQ(refusal.reason, RefuseReason::kBudgetExhausted);
  EXPECT_EQ(refusal.device, device(0));
  EXPECT_EQ(refusal.needed, Bytes{40});
  EXPECT_EQ(refusal.free, Bytes{15});
  EXPECT_EQ(refusal.budget, Bytes{100});
  EXPECT_EQ(refusal.holders[0].model, p);
  EXPECT_EQ(refusal.holders[0].bytes, Bytes{50});
  EXPECT_EQ(refusal.holders[1].model, q);
  EXPECT_EQ(refusal.holders[1].bytes, Bytes{20});
  EXPECT_EQ(refusal.holders[2].model, s);
  EXPECT_EQ(refusal.holders[2].bytes, Bytes{10});
  EXPECT_EQ(h.said(), Lines{"refuse wanted"});
}

TEST(Yard, UnusedHoldersAreZero) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 90);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const TicketId ticket = h.request(h.add("wanted", 40));
  const Refuse refusal = h.refusal(ticket);
  EXPECT_EQ(refusal.holders[0].model, p);
  EXPECT_EQ(refusal.holders[1].model, ModelId{});
  EXPECT_EQ(refusal.holders[1].bytes, Bytes{0});
  EXPECT_EQ(refusal.holders[2].model, ModelId{});
}

TEST(Yard, TheShortestDeviceIsTheOneThatIsNamed) {
  Harness h(options({100, 100}));
  const ModelId p = h.add("p", charge({{0, 30}, {1, 80}}));
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const TicketId ticket = h.request(h.add("wanted", charge({{0, 75}, {1, 75}})));
  const Refuse refusal = h.refusal(ticket);
  EXPECT_EQ(refusal.reason, RefuseReason::kBudgetExhausted);
  EXPECT_EQ(refusal.device, device(1));
  EXPECT_EQ(refusal.free, Bytes{20});
}

TEST(Yard, PinningWhatAWaiterHopedForRefusesTheWaiter) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 50));
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_FALSE(h.pin(a));
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kBudgetExhausted);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ALowerBudgetRefusesWhoCanNoLongerFit) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 50));
  EXPECT_FALSE(h.set_budget(0, 40));
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kNeverFits);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, AModelsQueueIsBounded) {
  YardOptions wanted = options({100});
  wanted.max_waiting_per_model = 2;
  Harness h(wanted);
  const ModelId a = h.add("a", 50);
  const TicketId first = h.request(a);
  h.request(a);
  const TicketId third = h.request(a);
  ASSERT_TRUE(h.refused(third));
  EXPECT_EQ(h.refusal(third).reason, RefuseReason::kQueueFull);
  EXPECT_FALSE(h.cancel(first));
  EXPECT_TRUE(h.waiting(h.request(a))) << "there is a place again";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(h.request(a))) << "a hit does not queue";
}

TEST(Yard, TheQueueOverAllModelsIsBounded) {
  YardOptions wanted = options({100});
  wanted.max_waiting = 3;
  Harness h(wanted);
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 60);
  h.request(a);
  h.request(b);
  h.request(b);
  const TicketId refused = h.request(a);
  ASSERT_TRUE(h.refused(refused));
  EXPECT_EQ(h.refusal(refused).reason, RefuseReason::kQueueFull);
  EXPECT_EQ(h.yard().waiting_count(), 3U);
}

TEST(Yard, AFullQueueDoesNotStopHits) {
  YardOptions wanted = options({100});
  wanted.max_waiting = 1;
  Harness h(wanted);
  const ModelId a = h.add("a", 50);
  h.warm(a);
  h.request(h.add("b", 50));
  EXPECT_EQ(h.yard().waiting_count(), 1U);
  EXPECT_TRUE(h.granted(h.request(a)));
}

}  // namespace
}  // namespace modelyard::test

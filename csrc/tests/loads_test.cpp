// How loads end: with more or fewer bytes than were reserved, with a failure and the back-off after
// it; and unloads that do not bring everything back.

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- What loads take ----------------------------------------------------------------------------

TEST(Yard, ALoadThatTookLessGivesTheRestToWhoWaits) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 70);
  const ModelId b = h.add("b", 50);
  h.request(a);
  h.request(b);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.load_done(a, charge({{0, 50}})));
  EXPECT_EQ(h.said(), (Lines{"grant a", "load b"}));
}

TEST(Yard, AnOvershootIsADeficitThatIsRepaidByAnIdleModel) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 30);
  const ModelId b = h.add("b", 30);
  const ModelId c = h.add("c", 40);
  h.warm(a);
  h.warm(b);
  h.request(c);
  h.forget();
  EXPECT_FALSE(h.load_done(c, charge({{0, 50}})));
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_EQ(h.count("unload a"), 1U);
  EXPECT_EQ(h.count("unload b"), 0U) << "never evicts more than the true need";
  EXPECT_EQ(h.state(c), State::kResident);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_EQ(h.count("unload b"), 0U);
}

TEST(Yard, AnOvershootAmongModelsInUseIsRepaidFromReleases) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  const LeaseId lease_a = h.use(a);
  const TicketId ticket_b = h.request(b);
  EXPECT_FALSE(h.load_done(b, charge({{0, 60}})));
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_EQ(h.count("unload a") + h.count("unload b"), 0U);
  EXPECT_FALSE(h.release(lease_a));
  EXPECT_FALSE(h.release(ticket_b));
  EXPECT_EQ(h.count("unload a") + h.count("unload b"), 1U) << "one of them covers it";
  h.finish_io();
  EXPECT_EQ(h.account().deficit, Bytes{0});
}

TEST(Yard, NothingIsLoadedOntoADeviceInDeficit) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 90}}));
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 110}})));
  const TicketId small = h.request(h.add("small", charge({{0, 1}})));
  const TicketId other = h.request(h.add("other", charge({{1, 50}})));
  EXPECT_TRUE(h.waiting(small));
  EXPECT_EQ(h.count("load small"), 0U);
  EXPECT_EQ(h.count("load other"), 1U) << "the other device has no deficit";
  static_cast<void>(other);
  EXPECT_FALSE(h.release(ticket));
  h.finish_io();
  EXPECT_TRUE(h.granted(small));
}

TEST(Yard, AMeasuredGrowthIsADeficitToo) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 40);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const LeaseId lease = h.use(b);
  h.forget();
  EXPECT_FALSE(h.remeasured(b, charge({{0, 75}})));
  EXPECT_EQ(h.account().deficit, Bytes{15});
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, AMeasuredShrinkFundsAWaitingLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 90);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 30));
  h.forget();
  EXPECT_FALSE(h.remeasured(a, charge({{0, 70}})));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ADrainingModelCanBeMeasuredAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 50);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.remeasured(a, charge({{0, 70}})));
  EXPECT_EQ(h.account().draining, Bytes{70});
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 70}})));
  EXPECT_EQ(h.used(), 0);
}

// --- Memory that does not come back -------------------------------------------------------------

TEST(Yard, MissingBytesAreQuarantinedAndNotGivenAway) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 20}})));
  EXPECT_EQ(h.account().quarantined, Bytes{40});
  EXPECT_EQ(h.entry(a).quarantined, charge({{0, 40}}));
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_EQ(h.free(), 60);
  const TicketId big = h.request(h.add("big", 70));
  ASSERT_TRUE(h.refused(big));
  EXPECT_EQ(h.refusal(big).reason, RefuseReason::kBudgetExhausted);
  EXPECT_EQ(h.refusal(big).needed, Bytes{70});
  EXPECT_EQ(h.refusal(big).free, Bytes{60});
  EXPECT_EQ(h.refusal(big).budget, Bytes{100});
}

TEST(Yard, ReclaimedBytesFundAWaitingLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId busy = h.add("busy", 40);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 20}})));
  const LeaseId lease = h.use(busy);
  const TicketId ticket = h.request(h.add("b", 50));
  EXPECT_TRUE(h.waiting(ticket)) << "busy will end some day";
  h.forget();
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 40}})));
  EXPECT_EQ(h.said(), Lines{"load b"});
  EXPECT_EQ(h.account().quarantined, Bytes{0});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ReclaimingMoreThanIsMissingIsAnError) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_EQ(h.reclaimed(a, charge({{0, 1}})), ErrorCode::kInvalidArgument);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 50}})));
  EXPECT_EQ(h.reclaimed(a, charge({{0, 11}})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.account().quarantined, Bytes{10});
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 4}})));
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 6}})));
}

TEST(Yard, AModelLoadsAgainBesideItsOwnQuarantine) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 40);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, Charge{}));
  EXPECT_EQ(h.account().quarantined, Bytes{40});
  const LeaseId lease = h.use(a);
  EXPECT_EQ(h.used(), 80);
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 40}})));
  EXPECT_EQ(h.used(), 40);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, MoreThanWasHeldCannotComeBack) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 40);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.unload_done(a, charge({{0, 41}})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
}

// --- Failed loads -------------------------------------------------------------------------------

TEST(Yard, AFailedLoadLeavesNoReservationAndRefusesItsWaiters) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId first = h.request(a);
  const TicketId second = h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kPermanent));
  EXPECT_EQ(h.used(), 0);
  EXPECT_EQ(h.state(a), State::kFailed);
  for (const TicketId ticket : {first, second}) {
    ASSERT_TRUE(h.refused(ticket));
    EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kLoadFailed);
    EXPECT_EQ(h.refusal(ticket).failure, LoadFailure::kPermanent);
  }
}

TEST(Yard, AFailedLoadFundsWhoWaits) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.request(a);
  const TicketId ticket = h.request(b);
  h.forget();
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(h.said(), (Lines{"refuse a", "load b"}));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, DuringTheBackOffRequestsAreRefusedWithTheTimeLeft) {
  YardOptions wanted = options({100});
  wanted.backoff_initial = seconds{4};
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  h.skip(seconds{1});
  const TicketId early = h.request(a);
  ASSERT_TRUE(h.refused(early));
  EXPECT_EQ(h.refusal(early).reason, RefuseReason::kLoadFailed);
  EXPECT_EQ(h.refusal(early).failure, LoadFailure::kTransient);
  EXPECT_EQ(h.refusal(early).retry_after, Duration{seconds{3}});
  h.skip(seconds{3});
  h.forget();
  EXPECT_TRUE(h.waiting(h.request(a)));
  EXPECT_EQ(h.said(), Lines{"load a"});
}

TEST(Yard, BackOffGrowsToItsCapAndASuccessClearsIt) {
  YardOptions wanted = options({100});
  wanted.backoff_initial = seconds{1};
  wanted.backoff_max = seconds{10};
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  std::vector<Duration> waits;
  for (int i = 0; i < 8; ++i) {
    const TicketId ticket = h.request(a);
    EXPECT_EQ(h.state(a), State::kLoading) << "after the back-off it is tried again";
    EXPECT_FALSE(h.load_failed(a, LoadFailure::kPermanent));
    waits.push_back(h.refusal(ticket).retry_after);
    h.skip(waits.back());
  }
  EXPECT_EQ(waits.front(), Duration{seconds{1}});
  for (std::size_t i = 1; i < waits.size(); ++i) {
    EXPECT_TRUE(waits[i] > waits[i - 1] || waits[i] == Duration{seconds{10}}) << "failure " << i;
    EXPECT_LE(waits[i], Duration{seconds{10}});
  }
  EXPECT_EQ(waits.back(), Duration{seconds{10}});
  h.request(a);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.entry(a).failure_count, 0U);
  EXPECT_FALSE(h.unload(a));
  h.skip(seconds{100});
  h.finish_io();
}

TEST(Yard, AfterASuccessTheFirstBackOffIsShortAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  for (int i = 0; i < 3; ++i) {
    const TicketId ticket = h.request(a);
    EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
    h.skip(h.refusal(ticket).retry_after);
  }
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a));
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(h.refusal(ticket).retry_after, Duration{seconds{1}});
}

TEST(Yard, ManyFailuresDoNotOverflowTheBackOff) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  for (int i = 0; i < 200; ++i) {
    const TicketId ticket = h.request(a);
    ASSERT_EQ(h.state(a), State::kLoading);
    EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
    ASSERT_GT(h.refusal(ticket).retry_after, Duration::zero());
    ASSERT_LE(h.refusal(ticket).retry_after, Duration{seconds{60}});
    h.skip(h.refusal(ticket).retry_after);
  }
}

TEST(Yard, AFailingModelBreaksOnlyItself) {
  Harness h(options({100}));
  const ModelId bad = h.add("bad", 30);
  const ModelId good = h.add("good", 60);
  h.warm(good);
  const LeaseId lease = h.use(good);
  for (int i = 0; i < 5; ++i) {
    const TicketId ticket = h.request(bad);
    EXPECT_FALSE(h.load_failed(bad, LoadFailure::kPermanent));
    h.skip(h.refusal(ticket).retry_after);
    EXPECT_TRUE(h.try_acquire(good).lease);
  }
  EXPECT_EQ(h.state(good), State::kResident);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ACancelledLoadIsNotHeldAgainstTheModel) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kCancelled));
  EXPECT_EQ(h.entry(a).failure_count, 0U);
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_EQ(h.used(), 0);
  h.forget();
  const TicketId again = h.request(a);
  EXPECT_EQ(h.said(), Lines{"load a"}) << "no back-off";
  h.finish_io();
  EXPECT_TRUE(h.granted(again));
}

TEST(Yard, WhoWaitsWhenALoadIsCancelledIsNotLost) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  h.forget();
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kCancelled));
  EXPECT_EQ(h.said(), Lines{"load a"}) << "somebody still wants it";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(ticket));
}

// --- A failure is forgiven ----------------------------------------------------------------------

TEST(Forgive, LetsAFailedModelBeTriedAtOnce) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  for (int i = 0; i < 2; ++i) {
    h.request(a);
    EXPECT_FALSE(h.load_failed(a, LoadFailure::kPermanent));
    EXPECT_EQ(h.state(a), State::kFailed);
    EXPECT_TRUE(h.refused(h.request(a))) << "backs off";
    EXPECT_FALSE(h.forgive(a));
    EXPECT_EQ(h.state(a), State::kCold);
    EXPECT_EQ(h.entry(a).failure_count, 0U) << "the back-off begins anew";
  }
  h.forget();
  h.request(a);
  EXPECT_EQ(h.said(), (Lines{"load a"}));
  EXPECT_FALSE(h.forgive(a));
  EXPECT_EQ(h.state(a), State::kLoading) << "nothing else changes";
  EXPECT_EQ(h.forgive(ModelId{12345}), ErrorCode::kStaleId);
}

}  // namespace
}  // namespace modelyard::test

// Deadlines, requests that are given up, and the clock: when the yard asks to be woken, and times
// that run backwards.

#include <gtest/gtest.h>

#include <vector>

#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Deadlines and cancellation -----------------------------------------------------------------

TEST(Yard, ADeadlineThatHasPassedIsRefusedAtOnce) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.set_clock(Harness::at(seconds{10}));
  const TicketId ticket = h.request(a, Harness::at(seconds{9}));
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kDeadlineInQueue);
  EXPECT_EQ(h.state(a), State::kCold) << "nothing is loaded for a request that is over";
}

TEST(Yard, ADeadlineInTheQueueIsKept) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(b, Harness::at(seconds{5}));
  EXPECT_LE(h.wake_at(), Harness::at(seconds{5}));
  h.pass(seconds{4});
  EXPECT_TRUE(h.waiting(ticket));
  h.pass(seconds{2});
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kDeadlineInQueue);
  EXPECT_EQ(h.state(b), State::kCold);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.count("load b"), 0U) << "a request that is over causes no load";
}

TEST(Yard, ADeadlineInTheLoadIsKeptAndTheLoadGoesOn) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId soon = h.request(a, Harness::at(seconds{5}));
  const TicketId later = h.request(a, Harness::at(seconds{50}));
  h.pass(seconds{6});
  ASSERT_TRUE(h.refused(soon));
  EXPECT_EQ(h.refusal(soon).reason, RefuseReason::kDeadlineInLoad);
  EXPECT_TRUE(h.waiting(later));
  EXPECT_EQ(h.state(a), State::kLoading);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(later));
}

TEST(Yard, ACancelAfterTheDeadlineIsTheTicketsOnlyEnd) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a, Harness::at(seconds{5}));
  h.set_clock(Harness::at(seconds{6}));
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_FALSE(h.refused(ticket)) << "a ticket ends in a refusal or in a cancel, not in both";
}

TEST(Yard, DeadlinesNeedNotComeInTheOrderOfArrival) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId late = h.request(a, Harness::at(seconds{30}));
  const TicketId soon = h.request(a, Harness::at(seconds{10}));
  const TicketId middle = h.request(a, Harness::at(seconds{20}));
  EXPECT_LE(h.wake_at(), Harness::at(seconds{10}));
  h.pass(seconds{11});
  EXPECT_TRUE(h.refused(soon));
  EXPECT_TRUE(h.waiting(middle));
  EXPECT_TRUE(h.waiting(late));
  h.pass(seconds{10});
  EXPECT_TRUE(h.refused(middle));
  EXPECT_TRUE(h.waiting(late));
}

TEST(Yard, TheLastWaitersCancelDropsAQueuedLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  const LeaseId lease = h.use(a);
  const TicketId first = h.request(b);
  const TicketId second = h.request(b);
  EXPECT_FALSE(h.cancel(first));
  EXPECT_EQ(h.state(b), State::kQueued);
  EXPECT_FALSE(h.cancel(second));
  EXPECT_EQ(h.state(b), State::kCold);
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_TRUE(h.said().empty()) << "nobody wants b any more";
}

TEST(Yard, TheLastWaitersCancelDoesNotStopARunningLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  h.forget();
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.state(a), State::kLoading);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_EQ(h.yard().lease_count(), 0U);
  EXPECT_TRUE(h.granted(h.request(a)));
}

TEST(Yard, ACancelInTheMiddleOfTheQueueKeepsTheOthersInOrder) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  std::vector<TicketId> tickets;
  for (int i = 0; i < 5; ++i) tickets.push_back(h.request(a));
  EXPECT_FALSE(h.cancel(tickets[2]));
  EXPECT_FALSE(h.cancel(tickets[0]));
  EXPECT_FALSE(h.cancel(tickets[4]));
  EXPECT_EQ(h.entry(a).oldest, tickets[1]);
  EXPECT_EQ(h.entry(a).newest, tickets[3]);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(tickets[1]));
  EXPECT_TRUE(h.granted(tickets[3]));
  EXPECT_FALSE(h.granted(tickets[2]));
}

TEST(Yard, CancellingTheOldestGivesItsModelTheNextOnesPlace) {
  YardOptions wanted = options({100});
  Harness h(wanted);
  const ModelId busy = h.add("busy", 100);
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  const LeaseId lease = h.use(busy);
  const TicketId old = h.request(a);
  h.request(b);
  h.request(a);
  EXPECT_FALSE(h.cancel(old));
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(busy));
  EXPECT_EQ(h.count("load b"), 1U) << "b's request is now the older one";
  EXPECT_EQ(h.count("load a"), 0U);
}

TEST(Yard, ACancelOfTheWaiterLeavesItsVictimsLeaving) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  const TicketId ticket = h.request(h.add("b", 60));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_EQ(h.state(a), State::kUnloading) << "what was begun is ended";
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.used(), 0);
}

// --- Time ---------------------------------------------------------------------------------------

TEST(Yard, TimesThatRunBackwardsStandStill) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.set_clock(Harness::at(seconds{100}));
  h.tick();
  h.set_clock(Harness::at(seconds{50}));
  const TicketId over = h.request(a, Harness::at(seconds{70}));
  ASSERT_TRUE(h.refused(over)) << "it is still second 100";
  EXPECT_EQ(h.refusal(over).reason, RefuseReason::kDeadlineInQueue);
  const TicketId ticket = h.request(a, Harness::at(seconds{150}));
  EXPECT_TRUE(h.waiting(ticket));
  h.tick();
  EXPECT_TRUE(h.waiting(ticket));
  for (const Explanation& each : h.yard().explanations().entries()) {
    EXPECT_GE(each.waited, Duration::zero());
  }
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(h.entry(a).retry_at, Harness::at(seconds{101}));
}

TEST(Yard, EveryEventMovesTheClock) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 20);
  const LeaseId first = h.use(a);
  const LeaseId second = h.use(a);
  const ModelId b = h.add("b", 20);
  h.request(b);
  h.set_clock(Harness::at(seconds{10}));
  EXPECT_FALSE(h.release(first));
  h.set_clock(Harness::at(seconds{5}));
  EXPECT_FALSE(h.load_failed(b, LoadFailure::kTransient));
  EXPECT_EQ(h.entry(b).retry_at, Harness::at(seconds{11})) << "the release was at second 10";
  EXPECT_FALSE(h.release(second));
}

TEST(Yard, ABackwardClockDoesNotDelayTheOverdue) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("hot", 80));
  h.set_clock(Harness::at(seconds{10}));
  h.request(h.add("cold", 80));
  h.set_clock(Tick{});
  h.tick();
  EXPECT_LE(h.wake_at(), Harness::at(seconds{40}));
  h.set_clock(Harness::at(seconds{40}));
  h.tick();
  EXPECT_EQ(h.count("drain hot"), 1U);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, AsksToBeWokenForTheNextDeadlineOnly) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_EQ(h.wake_at(), kNever);
  h.request(a, Harness::at(seconds{20}));
  EXPECT_EQ(h.wake_at(), Harness::at(seconds{20}));
  const TicketId sooner = h.request(a, Harness::at(seconds{10}));
  EXPECT_EQ(h.wake_at(), Harness::at(seconds{10}));
  h.request(a, Harness::at(seconds{30}));
  EXPECT_EQ(h.wake_at(), Harness::at(seconds{10}));
  h.pass(seconds{10});
  EXPECT_TRUE(h.refused(sooner));
  EXPECT_EQ(h.wake_at(), Harness::at(seconds{20}));
}

TEST(Yard, DoesNotAskToBeWokenForNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  h.pass(seconds{1000});
  EXPECT_EQ(h.wake_at(), kNever);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.wake_at(), kNever);
}

TEST(Yard, AWakeThatIsNotNeededDoesNoHarm) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("a", 60));
  h.request(h.add("b", 60));
  h.forget();
  for (int i = 0; i < 10; ++i) h.tick();
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, TheEndOfTimeDoesNotOverflow) {
  YardOptions wanted = options({100});
  wanted.overdue_after = Duration::max();
  wanted.backoff_max = Duration::max();
  Harness h(wanted);
  h.set_clock(kNever - seconds{1});
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_FALSE(h.refused(h.request(h.add("b", 60))));
}

}  // namespace
}  // namespace modelyard::test

// Who goes first where several models wait, when one in use is asked to leave for another, and how
// many loads run on a device at once.

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Who goes first -----------------------------------------------------------------------------

TEST(Yard, WaitingModelsAreServedInTheOrderOfTheirOldestTicket) {
  Harness h(options({100}));
  const ModelId busy = h.add("busy", 100);
  const ModelId a = h.add("a", 100);
  const ModelId b = h.add("b", 100);
  const LeaseId lease = h.use(busy);
  const TicketId ticket_b = h.request(b);
  const TicketId ticket_a = h.request(a);
  h.request(b);
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(busy));
  EXPECT_EQ(h.state(b), State::kLoading);
  EXPECT_FALSE(h.load_done(b));
  EXPECT_TRUE(h.granted(ticket_b));
  EXPECT_TRUE(h.waiting(ticket_a));
}

TEST(Yard, SmallLoadsPassABlockedBigOne) {
  Harness h(options({100}));
  const ModelId busy = h.add("busy", 50);
  const LeaseId lease = h.use(busy);
  const TicketId big = h.request(h.add("big", 80));
  const ModelId small = h.add("small", 30);
  const TicketId ticket = h.request(small);
  EXPECT_EQ(h.state(small), State::kLoading);
  EXPECT_FALSE(h.load_done(small));
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_TRUE(h.waiting(big));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ABigLoadIsNotStarvedBySmallOnesOnceItIsOverdue) {
  Harness h(options({100}));
  const ModelId busy = h.add("busy", 50);
  const LeaseId lease = h.use(busy);
  const TicketId big = h.request(h.add("big", 80));
  std::vector<ModelId> small;
  for (int i = 0; i < 40; ++i) small.push_back(h.add("small" + std::to_string(i), 25));
  // An endless stream of small loads: each one is used for two seconds, one a second.
  std::vector<TicketId> tickets;
  std::vector<LeaseId> leases;
  std::size_t loaded_after = 0;
  for (std::size_t i = 0; i < small.size(); ++i) {
    h.pass(seconds{1});
    tickets.push_back(h.request(small[i]));
    for (std::size_t j = 0; j < i; ++j) {
      if (h.state(small[j]) == State::kUnloading) {
        EXPECT_FALSE(h.unload_done(small[j]));
      }
    }
    // Whose turn it is depends on how long each has waited.
    for (std::size_t j = 0; j <= i; ++j) {
      if (h.state(small[j]) != State::kLoading) continue;
      EXPECT_FALSE(h.load_done(small[j]));
      leases.push_back(h.lease_of(tickets[j]));
      if (h.now() > Harness::at(seconds{31})) ++loaded_after;
    }
    if (leases.size() > 1) {
      EXPECT_FALSE(h.release(leases.front()));
      leases.erase(leases.begin());
    }
  }
  EXPECT_EQ(loaded_after, 0U) << "what becomes free is the overdue one's own";
  EXPECT_EQ(h.count("drain busy"), 1U) << "the overdue one makes models in use drain";
  for (const LeaseId each : leases) EXPECT_FALSE(h.release(each));
  EXPECT_FALSE(h.release(lease));
  for (int i = 0; i < 3 && !h.granted(big); ++i) h.finish_io();
  EXPECT_TRUE(h.granted(big));
}

TEST(Yard, APermanentlyLeasedModelIsAskedToLeaveForAnOverdueOne) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 80);
  const ModelId cold = h.add("cold", 80);
  LeaseId lease = h.use(hot);
  const TicketId ticket = h.request(cold);
  h.forget();
  // Overlapping leases: hot is never idle.
  for (int i = 0; i < 29; ++i) {
    h.pass(seconds{1});
    const LeaseId next = h.try_acquire(hot).lease.value();
    EXPECT_FALSE(h.release(lease));
    lease = next;
  }
  EXPECT_TRUE(h.said().empty()) << "not overdue yet";
  EXPECT_LE(h.wake_at(), Harness::at(seconds{30})) << "or nobody would notice";
  h.pass(seconds{1});
  EXPECT_EQ(h.said(), Lines{"drain hot"});
  EXPECT_FALSE(h.try_acquire(hot).lease);
  const TicketId late = h.request(hot);
  EXPECT_TRUE(h.waiting(late));
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload hot"});
  EXPECT_FALSE(h.unload_done(hot));
  EXPECT_EQ(h.said(), Lines{"load cold"}) << "hot's late request is the younger one";
  EXPECT_FALSE(h.load_done(cold));
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(ticket));
  h.finish_io();
  EXPECT_TRUE(h.granted(late));
}

TEST(Yard, OnlyAnOverdueRequestDrainsModelsInUse) {
  YardOptions wanted = options({100});
  wanted.overdue_after = seconds{5};
  Harness h(wanted);
  const LeaseId lease = h.use(h.add("hot", 80));
  h.request(h.add("cold", 80));
  h.pass(milliseconds{4999});
  EXPECT_EQ(h.count("drain hot"), 0U);
  h.pass(milliseconds{1});
  EXPECT_EQ(h.count("drain hot"), 1U);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ARequestWithADeadlineIsOverdueWhenHalfOfItHasPassed) {
  // docs/design/decisions.md: waiting longer would leave no time for the load.
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("hot", 80));
  h.request(h.add("cold", 80), Harness::at(seconds{20}));
  h.pass(milliseconds{9999});
  EXPECT_EQ(h.count("drain hot"), 0U);
  h.pass(milliseconds{1});
  EXPECT_EQ(h.count("drain hot"), 1U);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, AnOverdueRequestPrefersIdleModelsAndDrainsTheFewestInUse) {
  YardOptions wanted = lru({100});
  wanted.overdue_after = seconds{5};
  Harness h(wanted);
  const ModelId idle = h.add("idle", 30);
  const ModelId busy = h.add("busy", 40);
  const ModelId busier = h.add("busier", 30);
  h.warm(idle);
  const LeaseId first = h.use(busy);
  const LeaseId second = h.use(busier);
  h.request(h.add("cold", 70));
  h.forget();
  h.pass(seconds{5});
  EXPECT_EQ(h.count("unload idle"), 1U);
  EXPECT_EQ(h.count("drain busy") + h.count("drain busier"), 1U);
  EXPECT_EQ(h.count("drain busy"), 1U) << "30 + 30 would not be enough";
  EXPECT_FALSE(h.release(first));
  EXPECT_FALSE(h.release(second));
}

TEST(Yard, BytesOnTheirWayBackAreKeptForWhomTheyComeBack) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  const ModelId big = h.add("big", 90);
  const ModelId small = h.add("small", 40);
  h.request(big);
  EXPECT_EQ(h.state(a), State::kUnloading);
  h.request(small);
  EXPECT_EQ(h.count("load small"), 0U) << "40 are free, but big counts on 30 of them";
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(big), State::kLoading);
}

TEST(Yard, YoungerModelsUseWhatAnOlderOneLeaves) {
  YardOptions wanted = options({100});
  wanted.load_channels_per_device = 2;  // So that bytes alone decide.
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  h.warm(a);
  h.request(h.add("big", 70));
  h.forget();
  h.request(h.add("small", 30));
  EXPECT_EQ(h.said(), (Lines{"load small"})) << "big needs 10 of the 40 that are free now";
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), (Lines{"load big"}));
}

TEST(Yard, VictimsOfOneWaiterAreNotCountedForAnother) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  h.warm(a);
  h.warm(b);
  h.request(h.add("c", 50));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  h.request(h.add("d", 50));
  h.finish_io();
  EXPECT_EQ(h.count("unload a"), 1U);
  EXPECT_EQ(h.count("unload b"), 1U) << "a's bytes are c's";
  EXPECT_EQ(h.count("load c"), 1U);
  EXPECT_EQ(h.count("load d"), 1U);
}

// --- Load channels ------------------------------------------------------------------------------

TEST(Yard, OneLoadRunsOnADeviceAtOnce) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 20}}));
  const ModelId b = h.add("b", charge({{0, 20}}));
  const ModelId c = h.add("c", charge({{1, 20}}));
  h.request(a);
  h.request(b);
  h.request(c);
  EXPECT_EQ(h.said(), (Lines{"load a", "load c"}));
  EXPECT_EQ(h.state(b), State::kQueued);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.state(b), State::kLoading);
}

TEST(Yard, AsManyLoadsRunOnADeviceAsItHasChannels) {
  YardOptions wanted = options({100});
  wanted.load_channels_per_device = 2;
  Harness h(wanted);
  for (const char* name : {"a", "b", "c"}) h.request(h.add(name, 20));
  EXPECT_EQ(h.said(), (Lines{"load a", "load b"}));
}

TEST(Yard, AModelOnSeveralDevicesNeedsAChannelOnEach) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 20}}));
  const ModelId gang = h.add("gang", charge({{0, 20}, {1, 20}}));
  h.request(a);
  h.request(gang);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.state(gang), State::kLoading);
}

TEST(Yard, AFailedLoadGivesItsChannelBack) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 20);
  const ModelId b = h.add("b", 20);
  h.request(a);
  h.request(b);
  EXPECT_EQ(h.state(b), State::kQueued);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(h.state(b), State::kLoading);
}

}  // namespace
}  // namespace modelyard::test

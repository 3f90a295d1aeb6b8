// Models that are taken out of the yard, whatever they are about just then.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Removal ------------------------------------------------------------------------------------

TEST(Yard, AColdModelIsGoneAtOnce) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.exists(a));
  EXPECT_EQ(h.yard().model_count(), 0U);
  EXPECT_EQ(h.remove(a), ErrorCode::kStaleId);
}

TEST(Yard, RemovingAQueuedModelRefusesItsTickets) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const ModelId a = h.add("a", 60);
  const TicketId one = h.request(a);
  const TicketId two = h.request(a);
  EXPECT_FALSE(h.remove(a));
  for (const TicketId ticket : {one, two}) {
    ASSERT_TRUE(h.refused(ticket));
    EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kRemoved);
  }
  EXPECT_FALSE(h.exists(a));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, RemovingALoadingModelStopsTheLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  h.forget();
  EXPECT_FALSE(h.remove(a));
  EXPECT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.count("cancel_load a"), 1U);
  EXPECT_TRUE(h.exists(a)) << "it still holds its reservation";
  EXPECT_EQ(h.account().reserved, Bytes{60});
  EXPECT_EQ(h.try_request(a).error, ErrorCode::kStaleId);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kCancelled));
  EXPECT_FALSE(h.exists(a));
  EXPECT_EQ(h.used(), 0);
}

TEST(Yard, ARemovedModelWhoseLoadCouldNotBeStoppedIsUnloaded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.remove(a));
  h.forget();
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.exists(a));
}

TEST(Yard, ARemovedModelWhoseLoadFailsIsGone) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kPermanent));
  EXPECT_FALSE(h.exists(a));
}

TEST(Yard, RemovingAnIdleModelUnloadsIt) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_TRUE(h.exists(a));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.exists(a));
}

TEST(Yard, LeasesOfARemovedModelRunOn) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  h.forget();
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.said(), Lines{"drain a"});
  EXPECT_EQ(h.try_acquire(a).error, ErrorCode::kStaleId);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.exists(a));
  EXPECT_EQ(h.used(), 0);
}

TEST(Yard, RemovingADrainingOrUnloadingModelRefusesItsTickets) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId draining = h.request(a);
  EXPECT_FALSE(h.remove(a));
  ASSERT_TRUE(h.refused(draining));
  EXPECT_EQ(h.refusal(draining).reason, RefuseReason::kRemoved);
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.exists(a));
  const ModelId b = h.add("b", 60);
  h.warm(b);
  EXPECT_FALSE(h.unload(b));
  const TicketId unloading = h.request(b);
  EXPECT_FALSE(h.remove(b));
  EXPECT_TRUE(h.refused(unloading));
  EXPECT_FALSE(h.unload_done(b));
  EXPECT_FALSE(h.exists(b));
}

TEST(Yard, RemovingAFailedModelForgetsIt) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.exists(a));
}

TEST(Yard, APinnedModelCanBeRemoved) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.pin(a));
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  const TicketId ticket = h.request(h.add("b", 60));
  EXPECT_TRUE(h.waiting(ticket)) << "a removed pin holds nothing for ever";
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
}

TEST(Yard, ARemovedModelsQuarantineIsKeptUntilItIsReclaimed) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 45}})));
  EXPECT_TRUE(h.exists(a));
  EXPECT_EQ(h.account().quarantined, Bytes{15});
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 5}})));
  EXPECT_TRUE(h.exists(a));
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 10}})));
  EXPECT_FALSE(h.exists(a));
  EXPECT_EQ(h.used(), 0);
}

TEST(Yard, ARemovedModelInUseStaysEvenIfItHoldsNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, Charge{}));
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.reclaimed(a, Charge{}));
  ASSERT_TRUE(h.exists(a)) << "its lease runs on";
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.reclaimed(a, Charge{}));
  ASSERT_TRUE(h.exists(a)) << "its unload runs";
  EXPECT_FALSE(h.unload_done(a, Charge{}));
  EXPECT_FALSE(h.exists(a));
}

TEST(Yard, ARemovedModelsRoomGoesToWhoWaits) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 80));
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.release(lease));
  h.forget();
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, ASlotIsUsedAgainWithoutItsHistory) {
  Harness h(lru({100}));
  const ModelId old = h.add("old", 40);
  h.warm(old);
  EXPECT_FALSE(h.remove(old));
  EXPECT_FALSE(h.unload_done(old));
  const ModelId young = h.add("young", 30);
  EXPECT_EQ(EntryTable::index_of(young), EntryTable::index_of(old));
  EXPECT_FALSE(h.exists(old));
  EXPECT_EQ(h.entry(young).load_count, 0U);
  EXPECT_EQ(h.entry(young).failure_count, 0U);
  EXPECT_EQ(h.state(young), State::kCold);
}

}  // namespace
}  // namespace modelyard::test

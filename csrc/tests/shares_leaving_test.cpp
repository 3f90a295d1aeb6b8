// Shares whose holders leave: for another model, for a lower budget, or from a closed device; and
// who takes them over.

#include <gtest/gtest.h>

#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- On their way out, and back -----------------------------------------------------------------

TEST(Shares, OfAModelThatIsUnloadedAreTakenOver) {
  Harness h(lru({200}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.yard().exclusive(a), charge({{0, 51}}));
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.state(b), State::kLoading);
  EXPECT_EQ(h.used(), 53) << "charged once";
  EXPECT_EQ(h.account().reserved, Bytes{52});
  EXPECT_EQ(h.unload_done(a, charge({{0, 51}})), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.unload_done(a, charge({{0, 1}})));
  EXPECT_FALSE(h.load_done(b));
  EXPECT_EQ(h.used(), 52);
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, TakenOverByALoadThatFailsTheyGoWithTheirLastHolder) {
  for (const bool load_fails_first : {true, false}) {
    Harness h(lru({200}, 4));
    const ShareId shared = h.add_share(50);
    const ModelId a = h.add_sharing("a", 1, {shared});
    const ModelId b = h.add_sharing("b", 2, {shared});
    h.warm(a);
    EXPECT_FALSE(h.unload(a));
    h.request(b);
    if (load_fails_first) {
      EXPECT_FALSE(h.load_failed(b, LoadFailure::kTransient));
      EXPECT_FALSE(h.unload_done(a, charge({{0, 51}})));
    } else {
      EXPECT_FALSE(h.unload_done(a, charge({{0, 1}})));
      EXPECT_EQ(h.used(), 52);
      EXPECT_FALSE(h.load_failed(b, LoadFailure::kTransient));
    }
    EXPECT_EQ(h.used(), 0);
  }
}

TEST(Shares, HeldByAModelThatDrainsAreThereForAThird) {
  Harness h(lru({60}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 5, {shared});
  const ModelId b = h.add_sharing("b", 5, {shared});
  const LeaseId used = h.use(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.account().draining, Bytes{55});
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.state(b), State::kLoading) << "five are free, and the rest is there";
  EXPECT_EQ(h.account().reserved, Bytes{55});
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 5}})));
  EXPECT_FALSE(h.load_done(b));
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, AModelComesBackToWhatIsStillUnloaded) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId ticket = h.request(a);
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account().reserved, Bytes{60}) << "all of it anew";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.release(ticket));
}

// --- Victims ------------------------------------------------------------------------------------

TEST(Shares, OneHolderAloneFreesOnlyItsOwn) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 20, {shared});
  const ModelId b = h.add_sharing("b", 20, {shared});
  const ModelId c = h.add("c", 25);
  h.warm(a);
  h.warm(b);
  h.request(c);
  EXPECT_EQ(h.said(), Lines{"unload a"}) << "ten are free and twenty come";
  h.finish_io();
  EXPECT_EQ(h.state(b), State::kResident);
}

TEST(Shares, AllHoldersLeaveWhereTheShareIsNeeded) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 5, {shared});
  const ModelId b = h.add_sharing("b", 5, {shared});
  const ModelId c = h.add("c", 100);
  h.warm(a);
  h.warm(b);
  const TicketId ticket = h.request(c);
  EXPECT_EQ(h.said(), (Lines{"unload a", "unload b"}));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, NobodyLeavesForAShareThatAPinnedModelKeeps) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 5, {shared});
  const ModelId pinned = h.add_sharing("pinned", 5, {shared});
  const ModelId c = h.add("c", 50);
  h.warm(a);
  h.warm(pinned);
  EXPECT_FALSE(h.pin(pinned));
  EXPECT_EQ(h.yard().share(shared)->on(device(0)).pinned, 1U);
  const TicketId ticket = h.request(c);
  EXPECT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kBudgetExhausted);
  EXPECT_EQ(h.refusal(ticket).holders[0].bytes, Bytes{55});
  EXPECT_TRUE(h.said() == Lines{"refuse c"}) << "and nobody left";
  EXPECT_FALSE(h.unpin(pinned));
  EXPECT_EQ(h.yard().share(shared)->on(device(0)).pinned, 0U);
  h.warm(c);
}

TEST(Shares, WhatAPinnedModelHoldsOfItAModelNeedNotBring) {
  Harness h(lru({60}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId pinned = h.add_sharing("pinned", 5, {shared});
  const ModelId b = h.add_sharing("b", 5, {shared});
  const ModelId large = h.add_sharing("large", 6, {shared});
  h.warm(pinned);
  EXPECT_FALSE(h.pin(pinned));
  h.warm(b);
  EXPECT_EQ(h.used(), 60);
  const TicketId ticket = h.request(large);
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kBudgetExhausted);
  EXPECT_EQ(h.refusal(ticket).needed, Bytes{6});
}

TEST(Shares, PinsAreCountedInEveryState) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 5, {shared});
  const auto pinned = [&] { return h.yard().share(shared)->on(device(0)).pinned; };
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(pinned(), 0U) << "it holds nothing";
  const TicketId ticket = h.request(a);
  EXPECT_EQ(pinned(), 1U);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_EQ(pinned(), 0U);
  EXPECT_FALSE(h.pin(a));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(pinned(), 1U);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(pinned(), 0U) << "it was leaving already";
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(pinned(), 0U);
  h.request(a);
  EXPECT_EQ(pinned(), 1U);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(pinned(), 0U);
  h.skip(seconds{100});
  h.warm(a);
  EXPECT_EQ(pinned(), 1U);
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(pinned(), 0U);
}

TEST(Shares, AVictimsShareThatTheModelWantsFreesNothing) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 30, {shared});
  const ModelId other = h.add("other", 20);
  const ModelId b = h.add_sharing("b", 40, {shared});
  h.warm(a);
  h.warm(other);
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a", "unload other"})) << "30 are too few, its 50 do not count";
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.used(), 90);
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, ExplanationsTellWhatComesBackAndWhatStays) {
  Harness h(lru({100}, 4));
  const ShareId ours = h.add_share(30);
  const ShareId mine = h.add_share(20);
  const ModelId a = h.add_sharing("a", 10, {ours, mine});
  const ModelId b = h.add_sharing("b", 5, {ours});
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.explained(Decision::kLoadStarted)[0].bytes, Bytes{60});
  EXPECT_EQ(h.explained(Decision::kLoadStarted)[1].bytes, Bytes{5});
  EXPECT_EQ(h.explained(Decision::kLoadStarted)[1].shared_bytes, Bytes{30});
  const ModelId c = h.add("c", 60);
  h.request(c);
  const Explanation evicted = h.explained(Decision::kEvicted).back();
  EXPECT_EQ(evicted.model, a);
  EXPECT_EQ(evicted.cause, c);
  EXPECT_EQ(evicted.bytes, Bytes{30});
  EXPECT_EQ(evicted.shared_bytes, Bytes{30});
  h.finish_io();
  EXPECT_EQ(h.explained(Decision::kUnloaded).back().bytes, Bytes{30});
  EXPECT_EQ(h.explained(Decision::kUnloaded).back().shared_bytes, Bytes{30});
}

// --- Budgets and closed devices -----------------------------------------------------------------

TEST(Shares, ALowerBudgetIsRepaidByAllHoldersIfTheirOwnDoesNotSuffice) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b = h.add_sharing("b", 10, {shared});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.set_budget(0, 62));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  h.finish_io();
  EXPECT_FALSE(h.set_budget(0, 40));
  EXPECT_EQ(h.said(), Lines{"unload b"});
  EXPECT_EQ(h.account().deficit, Bytes{20});
  h.finish_io();
  EXPECT_EQ(h.used(), 0);
}

TEST(Shares, ATinyShareRepaysADeficitToo) {
  Harness h(lru({100}, 4));
  const ShareId tiny = h.add_share(1);
  const ModelId a = h.add_sharing("a", 0, {tiny});
  const ModelId b = h.add_sharing("b", 0, {tiny});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.set_budget(0, 0));
  EXPECT_EQ(h.said(), (Lines{"unload a", "unload b"}));
}

TEST(Shares, AreTakenOverBesideADeficitThatTheRestRepays) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId copy = h.add_sharing("copy", 0, {shared});
  const LeaseId used = h.use(a);
  h.forget();
  EXPECT_FALSE(h.set_budget(0, 55));
  EXPECT_EQ(h.said(), Lines{"drain a"});
  EXPECT_EQ(h.account().deficit, Bytes{5});
  const TicketId ticket = h.request(copy);
  EXPECT_EQ(h.state(copy), State::kLoading) << "ten come back, five are owed";
  EXPECT_FALSE(h.set_budget(0, 100));
  EXPECT_FALSE(h.load_done(copy));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.release(used));
  h.finish_io();
}

TEST(Shares, ADeficitIsRepaidBeforeWhatRepaysItIsTakenOver) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId copy = h.add_sharing("copy", 0, {shared});
  const ModelId loading = h.add("loading", 30);
  const LeaseId used = h.use(a);
  const TicketId first = h.request(loading);
  EXPECT_FALSE(h.set_budget(0, 70));
  EXPECT_EQ(h.account().deficit, Bytes{20});
  EXPECT_EQ(h.state(a), State::kDraining) << "ninety are held, and a brings sixty";
  const TicketId second = h.request(copy);
  EXPECT_EQ(h.state(copy), State::kQueued) << "without the share a would bring ten";
  EXPECT_FALSE(h.load_done(loading));
  EXPECT_FALSE(h.release(used));
  h.finish_io();
  EXPECT_LE(h.used(), 70);
  EXPECT_FALSE(h.release(first));
  h.finish_io();
  EXPECT_FALSE(h.release(second));
}

TEST(Shares, AClosedDeviceDrainsWhoHoldsOnlySharesThere) {
  Harness h(lru({100, 100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a =
      h.add_sharing("a", std::vector<Charge>{charge({{1, 5}})}, {shared}, {device(0)});
  const ModelId copy = h.add_sharing("copy", 0, {shared});
  h.warm(a);
  h.warm(copy);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.said(), (Lines{"unload a", "unload copy"}));
  h.finish_io();
  EXPECT_EQ(h.used(0), 0);
  const TicketId ticket = h.request(copy);
  EXPECT_TRUE(h.waiting(ticket)) << "nothing is loaded onto it";
  EXPECT_FALSE(h.set_closed(0, false));
  EXPECT_EQ(h.state(copy), State::kLoading);
  EXPECT_FALSE(h.load_done(copy));
  EXPECT_FALSE(h.release(ticket));
}

// --- What a younger model may not take ----------------------------------------------------------

TEST(Shares, OfWhoDrainsForAnOverdueModelAreNotTakenOver) {
  Harness h(lru({60}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId copy = h.add_sharing("copy", 0, {shared});
  const ModelId large = h.add("large", 60);
  const LeaseId used = h.use(a);
  const TicketId old = h.request(large);
  h.pass(seconds{31});
  EXPECT_EQ(h.state(a), State::kDraining) << "for the large one, which is overdue";
  const TicketId young = h.request(copy);
  EXPECT_EQ(h.state(copy), State::kQueued) << "what becomes free is the large one's own";
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(large), State::kLoading);
  EXPECT_FALSE(h.load_done(large));
  EXPECT_TRUE(h.granted(old));
  EXPECT_FALSE(h.release(old));
  h.finish_io();
  EXPECT_TRUE(h.granted(young));
  EXPECT_FALSE(h.release(young));
}

TEST(Shares, TakenOverFromAnUnloadArePaidForInFull) {
  // `old` counts on 70 that are unloaded, 20 of them a share, and on 40 of 100 free bytes. Whoever
  // takes the share over leaves it 20 more of the free ones, so the third one does not get 60.
  Harness h(lru({170}, 4));
  const ShareId shared = h.add_share(20);
  const ModelId leaving = h.add_sharing("leaving", 50, {shared});
  const ModelId old = h.add("old", 110);
  const ModelId copy = h.add_sharing("copy", 0, {shared});
  const ModelId third = h.add("third", 60);
  // The three wait in one pass: they are asked for while the device is closed.
  h.warm(leaving);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.state(leaving), State::kUnloading);
  const TicketId first = h.request(old);
  const TicketId second = h.request(copy);
  const TicketId last = h.request(third);
  h.forget();
  EXPECT_FALSE(h.set_closed(0, false));
  EXPECT_EQ(h.said(), Lines{"load copy"});
  EXPECT_FALSE(h.unload_done(leaving));
  EXPECT_EQ(h.said(), Lines{"load old"}) << "its bytes were kept";
  h.finish_io();
  for (const TicketId ticket : {first, second}) EXPECT_FALSE(h.release(ticket));
  h.finish_io();
  EXPECT_FALSE(h.release(last));
}

}  // namespace
}  // namespace modelyard::test

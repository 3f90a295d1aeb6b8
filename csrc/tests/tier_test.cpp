#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "random_events.hpp"

// The host tier: which copies are made, kept and dropped, and what is charged for them. As in
// yard_test.cpp every event is judged by the Referee, and every test ends with empty accounts.

namespace modelyard::test {
namespace {

// Devices that are all above a tier. Least recently used, unless a test is about prices.
YardOptions tiered(std::initializer_list<std::int64_t> budgets, std::int64_t tier,
                   std::string policy = "lru") {
  YardOptions wanted = options(budgets);
  wanted.tier_budget = Bytes{tier};
  wanted.above_tier.assign(budgets.size(), true);
  wanted.policy = std::move(policy);
  wanted.load_channels_per_device = 4;
  return wanted;
}

ModelId on(Harness& h, const char* label, std::uint32_t where, std::int64_t bytes = 60) {
  return h.add(label, charge({{where, bytes}}));
}

// A request of the policy's clock that changes nothing else: it comes too late.
void wish(Harness& h, ModelId model) {
  h.request(model, h.now());
  h.forget();
}

// --- A copy is made -----------------------------------------------------------------------------

TEST(Tier, AnEvictedModelLeavesACopy) {
  Harness h(tiered({100}, 100));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a keep"}));
  EXPECT_EQ(h.copy_state(a), CopyState::kMaking);
  EXPECT_EQ(h.tier().reserved, Bytes{60}) << "reserved before the unload is sent";
  EXPECT_FALSE(h.kept(a, 60, seconds{2}));
  EXPECT_EQ(h.said(), (Lines{"load b"}));
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
  EXPECT_EQ(h.tier().reserved, Bytes{0});
  EXPECT_EQ(h.tier().resident, Bytes{60});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{60});
  EXPECT_EQ(h.yard().counters().copy_count, 1U);
  ASSERT_EQ(h.explained(Decision::kCopyKept).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kCopyKept)[0].device, h.yard().tier());
  EXPECT_EQ(h.explained(Decision::kCopyKept)[0].bytes, Bytes{60});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_FALSE(h.release(ticket));
}

TEST(Tier, ACopyOutlivesTheLoadFromItAndIsNotMadeTwice) {
  Harness h(tiered({100}, 200));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload_done(b));
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), milliseconds{100}, Source::kCopy));
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
  EXPECT_EQ(h.yard().counters().promotion_count, 1U);
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 0.1);
  EXPECT_FALSE(h.release(ticket));
  h.forget();
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a"})) << "its copy is there";
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
  EXPECT_EQ(h.tier().resident, Bytes{120});
}

TEST(Tier, OnlyModelsOfDevicesAboveItAreCopied) {
  YardOptions wanted = tiered({100, 100}, 500);
  wanted.above_tier = {true, false};
  Harness h(wanted);
  const ModelId a = on(h, "a", 1);
  const ModelId b = on(h, "b", 1);
  const ModelId gang = h.add("gang", charge({{0, 10}, {1, 90}}));
  h.warm(a);
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a"}));
  h.finish_io();
  h.forget();
  EXPECT_FALSE(h.set_closed(1, true));
  EXPECT_EQ(h.said(), (Lines{"drain b"}));
  EXPECT_FALSE(h.set_closed(1, false));
  h.finish_io();
  for (const LeaseId lease : h.yard().leases_of(b)) EXPECT_FALSE(h.release(lease));
  h.finish_io();
  h.warm(gang);
  h.forget();
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.said(), (Lines{"unload gang"})) << "one of its devices is not above the tier";
  EXPECT_EQ(h.tier().used(), Bytes{0});
}

TEST(Tier, AnEngineMayMakeNoCopy) {
  Harness h(tiered({100}, 100));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.request(b);
  EXPECT_FALSE(h.unload_done(a, charge({{0, 60}})));
  EXPECT_EQ(h.copy_state(a), CopyState::kNone);
  EXPECT_EQ(h.tier().used(), Bytes{0});
  EXPECT_EQ(h.yard().counters().copy_count, 0U);
}

TEST(Tier, ACopyMayBeSmallerThanWhatWasReserved) {
  Harness h(tiered({60}, 105));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const TicketId ticket = h.request(b);
  EXPECT_FALSE(h.kept(a, 45));
  EXPECT_EQ(h.tier().resident, Bytes{45});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{45});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_FALSE(h.release(ticket));
  h.forget();
  h.request(a);
  EXPECT_EQ(h.said(), (Lines{"unload b keep"})) << "there is room for both";
}

TEST(Tier, ACopyThatWouldBeLargerIsNotMadeAndItsSizeIsRemembered) {
  Harness h(tiered({60}, 100));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const TicketId ticket = h.request(b);
  Event event = h.make(EventKind::kUnloadDone, a);
  event.charge = charge({{0, 60}});
  event.kept = Kept{.bytes = Bytes{70}, .took = seconds{1}, .made = true};
  EXPECT_EQ(h.step(event).error, ErrorCode::kInvalidArgument) << "room was promised for 60";
  event.kept = Kept{.bytes = Bytes{60}, .took = seconds{1}, .made = false};
  EXPECT_EQ(h.step(event).error, ErrorCode::kInvalidArgument) << "60 were to be made";
  EXPECT_EQ(h.copy_state(a), CopyState::kMaking);
  EXPECT_FALSE(h.kept(a, 70));
  EXPECT_EQ(h.copy_state(a), CopyState::kNone);
  EXPECT_EQ(h.tier().used(), Bytes{0});
  EXPECT_EQ(h.yard().counters().copy_count, 0U);
  EXPECT_FALSE(h.load_done(b));
  EXPECT_FALSE(h.release(ticket));
  const TicketId again = h.request(a);
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.release(again));
  h.request(b);
  EXPECT_EQ(h.copy_state(a), CopyState::kMaking);
  EXPECT_EQ(h.tier().reserved, Bytes{70}) << "what it would have needed";
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 60}})}));
  EXPECT_EQ(h.tier().reserved, Bytes{70}) << "that is for the next one";
}

TEST(Tier, RoomIsMadeForThePaddingOfAFirstCopy) {
  YardOptions wanted = tiered({60}, 100);
  wanted.copy_padding = Bytes{8};
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const Event ask = h.make(EventKind::kRequest, b);
  const Outcome outcome = h.step(ask);
  const auto* unload = std::get_if<Unload>(&outcome.actions.front());
  ASSERT_NE(unload, nullptr);
  EXPECT_EQ(unload->most, Bytes{68});
  EXPECT_EQ(h.tier().reserved, Bytes{68});
  EXPECT_FALSE(h.kept(a, 62));
  EXPECT_EQ(h.tier().resident, Bytes{62});
  EXPECT_EQ(h.entry(a).copy_bytes, Bytes{62}) << "the next one is known to need so much";
}

TEST(Tier, NoCopyIsMadeWhileAnEarlierOneHasNotComeBack) {
  Harness h(tiered({60}, 200));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.copy_dropped(a, 50));
  h.warm(a);
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a"}));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.reclaimed(a, charge({{1, 10}})));
  h.finish_io();
  for (const LeaseId lease : h.yard().leases_of(b)) EXPECT_FALSE(h.release(lease));
  h.warm(a);
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a keep"}));
}

// --- It pays ------------------------------------------------------------------------------------

// If a model whose files take 4 s leaves a copy, when the last copy of the same size took so long.
bool pays_when_making_takes(Duration took) {
  Harness h(tiered({60}, 300));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), seconds{4}));
  for (const LeaseId lease : h.yard().leases_of(a)) EXPECT_FALSE(h.release(lease));
  h.request(b);
  EXPECT_FALSE(h.kept(a, 60, took));
  EXPECT_FALSE(h.load_done(b, charge({{0, 60}}), seconds{4}));
  for (const LeaseId lease : h.yard().leases_of(b)) EXPECT_FALSE(h.release(lease));
  h.forget();
  h.request(a);
  return h.said() == Lines{"unload b keep"};
}

TEST(TierPrices, ACopyMustSaveMoreSecondsThanMakingItTakes) {
  // One that nobody has loaded yet is thought to take a quarter of the files' time: 3 s are saved.
  EXPECT_TRUE(pays_when_making_takes(milliseconds{2900}));
  EXPECT_FALSE(pays_when_making_takes(milliseconds{3100}));
}

TEST(TierPrices, WhatACopyTakesIsLearned) {
  Harness h(tiered({60}, 300));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.request(b);
  EXPECT_FALSE(h.kept(a, 60, milliseconds{100}));
  h.finish_io();
  for (const LeaseId lease : h.yard().leases_of(b)) EXPECT_FALSE(h.release(lease));
  h.request(a);
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  // Files take a second; the copy turns out to be no faster than that, less what making it takes.
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), milliseconds{950}, Source::kCopy));
  for (const LeaseId lease : h.yard().leases_of(a)) EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.copy_lost(a));
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1) << "without the copy";
  h.forget();
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a"}));
}

TEST(TierPrices, ACopyThatSavesNothingIsDropped) {
  Harness h(tiered({60}, 300));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.copy_state(a), CopyState::kKept);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload_done(b));
  h.forget();
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), seconds{1}, Source::kCopy));
  EXPECT_EQ(h.said().front(), "drop_copy a") << "files take a second as well";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 1);
  EXPECT_FALSE(h.release(ticket));
  h.forget();
  h.request(b);
  EXPECT_EQ(h.said(), (Lines{"unload a"})) << "and it is not copied again";
}

TEST(TierPrices, AFirstLoadThatTookLongIsNoReasonForACopy) {
  Harness h(tiered({60}, 300));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  const ModelId c = h.add("c", 60);
  const auto load = [&](ModelId model, Duration took, Source source) {
    h.request(model);
    EXPECT_FALSE(h.load_done(model, charge({{0, 60}}), took, source));
    for (const LeaseId lease : h.yard().leases_of(model)) EXPECT_FALSE(h.release(lease));
    h.forget();
  };
  load(a, seconds{9}, Source::kPageCache);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a));
  load(a, seconds{1}, Source::kPageCache);
  h.request(b);
  EXPECT_FALSE(h.kept(a, 60, milliseconds{1}));
  EXPECT_FALSE(h.load_done(b, charge({{0, 60}}), seconds{9}, Source::kPageCache));
  for (const LeaseId lease : h.yard().leases_of(b)) EXPECT_FALSE(h.release(lease));
  h.forget();
  h.request(c);
  EXPECT_EQ(h.said(), (Lines{"unload b"})) << "reloads take a second here, and so would a copy";
  EXPECT_DOUBLE_EQ(h.entry(b).reload_seconds, 9) << "which is the price of its absence still";
}

TEST(TierPrices, FilesAreExpectedWhereReloadsFindThem) {
  Harness h(tiered({60}, 300));
  const ModelId a = h.add("a", 60);
  const auto load = [&](Duration took, Source source) {
    const TicketId ticket = h.request(a);
    EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), took, source));
    EXPECT_FALSE(h.release(ticket));
    EXPECT_FALSE(h.unload(a));
    EXPECT_FALSE(h.unload_done(a));
  };
  load(seconds{10}, Source::kStorage);
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 10);
  load(seconds{2}, Source::kPageCache);
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 2) << "all reloads so far found it there";
  load(seconds{10}, Source::kStorage);
  EXPECT_DOUBLE_EQ(h.entry(a).reload_seconds, 0.9 * 2 + 0.1 * 10);
}

// --- Room is made -------------------------------------------------------------------------------

// A device for one model, a tier for two copies: those of a and b, in this order of their requests.
struct FullTier {
  explicit FullTier(std::string policy = "lru") : h(tiered({60, 60}, 120, std::move(policy))) {
    h.warm(a);
    h.warm(b);
    h.warm(c);
    EXPECT_EQ(h.tier().resident, Bytes{120});
    EXPECT_EQ(h.copy_state(a), CopyState::kKept);
    EXPECT_EQ(h.copy_state(b), CopyState::kKept);
  }

  Harness h;
  ModelId a = on(h, "a", 0);
  ModelId b = on(h, "b", 0);
  ModelId c = on(h, "c", 0);
  ModelId d = on(h, "d", 0);
};

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

// --- Its budget ---------------------------------------------------------------------------------

TEST(TierBudget, CopiesGoUntilWhatIsLeftFits) {
  FullTier t;
  EXPECT_FALSE(t.h.set_tier_budget(119));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy a"}));
  EXPECT_FALSE(t.h.set_tier_budget(60));
  EXPECT_EQ(t.h.said(), Lines{}) << "what is on its way out suffices";
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(t.h.tier().deficit, Bytes{0});
  EXPECT_FALSE(t.h.set_tier_budget(0));
  EXPECT_EQ(t.h.said(), (Lines{"drop_copy b"}));
  EXPECT_FALSE(t.h.copy_dropped(t.b));
  t.h.request(t.d);
  EXPECT_EQ(t.h.said(), (Lines{"unload c"})) << "no room at all";
  t.h.finish_io();
  for (const LeaseId lease : t.h.yard().leases_of(t.d)) EXPECT_FALSE(t.h.release(lease));
  EXPECT_FALSE(t.h.set_tier_budget(60));
  t.h.forget();
  t.h.request(t.c);
  EXPECT_EQ(t.h.said(), (Lines{"unload d keep"}));
}

TEST(TierBudget, IsChangedOnlyWhereThereIsATierAndWithinBounds) {
  Harness none(options({100}));
  EXPECT_EQ(none.set_tier_budget(10), ErrorCode::kWrongState);
  EXPECT_EQ(none.yard().tier(), kNoDevice);
  Harness h(tiered({100}, 50));
  EXPECT_EQ(h.yard().tier(), device(1));
  EXPECT_EQ(h.yard().device_count(), 1U);
  EXPECT_EQ(h.set_tier_budget(-1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_tier_budget(kMaxBytes + 1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.tier().budget, Bytes{50});
  EXPECT_EQ(h.set_budget(1, 10), ErrorCode::kInvalidArgument) << "the tier is no device";
  EXPECT_EQ(h.set_closed(1, true), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.set_tier_budget(kMaxBytes));
}

TEST(TierBudget, TakesTheSixteenthPlace) {
  YardOptions wanted;
  wanted.budgets.assign(kMaxDevices, Bytes{100});
  EXPECT_TRUE(Yard::create(wanted).ok());
  wanted.tier_budget = Bytes{1};
  wanted.above_tier.assign(kMaxDevices, true);
  EXPECT_FALSE(Yard::create(wanted).ok());
  wanted.budgets.pop_back();
  EXPECT_FALSE(Yard::create(wanted).ok()) << "above_tier is said for each device";
  wanted.above_tier.pop_back();
  ASSERT_TRUE(Yard::create(wanted).ok());
  wanted.tier_budget = Bytes{kMaxBytes + 1};
  EXPECT_FALSE(Yard::create(wanted).ok());
  wanted.tier_budget = Bytes{-1};
  EXPECT_FALSE(Yard::create(wanted).ok());
  wanted.tier_budget = Bytes{100};
  Harness h(wanted);
  const ModelId a = on(h, "a", kMaxDevices - 2);
  const ModelId b = on(h, "b", kMaxDevices - 2);
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.account(kMaxDevices - 1).resident, Bytes{60}) << "the last account is the tier's";
}

// --- Shares -------------------------------------------------------------------------------------

TEST(TierShares, AreChargedOnceThereToo) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId b = h.add_sharing("b", 20, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.warm(b);
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload a keep", "unload b keep"}));
  EXPECT_EQ(h.tier().reserved, Bytes{70});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.tier().resident, Bytes{50}) << "the share is what its liveliest copy is";
  EXPECT_EQ(h.tier().reserved, Bytes{20});
  EXPECT_FALSE(h.unload_done(b));
  EXPECT_EQ(h.tier().resident, Bytes{70});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{10});
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.tier().draining, Bytes{10});
  EXPECT_EQ(h.copy_dropped(a, 11), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.copy_dropped(a, 10));
  EXPECT_EQ(h.tier().used(), Bytes{60});
  EXPECT_EQ(h.yard().copy_exclusive(b), Bytes{60}) << "it holds the share alone now";
}

TEST(TierShares, ASplitGoesThroughCopies) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.request(big);
  const ShareId while_made = h.split_share(base, 15);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.tier().resident, Bytes{50});
  const ShareId while_kept = h.split_share(base, 5);
  EXPECT_EQ(h.entry(a).copy.shares, (std::vector<ShareId>{base, while_made, while_kept}));
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{50});
  const ModelId part = h.add_sharing("part", 0, {while_kept});
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.yard().share(base), nullptr)
      << "forgotten with the copy that was the last to have it";
  EXPECT_NE(h.yard().share(while_kept), nullptr);
  EXPECT_FALSE(h.remove(part));
}

TEST(TierShares, ACopyKeepsAShareThatNoModelIsMadeOfAnyMore) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.warm(big);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 50}})}));
  ASSERT_NE(h.yard().share(base), nullptr);
  EXPECT_EQ(h.forget_share(base), ErrorCode::kWrongState);
  EXPECT_FALSE(h.copy_lost(a));
  ASSERT_NE(h.yard().share(base), nullptr) << "until its memory is back";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.yard().share(base), nullptr);
}

TEST(TierShares, AShareThatIsBeingDroppedIsAsGoodAsGone) {
  // Room for the copy of b would be there only if the share could stay, which is on its way out.
  Harness h(tiered({130}, 100));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 80, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b"})) << "120 bytes do not fit; it is not held back in vain";
}

TEST(TierShares, AShareThatIsBeingDroppedIsTakenOverWhereThereIsRoomAnyway) {
  Harness h(tiered({130}, 140));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 50, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().reserved, Bytes{90});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{0});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{90});
}

TEST(TierShares, AVictimFreesOnlyWhatTheNewCopyDoesNotHold) {
  Harness h(tiered({70}, 100));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 30, {base});
  const ModelId old = h.add("old", 30);
  const ModelId b = h.add_sharing("b", 30, {base});
  h.warm(a);
  h.warm(old);
  h.warm(b);
  ASSERT_EQ(h.tier().resident, Bytes{100}) << "70 of a, 30 of old";
  const ModelId big = h.add("big", 70);
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"drop_copy a"})) << "its 30 are enough: the share stays for b";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().used(), Bytes{100});
}

TEST(TierShares, WhatIsInUseStaysOnTheBooksWhenTheNextCopyOfItIsNotMade) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId b = h.add_sharing("b", 20, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  h.request(big);
  ASSERT_EQ(h.copy_state(b), CopyState::kMaking);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.copy_in_use(a));
  EXPECT_EQ(h.tier().draining, Bytes{10});
  EXPECT_EQ(h.tier().reserved, Bytes{60}) << "the share is what its liveliest copy is";
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  EXPECT_EQ(h.copy_state(b), CopyState::kNone) << "it could not be made";
  EXPECT_EQ(h.tier().used(), Bytes{50}) << "somebody may be reading all of a still";
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{50});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{0});
}

TEST(TierShares, WhatIsInUseIsThereForTheNextCopy) {
  // As in AShareThatIsBeingDroppedIsAsGoodAsGone, but the share stays for now.
  Harness h(tiered({130}, 120));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 80, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.copy_in_use(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().used(), Bytes{120});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{0});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{120});
}

// --- Errors -------------------------------------------------------------------------------------

TEST(TierErrors, ChangeNothing) {
  FullTier t;
  const auto kept = [&](ModelId model, Bytes bytes) {
    Event event = t.h.make(EventKind::kUnloadDone, model);
    event.charge = t.h.yard().exclusive(model);
    event.kept = Kept{.bytes = bytes, .took = seconds{1}};
    return t.h.step(event).error;
  };
  EXPECT_EQ(t.h.copy_dropped(t.a, 60), ErrorCode::kWrongState) << "KEPT";
  EXPECT_EQ(t.h.copy_dropped(t.c, 0), ErrorCode::kWrongState) << "NONE";
  EXPECT_FALSE(t.h.set_closed(0, true));
  EXPECT_FALSE(t.h.copy_dropped(t.a)) << "it made room for c";
  ASSERT_EQ(t.h.copy_state(t.c), CopyState::kMaking);
  EXPECT_EQ(kept(t.c, Bytes{-1}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(kept(t.c, Bytes{kMaxBytes + 1}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(t.h.copy_dropped(t.c, 0), ErrorCode::kWrongState) << "MAKING";
  Event more = t.h.make(EventKind::kUnloadDone, t.c);
  more.charge = charge({{0, 61}});
  more.kept = Kept{.bytes = Bytes{60}, .took = seconds{1}};
  EXPECT_EQ(t.h.step(more).error, ErrorCode::kInvalidArgument);
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kMaking);
  EXPECT_EQ(t.h.tier().reserved, Bytes{60});
  EXPECT_FALSE(kept(t.c, Bytes{60}));
  EXPECT_FALSE(t.h.set_closed(0, false));
  t.h.warm(t.d);
  EXPECT_FALSE(t.h.unload(t.d));
  EXPECT_EQ(kept(t.d, Bytes{60}), ErrorCode::kWrongState) << "nobody asked for a copy";
  EXPECT_EQ(t.h.state(t.d), State::kUnloading);
  EXPECT_FALSE(t.h.unload(t.b));
  EXPECT_EQ(t.h.copy_dropped(t.b, -1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(t.h.copy_dropped(t.b, 61), ErrorCode::kInvalidArgument);
  EXPECT_EQ(t.h.copy_state(t.b), CopyState::kDropping);
}

TEST(TierErrors, ACopyAndItsSharesHaveABound) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.kept(a, kMaxBytes - 39), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.kept(a, kMaxBytes - 40)) << "no copy was made: it would have been so large";
  EXPECT_EQ(h.copy_state(a), CopyState::kNone);
}

// --- The rest -----------------------------------------------------------------------------------

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

TEST(TierClone, GoesItsOwnWay) {
  FullTier t;
  t.h.request(t.d);
  ASSERT_EQ(t.h.copy_state(t.c), CopyState::kAwaited);
  Yard other = t.h.raw().clone();
  Actions out;
  ASSERT_TRUE(other.copy_dropped(t.a, t.h.now(), Bytes{60}, out).ok());
  ASSERT_EQ(out.size(), 1U);
  EXPECT_TRUE(std::get<Unload>(out[0]).keep);
  EXPECT_TRUE(other.audit().ok());
  EXPECT_EQ(t.h.copy_state(t.c), CopyState::kAwaited);
  EXPECT_EQ(t.h.tier().draining, Bytes{60});
  EXPECT_FALSE(t.h.copy_dropped(t.a));
  EXPECT_EQ(other.entry(t.c)->copy.state, CopyState::kMaking);
}

TEST(TierHeir, TakesOverWhatLoadsTook) {
  Harness h(tiered({60}, 120));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), seconds{7}));
  ModelSpec spec;
  spec.label = "heir";
  spec.placements = {charge({{0, 60}})};
  spec.replaces = a;
  const ModelId heir = h.add(spec);
  EXPECT_DOUBLE_EQ(h.entry(heir).reload_seconds, 7);
  EXPECT_EQ(h.copy_state(heir), CopyState::kNone);
}

// What a yard asked for, wakes and ids included.
std::vector<std::string> words(const Outcome& outcome) {
  std::vector<std::string> said;
  for (const Action& action : outcome.actions) said.push_back(describe(action));
  return said;
}

TEST(NoTier, ATierBelowNoDeviceChangesNothing) {
  for (std::uint32_t seed = 1; seed <= 20; ++seed) {
    SeededSource source(seed);
    YardOptions plain = draw_options(source);
    plain.tier_budget = Bytes{0};
    plain.above_tier.clear();
    YardOptions aside = plain;
    aside.tier_budget = Bytes{100};
    aside.above_tier.assign(plain.budgets.size(), false);
    Session one(make_yard(plain), plain);
    Yard two = make_yard(aside);
    EventMaker maker(source, 8);
    for (int step = 0; step < 400; ++step) {
      const Event event = maker.next(one.referee());
      if (event.kind == EventKind::kSetTierBudget) continue;
      const Outcome first = one.step(event);
      const Outcome second = apply(two, event);
      ASSERT_EQ(first.error, second.error) << "seed " << seed << ": " << describe(event);
      ASSERT_EQ(words(first), words(second)) << "seed " << seed << ": " << describe(event);
    }
    EXPECT_FALSE(one.violation()) << *one.violation();
    EXPECT_EQ(two.account(two.tier()).peak, Bytes{0});
  }
}

}  // namespace
}  // namespace modelyard::test

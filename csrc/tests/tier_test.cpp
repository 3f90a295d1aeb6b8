// The host tier: of whom a copy is made and whether it pays, the tier's budget, and calls that do
// not fit.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "random_events.hpp"
#include "session.hpp"
#include "tiered.hpp"

namespace modelyard::test {
namespace {

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
  EXPECT_DOUBLE_EQ(h.entry(b).reload_seconds, 4) << "though its absence may cost some more";
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

// --- Yards with a tier and without --------------------------------------------------------------

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

// Bytes that several models hold together: what is charged for them, how a model's shares change,
// and calls that do not fit.

#include "modelyard/shares.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

using Ids = std::vector<ShareId>;

std::uint32_t held_by(const Harness& h, ShareId id, Holding holding, std::uint32_t on = 0) {
  return h.yard().share(id)->on(device(on)).of(holding);
}

// --- What is charged ----------------------------------------------------------------------------

TEST(Shares, TheSecondModelTakesOnlyItsOwn) {
  Harness h(lru({100}, 4));
  const ShareId encoder = h.add_share(60);
  const ModelId a = h.add_sharing("a", 10, {encoder});
  const ModelId b = h.add_sharing("b", 15, {encoder});
  const TicketId first = h.request(a);
  EXPECT_EQ(h.account().reserved, Bytes{70});
  EXPECT_EQ(h.held(a), charge({{0, 10}})) << "what it holds alone";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.account().resident, Bytes{70});
  const TicketId second = h.request(b);
  EXPECT_EQ(h.account().reserved, Bytes{15});
  EXPECT_EQ(h.account().resident, Bytes{70});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_EQ(h.used(), 85);
  EXPECT_EQ(h.yard().exclusive(a), charge({{0, 10}}));
  EXPECT_EQ(h.yard().held_with_shares(b), charge({{0, 75}}));
  EXPECT_FALSE(h.release(first));
  EXPECT_FALSE(h.release(second));
}

TEST(Shares, AreChargedAsTheirLiveliestHolder) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  const TicketId first = h.request(a);
  const TicketId second = h.request(b);
  EXPECT_EQ(h.account().reserved, Bytes{53}) << "both load, and it is promised once";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.account().resident, Bytes{51}) << "one of them is there";
  EXPECT_EQ(h.account().reserved, Bytes{2});
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_EQ(h.account().draining, Bytes{1}) << "one who leaves, and one who loads";
  EXPECT_EQ(h.account().reserved, Bytes{52});
  EXPECT_FALSE(h.load_failed(b, LoadFailure::kTransient));
  EXPECT_TRUE(h.refused(second));
  EXPECT_EQ(h.account().draining, Bytes{51});
  EXPECT_FALSE(h.release(first));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(held_by(h, shared, Holding::kUnloading), 1U);
  EXPECT_FALSE(h.unload_done(a, charge({{0, 51}})));
  EXPECT_EQ(h.used(), 0);
}

TEST(Shares, TheLastHolderBringsThemBack) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.unload_done(a, charge({{0, 51}})), ErrorCode::kInvalidArgument) << "b holds it";
  EXPECT_FALSE(h.unload_done(a, charge({{0, 1}})));
  EXPECT_EQ(h.used(), 52);
  EXPECT_FALSE(h.unload(b));
  EXPECT_EQ(h.yard().exclusive(b), charge({{0, 52}}));
  EXPECT_EQ(h.unload_done(b, charge({{0, 53}})), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.unload_done(b, charge({{0, 52}})));
  EXPECT_EQ(h.used(), 0);
}

TEST(Shares, OfTwoThatAreUnloadedTheLaterOneBringsThemBack) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload(b));
  EXPECT_EQ(h.account().draining, Bytes{53});
  EXPECT_EQ(h.yard().exclusive(a), charge({{0, 1}}));
  EXPECT_EQ(h.yard().exclusive(b), charge({{0, 2}}));
  EXPECT_FALSE(h.unload_done(b, charge({{0, 2}})));
  EXPECT_EQ(h.yard().exclusive(a), charge({{0, 51}}));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 51}})));
  EXPECT_EQ(h.used(), 0);
}

TEST(Shares, WhatDoesNotComeBackIsQuarantinedWithTheLastHolder) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 10}})));
  EXPECT_EQ(h.account().quarantined, Bytes{50});
  EXPECT_EQ(h.entry(a).quarantined, charge({{0, 50}}));
  EXPECT_EQ(h.yard().share(shared)->on(device(0)).total(), 0U);
  const TicketId ticket = h.request(a);
  EXPECT_TRUE(h.refused(ticket)) << "it would have to be loaded beside its own remains";
  EXPECT_EQ(h.refusal(ticket).needed, Bytes{60});
  EXPECT_FALSE(h.reclaimed(a, charge({{0, 50}})));
  h.warm(a);
  EXPECT_EQ(h.used(), 60);
}

TEST(Shares, FiftyFineTunesAreOneEncoderAndFiftyHeads) {
  Harness h(lru({1000}, 4));
  const ShareId encoder = h.add_share(400);
  std::vector<ModelId> tunes;
  for (int i = 0; i < 50; ++i) {
    tunes.push_back(h.add_sharing("tune " + std::to_string(i), 7, {encoder}));
    h.warm(tunes.back());
  }
  EXPECT_EQ(h.used(), 400 + 50 * 7);
  EXPECT_EQ(held_by(h, encoder, Holding::kResident), 50U);
  // Room for something else comes from heads until the encoder is all that is left.
  const ModelId other = h.add("other", 300);
  h.warm(other);
  EXPECT_EQ(held_by(h, encoder, Holding::kResident), 50U - 8U);  // 250 free, 8 heads of 7 for 50.
  const ModelId large = h.add("large", 1000);
  h.warm(large);
  EXPECT_EQ(h.used(), 1000);
  EXPECT_EQ(held_by(h, encoder, Holding::kResident), 0U);
}

TEST(Shares, ACopyOfAModelCostsNothing) {
  Harness h(lru({60}, 4));
  const ShareId all = h.add_share(60);
  const ModelId a = h.add_sharing("a", 0, {all});
  const ModelId copy = h.add_sharing("copy", 0, {all});
  h.warm(a);
  EXPECT_EQ(h.used(), 60);
  const TicketId ticket = h.request(copy);
  EXPECT_EQ(h.said(), Lines{"load copy"});
  EXPECT_EQ(h.account().reserved, Bytes{0});
  EXPECT_FALSE(h.load_done(copy));
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, Charge{}));
  EXPECT_EQ(h.used(), 60);
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, ACopyTakesTheLoadChannelOfItsDevice) {
  Harness h(lru({100}, 1));
  const ShareId all = h.add_share(60);
  const ModelId a = h.add_sharing("a", 0, {all});
  const ModelId copy = h.add_sharing("copy", 0, {all});
  const TicketId first = h.request(a);
  const TicketId second = h.request(copy);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.state(copy), State::kQueued);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.said(), (Lines{"grant a", "load copy"}));
  EXPECT_FALSE(h.load_done(copy));
  EXPECT_EQ(h.yard().device_counters(device(0)).load_count, 2U);
  EXPECT_FALSE(h.release(first));
  EXPECT_FALSE(h.release(second));
}

TEST(Shares, APlacementWithCopiesOfItsOwnSharesNothing) {
  Harness h(lru({100, 100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId own =
      h.add_sharing("own", std::vector<Charge>{charge({{1, 60}})}, {shared}, {kNoDevice});
  const ModelId unsaid =
      h.add_sharing("unsaid", std::vector<Charge>{charge({{1, 40}})}, {shared}, {});
  h.warm(a);
  h.warm(own);
  h.warm(unsaid);
  EXPECT_EQ(h.used(0), 60);
  EXPECT_EQ(h.used(1), 100);
  EXPECT_EQ(h.yard().share(shared)->on(device(1)).total(), 0U);
  EXPECT_EQ(h.yard().share(shared)->model_count, 4U) << "three are made of it, one holds it";
}

TEST(Shares, AreChargedOnEachDeviceWhereTheyAreHeld) {
  Harness h(lru({100, 100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b =
      h.add_sharing("b", std::vector<Charge>{charge({{0, 5}})}, {shared}, {device(1)});
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.used(0), 65);
  EXPECT_EQ(h.used(1), 50);
}

TEST(Shares, TheDeviceWhereTheyAreIsPreferred) {
  Harness h(lru({70, 70}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b = h.add_sharing("b", std::vector<Charge>{charge({{1, 10}}), charge({{0, 10}})},
                                  {shared}, {device(1), device(0)});
  const ModelId filler = h.add("filler", charge({{1, 60}}));
  h.warm(a);
  h.warm(filler);
  h.warm(b);
  EXPECT_EQ(h.entry(b).placement, 1U) << "there it fits, the other would need victims";
  EXPECT_EQ(h.used(0), 70);
}

// --- Loads that end otherwise -------------------------------------------------------------------

TEST(Shares, AFailedLoadGivesBackWhatNobodyElseHolds) {
  Harness h(lru({100}, 4));
  const ShareId mine = h.add_share(20);
  const ShareId ours = h.add_share(30);
  const ModelId a = h.add_sharing("a", 1, {ours});
  const ModelId b = h.add_sharing("b", 2, {mine, ours});
  h.warm(a);
  for (const LoadFailure failure :
       {LoadFailure::kCancelled, LoadFailure::kTransient, LoadFailure::kPermanent}) {
    h.request(b);
    EXPECT_EQ(h.account().reserved, Bytes{22});
    EXPECT_FALSE(h.load_failed(b, failure));
    if (failure == LoadFailure::kCancelled) {
      EXPECT_EQ(h.state(b), State::kLoading) << "somebody waits: it begins again";
      EXPECT_FALSE(h.load_failed(b, LoadFailure::kTransient));
    }
    EXPECT_EQ(h.used(), 31);
    EXPECT_EQ(h.yard().share(mine)->on(device(0)).total(), 0U);
    h.skip(seconds{100});
  }
}

TEST(Shares, ASecondLoadKeepsWhatTheFirstHadReserved) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  h.request(a);
  const TicketId ticket = h.request(b);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_EQ(h.account().reserved, Bytes{52});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_EQ(h.account().resident, Bytes{52});
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, AModelRemovedWhileItLoadsLeavesThemToTheOthers) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 1, {shared});
  const ModelId b = h.add_sharing("b", 2, {shared});
  h.request(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.count("cancel_load a"), 1U);
  const TicketId ticket = h.request(b);
  EXPECT_FALSE(h.load_done(a)) << "too late to stop";
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(h.yard().exclusive(a), charge({{0, 1}}));
  EXPECT_FALSE(h.load_done(b));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.exists(a));
  EXPECT_EQ(h.yard().share(shared)->model_count, 2U);
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, ALargerLoadIsRememberedBesideThem) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 25}})));
  EXPECT_EQ(h.used(), 75);
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 25}}));
  EXPECT_FALSE(h.remeasured(a, charge({{0, 5}})));
  EXPECT_EQ(h.used(), 55);
  EXPECT_FALSE(h.release(ticket));
}

// --- A model's shares change --------------------------------------------------------------------

TEST(Shares, NewPlacementsLeaveWhatIsHeldAsItIs) {
  Harness h(lru({200}, 4));
  const ShareId before = h.add_share(50);
  const ShareId after = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {before});
  h.warm(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 20}})}, {after}, {device(0)}));
  EXPECT_EQ(h.used(), 60);
  EXPECT_EQ(h.entry(a).held_shares, Ids{before});
  EXPECT_EQ(h.yard().share(before)->model_count, 1U) << "nobody is made of it, one holds it";
  EXPECT_EQ(h.forget_share(before), ErrorCode::kWrongState);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 60}})));
  EXPECT_EQ(h.yard().share(before), nullptr) << "forgotten with its last holder";
  h.warm(a);
  EXPECT_EQ(h.used(), 60);
  EXPECT_EQ(h.entry(a).held_shares, Ids{after});
}

TEST(Shares, NewPlacementsMayTakeAwayTheLastUseOfAShare) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 20}})}, {shared}, {device(0)}));
  EXPECT_NE(h.yard().share(shared), nullptr) << "it is made of it as before";
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 60}})}));
  EXPECT_EQ(h.yard().share(shared), nullptr);
  EXPECT_EQ(h.yard().share_count(), 0U);
}

TEST(Shares, NewPlacementsWhileItLoadsDoNotTouchTheLoad) {
  Harness h(lru({200}, 4));
  const ShareId before = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {before});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 30}})}));
  EXPECT_EQ(h.account().reserved, Bytes{60});
  EXPECT_FALSE(h.load_done(a, charge({{0, 15}})));
  EXPECT_EQ(h.used(), 65);
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 30}})) << "another promise";
  EXPECT_FALSE(h.release(ticket));
}

TEST(Shares, AShareIsForgottenWithItsLastModel) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b = h.add_sharing("b", 10, {shared});
  const LeaseId used = h.use(a);
  EXPECT_FALSE(h.remove(b));
  EXPECT_NE(h.yard().share(shared), nullptr);
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_NE(h.yard().share(shared), nullptr) << "it is still held";
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 60}})));
  EXPECT_EQ(h.yard().share(shared), nullptr);
  EXPECT_EQ(h.forget_share(shared), ErrorCode::kStaleId);
}

TEST(Shares, AnHeirSharesWithTheModelItReplaces) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId old = h.add_sharing("old", 10, {shared});
  const TicketId ticket = h.request(old);
  EXPECT_FALSE(h.load_done(old, charge({{0, 10}}), seconds{7}));
  ModelSpec spec;
  spec.label = "heir";
  spec.placements = {charge({{0, 12}})};
  spec.shares = {shared};
  spec.shares_on = {device(0)};
  spec.replaces = old;
  const ModelId heir = h.add(spec);
  EXPECT_DOUBLE_EQ(h.entry(heir).reload_seconds, 7);
  const LeaseId used = h.use(heir);
  EXPECT_EQ(h.used(), 72);
  EXPECT_FALSE(h.remove(old));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload_done(old, charge({{0, 10}})));
  EXPECT_EQ(h.used(), 62);
  EXPECT_FALSE(h.release(used));
  spec.replaces = old;
  Event event = h.make(EventKind::kAddModel);
  event.spec = spec;
  EXPECT_EQ(h.step(event).error, ErrorCode::kStaleId);
  EXPECT_EQ(h.yard().share(shared)->model_count, 2U) << "the one that failed is not counted";
}

TEST(Shares, AreSplitWhileHeldInEveryState) {
  Harness h(lru({300}, 4));
  const ShareId whole = h.add_share(60);
  const ModelId cold = h.add_sharing("cold", 1, {whole});
  const ModelId loading = h.add_sharing("loading", 1, {whole});
  const ModelId resident = h.add_sharing("resident", 1, {whole});
  const ModelId draining = h.add_sharing("draining", 1, {whole});
  const ModelId unloading = h.add_sharing("unloading", 1, {whole});
  h.warm(resident);
  h.warm(unloading);
  const LeaseId used = h.use(draining);
  EXPECT_FALSE(h.unload(draining));
  EXPECT_FALSE(h.unload(unloading));
  EXPECT_FALSE(h.pin(resident));
  const TicketId ticket = h.request(loading);
  EXPECT_EQ(h.used(), 64);
  const ShareId part = h.split_share(whole, 25);
  EXPECT_EQ(h.used(), 64);
  EXPECT_EQ(h.yard().share(whole)->bytes, Bytes{35});
  EXPECT_EQ(h.yard().share(part)->bytes, Bytes{25});
  EXPECT_EQ(h.yard().share(part)->on(device(0)).pinned, 1U);
  for (const Holding holding :
       {Holding::kLoading, Holding::kResident, Holding::kDraining, Holding::kUnloading}) {
    EXPECT_EQ(held_by(h, part, holding), 1U);
  }
  EXPECT_EQ(h.entry(cold).shares, (Ids{whole, part}));
  // A new model that has only the part in common.
  const ModelId partly = h.add_sharing("partly", 3, {part});
  const TicketId second = h.request(partly);
  EXPECT_EQ(h.used(), 67);
  h.finish_io();
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.release(ticket));
  h.finish_io();
  EXPECT_FALSE(h.unpin(resident));
  EXPECT_FALSE(h.unload(resident));
  EXPECT_FALSE(h.unload(loading));
  h.finish_io();
  EXPECT_EQ(h.used(), 28) << "the part, and what is its own";
  EXPECT_FALSE(h.release(second));
}

TEST(Shares, ACloneGoesItsOwnWay) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  h.warm(a);
  Yard other = h.yard().clone();
  Actions out;
  ASSERT_TRUE(other.unload(a, Tick{}, out).ok());
  ASSERT_TRUE(other.unload_done(a, Tick{}, other.exclusive(a), out).ok());
  ASSERT_TRUE(other.split_share(shared, Bytes{10}).ok());
  EXPECT_EQ(other.account(device(0)).used(), Bytes{0});
  EXPECT_EQ(h.used(), 60);
  EXPECT_EQ(h.yard().share(shared)->bytes, Bytes{50});
}

// --- Errors -------------------------------------------------------------------------------------

TEST(Shares, CallsThatBreakARuleChangeNothing) {
  Harness h(lru({100, 100}, 4));
  const ShareId shared = h.add_share(50);
  const auto stale = static_cast<ShareId>(99);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const Charge own = charge({{0, 10}});
  const auto add = [&](Ids shares, std::vector<DeviceIndex> on) {
    Event event = h.make(EventKind::kAddModel);
    event.spec.placements = {own};
    event.spec.shares = shares;
    event.spec.shares_on = on;
    const auto added = h.step(event).error;
    EXPECT_EQ(h.update_placements(a, {own}, shares, on), added);
    return added;
  };
  EXPECT_EQ(add({stale}, {device(0)}), ErrorCode::kStaleId);
  EXPECT_EQ(add({ShareId{}}, {device(0)}), ErrorCode::kStaleId);
  EXPECT_EQ(add({shared, shared}, {device(0)}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(add({shared}, {device(0), device(1)}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(add({shared}, {device(2)}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.yard().model_count(), 1U);
  EXPECT_EQ(h.yard().share(shared)->model_count, 1U);
  for (const std::int64_t bytes : {std::int64_t{0}, std::int64_t{-1}, kMaxBytes + 1}) {
    Event event = h.make(EventKind::kAddShare);
    event.budget = Bytes{bytes};
    EXPECT_EQ(h.step(event).error, ErrorCode::kInvalidArgument) << bytes;
  }
  EXPECT_EQ(h.try_split_share(stale, 1).error, ErrorCode::kStaleId);
  for (const std::int64_t part : {-1, 0, 50, 51}) {
    EXPECT_EQ(h.try_split_share(shared, part).error, ErrorCode::kInvalidArgument) << part;
  }
  EXPECT_EQ(h.forget_share(stale), ErrorCode::kStaleId);
  EXPECT_EQ(h.forget_share(shared), ErrorCode::kWrongState);
  const ShareId unused = h.add_share(1);
  EXPECT_FALSE(h.forget_share(unused));
  EXPECT_EQ(h.forget_share(unused), ErrorCode::kStaleId);
  EXPECT_EQ(h.yard().share_count(), 1U);
  EXPECT_EQ(h.yard().exclusive(static_cast<ModelId>(99)), Charge{});
  EXPECT_EQ(h.yard().held_with_shares(static_cast<ModelId>(99)), Charge{});
}

// A sum above the largest amount is cut: what is cut off would be loaded beside the budget, and
// never be given back. So there are none.
TEST(Shares, AModelAndItsSharesAreBoundedTogether) {
  Yard yard = make_yard(options({kMaxBytes, kMaxBytes}));
  const ShareId shared = yard.add_share(Bytes{10}).value();
  const ShareId large = yard.add_share(Bytes{kMaxBytes}).value();
  const auto add = [&](const Charge& own, Ids shares, DeviceIndex on) -> std::optional<ErrorCode> {
    ModelSpec spec;
    spec.placements = {own};
    spec.shares = std::move(shares);
    spec.shares_on = {on};
    const Result<ModelId> added = yard.add_model(std::move(spec));
    if (added.ok()) return std::nullopt;
    return added.error().code;
  };
  EXPECT_EQ(add(charge({{0, kMaxBytes - 9}}), {shared}, device(0)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(add(Charge{}, {shared, large}, device(0)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(add(charge({{0, kMaxBytes - 10}}), {shared}, device(0)), std::nullopt);
  EXPECT_EQ(add(charge({{0, kMaxBytes}}), {shared, large}, kNoDevice), std::nullopt);
  EXPECT_EQ(add(charge({{0, kMaxBytes}}), {large}, device(1)), std::nullopt);
}

TEST(Shares, WhatIsMeasuredIsBoundedWithThem) {
  Yard yard = make_yard(options({kMaxBytes}));
  ModelSpec spec;
  spec.placements = {charge({{0, 5}})};
  spec.shares = {yard.add_share(Bytes{10}).value()};
  spec.shares_on = {device(0)};
  const ModelId a = yard.add_model(spec).value();
  Actions out;
  ASSERT_TRUE(yard.request(a, Tick{}, kNever, out).ok());
  const Status too_large = yard.load_done(a, Tick{}, charge({{0, kMaxBytes - 9}}), seconds{1}, out);
  ASSERT_FALSE(too_large.ok());
  EXPECT_EQ(too_large.error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(yard.load_done(a, Tick{}, charge({{0, kMaxBytes - 10}}), seconds{1}, out).ok());
  EXPECT_FALSE(yard.remeasured(a, Tick{}, charge({{0, kMaxBytes}}), out).ok());
  EXPECT_EQ(yard.held_with_shares(a), charge({{0, kMaxBytes}}));
}

}  // namespace
}  // namespace modelyard::test

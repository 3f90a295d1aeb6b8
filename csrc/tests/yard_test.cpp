// A yard as a whole: what it is made with, calls that do not fit, copies of it, and the largest
// sizes.

#include "modelyard/yard.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"

namespace modelyard::test {
namespace {

// --- Making a yard ------------------------------------------------------------------------------

TEST(YardCreation, StartsColdAndEmpty) {
  const YardOptions wanted = options({100, 50});
  const Yard yard = make_yard(wanted);
  EXPECT_EQ(yard.device_count(), 2U);
  EXPECT_EQ(yard.model_count(), 0U);
  EXPECT_EQ(yard.waiting_count(), 0U);
  EXPECT_EQ(yard.lease_count(), 0U);
  EXPECT_EQ(yard.policy_name(), "gap");
  EXPECT_EQ(YardOptions{}.policy, "ensemble");
  EXPECT_EQ(yard.account(device(1)).budget, Bytes{50});
  EXPECT_FALSE(yard.device_closed(device(0)));
  EXPECT_TRUE(yard.explanations().entries().empty());
  EXPECT_TRUE(yard.audit().ok());
}

TEST(YardCreation, OptionsOutOfRangeAreRefused) {
  const auto code = [](const YardOptions& wanted) -> std::optional<ErrorCode> {
    const Result<Yard> made = Yard::create(wanted);
    if (made.ok()) return std::nullopt;
    EXPECT_FALSE(made.error().message.empty());
    return made.error().code;
  };
  EXPECT_EQ(code(options({100})), std::nullopt);
  EXPECT_EQ(code(options({0})), std::nullopt);
  EXPECT_EQ(code(options({})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(options({-1})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(options({1, kMaxBytes + 1})), ErrorCode::kInvalidArgument);
  YardOptions many;
  many.budgets.assign(kMaxDevices, Bytes{1});
  EXPECT_EQ(code(many), std::nullopt);
  many.budgets.assign(kMaxDevices + 1, Bytes{1});
  EXPECT_EQ(code(many), ErrorCode::kInvalidArgument);
  YardOptions unknown = options({100});
  unknown.policy = "clairvoyant";
  EXPECT_EQ(code(unknown), ErrorCode::kInvalidArgument);
  YardOptions channels = options({100});
  channels.load_channels_per_device = 0;
  EXPECT_EQ(code(channels), ErrorCode::kInvalidArgument);
  YardOptions negative = options({100});
  negative.overdue_after = seconds{-1};
  EXPECT_EQ(code(negative), ErrorCode::kInvalidArgument);
  negative = options({100});
  negative.backoff_initial = seconds{-1};
  EXPECT_EQ(code(negative), ErrorCode::kInvalidArgument);
  negative = options({100});
  negative.backoff_max = seconds{-1};
  EXPECT_EQ(code(negative), ErrorCode::kInvalidArgument);
}

TEST(YardCreation, ModelsThatBreakARuleAreRefused) {
  Yard yard = make_yard(options({100, 100}));
  const auto code = [&](ModelSpec spec) -> std::optional<ErrorCode> {
    const Result<ModelId> made = yard.add_model(std::move(spec));
    if (made.ok()) return std::nullopt;
    return made.error().code;
  };
  const Charge fine = charge({{0, 10}});
  const auto bad = ErrorCode::kInvalidArgument;
  EXPECT_EQ(code({.label = "", .placements = {fine}}), std::nullopt);
  EXPECT_EQ(code({.label = "", .placements = std::vector<Charge>(16, fine)}), std::nullopt);
  EXPECT_EQ(code({.label = "", .placements = {}}), bad);
  EXPECT_EQ(code({.label = "", .placements = std::vector<Charge>(17, fine)}), bad);
  EXPECT_EQ(code({.label = "", .placements = {fine, charge({{2, 1}})}}), bad);
  for (const double reload : {0.0, -1.0, std::numeric_limits<double>::infinity(),
                              std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_EQ(code({.label = "", .placements = {fine}, .reload_seconds = reload}), bad) << reload;
  }
  EXPECT_EQ(yard.model_count(), 2U);
}

TEST(YardCreation, TheNumberOfModelsIsBounded) {
  Yard yard = make_yard(options({100}));
  const ModelSpec spec{.label = "", .placements = {charge({{0, 1}})}};
  std::optional<ErrorCode> error;
  std::size_t added = 0;
  while (added <= kMaxModels && !error) {
    const Result<ModelId> made = yard.add_model(spec);
    if (made.ok()) {
      ++added;
    } else {
      error = made.error().code;
    }
  }
  EXPECT_EQ(added, kMaxModels);
  EXPECT_EQ(error, ErrorCode::kCapacity);
}

TEST(Yard, AppendsToTheActionsItIsGiven) {
  Yard yard = make_yard(options({100}));
  const ModelId a = yard.add_model({.label = "a", .placements = {charge({{0, 10}})}}).value();
  Actions out{Drain{a}};
  ASSERT_TRUE(yard.request(a, Tick{}, kNever, out).ok());
  ASSERT_GE(out.size(), 2U);
  EXPECT_TRUE(std::holds_alternative<Drain>(out[0]));
  EXPECT_TRUE(std::holds_alternative<Load>(out[1]));
}

TEST(Yard, GoesOnAfterBeingMoved) {
  Yard first = make_yard(options({100}));
  const ModelId a = first.add_model({.label = "a", .placements = {charge({{0, 10}})}}).value();
  Actions out;
  ASSERT_TRUE(first.request(a, Tick{}, kNever, out).ok());
  Yard second = std::move(first);
  ASSERT_TRUE(second.load_done(a, Tick{}, charge({{0, 10}}), seconds{1}, out).ok());
  EXPECT_EQ(second.lease_count(), 1U);
  EXPECT_TRUE(second.audit().ok());
}

// --- Ids and states that do not fit -------------------------------------------------------------

TEST(Yard, StaleIdsAreErrorsEverywhere) {
  Harness h(options({100}));
  const ModelId gone = h.add("gone", 10);
  EXPECT_FALSE(h.remove(gone));
  const ModelId now_there = h.add("now there", 10);
  ASSERT_EQ(EntryTable::index_of(gone), EntryTable::index_of(now_there));
  for (const ModelId id : {gone, ModelId{}, static_cast<ModelId>(~std::uint64_t{0})}) {
    EXPECT_EQ(h.update_placements(id, {charge({{0, 1}})}), ErrorCode::kStaleId);
    EXPECT_EQ(h.remove(id), ErrorCode::kStaleId);
    EXPECT_EQ(h.pin(id), ErrorCode::kStaleId);
    EXPECT_EQ(h.unpin(id), ErrorCode::kStaleId);
    EXPECT_EQ(h.unload(id), ErrorCode::kStaleId);
    EXPECT_EQ(h.try_acquire(id).error, ErrorCode::kStaleId);
    EXPECT_EQ(h.try_request(id).error, ErrorCode::kStaleId);
    EXPECT_EQ(h.load_done(id, Charge{}), ErrorCode::kStaleId);
    EXPECT_EQ(h.load_failed(id, LoadFailure::kTransient), ErrorCode::kStaleId);
    EXPECT_EQ(h.unload_done(id, Charge{}), ErrorCode::kStaleId);
    EXPECT_EQ(h.reclaimed(id, Charge{}), ErrorCode::kStaleId);
    EXPECT_EQ(h.remeasured(id, Charge{}), ErrorCode::kStaleId);
    EXPECT_EQ(h.yard().entry(id), nullptr);
  }
  EXPECT_EQ(h.cancel(TicketId{}), ErrorCode::kStaleId);
  EXPECT_EQ(h.release(LeaseId{}), ErrorCode::kStaleId);
}

TEST(Yard, ATicketOrLeaseEndsOnce) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 10);
  const TicketId granted = h.request(a);
  const TicketId cancelled = h.request(a);
  EXPECT_FALSE(h.cancel(cancelled));
  EXPECT_EQ(h.cancel(cancelled), ErrorCode::kStaleId);
  h.finish_io();
  EXPECT_EQ(h.cancel(granted), ErrorCode::kStaleId);
  EXPECT_FALSE(h.release(granted));
  EXPECT_EQ(h.release(granted), ErrorCode::kStaleId);
  EXPECT_EQ(h.entry(a).lease_count, 0U);
}

TEST(Yard, ARemovedModelsIdIsGoodForItsLastEventsOnly) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 10);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_EQ(h.pin(a), ErrorCode::kStaleId);
  EXPECT_EQ(h.unpin(a), ErrorCode::kStaleId);
  EXPECT_EQ(h.unload(a), ErrorCode::kStaleId);
  EXPECT_EQ(h.remove(a), ErrorCode::kStaleId);
  EXPECT_EQ(h.update_placements(a, {charge({{0, 1}})}), ErrorCode::kStaleId);
  EXPECT_EQ(h.try_request(a).error, ErrorCode::kStaleId);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, EventsThatDoNotFitTheStateChangeNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const auto wrong_for_all_but = [&](std::set<std::string> fitting) {
    const auto before = std::pair{h.state(a), h.used()};
    if (!fitting.contains("load")) {
      EXPECT_EQ(h.load_done(a, charge({{0, 60}})), ErrorCode::kWrongState);
      EXPECT_EQ(h.load_failed(a, LoadFailure::kTransient), ErrorCode::kWrongState);
    }
    if (!fitting.contains("unload")) {
      EXPECT_EQ(h.unload_done(a, charge({{0, 60}})), ErrorCode::kWrongState);
    }
    if (!fitting.contains("measure")) {
      EXPECT_EQ(h.remeasured(a, charge({{0, 60}})), ErrorCode::kWrongState);
    }
    EXPECT_EQ(before, (std::pair{h.state(a), h.used()}));
    EXPECT_TRUE(h.said().empty());
  };
  wrong_for_all_but({});  // COLD
  const LeaseId lease = h.use(h.add("busy", 60));
  const TicketId ticket = h.request(a);
  h.forget();
  wrong_for_all_but({});  // QUEUED
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(h.referee().models().rbegin()->first));
  ASSERT_EQ(h.state(a), State::kLoading);
  h.forget();
  wrong_for_all_but({"load"});
  EXPECT_FALSE(h.load_done(a));
  h.forget();
  wrong_for_all_but({"measure"});  // RESIDENT
  EXPECT_FALSE(h.unload(a));
  h.forget();
  wrong_for_all_but({"measure"});  // DRAINING
  EXPECT_FALSE(h.release(ticket));
  h.forget();
  wrong_for_all_but({"unload"});
  EXPECT_FALSE(h.unload_done(a));
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  h.forget();
  wrong_for_all_but({});  // FAILED
}

TEST(Yard, ChargesOfUnknownDevicesOrInvalidAmountsAreErrors) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_EQ(h.load_done(a, charge({{1, 5}})), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.state(a), State::kLoading);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.remeasured(a, charge({{0, 60}, {1, 5}})), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.unload_done(a, charge({{1, 5}})), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.unload_done(a));
}

TEST(Yard, AModelMayTurnOutToHoldNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, Charge{}));
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.used(), 0);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, Charge{}));
  EXPECT_EQ(h.state(a), State::kCold);
}

// --- Taking another's place, and looking ahead ---------------------------------------------------

TEST(Yard, AModelThatReplacesAnotherInheritsItsHistory) {
  YardOptions wanted = options({100});
  Result<Yard> made = Yard::create(wanted);
  Yard& yard = made.value();
  Actions out;
  ModelSpec spec;
  spec.placements = {charge({{0, 60}})};
  const ModelId before = yard.add_model(spec).value();
  EXPECT_TRUE(yard.request(before, Tick{}, kNever, out));
  EXPECT_TRUE(yard.load_done(before, Tick{}, charge({{0, 60}}), seconds{7}, out));
  spec.replaces = before;
  const ModelId after = yard.add_model(spec).value();
  EXPECT_DOUBLE_EQ(yard.entry(after)->reload_seconds, 7);
  EXPECT_EQ(yard.entry(after)->state, State::kCold);
  EXPECT_EQ(yard.entry(before)->state, State::kResident) << "the old one is the caller's to remove";
  EXPECT_TRUE(yard.remove_model(before, Tick{}, out));
  EXPECT_EQ(yard.add_model(spec).error().code, ErrorCode::kStaleId);
}

TEST(Yard, ACloneGoesItsOwnWay) {
  Result<Yard> made = Yard::create(options({100}));
  Yard& yard = made.value();
  Actions out;
  ModelSpec spec;
  spec.placements = {charge({{0, 60}})};
  const ModelId a = yard.add_model(spec).value();
  const ModelId b = yard.add_model(spec).value();
  EXPECT_TRUE(yard.request(a, Tick{}, kNever, out));
  EXPECT_TRUE(yard.load_done(a, Tick{}, charge({{0, 60}}), seconds{1}, out));
  const LeaseId lease = std::get<Grant>(out.back()).lease;
  EXPECT_EQ(yard.leases_of(a), std::vector<LeaseId>{lease});
  EXPECT_TRUE(yard.leases_of(b).empty());

  Yard other = yard.clone();
  Actions theirs;
  EXPECT_TRUE(other.release(lease, Tick{}, theirs));
  EXPECT_TRUE(other.request(b, Tick{}, kNever, theirs));
  EXPECT_EQ(other.entry(a)->state, State::kUnloading);
  EXPECT_TRUE(other.unload_done(a, Tick{}, charge({{0, 60}}), theirs));
  EXPECT_EQ(other.entry(b)->state, State::kLoading);
  EXPECT_TRUE(other.audit());

  EXPECT_EQ(yard.entry(a)->state, State::kResident);
  EXPECT_EQ(yard.entry(b)->state, State::kCold);
  EXPECT_EQ(yard.lease_count(), 1U);
  EXPECT_EQ(yard.explanations().entries().size(), 3U);
  EXPECT_TRUE(yard.audit());
}

// --- Sizes --------------------------------------------------------------------------------------

TEST(Yard, HugeBudgetsAndChargesDoNotOverflow) {
  Harness h(options({kMaxBytes, kMaxBytes}));
  const ModelId a = h.add("a", charge({{0, kMaxBytes}, {1, kMaxBytes}}));
  const ModelId b = h.add("b", charge({{0, kMaxBytes}, {1, 1}}));
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_FALSE(h.set_budget(0, 0));
  h.finish_io();
  EXPECT_EQ(h.used(0), 0);
}

TEST(Yard, AllSixteenDevicesCanBeUsedByOneModel) {
  YardOptions wanted;
  wanted.budgets.assign(kMaxDevices, Bytes{100});
  Harness h(wanted);
  Charge everywhere;
  for (std::uint32_t i = 0; i < kMaxDevices; ++i) everywhere.set(device(i), Bytes{60});
  const ModelId a = h.add("a", everywhere);
  const ModelId b = h.add("b", everywhere);
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.count("unload a"), 1U);
  for (std::uint32_t i = 0; i < kMaxDevices; ++i) EXPECT_EQ(h.used(i), 60);
}

TEST(Yard, TwoModelsThatDoNotFitTogetherTakeTurns) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const ModelId b = h.add("b", 80);
  std::size_t granted_a = 0;
  std::size_t granted_b = 0;
  for (int round = 0; round < 20; ++round) {
    const TicketId ta = h.request(a);
    const TicketId tb = h.request(b);
    for (int i = 0; i < 6 && (!h.granted(ta) || !h.granted(tb)); ++i) {
      h.finish_io();
      for (const auto& lease : std::map(h.referee().leases())) {
        EXPECT_FALSE(h.release(lease.first));
      }
    }
    granted_a += h.granted(ta) ? 1U : 0U;
    granted_b += h.granted(tb) ? 1U : 0U;
  }
  EXPECT_EQ(granted_a, 20U);
  EXPECT_EQ(granted_b, 20U);
  EXPECT_LE(h.count("load a") + h.count("load b"), 41U)
      << "work for the same model is served together";
}

}  // namespace
}  // namespace modelyard::test

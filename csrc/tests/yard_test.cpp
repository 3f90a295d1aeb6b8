#include "modelyard/yard.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"

// Every test here ends in ~Harness, which settles the yard, takes all models out, and wants an
// empty ledger; and every single event is judged by the Referee and by the yard's own audit.

namespace modelyard::test {
namespace {

YardOptions lru(std::initializer_list<std::int64_t> budgets) {
  YardOptions wanted = options(budgets);
  wanted.policy = "lru";
  return wanted;
}

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

// --- Eviction -----------------------------------------------------------------------------------

TEST(Yard, AnIdleModelMakesRoom) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  h.warm(a);
  const TicketId ticket = h.request(b);
  EXPECT_EQ(h.said(), Lines{"unload a"}) << "b may load only when a's memory is measurably back";
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(h.state(b), State::kQueued);
  EXPECT_EQ(h.used(), 60);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
  EXPECT_EQ(h.state(a), State::kCold);
  EXPECT_FALSE(h.load_done(b));
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, NobodyLeavesWhileThereIsRoom) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 40);
  h.warm(a);
  h.warm(b);
  EXPECT_EQ(h.count("unload a"), 0U);
  EXPECT_EQ(h.used(), 100);
}

TEST(Yard, LeasedModelsAreNeverVictims) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  const ModelId c = h.add("c", 50);
  const LeaseId lease = h.use(a);
  h.warm(b);
  const TicketId ticket = h.request(c);
  EXPECT_EQ(h.said(), Lines{"unload b"}) << "a is older, but in use";
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, EvictsTheSmallestSetThatSuffices) {
  Harness h(lru({100}));
  const ModelId small = h.add("small", 10);
  const ModelId large = h.add("large", 60);
  const ModelId rest = h.add("rest", 30);
  for (const ModelId each : {small, large, rest}) h.warm(each);
  const ModelId wanted = h.add("wanted", 55);
  h.request(wanted);
  EXPECT_EQ(h.said(), Lines{"unload large"}) << "with large gone, small need not go";
}

TEST(Yard, AVictimMustHoldBytesWhereTheyAreShort) {
  Harness h(lru({100, 100}));
  const ModelId elsewhere = h.add("elsewhere", charge({{1, 90}}));
  const ModelId here = h.add("here", charge({{0, 90}}));
  h.warm(elsewhere);
  h.warm(here);
  h.request(h.add("wanted", charge({{0, 50}})));
  EXPECT_EQ(h.said(), Lines{"unload here"});
}

TEST(Yard, AllDevicesOfAModelAreReservedTogetherOrNone) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 60}}));
  const LeaseId lease = h.use(a);
  const ModelId gang = h.add("gang", charge({{0, 50}, {1, 50}}));
  const TicketId ticket = h.request(gang);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_EQ(h.account(0).used(), Bytes{0}) << "half a reservation helps nobody";
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_EQ(h.account(0).used(), Bytes{0});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account(0).reserved, Bytes{50});
  EXPECT_EQ(h.account(1).reserved, Bytes{50});
}

TEST(Yard, NobodyIsUnloadedIfTheIdleModelsDoNotSuffice) {
  Harness h(options({100}));
  const ModelId idle = h.add("idle", 40);
  const ModelId busy = h.add("busy", 60);
  h.warm(idle);
  const LeaseId lease = h.use(busy);
  h.forget();
  const TicketId ticket = h.request(h.add("wanted", 80));
  EXPECT_TRUE(h.said().empty()) << "evicting idle would not be enough";
  EXPECT_EQ(h.state(idle), State::kResident);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_FALSE(h.release(lease));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, TheLongestUnwantedGoesFirstUnderLru) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  h.warm(a);
  h.warm(b);
  h.warm(a);
  h.request(h.add("c", 50));
  EXPECT_EQ(h.said(), Lines{"unload b"});
}

TEST(Yard, AHitOfTheFastWayKeepsAModelYoung) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.release(h.try_acquire(a).lease.value()));
  h.request(h.add("c", 50));
  EXPECT_EQ(h.said(), Lines{"unload b"});
}

TEST(Yard, PlanForSaysWhoWouldLeaveAndTouchesNobody) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  const ModelId b = h.add("b", 50);
  const ModelId c = h.add("c", 50);
  EXPECT_FALSE(h.yard().plan_for(c)) << "needs nobody to leave";
  h.warm(a);
  const LeaseId lease = h.use(b);
  const auto plan = h.yard().plan_for(c);
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->victims.size(), 1U);
  EXPECT_EQ(plan->victims[0].entry, EntryTable::index_of(a));
  EXPECT_FALSE(plan->victims[0].leased);
  EXPECT_EQ(h.state(a), State::kResident);
  const ModelId d = h.add("d", 80);
  EXPECT_FALSE(h.yard().plan_for(d)) << "the idle models do not suffice";
  EXPECT_FALSE(h.yard().plan_for(static_cast<ModelId>(12345)));
  EXPECT_FALSE(h.release(lease));
  h.forget();
  h.request(c);
  EXPECT_EQ(h.said(), Lines{"unload a"}) << "the scheduler acts upon the very plan";
}

TEST(Yard, PlanForCountsBytesThatAreOnTheirWayBack) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 50);
  h.warm(a);
  h.warm(h.add("b", 50));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.yard().plan_for(h.add("c", 50))) << "the scheduler would wait for a's bytes";
}

TEST(Yard, PlanForLeavesClosedDevicesAlone) {
  Harness h(lru({100, 100}));
  const ModelId p = h.add("p", charge({{0, 80}}));
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId b = h.add("b", charge({{1, 80}}));
  h.warm(b);
  EXPECT_FALSE(h.set_closed(0, true));
  const auto plan = h.yard().plan_for(h.add("c", {charge({{0, 20}}), charge({{1, 50}})}));
  ASSERT_TRUE(plan) << "there is room on device 0, but nothing is loaded there";
  ASSERT_EQ(plan->victims.size(), 1U);
  EXPECT_EQ(plan->victims[0].entry, EntryTable::index_of(b));
}

TEST(Yard, PlanForAModelThatIsThereNeedsNobody) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.yard().plan_for(a));
}

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

// --- Draining -----------------------------------------------------------------------------------

TEST(Yard, ADrainingModelIsNeverResurrected) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kDraining);
  const TicketId late = h.request(a);
  EXPECT_TRUE(h.waiting(late)) << "a late hit does not bring it back";
  EXPECT_EQ(h.state(a), State::kDraining);
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load a"}) << "and the wish for it is not lost";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(late));
}

TEST(Yard, AWishForAModelThatIsBeingUnloadedIsNotLost) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId ticket = h.request(a);
  EXPECT_EQ(h.state(a), State::kUnloading);
  h.forget();
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, AWaiterOfADrainingModelMayGiveUp) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  EXPECT_FALSE(h.unload(a));
  const TicketId ticket = h.request(a, Harness::at(seconds{5}));
  const TicketId other = h.request(a);
  h.pass(seconds{6});
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kDeadlineInQueue);
  EXPECT_FALSE(h.cancel(other));
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, TheLastReleaseOfManyUnloadsADrainingModel) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId one = h.use(a);
  const LeaseId two = h.use(a);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  EXPECT_FALSE(h.release(one));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(two));
  EXPECT_EQ(h.said(), Lines{"unload a"});
}

TEST(Yard, AReleaseThatMakesRoomFundsAWaitingLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  const TicketId ticket = h.request(h.add("b", 60));
  EXPECT_TRUE(h.waiting(ticket));
  h.forget();
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

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

// --- Placements ---------------------------------------------------------------------------------

TEST(Yard, ThePreferredPlacementIsTakenIfNothingElseSpeaksAgainstIt) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", {charge({{1, 50}}), charge({{0, 50}})});
  h.request(a);
  EXPECT_EQ(h.entry(a).placement, 0U);
  EXPECT_EQ(h.account(1).reserved, Bytes{50});
}

TEST(Yard, OfPlacementsThatFitTheOneThatLeavesMostRoomIsTaken) {
  Harness h(options({100, 200}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, APlacementThatDisplacesNobodyIsTaken) {
  Harness h(options({100, 100}));
  h.warm(h.add("resident", charge({{0, 80}})));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, OtherwiseTheCheapestDisplacementIsTaken) {
  Harness h(options({100, 100}));
  const ModelId dear = h.add("dear", charge({{0, 80}}), 1000);
  const ModelId cheap = h.add("cheap", charge({{1, 80}}), 1);
  h.request(dear);
  h.request(cheap);
  EXPECT_FALSE(h.load_done(dear, charge({{0, 80}}), seconds{1000}));
  EXPECT_FALSE(h.load_done(cheap, charge({{1, 80}}), seconds{1}));
  for (const auto& lease : std::map(h.referee().leases())) EXPECT_FALSE(h.release(lease.first));
  h.forget();
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"unload cheap"});
  EXPECT_FALSE(h.unload_done(cheap));
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, ABusyPlacementIsLeftForOneThatIdleModelsCanFree) {
  Harness h(options({100, 100}));
  const LeaseId lease = h.use(h.add("busy", charge({{0, 80}})));
  const ModelId idle = h.add("idle", charge({{1, 80}}));
  h.warm(idle);
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"unload idle"});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, NewPlacementsAreForTheNextLoad) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 50}}));
  h.warm(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 70}})}));
  EXPECT_EQ(h.held(a), charge({{0, 50}}));
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a));
  h.request(a);
  EXPECT_EQ(h.account(1).reserved, Bytes{70});
  EXPECT_EQ(h.account(0).used(), Bytes{0});
}

TEST(Yard, NewPlacementsDuringALoadDoNotTouchItsReservation) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 10}})}));
  EXPECT_EQ(h.account(0).reserved, Bytes{50});
  EXPECT_FALSE(h.load_done(a, charge({{0, 50}})));
  EXPECT_EQ(h.account(0).resident, Bytes{50});
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, AnOvershootAfterNewPlacementsDoesNotSpoilThem) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 50}}));
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 10}})}));
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}})));
  ASSERT_EQ(h.entry(a).placements.size(), 1U);
  EXPECT_EQ(h.entry(a).placements[0], charge({{1, 10}})) << "60 on device 0 says nothing of it";
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, AnEstimateThatWasCaughtOutIsNotTrustedAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{0, 55}})});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 60}}));
  EXPECT_EQ(h.entry(a).placements[1], charge({{0, 55}})) << "the other alternative was not tried";
  EXPECT_FALSE(h.remeasured(a, charge({{0, 70}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 70}}));
  EXPECT_FALSE(h.remeasured(a, charge({{0, 20}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 70}})) << "an upper bound stays one";
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, ASmallerPlacementLetsAWaitingModelLoad) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const ModelId a = h.add("a", 80);
  h.request(a);
  h.forget();
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 40}})}));
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, APlacementThatNeverFitsRefusesWhoWaits) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const ModelId a = h.add("a", 80);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 101}})}));
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kNeverFits);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, BadPlacementsAreRefusedAndTheOldOnesStay) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 50);
  EXPECT_EQ(h.update_placements(a, {}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.update_placements(a, {charge({{1, 5}})}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.update_placements(a, std::vector<Charge>(17, charge({{0, 5}}))),
            ErrorCode::kInvalidArgument);
  ASSERT_EQ(h.entry(a).placements.size(), 1U);
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 50}}));
}

// --- Pins ---------------------------------------------------------------------------------------

TEST(Yard, APinnedModelIsNeverAVictim) {
  Harness h(lru({100}));
  const ModelId p = h.add("p", 50);
  const ModelId a = h.add("a", 50);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  h.warm(a);
  h.request(h.add("b", 50));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.state(p), State::kResident);
}

TEST(Yard, PinningDoesNotLoad) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  EXPECT_FALSE(h.pin(p));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.state(p), State::kCold);
}

TEST(Yard, APinnedModelThatHoldsNothingTakesNoRoom) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  EXPECT_FALSE(h.pin(p));
  const ModelId b = h.add("b", 100);
  const TicketId ticket = h.request(b);
  EXPECT_FALSE(h.refused(ticket));
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, APinnedModelInUseIsNotDrainedForAnOverdueOne) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 40);
  const LeaseId lease = h.use(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId busy = h.add("busy", 40);
  const LeaseId other = h.use(busy);
  h.request(h.add("b", 50));
  h.pass(seconds{60});
  EXPECT_EQ(h.count("drain p"), 0U);
  EXPECT_EQ(h.count("drain busy"), 1U);
  EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.release(other));
}

TEST(Yard, AnUnpinnedModelMakesRoomForWhoWaits) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  const ModelId busy = h.add("busy", 40);
  const LeaseId lease = h.use(busy);
  const TicketId ticket = h.request(h.add("b", 40));
  EXPECT_TRUE(h.waiting(ticket));
  h.forget();
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.said(), Lines{"unload p"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, PinningTwiceIsPinningOnce) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.unpin(p));
  EXPECT_FALSE(h.unpin(p));
  h.request(h.add("b", 60));
  EXPECT_EQ(h.said(), Lines{"unload p"});
}

TEST(Yard, AModelPinnedWhileItLoadsStays) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  const TicketId ticket = h.request(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.load_done(p));
  EXPECT_FALSE(h.release(ticket));
  const TicketId refused = h.request(h.add("b", 60));
  ASSERT_TRUE(h.refused(refused));
  EXPECT_EQ(h.refusal(refused).reason, RefuseReason::kBudgetExhausted);
}

TEST(Yard, AModelPinnedWhileItIsUnloadedCanBeLoadedAgain) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.unload(p));
  EXPECT_FALSE(h.pin(p));
  const TicketId ticket = h.request(p);
  EXPECT_TRUE(h.waiting(ticket)) << "its own bytes are on their way back";
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

// --- Being asked to leave -----------------------------------------------------------------------

TEST(Yard, UnloadOfAnIdleModelUnloadsIt) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.warm(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty()) << "it is on its way already";
}

TEST(Yard, UnloadOfAModelInUseDrainsItFirst) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const LeaseId lease = h.use(a);
  h.forget();
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.said(), Lines{"drain a"});
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload a"});
}

TEST(Yard, UnloadOfAModelThatHoldsNothingDoesNothing) {
  Harness h(options({100}));
  const ModelId cold = h.add("cold", 60);
  EXPECT_FALSE(h.unload(cold));
  EXPECT_EQ(h.state(cold), State::kCold);
  const LeaseId lease = h.use(h.add("busy", 60));
  const TicketId ticket = h.request(cold);
  h.forget();
  EXPECT_FALSE(h.unload(cold));
  EXPECT_EQ(h.state(cold), State::kQueued);
  EXPECT_TRUE(h.waiting(ticket));
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(lease));
  const ModelId failed = h.add("failed", 10);
  h.request(failed);
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
}

TEST(Yard, UnloadOfAFailedModelDoesNothing) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  h.forget();
  EXPECT_FALSE(h.unload(a));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.state(a), State::kFailed);
}

TEST(Yard, AModelAskedToLeaveWhileItLoadsGoesWhenTheLoadHasEnded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(ticket)) << "whoever waits is granted when the load ends";
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_EQ(h.state(a), State::kUnloading);
}

TEST(Yard, AModelThatNobodyWaitsForLeavesAtTheEndOfItsLoad) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.cancel(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, TheWishToLeaveEndsWithTheLoadItWasMadeIn) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  EXPECT_TRUE(h.refused(ticket));
  h.skip(seconds{10});
  const LeaseId lease = h.use(a);
  EXPECT_EQ(h.state(a), State::kResident) << "an old wish does not drain the next load";
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, APinnedModelCannotBeAskedToLeave) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  const LeaseId lease = h.use(a);
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.state(a), State::kUnloading);
}

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

// --- Budgets and devices ------------------------------------------------------------------------

TEST(Yard, ALowerBudgetEvictsIdleModelsAndNoMoreThanNeeded) {
  Harness h(lru({100}));
  const ModelId a = h.add("a", 30);
  const ModelId b = h.add("b", 30);
  const ModelId c = h.add("c", 30);
  for (const ModelId each : {a, b, c}) h.warm(each);
  EXPECT_FALSE(h.set_budget(0, 70));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.account().deficit, Bytes{20});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_TRUE(h.said().empty());
}

TEST(Yard, ALowerBudgetDrainsModelsInUseAfterIdleOnes) {
  Harness h(lru({100}));
  const ModelId busy = h.add("busy", 40);
  const ModelId idle = h.add("idle", 40);
  const LeaseId lease = h.use(busy);
  h.warm(idle);
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_EQ(h.said(), Lines{"unload idle"});
  EXPECT_FALSE(h.set_budget(0, 30));
  EXPECT_EQ(h.said(), Lines{"drain busy"});
  EXPECT_FALSE(h.unload_done(idle));
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.said(), Lines{"unload busy"});
  EXPECT_FALSE(h.unload_done(busy));
  EXPECT_EQ(h.account().deficit, Bytes{0});
}

TEST(Yard, ALowerBudgetLeavesPinnedModelsAndTheDeficitStays) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 60);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  h.forget();
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_TRUE(h.said().empty());
  EXPECT_EQ(h.account().deficit, Bytes{10});
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.said(), Lines{"unload p"}) << "the deficit is repaid as soon as it can be";
}

TEST(Yard, ABudgetBelowARunningLoadIsRepaidWhenItHasEnded) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 80);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.set_budget(0, 50));
  EXPECT_EQ(h.account().deficit, Bytes{30});
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.release(h.granted(ticket) ? h.lease_of(ticket) : LeaseId{}));
  h.finish_io();
  EXPECT_EQ(h.account().deficit, Bytes{0});
  EXPECT_EQ(h.state(a), State::kCold);
}

TEST(Yard, AHigherBudgetFundsAWaitingLoad) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const TicketId ticket = h.request(h.add("b", 60));
  h.forget();
  EXPECT_FALSE(h.set_budget(0, 120));
  EXPECT_EQ(h.said(), Lines{"load b"});
  h.finish_io();
  EXPECT_TRUE(h.granted(ticket));
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, ADeficitOnOneDeviceDisturbsNobodyOnAnother) {
  Harness h(lru({100, 100}));
  const ModelId other = h.add("other", charge({{1, 50}}));
  const ModelId here = h.add("here", charge({{0, 50}}));
  h.warm(other);
  h.warm(here);
  EXPECT_FALSE(h.set_budget(0, 10));
  EXPECT_EQ(h.said(), Lines{"unload here"});
}

TEST(Yard, BadBudgetsAndDevicesAreErrors) {
  Harness h(options({100}));
  EXPECT_EQ(h.set_budget(1, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_budget(0, -1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_budget(0, kMaxBytes + 1), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.set_closed(1, true), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.account().budget, Bytes{100});
}

TEST(Yard, AClosedDeviceEmptiesExceptForPinnedModels) {
  Harness h(options({100, 100}));
  const ModelId idle = h.add("idle", charge({{0, 20}}));
  const ModelId busy = h.add("busy", charge({{0, 20}}));
  const ModelId pinned = h.add("pinned", charge({{0, 20}}));
  const ModelId across = h.add("across", charge({{0, 20}, {1, 20}}));
  const ModelId other = h.add("other", charge({{1, 20}}));
  for (const ModelId each : {idle, pinned, across, other}) h.warm(each);
  const LeaseId lease = h.use(busy);
  EXPECT_FALSE(h.pin(pinned));
  h.forget();
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_TRUE(h.yard().device_closed(device(0)));
  EXPECT_EQ(h.count("unload idle"), 1U);
  EXPECT_EQ(h.count("unload across"), 1U);
  EXPECT_EQ(h.count("drain busy"), 1U);
  EXPECT_EQ(h.state(pinned), State::kResident);
  EXPECT_EQ(h.state(other), State::kResident);
  EXPECT_FALSE(h.release(lease));
  EXPECT_EQ(h.state(busy), State::kUnloading);
  h.finish_io();
  EXPECT_EQ(h.used(0), 20);
}

TEST(Yard, NothingIsLoadedOntoAClosedDevice) {
  Harness h(options({100, 100}));
  EXPECT_FALSE(h.set_closed(0, true));
  const ModelId there = h.add("there", charge({{0, 20}}));
  const ModelId either = h.add("either", {charge({{0, 20}}), charge({{1, 20}})});
  const TicketId waits = h.request(there);
  h.request(either);
  EXPECT_EQ(h.said(), Lines{"load either"});
  EXPECT_EQ(h.entry(either).placement, 1U);
  EXPECT_TRUE(h.waiting(waits));
  EXPECT_FALSE(h.set_closed(0, false));
  EXPECT_EQ(h.said(), Lines{"load there"});
}

TEST(Yard, NobodyIsEvictedForALoadOntoAClosedDevice) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{1, 80}}));
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  h.request(h.add("gang", charge({{0, 50}, {1, 50}})));
  h.pass(seconds{100});
  EXPECT_EQ(h.count("unload a"), 0U);
}

TEST(Yard, ALoadThatEndsOnAClosedDeviceLeavesItAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 50);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.load_done(a));
  if (h.granted(ticket)) {
    EXPECT_FALSE(h.release(ticket));
  }
  EXPECT_EQ(h.state(a), State::kUnloading);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.used(), 0);
}

TEST(Yard, AModelUnpinnedOnAClosedDeviceLeavesIt) {
  Harness h(options({100}));
  const ModelId p = h.add("p", 50);
  h.warm(p);
  EXPECT_FALSE(h.pin(p));
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_EQ(h.state(p), State::kResident);
  EXPECT_FALSE(h.unpin(p));
  EXPECT_EQ(h.state(p), State::kUnloading);
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

// --- Explanations -------------------------------------------------------------------------------

TEST(Yard, ExplainsAnEviction) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 70);
  h.warm(a);
  h.set_clock(Harness::at(seconds{7}));
  const double score = h.yard().plan_for(b).value().victims.at(0).score;
  h.request(b);
  const auto evicted = h.explained(Decision::kEvicted);
  ASSERT_EQ(evicted.size(), 1U);
  EXPECT_EQ(evicted[0].model, a);
  EXPECT_EQ(evicted[0].cause, b);
  EXPECT_EQ(evicted[0].bytes, Bytes{60});
  EXPECT_EQ(evicted[0].at, Harness::at(seconds{7}));
  EXPECT_GT(evicted[0].score, 0);
  EXPECT_LE(evicted[0].score, score * 10) << "the score by which it was chosen";
  EXPECT_FALSE(h.unload_done(a));
  const auto unloaded = h.explained(Decision::kUnloaded);
  ASSERT_EQ(unloaded.size(), 1U);
  EXPECT_EQ(unloaded[0].model, a);
  EXPECT_EQ(unloaded[0].bytes, Bytes{60});
  EXPECT_FALSE(h.load_done(b));
  EXPECT_EQ(h.explained(Decision::kLoadStarted).back().model, b);
  EXPECT_EQ(h.explained(Decision::kLoadStarted).back().bytes, Bytes{70});
  EXPECT_EQ(h.explained(Decision::kLoadDone).back().model, b);
}

TEST(Yard, ExplainsHowLongTheOldestWaited) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 60);
  const ModelId cold = h.add("cold", 60);
  const LeaseId lease = h.use(hot);
  h.request(cold);
  h.pass(seconds{30});
  const auto drained = h.explained(Decision::kDrained);
  ASSERT_EQ(drained.size(), 1U);
  EXPECT_EQ(drained[0].model, hot);
  EXPECT_EQ(drained[0].cause, cold);
  EXPECT_FALSE(h.release(lease));
  h.skip(seconds{2});
  EXPECT_FALSE(h.unload_done(hot));
  const auto started = h.explained(Decision::kLoadStarted);
  EXPECT_EQ(started.back().model, cold);
  EXPECT_EQ(started.back().waited, Duration{seconds{32}});
}

TEST(Yard, ExplainsFailuresOvershootsQuarantinesRefusalsAndBudgets) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_failed(a, LoadFailure::kTransient));
  ASSERT_EQ(h.explained(Decision::kLoadFailed).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kLoadFailed)[0].model, a);
  EXPECT_FALSE(h.explained(Decision::kRefused).empty());
  EXPECT_EQ(h.explained(Decision::kRefused)[0].model, a);
  h.skip(seconds{10});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 75}})));
  ASSERT_EQ(h.explained(Decision::kOvershoot).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kOvershoot)[0].model, a);
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a, charge({{0, 70}})));
  ASSERT_EQ(h.explained(Decision::kQuarantined).size(), 1U);
  EXPECT_EQ(h.explained(Decision::kQuarantined)[0].bytes, Bytes{5});
  EXPECT_FALSE(h.set_budget(0, 200));
  EXPECT_EQ(h.explained(Decision::kBudgetChanged).size(), 1U);
}

TEST(Yard, AnOvershootWithinTheBudgetIsStillOnRecord) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 61}})));
  EXPECT_EQ(h.explained(Decision::kOvershoot).size(), 1U);
  EXPECT_EQ(h.account().deficit, Bytes{0});
}

TEST(Yard, TheExplainLogIsBounded) {
  YardOptions wanted = options({100});
  wanted.explain_capacity = 5;
  Harness h(wanted);
  const ModelId a = h.add("a", 60);
  const ModelId b = h.add("b", 60);
  for (int i = 0; i < 10; ++i) {
    h.warm(a);
    h.warm(b);
  }
  const auto& log = h.yard().explanations().entries();
  ASSERT_EQ(log.size(), 5U);
  for (std::size_t i = 1; i < log.size(); ++i) EXPECT_EQ(log[i].sequence, log[i - 1].sequence + 1);
  EXPECT_GT(log.front().sequence, 40U);
}

TEST(Yard, ExplainsWhyAModelWasSentAway) {
  Harness h(options({100, 100}));
  const ModelId asked = h.add("asked", 20);
  const ModelId removed = h.add("removed", 20);
  const ModelId large = h.add("large", 50);
  const ModelId closed = h.add("closed", charge({{1, 30}}));
  for (const ModelId model : {asked, removed, large, closed}) h.warm(model);
  EXPECT_FALSE(h.unload(asked));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kAsked);
  EXPECT_FALSE(h.remove(removed));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kRemoved);
  EXPECT_FALSE(h.set_closed(1, true));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kDeviceClosed);
  EXPECT_EQ(h.explained(Decision::kEvicted).back().device, device(1));
  EXPECT_EQ(h.explained(Decision::kDeviceClosed).size(), 1U);
  EXPECT_FALSE(h.set_closed(1, true));
  EXPECT_EQ(h.explained(Decision::kDeviceClosed).size(), 1U) << "it was closed already";
  h.finish_io();
  EXPECT_FALSE(h.set_budget(0, 40));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().why, Why::kBudget);
  EXPECT_EQ(h.explained(Decision::kEvicted).back().device, device(0));
  EXPECT_EQ(h.explained(Decision::kEvicted).back().model, large);
}

TEST(Yard, ExplainsPinsAndTheBeginningOfAWait) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  EXPECT_FALSE(h.pin(a));
  EXPECT_FALSE(h.pin(a));
  EXPECT_EQ(h.explained(Decision::kPinned).size(), 1U);
  EXPECT_FALSE(h.unpin(a));
  EXPECT_EQ(h.explained(Decision::kUnpinned).size(), 1U);
  h.request(a);
  h.request(a);
  EXPECT_EQ(h.explained(Decision::kQueued).size(), 1U) << "one wait, whoever joins it";
}

TEST(Yard, APinnedModelThatLoadsDoesNotStandInItsOwnWay) {
  Harness h(options({150}));
  const ModelId a = h.add("a", 100);
  const TicketId first = h.request(a);
  EXPECT_FALSE(h.pin(a));
  const TicketId second = h.request(a);
  EXPECT_TRUE(h.waiting(second)) << "it waits for the load that runs";
  EXPECT_FALSE(h.load_done(a));
  EXPECT_TRUE(h.granted(first));
  EXPECT_TRUE(h.granted(second));
  const ModelId b = h.add("b", 100);
  EXPECT_EQ(h.refusal(h.request(b)).reason, RefuseReason::kBudgetExhausted)
      << "it does stand in the way of others";
  EXPECT_FALSE(h.release(first));
  EXPECT_FALSE(h.release(second));
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

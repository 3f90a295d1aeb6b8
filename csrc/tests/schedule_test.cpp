// Who is loaded next, who leaves for it, and how long that may take: the rules in the comment of
// class Yard, and the bound that it states.

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "harness.hpp"
#include "modelyard/pace.hpp"

namespace modelyard::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

Tick at(Duration since_start) { return Tick{since_start}; }

// --- The pace of a device -----------------------------------------------------------------------

TEST(Pace, IsNotKnownBeforeAFewRequestsHaveEnded) {
  Pace pace;
  for (int i = 0; i < 10; ++i) pace.begin(at(seconds{0}));
  EXPECT_EQ(pace.given(), 10U);
  EXPECT_EQ(pace.backlog_seconds(at(seconds{1})), 0);
  pace.end(at(seconds{1}));
  pace.end(at(seconds{1}));
  EXPECT_EQ(pace.backlog_seconds(at(seconds{1})), 0);
  EXPECT_EQ(pace.seconds_each(), 0);
  EXPECT_EQ(pace.given(), 8U);
}

TEST(Pace, ABacklogIsWhatIsLeftAtThePresentPace) {
  Pace pace;
  for (int i = 0; i < 20; ++i) pace.begin(at(seconds{0}));
  for (int i = 1; i <= 10; ++i) pace.end(at(milliseconds{100 * i}));
  EXPECT_NEAR(pace.seconds_each(), 0.1, 1e-9);
  EXPECT_NEAR(pace.backlog_seconds(at(seconds{1})), 1.0, 1e-9);
}

TEST(Pace, WhatRunsHasBeenRunningSinceTheLastEnd) {
  Pace pace;
  for (int i = 0; i < 20; ++i) pace.begin(at(seconds{0}));
  for (int i = 1; i <= 10; ++i) pace.end(at(milliseconds{100 * i}));
  EXPECT_NEAR(pace.backlog_seconds(at(milliseconds{1400})), 0.6, 1e-9);
  // However long it runs: it has not ended.
  EXPECT_NEAR(pace.backlog_seconds(at(seconds{60})), 0.1, 1e-9);
}

TEST(Pace, ManyThatEndTogetherCountEachForItself) {
  Pace pace;
  for (int i = 0; i < 320; ++i) pace.begin(at(seconds{0}));
  // Batches of 32, one in 100 ms.
  for (int batch = 1; batch <= 8; ++batch) {
    for (int i = 0; i < 32; ++i) pace.end(at(milliseconds{100 * batch}));
  }
  EXPECT_NEAR(pace.backlog_seconds(at(milliseconds{800})), 0.2, 0.02);
}

TEST(Pace, TimeWithoutWorkDoesNotCount) {
  Pace pace;
  for (int i = 0; i < 5; ++i) {
    pace.begin(at(seconds{1000 * i}));
    pace.end(at(seconds{1000 * i} + milliseconds{10}));
  }
  pace.begin(at(seconds{9000}));
  EXPECT_NEAR(pace.backlog_seconds(at(seconds{9000})), 0.01, 1e-9);
}

TEST(Pace, ANewPaceIsLearntWithinSecondsOfWork) {
  Pace pace;
  Tick now{};
  for (int i = 0; i < 10; ++i) {
    pace.begin(now);
    pace.end(now += seconds{5});
  }
  for (int i = 0; i < 600; ++i) {
    pace.begin(now);
    pace.end(now += milliseconds{10});
  }
  pace.begin(now);
  EXPECT_LT(pace.backlog_seconds(now), 0.05);
}

// --- The order ----------------------------------------------------------------------------------

// A device that loads one at a time, with a load on it.
class Queue : public ::testing::Test {
 protected:
  Harness h{options({1000})};
  ModelId first = h.add("first", 10);
  TicketId running = h.request(first);

  void next() {
    h.forget();
    EXPECT_FALSE(h.load_done(first));
  }
};

TEST_F(Queue, TheLongerQueueIsLoadedFirst) {
  const ModelId one = h.add("one", 10);
  const ModelId many = h.add("many", 10);
  h.request(one);
  h.skip(milliseconds{100});
  for (int i = 0; i < 4; ++i) h.request(many);
  next();
  // (1 + 0.1 / 1) * sqrt(1) against (1 + 0 / 1) * sqrt(4).
  EXPECT_EQ(h.said(), (Lines{"grant first", "load many"}));
}

TEST_F(Queue, TheShorterLoadIsFirstOnceBothHaveWaited) {
  const ModelId slow = h.add("slow", 10, 8);
  const ModelId quick = h.add("quick", 10, 1);
  h.request(slow);
  h.request(quick);
  h.skip(seconds{2});
  next();
  EXPECT_EQ(h.said(), (Lines{"grant first", "load quick"}));
}

TEST_F(Queue, AgeOutweighsTheQueueInTheEnd) {
  const ModelId old = h.add("old", 10);
  const ModelId many = h.add("many", 10);
  h.request(old);
  h.pass(seconds{9});
  for (int i = 0; i < 16; ++i) h.request(many);
  next();
  // (1 + 9) * 1 against 1 * 4.
  EXPECT_EQ(h.said(), (Lines{"grant first", "load old"}));
}

TEST_F(Queue, WhoIsOverdueComesFirstAndTheOldestOfThemAtTheHead) {
  const ModelId older = h.add("older", 10, 9);
  const ModelId newer = h.add("newer", 10, 9);
  const ModelId many = h.add("many", 10, 0.1);
  h.request(older);
  h.pass(seconds{1});
  h.request(newer);
  h.pass(seconds{30});
  for (int i = 0; i < 100; ++i) h.request(many);
  next();
  EXPECT_EQ(h.said(), (Lines{"grant first", "load older"}));
  EXPECT_FALSE(h.load_done(older));
  EXPECT_EQ(h.said(), (Lines{"grant older", "load newer"}));
}

TEST_F(Queue, ADeadlineThatIsNearMakesARequestOverdue) {
  const ModelId many = h.add("many", 10, 0.5);
  const ModelId urgent = h.add("urgent", 10, 1);
  for (int i = 0; i < 100; ++i) h.request(many);
  h.request(urgent, h.now() + seconds{6});
  h.pass(seconds{3});
  next();
  EXPECT_EQ(h.said().back(), "load urgent");
}

// --- Models in use ------------------------------------------------------------------------------

// Keeps a model in use without a pause.
class Endless {
 public:
  Endless(Harness& h, ModelId model) : h_(h), model_(model), lease_(h.use(model)) {}

  // For so long, or until it is asked to leave.
  void pass(Duration wait) {
    const Tick end = h_.now() + wait;
    while (h_.now() < end && h_.state(model_) == State::kResident) {
      h_.pass(milliseconds{100});
      if (h_.state(model_) != State::kResident) return;
      const LeaseId next = h_.try_acquire(model_).lease.value();
      EXPECT_FALSE(h_.release(lease_));
      lease_ = next;
    }
  }
  void end() { EXPECT_FALSE(h_.release(lease_)); }

 private:
  Harness& h_;
  ModelId model_;
  LeaseId lease_;
};

TEST(InUse, AnImpatientModelMakesThoseLeaveThatHavePaidForThemselvesAmply) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 80, 0.2);
  Endless use(h, hot);
  // A load of 0.2 s: impatient after 6 s. Loads of hot are measured at 1 s: 10 s of use.
  h.request(h.add("cold", 80, 0.2));
  use.pass(milliseconds{9800});
  EXPECT_EQ(h.count("drain hot"), 0U) << "it has not paid for its load yet";
  use.pass(seconds{1});
  EXPECT_EQ(h.count("drain hot"), 1U) << "long before it is overdue";
  use.end();
}

TEST(InUse, NobodyIsImpatientWithinFiveSeconds) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 80);
  const LeaseId lease = h.use(hot);
  h.pass(seconds{20});
  h.request(h.add("cold", 80, 0.001));
  h.pass(milliseconds{4999});
  EXPECT_EQ(h.count("drain hot"), 0U);
  h.pass(milliseconds{1});
  EXPECT_EQ(h.count("drain hot"), 1U);
  EXPECT_FALSE(h.release(lease));
}

TEST(InUse, WhoHasJustBeenLoadedIsUsedBeforeItLeaves) {
  Harness h(options({100}));
  const ModelId busy = h.add("busy", 90);
  const LeaseId before = h.use(busy);
  const TicketId waits = h.request(h.add("waits", 60));
  h.pass(seconds{25});
  // Something else comes into the room in between, whose load took 12 s.
  EXPECT_FALSE(h.unload(busy));
  const ModelId fresh = h.add("fresh", 70);
  for (int i = 0; i < 5000; ++i) h.request(fresh);
  EXPECT_FALSE(h.release(before));
  h.forget();
  EXPECT_FALSE(h.unload_done(busy));
  ASSERT_EQ(h.said(), Lines{"load fresh"}) << "so many are more urgent";
  EXPECT_FALSE(h.load_done(fresh, charge({{0, 70}}), seconds{12}));
  h.pass(seconds{11});
  EXPECT_GT(h.now(), at(seconds{35})) << "overdue";
  EXPECT_EQ(h.count("drain fresh"), 0U) << "used for 11 s of 12";
  h.pass(seconds{1});
  EXPECT_EQ(h.count("drain fresh"), 1U);
  EXPECT_TRUE(h.waiting(waits));
}

TEST(InUse, WhoIsAskedToLeaveServesItsRequestsFirst) {
  Harness h(options({100}));
  const ModelId hot = h.add("hot", 80);
  std::vector<TicketId> before;
  for (int i = 0; i < 3; ++i) before.push_back(h.request(hot));
  EXPECT_FALSE(h.load_done(hot));
  h.request(h.add("cold", 80));
  h.pass(seconds{30});
  EXPECT_EQ(h.count("drain hot"), 1U);
  for (const TicketId ticket : before) {
    EXPECT_EQ(h.count("unload hot"), 0U);
    EXPECT_TRUE(h.granted(ticket));
    EXPECT_FALSE(h.release(ticket));
  }
  EXPECT_EQ(h.count("unload hot"), 1U);
}

// --- Back-pressure ------------------------------------------------------------------------------

// A device on which "work" has ended ten requests, one a second, and has more to do; "idle" could
// leave for "cold", whose load takes a second.
class Pressure : public ::testing::Test {
 protected:
  Harness h{options({100})};
  ModelId work = h.add("work", 50);
  ModelId idle = h.add("idle", 50);
  ModelId cold = h.add("cold", 50);
  std::vector<LeaseId> given;

  void SetUp() override {
    h.warm(idle);
    given.push_back(h.use(work));
    give(19);
    for (int i = 0; i < 10; ++i) {
      h.pass(seconds{1});
      end_one();
    }
    h.forget();
  }
  void TearDown() override {
    while (!given.empty()) end_one();
  }
  void give(int count) {
    for (int i = 0; i < count; ++i) given.push_back(h.try_acquire(work).lease.value());
  }
  void end_one() {
    EXPECT_FALSE(h.release(given.front()));
    given.erase(given.begin());
  }
};

TEST_F(Pressure, NobodyLeavesForAModelThatWouldOnlyStandInLine) {
  EXPECT_NEAR(h.yard().backlog_seconds(device(0)), 10, 0.5);
  h.request(cold);
  EXPECT_TRUE(h.said().empty());
  int ended = 0;
  for (; !given.empty() && h.count("unload idle") == 0; ++ended) {
    h.pass(seconds{1});
    end_one();
  }
  EXPECT_EQ(ended, 9) << "one second of work is left, as long as the load takes";
  EXPECT_EQ(h.count("unload idle"), 1U);
}

TEST_F(Pressure, WhatIsSetAsideIsNoWorkOfItsDeviceAndNoMeasureOfItsPace) {
  const LeaseId lasts = h.try_acquire(work).lease.value();
  const double with = h.yard().work_seconds(device(0));
  ASSERT_TRUE(h.raw().set_aside(lasts));
  ASSERT_TRUE(h.raw().set_aside(lasts)) << "a second time changes nothing";
  EXPECT_NEAR(with - h.yard().work_seconds(device(0)), h.yard().work_seconds(device(0)) / 10, 1e-9);
  EXPECT_NEAR(h.yard().backlog_seconds(device(0)), 10, 0.5);
  while (!given.empty()) {
    h.pass(seconds{1});
    end_one();
  }
  EXPECT_EQ(h.yard().expected_wait_seconds(work), 0) << "nobody would have to wait";
  EXPECT_EQ(h.yard().leases_of(work).size(), 1U);
  // However long it lasts, the next ones are measured by themselves.
  h.pass(seconds{60});
  EXPECT_FALSE(h.release(lasts));
  give(10);
  EXPECT_NEAR(h.yard().backlog_seconds(device(0)), 10, 0.5);
  EXPECT_FALSE(h.raw().set_aside(lasts)) << "it is not there any more";
}

TEST_F(Pressure, WhatComesLaterDoesNotHoldItBack) {
  h.request(cold);
  for (int i = 0; i < 9; ++i) {
    h.pass(seconds{1});
    end_one();
    give(3);
  }
  EXPECT_GT(h.yard().backlog_seconds(device(0)), 20);
  h.pass(seconds{1});
  end_one();
  EXPECT_EQ(h.count("unload idle"), 1U);
}

TEST_F(Pressure, WhatIsFreeIsTakenAtOnce) {
  EXPECT_FALSE(h.unload(idle));
  EXPECT_FALSE(h.unload_done(idle));
  h.request(cold);
  EXPECT_EQ(h.count("load cold"), 1U);
}

TEST_F(Pressure, AnOverdueModelIsNotHeldBack) {
  give(100);
  h.request(cold);
  h.pass(milliseconds{29999});
  EXPECT_EQ(h.count("unload idle"), 0U);
  h.pass(milliseconds{1});
  EXPECT_EQ(h.count("unload idle"), 1U);
}

// --- Deadlines that are out of reach ------------------------------------------------------------

TEST_F(Pressure, AHitThatItsDeviceCannotAnswerInTimeIsRefusedWithWhenItCould) {
  EXPECT_FALSE(h.try_acquire(work, h.now() + seconds{4}).lease);
  const TicketId late = h.request(work, h.now() + seconds{4});
  ASSERT_TRUE(h.refused(late));
  EXPECT_EQ(h.refusal(late).reason, RefuseReason::kDeadlineUnreachable);
  // Ten before it, and itself; with a quarter to spare.
  EXPECT_NEAR(seconds_of(h.refusal(late).needs), 11, 0.5);
  EXPECT_NEAR(seconds_of(h.refusal(late).left), 4, 1e-9);
  EXPECT_NEAR(seconds_of(h.refusal(late).retry_after), 11 * 1.25 - 4, 0.5);
  EXPECT_FALSE(h.try_acquire(work, h.now() + milliseconds{13500}).lease);
  // In time, and without a deadline.
  const Outcome soon = h.try_acquire(work, h.now() + seconds{20});
  ASSERT_TRUE(soon.lease);
  EXPECT_FALSE(h.release(*soon.lease));
  EXPECT_TRUE(h.granted(h.request(work)));
}

TEST(Deadline, ALoadThatTakesLongerIsRefusedAndDoneAllTheSameWhereNobodyElseWaits) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 60);
  const TicketId first = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}}), seconds{5}));
  EXPECT_FALSE(h.release(first));
  h.warm(h.add("b", 60));
  ASSERT_EQ(h.state(a), State::kCold);
  const TicketId late = h.request(a, h.now() + seconds{3});
  ASSERT_TRUE(h.refused(late));
  EXPECT_EQ(h.refusal(late).reason, RefuseReason::kDeadlineUnreachable);
  EXPECT_EQ(h.refusal(late).needs, Duration{seconds{5}});
  EXPECT_EQ(h.refusal(late).retry_after, Duration{seconds{5}});
  EXPECT_EQ(h.count("unload b"), 1U) << "the next one finds it, or room for it";
  const TicketId in_time = h.request(a, h.now() + seconds{6});
  EXPECT_TRUE(h.waiting(in_time));
}

TEST(Deadline, WhereOthersWaitNothingIsLoadedForWhoIsTooLate) {
  Harness h(options({1000}));
  const ModelId slow = h.add("slow", 10);
  h.request(slow);
  EXPECT_FALSE(h.load_done(slow, charge({{0, 10}}), seconds{5}));
  EXPECT_FALSE(h.unload(slow));
  h.finish_io();
  h.request(h.add("loads", 10));
  h.request(h.add("waits", 10));
  h.forget();
  const TicketId late = h.request(slow, h.now() + seconds{3});
  EXPECT_EQ(h.refusal(late).reason, RefuseReason::kDeadlineUnreachable);
  h.finish_io();
  EXPECT_EQ(h.count("load slow"), 1U) << "the one before";
}

TEST(Deadline, TheLoadThatRunsBeforeCounts) {
  Harness h(options({1000}));
  const ModelId a = h.add("a", 10);
  const ModelId b = h.add("b", 10);
  for (const ModelId each : {a, b}) {
    h.warm(each);  // Measured: a second.
    EXPECT_FALSE(h.unload(each));
    h.finish_io();
  }
  h.request(a);
  const TicketId late = h.request(b, h.now() + milliseconds{1500});
  EXPECT_EQ(h.refusal(late).reason, RefuseReason::kDeadlineUnreachable);
  h.skip(milliseconds{600});
  EXPECT_TRUE(h.waiting(h.request(b, h.now() + milliseconds{1500})));
  // And who asks for what is being loaded waits for the rest of it.
  const TicketId too_late = h.request(a, h.now() + milliseconds{300});
  EXPECT_EQ(h.refusal(too_late).reason, RefuseReason::kDeadlineUnreachable);
  EXPECT_TRUE(h.waiting(h.request(a, h.now() + milliseconds{500})));
}

TEST(Deadline, WhatHasNotBeenMeasuredIsTried) {
  Harness h(options({100}));
  const TicketId ticket = h.request(h.add("a", 60, 1000), h.now() + milliseconds{1});
  EXPECT_TRUE(h.waiting(ticket));
}

// --- Several devices ----------------------------------------------------------------------------

// "both" needs a channel of each device; a load of 4 s runs on device 0.
class Gang : public ::testing::Test {
 protected:
  Harness h{options({100, 100})};
  ModelId running = h.add("running", charge({{0, 10}}), 4);
  ModelId both = h.add("both", charge({{0, 40}, {1, 40}}), 1);

  void SetUp() override {
    h.request(running);
    h.request(both);
    h.pass(seconds{1});  // It is the oldest and the most urgent of those that follow.
    h.forget();
  }
};

TEST_F(Gang, AFreeChannelIsKeptForWhoWaitsForAnother) {
  h.request(h.add("long", charge({{1, 10}}), 3.5));
  EXPECT_TRUE(h.said().empty()) << "it would not be over in the three seconds that are left";
  EXPECT_FALSE(h.load_done(running, charge({{0, 10}})));
  EXPECT_EQ(h.said(), (Lines{"grant running", "load both"}));
}

TEST_F(Gang, ALoadThatIsOverByThenMayPass) {
  h.request(h.add("short", charge({{1, 10}}), 2.5));
  EXPECT_EQ(h.said(), Lines{"load short"});
}

TEST_F(Gang, TheChannelIsKeptAlsoWhereOthersHaveToLeaveFirst) {
  // Device 1 is full of an idle model.
  const ModelId idle = h.add("idle", charge({{1, 90}}), 1);
  EXPECT_FALSE(h.load_done(running, charge({{0, 10}})));
  EXPECT_FALSE(h.load_done(both, charge({{0, 40}, {1, 40}})));
  EXPECT_FALSE(h.unload(both));
  for (const LeaseId lease : h.yard().leases_of(both)) EXPECT_FALSE(h.release(lease));
  EXPECT_FALSE(h.unload_done(both));
  h.warm(idle);
  const ModelId again = h.add("again", charge({{0, 10}}), 4);
  h.request(again);
  h.request(both);
  h.pass(seconds{1});
  h.forget();
  h.request(h.add("long", charge({{1, 5}}), 3.5));
  EXPECT_TRUE(h.said().empty());
}

TEST(Devices, AModelGoesWhereTheLeastIsAskedFor) {
  Harness h(options({100, 100}));
  const auto anywhere = [&](const std::string& label) {
    return h.add(label, std::vector<Charge>{charge({{0, 50}}), charge({{1, 50}})});
  };
  // Each device is full of two models; what leaves costs the same on both, but one of those who
  // stay is hot.
  std::vector<ModelId> all;
  for (int i = 0; i < 4; ++i) all.push_back(anywhere("model " + std::to_string(i)));
  for (const ModelId model : all) h.warm(model);
  const ModelId hot = all[3];
  for (int i = 0; i < 50; ++i) EXPECT_FALSE(h.release(h.try_acquire(hot).lease.value()));
  const ModelId next = anywhere("next");
  h.warm(next);
  EXPECT_NE(h.entry(next).placement, h.entry(hot).placement);
}

// --- The bound ----------------------------------------------------------------------------------

// A world that does its worst within its word: loads take L, unloads U, requests use a model for R
// and come so that every model that is resident is in use at all times.
class World {
 public:
  static constexpr Duration kLoad{seconds{2}};
  static constexpr Duration kUnload{milliseconds{500}};
  static constexpr Duration kRun{seconds{3}};

  World(std::int64_t budget, Duration overdue_after)
      : h_([&] {
          YardOptions wanted = options({budget});
          wanted.overdue_after = overdue_after;
          return wanted;
        }()) {}

  ModelId add(const std::string& label, std::int64_t bytes) {
    const ModelId model = h_.add(label, bytes, seconds_of(kLoad));
    models_.push_back(model);
    return model;
  }

  // Time passes in steps of 100 ms. Each of `hammered` is asked for in every step, so that a queue
  // of its own is always longer than anybody else's.
  void pass(Duration wait, const std::vector<ModelId>& hammered) {
    const Tick end = h_.now() + wait;
    while (h_.now() < end) {
      h_.pass(milliseconds{100});
      for (const ModelId model : models_) {
        since(model, State::kLoading, kLoad, [&] { EXPECT_FALSE(h_.load_done(model)); });
        since(model, State::kUnloading, kUnload, [&] { EXPECT_FALSE(h_.unload_done(model)); });
      }
      while (!ends_.empty() && ends_.begin()->first <= h_.now()) {
        EXPECT_FALSE(h_.release(ends_.begin()->second));
        ends_.erase(ends_.begin());
      }
      for (const ModelId model : hammered) {
        const Outcome hit = h_.try_acquire(model);
        if (hit.lease) {
          ends_.emplace(h_.now() + kRun, *hit.lease);
        } else if (h_.entry(model).waiting_count < 200) {
          asked_.push_back(h_.request(model));
        }
      }
      note_granted();
    }
  }

  void ask(ModelId model) { tracked_[model] = {h_.request(model), h_.now()}; }

  // How long the tracked request for a model waited; the time until now if it still does.
  [[nodiscard]] Duration waited(ModelId model) const { return waited_.at(model); }
  [[nodiscard]] bool answered(ModelId model) const { return waited_.contains(model); }

  // See the comment of class Yard; C is a load, which every model in use here has to pay for.
  [[nodiscard]] static Duration bound(Duration overdue_after, int before) {
    return overdue_after + (before + 1) * (kLoad + kUnload + kRun + kLoad);
  }

 private:
  void since(ModelId model, State state, Duration takes, auto&& then) {
    if (h_.state(model) != state) {
      began_.erase({model, state});
      return;
    }
    const Tick began = began_.try_emplace({model, state}, h_.now()).first->second;
    if (h_.now() - began < takes) return;
    began_.erase({model, state});
    then();
  }
  void note_granted() {
    std::erase_if(asked_, [&](TicketId ticket) {
      if (!h_.granted(ticket)) return false;
      ends_.emplace(h_.now() + kRun, h_.lease_of(ticket));
      return true;
    });
    std::erase_if(tracked_, [&](const auto& item) {
      const auto& [ticket, began] = item.second;
      if (!h_.granted(ticket)) return false;
      waited_[item.first] = h_.now() - began;
      ends_.emplace(h_.now() + kRun, h_.lease_of(ticket));
      return true;
    });
  }

  Harness h_;
  std::vector<ModelId> models_;
  std::multimap<Tick, LeaseId> ends_;
  std::vector<TicketId> asked_;
  std::map<std::pair<ModelId, State>, Tick> began_;
  std::map<ModelId, std::pair<TicketId, Tick>> tracked_;
  std::map<ModelId, Duration> waited_;
};

TEST(Bound, AColdModelGetsItsTurnHoweverHotTheOthersAre) {
  World world(100, seconds{30});
  const std::vector<ModelId> hot{world.add("hot a", 50), world.add("hot b", 50)};
  const ModelId cold = world.add("cold", 50);
  world.pass(seconds{60}, hot);
  world.ask(cold);
  world.pass(World::bound(seconds{30}, 2), hot);
  ASSERT_TRUE(world.answered(cold));
  EXPECT_LE(world.waited(cold), World::bound(seconds{30}, 2));
  EXPECT_GE(world.waited(cold), Duration{seconds{30}}) << "or nobody was in its way";
}

TEST(Bound, OneThatNeedsEveryByteIsNotStarvedByManySmallOnes) {
  World world(100, seconds{10});
  std::vector<ModelId> hot;
  for (int i = 0; i < 8; ++i) hot.push_back(world.add("hot " + std::to_string(i), 25));
  const ModelId whole = world.add("whole", 100);
  world.pass(seconds{60}, hot);
  world.ask(whole);
  world.pass(World::bound(seconds{10}, 8), hot);
  ASSERT_TRUE(world.answered(whole));
  EXPECT_LE(world.waited(whole), World::bound(seconds{10}, 8));
}

TEST(Bound, NoneOfManyThatAreAskedForOnceWaitsForLonger) {
  World world(100, seconds{10});
  std::vector<ModelId> hot;
  for (int i = 0; i < 4; ++i) hot.push_back(world.add("hot " + std::to_string(i), 50));
  std::vector<ModelId> cold;
  for (int i = 0; i < 6; ++i) cold.push_back(world.add("cold " + std::to_string(i), 20 + 15 * i));
  world.pass(seconds{40}, hot);
  for (const ModelId model : cold) {
    world.ask(model);
    world.pass(milliseconds{700}, hot);
  }
  // Before each of them the others may be overdue, and the hot ones once each.
  const Duration most = World::bound(seconds{10}, 9);
  world.pass(most, hot);
  for (const ModelId model : cold) {
    ASSERT_TRUE(world.answered(model));
    EXPECT_LE(world.waited(model), most);
  }
}

}  // namespace
}  // namespace modelyard::test

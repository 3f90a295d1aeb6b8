// A device that is behind with its work gives a model away: when, whom, where to, and when not.

#include <gtest/gtest.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "harness.hpp"

namespace modelyard::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Two devices. The first holds "hot" and "warm" and ends a request a second, the second holds
// "other", which nobody asks for any more. All of them may be on either; loads take a second. Two
// models share what is asked of the first device, so that either would take the same off it: the
// one that is asked for less leaves, since what is asked of the second is a little above nothing.
class Behind : public ::testing::Test {
 protected:
  Harness h{options({100, 100})};
  ModelId hot = on(0, "hot");
  ModelId warm = on(0, "warm");
  ModelId other = on(1, "other");
  std::deque<std::pair<ModelId, LeaseId>> line;  // Of the first device.

  static std::vector<Charge> anywhere(std::int64_t bytes = 40) {
    return {charge({{0, bytes}}), charge({{1, bytes}})};
  }
  ModelId on(std::uint32_t where, const std::string& label) {
    const ModelId model = h.add(label, charge({{where, 40}}));
    h.warm(model);
    EXPECT_FALSE(h.update_placements(model, anywhere()));
    return model;
  }
  void ask(ModelId model, int times = 1) {
    for (int i = 0; i < times; ++i) {
      if (const auto lease = h.try_acquire(model).lease) line.emplace_back(model, *lease);
    }
  }
  void end_one() {
    EXPECT_FALSE(h.release(line.front().second));
    line.pop_front();
  }
  // Each second one request ends, and as many come as are said.
  void keep_on(int for_seconds, int of_hot, int of_warm) {
    for (int i = 0; i < for_seconds && !line.empty(); ++i) {
      h.pass(seconds{1});
      end_one();
      ask(hot, of_hot);
      ask(warm, of_warm);
    }
  }
  // The first device has ten seconds of work for each of its models.
  void fall_behind() {
    ask(hot, 10);
    ask(warm, 8);
  }
  // All that has been given runs to its end.
  void serve_all() {
    while (!line.empty()) {
      h.pass(milliseconds{100});
      end_one();
    }
  }
  void TearDown() override { serve_all(); }
  [[nodiscard]] std::vector<std::string> given_away() const {
    std::vector<std::string> found;
    for (const Decision decision : {Decision::kDrained, Decision::kEvicted}) {
      for (const Explanation& each : h.explained(decision)) {
        if (each.why != Why::kDeviceBehind) continue;
        EXPECT_EQ(each.device, device(0));
        EXPECT_EQ(each.cause, ModelId{});
        found.push_back(h.label(each.model));
      }
    }
    return found;
  }
  [[nodiscard]] DeviceIndex home(ModelId model) const { return h.entry(model).home; }
};

TEST_F(Behind, AModelServesWhatItHasLeavesAndIsLoadedElsewhere) {
  fall_behind();
  h.forget();
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  EXPECT_EQ(h.said(), Lines{"drain warm"});
  const TicketId next = h.request(warm);
  serve_all();
  EXPECT_EQ(h.said(), Lines{"unload warm"}) << "after the last of its requests";
  EXPECT_FALSE(h.unload_done(warm));
  EXPECT_EQ(h.said(), Lines{"load warm"});
  EXPECT_FALSE(h.load_done(warm));
  EXPECT_TRUE(h.granted(next));
  EXPECT_EQ(home(warm), device(1));
  EXPECT_EQ(home(hot), device(0));
}

TEST_F(Behind, ABurstThatIsOverWithinTenSecondsMovesNobody) {
  for (int burst = 0; burst < 5; ++burst) {
    ask(hot, 10);
    for (int i = 0; i < 10; ++i) keep_on(1, 0, 0);
    h.pass(seconds{1});
  }
  EXPECT_EQ(given_away(), Lines{});
}

TEST_F(Behind, TheOneThatTakesMostOffForASecondOfLoadingGoes) {
  const ModelId slow = h.add("slow", charge({{0, 20}}), 8);
  h.warm(slow);
  EXPECT_FALSE(h.update_placements(slow, anywhere(20)));
  fall_behind();
  ask(slow, 18);
  keep_on(14, 1, 0);
  // It is asked for as often as both of the others, and its load takes eight times as long.
  EXPECT_EQ(given_away(), Lines{"hot"});
}

TEST_F(Behind, AModelThatIsAllOfTheWorkStays) {
  ask(hot, 30);
  keep_on(20, 1, 0);
  EXPECT_EQ(given_away(), Lines{}) << "another device would only be behind in its stead";
}

TEST_F(Behind, NobodyMovesToADeviceThatIsBehindAsWell) {
  fall_behind();
  std::deque<LeaseId> there;
  for (int i = 0; i < 20; ++i) there.push_back(h.try_acquire(other).lease.value());
  for (int i = 0; i < 18; ++i) {
    EXPECT_FALSE(h.release(there.front()));
    there.pop_front();
    there.push_back(h.try_acquire(other).lease.value());
    keep_on(1, 1, 1);
  }
  EXPECT_EQ(given_away(), Lines{});
  while (!there.empty()) {
    EXPECT_FALSE(h.release(there.front()));
    there.pop_front();
  }
}

TEST_F(Behind, PinnedModelsStay) {
  EXPECT_FALSE(h.pin(warm));
  fall_behind();
  keep_on(14, 1, 1);
  EXPECT_EQ(given_away(), Lines{"hot"});
}

TEST_F(Behind, AModelStaysWithALeaseThatLasts) {
  ask(warm);
  ASSERT_TRUE(h.raw().set_aside(line.front().second));
  const auto lasts = line.front();
  line.pop_front();
  fall_behind();
  keep_on(14, 1, 1);
  EXPECT_EQ(given_away(), Lines{"hot"});
  EXPECT_EQ(h.entry(warm).aside_count, 1U);
  line.push_front(lasts);
  end_one();
  EXPECT_EQ(h.entry(warm).aside_count, 0U);
}

TEST_F(Behind, WhoMayBeNowhereElseStays) {
  EXPECT_FALSE(h.update_placements(hot, {charge({{0, 40}})}));
  EXPECT_FALSE(h.update_placements(warm, {charge({{0, 40}}), charge({{0, 20}, {1, 20}})}));
  fall_behind();
  keep_on(14, 1, 1);
  EXPECT_EQ(given_away(), Lines{});
}

TEST_F(Behind, NobodyGoesWhereNobodyWouldMakeRoom) {
  EXPECT_FALSE(h.set_budget(1, 60));
  EXPECT_FALSE(h.pin(other));
  fall_behind();
  keep_on(14, 1, 1);
  EXPECT_EQ(given_away(), Lines{});
  EXPECT_FALSE(h.unpin(other));
  keep_on(1, 1, 1);
  EXPECT_EQ(given_away(), Lines{"warm"});
}

TEST_F(Behind, WhoHasJustComeIsUsedForAsLongAsItsLoadTook) {
  const ModelId late = h.add("late", charge({{0, 20}}), 6);
  fall_behind();
  EXPECT_FALSE(h.pin(warm));
  EXPECT_FALSE(h.pin(hot));
  keep_on(8, 1, 1);
  const TicketId first = h.request(late);
  EXPECT_FALSE(h.load_done(late, charge({{0, 20}}), seconds{6}));
  line.emplace_back(late, h.lease_of(first));
  EXPECT_FALSE(h.update_placements(late, anywhere(20)));
  ask(late, 9);
  keep_on(5, 1, 1);
  EXPECT_EQ(given_away(), Lines{}) << "in use for five seconds, loaded in six";
  keep_on(2, 1, 1);
  EXPECT_EQ(given_away(), Lines{"late"});
}

TEST_F(Behind, OneAtATimeAndTheNextWhenThatCanHaveHelped) {
  const ModelId third = h.add("third", charge({{0, 20}}));
  h.warm(third);
  EXPECT_FALSE(h.update_placements(third, anywhere(20)));
  fall_behind();
  ask(third, 10);
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away().size(), 1U);
  const double left = h.yard().backlog_seconds(device(0));
  keep_on(static_cast<int>(left), 1, 1);
  EXPECT_EQ(given_away().size(), 1U) << "what was given before still runs";
}

TEST_F(Behind, ItComesBackWhereThereIsNoOtherDevice) {
  fall_behind();
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  const TicketId next = h.request(warm);
  EXPECT_FALSE(h.set_closed(1, true));
  serve_all();
  h.finish_io();
  EXPECT_TRUE(h.granted(next));
  EXPECT_EQ(home(warm), device(0));
}

TEST_F(Behind, ItComesBackWhenItsRequestsHaveWaitedTooLong) {
  EXPECT_FALSE(h.set_budget(1, 60));
  fall_behind();
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  EXPECT_FALSE(h.pin(other));
  const TicketId next = h.request(warm);
  serve_all();
  h.finish_io();
  EXPECT_TRUE(h.waiting(next)) << "where it is to go somebody was pinned";
  h.pass(seconds{30});
  h.finish_io();
  EXPECT_TRUE(h.granted(next));
  EXPECT_EQ(home(warm), device(0));
}

TEST_F(Behind, WhoIsAskedForNoMoreIsColdAndGoesElsewhereTheNextTime) {
  fall_behind();
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  serve_all();
  h.finish_io();
  EXPECT_EQ(h.state(warm), State::kCold);
  h.warm(warm);
  EXPECT_EQ(home(warm), device(1));
  EXPECT_EQ(h.yard().departures().count(Why::kDeviceBehind), 1U);
}

TEST_F(Behind, AFewRequestsThatTakeSecondsEachMoveNobody) {
  ask(hot, 4);
  ask(warm, 4);
  for (int i = 0; i < 15; ++i) {
    h.pass(seconds{4});
    end_one();
    ask(i % 2 == 0 ? hot : warm);
  }
  EXPECT_GT(h.yard().backlog_seconds(device(0)), 2);
  EXPECT_EQ(given_away(), Lines{}) << "eight that run side by side, and nobody waits";
  ask(hot, 2);
  for (int i = 0; i < 5; ++i) {
    h.pass(seconds{4});
    end_one();
    ask(i % 2 == 0 ? hot : warm);
  }
  EXPECT_EQ(given_away().size(), 1U);
}

TEST_F(Behind, WhoseRequestsAreOverdueWhenItHasLeftGoesElsewhereAllTheSame) {
  fall_behind();
  ask(hot, 40);
  ask(warm, 40);
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  const TicketId next = h.request(warm);
  keep_on(60, 1, 0);
  ASSERT_TRUE(h.waiting(next)) << "it still serves what it had";
  serve_all();
  h.finish_io();
  EXPECT_TRUE(h.granted(next));
  EXPECT_EQ(home(warm), device(1)) << "it would have left in vain";
}

TEST_F(Behind, ItComesBackForADeadlineThatCannotWait) {
  EXPECT_FALSE(h.set_budget(1, 60));
  fall_behind();
  keep_on(14, 1, 1);
  ASSERT_EQ(given_away(), Lines{"warm"});
  EXPECT_FALSE(h.pin(other));
  serve_all();
  h.finish_io();
  // A load takes one of its seconds. It waits for the other device for half of the rest.
  const TicketId next = h.request(warm, h.now() + seconds{5});
  h.pass(milliseconds{1900});
  h.finish_io();
  EXPECT_TRUE(h.waiting(next));
  h.pass(milliseconds{200});
  h.finish_io();
  EXPECT_TRUE(h.granted(next));
  EXPECT_EQ(home(warm), device(0));
}

// Three devices. The first and the last are behind, and the last has the most room; the middle one
// idles, full of models that nobody uses.
class TwoBehind : public ::testing::Test {
 protected:
  Harness h{options({100, 100, 200})};
  std::deque<LeaseId> first;
  std::deque<LeaseId> last;

  static std::vector<Charge> anywhere() {
    return {charge({{0, 40}}), charge({{1, 40}}), charge({{2, 40}})};
  }
  ModelId on(std::uint32_t where, const std::string& label) {
    const ModelId model = h.add(label, charge({{where, 40}}));
    h.warm(model);
    EXPECT_FALSE(h.update_placements(model, anywhere()));
    return model;
  }
  void ask(ModelId model, std::deque<LeaseId>& line, int times = 1) {
    for (int i = 0; i < times; ++i) {
      if (const auto lease = h.try_acquire(model).lease) line.push_back(*lease);
    }
  }
  void end_one(std::deque<LeaseId>& line) {
    EXPECT_FALSE(h.release(line.front()));
    line.pop_front();
  }
  void TearDown() override {
    while (!first.empty()) end_one(first);
    while (!last.empty()) end_one(last);
  }
};

TEST_F(TwoBehind, AModelGoesWhereItWasGivenToAndNotWhereMostRoomIs) {
  const ModelId hot = on(0, "hot");
  const ModelId warm = on(0, "warm");
  on(1, "idle");
  on(1, "idle too");
  const ModelId busy = on(2, "busy");
  ask(hot, first, 20);
  ask(warm, first, 18);
  ask(busy, last, 35);
  while (h.state(warm) == State::kResident && h.state(hot) == State::kResident) {
    ASSERT_LT(h.now(), Harness::at(seconds{20}));
    h.pass(seconds{1});
    end_one(first);
    end_one(last);
    ask(hot, first);
    ask(warm, first);
    ask(busy, last);
  }
  const ModelId given = h.state(warm) == State::kResident ? hot : warm;
  const TicketId next = h.request(given);
  while (!first.empty()) end_one(first);
  h.finish_io();
  ASSERT_TRUE(h.granted(next));
  EXPECT_EQ(h.entry(given).home, device(1)) << "the last device is behind as well";
  EXPECT_FALSE(h.release(next));
}

TEST_F(TwoBehind, WhatWasGivenToADeviceCountsAsAskedOfIt) {
  const ModelId hot = on(0, "hot");
  const ModelId warm = on(0, "warm");
  const ModelId busy = on(2, "busy");
  const ModelId brisk = on(2, "brisk");
  EXPECT_FALSE(h.update_placements(hot, {charge({{0, 40}})}));
  EXPECT_FALSE(h.update_placements(warm, {charge({{0, 40}}), charge({{1, 40}})}));
  EXPECT_FALSE(h.update_placements(busy, {charge({{2, 40}})}));
  EXPECT_FALSE(h.update_placements(brisk, {charge({{2, 40}}), charge({{1, 40}})}));
  ask(hot, first, 60);
  ask(warm, first, 40);
  ask(busy, last, 10);
  ask(brisk, last, 40);
  for (int i = 0; i < 20; ++i) {
    h.pass(seconds{1});
    end_one(first);
    end_one(last);
    ask(hot, first);
    ask(busy, last);
  }
  // The first device is the furthest behind. Once its model is on its way the middle device will
  // be asked for so much that the last one would only be relieved at its cost.
  EXPECT_EQ(h.state(warm), State::kDraining);
  EXPECT_EQ(h.state(brisk), State::kResident);
}

TEST(OneDevice, IsBehindAndKeepsItsModels) {
  Harness h(options({100}));
  const ModelId model = h.add("model", 40);
  h.warm(model);
  std::deque<LeaseId> line;
  for (int i = 0; i < 40; ++i) line.push_back(h.try_acquire(model).lease.value());
  for (; !line.empty(); line.pop_front()) {
    h.pass(seconds{1});
    EXPECT_FALSE(h.release(line.front()));
  }
  EXPECT_EQ(h.state(model), State::kResident);
}

}  // namespace
}  // namespace modelyard::test

#include "modelyard/regret.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "harness.hpp"

namespace modelyard::test {
namespace {

double regret(const Harness& h) {
  return h.yard().counters().load_seconds - h.yard().lru_bill().seconds();
}

// A request alone: a hit, or a load that takes so long.
void ask(Harness& h, ModelId model, int load_seconds) {
  const Outcome hit = h.try_acquire(model);
  if (hit.lease) {
    EXPECT_FALSE(h.release(*hit.lease));
    return;
  }
  const TicketId ticket = h.request(model);
  const std::vector<Explanation> evicted = h.explained(Decision::kEvicted);
  if (!evicted.empty() && h.state(evicted.back().model) == State::kUnloading) {
    EXPECT_FALSE(h.unload_done(evicted.back().model));
  }
  ASSERT_EQ(h.state(model), State::kLoading);
  EXPECT_FALSE(h.load_done(model, h.held(model), seconds{load_seconds}));
  EXPECT_FALSE(h.release(ticket));
}

TEST(LruBill, WhatTheYardLacksTooCostsWhatItsNextLoadTakes) {
  LruBill bill;
  bill.add(0);
  bill.missed(0, 100, false);
  bill.missed(0, 100, false);
  EXPECT_EQ(bill.seconds(), 0) << "nobody knows yet what that load takes";
  bill.measured(0, 3);
  EXPECT_EQ(bill.seconds(), 6);
  bill.measured(0, 5);
  EXPECT_EQ(bill.seconds(), 6) << "what was owed is paid once";
  bill.missed(0, 4, true);
  EXPECT_EQ(bill.seconds(), 10) << "what the yard has costs what is expected";
  bill.missed(0, 4, false);
  bill.measured(0, 7);
  EXPECT_EQ(bill.seconds(), 17) << "later loads are like the first";
  EXPECT_EQ(bill.misses(), 4U);
}

TEST(LruBill, ASlotThatStartsAnewOwesNothing) {
  LruBill bill;
  bill.add(0);
  bill.missed(0, 1, false);
  bill.add(0);
  bill.measured(0, 3);
  EXPECT_EQ(bill.seconds(), 0);
}

class EveryYard : public ::testing::TestWithParam<std::string_view> {
 protected:
  static YardOptions options_of(std::string_view policy) {
    YardOptions made = options({100});
    made.policy = policy;
    return made;
  }

  Harness h_{options_of(GetParam())};
  // Room for two of them. The guesses are wrong, and are not to matter.
  ModelId a_{h_.add("a", 40, 100)};
  ModelId b_{h_.add("b", 40, 100)};
  ModelId c_{h_.add("c", 40, 100)};
};

TEST_P(EveryYard, FirstLoadsCancel) {
  ask(h_, a_, 1);
  ask(h_, b_, 2);
  ask(h_, a_, 1);
  EXPECT_EQ(h_.yard().counters().load_seconds, 3);
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 3);
  EXPECT_EQ(h_.yard().lru_bill().misses(), 2U);
}

// Both load each time, whatever that takes and whoever expected what.
TEST_P(EveryYard, WhatBothLoadIsNotRegretted) {
  EXPECT_FALSE(h_.set_budget(0, 60));  // For one of them.
  for (const int took : {5, 1, 7, 2}) {
    ask(h_, a_, took);
    ask(h_, b_, 10 * took);
  }
  EXPECT_EQ(h_.yard().counters().load_seconds, 15 * 11);
  EXPECT_EQ(regret(h_), 0);
}

TEST_P(EveryYard, AFailedLoadCostsNobody) {
  const TicketId ticket = h_.request(a_);
  EXPECT_FALSE(h_.load_failed(a_, LoadFailure::kTransient));
  EXPECT_TRUE(h_.refused(ticket));
  EXPECT_EQ(h_.yard().lru_bill().misses(), 1U);
  EXPECT_EQ(regret(h_), 0);
  h_.skip(seconds{100});
  ask(h_, a_, 3);  // For LRU it is there.
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 3);
  EXPECT_EQ(regret(h_), 0);
}

// A pinned model leaves room for one of the others, which take turns. LRU has no pins: its room is
// for both.
TEST_P(EveryYard, WhatLruWouldHaveHeldIsRegretted) {
  ask(h_, a_, 1);
  EXPECT_FALSE(h_.pin(a_));
  ask(h_, b_, 2);
  ask(h_, c_, 3);
  EXPECT_EQ(regret(h_), 0) << "three first loads";
  ask(h_, b_, 2);
  EXPECT_EQ(regret(h_), 2);
  ask(h_, c_, 3);
  EXPECT_EQ(regret(h_), 5);
  EXPECT_EQ(h_.yard().counters().load_seconds, 11);
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 6);
  // It is LRU that lacks this one. The price is what its load has taken.
  ask(h_, a_, 99);
  EXPECT_EQ(regret(h_), 4);
}

// LRU takes requests in the order in which they come, and has room for two of the three.
TEST_P(EveryYard, WhatGroupingSavesIsARegretBelowZero) {
  std::multimap<ModelId, TicketId> tickets;
  for (int round = 0; round < 2; ++round) {
    for (const ModelId model : {a_, b_, c_}) tickets.emplace(model, h_.request(model));
  }
  for (const ModelId model : {a_, b_, c_}) {
    for (const ModelId each : {a_, b_, c_}) {
      if (h_.state(each) == State::kUnloading) {
        EXPECT_FALSE(h_.unload_done(each));
      }
    }
    ASSERT_EQ(h_.state(model), State::kLoading) << h_.label(model);
    EXPECT_FALSE(h_.load_done(model, h_.held(model), seconds{2}));
    const auto [first, last] = tickets.equal_range(model);
    for (auto each = first; each != last; ++each) EXPECT_FALSE(h_.release(each->second));
  }
  EXPECT_EQ(h_.yard().counters().load_seconds, 6);
  EXPECT_EQ(h_.yard().lru_bill().misses(), 6U);
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 12);
}

TEST_P(EveryYard, AModelThatNeverLoadsCostsLruNothing) {
  const ModelId giant = h_.add("giant", 1000);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(h_.refused(h_.request(giant)));
  EXPECT_EQ(h_.yard().lru_bill().misses(), 3U);
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 0);
}

TEST_P(EveryYard, ACloneHasABillOfItsOwn) {
  ask(h_, a_, 1);
  Yard other = h_.yard().clone();
  Actions out;
  ASSERT_TRUE(other.request(b_, h_.now(), kNever, out).ok());
  ASSERT_TRUE(other.load_done(b_, h_.now(), charge({{0, 40}}), seconds{7}, out));
  EXPECT_EQ(other.lru_bill().seconds(), 8);
  EXPECT_EQ(h_.yard().lru_bill().seconds(), 1);
}

TEST_P(EveryYard, LruKnowsTheBudgetOfNow) {
  ask(h_, a_, 1);
  ask(h_, b_, 1);
  ask(h_, c_, 1);  // LRU has b and c.
  EXPECT_FALSE(h_.set_budget(0, 50));
  h_.finish_io();
  const std::uint64_t before = h_.yard().lru_bill().misses();
  ask(h_, b_, 1);
  EXPECT_EQ(h_.yard().lru_bill().misses(), before) << "what is there stays until the next miss";
  ask(h_, a_, 1);
  ask(h_, b_, 1);
  ask(h_, a_, 1);
  EXPECT_EQ(h_.yard().lru_bill().misses(), before + 3) << "there is room for one";
}

INSTANTIATE_TEST_SUITE_P(Regret, EveryYard, ::testing::ValuesIn(policy_names()),
                         [](const auto& each) {
                           std::string name(each.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace modelyard::test

#include "modelyard/planner.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"

namespace modelyard::test {
namespace {

// Gives every entry the score it was told to have, and remembers what it was shown.
class FixedPolicy final : public Policy {
 public:
  explicit FixedPolicy(std::map<EntryIndex, double> scores) : scores_(std::move(scores)) {}
  [[nodiscard]] std::string_view name() const override { return "fixed"; }
  [[nodiscard]] std::unique_ptr<Policy> clone() const override {
    return std::make_unique<FixedPolicy>(*this);
  }
  void on_add(EntryIndex) override {}
  void on_replace(EntryIndex, EntryIndex) override {}
  void on_request(const Wish&, RequestClock) override {}
  [[nodiscard]] double score(const Candidate& candidate, RequestClock) const override {
    weights[candidate.entry] = candidate.weight;
    reload_seconds[candidate.entry] = candidate.reload_seconds;
    return scores_.at(candidate.entry);
  }

  mutable std::map<EntryIndex, double> weights;
  mutable std::map<EntryIndex, double> reload_seconds;

 private:
  std::map<EntryIndex, double> scores_;
};

// Residents with their charges and scores, and two budgets of 100.
class Yardful {
 public:
  Yardful& with(const Charge& held, double score, bool leased = false, double reload_seconds = 1) {
    const auto entry = static_cast<EntryIndex>(charges_.size());
    charges_.push_back(held);
    residents_.push_back(Resident{.entry = entry,
                                  .held = &charges_.back(),
                                  .reload_seconds = reload_seconds,
                                  .leased = leased});
    scores_[entry] = score;
    return *this;
  }
  [[nodiscard]] std::optional<Plan> plan(const Charge& shortfall) const {
    const FixedPolicy policy(scores_);
    return plan_eviction(residents_, shortfall, budgets_, policy, 0);
  }
  [[nodiscard]] std::optional<Plan> plan(const Charge& shortfall, const Policy& policy) const {
    return plan_eviction(residents_, shortfall, budgets_, policy, 0);
  }
  [[nodiscard]] const std::deque<Charge>& charges() const { return charges_; }
  [[nodiscard]] const std::vector<Resident>& residents() const { return residents_; }
  [[nodiscard]] const std::map<EntryIndex, double>& scores() const { return scores_; }

 private:
  std::deque<Charge> charges_;  // Residents point into it.
  std::vector<Resident> residents_;
  std::map<EntryIndex, double> scores_;
  std::vector<Bytes> budgets_{Bytes{100}, Bytes{100}};
};

std::vector<EntryIndex> chosen(const std::optional<Plan>& plan) {
  std::vector<EntryIndex> entries;
  if (!plan) return {999};
  for (const Victim& victim : plan->victims) entries.push_back(victim.entry);
  return entries;
}

using Entries = std::vector<EntryIndex>;

TEST(Planner, NobodyLeavesIfNothingIsShort) {
  const auto plan = Yardful().with(charge({{0, 10}}), 1).plan(Charge{});
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->victims.empty());
  EXPECT_EQ(plan->cost, 0);
}

TEST(Planner, TakesTheLowestScoreFirst) {
  Yardful yard;
  yard.with(charge({{0, 10}}), 3).with(charge({{0, 10}}), 1).with(charge({{0, 10}}), 2);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 10}}))), (Entries{1}));
  EXPECT_EQ(chosen(yard.plan(charge({{0, 20}}))), (Entries{1, 2}));
  EXPECT_EQ(chosen(yard.plan(charge({{0, 21}}))), (Entries{1, 2, 0}));
}

TEST(Planner, HasNoPlanIfAllTogetherDoNotSuffice) {
  Yardful yard;
  yard.with(charge({{0, 10}, {1, 5}}), 1).with(charge({{0, 10}}), 2, true);
  EXPECT_FALSE(yard.plan(charge({{0, 21}})));
  EXPECT_FALSE(yard.plan(charge({{0, 1}, {1, 6}})));
  EXPECT_TRUE(yard.plan(charge({{0, 20}, {1, 5}})));
  EXPECT_FALSE(Yardful().plan(charge({{0, 1}})));
}

TEST(Planner, LeavesModelsAloneThatHoldNothingWhereSomethingIsShort) {
  Yardful yard;
  yard.with(charge({{1, 50}}), 0.1).with(charge({{0, 50}}), 9);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 10}}))), (Entries{1}));
}

TEST(Planner, StopsLookingAtADeviceThatIsCovered) {
  Yardful yard;
  // After entry 0 device 0 is covered: entry 1 no longer helps, entry 2 does.
  yard.with(charge({{0, 50}}), 1).with(charge({{0, 50}}), 2).with(charge({{1, 50}}), 3);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 30}, {1, 30}}))), (Entries{0, 2}));
}

TEST(Planner, IdleModelsGoBeforeModelsInUse) {
  Yardful yard;
  yard.with(charge({{0, 50}}), 1, true).with(charge({{0, 50}}), 9, false);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 50}}))), (Entries{1}));
  const auto both = yard.plan(charge({{0, 60}}));
  ASSERT_TRUE(both);
  EXPECT_EQ(both->victims.size(), 2U);
  for (const Victim& victim : both->victims) EXPECT_EQ(victim.leased, victim.entry == 0);
}

TEST(Planner, GivesBackWhatTheOthersMakeUnnecessary) {
  Yardful yard;
  // By score 0, then 1, are taken; 1 alone covers it, so 0 stays.
  yard.with(charge({{0, 10}}), 1).with(charge({{0, 60}}), 2);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 40}}))), (Entries{1}));
}

TEST(Planner, GivesBackTheMostValuableFirst) {
  Yardful yard;
  // 0, 1 and 2 are taken. Either 0 or 1 may then stay, not both: the one with the higher score
  // does.
  yard.with(charge({{0, 20}}), 1).with(charge({{0, 20}}), 2).with(charge({{0, 50}}), 3);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 60}}))), (Entries{0, 2}));
}

TEST(Planner, CostIsTheSumOfTheVictimsScores) {
  Yardful yard;
  yard.with(charge({{0, 10}}), 1.5).with(charge({{0, 60}}), 2.25).with(charge({{0, 20}}), 4);
  const auto plan = yard.plan(charge({{0, 80}}));
  ASSERT_TRUE(plan);
  double sum = 0;
  for (const Victim& victim : plan->victims) {
    EXPECT_EQ(victim.score, yard.scores().at(victim.entry));
    sum += victim.score;
  }
  EXPECT_DOUBLE_EQ(plan->cost, sum);
  EXPECT_DOUBLE_EQ(plan->cost, 6.25);
}

TEST(Planner, WeighsBytesOnTheShortDevicesOnly) {
  Yardful yard;
  yard.with(charge({{0, 50}, {1, 20}}), 1, false, 7).with(charge({{0, 10}, {1, 80}}), 2);
  const FixedPolicy one(yard.scores());
  ASSERT_TRUE(yard.plan(charge({{0, 55}}), one));
  EXPECT_DOUBLE_EQ(one.weights.at(0), 0.5);
  EXPECT_DOUBLE_EQ(one.weights.at(1), 0.1);
  EXPECT_DOUBLE_EQ(one.reload_seconds.at(0), 7);
  const FixedPolicy two(yard.scores());
  ASSERT_TRUE(yard.plan(charge({{0, 55}, {1, 5}}), two));
  EXPECT_DOUBLE_EQ(two.weights.at(0), 0.7);
  EXPECT_DOUBLE_EQ(two.weights.at(1), 0.9);
}

TEST(Planner, ABudgetOfZeroDoesNotConfuseIt) {
  const std::vector<Bytes> budgets{Bytes{0}};
  const Charge held = charge({{0, 10}});
  const std::vector<Resident> residents{
      Resident{.entry = 0, .held = &held, .reload_seconds = 1, .leased = false}};
  for (const std::string_view name : policy_names()) {
    const std::unique_ptr<Policy> policy = make_policy(name);
    policy->on_budgets(budgets);
    policy->on_add(0);
    policy->on_request(Wish{.entry = 0, .held = &held, .weight = 10, .reload_seconds = 1}, 1);
    const auto plan = plan_eviction(residents, charge({{0, 10}}), budgets, *policy, 1);
    ASSERT_TRUE(plan) << name;
    EXPECT_EQ(plan->victims.size(), 1U);
    EXPECT_TRUE(std::isfinite(plan->cost)) << name;
  }
}

// The rule in the header, word for word and slowly; idle models only.
Entries slow_plan(const Yardful& yard, const Charge& shortfall) {
  Entries taken;
  const auto freed = [&](const Entries& entries) {
    Charge total;
    for (const EntryIndex entry : entries) total = sum(total, yard.charges()[entry]);
    return total;
  };
  while (!shortfall.fits_within(freed(taken))) {
    const Charge missing = shortfall.saturating_minus(freed(taken));
    std::optional<EntryIndex> best;
    for (const Resident& each : yard.residents()) {
      bool helps = std::find(taken.begin(), taken.end(), each.entry) == taken.end();
      bool bytes_there = false;
      missing.for_each([&](DeviceIndex at, Bytes) {
        bytes_there = bytes_there || each.held->on(at) > Bytes{0};
      });
      helps = helps && bytes_there;
      if (helps && (!best || yard.scores().at(each.entry) < yard.scores().at(*best))) {
        best = each.entry;
      }
    }
    if (!best) return {999};
    taken.push_back(*best);
  }
  Entries by_score = taken;
  std::sort(by_score.begin(), by_score.end(),
            [&](EntryIndex a, EntryIndex b) { return yard.scores().at(a) > yard.scores().at(b); });
  for (const EntryIndex entry : by_score) {
    Entries without = taken;
    std::erase(without, entry);
    if (shortfall.fits_within(freed(without))) taken = without;
  }
  return taken;
}

struct Draw {
  Yardful yard;
  Charge shortfall;
};

Draw draw(std::uint32_t seed, bool with_leased) {
  std::mt19937 random(seed);
  Draw made;
  const auto below = [&](std::uint32_t n) { return static_cast<std::int64_t>(random() % n); };
  const auto some = [&](std::uint32_t most) {
    Charge held;
    for (std::uint32_t i = 0; i < 2; ++i) {
      if (below(3) != 0) held.set(device(i), Bytes{below(most)});
    }
    return held;
  };
  std::vector<double> scores;
  const std::int64_t count = 1 + below(9);
  for (std::int64_t i = 0; i < count; ++i) scores.push_back(static_cast<double>(i) + 0.5);
  std::shuffle(scores.begin(), scores.end(), random);
  for (const double score : scores) {
    const Charge held = some(40);
    made.yard.with(held, score, with_leased && below(3) == 0);
  }
  made.shortfall = some(90);
  return made;
}

TEST(Planner, AgreesWithTheSlowRuleOnRandomYards) {
  std::size_t plans = 0;
  for (std::uint32_t seed = 1; seed <= 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Draw given = draw(seed, false);
    const auto plan = given.yard.plan(given.shortfall);
    const Entries expected = slow_plan(given.yard, given.shortfall);
    ASSERT_EQ(chosen(plan), expected);
    plans += plan ? 1 : 0;
  }
  EXPECT_GT(plans, 500U) << "the draws are too hard to say anything";
}

// No proper subset of `plan` may cover the shortfall. Returns the first victim that is not needed.
std::optional<EntryIndex> needless(const Plan& plan, const Yardful& yard, const Charge& shortfall) {
  for (const Victim& left_out : plan.victims) {
    Charge freed;
    for (const Victim& each : plan.victims) {
      if (each.entry != left_out.entry) freed = sum(freed, yard.charges()[each.entry]);
    }
    if (shortfall.fits_within(freed)) return left_out.entry;
  }
  return std::nullopt;
}

TEST(Planner, PlansAreCompleteMinimalAndSpareModelsInUse) {
  std::size_t plans = 0;
  std::size_t plans_with_leased = 0;
  for (std::uint32_t seed = 1; seed <= 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Draw given = draw(seed, true);
    Charge all;
    Charge idle;
    for (const Resident& each : given.yard.residents()) {
      all = sum(all, *each.held);
      if (!each.leased) idle = sum(idle, *each.held);
    }
    const auto plan = given.yard.plan(given.shortfall);
    ASSERT_EQ(plan.has_value(), given.shortfall.fits_within(all));
    if (!plan) continue;
    ++plans;
    std::set<EntryIndex> distinct;
    Charge freed;
    bool any_leased = false;
    for (const Victim& victim : plan->victims) {
      ASSERT_TRUE(distinct.insert(victim.entry).second);
      ASSERT_EQ(victim.leased, given.yard.residents()[victim.entry].leased);
      freed = sum(freed, given.yard.charges()[victim.entry]);
      any_leased = any_leased || victim.leased;
    }
    ASSERT_TRUE(given.shortfall.fits_within(freed));
    ASSERT_EQ(needless(*plan, given.yard, given.shortfall), std::nullopt);
    if (given.shortfall.fits_within(idle)) {
      ASSERT_FALSE(any_leased);
    }
    plans_with_leased += any_leased ? 1 : 0;
  }
  EXPECT_GT(plans, 500U);
  EXPECT_GT(plans_with_leased, 50U);
}

TEST(Planner, ThePlanCheckItselfFindsAVictimTooMany) {
  Yardful yard;
  yard.with(charge({{0, 10}}), 1).with(charge({{0, 60}}), 2);
  Plan greedy;
  greedy.victims = {Victim{.entry = 0, .score = 1, .leased = false},
                    Victim{.entry = 1, .score = 2, .leased = false}};
  EXPECT_EQ(needless(greedy, yard, charge({{0, 40}})), EntryIndex{0});
}

// --- Shares, against a brute force over all sets of victims -------------------------------------

// Models on two devices that hold shares with each other and with models that nobody asks: on one
// device pinned ones that stay, or ones that drain.
struct SharingDraw {
  std::deque<Charge> charges;
  std::deque<std::vector<ShareId>> lists;
  std::vector<Resident> residents;
  std::vector<ShareId> ids;
  ShareTable table;
  std::map<EntryIndex, double> scores;
  std::vector<ShareId> wanted;
  Sharing sharing;
  Charge shortfall;
};

std::unique_ptr<SharingDraw> draw_sharing(std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](std::uint32_t n) { return static_cast<std::uint32_t>(random() % n); };
  auto made = std::make_unique<SharingDraw>();
  const std::uint32_t shares = 1 + below(4);
  for (std::uint32_t i = 0; i < shares; ++i) {
    Share share;
    share.bytes = Bytes{1 + below(below(3) == 0 ? 3 : 30)};
    made->ids.push_back(made->table.insert(share));
  }
  const auto hold = [&](ShareId id, DeviceIndex on, Holding holding) {
    ++made->table.find(id)->on(on).by[static_cast<std::size_t>(holding)];
  };
  const std::uint32_t count = 1 + below(6);
  for (std::uint32_t i = 0; i < count; ++i) {
    const DeviceIndex on = device(below(4) == 0 ? 1 : 0);
    std::vector<ShareId> list;
    for (const ShareId id : made->ids) {
      if (below(2) == 0) list.push_back(id);
    }
    for (const ShareId id : list) hold(id, on, Holding::kResident);
    Charge own;
    if (below(3) != 0) own.set(device(below(2)), Bytes{below(25)});
    made->charges.push_back(own);
    made->lists.push_back(list);
    made->residents.push_back(Resident{.entry = i,
                                       .held = &made->charges.back(),
                                       .reload_seconds = 1,
                                       .leased = below(3) == 0,
                                       .shares = made->lists.back(),
                                       .shares_on = list.empty() ? kNoDevice : on});
    made->scores[i] = static_cast<double>(1 + below(50));
  }
  for (const ShareId id : made->ids) {  // Others that hold it and are no candidates.
    if (below(6) == 0) hold(id, device(0), Holding::kResident);
    if (below(6) == 0) hold(id, device(0), Holding::kLoading);
    if (below(4) == 0) hold(id, device(0), Holding::kDraining);
    if (below(4) == 0) hold(id, device(0), Holding::kUnloading);
    if (below(4) == 0) made->wanted.push_back(id);
  }
  made->sharing.table = &made->table;
  made->sharing.wanted = made->wanted;
  made->sharing.wanted_on = below(4) == 0 ? kNoDevice : device(below(4) == 0 ? 1 : 0);
  made->sharing.count_leaving = below(2) == 0;
  for (std::uint32_t i = 0; i < 2; ++i) {
    if (below(4) != 0) made->shortfall.set(device(i), Bytes{below(60)});
  }
  return made;
}

// What a set of victims gives back, from the header's words: their own bytes, and each share of
// which no holder stays that is not among them, unless the waiting model is made of it.
Charge freed_by(const SharingDraw& given, const std::set<EntryIndex>& victims) {
  Charge freed;
  for (const EntryIndex entry : victims) freed = sum(freed, given.charges[entry]);
  for (const ShareId id : given.ids) {
    const Share& share = *given.table.find(id);
    for (const DeviceIndex on : {device(0), device(1)}) {
      std::uint32_t left = share.on(on).of(Holding::kLoading) + share.on(on).of(Holding::kResident);
      if (!given.sharing.count_leaving) left += share.on(on).of(Holding::kDraining);
      std::uint32_t taken = 0;
      for (const EntryIndex entry : victims) {
        const Resident& each = given.residents[entry];
        const auto& held = given.lists[entry];
        if (each.shares_on == on && std::find(held.begin(), held.end(), id) != held.end()) ++taken;
      }
      const bool wanted =
          given.sharing.wanted_on == on &&
          std::find(given.wanted.begin(), given.wanted.end(), id) != given.wanted.end();
      if (taken > 0 && taken == left && !wanted) freed = sum(freed, Charge(on, share.bytes));
    }
  }
  return freed;
}

std::optional<Plan> plan_of(const SharingDraw& given) {
  const std::vector<Bytes> budgets{Bytes{100}, Bytes{100}};
  const FixedPolicy policy(given.scores);
  return plan_eviction(given.residents, given.shortfall, budgets, policy, 0, given.sharing);
}

std::set<EntryIndex> all_of(const SharingDraw& given, bool with_leased) {
  std::set<EntryIndex> all;
  for (const Resident& each : given.residents) {
    if (with_leased || !each.leased) all.insert(each.entry);
  }
  return all;
}

TEST(Planner, PlansOverSharesAreCompleteMinimalAndSpareModelsInUse) {
  std::size_t plans_with_shares = 0;
  std::size_t none = 0;
  for (std::uint32_t seed = 1; seed <= 20000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const std::unique_ptr<SharingDraw> given = draw_sharing(seed);
    const auto covers = [&](const std::set<EntryIndex>& victims) {
      return given->shortfall.fits_within(freed_by(*given, victims));
    };
    const auto plan = plan_of(*given);
    ASSERT_EQ(plan.has_value(), covers(all_of(*given, true)));
    if (!plan) {
      ++none;
      continue;
    }
    std::vector<EntryIndex> victims;
    double cost = 0;
    Charge own;
    bool any_leased = false;
    for (const Victim& victim : plan->victims) {
      victims.push_back(victim.entry);
      cost += victim.score;
      own = sum(own, given->charges[victim.entry]);
      any_leased = any_leased || victim.leased;
      ASSERT_EQ(victim.leased, given->residents[victim.entry].leased);
    }
    ASSERT_EQ(std::set(victims.begin(), victims.end()).size(), victims.size());
    ASSERT_DOUBLE_EQ(plan->cost, cost);
    for (std::uint32_t mask = 0; mask < (1U << victims.size()); ++mask) {
      std::set<EntryIndex> subset;
      for (std::size_t i = 0; i < victims.size(); ++i) {
        if ((mask >> i & 1U) != 0) subset.insert(victims[i]);
      }
      ASSERT_EQ(covers(subset), subset.size() == victims.size()) << "subset " << mask;
    }
    if (covers(all_of(*given, false))) {
      ASSERT_FALSE(any_leased);
    }
    plans_with_shares += given->shortfall.fits_within(own) ? 0 : 1;
  }
  EXPECT_GT(plans_with_shares, 1000U) << "too few plans count on a share";
  EXPECT_GT(none, 1000U);
}

TEST(Planner, WhatAllGiveBackCountsSharesOfWhichNobodyStays) {
  for (std::uint32_t seed = 1; seed <= 5000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const std::unique_ptr<SharingDraw> given = draw_sharing(seed);
    ASSERT_EQ(freed_by_all(given->residents, given->sharing),
              freed_by(*given, all_of(*given, true)));
  }
}

TEST(Planner, AShareOfFewerBytesThanHoldersStillCounts) {
  ShareTable table;
  Share share;
  share.bytes = Bytes{1};
  share.on(device(0)).by[static_cast<std::size_t>(Holding::kResident)] = 2;
  const std::vector<ShareId> list{table.insert(share)};
  const Charge nothing;
  const std::vector<Bytes> budgets{Bytes{100}};
  std::vector<Resident> residents;
  for (const EntryIndex entry : {0U, 1U}) {
    residents.push_back(Resident{.entry = entry,
                                 .held = &nothing,
                                 .reload_seconds = 1,
                                 .leased = false,
                                 .shares = list,
                                 .shares_on = device(0)});
  }
  const Sharing sharing{.table = &table};
  const FixedPolicy policy({{0, 1.0}, {1, 2.0}});
  const auto plan = plan_eviction(residents, charge({{0, 1}}), budgets, policy, 0, sharing);
  EXPECT_EQ(chosen(plan), (Entries{0, 1}));
}

TEST(Planner, AShareWeighsItsPart) {
  ShareTable table;
  Share share;
  share.bytes = Bytes{60};
  share.on(device(0)).by[static_cast<std::size_t>(Holding::kResident)] = 3;
  const std::vector<ShareId> list{table.insert(share)};
  const Charge own = charge({{0, 10}});
  const std::vector<Bytes> budgets{Bytes{100}};
  const std::vector<Resident> residents{Resident{.entry = 0,
                                                 .held = &own,
                                                 .reload_seconds = 1,
                                                 .leased = false,
                                                 .shares = list,
                                                 .shares_on = device(0)}};
  const Sharing sharing{.table = &table};
  const FixedPolicy policy({{0, 1.0}});
  EXPECT_TRUE(plan_eviction(residents, charge({{0, 10}}), budgets, policy, 0, sharing));
  EXPECT_DOUBLE_EQ(policy.weights.at(0), 0.3);  // 10 and a third of 60, of 100.
  EXPECT_FALSE(plan_eviction(residents, charge({{0, 11}}), budgets, policy, 0, sharing));
}

TEST(Planner, LooksWithoutTouching) {
  Yardful yard;
  yard.with(charge({{0, 30}}), 1).with(charge({{0, 30}}), 2);
  EXPECT_EQ(chosen(yard.plan(charge({{0, 40}}))), chosen(yard.plan(charge({{0, 40}}))));
}

}  // namespace
}  // namespace modelyard::test

#include "modelyard/policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace modelyard::test {
namespace {

Candidate candidate(EntryIndex entry, double weight = 0.5, double reload_seconds = 1) {
  return Candidate{.entry = entry, .weight = weight, .reload_seconds = reload_seconds};
}

constexpr Bytes kBudget{1000};

// A policy of a yard with one device.
std::unique_ptr<Policy> made(std::string_view name) {
  std::unique_ptr<Policy> policy = make_policy(name);
  if (policy != nullptr) policy->on_budgets(std::span(&kBudget, 1));
  return policy;
}

// A request for a model of half the device that loads in a second, unless said otherwise.
void ask(Policy& policy, EntryIndex entry, RequestClock now, double weight = 0.5,
         double reload_seconds = 1) {
  const Charge held(DeviceIndex{0},
                    Bytes{static_cast<std::int64_t>(weight * static_cast<double>(kBudget.value))});
  policy.on_request(
      Wish{.entry = entry, .held = &held, .weight = weight, .reload_seconds = reload_seconds}, now);
}

TEST(Policies, TheEnsembleIsTheDefaultAndItsExpertsAreThere) {
  const auto names = policy_names();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names[0], "ensemble");
  for (const std::string_view name :
       {"learned", "next-use", "due", "gap", "mix", "decay", "gdsf", "lru"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
}

TEST(Policies, AreMadeByNameAndKnowTheirName) {
  for (const std::string_view name : policy_names()) {
    const std::unique_ptr<Policy> policy = make_policy(name);
    ASSERT_NE(policy, nullptr) << name;
    EXPECT_EQ(policy->name(), name);
  }
  EXPECT_EQ(make_policy("no such policy"), nullptr);
  EXPECT_EQ(make_policy(""), nullptr);
}

std::vector<std::string> all_policies() {
  const auto names = policy_names();
  return {names.begin(), names.end()};
}

// What one model does tells such a policy what to expect of the others.
bool learns(const Policy& policy) {
  return policy.leader() == "next-use" || policy.leader() == "due";
}

// The written contract, for every policy there is.
class EveryPolicy : public ::testing::TestWithParam<std::string> {
 protected:
  void request(EntryIndex entry) { ask(*policy_, entry, ++clock_); }
  [[nodiscard]] double score(EntryIndex entry) const {
    return policy_->score(candidate(entry), clock_);
  }

  std::unique_ptr<Policy> policy_{made(GetParam())};
  RequestClock clock_{0};
};

TEST_P(EveryPolicy, ScoresAreFiniteForEveryHistory) {
  policy_->on_add(0);
  policy_->on_add(1);
  EXPECT_TRUE(std::isfinite(score(0))) << "never requested, at clock 0";
  std::mt19937 random(7);
  for (int step = 0; step < 2000; ++step) {
    request(random() % 2);
    for (const EntryIndex entry : {EntryIndex{0}, EntryIndex{1}}) {
      for (const double weight : {1e-18, 1e-3, 1.0, 16.0}) {
        for (const double reload : {1e-9, 1.0, 1e9}) {
          EXPECT_TRUE(std::isfinite(policy_->score(candidate(entry, weight, reload), clock_)));
        }
      }
    }
  }
  EXPECT_TRUE(std::isfinite(policy_->score(candidate(0), RequestClock{1} << 62)));
}

TEST_P(EveryPolicy, AskingForAScoreHasNoEffect) {
  for (EntryIndex entry = 0; entry < 4; ++entry) policy_->on_add(entry);
  const std::unique_ptr<Policy> unasked = made(GetParam());
  for (EntryIndex entry = 0; entry < 4; ++entry) unasked->on_add(entry);
  std::mt19937 random(11);
  for (int step = 0; step < 500; ++step) {
    const EntryIndex entry = random() % 4;
    request(entry);
    ask(*unasked, entry, clock_);
    for (EntryIndex each = 0; each < 4; ++each) EXPECT_EQ(score(each), score(each));
  }
  for (EntryIndex each = 0; each < 4; ++each) {
    EXPECT_EQ(score(each), unasked->score(candidate(each), clock_));
  }
}

TEST_P(EveryPolicy, WhatWasWantedMoreAndLaterIsWorthMore) {
  policy_->on_add(0);
  policy_->on_add(1);
  for (int i = 0; i < 6; ++i) request(0);
  for (int i = 0; i < 6; ++i) {
    request(1);
    request(1);
  }
  EXPECT_LT(score(0), score(1));
}

TEST_P(EveryPolicy, ANewModelIsNotTheOneThatHadItsSlot) {
  policy_->on_add(0);
  policy_->on_add(1);
  for (int i = 0; i < 10; ++i) {
    request(0);
    request(1);
  }
  policy_->on_add(0);
  policy_->on_add(2);  // A slot that nobody had.
  EXPECT_EQ(score(0), score(2));
  if (learns(*policy_)) return;
  const std::unique_ptr<Policy> other = made(GetParam());
  other->on_add(0);
  ask(*policy_, 0, ++clock_);
  ask(*other, 0, clock_);
  EXPECT_EQ(policy_->score(candidate(0), clock_ + 5), other->score(candidate(0), clock_ + 5));
}

TEST_P(EveryPolicy, AModelThatReplacesAnotherStartsWithItsHistory) {
  policy_->on_add(0);
  policy_->on_add(1);
  for (int i = 0; i < 6; ++i) request(0);
  request(1);
  policy_->on_add(2);
  policy_->on_replace(2, 0);
  EXPECT_EQ(policy_->score(candidate(2), clock_ + 3), policy_->score(candidate(0), clock_ + 3));
  if (learns(*policy_)) return;
  const double before = policy_->score(candidate(0), clock_ + 3);
  request(2);
  EXPECT_EQ(policy_->score(candidate(0), clock_ + 2), before)
      << "what is replaced stays as it is, but for its age";
}

TEST_P(EveryPolicy, ACloneKnowsTheSameAndGoesItsOwnWay) {
  policy_->on_add(0);
  policy_->on_add(1);
  for (int i = 0; i < 4; ++i) request(i % 2 == 0 ? 0U : 1U);
  const std::unique_ptr<Policy> other = policy_->clone();
  EXPECT_EQ(other->name(), policy_->name());
  const double before = policy_->score(candidate(0), clock_ + 5);
  EXPECT_EQ(other->score(candidate(0), clock_ + 5), before);
  ask(*other, 0, clock_ + 4);
  EXPECT_EQ(policy_->score(candidate(0), clock_ + 5), before);
  EXPECT_NE(other->score(candidate(0), clock_ + 5), before);
}

TEST_P(EveryPolicy, SlotsNeedNotBeAddedInOrder) {
  policy_->on_add(1000);
  policy_->on_add(3);
  ask(*policy_, 1000, 1);
  ask(*policy_, 3, 2);
  EXPECT_TRUE(std::isfinite(policy_->score(candidate(1000), 2)));
  EXPECT_TRUE(std::isfinite(policy_->score(candidate(3), 2)));
}

INSTANTIATE_TEST_SUITE_P(Contract, EveryPolicy, ::testing::ValuesIn(all_policies()),
                         [](const auto& each) {
                           std::string name = each.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Lru, TheLeastRecentlyRequestedGoesFirst) {
  const std::unique_ptr<Policy> lru = made("lru");
  for (EntryIndex entry = 0; entry < 3; ++entry) lru->on_add(entry);
  RequestClock clock = 0;
  for (const EntryIndex entry : {0U, 1U, 2U, 2U, 2U, 0U}) ask(*lru, entry, ++clock);
  EXPECT_LT(lru->score(candidate(1), clock), lru->score(candidate(2), clock));
  EXPECT_LT(lru->score(candidate(2), clock), lru->score(candidate(0), clock));
}

TEST(Lru, LooksAtNeitherSizeNorCost) {
  const std::unique_ptr<Policy> lru = made("lru");
  lru->on_add(0);
  lru->on_add(1);
  ask(*lru, 0, 1);
  ask(*lru, 1, 2);
  EXPECT_LT(lru->score(candidate(0, 0.01, 1000), 2), lru->score(candidate(1, 0.9, 0.001), 2));
}

TEST(Lru, WhatWasNeverRequestedGoesBeforeWhatWas) {
  const std::unique_ptr<Policy> lru = made("lru");
  lru->on_add(0);
  lru->on_add(1);
  ask(*lru, 1, 1);
  EXPECT_LT(lru->score(candidate(0), 1), lru->score(candidate(1), 1));
}

// facts/policy.md, section 5: K = min(4, count - 1), span = last - the K-th request before it,
// lambda = K / (span + max(0, (now - last) - span / K)); below two requests 0.3 / (age + 1).
double gap_formula(const std::vector<RequestClock>& requests, RequestClock now, double weight,
                   double reload) {
  const std::size_t count = requests.size();
  const double age = static_cast<double>(now - requests.back());
  if (count < 2) return reload / weight * 0.3 / (age + 1);
  const std::size_t k = std::min<std::size_t>(4, count - 1);
  const double span = static_cast<double>(requests.back() - requests[count - 1 - k]);
  const double gaps = static_cast<double>(k);
  return reload / weight * gaps / (span + std::max(0.0, age - span / gaps));
}

TEST(Gap, FollowsItsFormula) {
  for (std::uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const std::unique_ptr<Policy> gap = made("gap");
    std::vector<std::vector<RequestClock>> requests(3);
    for (EntryIndex entry = 0; entry < 3; ++entry) gap->on_add(entry);
    for (RequestClock clock = 1; clock < 200; ++clock) {
      const EntryIndex entry = random() % 7 == 0 ? 0 : 1 + random() % 2;
      ask(*gap, entry, clock);
      requests[entry].push_back(clock);
      for (EntryIndex each = 0; each < 3; ++each) {
        if (requests[each].empty()) continue;
        const double weight = 0.1 * (each + 1);
        const double reload = 3.0 / (each + 1);
        const double expected = gap_formula(requests[each], clock, weight, reload);
        EXPECT_NEAR(gap->score(candidate(each, weight, reload), clock), expected, 1e-9 * expected)
            << "entry " << each << " after " << requests[each].size() << " requests";
      }
    }
  }
}

TEST(Gap, WhatIsCheapToBringBackGoesFirst) {
  const std::unique_ptr<Policy> gap = made("gap");
  gap->on_add(0);
  ask(*gap, 0, 1);
  ask(*gap, 0, 2);
  EXPECT_LT(gap->score(candidate(0, 0.5, 1), 3), gap->score(candidate(0, 0.5, 2), 3));
}

TEST(Gap, WhatTakesMuchRoomGoesFirst) {
  const std::unique_ptr<Policy> gap = made("gap");
  gap->on_add(0);
  ask(*gap, 0, 1);
  ask(*gap, 0, 2);
  EXPECT_LT(gap->score(candidate(0, 0.8, 1), 3), gap->score(candidate(0, 0.2, 1), 3));
}

TEST(Gap, ARegularModelIsWorthMoreThanAOneTimeOneThatCameLater) {
  const std::unique_ptr<Policy> gap = made("gap");
  gap->on_add(0);
  gap->on_add(1);
  RequestClock clock = 0;
  for (int i = 0; i < 5; ++i) {
    ask(*gap, 0, clock += 4);
  }
  ask(*gap, 1, ++clock);
  clock += 2;
  EXPECT_LT(gap->score(candidate(1), clock), gap->score(candidate(0), clock));
}

TEST(Gap, AModelThatIsNotWantedAnyMoreLosesItsWorth) {
  const std::unique_ptr<Policy> gap = made("gap");
  gap->on_add(0);
  for (RequestClock clock = 1; clock <= 5; ++clock) ask(*gap, 0, clock);
  double before = gap->score(candidate(0), 6);
  for (const RequestClock later : {10U, 100U, 1000U, 100000U}) {
    const double now = gap->score(candidate(0), later);
    EXPECT_LT(now, before);
    before = now;
  }
}

}  // namespace
}  // namespace modelyard::test

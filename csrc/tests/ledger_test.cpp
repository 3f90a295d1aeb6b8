#include "modelyard/ledger.hpp"

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <string>
#include <vector>

#include "event.hpp"

namespace modelyard::test {
namespace {

// A ledger whose invariants are checked after every test.
class LedgerTest : public ::testing::Test {
 protected:
  void TearDown() override { check(); }

  void check() const {
    for (std::uint32_t i = 0; i < ledger_.device_count(); ++i) {
      const Account& account = ledger_.account(device(i));
      EXPECT_GE(account.reserved.value, 0);
      EXPECT_GE(account.resident.value, 0);
      EXPECT_GE(account.draining.value, 0);
      EXPECT_GE(account.quarantined.value, 0);
      EXPECT_LE(account.used(), account.budget + account.deficit) << "device " << i;
      EXPECT_EQ(account.deficit, saturating_sub(account.used(), account.budget)) << "device " << i;
      EXPECT_GE(account.peak, account.used()) << "device " << i;
    }
  }
  [[nodiscard]] const Account& on(std::uint32_t index) const {
    return ledger_.account(device(index));
  }

  static constexpr std::array<Bytes, 3> kBudgets{Bytes{100}, Bytes{50}, Bytes{0}};
  Ledger ledger_{kBudgets};
};

TEST_F(LedgerTest, StartsWithItsBudgetsAndNothingUsed) {
  ASSERT_EQ(ledger_.device_count(), 3U);
  EXPECT_EQ(on(0).budget, Bytes{100});
  EXPECT_EQ(on(1).budget, Bytes{50});
  EXPECT_EQ(on(2).budget, Bytes{0});
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(on(i).used(), Bytes{0});
    EXPECT_EQ(on(i).free(), on(i).budget);
    EXPECT_EQ(on(i).deficit, Bytes{0});
    EXPECT_EQ(on(i).peak, Bytes{0});
  }
}

TEST_F(LedgerTest, ReservesUpToTheLastByte) {
  EXPECT_TRUE(ledger_.fits(charge({{0, 100}, {1, 50}})));
  EXPECT_TRUE(ledger_.reserve(charge({{0, 100}, {1, 50}})).ok());
  EXPECT_EQ(on(0).free(), Bytes{0});
  EXPECT_EQ(on(1).free(), Bytes{0});
  EXPECT_FALSE(ledger_.fits(charge({{1, 1}})));
  EXPECT_FALSE(ledger_.reserve(charge({{1, 1}})).ok());
}

TEST_F(LedgerTest, ReservesOnAllDevicesOrNone) {
  const Status status = ledger_.reserve(charge({{0, 10}, {1, 51}}));
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kCapacity);
  EXPECT_FALSE(status.error().message.empty());
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(on(i).reserved, Bytes{0});
    EXPECT_EQ(on(i).peak, Bytes{0});
  }
}

TEST_F(LedgerTest, NothingFitsOnADeviceWithoutBudget) {
  EXPECT_FALSE(ledger_.fits(charge({{2, 1}})));
  EXPECT_TRUE(ledger_.fits(Charge{}));
}

TEST_F(LedgerTest, HugeAmountsDoNotOverflow) {
  EXPECT_FALSE(ledger_.fits(charge({{0, kMaxBytes}})));
  EXPECT_TRUE(ledger_.reserve(charge({{0, 1}})).ok());
  EXPECT_FALSE(ledger_.reserve(charge({{0, kMaxBytes}})).ok());
  ledger_.set_budget(device(0), Bytes{kMaxBytes});
  EXPECT_TRUE(ledger_.fits(charge({{0, kMaxBytes - 1}})));
  EXPECT_FALSE(ledger_.fits(charge({{0, kMaxBytes}})));
}

TEST_F(LedgerTest, CancelGivesTheWholePromiseBack) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 60}, {1, 20}})).ok());
  ledger_.cancel_reservation(charge({{0, 60}, {1, 20}}));
  EXPECT_EQ(on(0).used(), Bytes{0});
  EXPECT_EQ(on(1).used(), Bytes{0});
  EXPECT_EQ(on(0).peak, Bytes{60});
}

TEST_F(LedgerTest, CommitOfLessGivesTheRestBack) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 60}, {1, 20}})).ok());
  ledger_.commit(charge({{0, 60}, {1, 20}}), charge({{0, 40}}));
  EXPECT_EQ(on(0).reserved, Bytes{0});
  EXPECT_EQ(on(0).resident, Bytes{40});
  EXPECT_EQ(on(1).used(), Bytes{0});
}

TEST_F(LedgerTest, CommitOfMoreThanFitsIsADeficitAndNotLost) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 90}})).ok());
  ledger_.commit(charge({{0, 90}}), charge({{0, 120}, {1, 60}}));
  EXPECT_EQ(on(0).resident, Bytes{120});
  EXPECT_EQ(on(0).deficit, Bytes{20});
  EXPECT_EQ(on(0).free(), Bytes{0});
  EXPECT_EQ(on(1).deficit, Bytes{10});
}

TEST_F(LedgerTest, NothingIsReservedIntoADeficit) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 90}})).ok());
  ledger_.commit(charge({{0, 90}}), charge({{0, 120}}));
  EXPECT_FALSE(ledger_.reserve(charge({{0, 1}})).ok());
  EXPECT_FALSE(ledger_.reserve(charge({{0, 1}, {1, 1}})).ok());
  EXPECT_EQ(on(0).deficit, Bytes{20});
  EXPECT_EQ(on(1).reserved, Bytes{0});
  EXPECT_TRUE(ledger_.reserve(charge({{1, 1}})).ok());
}

TEST_F(LedgerTest, DrainingBytesCountUntilTheyAreBack) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 80}})).ok());
  ledger_.commit(charge({{0, 80}}), charge({{0, 80}}));
  ledger_.begin_drain(charge({{0, 80}}));
  EXPECT_EQ(on(0).resident, Bytes{0});
  EXPECT_EQ(on(0).draining, Bytes{80});
  EXPECT_FALSE(ledger_.fits(charge({{0, 21}})));
  ledger_.finish_drain(charge({{0, 80}}), charge({{0, 80}}));
  EXPECT_EQ(on(0).used(), Bytes{0});
}

TEST_F(LedgerTest, WhatDoesNotComeBackIsQuarantinedUntilItDoes) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 80}, {1, 10}})).ok());
  ledger_.commit(charge({{0, 80}, {1, 10}}), charge({{0, 80}, {1, 10}}));
  ledger_.begin_drain(charge({{0, 80}, {1, 10}}));
  ledger_.finish_drain(charge({{0, 80}, {1, 10}}), charge({{0, 50}}));
  EXPECT_EQ(on(0).quarantined, Bytes{30});
  EXPECT_EQ(on(1).quarantined, Bytes{10});
  EXPECT_EQ(on(0).free(), Bytes{70});
  ledger_.reclaim(charge({{0, 10}}));
  EXPECT_EQ(on(0).quarantined, Bytes{20});
  ledger_.reclaim(charge({{0, 20}, {1, 10}}));
  EXPECT_EQ(on(0).used(), Bytes{0});
  EXPECT_EQ(on(1).used(), Bytes{0});
}

TEST_F(LedgerTest, RemeasuringMovesResidentOrDrainingBytes) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 80}})).ok());
  ledger_.commit(charge({{0, 80}}), charge({{0, 80}}));
  ledger_.remeasure(charge({{0, 80}}), charge({{0, 70}, {1, 5}}), false);
  EXPECT_EQ(on(0).resident, Bytes{70});
  EXPECT_EQ(on(1).resident, Bytes{5});
  ledger_.begin_drain(charge({{0, 70}, {1, 5}}));
  ledger_.remeasure(charge({{0, 70}, {1, 5}}), charge({{0, 110}}), true);
  EXPECT_EQ(on(0).draining, Bytes{110});
  EXPECT_EQ(on(0).resident, Bytes{0});
  EXPECT_EQ(on(1).used(), Bytes{0});
  EXPECT_EQ(on(0).deficit, Bytes{10});
}

TEST_F(LedgerTest, KnowsWhetherAnyDeviceIsAboveItsBudget) {
  EXPECT_FALSE(ledger_.any_deficit());
  ASSERT_TRUE(ledger_.reserve(charge({{1, 50}})).ok());
  EXPECT_FALSE(ledger_.any_deficit());
  ledger_.set_budget(device(1), Bytes{49});
  EXPECT_TRUE(ledger_.any_deficit());
  ledger_.cancel_reservation(charge({{1, 50}}));
  EXPECT_FALSE(ledger_.any_deficit());
}

TEST_F(LedgerTest, ALowerBudgetIsADeficitAndAHigherOneRepaysIt) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 80}})).ok());
  ledger_.set_budget(device(0), Bytes{50});
  EXPECT_EQ(on(0).budget, Bytes{50});
  EXPECT_EQ(on(0).deficit, Bytes{30});
  ledger_.set_budget(device(0), Bytes{70});
  EXPECT_EQ(on(0).deficit, Bytes{10});
  ledger_.set_budget(device(0), Bytes{90});
  EXPECT_EQ(on(0).deficit, Bytes{0});
  EXPECT_EQ(on(0).free(), Bytes{10});
}

TEST_F(LedgerTest, BytesThatComeBackRepayTheDeficitBeforeTheyAreFree) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 50}})).ok());
  ASSERT_TRUE(ledger_.reserve(charge({{0, 50}})).ok());
  ledger_.set_budget(device(0), Bytes{40});
  EXPECT_EQ(on(0).deficit, Bytes{60});
  ledger_.cancel_reservation(charge({{0, 50}}));
  EXPECT_EQ(on(0).deficit, Bytes{10});
  EXPECT_EQ(on(0).free(), Bytes{0});
  ledger_.cancel_reservation(charge({{0, 50}}));
  EXPECT_EQ(on(0).deficit, Bytes{0});
  EXPECT_EQ(on(0).free(), Bytes{40});
}

TEST_F(LedgerTest, PeakIsTheHighestUseAndStays) {
  ASSERT_TRUE(ledger_.reserve(charge({{0, 70}})).ok());
  ledger_.commit(charge({{0, 70}}), charge({{0, 60}}));
  ASSERT_TRUE(ledger_.reserve(charge({{0, 20}})).ok());
  EXPECT_EQ(on(0).peak, Bytes{80});
  ledger_.cancel_reservation(charge({{0, 20}}));
  EXPECT_EQ(on(0).peak, Bytes{80});
}

TEST(Ledger, RandomUseKeepsTheInvariantsAndTheSums) {
  for (std::uint32_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const std::array<Bytes, 2> budgets{Bytes{100}, Bytes{60}};
    Ledger ledger(budgets);
    std::vector<Charge> reserved;
    std::vector<Charge> resident;
    std::vector<Charge> draining;
    std::vector<Charge> kept;
    const auto draw = [&](int most) {
      Charge made;
      for (std::uint32_t i = 0; i < 2; ++i) {
        made.set(device(i),
                 Bytes{static_cast<std::int64_t>(random() % static_cast<unsigned>(most))});
      }
      return made;
    };
    const auto take = [&](std::vector<Charge>& from) {
      const std::size_t at = random() % from.size();
      const Charge taken = from[at];
      from.erase(from.begin() + static_cast<std::ptrdiff_t>(at));
      return taken;
    };
    for (int step = 0; step < 300; ++step) {
      switch (random() % 7) {
        case 0: {
          const Charge wanted = draw(60);
          const bool fits = ledger.fits(wanted);
          ASSERT_EQ(ledger.reserve(wanted).ok(), fits);
          if (fits) reserved.push_back(wanted);
          break;
        }
        case 1:
          if (!reserved.empty()) ledger.cancel_reservation(take(reserved));
          break;
        case 2:
          if (!reserved.empty()) {
            resident.push_back(draw(60));
            ledger.commit(take(reserved), resident.back());
          }
          break;
        case 3:
          if (!resident.empty()) {
            draining.push_back(take(resident));
            ledger.begin_drain(draining.back());
          }
          break;
        case 4:
          if (!draining.empty()) {
            const Charge held = take(draining);
            const Charge missing = held.saturating_minus(draw(60));
            ledger.finish_drain(held, held.saturating_minus(missing));
            kept.push_back(missing);
          }
          break;
        case 5:
          if (!kept.empty()) ledger.reclaim(take(kept));
          break;
        default:
          ledger.set_budget(device(random() % 2), Bytes{static_cast<std::int64_t>(random() % 120)});
          break;
      }
      for (std::uint32_t i = 0; i < 2; ++i) {
        const auto total = [&](const std::vector<Charge>& charges) {
          Bytes bytes{0};
          for (const Charge& each : charges) bytes += each.on(device(i));
          return bytes;
        };
        const Account& account = ledger.account(device(i));
        ASSERT_EQ(account.reserved, total(reserved));
        ASSERT_EQ(account.resident, total(resident));
        ASSERT_EQ(account.draining, total(draining));
        ASSERT_EQ(account.quarantined, total(kept));
        ASSERT_EQ(account.deficit, saturating_sub(account.used(), account.budget));
        ASSERT_GE(account.peak, account.used());
      }
    }
  }
}

}  // namespace
}  // namespace modelyard::test

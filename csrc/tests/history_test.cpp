#include "policies/history.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "policy_reference.hpp"

namespace modelyard::test {
namespace {

constexpr EntryIndex kEntries = 6;

void expect_same(const History& history, const SlowHistory& slow, RequestClock now) {
  for (EntryIndex entry = 0; entry < kEntries; ++entry) {
    SCOPED_TRACE("entry " + std::to_string(entry) + " at " + std::to_string(now));
    const double gap = slow.gap_rate(entry, now);
    EXPECT_NEAR(history.gap_rate(entry, now), gap, 1e-9 * gap);
    for (std::size_t i = 0; i < History::kHalfLives.size(); ++i) {
      const double count = slow.count(entry, History::kHalfLives[i], now);
      // What has faded to nothing may be nothing.
      EXPECT_NEAR(history.count(entry, i, now), count, 1e-9 * count + 1e-100);
      const double rate = slow.decayed_rate(entry, History::kHalfLives[i], now);
      EXPECT_NEAR(history.decayed_rate(entry, i, now), rate, 1e-9 * rate + 1e-100);
    }
    const auto& times = slow.times(entry);
    EXPECT_EQ(history.last(entry), times.empty() ? 0 : times.back());
  }
}

// Random requests, slots that start anew or with another's past, and silences of any length.
void run(std::uint32_t seed, RequestClock longest_silence) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  History history;
  SlowHistory slow;
  for (EntryIndex entry = 0; entry < kEntries; ++entry) {
    history.add(entry);
    slow.add(entry);
  }
  RequestClock clock = 0;
  for (int step = 0; step < 400; ++step) {
    const auto entry = static_cast<EntryIndex>(random() % kEntries);
    switch (random() % 20) {
      case 0:
        history.add(entry);
        slow.add(entry);
        break;
      case 1: {
        const auto from = static_cast<EntryIndex>(random() % kEntries);
        history.add(entry == from ? (entry + 1) % kEntries : entry);
        history.copy(entry == from ? (entry + 1) % kEntries : entry, from);
        slow.copy(entry == from ? (entry + 1) % kEntries : entry, from);
        break;
      }
      default:
        clock += random() % 10 == 0 ? 1 + random() % longest_silence : 1;
        history.request(entry, clock);
        slow.request(entry, clock);
    }
    expect_same(history, slow, clock);
    expect_same(history, slow, clock + random() % 5000);
  }
}

TEST(History, IsWhatAllRequestsSay) {
  for (std::uint32_t seed = 1; seed <= 5; ++seed) run(seed, 2000);
}

TEST(History, KeepsItsCountsWhenTheirBaseMoves) {
  for (std::uint32_t seed = 1; seed <= 3; ++seed) run(seed, 300'000);
}

TEST(History, ItsBaseMovesOnceInAWhile) {
  History history;
  history.add(0);
  for (RequestClock clock = 1; clock <= 500'000; clock += 1000) history.request(0, clock);
  EXPECT_EQ(history.base(), 0U);
  history.request(0, 500'001);
  EXPECT_EQ(history.base(), 500'001U);
}

TEST(History, OfAModelNobodyAskedForIsThatOfOneAtTheBeginningOfTime) {
  History history;
  history.add(0);
  EXPECT_EQ(history.last(0), 0U);
  EXPECT_EQ(history.gap_rate(0, 9), 0.03);
  EXPECT_EQ(history.count(0, History::kShort, 9), 0);
}

}  // namespace
}  // namespace modelyard::test

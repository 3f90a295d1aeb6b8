#include "modelyard/reload.hpp"

#include <gtest/gtest.h>

#include <cstdint>

namespace modelyard {
namespace {

// --- Of one model -------------------------------------------------------------------------------

TEST(ReloadTimes, ThePriorHoldsUntilFilesWereMeasured) {
  ReloadTimes times(7);
  EXPECT_DOUBLE_EQ(times.from_files(0), 7);
  EXPECT_DOUBLE_EQ(times.from_files(1), 7);
  EXPECT_DOUBLE_EQ(times.from_copy(), 0) << "nothing is known of copies";
  times.measured(Source::kCopy, 2, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0.5), 7) << "a copy says nothing of files";
  EXPECT_DOUBLE_EQ(times.from_copy(), 2);
}

TEST(ReloadTimes, TheFirstMeasurementReplacesAndLaterOnesAreMixedIn) {
  ReloadTimes times(100);
  times.measured(Source::kStorage, 50, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0), 50);
  times.measured(Source::kStorage, 10, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0), 10);
  times.measured(Source::kStorage, 20, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0), 13);
  times.measured(Source::kCopy, 1, Bytes{1});
  times.measured(Source::kCopy, 2, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_copy(), 1.3);
  EXPECT_DOUBLE_EQ(times.from_files(0), 13) << "each source apart";
}

TEST(ReloadTimes, TheSecondLoadFromFilesTakesThePlaceOfTheFirstWhateverItRead) {
  for (const Source first : {Source::kStorage, Source::kPageCache}) {
    for (const Source second : {Source::kStorage, Source::kPageCache}) {
      ReloadTimes times;
      times.measured(first, 1.137, Bytes{1});
      times.measured(Source::kCopy, 0.5, Bytes{1});
      EXPECT_TRUE(times.is_first()) << "a copy says nothing of files";
      times.measured(second, 0.006, Bytes{1});
      EXPECT_FALSE(times.is_first());
      EXPECT_DOUBLE_EQ(times.from_files(0), 0.006);
      EXPECT_DOUBLE_EQ(times.from_files(1), 0.006);
      EXPECT_DOUBLE_EQ(times.from_copy(), 0.5) << "nor do files of a copy";
    }
  }
}

TEST(ReloadTimes, FilesAreBlendedByHowOftenThePageCacheHasThem) {
  ReloadTimes times;
  times.measured(Source::kStorage, 50, Bytes{1});
  times.measured(Source::kStorage, 10, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(1), 10) << "what was not measured is taken to be alike";
  times.measured(Source::kPageCache, 2, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0), 10);
  EXPECT_DOUBLE_EQ(times.from_files(1), 2);
  EXPECT_DOUBLE_EQ(times.from_files(0.75), 4);
  ReloadTimes cached;
  cached.measured(Source::kPageCache, 3, Bytes{1});
  EXPECT_DOUBLE_EQ(cached.from_files(0), 3);
}

TEST(ReloadTimes, ALoadIsNeverFree) {
  ReloadTimes times;
  times.measured(Source::kStorage, 0, Bytes{1});
  times.measured(Source::kCopy, -5, Bytes{1});
  EXPECT_DOUBLE_EQ(times.from_files(0), kLeastSeconds);
  EXPECT_DOUBLE_EQ(times.from_copy(), kLeastSeconds);
}

// --- Of the machine -----------------------------------------------------------------------------

TEST(TransferPrices, ReloadsTellHowOftenThePageCacheHasTheFiles) {
  TransferPrices prices;
  EXPECT_DOUBLE_EQ(prices.cached_share(), 1);
  prices.loaded(Source::kStorage, 1, Bytes{10}, false);
  EXPECT_DOUBLE_EQ(prices.cached_share(), 1) << "a first load says nothing";
  prices.loaded(Source::kStorage, 1, Bytes{10}, true);
  EXPECT_DOUBLE_EQ(prices.cached_share(), 0.9);
  prices.loaded(Source::kPageCache, 1, Bytes{10}, true);
  EXPECT_DOUBLE_EQ(prices.cached_share(), 0.91);
  prices.loaded(Source::kCopy, 1, Bytes{10}, true);
  EXPECT_DOUBLE_EQ(prices.cached_share(), 0.91) << "nor does one that read no files";
}

// What a model's first load of so many bytes is believed to say, if it took a thousand seconds.
double doubted(const TransferPrices& prices, Bytes bytes, double believed = 1) {
  ReloadTimes times;
  times.measured(Source::kStorage, 1000, bytes);
  return prices.file_seconds(times, believed);
}

TEST(TransferPrices, AFirstLoadIsBelievedUpToATimesOfWhatReloadsTake) {
  TransferPrices prices;
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}), 1000) << "nothing is known of reloads";
  prices.loaded(Source::kStorage, 2, Bytes{100}, false);
  prices.loaded(Source::kCopy, 1, Bytes{100}, true);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}), 1000) << "neither first loads nor copies are those";
  prices.loaded(Source::kStorage, 2, Bytes{100}, true);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}), 2);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}, 4), 8);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}, 1e6), 1000) << "less is believed as it is";
  prices.loaded(Source::kPageCache, 4, Bytes{200}, true);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{100}), 0.7 * 2 + 0.3 * 4);
}

TEST(TransferPrices, MoreBytesMayTakeLongerAndFewerAreNotThoughtFaster) {
  TransferPrices prices;
  prices.loaded(Source::kStorage, 2, Bytes{100}, true);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{300}), 6);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{1}), 2);
  EXPECT_DOUBLE_EQ(doubted(prices, Bytes{0}), 2);
}

TEST(TransferPrices, AModelThatWasLoadedTwiceIsBelieved) {
  TransferPrices prices;
  prices.loaded(Source::kStorage, 2, Bytes{100}, true);
  ReloadTimes times;
  times.measured(Source::kStorage, 500, Bytes{100});
  EXPECT_DOUBLE_EQ(prices.file_seconds(times, 1), 2);
  times.measured(Source::kStorage, 1000, Bytes{100});
  EXPECT_DOUBLE_EQ(prices.file_seconds(times, 1), 1000);
  EXPECT_DOUBLE_EQ(prices.file_seconds(ReloadTimes(7), 1), 7) << "and what none has told is kept";
}

TEST(TransferPrices, WhereLoadsTakeSoMuchEachAndSoMuchAByteFirstOnesAreBelievedAsTheyAre) {
  const auto taken = [](std::int64_t bytes) { return 0.25 + 0.001 * static_cast<double>(bytes); };
  TransferPrices prices;
  for (const std::int64_t bytes : {5, 70000, 1, 300, 9000, 9001, 2, 40, 1000000, 3}) {
    prices.loaded(Source::kStorage, taken(bytes), Bytes{bytes}, true);
    for (const std::int64_t other : {1, 10, 500, 8000, 9000, 100000, 5000000}) {
      ReloadTimes times;
      times.measured(Source::kStorage, taken(other), Bytes{other});
      EXPECT_NEAR(prices.file_seconds(times, 1), taken(other), 1e-9 * taken(other));
    }
  }
}

TEST(TransferPrices, AnUntriedCopyIsTakenToBeAQuarterOfTheFilesTime) {
  TransferPrices prices;
  EXPECT_DOUBLE_EQ(prices.copy_seconds(Bytes{1000}, 8), 2);
  prices.loaded(Source::kCopy, 5, Bytes{100}, false);
  EXPECT_DOUBLE_EQ(prices.copy_seconds(Bytes{1000}, 8), 50) << "by bytes, once one was tried";
  prices.loaded(Source::kCopy, 15, Bytes{100}, true);
  EXPECT_DOUBLE_EQ(prices.copy_seconds(Bytes{100}, 8), 0.7 * 5 + 0.3 * 15);
}

TEST(TransferPrices, MakingACopyIsFreeUntilItWasMeasured) {
  TransferPrices prices;
  EXPECT_DOUBLE_EQ(prices.keep_seconds(Bytes{1000}), 0);
  prices.kept(2, Bytes{100});
  EXPECT_DOUBLE_EQ(prices.keep_seconds(Bytes{50}), 1);
  prices.kept(12, Bytes{100});
  EXPECT_DOUBLE_EQ(prices.keep_seconds(Bytes{100}), 0.7 * 2 + 0.3 * 12);
}

TEST(TransferPrices, NoBytesAreTakenAsOne) {
  TransferPrices prices;
  prices.kept(2, Bytes{0});
  EXPECT_DOUBLE_EQ(prices.keep_seconds(Bytes{1}), 2);
  EXPECT_DOUBLE_EQ(prices.keep_seconds(Bytes{0}), 0);
}

TEST(Source, HasNames) {
  EXPECT_EQ(to_string(Source::kStorage), "STORAGE");
  EXPECT_EQ(to_string(Source::kPageCache), "PAGE_CACHE");
  EXPECT_EQ(to_string(Source::kCopy), "COPY");
}

}  // namespace
}  // namespace modelyard

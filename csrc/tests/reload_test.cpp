#include "modelyard/reload.hpp"

#include <gtest/gtest.h>

namespace modelyard {
namespace {

// --- Of one model -------------------------------------------------------------------------------

TEST(ReloadTimes, ThePriorHoldsUntilFilesWereMeasured) {
  ReloadTimes times(7);
  EXPECT_DOUBLE_EQ(times.from_files(0), 7);
  EXPECT_DOUBLE_EQ(times.from_files(1), 7);
  EXPECT_DOUBLE_EQ(times.from_copy(), 0) << "nothing is known of copies";
  times.measured(Source::kCopy, 2);
  EXPECT_DOUBLE_EQ(times.from_files(0.5), 7) << "a copy says nothing of files";
  EXPECT_DOUBLE_EQ(times.from_copy(), 2);
}

TEST(ReloadTimes, TheFirstMeasurementReplacesAndLaterOnesAreMixedIn) {
  ReloadTimes times(100);
  times.measured(Source::kStorage, 10);
  EXPECT_DOUBLE_EQ(times.from_files(0), 10);
  times.measured(Source::kStorage, 20);
  EXPECT_DOUBLE_EQ(times.from_files(0), 13);
  times.measured(Source::kCopy, 1);
  times.measured(Source::kCopy, 2);
  EXPECT_DOUBLE_EQ(times.from_copy(), 1.3);
  EXPECT_DOUBLE_EQ(times.from_files(0), 13) << "each source apart";
}

TEST(ReloadTimes, FilesAreBlendedByHowOftenThePageCacheHasThem) {
  ReloadTimes times;
  times.measured(Source::kStorage, 10);
  EXPECT_DOUBLE_EQ(times.from_files(1), 10) << "what was not measured is taken to be alike";
  times.measured(Source::kPageCache, 2);
  EXPECT_DOUBLE_EQ(times.from_files(0), 10);
  EXPECT_DOUBLE_EQ(times.from_files(1), 2);
  EXPECT_DOUBLE_EQ(times.from_files(0.75), 4);
  ReloadTimes cached;
  cached.measured(Source::kPageCache, 3);
  EXPECT_DOUBLE_EQ(cached.from_files(0), 3);
}

TEST(ReloadTimes, ALoadIsNeverFree) {
  ReloadTimes times;
  times.measured(Source::kStorage, 0);
  times.measured(Source::kCopy, -5);
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

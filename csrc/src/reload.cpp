#include "modelyard/reload.hpp"

#include <algorithm>

namespace modelyard {
namespace {

constexpr double kCachedAlpha = 0.1;   // Weight of the newest reload in the page cache's share.
constexpr double kUntriedCopy = 0.25;  // Of the time from files, for a copy nobody has loaded yet.

void learn(double& mean, double value) {
  mean = mean == 0 ? value : (1 - kSecondsAlpha) * mean + kSecondsAlpha * value;
}

double rate(double seconds, Bytes bytes) {
  return seconds / static_cast<double>(std::max<std::int64_t>(bytes.value, 1));
}

}  // namespace

std::string_view to_string(Source source) {
  switch (source) {
    case Source::kStorage:
      return "STORAGE";
    case Source::kPageCache:
      return "PAGE_CACHE";
    case Source::kCopy:
      return "COPY";
  }
  return "?";
}

void ReloadTimes::measured(Source source, double seconds) {
  learn(by_[static_cast<std::size_t>(source)], std::max(seconds, kLeastSeconds));
  if (source != Source::kCopy) ++files_;
}

double ReloadTimes::from_files(double cached_share) const {
  const double storage = of(Source::kStorage);
  const double cached = of(Source::kPageCache);
  if (storage == 0 && cached == 0) return prior_;
  if (storage == 0) return cached;
  if (cached == 0) return storage;
  return cached_share * cached + (1 - cached_share) * storage;
}

void TransferPrices::loaded(Source source, double seconds, Bytes bytes, bool again) {
  if (source == Source::kCopy) {
    learn(copy_rate_, rate(seconds, bytes));
  } else if (again) {
    const double found = source == Source::kPageCache ? 1 : 0;
    cached_share_ += kCachedAlpha * (found - cached_share_);
    learn(file_rate_, rate(seconds, bytes));
  }
}

void TransferPrices::kept(double seconds, Bytes bytes) { learn(keep_rate_, rate(seconds, bytes)); }

double TransferPrices::file_seconds(Bytes bytes) const {
  return file_rate_ * static_cast<double>(bytes.value);
}

double TransferPrices::copy_seconds(Bytes bytes, double from_files) const {
  return copy_rate_ == 0 ? kUntriedCopy * from_files
                         : copy_rate_ * static_cast<double>(bytes.value);
}

double TransferPrices::keep_seconds(Bytes bytes) const {
  return keep_rate_ * static_cast<double>(bytes.value);
}

}  // namespace modelyard

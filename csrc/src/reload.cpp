#include "modelyard/reload.hpp"

#include <algorithm>
#include <limits>

namespace modelyard {
namespace {

constexpr double kCachedAlpha = 0.1;   // Weight of the newest reload in the page cache's share.
constexpr double kUntriedCopy = 0.25;  // Of the time from files, for a copy nobody has loaded yet.

void learn(double& mean, double value) {
  mean = mean == 0 ? value : (1 - kSecondsAlpha) * mean + kSecondsAlpha * value;
}

double at_least_one(Bytes bytes) {
  return static_cast<double>(std::max<std::int64_t>(bytes.value, 1));
}

double rate(double seconds, Bytes bytes) { return seconds / at_least_one(bytes); }

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

void ReloadTimes::measured(Source source, double seconds, Bytes bytes) {
  if (source != Source::kCopy) {
    bytes_ = bytes;
    if (++files_ == 2) {
      by_[static_cast<std::size_t>(Source::kStorage)] = 0;
      by_[static_cast<std::size_t>(Source::kPageCache)] = 0;
    }
  }
  learn(by_[static_cast<std::size_t>(source)], std::max(seconds, kLeastSeconds));
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
    learn(file_seconds_, seconds);
    learn(file_bytes_, at_least_one(bytes));
  }
}

void TransferPrices::kept(double seconds, Bytes bytes) { learn(keep_rate_, rate(seconds, bytes)); }

double TransferPrices::likely_file_seconds(Bytes bytes) const {
  if (file_bytes_ == 0) return std::numeric_limits<double>::infinity();
  return file_seconds_ * std::max(1.0, static_cast<double>(bytes.value) / file_bytes_);
}

double TransferPrices::file_seconds(const ReloadTimes& times, double believed) const {
  const double own = times.from_files(cached_share_);
  return times.is_first() ? std::min(own, believed * likely_file_seconds(times.bytes())) : own;
}

double TransferPrices::copy_seconds(Bytes bytes, double from_files) const {
  return copy_rate_ == 0 ? kUntriedCopy * from_files
                         : copy_rate_ * static_cast<double>(bytes.value);
}

double TransferPrices::keep_seconds(Bytes bytes) const {
  return keep_rate_ * static_cast<double>(bytes.value);
}

}  // namespace modelyard

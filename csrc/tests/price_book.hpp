#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>

#include "modelyard/reload.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// What loads and copies took, written down apart from the yard by the rules of its headers: means
/// in which the newest measurement weighs 0.3, the first one replacing what was thought before.
class PriceBook {
 public:
  void add(ModelId model, double prior, std::optional<ModelId> replaces) {
    Times& times = times_[model];
    times.prior = prior;
    if (!replaces) return;
    const Times before = times_.at(*replaces);
    if (before.loads == 0) return;
    times = before;
    times.loads = 0;
  }

  void loaded(ModelId model, modelyard::Source source, Duration took, std::int64_t bytes) {
    Times& times = times_.at(model);
    const double measured = std::max(std::chrono::duration<double>(took).count(), 1e-6);
    mix(times.by[source], measured);
    const double rate = measured / static_cast<double>(std::max<std::int64_t>(bytes, 1));
    if (source != modelyard::Source::kCopy) ++times.from_files;
    if (source == modelyard::Source::kCopy) {
      mix(copy_rate_, rate);
    } else if (times.loads > 0) {
      mix(file_rate_, rate);
      const double found = source == modelyard::Source::kPageCache ? 1 : 0;
      found_in_cache_ = 0.9 * found_in_cache_ + 0.1 * found;
    }
    ++times.loads;
  }

  void kept(Duration took, std::int64_t bytes) {
    mix(keep_rate_, std::chrono::duration<double>(took).count() /
                        static_cast<double>(std::max<std::int64_t>(bytes, 1)));
  }

  // What was measured once only is not taken for more than what others' reloads take.
  [[nodiscard]] double from_files(ModelId model, std::int64_t bytes) const {
    const double own = own_from_files(model);
    if (times_.at(model).from_files != 1 || !file_rate_ || bytes == 0) return own;
    return std::min(own, *file_rate_ * static_cast<double>(bytes));
  }

  [[nodiscard]] double own_from_files(ModelId model) const {
    const Times& times = times_.at(model);
    const std::optional<double> storage = times.of(modelyard::Source::kStorage);
    const std::optional<double> cached = times.of(modelyard::Source::kPageCache);
    if (storage && cached) return found_in_cache_ * *cached + (1 - found_in_cache_) * *storage;
    if (storage) return *storage;
    return cached.value_or(times.prior);
  }

  [[nodiscard]] double from_copy(ModelId model, std::int64_t bytes) const {
    const std::optional<double> measured = times_.at(model).of(modelyard::Source::kCopy);
    if (measured) return *measured;
    if (copy_rate_) return *copy_rate_ * static_cast<double>(bytes);
    return own_from_files(model) / 4;
  }

  [[nodiscard]] double keeping(std::int64_t bytes) const {
    return keep_rate_.value_or(0) * static_cast<double>(bytes);
  }

 private:
  struct Times {
    [[nodiscard]] std::optional<double> of(modelyard::Source source) const {
      const auto found = by.find(source);
      return found == by.end() ? std::nullopt : found->second;
    }

    double prior{1};
    std::map<modelyard::Source, std::optional<double>> by;
    std::uint64_t loads{0};
    std::uint64_t from_files{0};
  };

  static void mix(std::optional<double>& mean, double value) {
    mean = mean ? 0.7 * *mean + 0.3 * value : value;
  }

  std::map<ModelId, Times> times_;
  double found_in_cache_{1};
  std::optional<double> file_rate_;  // Seconds a byte.
  std::optional<double> copy_rate_;
  std::optional<double> keep_rate_;
};

}  // namespace modelyard::test

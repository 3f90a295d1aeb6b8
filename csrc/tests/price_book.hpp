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
/// in which the newest measurement weighs 0.3, the first one replacing what was thought before, and
/// a model's second load from files whatever the first one said of files.
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

  /// True if that has taught what reloads from files take.
  bool loaded(ModelId model, modelyard::Source source, Duration took, std::int64_t bytes) {
    Times& times = times_.at(model);
    const double measured = std::max(std::chrono::duration<double>(took).count(), 1e-6);
    const double counted = static_cast<double>(std::max<std::int64_t>(bytes, 1));
    const bool copied = source == modelyard::Source::kCopy;
    const bool again = times.loads++ > 0;
    if (copied) {
      mix(copy_rate_, measured / counted);
    } else {
      times.bytes = static_cast<double>(bytes);
      if (times.from_files++ == 1) {
        times.by.erase(modelyard::Source::kStorage);
        times.by.erase(modelyard::Source::kPageCache);
      }
    }
    mix(times.by[source], measured);
    if (copied || !again) return false;
    mix(reload_seconds_, measured);
    mix(reload_bytes_, counted);
    const double found = source == modelyard::Source::kPageCache ? 1 : 0;
    found_in_cache_ = 0.9 * found_in_cache_ + 0.1 * found;
    return true;
  }

  void kept(Duration took, std::int64_t bytes) {
    mix(keep_rate_, std::chrono::duration<double>(took).count() /
                        static_cast<double>(std::max<std::int64_t>(bytes, 1)));
  }

  [[nodiscard]] bool was_loaded(ModelId model) const { return times_.at(model).loads > 0; }

  [[nodiscard]] bool was_loaded_once(ModelId model) const {
    return times_.at(model).from_files == 1;
  }

  // What a copy is compared with: of a model that was loaded from files once only no more than what
  // others' reloads make likely.
  [[nodiscard]] double from_files(ModelId model) const { return believed(model, 1); }

  // What a model is held for: up to four times as much.
  [[nodiscard]] double expected_from_files(ModelId model) const { return believed(model, 4); }

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
    double bytes{0};  // Of its last load from files.
  };

  [[nodiscard]] double believed(ModelId model, double times) const {
    const double own = own_from_files(model);
    if (!was_loaded_once(model) || !reload_seconds_) return own;
    const double larger = times_.at(model).bytes / *reload_bytes_;
    return std::min(own, times * *reload_seconds_ * (larger > 1 ? larger : 1));
  }

  static void mix(std::optional<double>& mean, double value) {
    mean = mean ? 0.7 * *mean + 0.3 * value : value;
  }

  std::map<ModelId, Times> times_;
  double found_in_cache_{1};
  std::optional<double> reload_seconds_;  // Of reloads from files, and what they brought.
  std::optional<double> reload_bytes_;
  std::optional<double> copy_rate_;  // Seconds a byte.
  std::optional<double> keep_rate_;
};

}  // namespace modelyard::test

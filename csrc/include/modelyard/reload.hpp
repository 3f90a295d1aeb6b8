#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "modelyard/types.hpp"

// What it costs that a model is not there: the seconds of its next load. That depends on where the
// weights will come from, so each source has a price of its own. All learned, none assumed.

namespace modelyard {

/// Where a load had the weights from.
enum class Source : std::uint8_t {
  kStorage,    ///< Files that had to be read.
  kPageCache,  ///< Files that the machine still had in memory.
  kCopy,       ///< A copy on the host tier.
};

[[nodiscard]] std::string_view to_string(Source source);

/// Weight of the newest measurement in a mean of seconds.
inline constexpr double kSecondsAlpha = 0.3;
/// A load is never free, or its model would have no score.
inline constexpr double kLeastSeconds = 1e-6;

/// What loads of one model took, in seconds, by where the weights came from.
class ReloadTimes {
 public:
  /// `prior`: what is expected until something has been measured; above zero.
  explicit ReloadTimes(double prior = 1) : prior_(prior) {}

  /// A load has been measured; the first from a source replaces what was thought of it.
  void measured(Source source, double seconds);

  /// Expected from files, if the share `cached_share` of reloads finds them in the page cache. What
  /// has not been measured yet is taken to be like what has.
  [[nodiscard]] double from_files(double cached_share) const;
  /// True until a second load from files has been measured. The first one may have made what all
  /// later ones find: it says little of those.
  [[nodiscard]] bool is_first() const { return files_ == 1; }
  /// Expected from a copy, or 0 if none has been measured.
  [[nodiscard]] double from_copy() const { return of(Source::kCopy); }

 private:
  [[nodiscard]] double of(Source source) const { return by_[static_cast<std::size_t>(source)]; }

  double prior_;
  std::uint64_t files_{0};      // Loads from files that were measured.
  std::array<double, 3> by_{};  // Indexed by Source; 0 until measured.
};

/// What moving weights takes on this machine, learned over all models.
class TransferPrices {
 public:
  /// A model of `bytes` has been loaded; `again` if not for the first time. First loads say nothing
  /// of the page cache: nobody has read their files before.
  void loaded(Source source, double seconds, Bytes bytes, bool again);
  /// A copy of `bytes` has been made.
  void kept(double seconds, Bytes bytes);

  /// Seconds of a reload from files, by what reloads of all models have taken; 0 until one has been
  /// measured.
  [[nodiscard]] double file_seconds(Bytes bytes) const;
  /// Of the reloads from files, the share that found them in the page cache, lately.
  [[nodiscard]] double cached_share() const { return cached_share_; }
  /// Seconds of loading from a copy; a fraction of what files take until one has been measured, so
  /// that one is tried.
  [[nodiscard]] double copy_seconds(Bytes bytes, double from_files) const;
  /// Seconds of making a copy; 0 until one has been measured.
  [[nodiscard]] double keep_seconds(Bytes bytes) const;

 private:
  double cached_share_{1};
  double file_rate_{0};  // Seconds a byte; 0 until measured.
  double copy_rate_{0};
  double keep_rate_{0};
};

}  // namespace modelyard

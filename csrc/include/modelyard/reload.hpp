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
/// A model's first load is believed up to so many times what reloads of all models make likely:
/// models differ by less, and what only a first load does can be hundreds of times a reload.
inline constexpr double kFirstBelieved = 4;

/// What loads of one model took, in seconds, by where the weights came from.
///
/// The first load from files may have made what all later ones find: imported a library, built what
/// models of its architecture have in common, read files that nobody had read before. So it counts
/// until the second one only, which takes its place whichever files either of them read; from then
/// on each is mixed in. Until then TransferPrices::file_seconds says how much to believe of it.
class ReloadTimes {
 public:
  /// `prior`: what is expected until something has been measured; above zero.
  explicit ReloadTimes(double prior = 1) : prior_(prior) {}

  /// A load of `bytes` has been measured. The first from a source replaces what was thought of it,
  /// and the second from files all that the first from files said.
  void measured(Source source, double seconds, Bytes bytes);

  /// Expected from files, if the share `cached_share` of reloads finds them in the page cache. What
  /// has not been measured yet is taken to be like what has.
  [[nodiscard]] double from_files(double cached_share) const;
  /// True from the first load from files that has been measured until the second.
  [[nodiscard]] bool is_first() const { return files_ == 1; }
  /// What the last load from files brought.
  [[nodiscard]] Bytes bytes() const { return bytes_; }
  /// Expected from a copy, or 0 if none has been measured.
  [[nodiscard]] double from_copy() const { return of(Source::kCopy); }

 private:
  [[nodiscard]] double of(Source source) const { return by_[static_cast<std::size_t>(source)]; }

  double prior_;
  std::uint64_t files_{0};  // Loads from files that were measured.
  Bytes bytes_{};
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

  /// Seconds of a reload of `bytes` from files, by what reloads of all models have taken: their
  /// mean, and in proportion for more bytes than their mean. Where loads take so much each and so
  /// much a byte, that is never too little. Infinity until a reload has been measured.
  [[nodiscard]] double likely_file_seconds(Bytes bytes) const;
  /// Expected of a model's next load from files: what its own have taken; of one that has been
  /// loaded once only, at most `believed` times what is likely.
  [[nodiscard]] double file_seconds(const ReloadTimes& times, double believed) const;
  /// Of the reloads from files, the share that found them in the page cache, lately.
  [[nodiscard]] double cached_share() const { return cached_share_; }
  /// Seconds of loading from a copy; a fraction of what files take until one has been measured, so
  /// that one is tried.
  [[nodiscard]] double copy_seconds(Bytes bytes, double from_files) const;
  /// Seconds of making a copy; 0 until one has been measured.
  [[nodiscard]] double keep_seconds(Bytes bytes) const;

 private:
  double cached_share_{1};
  double file_seconds_{0};  // Mean of reloads from files; 0 until measured.
  double file_bytes_{0};    // What they brought.
  double copy_rate_{0};     // Seconds a byte; 0 until measured.
  double keep_rate_{0};
};

}  // namespace modelyard

#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "modelyard/types.hpp"

namespace modelyard {

/// How many requests a device has been given, and at what pace it ends them.
///
/// The pace is the mean time between two ends while the device has something to do, over the last
/// two seconds of work or so, and at least over the last few ends. It counts what comes out, so it
/// holds for requests that run one after the other, side by side or in batches.
class Pace {
 public:
  /// A request was given to the device.
  void begin(Tick now) {
    if (given_++ == 0) since_ = now;
  }

  /// A request has ended, or was taken back.
  void end(Tick now) {
    const double gap = std::chrono::duration<double>(now - since_).count();
    // However long the gap, what was known before it keeps some weight: the first end of a batch
    // is not the pace of the batch.
    const double keep = std::max(kLeastKept, 1 - gap / kMemorySeconds);
    seconds_ = seconds_ * keep + gap;
    ends_ = ends_ * keep + 1;
    since_ = now;
    --given_;
  }

  /// A request that was given to the device counts no more: it holds the device up for nobody.
  void set_aside() { --given_; }

  /// Requests that it has and that have not ended.
  [[nodiscard]] std::uint32_t given() const { return given_; }

  /// Seconds from one end to the next while it has work; 0 while that is not known.
  [[nodiscard]] double seconds_each() const { return ends_ < kEnoughEnds ? 0 : seconds_ / ends_; }

  /// Seconds of work that it has, what has been done of it included; 0 while its pace is not known.
  /// Changes only where a request begins or ends.
  [[nodiscard]] double work_seconds() const { return given_ * seconds_each(); }

  /// Seconds until it has ended all that it has; 0 while its pace is not known.
  [[nodiscard]] double backlog_seconds(Tick now) const {
    if (given_ == 0) return 0;
    // What runs has been running since the last end.
    const double done = std::chrono::duration<double>(std::max(now, since_) - since_).count();
    const double each = seconds_each();
    return std::max(work_seconds() - done, each);
  }

 private:
  static constexpr double kMemorySeconds = 2;
  static constexpr double kLeastKept = 0.75;
  static constexpr double kEnoughEnds = 3;  // Below the 1 / (1 - kLeastKept) that slow ends reach.

  std::uint32_t given_{0};
  Tick since_{};       // The last end, or the beginning of its work if that was later.
  double seconds_{0};  // Between ends, older ones fading.
  double ends_{0};     // Likewise.
};

}  // namespace modelyard

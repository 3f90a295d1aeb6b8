#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "modelyard/types.hpp"

namespace modelyard {

/// When models were asked for: all that policies judge them by, kept for every model, resident or
/// not. Times are requests of the whole yard.
class History {
 public:
  /// Half-lives, in requests, of the decayed counts.
  static constexpr std::array<double, 3> kHalfLives{1000, 2000, 4000};
  /// Indices of kHalfLives.
  static constexpr std::size_t kShort = 0, kMiddle = 1, kLong = 2;

  /// A slot starts anew.
  void add(EntryIndex entry) {
    if (rings_.size() <= entry) {
      rings_.resize(entry + std::size_t{1});
      seen_.resize(entry + std::size_t{1});
    }
    rings_[entry] = Ring{};
    seen_[entry] = Seen{};
  }
  /// A slot starts with another's history.
  void copy(EntryIndex entry, EntryIndex from) {
    rings_[entry] = rings_[from];
    seen_[entry] = seen_[from];
  }
  void request(EntryIndex entry, RequestClock now);

  /// The last request; 0 for a model that nobody asked for.
  [[nodiscard]] RequestClock last(EntryIndex entry) const { return seen_[entry].last; }

  /// Requests between two of the last five, as a mean; 0 for a model seen at most once.
  [[nodiscard]] double mean_gap(EntryIndex entry) const { return seen_[entry].mean_gap; }

  /// Requests per request, estimated from the last gaps:
  ///
  ///   k / (span + max(0, age - span / k)),  k = min(4, requests - 1)
  ///
  /// where span is the time from the (k+1)th-last request to the last. Once a model has been silent
  /// for longer than its mean gap, the silence counts as part of them: the estimate falls as soon
  /// as the model is late, and not before. One seen once has no gap yet and gets 0.3 / (age + 1).
  ///
  /// The idea is LIRS's inter-reference recency (Jiang and Zhang, SIGMETRICS 2002), averaged over
  /// four gaps.
  [[nodiscard]] double gap_rate(EntryIndex entry, RequestClock now) const {
    const GapRate rate = gap_rate(entry);
    return rate.gaps / (rate.span + std::max(0.0, static_cast<double>(now) - rate.late_after));
  }
  /// The same for all times to come until the model is asked for again:
  ///
  ///   gaps / (span + max(0, now - late_after))
  struct GapRate {
    double gaps;
    double span;  // At least 1.
    double late_after;
  };
  [[nodiscard]] GapRate gap_rate(EntryIndex entry) const {
    const Seen& seen = seen_[entry];
    const auto last = static_cast<double>(seen.last);
    if (seen.gaps == 0) return {.gaps = 0.3, .span = 1, .late_after = last};
    return {
        .gaps = seen.gaps, .span = std::max(1.0, seen.span), .late_after = last + seen.mean_gap};
  }

  /// Requests so far, those h requests ago counting half.
  [[nodiscard]] double count(EntryIndex entry, std::size_t half_life, RequestClock now) const {
    const double faded = now == now_ ? faded_[half_life] : fading(half_life, now);
    return seen_[entry].counts[half_life] * faded;
  }

  /// The same as of base(): what all counts have faded by since is left out.
  [[nodiscard]] double count_at_base(EntryIndex entry, std::size_t half_life) const {
    return seen_[entry].counts[half_life];
  }
  /// The time to which counts are kept; it moves once in 500,000 requests.
  [[nodiscard]] RequestClock base() const { return base_; }

  /// Requests per request, from the decayed count.
  [[nodiscard]] double decayed_rate(EntryIndex entry, std::size_t half_life,
                                    RequestClock now) const {
    constexpr double kLn2 = 0.6931471805599453;
    return kLn2 / kHalfLives[half_life] * count(entry, half_life, now);
  }

 private:
  static constexpr std::uint32_t kRing = 5;  // Five times make four gaps.

  // A cache line: what a rate needs, kept up to date by requests, which are rarer than scores.
  struct Seen {
    RequestClock last{
        0};          // Zero for a model nobody asked for: seen once, at the beginning of time.
    double span{0};  // From the first time in the ring to the last.
    double gaps{0};  // Times in the ring less one; 0 for a model seen at most once.
    double mean_gap{0};
    std::array<double, kHalfLives.size()> counts{};  // As they were at base_.
  };
  struct Ring {
    std::array<RequestClock, kRing> times{};
    std::uint32_t next{0};   // Where the next time goes.
    std::uint32_t count{0};  // Times in the ring.
  };

  // What a request at base_ counts at `now`.
  [[nodiscard]] double fading(std::size_t half_life, RequestClock now) const {
    const auto age = static_cast<double>(now - std::min(base_, now));
    return std::exp2(-age / kHalfLives[half_life]);
  }
  void rebase(RequestClock now);

  // Decayed counts are kept as of base_: a request then adds to one number, and no other changes
  // for it. What all of them have faded by since is the same, and known for the last request.
  RequestClock base_{0};
  RequestClock now_{0};
  std::array<double, kHalfLives.size()> faded_{1, 1, 1};
  std::vector<Seen> seen_;
  std::vector<Ring> rings_;
};

}  // namespace modelyard

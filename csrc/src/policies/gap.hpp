#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "modelyard/policy.hpp"

namespace modelyard {

/// Expected reload seconds per request and per share of the budget: how much is lost each request
/// the model is away, for the room it takes.
///
///   score = reload_seconds / weight * rate
///   rate  = k / (span + max(0, age - span / k)),  k = min(4, requests - 1)
///
/// where span is the time from the (k+1)th-last request to the last and age the time since the
/// last, both in requests of the whole yard. The rate is that of the last k gaps, and once a model
/// has been silent for longer than its mean gap, the silence counts as part of them: the estimate
/// falls as soon as the model is late, and not before. A model seen once has no gap yet; it gets
/// 0.3 / (age + 1).
///
/// The idea is LIRS's inter-reference recency (Jiang and Zhang, SIGMETRICS 2002), made aware of
/// sizes and costs and averaged over four gaps. Measured against the offline bound it is the best
/// single closed form we know for few large objects, above all on loops, where LRU has no hit at
/// all.
class Gap final : public Policy {
 public:
  [[nodiscard]] std::string_view name() const override { return "gap"; }
  [[nodiscard]] std::unique_ptr<Policy> clone() const override {
    return std::make_unique<Gap>(*this);
  }
  void on_add(EntryIndex entry) override;
  void on_replace(EntryIndex entry, EntryIndex before) override {
    rings_[entry] = rings_[before];
    recent_[entry] = recent_[before];
  }
  void on_request(EntryIndex entry, RequestClock now) override;
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override;

 private:
  static constexpr std::uint32_t kRing = 5;  // Five times make four gaps.

  // Half a cache line: what a score needs, kept up to date by requests, which are rarer than
  // scores.
  struct Recent {
    RequestClock last{
        0};          // Zero for a model nobody asked for: seen once, at the beginning of time.
    double span{0};  // From the first time in the ring to the last.
    double gaps{0};  // Times in the ring less one; 0 for a model seen at most once.
    double mean_gap{0};
  };
  struct Ring {
    std::array<RequestClock, kRing> times{};
    std::uint32_t next{0};   // Where the next time goes.
    std::uint32_t count{0};  // Times in the ring.
  };

  std::vector<Recent> recent_;
  std::vector<Ring> rings_;
};

}  // namespace modelyard

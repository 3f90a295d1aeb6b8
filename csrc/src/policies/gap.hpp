#pragma once

#include <array>
#include <cstdint>
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
  void on_add(EntryIndex entry) override;
  void on_request(EntryIndex entry, RequestClock now) override;
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override;

 private:
  static constexpr std::uint32_t kRing = 5;  // Five times make four gaps.

  struct History {
    std::array<RequestClock, kRing> times{};
    std::uint32_t next{0};   // Where the next time goes.
    std::uint32_t count{0};  // Times in the ring.
  };

  // The place in the ring `steps` before `place`, at most a whole round.
  [[nodiscard]] static constexpr std::uint32_t before(std::uint32_t place, std::uint32_t steps) {
    return place >= steps ? place - steps : place + kRing - steps;
  }

  std::vector<History> histories_;
};

}  // namespace modelyard

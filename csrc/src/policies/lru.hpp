#pragma once

#include <memory>
#include <vector>

#include "modelyard/policy.hpp"

namespace modelyard {

/// Least recently used: the score is the clock of the last request. Blind to size, cost and
/// frequency, and never far behind anything cleverer; the yardstick of the others.
class Lru final : public Policy {
 public:
  [[nodiscard]] std::string_view name() const override { return "lru"; }
  [[nodiscard]] std::unique_ptr<Policy> clone() const override {
    return std::make_unique<Lru>(*this);
  }
  void on_add(EntryIndex entry) override;
  void on_replace(EntryIndex entry, EntryIndex before) override { last_[entry] = last_[before]; }
  void on_request(EntryIndex entry, RequestClock now) override { last_[entry] = now; }
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override;

 private:
  std::vector<RequestClock> last_;
};

}  // namespace modelyard

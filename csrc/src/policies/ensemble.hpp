#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "modelyard/policy.hpp"
#include "policies/expert.hpp"
#include "policies/footprints.hpp"
#include "policies/history.hpp"
#include "policies/shadow.hpp"

namespace modelyard {

/// Follows whichever expert would have cost least.
///
/// Each expert runs a shadow cache and pays for its misses there. The yard follows one of them, the
/// leader: a model that the leader's shadow does not hold goes before one that it holds, and among
/// those the leader's worth decides. When the leader has cost more than the best one by a part
/// (kPatience) of what it takes to load all that its shadow holds, and by a few loads
/// (kPatienceLoads), the best one leads. Nothing is moved at such a switch: what the new leader
/// would not hold goes first when room is needed.
///
/// So between two switches the yard pays at most what the leader pays and one fill of its shadow,
/// and no leader exceeds the best before it is dropped by more than the larger of the two. The
/// first leader is LRU, whose competitive bound holds up to these terms.
class Ensemble final : public Policy {
 public:
  /// Both must outlive it, as constants do.
  Ensemble(std::string_view name, std::span<const std::string_view> experts);

  [[nodiscard]] std::string_view name() const override { return name_; }
  [[nodiscard]] std::unique_ptr<Policy> clone() const override {
    return std::unique_ptr<Policy>(new Ensemble(*this));
  }
  void on_add(EntryIndex entry) override;
  void on_replace(EntryIndex entry, EntryIndex before) override;
  void on_request(const Wish& wish, RequestClock now) override;
  void on_budgets(std::span<const Bytes> budgets) override;
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override {
    return led_by().expert().score(history_, candidate, now);
  }
  [[nodiscard]] bool keeps(EntryIndex entry) const override { return led_by().holds(entry); }
  [[nodiscard]] std::string_view leader() const override { return led_by().expert().name(); }
  [[nodiscard]] bool lru_missed() const override { return lru_missed_; }
  [[nodiscard]] std::optional<ShadowSeconds> shadow_seconds() const override {
    return ShadowSeconds{.own = own_seconds_, .lru = lru_seconds_};
  }

 private:
  static constexpr double kPatience = 0.05;
  // Two good experts pay in turns: without this, a small yard would follow each miss.
  static constexpr double kPatienceLoads = 4;
  static constexpr double kMemory = 20;  // Fills after which the past counts half.
  static constexpr double kFillAlpha = 0.01;
  static constexpr double kLoadAlpha = 0.05;

  Ensemble(const Ensemble&) = default;
  [[nodiscard]] const Shadow& led_by() const { return shadows_[leader_]; }
  void choose_leader();

  std::string_view name_;
  History history_;
  Footprints footprints_;
  std::vector<Shadow> shadows_;
  std::vector<double> losses_;  // Seconds each expert has paid, lately.
  double own_seconds_{0};       // What the leaders have paid, each in its time.
  double lru_seconds_{0};
  bool lru_missed_{false};
  std::size_t leader_{0};
  double load_{0};  // Seconds of one of the leaders' loads, as a mean.
  double fill_{0};  // Seconds that loading the leader's content takes, as a mean.
};

}  // namespace modelyard

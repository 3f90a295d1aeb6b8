#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "modelyard/policy.hpp"
#include "policies/expert.hpp"
#include "policies/follower.hpp"
#include "policies/footprints.hpp"
#include "policies/history.hpp"
#include "policies/shadow.hpp"

namespace modelyard {

/// Follows whichever expert would have cost least.
///
/// Each expert runs a shadow cache and pays for its misses there. The yard follows one of them, the
/// leader: a model that the leader's shadow does not hold goes before one that it holds, and among
/// those the leader's worth decides. Nothing is moved when the leader changes: what the new one
/// would not hold goes first when room is needed. The first leader is LRU. It changes
///
/// - to the best one, when the leader has cost more than that one by the patience, and by more than
///   chance explains. The patience is a part (kPatience) of what it takes to load all that the
///   leader's shadow holds, and at least a few loads (kPatienceLoads). Chance is a number of
///   standard deviations: if two experts paid alike in the long run, the difference of their bills
///   would be a random walk, whose variance is the sum of the squared differences so far.
/// - to LRU, when the leader has cost more than LRU by the patience, whatever chance explains;
/// - to LRU, when the yard itself has paid more than LRU by a part of LRU's bill (kAllowance) and a
///   few loads (kAllowanceLoads), and half the patience (kDrawdown) has been added since the least
///   it was under this leader.
///   What the others were ahead of LRU is then forgotten: they begin anew.
///
/// What the yard itself has paid is what a Follower pays, without pins and waiting loads: what a
/// change costs counts there, and in no shadow.
///
/// So between two changes the yard pays at most what the leader pays and one fill of its shadow.
/// Without the doubt, several experts that are as good as LRU lead in turns, each chosen after its
/// luck and dropped after its bad luck, and every change costs the patience. Without the return to
/// LRU, what a leader was ahead when it was chosen is what it may lose before it is dropped.
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
    return ShadowSeconds{.own = own_seconds_, .lru = lru_seconds_, .yard = yard_seconds_};
  }

 private:
  static constexpr std::size_t kLru = 0;
  static constexpr double kPatience = 0.05;
  // Two good experts pay in turns: without this, a small yard would follow each miss.
  static constexpr double kPatienceLoads = 4;
  // Standard deviations of chance: to leave LRU, and to go from one of the others to another.
  static constexpr double kDoubt = 2;
  static constexpr double kDoubtAmongOthers = 1.5;
  static constexpr double kAllowance = 0.01;  // Of LRU's bill.
  static constexpr double kAllowanceLoads = 2;
  static constexpr double kDrawdown = 0.5;  // Of the patience.
  static constexpr double kMemory = 20;     // Fills after which the past counts half.
  static constexpr double kFillAlpha = 0.01;
  static constexpr double kLoadAlpha = 0.05;

  Ensemble(const Ensemble&) = default;
  [[nodiscard]] const Shadow& led_by() const { return shadows_[leader_]; }
  void choose_leader();
  void follow(std::size_t expert);
  [[nodiscard]] bool is_no_chance(double ahead, std::size_t expert) const;
  void note_differences();
  void forget();

  std::string_view name_;
  History history_;
  Footprints footprints_;
  std::vector<Shadow> shadows_;
  Follower follower_;
  std::vector<double> payments_;  // For the last request, in seconds.
  std::vector<double> losses_;    // Seconds each expert has paid, lately.
  // Of each two experts, in the rows of a matrix: the sum of the squared differences of what they
  // have paid, lately.
  std::vector<double> squares_;
  double own_seconds_{0};   // What the leaders have paid, each in its time.
  double yard_seconds_{0};  // What the follower has paid.
  double lru_seconds_{0};
  double least_regret_{0};  // Of yard_seconds_ less lru_seconds_, since the leader leads.
  bool lru_missed_{false};
  std::size_t leader_{kLru};
  double load_{0};  // Seconds of one of the leaders' loads, as a mean.
  double fill_{0};  // Seconds that loading the leader's content takes, as a mean.
};

}  // namespace modelyard

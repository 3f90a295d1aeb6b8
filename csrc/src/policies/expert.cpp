#include "policies/expert.hpp"

#include <cmath>
#include <vector>

#include "policies/next_use.hpp"

namespace modelyard {
namespace {

// An expert that is a formula and remembers nothing.
template <typename Rate>
class Formula : public Expert {
 public:
  [[nodiscard]] std::string_view name() const override { return Rate::kName; }
  [[nodiscard]] std::unique_ptr<Expert> clone() const override {
    return std::make_unique<Formula>(*this);
  }
  [[nodiscard]] double score(const History& history, const Candidate& candidate,
                             RequestClock now) const override {
    return Rate::score(history, candidate, now);
  }
  [[nodiscard]] Curve curve(const History& history, EntryIndex entry,
                            double reload_seconds) const override {
    return Rate::curve(history, entry, reload_seconds);
  }
  [[nodiscard]] int weight_power() const override { return Rate::kWeightPower; }
};

struct LruRule {
  static constexpr std::string_view kName{"lru"};
  static double score(const History& history, const Candidate& candidate, RequestClock) {
    return static_cast<double>(history.last(candidate.entry));
  }
  static constexpr int kWeightPower = 0;
  static Curve curve(const History& history, EntryIndex entry, double) {
    return {.top = static_cast<double>(history.last(entry))};
  }
};

double density(const Candidate& candidate) { return candidate.reload_seconds / candidate.weight; }

struct GapRule {
  static constexpr std::string_view kName{"gap"};
  static double score(const History& history, const Candidate& candidate, RequestClock now) {
    return density(candidate) * history.gap_rate(candidate.entry, now);
  }
  static constexpr int kWeightPower = 1;
  static Curve curve(const History& history, EntryIndex entry, double reload_seconds) {
    const History::GapRate rate = history.gap_rate(entry);
    return {.top = reload_seconds * rate.gaps, .span = rate.span, .late_after = rate.late_after};
  }
};

struct MixRule {
  static constexpr std::string_view kName{"mix"};
  static double score(const History& history, const Candidate& candidate, RequestClock now) {
    const double gap = history.gap_rate(candidate.entry, now);
    const double decayed = history.decayed_rate(candidate.entry, History::kShort, now);
    return density(candidate) * std::sqrt(gap * decayed);
  }
  // The square of the score: it orders alike.
  static constexpr int kWeightPower = 2;
  static Curve curve(const History& history, EntryIndex entry, double reload_seconds) {
    const History::GapRate rate = history.gap_rate(entry);
    const double count = history.count_at_base(entry, History::kShort);
    return {.top = reload_seconds * reload_seconds * rate.gaps * count,
            .span = rate.span,
            .late_after = rate.late_after};
  }
};

struct DecayRule {
  static constexpr std::string_view kName{"decay"};
  static double score(const History& history, const Candidate& candidate, RequestClock now) {
    return density(candidate) * history.decayed_rate(candidate.entry, History::kLong, now);
  }
  // All counts fade alike: their order stays as it was at the history's base.
  static constexpr int kWeightPower = 1;
  static Curve curve(const History& history, EntryIndex entry, double reload_seconds) {
    return {.top = reload_seconds * history.count_at_base(entry, History::kLong)};
  }
};

class Gdsf final : public Expert {
 public:
  [[nodiscard]] std::string_view name() const override { return "gdsf"; }
  [[nodiscard]] std::unique_ptr<Expert> clone() const override {
    return std::make_unique<Gdsf>(*this);
  }
  [[nodiscard]] double score(const History&, const Candidate& candidate,
                             RequestClock) const override {
    return worth_[candidate.entry];
  }
  [[nodiscard]] Curve curve(const History&, EntryIndex entry, double) const override {
    return {.top = worth_[entry]};
  }
  [[nodiscard]] int weight_power() const override { return 0; }
  void on_add(EntryIndex entry) override {
    if (worth_.size() <= entry) worth_.resize(entry + std::size_t{1});
    worth_[entry] = 0;
  }
  void on_replace(EntryIndex entry, EntryIndex before) override { worth_[entry] = worth_[before]; }
  void on_request(const History& history, const Candidate& wanted, RequestClock now) override {
    worth_[wanted.entry] =
        least_ + density(wanted) * history.count(wanted.entry, History::kMiddle, now);
  }
  void on_evict(double score) override { least_ = std::max(least_, score); }

 private:
  double least_{0};
  std::vector<double> worth_;
};

}  // namespace

std::unique_ptr<Expert> make_expert(std::string_view name) {
  if (name == LruRule::kName) return std::make_unique<Formula<LruRule>>();
  if (name == GapRule::kName) return std::make_unique<Formula<GapRule>>();
  if (name == MixRule::kName) return std::make_unique<Formula<MixRule>>();
  if (name == DecayRule::kName) return std::make_unique<Formula<DecayRule>>();
  if (name == "next-use") return std::make_unique<NextUse>();
  if (name == "gdsf") return std::make_unique<Gdsf>();
  return nullptr;
}

}  // namespace modelyard

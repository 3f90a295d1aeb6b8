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

// Belady's rule for what is asked for at regular times:
//
//   cost / weight / (spread + |now - due|),  due = last + mean gap,  spread = irregularity * mean
//   gap
//
// A model is due a mean gap (of the last four at most) after its last request. Until then it is
// worth the more the nearer that is; once it is late, the less the later. By how much due times are
// wrong is learned from all returns, as a part of the gap: 0 on a circle, where this is cost-Belady
// without knowing the future, about 0.6 where requests come at random, where it is nearly a rate of
// the last gaps.
//
// Whoever was asked for once has no gap: one request in all the time since the model was added,
// cost / weight / (1 + now - added). So among those the cost decides and not who came last, and a
// circle is held on to in its second lap, when all have been seen once.
class Due final : public Expert {
 public:
  [[nodiscard]] std::string_view name() const override { return "due"; }
  [[nodiscard]] std::unique_ptr<Expert> clone() const override {
    return std::make_unique<Due>(*this);
  }
  [[nodiscard]] double score(const History&, const Candidate& candidate,
                             RequestClock now) const override {
    const Visit& visit = visits_[candidate.entry];
    return density(candidate) / (visit.spread + std::abs(static_cast<double>(now) - visit.due));
  }
  [[nodiscard]] Curve curve(const History&, EntryIndex entry,
                            double reload_seconds) const override {
    const Visit& visit = visits_[entry];
    return {.top = reload_seconds, .span = visit.spread, .late_after = visit.due};
  }
  [[nodiscard]] bool rises() const override { return true; }
  [[nodiscard]] int weight_power() const override { return 1; }
  void on_add(EntryIndex entry) override {
    if (visits_.size() <= entry) visits_.resize(entry + std::size_t{1});
    visits_[entry] = Visit{.due = now_};
  }
  void on_replace(EntryIndex entry, EntryIndex before) override {
    visits_[entry] = visits_[before];
  }
  void on_request(const History& history, const Candidate& wanted, RequestClock now) override {
    now_ = static_cast<double>(now);
    Visit& visit = visits_[wanted.entry];
    if (visit.gap > 0) {
      const double wrong = std::min(1.0, std::abs(now_ - visit.due) / visit.gap);
      irregularity_ += kAlpha * (wrong - irregularity_);
    }
    visit.gap = history.mean_gap(wanted.entry);
    if (visit.gap == 0) return;  // The first request.
    visit.due = now_ + visit.gap;
    visit.spread = std::max(1.0, irregularity_ * visit.gap);
  }

 private:
  static constexpr double kAlpha = 0.01;  // About the last hundred returns.
  // What it comes to where gaps are exponential (2/e - 1/e^2): nothing is known to be regular.
  static constexpr double kAtRandom = 0.6;
  struct Visit {
    double due{0};  // When it was added, until there is a gap.
    double spread{1};
    double gap{0};
  };

  double irregularity_{kAtRandom};
  double now_{0};
  std::vector<Visit> visits_;
};

}  // namespace

std::unique_ptr<Expert> make_expert(std::string_view name) {
  if (name == LruRule::kName) return std::make_unique<Formula<LruRule>>();
  if (name == GapRule::kName) return std::make_unique<Formula<GapRule>>();
  if (name == MixRule::kName) return std::make_unique<Formula<MixRule>>();
  if (name == DecayRule::kName) return std::make_unique<Formula<DecayRule>>();
  if (name == "next-use") return std::make_unique<NextUse>();
  if (name == "due") return std::make_unique<Due>();
  if (name == "gdsf") return std::make_unique<Gdsf>();
  return nullptr;
}

}  // namespace modelyard

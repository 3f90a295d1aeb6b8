#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <memory>
#include <string_view>
#include <vector>

#include "policies/expert.hpp"

namespace modelyard {

/// Linear regression that learns as it goes and forgets: recursive least squares.
///
/// Old samples lose weight by kForgetting with each new one, but never so far that a coefficient
/// would be less certain than at the beginning: without that, directions in which no sample varies
/// (a loop shows the same features for ever) would make the numbers grow without end.
class LeastSquares {
 public:
  static constexpr std::size_t kFeatures = 11;
  using Vector = std::array<double, kFeatures>;

  explicit LeastSquares(const Vector& prior);

  [[nodiscard]] double predict(const Vector& features) const;
  void learn(const Vector& features, double target);
  [[nodiscard]] const Vector& coefficients() const { return theta_; }

 private:
  static constexpr double kForgetting = 0.9995;
  static constexpr double kPriorVariance = 0.1;

  Vector theta_;
  std::array<Vector, kFeatures> covariance_{};
};

/// cost / weight / the requests until the next use, which it predicts: their logarithm, linear in
/// what is known of the model, as learned from requests so far.
///
/// Each request says how long the model was away: a sample at its last request, and one at a moment
/// between. Who has not come back within the horizon, twenty times as many requests as models fit
/// into memory, is a sample that says so: whoever is only asked for once would teach nothing
/// otherwise.
///
/// The idea is LRB's (Song, Berger, Li and Lloyd, NSDI 2020), with a model that small numbers of
/// objects can feed.
class NextUse final : public Expert {
 public:
  NextUse();

  [[nodiscard]] std::string_view name() const override { return "next-use"; }
  [[nodiscard]] std::unique_ptr<Expert> clone() const override;
  [[nodiscard]] double score(const History& history, const Candidate& candidate,
                             RequestClock now) const override;
  [[nodiscard]] bool draws_curves() const override { return false; }
  void on_add(EntryIndex entry) override;
  void on_replace(EntryIndex entry, EntryIndex before) override;
  void on_request(const History& history, const Candidate& wanted, RequestClock now) override;

 private:
  static constexpr std::size_t kRates = 3;
  static constexpr double kLeastHorizon = 20;
  static constexpr double kMostHorizon = 32768;  // Requests that are remembered.
  // What a prediction starts from, as of the last request.
  struct Past {
    RequestClock last{0};
    bool seen{false};
    bool once{true};  // Or never: it has no gap.
    double mean_gap{0};
    double log_last_gap{0};
    double log_mean_gap{0};
    std::array<double, kRates> counts{};
    std::array<double, kRates> log_rates{};
  };
  struct Asked {
    EntryIndex entry;
    RequestClock when;
  };

  [[nodiscard]] static LeastSquares::Vector features(const Past& past, RequestClock now);
  void learn_return(const Past& past, RequestClock now);
  void learn_absences(RequestClock now);
  void remember(EntryIndex entry, const History& history, RequestClock now);

  LeastSquares model_;
  std::vector<Past> pasts_;  // By entry.
  std::deque<Asked> asked_;  // The requests within the horizon, the oldest first.
  double mean_weight_{0};    // Of the models asked for.
  double horizon_{kLeastHorizon};
};

}  // namespace modelyard

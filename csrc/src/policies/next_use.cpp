#include "policies/next_use.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace modelyard {
namespace {

constexpr std::array<double, 3> kHalfLives{300, 3000, 30000};
constexpr double kLn2 = 0.6931471805599453;

// From 0 to below 1: looks random and is the same in every run (splitmix64).
double scrambled(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return static_cast<double>((x ^ (x >> 31)) >> 11U) * 0x1p-53;
}

// An age below `away` of which each order of magnitude is as likely as the next: an age counts by
// its logarithm.
RequestClock some_age(double away, RequestClock seed) {
  return static_cast<RequestClock>(std::pow(away, scrambled(seed)));
}

}  // namespace

LeastSquares::LeastSquares(const Vector& prior) : theta_(prior) {
  for (std::size_t i = 0; i < kFeatures; ++i) covariance_[i][i] = kPriorVariance;
}

double LeastSquares::predict(const Vector& features) const {
  double sum = 0;
  for (std::size_t i = 0; i < kFeatures; ++i) sum += theta_[i] * features[i];
  return sum;
}

void LeastSquares::learn(const Vector& features, double target) {
  // The covariance is symmetric: sums of its rows are sums of its columns, and need no shuffling.
  Vector gain{};
  for (std::size_t i = 0; i < kFeatures; ++i) {
    for (std::size_t j = 0; j < kFeatures; ++j) gain[j] += covariance_[i][j] * features[i];
  }
  double variance = kForgetting;
  double trace = 0;
  for (std::size_t i = 0; i < kFeatures; ++i) {
    variance += gain[i] * features[i];
    trace += covariance_[i][i];
  }
  const double step = 1 / variance;
  const double error = target - predict(features);
  for (std::size_t i = 0; i < kFeatures; ++i) theta_[i] += gain[i] * step * error;
  const double fade = trace < kPriorVariance * kFeatures * kForgetting ? 1 / kForgetting : 1;
  for (std::size_t i = 0; i < kFeatures; ++i) {
    const double down = gain[i] * step;
    for (std::size_t j = 0; j < kFeatures; ++j) {
      covariance_[i][j] = (covariance_[i][j] - down * gain[j]) * fade;
    }
  }
}

// It begins between the last gaps and the decayed rate, where the closed forms are.
NextUse::NextUse() : model_({0, 0, 0, 0.5, 0, -0.5, 0, 0, 0, 0, 0}) {}

std::unique_ptr<Expert> NextUse::clone() const { return std::make_unique<NextUse>(*this); }

void NextUse::on_add(EntryIndex entry) {
  if (pasts_.size() <= entry) pasts_.resize(entry + std::size_t{1});
  pasts_[entry] = Past{};
}

void NextUse::on_replace(EntryIndex entry, EntryIndex before) { pasts_[entry] = pasts_[before]; }

LeastSquares::Vector NextUse::features(const Past& past, RequestClock now) {
  constexpr double kLowest = -20;  // Of a logarithmic rate: seldom is seldom.
  const auto age = static_cast<double>(now - std::min(past.last, now));
  const double log_age = std::log1p(age);
  const auto rate = [&](std::size_t i) {
    return std::max(past.log_rates[i] - kLn2 / kHalfLives[i] * age, kLowest);
  };
  if (past.once) return {1, log_age, 0, 0, rate(0), rate(1), rate(2), 1, log_age, 0, 0};
  const double late = std::max(0.0, log_age - past.log_mean_gap);
  const double early = std::log1p(std::max(0.0, past.mean_gap - age));
  return {1,    log_age, past.log_last_gap, past.log_mean_gap, rate(0), rate(1), rate(2), 0, 0,
          late, early};
}

double NextUse::score(const History&, const Candidate& candidate, RequestClock now) const {
  constexpr double kMost = 50;
  const double log_requests = model_.predict(features(pasts_[candidate.entry], now));
  return candidate.reload_seconds / candidate.weight *
         std::exp(-std::clamp(log_requests, -kMost, kMost));
}

void NextUse::on_request(const History& history, const Candidate& wanted, RequestClock now) {
  constexpr double kWeightAlpha = 0.001;
  mean_weight_ = mean_weight_ == 0 ? wanted.weight
                                   : mean_weight_ + kWeightAlpha * (wanted.weight - mean_weight_);
  horizon_ = std::clamp(20 / mean_weight_, kLeastHorizon, kMostHorizon);
  if (pasts_[wanted.entry].seen) learn_return(pasts_[wanted.entry], now);
  learn_absences(now);
  remember(wanted.entry, history, now);
}

void NextUse::learn_return(const Past& past, RequestClock now) {
  const auto sample = [&](RequestClock at) {
    const double left = std::clamp(static_cast<double>(now - at), 1.0, horizon_);
    model_.learn(features(past, at), std::log(left));
  };
  sample(past.last);
  const RequestClock away = now - past.last;
  if (away > 1) sample(past.last + some_age(static_cast<double>(away), now));
}

// Of the requests that have just fallen behind the horizon, those whose model has not been asked
// for since.
void NextUse::learn_absences(RequestClock now) {
  // Two a request: more than come, so the list shrinks with the horizon, and work stays bounded.
  for (int i = 0; i < 2 && !asked_.empty(); ++i) {
    const Asked oldest = asked_.front();
    if (static_cast<double>(now - oldest.when) < horizon_) return;
    asked_.pop_front();
    const Past& past = pasts_[oldest.entry];
    if (past.last != oldest.when) continue;
    model_.learn(features(past, past.last), std::log(horizon_));
    model_.learn(features(past, past.last + some_age(horizon_, now)), std::log(horizon_));
  }
}

void NextUse::remember(EntryIndex entry, const History& history, RequestClock now) {
  Past& past = pasts_[entry];
  const auto gap = static_cast<double>(now - past.last);
  for (std::size_t i = 0; i < kRates; ++i) {
    past.counts[i] = past.counts[i] * std::exp2(-gap / kHalfLives[i]) + 1;
    past.log_rates[i] = std::log(past.counts[i] * kLn2 / kHalfLives[i]);
  }
  if (past.seen) {
    past.once = false;
    past.log_last_gap = std::log(std::max(gap, 1.0));
    past.mean_gap = history.mean_gap(entry);
    past.log_mean_gap = std::log(std::max(past.mean_gap, 1.0));
  }
  past.seen = true;
  past.last = now;
  asked_.push_back({entry, now});
}

}  // namespace modelyard

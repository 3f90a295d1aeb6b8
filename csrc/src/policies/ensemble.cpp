#include "policies/ensemble.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace modelyard {

Ensemble::Ensemble(std::string_view name, std::span<const std::string_view> experts)
    : name_(name),
      payments_(experts.size()),
      losses_(experts.size()),
      squares_(experts.size() * experts.size()) {
  shadows_.reserve(experts.size());
  for (const std::string_view each : experts) shadows_.emplace_back(make_expert(each));
}

void Ensemble::on_add(EntryIndex entry) {
  history_.add(entry);
  for (Shadow& shadow : shadows_) shadow.add(footprints_, entry);
  follower_.add(footprints_, entry);
  footprints_.add(entry);
}

void Ensemble::on_replace(EntryIndex entry, EntryIndex before) {
  history_.copy(entry, before);
  for (Shadow& shadow : shadows_) shadow.replace(entry, before);
}

void Ensemble::on_budgets(std::span<const Bytes> budgets) {
  footprints_.set_budgets(budgets);
  for (Shadow& shadow : shadows_) shadow.reweigh(history_, footprints_);
}

void Ensemble::on_request(const Wish& wish, RequestClock now) {
  history_.request(wish.entry, now);
  for (std::size_t i = 0; i < shadows_.size(); ++i) {
    payments_[i] = shadows_[i].access(history_, footprints_, wish, now);
    losses_[i] += payments_[i];
  }
  if (const double paid = payments_[leader_]; paid > 0) {
    own_seconds_ += paid;
    load_ = load_ == 0 ? paid : load_ + kLoadAlpha * (paid - load_);
  }
  const double content = led_by().content_seconds();
  fill_ = fill_ == 0 ? content : fill_ + kFillAlpha * (content - fill_);
  note_differences();
  choose_leader();
  forget();
  lru_seconds_ += payments_[kLru];
  lru_missed_ = payments_[kLru] > 0;
  yard_seconds_ += follower_.access(history_, footprints_, wish, led_by(), now);
  footprints_.set(wish);
}

void Ensemble::note_differences() {
  const std::size_t count = payments_.size();
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t j = 0; j < count; ++j) {
      const double difference = payments_[i] - payments_[j];
      squares_[i * count + j] += difference * difference;
    }
  }
}

// True if the leader has paid `ahead` seconds more than an expert by more than chance.
bool Ensemble::is_no_chance(double ahead, std::size_t expert) const {
  const double doubt = leader_ == kLru ? kDoubt : kDoubtAmongOthers;
  return ahead > doubt * std::sqrt(squares_[leader_ * losses_.size() + expert]);
}

// The follower's bill is that before this request, as LRU's: what it pays now depends on this.
void Ensemble::choose_leader() {
  const double patience = std::max(kPatience * fill_, kPatienceLoads * load_);
  const double regret = yard_seconds_ - lru_seconds_;
  least_regret_ = std::min(least_regret_, regret);
  if (leader_ != kLru) {
    const double allowed = kAllowance * lru_seconds_ + kAllowanceLoads * load_;
    if (regret > std::max(allowed, least_regret_ + kDrawdown * patience)) {
      for (double& loss : losses_) loss = std::max(loss, losses_[kLru]);
      std::fill(squares_.begin(), squares_.end(), 0.0);
      return follow(kLru);
    }
    if (losses_[leader_] - losses_[kLru] > patience) return follow(kLru);
  }
  const auto best =
      static_cast<std::size_t>(std::min_element(losses_.begin(), losses_.end()) - losses_.begin());
  const double ahead = losses_[leader_] - losses_[best];
  if (ahead > patience && is_no_chance(ahead, best)) follow(best);
}

void Ensemble::follow(std::size_t expert) {
  leader_ = expert;
  least_regret_ = yard_seconds_ - lru_seconds_;
}

void Ensemble::forget() {
  const double mean =
      std::accumulate(losses_.begin(), losses_.end(), 0.0) / static_cast<double>(losses_.size());
  if (mean <= kMemory * fill_) return;
  for (double& loss : losses_) loss /= 2;
  for (double& square : squares_) square /= 4;
}

}  // namespace modelyard

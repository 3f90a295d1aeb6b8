#include "policies/ensemble.hpp"

#include <algorithm>
#include <numeric>

namespace modelyard {

Ensemble::Ensemble(std::string_view name, std::span<const std::string_view> experts)
    : name_(name), losses_(experts.size()) {
  shadows_.reserve(experts.size());
  for (const std::string_view each : experts) shadows_.emplace_back(make_expert(each));
}

void Ensemble::on_add(EntryIndex entry) {
  history_.add(entry);
  for (Shadow& shadow : shadows_) shadow.add(footprints_, entry);
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
    const double paid = shadows_[i].access(history_, footprints_, wish, now);
    losses_[i] += paid;
    if (i == leader_ && paid > 0) {
      own_seconds_ += paid;
      load_ = load_ == 0 ? paid : load_ + kLoadAlpha * (paid - load_);
    }
    if (i == 0) {
      lru_seconds_ += paid;
      lru_missed_ = paid > 0;
    }
  }
  footprints_.set(wish);
  const double content = led_by().content_seconds();
  fill_ = fill_ == 0 ? content : fill_ + kFillAlpha * (content - fill_);
  choose_leader();
}

void Ensemble::choose_leader() {
  const auto best = std::min_element(losses_.begin(), losses_.end());
  if (losses_[leader_] - *best > std::max(kPatience * fill_, kPatienceLoads * load_)) {
    leader_ = static_cast<std::size_t>(best - losses_.begin());
  }
  const double mean =
      std::accumulate(losses_.begin(), losses_.end(), 0.0) / static_cast<double>(losses_.size());
  if (mean > kMemory * fill_) {
    for (double& loss : losses_) loss /= 2;
  }
}

}  // namespace modelyard

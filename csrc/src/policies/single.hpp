#pragma once

#include <memory>
#include <span>
#include <utility>

#include "modelyard/policy.hpp"
#include "policies/expert.hpp"
#include "policies/footprints.hpp"
#include "policies/history.hpp"
#include "policies/shadow.hpp"

namespace modelyard {

/// One expert, followed to the letter. Beside it a shadow of LRU, to be measured against; it has no
/// say.
class Single final : public Policy {
 public:
  explicit Single(std::unique_ptr<Expert> expert) : expert_(std::move(expert)) {}

  [[nodiscard]] std::string_view name() const override { return expert_->name(); }
  [[nodiscard]] std::unique_ptr<Policy> clone() const override {
    return std::unique_ptr<Policy>(new Single(*this));
  }
  void on_add(EntryIndex entry) override {
    history_.add(entry);
    expert_->on_add(entry);
    lru_.add(footprints_, entry);
    footprints_.add(entry);
  }
  void on_replace(EntryIndex entry, EntryIndex before) override {
    history_.copy(entry, before);
    expert_->on_replace(entry, before);
    lru_.replace(entry, before);
  }
  void on_request(const Wish& wish, RequestClock now) override {
    history_.request(wish.entry, now);
    expert_->on_request(history_, {wish.entry, wish.weight, wish.reload_seconds}, now);
    lru_missed_ = lru_.access(history_, footprints_, wish, now) > 0;
    footprints_.set(wish);
  }
  void on_budgets(std::span<const Bytes> budgets) override {
    footprints_.set_budgets(budgets);
    lru_.reweigh(history_, footprints_);
  }
  void on_evict(EntryIndex, double score) override { expert_->on_evict(score); }
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override {
    return expert_->score(history_, candidate, now);
  }
  [[nodiscard]] bool lru_missed() const override { return lru_missed_; }

 private:
  Single(const Single& other)
      : Policy(other),
        history_(other.history_),
        expert_(other.expert_->clone()),
        footprints_(other.footprints_),
        lru_(other.lru_),
        lru_missed_(other.lru_missed_) {}

  History history_;
  std::unique_ptr<Expert> expert_;
  Footprints footprints_;
  Shadow lru_{make_expert("lru")};
  bool lru_missed_{false};
};

}  // namespace modelyard

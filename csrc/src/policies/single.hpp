#pragma once

#include <memory>
#include <utility>

#include "modelyard/policy.hpp"
#include "policies/expert.hpp"
#include "policies/history.hpp"

namespace modelyard {

/// One expert, followed to the letter.
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
  }
  void on_replace(EntryIndex entry, EntryIndex before) override {
    history_.copy(entry, before);
    expert_->on_replace(entry, before);
  }
  void on_request(const Wish& wish, RequestClock now) override {
    history_.request(wish.entry, now);
    expert_->on_request(history_, {wish.entry, wish.weight, wish.reload_seconds}, now);
  }
  void on_evict(EntryIndex, double score) override { expert_->on_evict(score); }
  [[nodiscard]] double score(const Candidate& candidate, RequestClock now) const override {
    return expert_->score(history_, candidate, now);
  }

 private:
  Single(const Single& other)
      : Policy(other), history_(other.history_), expert_(other.expert_->clone()) {}

  History history_;
  std::unique_ptr<Expert> expert_;
};

}  // namespace modelyard

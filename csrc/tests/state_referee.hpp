#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "action_referee.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// What the yard's read accessors say after a call is what the observer has counted:
///   - the accounts, and the models and shares that they are the sum of;
///   - who waits is QUEUED, LOADING or on its way out, and never RESIDENT (I4, I8);
///   - a share is charged once, as what its liveliest holder is (I9);
///   - back-off grows within its bounds.
class StateReferee : protected ActionReferee {
 protected:
  using ActionReferee::ActionReferee;

  [[nodiscard]] Verdict compare(const Yard& yard) {
    if (yard.model_count() != models_.size()) return "the number of models differs";
    if (yard.waiting_count() != tickets_.size()) return "the number of waiting tickets differs";
    if (yard.lease_count() != leases_.size()) return "the number of leases differs";
    for (auto& [id, model] : models_) {
      const Entry* entry = yard.entry(id);
      if (entry == nullptr) return describe(id) + " is missing";
      if (Verdict verdict = compare(model, *entry)) return describe(id) + ": " + *verdict;
      if (yard.exclusive(id) != exclusive(id)) return describe(id) + ": other bytes are exclusive";
      if (yard.held_with_shares(id) != held_with_shares(id)) {
        return describe(id) + ": holds other bytes with its shares";
      }
    }
    if (Verdict verdict = compare_shares(yard)) return verdict;
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      const Account& account = yard.account(at(where));
      const std::string name = "device " + std::to_string(where) + ": ";
      const auto in = [&](Phase phase) { return Bytes{bytes_in(phase, where)}; };
      if (account.budget != budgets_[where]) return name + "another budget";
      if (account.reserved != in(Phase::kLoading)) return name + "reserved bytes differ";
      if (account.resident != in(Phase::kResident)) return name + "resident bytes differ";
      if (account.draining != in(Phase::kDraining) + in(Phase::kUnloading)) {
        return name + "draining bytes differ";
      }
      if (account.quarantined != Bytes{quarantined(where)})
        return name + "quarantined bytes differ";
      deficits_[where] = saturating_sub(Bytes{used(where)}, budgets_[where]);
      if (account.deficit != deficits_[where]) return name + "the deficit differs";
      if (account.peak < account.used()) return name + "the peak is below what is used";
      if (yard.device_closed(at(where)) != closed_[where]) return name + "closed differs";
    }
    return std::nullopt;
  }

 private:
  [[nodiscard]] Verdict compare_shares(const Yard& yard) const {
    if (yard.share_count() != shares_.size()) return "the number of shares differs";
    for (const auto& item : shares_) {
      const ShareId id = item.first;
      const Share* share = yard.share(id);
      if (share == nullptr) return describe(id) + " is missing";
      if (share->bytes != Bytes{item.second.bytes}) return describe(id) + " has other bytes";
      if (share->model_count != models_made_of(id)) return describe(id) + ": models differ";
      for (std::size_t where = 0; where < budgets_.size(); ++where) {
        const Holders& there = share->on(at(where));
        const auto differs = [&](Holding holding, Phase phase) {
          return there.of(holding) != holders_in(id, where, phase);
        };
        if (differs(Holding::kLoading, Phase::kLoading) ||
            differs(Holding::kResident, Phase::kResident) ||
            differs(Holding::kDraining, Phase::kDraining) ||
            differs(Holding::kUnloading, Phase::kUnloading)) {
          return describe(id) + ": holders differ";
        }
        const std::size_t pinned =
            holders(id, where, [](const Model& model) { return is_fixed(model, true); });
        if (there.pinned != pinned) return describe(id) + ": pinned holders differ";
      }
    }
    return std::nullopt;
  }

  [[nodiscard]] Verdict compare(Model& model, const Entry& entry) const {
    switch (model.phase) {
      case Phase::kAway:
        if (!model.waiting.empty() && entry.state != State::kQueued) {
          return "whoever waits for an absent model waits in the queue";
        }
        if (model.waiting.empty() && entry.state != State::kCold && entry.state != State::kFailed) {
          return "nobody waits, but it is " + std::string(to_string(entry.state));
        }
        break;
      case Phase::kLoading:
        if (entry.state != State::kLoading) return "should be loading";
        break;
      case Phase::kResident:
        if (entry.state != State::kResident) return "should be resident";
        if (!model.waiting.empty()) return "a resident model is waited for";
        break;
      case Phase::kDraining:
        if (entry.state != State::kDraining) return "should be draining";
        if (model.leases.empty()) return "drains though nobody uses it";
        break;
      case Phase::kUnloading:
        if (entry.state != State::kUnloading) return "should be unloading";
        break;
    }
    if (entry.held != model.held) return "holds other bytes";
    if (entry.held_shares != model.held_shares) return "holds other shares";
    if (entry.held_shares_on != model.held_shares_on) return "holds its shares elsewhere";
    if (entry.shares != model.shares || entry.shares_on != model.shares_on) {
      return "is made of other shares";
    }
    if (entry.placements != model.placements) return "has other placements";
    if (entry.quarantined != model.quarantined) return "other bytes are quarantined";
    if (entry.pinned != model.pinned && !model.removed) return "pinned differs";
    if (entry.removed != model.removed) return "removed differs";
    if (entry.lease_count != model.leases.size()) return "another number of leases";
    if (entry.waiting_count != model.waiting.size()) return "another number of waiting tickets";
    if (entry.waiting_count > options_.max_waiting_per_model) return "more wait than may";
    if (tickets_.size() > options_.max_waiting) return "more wait than may, over all models";
    if (!model.waiting.empty() &&
        (entry.oldest != model.waiting.front() || entry.newest != model.waiting.back())) {
      return "the queue's ends differ";
    }
    if (entry.failure_count > model.failures) {
      const Duration backoff = entry.retry_at - now_;
      if (backoff < options_.backoff_initial && backoff < options_.backoff_max) {
        return "the back-off is shorter than the first one";
      }
      if (backoff > options_.backoff_max) return "the back-off is longer than the longest";
      if (backoff < model.backoff) return "the back-off shrank";
      if (model.failures > 0 && backoff == model.backoff && backoff < options_.backoff_max) {
        return "the back-off does not grow";
      }
      model.backoff = backoff;
      model.retry_at = entry.retry_at;
    }
    model.failures = entry.failure_count;
    return std::nullopt;
  }
};

}  // namespace modelyard::test

#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>

#include "error_referee.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// What the yard asks for fits the state it is asked in:
///   - actions fit the state of the model they are about (I3, I5), tickets end exactly once and
///   oldest first (I6);
///   - a load goes over no budget;
///   - refusals have the cause they name.
/// What is asked for is written down as done.
class ActionReferee : protected ErrorReferee {
 protected:
  using ErrorReferee::ErrorReferee;

  static Verdict unless(bool holds, std::string text) {
    if (holds) return std::nullopt;
    return text;
  }

  // What the yard asks for, checked against the state it is asked in.
  [[nodiscard]] Verdict obey(const Event& event, const Action& action, const Yard& yard) {
    if (const auto* grant = std::get_if<Grant>(&action)) {
      const auto ticket = tickets_.find(grant->ticket);
      if (ticket == tickets_.end()) return "no such ticket waits";
      const ModelId id = ticket->second.first;
      Model& model = models_.at(id);
      if (model.phase != Phase::kResident) return "the model is not resident";
      if (model.waiting.front() != grant->ticket) return "an older ticket waits";
      end_ticket(grant->ticket);
      return start_lease(id, model, grant->lease);
    }
    if (const auto* refusal = std::get_if<Refuse>(&action))
      return obey_refuse(event, *refusal, yard);
    if (const auto* wake = std::get_if<WakeAt>(&action)) {
      wake_at_ = wake->at;
      return std::nullopt;
    }
    if (const auto* load = std::get_if<Load>(&action)) return obey_load(*load);
    if (const auto* dropped = std::get_if<DropCopy>(&action)) return obey_drop(event, *dropped);
    const auto must_stay = [&](ModelId which, const Model& model) {
      return model.pinned && !model.removed &&
             (event.kind != EventKind::kLost || event.model != which);
    };
    ModelId id{};
    if (const auto* stop = std::get_if<CancelLoad>(&action)) id = stop->model;
    if (const auto* drain = std::get_if<Drain>(&action)) id = drain->model;
    if (const auto* unload = std::get_if<Unload>(&action)) id = unload->model;
    const auto found = models_.find(id);
    if (found == models_.end()) return "no such model";
    Model& model = found->second;
    if (std::holds_alternative<CancelLoad>(action)) {
      if (model.phase != Phase::kLoading) return "the model does not load";
      if (model.stopping) return "asked to stop twice";
      model.stopping = true;
      return std::nullopt;
    }
    if (std::holds_alternative<Drain>(action)) {
      if (model.phase != Phase::kResident) return "the model is not resident";
      if (model.leases.empty()) return "nobody uses the model";
      if (must_stay(id, model)) return "the model is pinned";
      model.phase = Phase::kDraining;
      return std::nullopt;
    }
    const Unload& sent = std::get<Unload>(action);
    if (is_held_back(model)) return obey_keep(id, model, sent);
    if (model.phase != Phase::kResident && model.phase != Phase::kDraining) {
      return "the model is not there to be unloaded";
    }
    if (!model.leases.empty()) return "somebody holds a lease";
    // A model pinned while it drained was already told to go: Unload follows Drain.
    if (must_stay(id, model) && model.phase == Phase::kResident) return "the model is pinned";
    model.phase = Phase::kUnloading;
    return obey_keep(id, model, sent);
  }

 private:
  [[nodiscard]] Verdict obey_load(const Load& load) {
    const auto found = models_.find(load.model);
    if (found == models_.end()) return "no such model";
    Model& model = found->second;
    if (model.phase != Phase::kAway) return "the model is not away";
    if (model.removed) return "the model is removed";
    if (model.waiting.empty()) return "nobody waits for the model";
    if (now_ < model.retry_at) return "the model's back-off is not over";
    if (load.placement >= model.placements.size()) return "no such placement";
    Verdict verdict;
    const Amounts wanted = need_at_all(model, load.placement);
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, load.placement, where)) continue;
      if (closed_[where]) verdict = "the device is closed";
      if (loads_on(where) >= options_.load_channels_per_device) verdict = "no load channel is free";
      if (wanted[where] > 0 && used(where) + wanted[where] > budgets_[where].value) {
        verdict = "over budget";
      }
    }
    model.phase = Phase::kLoading;
    model.in_use = load.placement;
    model.asked = false;
    model.lost = false;
    model.held = model.placements[load.placement];
    model.held_shares_on = shares_device(model, load.placement);
    if (model.held_shares_on != kNoDevice) model.held_shares = model.shares;
    return verdict;
  }

  [[nodiscard]] Verdict obey_refuse(const Event& event, const Refuse& refusal, const Yard& yard) {
    const auto ticket = tickets_.find(refusal.ticket);
    if (ticket == tickets_.end()) return "no such ticket waits";
    const auto [id, deadline] = ticket->second;
    Model& model = models_.at(id);
    const std::size_t waiting_here = model.waiting.size() - 1;
    const std::size_t waiting_in_all = tickets_.size() - 1;
    // Deadlines are looked at before the event's own news.
    const Phase phase = event.model == id ? phase_before_ : model.phase;
    const bool own_request = event.kind == EventKind::kRequest && event.model == id;
    end_ticket(refusal.ticket);
    if (refusal.retry_after < Duration::zero()) return "a negative time to retry after";
    switch (refusal.reason) {
      case RefuseReason::kNeverFits: {
        if (!never_fits(model)) return "the model fits a budget";
        const Verdict numbers =
            unless(refusal.needed > refusal.budget, "needed is not above the budget it names");
        return numbers ? numbers : check_numbers(refusal);
      }
      case RefuseReason::kBudgetExhausted:
        if (!exhausted(model, true))
          return "there would be room without pinned and quarantined bytes";
        return check_numbers(refusal);
      case RefuseReason::kQueueFull:
        if (!own_request) return "the queue refuses only who arrives";
        return unless(waiting_here >= options_.max_waiting_per_model ||
                          waiting_in_all >= options_.max_waiting,
                      "the queue is not full");
      case RefuseReason::kLoadFailed:
        if (event.kind == EventKind::kLoadFailed && event.model == id) {
          return unless(refusal.failure == event.failure, "the failure is another one");
        }
        if (!own_request) return "only a failure, or a request after it, is refused so";
        if (now_ >= model.retry_at) return "the back-off is over";
        return unless(refusal.retry_after == model.retry_at - now_,
                      "retry_after is not the rest of the back-off");
      case RefuseReason::kDeadlineUnreachable:
        if (!own_request) return "only who arrives is told that it comes too late";
        if (deadline == kNever || deadline <= now_) return "no deadline is to come";
        if (phase != Phase::kResident && yard.entry(id)->load_count == 0) {
          return "what a load takes has not been measured";
        }
        if (refusal.needs * kReachMargin <= deadline - now_) return "there is time enough";
        return unless(refusal.retry_after > Duration::zero(), "when it could is not said");
      case RefuseReason::kDeadlineInQueue:
        if (now_ < deadline) return "the deadline has not passed";
        if (refusal.retry_after <= Duration::zero()) return "when to come again is not said";
        return unless(phase != Phase::kLoading, "the model is loading");
      case RefuseReason::kDeadlineInLoad:
        if (now_ < deadline) return "the deadline has not passed";
        if (refusal.retry_after <= Duration::zero()) return "when to come again is not said";
        return unless(phase == Phase::kLoading, "the model is not loading");
      case RefuseReason::kRemoved:
        return unless(model.removed, "the model is not removed");
    }
    static_cast<void>(yard);
    return "no such reason";
  }

  [[nodiscard]] Verdict check_numbers(const Refuse& refusal) const {
    if (position(refusal.device) >= budgets_.size()) return "no such device";
    if (refusal.budget != budgets_[position(refusal.device)]) return "that is not the budget";
    for (std::size_t i = 1; i < refusal.holders.size(); ++i) {
      if (refusal.holders[i - 1].bytes < refusal.holders[i].bytes) {
        return "holders are not largest first";
      }
    }
    for (const Holder& holder : refusal.holders) {
      if (holder.bytes == Bytes{0}) continue;
      const auto model = models_.find(holder.model);
      if (model == models_.end()) return "a holder is unknown";
      const Bytes held = held_with_shares(holder.model).on(refusal.device);
      const Bytes kept = held + model->second.quarantined.on(refusal.device);
      if (holder.bytes != held && holder.bytes != kept) return "a holder does not hold that";
    }
    return std::nullopt;
  }
};

}  // namespace modelyard::test

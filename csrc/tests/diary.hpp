#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "tier_referee.hpp"

namespace modelyard::test {

/// What a naive observer writes down of the calls a yard gets: who waits and who holds a lease,
/// what time it is, and what every event says of the models, shares and devices that it is about.
/// It judges nothing but ids, which must be new, and whether try_acquire gave a lease where it
/// should.
class Diary : protected TierReferee {
 public:
  [[nodiscard]] const std::map<TicketId, std::pair<ModelId, Tick>>& tickets() const {
    return tickets_;
  }
  [[nodiscard]] const std::map<LeaseId, ModelId>& leases() const { return leases_; }
  [[nodiscard]] Tick now() const { return now_; }
  [[nodiscard]] Tick wake_at() const { return wake_at_; }
  [[nodiscard]] const YardOptions& options() const { return options_; }

 protected:
  explicit Diary(YardOptions options)
      : TierReferee(options), options_(std::move(options)), deficits_(options_.budgets.size()) {}

  [[nodiscard]] static bool is_told_the_time(EventKind kind) {
    return kind != EventKind::kAddModel && kind != EventKind::kAddShare &&
           kind != EventKind::kSplitShare && kind != EventKind::kForgetShare;
  }

  // The event's own facts.
  [[nodiscard]] Verdict believe(const Event& event, const Outcome& outcome) {
    believe_tier(event, outcome);
    switch (event.kind) {
      case EventKind::kAddModel: {
        if (models_.contains(outcome.model)) return "an id was given out twice";
        if (!fresh(static_cast<std::uint64_t>(outcome.model))) return "not an id";
        make_of(event.spec, models_[outcome.model]);
        break;
      }
      case EventKind::kUpdatePlacements:
        make_of(event.spec, models_.at(event.model));
        models_.at(event.model).in_use.reset();
        break;
      case EventKind::kAddShare:
        if (!fresh(static_cast<std::uint64_t>(outcome.share)) || shares_.contains(outcome.share)) {
          return "a share needs an id of its own";
        }
        shares_[outcome.share].bytes = event.budget.value;
        break;
      case EventKind::kSplitShare:
        if (!fresh(static_cast<std::uint64_t>(outcome.share)) || shares_.contains(outcome.share)) {
          return "a share needs an id of its own";
        }
        split(event.share, outcome.share, event.budget.value);
        break;
      case EventKind::kForgetShare:
        shares_.erase(event.share);
        break;
      case EventKind::kRemoveModel:
        models_.at(event.model).removed = true;
        break;
      case EventKind::kPin:
        models_.at(event.model).pinned = true;
        break;
      case EventKind::kUnpin:
        models_.at(event.model).pinned = false;
        break;
      case EventKind::kSetBudget:
        budgets_[position(event.device)] = event.budget;
        break;
      case EventKind::kSetClosed:
        closed_[position(event.device)] = event.closed;
        break;
      case EventKind::kTryAcquire: {
        Model& model = models_.at(event.model);
        const bool resident = model.phase == Phase::kResident;
        // One that is resident and has a deadline may be out of reach.
        if (outcome.lease ? !resident : resident && event.deadline == kNever) {
          return "try_acquire gives a lease exactly on a resident model";
        }
        if (outcome.lease) return start_lease(event.model, model, *outcome.lease);
        break;
      }
      case EventKind::kRequest:
        if (!fresh(static_cast<std::uint64_t>(outcome.ticket)) ||
            tickets_.contains(outcome.ticket)) {
          return "a ticket needs an id of its own";
        }
        tickets_.emplace(outcome.ticket, std::pair{event.model, event.deadline});
        came_[outcome.ticket] = Came{.at = now_};
        models_.at(event.model).waiting.push_back(outcome.ticket);
        break;
      case EventKind::kCancel:
        end_ticket(event.ticket);
        break;
      case EventKind::kRelease:
        models_.at(leases_.at(event.lease)).leases.erase(event.lease);
        leases_.erase(event.lease);
        break;
      case EventKind::kLoadDone: {
        Model& model = models_.at(event.model);
        model.phase = Phase::kResident;
        learn(model, event.charge);
        model.held = event.charge;
        model.failures = 0;
        model.backoff = Duration{};
        model.retry_at = Tick{};
        model.stopping = false;
        believe_times(event);
        break;
      }
      case EventKind::kLoadFailed: {
        Model& model = models_.at(event.model);
        let_go(model);
        model.stopping = false;
        break;
      }
      case EventKind::kUnloadDone: {
        Model& model = models_.at(event.model);
        const Charge missing = exclusive(event.model).saturating_minus(event.charge);
        model.quarantined = sum(model.quarantined, missing);
        let_go(model);
        break;
      }
      case EventKind::kReclaimed: {
        Model& model = models_.at(event.model);
        model.quarantined = model.quarantined.saturating_minus(event.charge);
        break;
      }
      case EventKind::kRemeasured:
        learn(models_.at(event.model), event.charge);
        models_.at(event.model).held = event.charge;
        break;
      case EventKind::kTick:
        if (now_ >= wake_at_) wake_at_ = kNever;
        break;
      case EventKind::kForgive: {
        Model& model = models_.at(event.model);
        model.failures = 0;
        model.backoff = Duration{};
        model.retry_at = Tick{};
        break;
      }
      case EventKind::kLost:
      case EventKind::kUnload:
      case EventKind::kSetTierBudget:
      case EventKind::kCopyDropped:
      case EventKind::kCopyInUse:
      case EventKind::kCopyLost:
        break;
    }
    return std::nullopt;
  }

  void make_of(const ModelSpec& spec, Model& model) {
    model.placements = spec.placements;
    model.shares = spec.shares;
    model.shares_on = spec.shares_on;
    for (const ShareId share : spec.shares) shares_.at(share).was_used = true;
  }

  // Whoever is made of the whole, or holds it, is made of both or holds both.
  void split(ShareId whole, ShareId part, std::int64_t bytes) {
    shares_[part] = SharedBytes{.bytes = bytes, .was_used = shares_.at(whole).was_used};
    shares_.at(whole).bytes -= bytes;
    for (auto& [id, model] : models_) {
      for (auto* list : {&model.shares, &model.held_shares, &model.copy.shares}) {
        if (std::find(list->begin(), list->end(), whole) != list->end()) list->push_back(part);
      }
    }
  }

  static void let_go(Model& model) {
    model.phase = Phase::kAway;
    model.held = Charge{};
    model.held_shares.clear();
    model.held_shares_on = kNoDevice;
  }

  // An estimate that was caught out is not trusted again: the placement grows to what was measured.
  static void learn(Model& model, const Charge& actual) {
    if (actual.fits_within(model.held) || !model.in_use) return;
    Charge& promise = model.placements[*model.in_use];
    promise = promise.max(actual);
  }

  [[nodiscard]] static bool fresh(std::uint64_t id) { return id != 0 && (id >> 63) == 0; }

  [[nodiscard]] Verdict start_lease(ModelId id, Model& model, LeaseId lease) {
    if (!fresh(static_cast<std::uint64_t>(lease)) || leases_.contains(lease)) {
      return "a lease needs an id of its own";
    }
    leases_.emplace(lease, id);
    model.leases.insert(lease);
    return std::nullopt;
  }

  void end_ticket(TicketId id) {
    const auto found = tickets_.find(id);
    auto& waiting = models_.at(found->second.first).waiting;
    std::erase(waiting, id);
    tickets_.erase(found);
    came_.erase(id);
  }

  void forget_what_is_gone() {
    std::erase_if(models_, [](const auto& item) {
      const Model& model = item.second;
      return model.removed && model.phase == Phase::kAway && model.quarantined.empty() &&
             model.copy.phase == CopyPhase::kNone;
    });
    forget_unused_shares();
  }

  void note_work(const Event& event, const Outcome& outcome, const Yard& yard) {
    if (event.kind != EventKind::kRequest || outcome.error) return;
    const auto came = came_.find(outcome.ticket);
    for (std::size_t where = 0; came != came_.end() && where < budgets_.size(); ++where) {
      came->second.ahead[where] = yard.backlog_seconds(static_cast<DeviceIndex>(where));
    }
  }

  // --- Recounts ---------------------------------------------------------------------------------

  [[nodiscard]] std::size_t waiting_models() const {
    return static_cast<std::size_t>(
        std::count_if(models_.begin(), models_.end(),
                      [](const auto& item) { return !item.second.waiting.empty(); }));
  }

  [[nodiscard]] bool any_deficit() const {
    return std::any_of(deficits_.begin(), deficits_.end(),
                       [](Bytes deficit) { return deficit > Bytes{0}; });
  }

  [[nodiscard]] std::uint32_t loads_on(std::size_t where) const {
    std::uint32_t count = 0;
    for (const auto& [id, model] : models_) {
      if (model.phase != Phase::kLoading) continue;
      if (model.held.on(at(where)) > Bytes{0} || model.held_shares_on == at(where)) ++count;
    }
    return count;
  }

  YardOptions options_;
  std::vector<Bytes> deficits_;
  std::map<TicketId, std::pair<ModelId, Tick>> tickets_;  // Model and deadline of who waits.
  struct Came {
    Tick at{};
    std::array<double, kMaxDevices> ahead{};  // What each device had to do then.
  };
  std::map<TicketId, Came> came_;
  std::map<LeaseId, ModelId> leases_;
  Tick now_{};
  Tick wake_at_{kNever};
  Phase phase_before_{Phase::kAway};  // Of the model the event is about.
};

}  // namespace modelyard::test

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "books.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"
#include "tier_referee.hpp"

namespace modelyard::test {

/// A deliberately naive second opinion on a yard.
///
/// It sees what went in (events), what came out (results, actions) and what the yard's read
/// accessors say afterwards, and keeps books of its own with maps and whole recounts. From these it
/// re-derives the promises of yard.hpp:
///   - actions fit the state of the model they are about (I3, I5), tickets end exactly once and
///   oldest first (I6);
///   - used <= budget + deficit on every device, and a load never makes or widens a deficit (I2);
///   - who waits is QUEUED, LOADING or on its way out, and never RESIDENT (I4, I8);
///   - victims of the only waiting model are a complete and minimal set (I7), where a share comes
///   back with the last of its holders only;
///   - a share is charged once, as what its liveliest holder is, and gone with its last model (I9);
///   - a deficit is being repaid by whoever can repay it;
///   - a model whose memory is lost leaves, also a pinned one;
///   - the only waiting model is not left waiting while it fits, or while idle models could make
///   room;
///   - refusals have the cause they name, back-off grows within its bounds, deadlines are kept,
///   wakes are asked for;
///   - errors change nothing, and are given exactly where the contract says;
///   - what TierReferee says of the host tier.
/// It knows nothing of policies and does not predict who is chosen.
class Referee : private TierReferee {
 public:
  using Books::CopyPhase;
  using Books::is_leaving;
  using Books::Model;
  using Books::Phase;
  using TierReferee::Verdict;

  explicit Referee(YardOptions options)
      : TierReferee(options), options_(std::move(options)), deficits_(options_.budgets.size()) {}

  // What it believes; random events are made from this, never from the yard.
  using Books::budget;
  using Books::closed;
  using Books::device_count;
  using Books::exclusive;
  using Books::models;
  using Books::shares;
  using TierReferee::copy_exclusive;
  using TierReferee::has_tier;
  using TierReferee::tier;
  using TierReferee::tier_budget;
  using TierReferee::unrest;
  [[nodiscard]] const std::map<TicketId, std::pair<ModelId, Tick>>& tickets() const {
    return tickets_;
  }
  [[nodiscard]] const std::map<LeaseId, ModelId>& leases() const { return leases_; }
  [[nodiscard]] Tick now() const { return now_; }
  [[nodiscard]] Tick wake_at() const { return wake_at_; }
  [[nodiscard]] const YardOptions& options() const { return options_; }

  /// Judges one call. `yard` is the state after it. The text of the first violation, or nothing.
  [[nodiscard]] Verdict judge(const Event& event, const Outcome& outcome, const Yard& yard) {
    const std::size_t waiting_before = waiting_models();
    const std::vector<Bytes> deficits_before = deficits_;
    begin_call(event);
    const auto subject = models_.find(event.model);
    phase_before_ = subject == models_.end() ? Phase::kAway : subject->second.phase;
    if (Verdict verdict = judge_result(event, outcome)) return verdict;
    if (outcome.error) {
      if (!outcome.actions.empty()) return "a call that failed asked for something";
    } else {
      if (is_told_the_time(event.kind)) now_ = std::max(now_, event.now);
      if (Verdict verdict = believe(event, outcome)) return verdict;
    }
    bool loaded = false;
    for (const Action& action : outcome.actions) {
      loaded = loaded || std::holds_alternative<Load>(action);
      if (Verdict verdict = obey(event, action, yard)) return describe(action) + ": " + *verdict;
    }
    note_work(event, outcome, yard);
    if (Verdict verdict = find_held_back(yard)) return verdict;
    forget_what_is_gone();
    if (Verdict verdict = check_lost(event, outcome)) return verdict;
    if (Verdict verdict = compare(yard)) return verdict;
    if (Verdict verdict = compare_tier(yard)) return verdict;
    if (!outcome.error) {
      if (Verdict verdict = check_tier(event)) return verdict;
      if (Verdict verdict = check_price(event, yard)) return verdict;
    }
    if (Verdict verdict = check_deficits(event, deficits_before)) return verdict;
    if (Verdict verdict = check_repayment()) return verdict;
    if (Verdict verdict = check_times(event)) return verdict;
    if (Verdict verdict = check_no_hopeless_waiter()) return verdict;
    if (Verdict verdict = check_progress(yard)) return verdict;
    const bool quiet = waiting_before <= 1 && waiting_models() == 1 && !loaded && !any_deficit() &&
                       !outcome.error &&
                       (event.kind == EventKind::kRequest || event.kind == EventKind::kTick ||
                        event.kind == EventKind::kRelease);
    if (Verdict verdict = check_victims(yard, quiet)) return verdict;
    const Status audit = yard.audit();
    if (!audit.ok()) return "audit: " + audit.error().message;
    return std::nullopt;
  }

 private:
  static Verdict unless(bool holds, std::string text) {
    if (holds) return std::nullopt;
    return text;
  }

  [[nodiscard]] static bool is_told_the_time(EventKind kind) {
    return kind != EventKind::kAddModel && kind != EventKind::kAddShare &&
           kind != EventKind::kSplitShare && kind != EventKind::kForgetShare;
  }

  [[nodiscard]] bool valid(const Charge& amounts) const {
    bool good = amounts.within(budgets_.size());
    amounts.for_each([&](DeviceIndex, Bytes bytes) { good = good && is_valid(bytes); });
    return good;
  }

  [[nodiscard]] bool valid(const std::vector<Charge>& placements) const {
    return !placements.empty() && placements.size() <= 16 &&
           std::all_of(placements.begin(), placements.end(),
                       [&](const Charge& each) { return valid(each); });
  }

  // What is wrong with the shares a model is said to be made of.
  [[nodiscard]] std::set<ErrorCode> share_errors(const ModelSpec& spec) const {
    std::set<ErrorCode> wrong;
    const auto known = [&](ShareId share) { return shares_.contains(share); };
    const auto exists = [&](DeviceIndex on) {
      return on == kNoDevice || position(on) < budgets_.size();
    };
    const std::set<ShareId> distinct(spec.shares.begin(), spec.shares.end());
    if (!std::all_of(distinct.begin(), distinct.end(), known)) wrong.insert(ErrorCode::kStaleId);
    if (distinct.size() != spec.shares.size() ||
        (!spec.shares_on.empty() && spec.shares_on.size() != spec.placements.size()) ||
        !std::all_of(spec.shares_on.begin(), spec.shares_on.end(), exists)) {
      wrong.insert(ErrorCode::kInvalidArgument);
    }
    return wrong;
  }

  // The errors the contract allows, where several things are wrong at once; none for success.
  [[nodiscard]] std::set<ErrorCode> expected_errors(const Event& event) const {
    std::set<ErrorCode> expected;
    if (const std::optional<ErrorCode> error = expected_error(event)) expected.insert(*error);
    const auto found = models_.find(event.model);
    const bool known = found != models_.end() && !found->second.removed;
    if (event.kind == EventKind::kAddModel ||
        (event.kind == EventKind::kUpdatePlacements && known)) {
      expected.merge(share_errors(event.spec));
    }
    return expected;
  }

  // Which error the contract asks for, shares of a model aside; nullopt for success.
  [[nodiscard]] std::optional<ErrorCode> expected_error(const Event& event) const {
    const auto found = models_.find(event.model);
    const Model* model = found == models_.end() ? nullptr : &found->second;
    const bool known = model != nullptr && !model->removed;
    const auto in = [&](Phase phase) { return model->phase == phase; };
    switch (event.kind) {
      case EventKind::kAddModel:
        if (!valid(event.spec.placements)) return ErrorCode::kInvalidArgument;
        if (!(event.spec.reload_seconds > 0) || !std::isfinite(event.spec.reload_seconds)) {
          return ErrorCode::kInvalidArgument;
        }
        if (event.spec.replaces) {
          const auto old = models_.find(*event.spec.replaces);
          if (old == models_.end() || old->second.removed) return ErrorCode::kStaleId;
        }
        return std::nullopt;
      case EventKind::kUpdatePlacements:
        if (!known) return ErrorCode::kStaleId;
        if (!valid(event.spec.placements)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kRemoveModel:
      case EventKind::kPin:
      case EventKind::kUnpin:
      case EventKind::kTryAcquire:
      case EventKind::kRequest:
      case EventKind::kForgive:
        if (!known) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kUnload:
        if (!known) return ErrorCode::kStaleId;
        if (model->pinned) return ErrorCode::kPinned;
        return std::nullopt;
      case EventKind::kSetBudget:
        if (position(event.device) >= budgets_.size() || !is_valid(event.budget)) {
          return ErrorCode::kInvalidArgument;
        }
        return std::nullopt;
      case EventKind::kSetClosed:
        if (position(event.device) >= budgets_.size()) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kCancel:
        if (!tickets_.contains(event.ticket)) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kRelease:
        if (!leases_.contains(event.lease)) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kLoadDone:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kLoading)) return ErrorCode::kWrongState;
        if (!valid(event.charge)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kLoadFailed:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kLoading)) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kUnloadDone:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kUnloading)) return ErrorCode::kWrongState;
        if (const auto error = kept_error(event, *model)) return error;
        if (!valid(event.charge) || !event.charge.fits_within(exclusive(event.model))) {
          return ErrorCode::kInvalidArgument;
        }
        return std::nullopt;
      case EventKind::kReclaimed:
        if (model == nullptr) return ErrorCode::kStaleId;
        // Also what copies have left on the tier.
        if (!event.charge.fits_within(model->quarantined)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kRemeasured:
        // A fact about memory that is held, also where the model is removed.
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kResident) && !in(Phase::kDraining)) return ErrorCode::kWrongState;
        if (!valid(event.charge)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kLost:
        // The same: who holds it has died, removed or not.
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kResident) && !in(Phase::kDraining)) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kAddShare:
        if (!is_valid(event.budget) || event.budget == Bytes{0}) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kSplitShare: {
        const auto share = shares_.find(event.share);
        if (share == shares_.end()) return ErrorCode::kStaleId;
        const std::int64_t part = event.budget.value;
        if (part <= 0 || part >= share->second.bytes) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      }
      case EventKind::kForgetShare:
        if (!shares_.contains(event.share)) return ErrorCode::kStaleId;
        if (models_made_of(event.share) > 0) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kSetTierBudget:
      case EventKind::kCopyDropped:
      case EventKind::kCopyInUse:
      case EventKind::kCopyLost:
        return tier_error(event);
      case EventKind::kTick:
        return std::nullopt;
    }
    return std::nullopt;
  }

  [[nodiscard]] Verdict judge_result(const Event& event, const Outcome& outcome) const {
    const std::set<ErrorCode> expected = expected_errors(event);
    if (outcome.error ? expected.contains(*outcome.error) : expected.empty()) return std::nullopt;
    if (!outcome.error) return "the call succeeded where it should have failed";
    if (expected.empty()) return "the call failed: " + outcome.message;
    return "the call failed with error " + std::to_string(static_cast<int>(*outcome.error)) +
           " instead of " + std::to_string(static_cast<int>(*expected.begin())) + ": " +
           outcome.message;
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

  // An estimate that was caught out is not trusted again: the placement grows to what was measured.
  static void learn(Model& model, const Charge& actual) {
    if (actual.fits_within(model.held) || !model.in_use) return;
    Charge& promise = model.placements[*model.in_use];
    promise = promise.max(actual);
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
        return unless(phase != Phase::kLoading, "the model is loading");
      case RefuseReason::kDeadlineInLoad:
        if (now_ < deadline) return "the deadline has not passed";
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

  // --- After the call ---------------------------------------------------------------------------

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

  [[nodiscard]] Verdict check_deficits(const Event& event, const std::vector<Bytes>& before) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (deficits_[where] <= before[where]) continue;
      if (event.kind != EventKind::kLoadDone && event.kind != EventKind::kRemeasured &&
          event.kind != EventKind::kSetBudget) {
        return "the deficit of device " + std::to_string(where) + " grew without a reason";
      }
    }
    return std::nullopt;
  }

  // Whoever could still give back bytes of a deficit that leavers do not cover is asked to leave.
  [[nodiscard]] Verdict check_repayment() const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      const std::int64_t back = leaving(where);
      if (deficits_[where].value <= back) continue;
      const auto may_go = [](ModelId, const Model& model) {
        return model.phase == Phase::kResident && !model.pinned;
      };
      const std::int64_t most = supposing(
          may_go, Phase::kUnloading, [&](const Books& without) { return without.leaving(where); });
      if (most > back) return "nobody repays the deficit of device " + std::to_string(where);
    }
    return std::nullopt;
  }

  // A model whose memory is gone does not stay.
  [[nodiscard]] Verdict check_lost(const Event& event, const Outcome& outcome) const {
    if (event.kind != EventKind::kLost || outcome.error) return std::nullopt;
    const auto found = models_.find(event.model);
    return unless(found == models_.end() || found->second.phase == Phase::kDraining ||
                      found->second.phase == Phase::kUnloading,
                  "a model that was lost stays");
  }

  [[nodiscard]] Verdict check_times(const Event& event) const {
    if (event.kind == EventKind::kTick && wake_at_ <= now_) return "asks to be woken in the past";
    for (const auto& [id, ticket] : tickets_) {
      if (ticket.second < wake_at_) return "nobody is woken for a deadline";
      if (event.kind == EventKind::kTick && ticket.second <= now_) return "a deadline was missed";
    }
    return std::nullopt;
  }

  [[nodiscard]] Verdict check_no_hopeless_waiter() const {
    for (const auto& [id, model] : models_) {
      if (model.waiting.empty() || model.phase != Phase::kAway) continue;
      // What pinned models hold of it already it need not bring, so it may be larger than a budget.
      if (!exhausted(model, false) || !exhausted(model, true)) continue;
      return describe(id) + (never_fits(model) ? " waits and can never fit"
                                               : " waits for bytes that nobody will give back");
    }
    return std::nullopt;
  }

  // With one waiting model there are no claims of others to weigh, so what must happen is plain.
  [[nodiscard]] Verdict check_progress(const Yard& yard) const {
    if (waiting_models() != 1) return std::nullopt;
    const auto found = std::find_if(models_.begin(), models_.end(),
                                    [](const auto& item) { return !item.second.waiting.empty(); });
    const Model& model = found->second;
    if (model.phase != Phase::kAway) return std::nullopt;
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (!open_for_load(model, p)) continue;
      bool fits = everywhere(need_now(model, p), [&](std::size_t where, std::int64_t bytes) {
        return bytes <= room(where);
      });
      for (std::size_t where = 0; where < budgets_.size(); ++where) {
        // A deficit is repaid first, also by a share that could be taken over.
        fits = fits && (!touches(model, p, where) || deficits_[where] == Bytes{0});
      }
      if (fits) return describe(found->first) + " waits though it fits";
      if (fits_later(model, p)) return std::nullopt;
    }
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (waits_for_channel(model, p)) return std::nullopt;
    }
    const auto idle = [](ModelId, const Model& each) {
      return each.phase == Phase::kResident && each.leases.empty() && !each.pinned;
    };
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (!open_for_load(model, p) || is_backed_up(yard, found->first, model, p)) continue;
      const bool could_be_made = supposing(idle, Phase::kUnloading, [&](const Books& without) {
        return without.fits_later(model, p);
      });
      if (could_be_made) return describe(found->first) + " waits though idle models could go";
    }
    return std::nullopt;
  }

  void note_work(const Event& event, const Outcome& outcome, const Yard& yard) {
    if (event.kind != EventKind::kRequest || outcome.error) return;
    const auto came = came_.find(outcome.ticket);
    for (std::size_t where = 0; came != came_.end() && where < budgets_.size(); ++where) {
      came->second.ahead[where] = yard.backlog_seconds(static_cast<DeviceIndex>(where));
    }
  }

  // Nobody leaves for a model whose device is behind with its work by more than a load takes.
  [[nodiscard]] bool is_backed_up(const Yard& yard, ModelId id, const Model& model,
                                  std::size_t placement) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      const double least = yard.entry(id)->reload_seconds + kPressureSlack;
      const Came& oldest = came_.at(model.waiting.front());
      // What the device had to do when it came gets less with time; a tick is asked for then.
      const double ahead = oldest.ahead[where] - seconds_of(now_ - oldest.at);
      return (ahead > least || wake_at_ <= now_) &&
             yard.work_seconds(static_cast<DeviceIndex>(where)) > least;
    }
    return false;
  }

  // It will be loaded there as soon as another load has ended: nobody leaves for it elsewhere.
  [[nodiscard]] bool waits_for_channel(const Model& model, std::size_t placement) const {
    bool busy = false;
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      if (closed_[where]) return false;
      busy = busy || loads_on(where) >= options_.load_channels_per_device;
    }
    return busy && fits_soon(model, placement);
  }

  [[nodiscard]] bool open_for_load(const Model& model, std::size_t placement) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      if (closed_[where] || loads_on(where) >= options_.load_channels_per_device) return false;
    }
    return true;
  }

  // Reads the decisions of this call. If nothing else went on, the victims must be a set that makes
  // the one waiting model fit, and none of them can be left out: either with what leaves when its
  // requests have ended, or, for one that will not wait for those, without it.
  [[nodiscard]] Verdict check_victims(const Yard& yard, bool quiet) {
    std::map<ModelId, std::vector<ModelId>> victims;
    const auto& log = yard.explanations().entries();
    const std::uint64_t last = explained_;
    for (auto entry = log.rbegin(); entry != log.rend() && entry->sequence > last; ++entry) {
      const Explanation& each = *entry;
      explained_ = std::max(explained_, each.sequence);
      if (each.decision != Decision::kEvicted && each.decision != Decision::kDrained) continue;
      if (each.cause == ModelId{}) continue;
      if (models_.contains(each.model)) victims[each.cause].push_back(each.model);
    }
    if (!quiet) return std::nullopt;
    for (const auto& item : victims) {
      const auto cause = models_.find(item.first);
      if (cause == models_.end() || cause->second.phase != Phase::kAway) continue;
      bool good = false;
      for (std::size_t p = 0; p < cause->second.placements.size(); ++p) {
        good = good || complete_and_minimal(item.second, cause->second, p, true) ||
               complete_and_minimal(item.second, cause->second, p, false);
      }
      if (!good) return "the victims for " + describe(item.first) + " are too few or too many";
    }
    return std::nullopt;
  }

  // The victims, who are on their way out, make a model fit, and would not if one of them stayed.
  [[nodiscard]] bool complete_and_minimal(const std::vector<ModelId>& victims, const Model& model,
                                          std::size_t placement, bool with_leaving) const {
    const auto covers = [&](const Books& books) {
      return with_leaving ? books.fits_later(model, placement) : books.fits_soon(model, placement);
    };
    const auto needless = [&](ModelId spared) {
      return supposing([&](ModelId id, const Model&) { return id == spared; }, Phase::kResident,
                       covers);
    };
    return covers(*this) && std::none_of(victims.begin(), victims.end(), needless);
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
  std::uint64_t explained_{0};
  Phase phase_before_{Phase::kAway};  // Of the model the event is about.
};

/// A yard and its referee: every event is applied and judged. Remembers the events so that a
/// failure can be replayed.
class Session {
 public:
  explicit Session(Yard yard, const YardOptions& options)
      : yard_(std::move(yard)), referee_(options) {}

  [[nodiscard]] const Yard& yard() const { return yard_; }
  [[nodiscard]] Yard& yard() { return yard_; }
  [[nodiscard]] const Referee& referee() const { return referee_; }
  /// The first violation, with the events that led to it, or nothing.
  [[nodiscard]] const std::optional<std::string>& violation() const { return violation_; }

  Outcome step(const Event& event) {
    if (history_.size() == kHistory) history_.pop_front();
    history_.push_back(describe(event));
    Outcome outcome = apply(yard_, event);
    for (const Action& action : outcome.actions) history_.back() += "\n    -> " + describe(action);
    if (outcome.error) history_.back() += "\n    -> error " + outcome.message;
    if (!violation_) {
      if (Referee::Verdict verdict = referee_.judge(event, outcome, yard_)) {
        std::string text = *verdict + "\n  last events:";
        for (const std::string& line : history_) text += "\n  " + line;
        violation_ = std::move(text);
      }
    }
    return outcome;
  }

  /// Faults stop and everybody releases: every waiting ticket must then be granted or refused after
  /// finitely many steps.
  void settle() {
    for (std::size_t where = 0; where < referee_.device_count(); ++where) {
      if (!referee_.closed(where)) continue;
      Event open = event(EventKind::kSetClosed);
      open.device = static_cast<DeviceIndex>(where);
      step(open);
    }
    const std::size_t bound = 100 + 20 * (referee_.tickets().size() + referee_.models().size());
    for (std::size_t round = 0; round < bound && !violation_; ++round) {
      if (finish_everything()) continue;
      if (Referee::Verdict verdict = referee_.unrest()) {
        violation_ = "nothing goes on, and " + *verdict;
        return;
      }
      if (referee_.tickets().empty()) return;
      if (referee_.wake_at() == kNever) {
        violation_ = "tickets wait, nothing goes on and nobody is woken\n  last: " +
                     (history_.empty() ? std::string{} : history_.back());
        return;
      }
      Event tick = event(EventKind::kTick);
      tick.now = std::max(referee_.now(), referee_.wake_at());
      step(tick);
    }
    if (!violation_) violation_ = "tickets still wait though everybody has released";
  }

  /// Removes all models and gives everything back. The ledger must then be zero.
  void tear_down() {
    std::vector<ModelId> ids;
    for (const auto& [id, model] : referee_.models()) {
      if (!model.removed) ids.push_back(id);
    }
    for (const ModelId id : ids) {
      Event remove = event(EventKind::kRemoveModel);
      remove.model = id;
      step(remove);
    }
    while (!violation_ && finish_everything()) {
    }
    const std::map unused = referee_.shares();  // Those that models were made of have gone.
    for (const auto& [id, share] : unused) {
      Event forget = event(EventKind::kForgetShare);
      forget.share = id;
      if (!share.was_used) step(forget);
    }
    std::vector<std::pair<ModelId, Charge>> kept;
    for (const auto& [id, model] : referee_.models()) kept.emplace_back(id, model.quarantined);
    for (const auto& [id, quarantined] : kept) {
      Event back = event(EventKind::kReclaimed);
      back.model = id;
      back.charge = quarantined;
      step(back);
    }
    if (violation_) return;
    const std::size_t accounts = yard_.device_count() + (referee_.has_tier() ? 1 : 0);
    for (std::size_t where = 0; where < accounts; ++where) {
      const Account& account = yard_.account(static_cast<DeviceIndex>(where));
      if (account.used() != Bytes{0} || account.deficit != Bytes{0}) {
        violation_ = "bytes are left on device " + std::to_string(where);
      }
    }
    if (yard_.model_count() != 0) violation_ = "models are left";
    if (yard_.share_count() != 0) violation_ = "shares are left";
    if (yard_.waiting_count() != 0) violation_ = "tickets are left";
    if (yard_.lease_count() != 0) violation_ = "leases are left";
  }

 private:
  static constexpr std::size_t kHistory = 60;

  [[nodiscard]] Event event(EventKind kind) const {
    Event made;
    made.kind = kind;
    made.now = referee_.now();
    return made;
  }

  // Ends what runs: loads, unloads, drops of copies and leases. False if there was nothing.
  bool finish_everything() {
    std::vector<Event> events;
    for (const auto& [lease, model] : referee_.leases()) {
      Event release = event(EventKind::kRelease);
      release.lease = lease;
      events.push_back(release);
    }
    for (const auto& [id, model] : referee_.models()) {
      Event done = event(EventKind::kLoadDone);
      done.model = id;
      done.charge = model.held;
      const Referee::CopyPhase copy = model.copy.phase;
      if (copy == Referee::CopyPhase::kMaking) {
        done.kept = Kept{.bytes = Bytes{model.copy.own}, .took = seconds{1}};
      }
      if (copy == Referee::CopyPhase::kKept) done.source = Source::kCopy;
      if (model.phase == Referee::Phase::kUnloading) done.kind = EventKind::kUnloadDone;
      const bool held_back = copy == Referee::CopyPhase::kAwaited;
      if ((model.phase == Referee::Phase::kUnloading && !held_back) ||
          model.phase == Referee::Phase::kLoading) {
        events.push_back(done);
      }
      if (Referee::is_leaving(copy)) {
        done.kind = EventKind::kCopyDropped;
        events.push_back(done);
      }
    }
    for (Event& each : events) {
      // The last of a share's holders brings it back: who that is shows only now.
      if (each.kind == EventKind::kUnloadDone) each.charge = referee_.exclusive(each.model);
      if (each.kind == EventKind::kCopyDropped) each.budget = referee_.copy_exclusive(each.model);
      step(each);
    }
    return !events.empty();
  }

  Yard yard_;
  Referee referee_;
  std::deque<std::string> history_;
  std::optional<std::string> violation_;
};

}  // namespace modelyard::test

#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "referee.hpp"
#include "session.hpp"

namespace modelyard::test {

/// What the yard asked for, in words: "load a", "grant a", "refuse a queue_full".
using Lines = std::vector<std::string>;

inline YardOptions options(std::initializer_list<std::int64_t> budgets) {
  YardOptions made;
  made.policy = "gap";  // What most tests expect; it has no past but what they give it.
  for (const std::int64_t budget : budgets) made.budgets.push_back(Bytes{budget});
  return made;
}

inline YardOptions lru(std::initializer_list<std::int64_t> budgets, std::uint32_t channels = 1) {
  YardOptions wanted = options(budgets);
  wanted.policy = "lru";
  wanted.load_channels_per_device = channels;
  return wanted;
}

inline Yard make_yard(const YardOptions& wanted) {
  Result<Yard> made = Yard::create(wanted);
  if (!made.ok()) throw std::invalid_argument("Yard::create: " + made.error().message);
  return std::move(made).value();
}

/// A yard with a shell that does nothing by itself: loads and unloads end when the test says so.
///
/// Every event is judged by the Referee. At the end of its life the harness settles the yard
/// (everybody releases, every load ends well), takes all models out, and wants an empty ledger.
class Harness {
 public:
  explicit Harness(const YardOptions& wanted)
      : capacity_(wanted.explain_capacity), session_(make_yard(wanted), wanted) {}
  Harness(const Harness&) = delete;
  Harness& operator=(const Harness&) = delete;
  ~Harness() {
    session_.settle();
    session_.tear_down();
    check();
  }

  [[nodiscard]] const Yard& yard() const { return session_.yard(); }
  [[nodiscard]] Yard& raw() { return session_.yard(); }
  [[nodiscard]] const Referee& referee() const { return session_.referee(); }

  // --- Time -------------------------------------------------------------------------------------

  [[nodiscard]] Tick now() const { return now_; }
  [[nodiscard]] static Tick at(Duration since_start) { return Tick{since_start}; }
  /// Sets the clock and tells nobody.
  void set_clock(Tick now) { now_ = now; }
  void skip(Duration wait) { now_ += wait; }
  void tick() { step(make(EventKind::kTick)); }
  /// Lets time pass as a shell does: ticks whenever the yard asked for it.
  void pass(Duration wait) {
    const Tick end = now_ + wait;
    for (int wakes = 0; wake_at() <= end; ++wakes) {
      ASSERT_LT(wakes, 1000) << "the yard asks to be woken for ever";
      now_ = std::max(now_, wake_at());
      tick();
    }
    now_ = end;
  }
  [[nodiscard]] Tick wake_at() const { return session_.referee().wake_at(); }

  // --- Models and devices -----------------------------------------------------------------------

  ModelId add(std::string label, std::vector<Charge> placements, double reload_seconds = 1) {
    Event event = make(EventKind::kAddModel);
    event.spec.label = label;
    event.spec.placements = std::move(placements);
    event.spec.reload_seconds = reload_seconds;
    const Outcome outcome = step(event);
    EXPECT_FALSE(outcome.error) << outcome.message;
    labels_[outcome.model] = std::move(label);
    return outcome.model;
  }
  ModelId add(std::string label, const Charge& placement, double reload_seconds = 1) {
    return add(std::move(label), std::vector<Charge>{placement}, reload_seconds);
  }
  ModelId add(std::string label, std::int64_t bytes, double reload_seconds = 1) {
    return add(std::move(label), charge({{0, bytes}}), reload_seconds);
  }
  /// A model that is made of shares on device 0 and of `own` bytes there.
  ModelId add_sharing(std::string label, std::int64_t own, std::vector<ShareId> shares) {
    return add_sharing(std::move(label), {charge({{0, own}})}, std::move(shares), {device(0)});
  }
  ModelId add_sharing(std::string label, std::vector<Charge> placements,
                      std::vector<ShareId> shares, std::vector<DeviceIndex> shares_on) {
    ModelSpec spec;
    spec.label = std::move(label);
    spec.placements = std::move(placements);
    spec.shares = std::move(shares);
    spec.shares_on = std::move(shares_on);
    return add(std::move(spec));
  }
  ModelId add(ModelSpec spec) {
    Event event = make(EventKind::kAddModel);
    event.spec = std::move(spec);
    const Outcome outcome = step(event);
    EXPECT_FALSE(outcome.error) << outcome.message;
    labels_[outcome.model] = event.spec.label;
    return outcome.model;
  }
  std::optional<ErrorCode> update_placements(ModelId model, std::vector<Charge> placements,
                                             std::vector<ShareId> shares = {},
                                             std::vector<DeviceIndex> shares_on = {}) {
    Event event = make(EventKind::kUpdatePlacements, model);
    event.spec.placements = std::move(placements);
    event.spec.shares = std::move(shares);
    event.spec.shares_on = std::move(shares_on);
    return step(event).error;
  }
  ShareId add_share(std::int64_t bytes) {
    Event event = make(EventKind::kAddShare);
    event.budget = Bytes{bytes};
    const Outcome outcome = step(event);
    EXPECT_FALSE(outcome.error) << outcome.message;
    return outcome.share;
  }
  Outcome try_split_share(ShareId share, std::int64_t part) {
    Event event = make(EventKind::kSplitShare);
    event.share = share;
    event.budget = Bytes{part};
    return step(event);
  }
  ShareId split_share(ShareId share, std::int64_t part) {
    const Outcome outcome = try_split_share(share, part);
    EXPECT_FALSE(outcome.error) << outcome.message;
    return outcome.share;
  }
  std::optional<ErrorCode> forget_share(ShareId share) {
    Event event = make(EventKind::kForgetShare);
    event.share = share;
    return step(event).error;
  }
  std::optional<ErrorCode> remove(ModelId model) {
    return step(make(EventKind::kRemoveModel, model)).error;
  }
  std::optional<ErrorCode> pin(ModelId model) { return step(make(EventKind::kPin, model)).error; }
  std::optional<ErrorCode> unpin(ModelId model) {
    return step(make(EventKind::kUnpin, model)).error;
  }
  std::optional<ErrorCode> unload(ModelId model) {
    return step(make(EventKind::kUnload, model)).error;
  }
  std::optional<ErrorCode> set_budget(std::uint32_t index, std::int64_t bytes) {
    Event event = make(EventKind::kSetBudget);
    event.device = device(index);
    event.budget = Bytes{bytes};
    return step(event).error;
  }
  std::optional<ErrorCode> set_closed(std::uint32_t index, bool closed) {
    Event event = make(EventKind::kSetClosed);
    event.device = device(index);
    event.closed = closed;
    return step(event).error;
  }

  std::optional<ErrorCode> set_tier_budget(std::int64_t bytes) {
    Event event = make(EventKind::kSetTierBudget);
    event.budget = Bytes{bytes};
    return step(event).error;
  }
  std::optional<ErrorCode> forgive(ModelId model) {
    return step(make(EventKind::kForgive, model)).error;
  }

  // --- Requests ---------------------------------------------------------------------------------

  Outcome try_request(ModelId model, Tick deadline = kNever) {
    Event event = make(EventKind::kRequest, model);
    event.deadline = deadline;
    return step(event);
  }
  TicketId request(ModelId model, Tick deadline = kNever) {
    const Outcome outcome = try_request(model, deadline);
    EXPECT_FALSE(outcome.error) << outcome.message;
    return outcome.ticket;
  }
  Outcome try_acquire(ModelId model, Tick deadline = kNever) {
    Event event = make(EventKind::kTryAcquire, model);
    event.deadline = deadline;
    return step(event);
  }
  std::optional<ErrorCode> cancel(TicketId ticket) {
    Event event = make(EventKind::kCancel);
    event.ticket = ticket;
    return step(event).error;
  }
  std::optional<ErrorCode> release(LeaseId lease) {
    Event event = make(EventKind::kRelease);
    event.lease = lease;
    return step(event).error;
  }
  std::optional<ErrorCode> release(TicketId granted) { return release(lease_of(granted)); }

  // --- What became of the actions ---------------------------------------------------------------

  /// Ends a load that runs with just what was reserved.
  std::optional<ErrorCode> load_done(ModelId model) { return load_done(model, held(model)); }
  std::optional<ErrorCode> load_done(ModelId model, const Charge& actual,
                                     Duration took = seconds{1}, Source source = Source::kStorage) {
    Event event = make(EventKind::kLoadDone, model);
    event.charge = actual;
    event.took = took;
    event.source = source;
    return step(event).error;
  }
  std::optional<ErrorCode> load_failed(ModelId model, LoadFailure failure) {
    Event event = make(EventKind::kLoadFailed, model);
    event.failure = failure;
    return step(event).error;
  }
  /// Ends an unload that runs; everything is back, and a copy is kept if one was asked for, of just
  /// what was reserved for it.
  std::optional<ErrorCode> unload_done(ModelId model) {
    if (copy_state(model) != CopyState::kMaking) {
      return unload_done(model, yard().exclusive(model));
    }
    return kept(model, entry(model).copy.held.total().value);
  }
  /// Ends an unload that has made a copy with so many bytes of its own, or has not because they are
  /// more than it was allowed; everything is back.
  std::optional<ErrorCode> kept(ModelId model, std::int64_t bytes, Duration took = seconds{0}) {
    Event event = make(EventKind::kUnloadDone, model);
    event.charge = yard().exclusive(model);
    const bool made = Bytes{bytes} <= entry(model).copy.held.total();
    event.kept = Kept{.bytes = Bytes{bytes}, .took = took, .made = made};
    return step(event).error;
  }
  /// Ends the drop of a copy; everything is back.
  std::optional<ErrorCode> copy_dropped(ModelId model) {
    return copy_dropped(model, yard().copy_exclusive(model).value);
  }
  std::optional<ErrorCode> copy_dropped(ModelId model, std::int64_t freed) {
    Event event = make(EventKind::kCopyDropped, model);
    event.budget = Bytes{freed};
    return step(event).error;
  }
  std::optional<ErrorCode> copy_in_use(ModelId model) {
    return step(make(EventKind::kCopyInUse, model)).error;
  }
  std::optional<ErrorCode> copy_lost(ModelId model) {
    return step(make(EventKind::kCopyLost, model)).error;
  }
  std::optional<ErrorCode> unload_done(ModelId model, const Charge& freed) {
    Event event = make(EventKind::kUnloadDone, model);
    event.charge = freed;
    return step(event).error;
  }
  std::optional<ErrorCode> reclaimed(ModelId model, const Charge& bytes) {
    Event event = make(EventKind::kReclaimed, model);
    event.charge = bytes;
    return step(event).error;
  }
  std::optional<ErrorCode> remeasured(ModelId model, const Charge& actual) {
    Event event = make(EventKind::kRemeasured, model);
    event.charge = actual;
    return step(event).error;
  }
  std::optional<ErrorCode> lost(ModelId model) { return step(make(EventKind::kLost, model)).error; }
  /// Ends all drops of copies and all unloads, then all loads, until none of them runs.
  void finish_io() {
    for (bool any = true; any;) {
      any = false;
      for (const auto& [id, label] : std::map(labels_)) {
        if (copy_state(id) == CopyState::kDropping) any = !copy_dropped(id).has_value() || any;
      }
      for (const auto& [id, label] : std::map(labels_)) {
        if (state(id) == State::kUnloading) any = !unload_done(id).has_value() || any;
      }
      for (const auto& [id, label] : std::map(labels_)) {
        if (state(id) == State::kLoading) any = !load_done(id).has_value() || any;
      }
    }
  }
  /// Requests a model and does all that is asked until it is granted.
  LeaseId use(ModelId model) {
    const TicketId ticket = request(model);
    finish_io();
    EXPECT_TRUE(granted(ticket)) << label(model);
    return lease_of(ticket);
  }
  /// Makes a model resident and idle.
  void warm(ModelId model) {
    EXPECT_FALSE(release(use(model)));
    forget();
  }

  // --- What was answered ------------------------------------------------------------------------

  [[nodiscard]] bool granted(TicketId ticket) const { return leases_.contains(ticket); }
  [[nodiscard]] bool refused(TicketId ticket) const { return refusals_.contains(ticket); }
  [[nodiscard]] bool waiting(TicketId ticket) const {
    return session_.referee().tickets().contains(ticket);
  }
  [[nodiscard]] LeaseId lease_of(TicketId ticket) const {
    const auto found = leases_.find(ticket);
    EXPECT_NE(found, leases_.end()) << "the ticket was not granted";
    return found == leases_.end() ? LeaseId{} : found->second;
  }
  [[nodiscard]] Refuse refusal(TicketId ticket) const {
    const auto found = refusals_.find(ticket);
    EXPECT_NE(found, refusals_.end()) << "the ticket was not refused";
    return found == refusals_.end() ? Refuse{} : found->second;
  }
  /// What was asked for since the last call, without wakes.
  Lines said() { return std::exchange(said_, {}); }
  void forget() { said_.clear(); }
  /// How often an action was asked for so far.
  [[nodiscard]] std::size_t count(const std::string& line) const {
    const auto found = counts_.find(line);
    return found == counts_.end() ? 0 : found->second;
  }

  [[nodiscard]] const Entry& entry(ModelId model) const {
    const Entry* found = session_.yard().entry(model);
    if (found == nullptr) throw std::out_of_range("no such model: " + label(model));
    return *found;
  }
  [[nodiscard]] bool exists(ModelId model) const { return session_.yard().entry(model) != nullptr; }
  /// COLD also for a model that is gone.
  [[nodiscard]] State state(ModelId model) const {
    return exists(model) ? entry(model).state : State::kCold;
  }
  /// NONE also for a model that is gone.
  [[nodiscard]] CopyState copy_state(ModelId model) const {
    return exists(model) ? entry(model).copy.state : CopyState::kNone;
  }
  [[nodiscard]] const Account& tier() const { return session_.yard().account(yard().tier()); }
  [[nodiscard]] Charge held(ModelId model) const {
    return exists(model) ? entry(model).held : Charge{};
  }
  [[nodiscard]] const Account& account(std::uint32_t index = 0) const {
    return session_.yard().account(device(index));
  }
  [[nodiscard]] std::int64_t used(std::uint32_t index = 0) const {
    return account(index).used().value;
  }
  [[nodiscard]] std::int64_t free(std::uint32_t index = 0) const {
    return account(index).free().value;
  }
  [[nodiscard]] std::vector<Explanation> explained(Decision decision) const {
    std::vector<Explanation> found;
    for (const Explanation& each : session_.yard().explanations().entries()) {
      if (each.decision == decision) found.push_back(each);
    }
    return found;
  }
  [[nodiscard]] std::string label(ModelId model) const {
    const auto found = labels_.find(model);
    return found == labels_.end() ? describe(model) : found->second;
  }

  Outcome step(const Event& event) {
    Outcome outcome = session_.step(event);
    if (event.kind == EventKind::kRequest && !outcome.error) asked_[outcome.ticket] = event.model;
    for (const Action& action : outcome.actions) note(action);
    check();
    EXPECT_LE(session_.yard().explanations().entries().size(), capacity_);
    return outcome;
  }
  [[nodiscard]] Event make(EventKind kind, ModelId model = {}) const {
    Event event;
    event.kind = kind;
    event.now = now_;
    event.model = model;
    return event;
  }

 private:
  void note(const Action& action) {
    std::string line;
    if (const auto* grant = std::get_if<Grant>(&action)) {
      leases_[grant->ticket] = grant->lease;
      line = "grant " + label(asked_[grant->ticket]);
    } else if (const auto* refuse = std::get_if<Refuse>(&action)) {
      refusals_[refuse->ticket] = *refuse;
      line = "refuse " + label(asked_[refuse->ticket]);
    } else if (const auto* load = std::get_if<Load>(&action)) {
      line = "load " + label(load->model);
    } else if (const auto* stop = std::get_if<CancelLoad>(&action)) {
      line = "cancel_load " + label(stop->model);
    } else if (const auto* drain = std::get_if<Drain>(&action)) {
      line = "drain " + label(drain->model);
    } else if (const auto* out = std::get_if<Unload>(&action)) {
      line = "unload " + label(out->model) + (out->keep ? " keep" : "");
    } else if (const auto* dropped = std::get_if<DropCopy>(&action)) {
      line = "drop_copy " + label(dropped->model);
    } else {
      return;
    }
    ++counts_[line];
    said_.push_back(std::move(line));
  }

  void check() {
    if (!session_.violation() || reported_) return;
    reported_ = true;
    ADD_FAILURE() << "the referee found: " << *session_.violation();
  }

  std::size_t capacity_;
  Session session_;
  Tick now_{};
  bool reported_{false};
  std::map<ModelId, std::string> labels_;
  std::map<TicketId, ModelId> asked_;
  std::map<TicketId, LeaseId> leases_;
  std::map<TicketId, Refuse> refusals_;
  std::map<std::string, std::size_t> counts_;
  Lines said_;
};

}  // namespace modelyard::test

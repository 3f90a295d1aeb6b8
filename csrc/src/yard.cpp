#include "modelyard/yard.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#ifndef MODELYARD_CHECK_INVARIANTS
#define MODELYARD_CHECK_INVARIANTS 0
#endif

namespace modelyard {
namespace {

Error stale(const char* what) { return {ErrorCode::kStaleId, std::string(what) + " is not known"}; }

Error wrong_state(const Entry& entry, const char* event) {
  return {ErrorCode::kWrongState,
          std::string(event) + " does not fit state " + std::string(to_string(entry.state))};
}

// The budgets of all accounts: the tier's is the last.
std::vector<Bytes> with_tier(const YardOptions& options) {
  std::vector<Bytes> budgets = options.budgets;
  if (options.tier_budget > Bytes{0}) budgets.push_back(options.tier_budget);
  return budgets;
}

}  // namespace

// --- Construction

Result<Yard> Yard::create(YardOptions options) {
  const auto invalid = [](std::string text) {
    return Error{ErrorCode::kInvalidArgument, std::move(text)};
  };
  const std::size_t most = kMaxDevices - (options.tier_budget > Bytes{0} ? 1 : 0);
  if (options.budgets.empty() || options.budgets.size() > most) {
    return invalid("a yard has 1 to " + std::to_string(most) + " devices");
  }
  if (!is_valid(options.tier_budget) || !is_valid(options.copy_padding)) {
    return invalid("a budget or a padding is negative or above 64 TiB");
  }
  if (options.tier_budget > Bytes{0} && options.above_tier.size() != options.budgets.size()) {
    return invalid("which devices are above the host tier is said for each of them");
  }
  if (!std::all_of(options.budgets.begin(), options.budgets.end(), is_valid)) {
    return invalid("a budget is negative or above 64 TiB");
  }
  if (options.load_channels_per_device == 0) return invalid("a device needs a load channel");
  if (options.max_waiting == 0 || options.max_waiting_per_model == 0) {
    return invalid("a queue needs room for one");
  }
  if (options.overdue_after <= Duration{0} || options.backoff_initial <= Duration{0} ||
      options.backoff_max < options.backoff_initial) {
    return invalid("a waiting time or back-off is out of range");
  }
  std::unique_ptr<Policy> policy = make_policy(options.policy);
  if (policy == nullptr) {
    std::string text = "no policy \"" + options.policy + "\"; there are:";
    for (std::string_view name : policy_names()) text.append(" ").append(name);
    return invalid(std::move(text));
  }
  return Yard(std::move(options), std::move(policy));
}

Yard::Yard(YardOptions options, std::unique_ptr<Policy> policy)
    : options_(std::move(options)),
      policy_(std::move(policy)),
      budgets_(with_tier(options_)),
      tier_(options_.tier_budget > Bytes{0} ? static_cast<DeviceIndex>(options_.budgets.size())
                                            : kNoDevice),
      ledger_(budgets_),
      explain_(options_.explain_capacity),
      device_counters_(budgets_.size()),
      pinned_(budgets_.size()),
      unloading_(budgets_.size()),
      loading_(budgets_.size()),
      loaded_at_(budgets_.size()),
      paces_(options_.budgets.size()),
      behind_since_(options_.budgets.size(), kNever),
      closed_(budgets_.size()) {
  if (device_count() > 1) relieve_at_ = Tick{};
  tell_budgets();
}

void Yard::tell_budgets() { policy_->on_budgets(std::span(budgets_).first(device_count())); }

// A model was asked for. What it would hold is what it holds, or what its first placement takes.
void Yard::tell_policy(EntryIndex index) {
  Entry& entry = entry_at(index);
  entry.demand = demand_of(entry) + 1;
  entry.demand_at = request_clock_;
  const bool here = !entry.held.empty() || !entry.held_shares.empty();
  const Charge* held = here ? &entry.held : &entry.placements.front();
  const DeviceIndex shared_on = here ? entry.held_shares_on : shares_device(entry, 0);
  Charge with_parts;
  if (shared_on != kNoDevice) {
    Bytes sum = held->on(shared_on);
    for (const ShareId id : here ? entry.held_shares : entry.shares) {
      const Share& share = *shares_.find(id);
      const std::uint32_t holders = std::max(share.on(shared_on).total() + (here ? 0U : 1U), 1U);
      sum = saturating_add(sum, Bytes{(share.bytes.value + holders - 1) / holders});
    }
    with_parts = *held;
    with_parts.set(shared_on, sum);
    held = &with_parts;
  }
  double weight = 0;
  held->for_each([&](DeviceIndex d, Bytes b) {
    weight += static_cast<double>(b.value) /
              static_cast<double>(std::max<std::int64_t>(budgets_[position(d)].value, 1));
  });
  constexpr double kLeastWeight = 1e-12;  // Of a model that holds nothing.
  policy_->on_request(Wish{.entry = index,
                           .held = held,
                           .weight = std::max(weight, kLeastWeight),
                           .reload_seconds = entry.reload_seconds},
                      ++request_clock_);
  if (policy_->lru_missed()) {
    lru_bill_.missed(index, entry.reload_seconds, entry.state == State::kResident);
  }
  departures_.asked(index, now_);
  ++counters_.request_count;
}

void Yard::note_empty_placements(const Entry& entry) {
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const bool nothing = touching(entry.placements[p], shares_device(entry, p)).empty();
    some_hold_nothing_ = some_hold_nothing_ || nothing;
  }
}

// What becomes of a decision's cost: how old the model was and what its absence is expected to
// cost, or who waited for a load that has ended.
void Yard::tell_cost(Explanation& explanation) {
  const Entry* entry = entries_.find(explanation.model);
  if (entry == nullptr) return;
  switch (explanation.decision) {
    case Decision::kEvicted:
    case Decision::kDrained:
    case Decision::kLost: {
      if (entry->state != State::kResident) return;  // It was told to leave before.
      const EntryIndex index = EntryTable::index_of(explanation.model);
      const Age age = departures_.left(index, explanation.why, now_);
      explanation.idle = age.idle;
      explanation.stayed = age.stayed;
      explanation.expected_seconds = entry->reload_seconds;
      if (Departures::is_choice(explanation.why)) explanation.rule = policy_->leader();
      return;
    }
    case Decision::kLoadDone:
      explanation.waiting_count = entry->waiting_count;
      for (TicketId id = entry->oldest; id != TicketId{}; id = tickets_.find(id)->next) {
        explanation.waited_sum += now_ - tickets_.find(id)->arrival;
      }
      return;
    default:
      return;
  }
}

// --- Models and devices

Result<ModelId> Yard::add_model(ModelSpec spec) {
  if (Status checked = check_placements(spec.placements); !checked) return checked.error();
  if (Status checked = check_shares(spec.shares, spec.shares_on, spec.placements); !checked) {
    return checked.error();
  }
  if (!std::isfinite(spec.reload_seconds) || spec.reload_seconds <= 0) {
    return Error{ErrorCode::kInvalidArgument, "reload_seconds must be above zero and finite"};
  }
  if (entries_.size() >= kMaxModels) return Error{ErrorCode::kCapacity, "too many models"};
  Entry entry;
  entry.label = std::move(spec.label);
  entry.placements = std::move(spec.placements);
  entry.shares = std::move(spec.shares);
  entry.shares_on = std::move(spec.shares_on);
  entry.times = ReloadTimes(std::max(spec.reload_seconds, kLeastSeconds));
  const Entry* before = nullptr;
  if (spec.replaces) {
    before = live(*spec.replaces);
    if (before == nullptr) return stale("the model to be replaced");
    if (before->load_count > 0) entry.times = before->times;
  }
  reprice(entry);
  refer(entry.shares);
  note_empty_placements(entry);
  const ModelId id = entries_.insert(std::move(entry));
  policy_->on_add(EntryTable::index_of(id));
  lru_bill_.add(EntryTable::index_of(id));
  departures_.add(EntryTable::index_of(id));
  if (spec.replaces) {
    policy_->on_replace(EntryTable::index_of(id), EntryTable::index_of(*spec.replaces));
  }
  return id;
}

Status Yard::update_placements(ModelId model, std::vector<Charge> placements,
                               std::vector<ShareId> shares, std::vector<DeviceIndex> shares_on,
                               Tick now, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  if (Status checked = check_placements(placements); !checked) return checked;
  if (Status checked = check_shares(shares, shares_on, placements); !checked) return checked;
  begin(now, out);
  entry->placements = std::move(placements);
  refer(shares);  // First: what it was made of before may be all that keeps one of them.
  std::swap(entry->shares, shares);
  unrefer(shares);
  entry->shares_on = std::move(shares_on);
  note_empty_placements(*entry);
  entry->placement = kMaxPlacements;  // What it holds belongs to none of these.
  entry->copy_bytes = Bytes{};        // It may be another model now.
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::remove_model(ModelId model, Tick now, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  Refuse refusal;
  refusal.reason = RefuseReason::kRemoved;
  refuse_all(index, refusal, out);
  if (entry->pinned) {
    entry->pinned = false;
    if (entry->state == State::kLoading || entry->state == State::kResident) {
      entry->held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] -= b; });
      pin_shares(*entry, false);
    }
  }
  entry->removed = true;
  forget(index, Cause{.why = Why::kRemoved}, out);
  switch (entry->state) {
    case State::kLoading:
      entry->leave_after = true;
      stop_load(index, out);
      break;
    case State::kResident:
      send_away(index, Cause{.why = Why::kRemoved}, out);
      break;
    case State::kDraining:
    case State::kUnloading:
      break;
    case State::kCold:
    case State::kQueued:
    case State::kFailed:
      come_to_rest(index);
      break;
  }
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::pin(ModelId model, Tick now, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  begin(now, out);
  if (!entry->pinned) {
    entry->pinned = true;
    entry->leave_after = false;
    explain(Decision::kPinned, model, Cause{}, 0, going_with(*entry));
    if (entry->state == State::kLoading || entry->state == State::kResident) {
      entry->held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] += b; });
      pin_shares(*entry, true);
    }
    schedule(out);  // Whoever can no longer fit beside it is told now.
  }
  finish(out);
  return Done{};
}

Status Yard::unpin(ModelId model, Tick now, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  begin(now, out);
  if (entry->pinned) {
    entry->pinned = false;
    explain(Decision::kUnpinned, model, Cause{}, 0, going_with(*entry));
    if (entry->state == State::kLoading || entry->state == State::kResident) {
      entry->held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] -= b; });
      pin_shares(*entry, false);
    }
    drain_closed(out);
    schedule(out);
  }
  finish(out);
  return Done{};
}

Status Yard::unload(ModelId model, Tick now, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  if (entry->pinned) return Error{ErrorCode::kPinned, "the model is pinned"};
  begin(now, out);
  if (entry->state == State::kResident) {
    send_away(EntryTable::index_of(model), Cause{.why = Why::kAsked}, out);
  } else if (entry->state == State::kLoading && !entry->leave_after) {
    entry->leave_after = true;
    // Whoever waits is served first: a load that is stopped for them would only begin again.
    if (entry->waiting_count == 0) stop_load(EntryTable::index_of(model), out);
  } else if (entry->state != State::kLoading && entry->state != State::kQueued) {
    forget(EntryTable::index_of(model), Cause{.why = Why::kAsked}, out);
  }
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::set_budget(DeviceIndex device, Bytes budget, Tick now, Actions& out) {
  if (position(device) >= device_count() || !is_valid(budget)) {
    return Error{ErrorCode::kInvalidArgument, "no such device, or a budget out of range"};
  }
  begin(now, out);
  ledger_.set_budget(device, budget);
  budgets_[position(device)] = budget;
  tell_budgets();
  explain(Decision::kBudgetChanged, ModelId{}, Cause{.device = device}, 0, budget);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::set_device_closed(DeviceIndex device, bool closed, Tick now, Actions& out) {
  if (position(device) >= device_count()) {
    return Error{ErrorCode::kInvalidArgument, "no such device"};
  }
  begin(now, out);
  if (closed_[position(device)] != closed) {
    closed_[position(device)] = closed;
    explain(closed ? Decision::kDeviceClosed : Decision::kDeviceOpened, ModelId{},
            Cause{.device = device}, 0, Bytes{0});
  }
  drain_closed(out);
  schedule(out);
  finish(out);
  return Done{};
}

// --- Shares

Result<ShareId> Yard::add_share(Bytes bytes) {
  if (!is_valid(bytes) || bytes == Bytes{0}) {
    return Error{ErrorCode::kInvalidArgument, "a share needs bytes, at most 64 TiB"};
  }
  Share share;
  share.bytes = bytes;
  return shares_.insert(share);
}

Result<ShareId> Yard::split_share(ShareId id, Bytes part) {
  const Share* whole = shares_.find(id);
  if (whole == nullptr) return stale("the share");
  if (part <= Bytes{0} || part >= whole->bytes) {
    return Error{ErrorCode::kInvalidArgument, "a part is some of a share and not all of it"};
  }
  // The same holders in the same states: no sum over bytes changes.
  Share cut = *whole;
  cut.bytes = part;
  const ShareId added = shares_.insert(cut);
  shares_.find(id)->bytes -= part;
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    Entry* entry = entries_.at(i);
    if (entry == nullptr) continue;
    for (std::vector<ShareId>* list : {&entry->shares, &entry->held_shares, &entry->copy.shares}) {
      if (std::find(list->begin(), list->end(), id) != list->end()) list->push_back(added);
    }
  }
  return added;
}

Status Yard::forget_share(ShareId id) {
  const Share* share = shares_.find(id);
  if (share == nullptr) return stale("the share");
  if (share->model_count > 0) {
    return Error{ErrorCode::kWrongState, "models are made of the share"};
  }
  shares_.erase(id);
  return Done{};
}

// --- Requests

Result<std::optional<LeaseId>> Yard::try_acquire(ModelId model, Tick now, Tick deadline) {
  const Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  now_ = std::max(now_, now);
  if (entry->state != State::kResident) return std::optional<LeaseId>{};
  if (deadline != kNever && !is_within_reach(*entry, deadline)) return std::optional<LeaseId>{};
  const EntryIndex index = EntryTable::index_of(model);
  tell_policy(index);
  ++counters_.hit_count;
  return std::optional<LeaseId>{add_lease(index)};
}

Result<TicketId> Yard::request(ModelId model, Tick now, Tick deadline, Actions& out) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  begin(now, out, Bounds::kSame);
  const EntryIndex index = EntryTable::index_of(model);
  tell_policy(index);

  const bool full = tickets_.size() >= options_.max_waiting ||
                    entry->waiting_count >= options_.max_waiting_per_model;
  const bool first = entry->waiting_count == 0;
  const TicketId ticket = add_ticket(index, deadline);

  Refuse refusal;
  if (deadline <= now_) {
    refuse(ticket, too_late(*entry), out);
  } else if (entry->state == State::kResident && !is_within_reach(*entry, deadline)) {
    refuse(ticket, out_of_reach(*entry, deadline), out);
  } else if (entry->state == State::kResident) {
    ++counters_.hit_count;
    drop_ticket(ticket);
    out.push_back(Grant{ticket, add_lease(index)});
  } else if (full) {
    refusal.reason = RefuseReason::kQueueFull;
    refusal.retry_after = from_seconds(entry->reload_seconds);
    refuse(ticket, refusal, out);
  } else if (entry->state == State::kFailed && now_ < entry->retry_at) {
    refusal.reason = RefuseReason::kLoadFailed;
    refusal.failure = entry->failure;
    refusal.retry_after = entry->retry_at - now_;
    refuse(ticket, refusal, out);
  } else if (std::optional<Refuse> never;
             // What loads has its bytes, and if it is pinned they must not stand in its own way.
             entry->state != State::kLoading && (never = impossible(*entry))) {
    refuse(ticket, *never, out);
  } else {
    const bool within_reach = is_within_reach(*entry, deadline);
    const bool alone = waiting_.empty();
    if (!within_reach) refusal = out_of_reach(*entry, deadline);
    // Who comes too late may come again: where nobody else waits, the model is loaded for that.
    if (within_reach || alone) {
      if (entry->state == State::kCold || entry->state == State::kFailed) {
        entry->state = State::kQueued;
      }
      if (first) {
        join_waiting(index);
        explain(Decision::kQueued, model, Cause{}, 0, Bytes{0});
      }
      if (entry->state == State::kQueued) schedule(out);
    }
    if (!within_reach) refuse(ticket, refusal, out);
  }
  finish(out);
  return ticket;
}

Status Yard::cancel(TicketId ticket, Tick now, Actions& out) {
  if (tickets_.find(ticket) == nullptr) return stale("the ticket");
  drop_ticket(ticket);  // First: its deadline may have passed just now, and it has ended already.
  begin(now, out, Bounds::kSame);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::set_aside(LeaseId lease) {
  Lease* held = leases_.find(lease);
  if (held == nullptr) return stale("the lease");
  if (held->aside) return Done{};
  held->aside = true;
  Entry& entry = entry_at(held->entry);
  ++entry.aside_count;
  if (entry.home != kNoDevice) paces_[position(entry.home)].set_aside();
  return Done{};
}

Status Yard::release(LeaseId lease, Tick now, Actions& out) {
  const Lease* held = leases_.find(lease);
  if (held == nullptr) return stale("the lease");
  const EntryIndex index = held->entry;
  const bool counts = !held->aside;
  Entry& entry = entry_at(index);
  now_ = std::max(now_, now);
  leases_.erase(lease);
  if (counts && entry.home != kNoDevice) paces_[position(entry.home)].end(now_);
  if (!counts) --entry.aside_count;
  const bool look_who_is_behind = now_ >= relieve_at_;
  if (--entry.lease_count == 0) {
    entry.used += now_ - entry.used_since;
  } else if (!pressed_ && !look_who_is_behind) {
    return Done{};
  }
  if (entry.state != State::kDraining && waiting_.empty() && !ledger_.any_deficit() &&
      !look_who_is_behind) {
    return Done{};
  }
  begin(now, out, Bounds::kSame);
  if (entry.state == State::kDraining && entry.lease_count == 0) start_unload(index, out);
  schedule(out);
  finish(out);
  return Done{};
}

// --- What became of the actions

Status Yard::load_done(ModelId model, Tick now, const Charge& actual, Duration took, Source source,
                       Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  if (entry->state != State::kLoading) return wrong_state(*entry, "load_done");
  if (Status checked = check_measured(*entry, actual); !checked) return checked;
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  learn_size(index, actual);
  end_load(*entry);
  ledger_.commit(entry->held, actual);
  entry->held = actual;
  if (entry->pinned) {
    actual.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] += b; });
  }
  turn_shares(*entry, Holding::kLoading, Holding::kResident);
  entry->state = State::kResident;
  entry->used = Duration{};
  entry->home = first_of(touching(actual, entry->held_shares_on));
  entry->failure_count = 0;

  const double measured = std::max(seconds_of(took), kLeastSeconds);
  const Bytes weight = weight_of(*entry);
  const bool again = entry->load_count > 0;
  entry->times.measured(source, measured, weight);
  prices_.loaded(source, measured, weight, again);
  reprice(*entry);
  if (again && source != Source::kCopy) reprice_firsts();
  ++entry->load_count;
  ++counters_.load_count;
  if (source == Source::kCopy) ++counters_.promotion_count;
  if (source == Source::kCopy && entry->copy.state == CopyState::kKept &&
      worth_of_copy(*entry) <= 0) {
    drop_copy(index, Cause{.why = Why::kNotWorth}, 0, out);
  }
  counters_.load_seconds += measured;
  lru_bill_.measured(index, measured);
  departures_.loaded(index, now_);
  touching(actual, entry->held_shares_on).for_each([&](DeviceIndex d, Bytes) {
    ++device_counters_[position(d)].load_count;
  });
  explain(Decision::kLoadDone, model, Cause{}, measured, going_with(*entry));

  grant_waiting(index, out);
  if (entry->removed || entry->leave_after) {
    entry->leave_after = false;
    send_away(index, Cause{.why = entry->removed ? Why::kRemoved : Why::kAsked}, out);
  }
  drain_closed(out);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::load_failed(ModelId model, Tick now, LoadFailure failure, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  if (entry->state != State::kLoading) return wrong_state(*entry, "load_failed");
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  end_load(*entry);
  explain(Decision::kLoadFailed, model, Cause{}, 0, going_with(*entry));
  ledger_.cancel_reservation(entry->held);
  drop_shares(*entry, Holding::kLoading, false);
  entry->held = Charge{};
  if (entry->leave_after) forget(index, Cause{.why = Why::kAsked}, out);
  entry->leave_after = false;
  if (failure == LoadFailure::kCancelled) {
    come_to_rest(index);
  } else {
    ++counters_.load_failure_count;
    ++entry->failure_count;
    entry->failure = failure;
    Duration wait = options_.backoff_initial;
    for (std::uint32_t i = 1; i < entry->failure_count && wait < options_.backoff_max; ++i) {
      wait = wait > options_.backoff_max / 2 ? options_.backoff_max : wait * 2;
    }
    entry->retry_at = saturating_add(now_, wait);
    Refuse refusal;
    refusal.reason = RefuseReason::kLoadFailed;
    refusal.failure = failure;
    refusal.retry_after = wait;
    refuse_all(index, refusal, out);
    entry->state = State::kFailed;
    if (entry->removed) come_to_rest(index);
  }
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::unload_done(ModelId model, Tick now, const Charge& freed,
                         const std::optional<Kept>& kept, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  if (entry->state != State::kUnloading || entry->copy.state == CopyState::kAwaited) {
    return wrong_state(*entry, "unload_done");
  }
  if (Status checked = check_kept(*entry, kept); !checked) return checked;
  const Charge exclusive = exclusive_of(*entry);
  if (!freed.fits_within(exclusive)) {
    return Error{ErrorCode::kInvalidArgument, "more bytes came back than were held"};
  }
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  const bool copied = entry->copy.state == CopyState::kMaking;
  if (copied) end_copy(index, kept);
  ledger_.finish_drain(exclusive, freed);
  entry->held.for_each([&](DeviceIndex d, Bytes b) { unloading_[position(d)] -= b; });
  explain(Decision::kUnloaded, model, Cause{}, 0, freed.total());
  drop_shares(*entry, Holding::kUnloading, true);
  const Charge missing = exclusive.saturating_minus(freed);
  entry->quarantined = entry->quarantined.saturating_plus(missing);
  entry->held = Charge{};
  if (!missing.empty()) {
    explain(Decision::kQuarantined, model, Cause{}, 0, missing.total());
  }
  if (copied && entry->forgotten) {
    forget(index, Cause{.why = entry->removed ? Why::kRemoved : Why::kAsked}, out);
  }
  come_to_rest(index);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::forgive(ModelId model, Tick now) {
  Entry* entry = live(model);
  if (entry == nullptr) return stale("the model");
  now_ = std::max(now_, now);
  entry->failure_count = 0;
  if (entry->state == State::kFailed) entry->state = State::kCold;
  return Done{};
}

Status Yard::reclaimed(ModelId model, Tick now, const Charge& bytes, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  if (!bytes.fits_within(entry->quarantined)) {
    return Error{ErrorCode::kInvalidArgument, "more bytes came back than were quarantined"};
  }
  begin(now, out);
  ledger_.reclaim(bytes);
  entry->quarantined = entry->quarantined.saturating_minus(bytes);
  if (entry->removed && entry->state == State::kCold) come_to_rest(EntryTable::index_of(model));
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::remeasured(ModelId model, Tick now, const Charge& actual, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  const bool leaving = entry->state == State::kDraining;
  if (entry->state != State::kResident && !leaving) return wrong_state(*entry, "remeasured");
  if (Status checked = check_measured(*entry, actual); !checked) return checked;
  begin(now, out);
  learn_size(EntryTable::index_of(model), actual);
  ledger_.remeasure(entry->held, actual, leaving);
  if (entry->pinned && !leaving) {
    entry->held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] -= b; });
    actual.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] += b; });
  }
  entry->held = actual;
  drain_closed(out);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::lost(ModelId model, Tick now, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return stale("the model");
  if (entry->state != State::kResident && entry->state != State::kDraining) {
    return wrong_state(*entry, "lost");
  }
  begin(now, out);
  explain(Decision::kLost, model, Cause{.why = Why::kLost}, 0, going_with(*entry));
  entry->forgotten = true;
  if (entry->state == State::kResident) start_drain(EntryTable::index_of(model), out);
  schedule(out);
  finish(out);
  return Done{};
}

void Yard::tick(Tick now, Actions& out) {
  begin(now, out, Bounds::kSame);
  schedule(out);
  finish(out);
}

// --- Beginning and end of every event

void Yard::begin(Tick now, Actions& out, Bounds bounds) {
  now_ = std::max(now_, now);
  if (bounds == Bounds::kMayDiffer) look_for_hopeless_ = true;
  if (wake_at_ <= now_) {
    wake_at_ = kNever;
    pass_owed_ = true;  // Also if this event by itself would make none.
  }
  expire(out);
}

void Yard::finish(Actions& out) {
  if (pass_owed_) schedule(out);
  if (!awaited_.empty()) resume_awaited(out);
  wake(out);
#if MODELYARD_CHECK_INVARIANTS
  if (Status audited = audit(); !audited) {
    std::fprintf(stderr, "modelyard: invariant violated: %s\n", audited.error().message.c_str());
    std::abort();
  }
#endif
}

Entry* Yard::live(ModelId model) {
  Entry* entry = entries_.find(model);
  return entry == nullptr || entry->removed ? nullptr : entry;
}

Status Yard::check_placements(std::span<const Charge> placements) const {
  if (placements.empty() || placements.size() > kMaxPlacements) {
    return Error{ErrorCode::kInvalidArgument,
                 "a model has 1 to " + std::to_string(kMaxPlacements) + " placements"};
  }
  for (const Charge& placement : placements) {
    if (!placement.within(device_count())) {
      return Error{ErrorCode::kInvalidArgument, "a placement names a device there is not"};
    }
  }
  return Done{};
}

Status Yard::check_shares(std::span<const ShareId> shares, std::span<const DeviceIndex> shares_on,
                          std::span<const Charge> placements) const {
  const auto invalid = [](const char* text) { return Error{ErrorCode::kInvalidArgument, text}; };
  for (std::size_t i = 0; i < shares.size(); ++i) {
    if (shares_.find(shares[i]) == nullptr) return stale("a share");
    if (std::find(shares.begin(), shares.begin() + static_cast<std::ptrdiff_t>(i), shares[i]) !=
        shares.begin() + static_cast<std::ptrdiff_t>(i)) {
      return invalid("a model holds a share once");
    }
  }
  if (!shares_on.empty() && shares_on.size() != placements.size()) {
    return invalid("where shares are held is said for every placement or for none");
  }
  for (std::size_t p = 0; p < shares_on.size(); ++p) {
    if (shares_on[p] == kNoDevice) continue;
    if (position(shares_on[p]) >= device_count()) {
      return invalid("shares are held on a device there is not");
    }
    // A sum that had to be cut would seem to fit where it does not.
    if (!with_bytes_of(shares, placements[p].on(shares_on[p]))) {
      return invalid("a placement and its shares have more than 64 TiB");
    }
  }
  return Done{};
}

// A copy that has been made holds what was reserved for it, more or less.
Status Yard::check_kept(const Entry& entry, const std::optional<Kept>& kept) const {
  if (!kept) return Done{};
  if (entry.copy.state != CopyState::kMaking) {
    return Error{ErrorCode::kWrongState, "no copy of the model was asked for"};
  }
  // Room for more has not been promised; and what fits was to be made.
  const bool more = kept->bytes > entry.copy.held.on(tier_);
  if (is_valid(kept->bytes) && kept->made != more &&
      with_bytes_of(entry.copy.shares, kept->bytes)) {
    return Done{};
  }
  return Error{ErrorCode::kInvalidArgument, "the bytes of a copy are out of range"};
}

Status Yard::check_measured(const Entry& entry, const Charge& actual) const {
  bool valid = actual.within(device_count());
  touching(actual, entry.held_shares_on).for_each([&](DeviceIndex d, Bytes) {
    const std::optional<Bytes> own = checked_add(actual.on(d), entry.quarantined.on(d));
    const bool shares = d == entry.held_shares_on;
    valid = valid && own && (!shares || with_bytes_of(entry.held_shares, *own));
  });
  if (valid) return Done{};
  return Error{ErrorCode::kInvalidArgument, "a measured charge is out of range"};
}

}  // namespace modelyard

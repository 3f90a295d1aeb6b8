#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "modelyard/yard.hpp"
#include "pass.hpp"

// Who is loaded next, and who leaves for it. The rules are in the comment of class Yard.

namespace modelyard {

// --- Scheduling

Tick Yard::overdue_at(const Entry& entry) const {
  const Ticket& oldest = *tickets_.find(entry.oldest);
  Duration patience = options_.overdue_after;
  if (oldest.deadline != kNever) {
    // Half of its time; but nobody is asked to leave for a request that a load would outlast.
    const Duration half = (oldest.deadline - oldest.arrival) / 2;
    if (std::chrono::duration<double>(half).count() >= entry.reload_seconds) {
      patience = std::min(patience, half);
    }
  }
  return saturating_add(oldest.arrival, patience);
}

Tick Yard::impatient_at(const Entry& entry) const {
  const Duration patience =
      std::max(from_seconds(kImpatientLoads * entry.reload_seconds), kLeastImpatience);
  return std::min(saturating_add(tickets_.find(entry.oldest)->arrival, patience),
                  overdue_at(entry));
}

double Yard::urgency(const Entry& entry) const {
  const double age = seconds_of(now_ - tickets_.find(entry.oldest)->arrival);
  return (1 + age / std::max(entry.reload_seconds, kLeastSeconds)) *
         std::sqrt(static_cast<double>(entry.waiting_count));
}

std::vector<Yard::Turn> Yard::turns() const {
  std::vector<Turn> found;
  found.reserve(waiting_.size());
  for (const auto& [sequence, index] : waiting_) {
    const Entry& entry = entry_at(index);
    if (entry.state != State::kQueued) continue;  // Still on its way out.
    const Tick since = overdue_at(entry);
    found.push_back({since <= now_, since, urgency(entry), sequence, index});
  }
  std::sort(found.begin(), found.end());
  return found;
}

// What is asked of each device: the demand of the models that are on it, or are being loaded there.
std::vector<double> Yard::demands() const {
  std::vector<double> found(device_count());
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->home == kNoDevice) continue;
    if (entry->state != State::kResident && entry->state != State::kLoading) continue;
    found[position(entry->home)] += demand_of(*entry);
  }
  return found;
}

// --- What is known of the time things take

Duration Yard::used_for(const Entry& entry) const {
  return entry.lease_count > 0 ? entry.used + (now_ - entry.used_since) : entry.used;
}

// When a model that is in use, and goes on being so, will have been for that many of its loads.
Tick Yard::worked_at(const Entry& entry, double loads) const {
  const Duration needed = from_seconds(loads * entry.reload_seconds);
  const Duration used = used_for(entry);
  return used >= needed ? now_ : saturating_add(now_, needed - used);
}

double Yard::expected_wait(const Entry& entry) const {
  if (entry.state == State::kResident) {
    if (entry.home == kNoDevice) return 0;
    const Pace& pace = paces_[position(entry.home)];
    // Whoever comes to an idle device is served, whatever came before.
    return pace.given() == 0 ? 0 : pace.backlog_seconds(now_) + pace.seconds_each();
  }
  // Nobody is turned away for what has only been guessed.
  if (entry.load_count == 0) return 0;
  if (entry.state == State::kLoading) {
    return std::max(0.0, entry.reload_seconds - seconds_of(now_ - entry.load_began));
  }
  double soonest = std::numeric_limits<double>::infinity();
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touching(entry.placements[p], shares_device(entry, p));
    if (!is_closed(touched)) soonest = std::min(soonest, seconds_of(channels_free_in(touched)));
  }
  return std::isfinite(soonest) ? soonest + entry.reload_seconds : 0;
}

double Yard::expected_wait_seconds(ModelId model) const {
  const Entry* entry = entries_.find(model);
  return entry == nullptr ? 0 : expected_wait(*entry);
}

// What a request has to have left.
double Yard::reach(const Entry& entry) const {
  return expected_wait(entry) * (entry.state == State::kResident ? kReachMargin : 1);
}

bool Yard::is_within_reach(const Entry& entry, Tick deadline) const {
  return deadline == kNever ||
         reach(entry) <= seconds_of(std::max(deadline - now_, Duration::zero()));
}

Refuse Yard::too_late(const Entry& entry) const {
  Refuse refusal;
  const bool loads = entry.state == State::kLoading;
  refusal.reason = loads ? RefuseReason::kDeadlineInLoad : RefuseReason::kDeadlineInQueue;
  const double load = entry.state == State::kResident ? 0 : entry.reload_seconds;
  const double left = loads ? load - seconds_of(now_ - entry.load_began) : load;
  refusal.retry_after = std::max<Duration>(from_seconds(std::max(left, 0.0)), kLeastRetry);
  return refusal;
}

Refuse Yard::out_of_reach(const Entry& entry, Tick deadline) const {
  Refuse refusal;
  refusal.reason = RefuseReason::kDeadlineUnreachable;
  refusal.needs = from_seconds(expected_wait(entry));
  refusal.left = deadline - now_;
  // What a device has to do gets less with time; what a load takes does not, but it may have been
  // done by then.
  const Duration spared = entry.state == State::kResident ? refusal.left : Duration::zero();
  refusal.retry_after = std::max<Duration>(from_seconds(reach(entry)) - spared, kLeastRetry);
  return refusal;
}

// How long until a load may begin on all devices that it touches. Known where loads run one by one.
Duration Yard::channels_free_in(const Charge& touched) const {
  Duration longest{};
  if (options_.load_channels_per_device > 1) return longest;
  touched.for_each([&](DeviceIndex d, Bytes) {
    if (loading_[position(d)] > 0) longest = std::max(longest, loaded_at_[position(d)] - now_);
  });
  return longest;
}

// When what a device had to do when the oldest request came will be done but for as long as a load
// takes, as was thought then.
Tick Yard::served_at(const Entry& entry, DeviceIndex device) const {
  const Ticket& oldest = *tickets_.find(entry.oldest);
  const double ahead = static_cast<double>(oldest.ahead[position(device)]);
  return saturating_add(oldest.arrival,
                        from_seconds(ahead - entry.reload_seconds - kPressureSlack));
}

// A load there would bring nothing yet: the device has older requests to run for longer than it
// takes. What has come since stands behind this one's requests and does not count.
bool Yard::is_backed_up(const Entry& entry, const Charge& touched) const {
  const DeviceIndex home = first_of(touched);
  return home != kNoDevice && served_at(entry, home) > now_ &&
         work_seconds(home) > entry.reload_seconds + kPressureSlack;
}

// The first closed device that a charge touches, or kNoDevice.
DeviceIndex Yard::closed_device(const Charge& placement) const {
  DeviceIndex found = kNoDevice;
  placement.for_each([&](DeviceIndex d, Bytes) {
    if (found == kNoDevice && closed_[position(d)]) found = d;
  });
  return found;
}

std::vector<LeaseId> Yard::leases_of(ModelId model) const {
  std::vector<LeaseId> found;
  if (entries_.find(model) == nullptr) return found;
  const EntryIndex index = EntryTable::index_of(model);
  for (std::uint32_t i = 0; i < leases_.slot_count(); ++i) {
    const Lease* lease = leases_.at(i);
    if (lease != nullptr && lease->entry == index) found.push_back(leases_.id_at(i));
  }
  return found;
}

std::vector<Resident> Yard::residents(std::optional<double> worked) const {
  std::vector<Resident> found;
  found.reserve(entries_.size());
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->state != State::kResident || entry->pinned) continue;
    const bool leased = entry->lease_count > 0;
    if (leased && (!worked || worked_at(*entry, *worked) > now_)) continue;
    found.push_back({i, &entry->held, entry->reload_seconds, leased, entry->held_shares,
                     entry->held_shares_on});
  }
  return found;
}

// Why no amount of waiting helps, with the numbers of the placement that comes closest.
std::optional<Refuse> Yard::impossible(const Entry& entry) const {
  Refuse best;
  Bytes least_excess{kMaxBytes};
  bool found = false;
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    // What pinned models hold with it stands in nobody's way but counts once.
    const Charge placement = needed(entry, p, Present::kPinned);
    Refuse worst;
    Bytes excess{};
    placement.for_each([&](DeviceIndex d, Bytes need) {
      const Account& account = ledger_.account(d);
      const Bytes kept = pinned_[position(d)] + account.quarantined;
      const Bytes most = saturating_sub(account.budget, kept);
      if (need <= most) return;
      // A device that is too small for good tells more than one that is taken.
      const bool never = need > account.budget;
      const bool was_never = worst.reason == RefuseReason::kNeverFits;
      const bool tells_more = never == was_never ? need - most > excess : never;
      excess = std::max(excess, need - most);
      if (!tells_more) return;
      worst.reason = never ? RefuseReason::kNeverFits : RefuseReason::kBudgetExhausted;
      worst.device = d;
      worst.needed = need;
      worst.free = account.free();
      worst.budget = account.budget;
    });
    if (excess == Bytes{0}) return std::nullopt;
    // A placement that only pins stand in the way of comes closer than one that can never be.
    const bool closer =
        !found || (worst.reason == best.reason ? excess < least_excess
                                               : worst.reason == RefuseReason::kBudgetExhausted);
    if (closer) {
      best = worst;
      least_excess = excess;
      found = true;
    }
  }
  fill_holders(best);
  return best;
}

void Yard::fill_holders(Refuse& refusal) const {
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr) continue;
    const Bytes held = held_with_shares(entries_.id_at(i)).on(refusal.device) +
                       entry->quarantined.on(refusal.device);
    if (held <= refusal.holders.back().bytes) continue;
    refusal.holders.back() = Holder{entries_.id_at(i), held};
    for (std::size_t k = refusal.holders.size() - 1; k > 0; --k) {
      if (refusal.holders[k].bytes <= refusal.holders[k - 1].bytes) break;
      std::swap(refusal.holders[k], refusal.holders[k - 1]);
    }
  }
}

Yard::Room Yard::room() const {
  Room room;
  for (std::size_t i = 0; i < device_count(); ++i) {
    const Account& account = ledger_.account(static_cast<DeviceIndex>(i));
    room.available[i] = account.free();
    // What is on its way out repays the deficit first.
    const Bytes leaving = account.draining - unloading_[i];
    room.unloading[i] = saturating_sub(unloading_[i], account.deficit);
    room.leaving[i] = saturating_sub(leaving, saturating_sub(account.deficit, unloading_[i]));
  }
  return room;
}

Yard::Pass Yard::make_pass() const {
  Pass pass;
  pass.room = room();
  for (std::size_t i = 0; i < device_count(); ++i) {
    const std::uint32_t channels = options_.load_channels_per_device;
    pass.channels[i] = channels - std::min(channels, loading_[i]);
  }
  return pass;
}

void Yard::schedule(Actions& out) {
  pass_owed_ = false;
  relieve(out);
  if (waiting_.empty() && !ledger_.any_deficit()) return;
  pressed_ = false;
  tidy_tier(out);
  repay_deficits(out);
  if (look_for_hopeless_) refuse_hopeless(out);
  Pass pass = make_pass();
  // Without a channel nobody can be loaded, and nobody leaves before his successor can come.
  // A model that holds nothing needs none.
  const auto is_over = [&] { return !pass.has_any_channel() && !some_hold_nothing_; };
  if (is_over()) return;
  for (const Turn& turn : turns()) {
    schedule_model(turn, pass, out);
    if (is_over()) break;
  }
  if (look_for_hopeless_) refuse_hopeless(out);  // A pinned model is being loaded.
}

void Yard::refuse_hopeless(Actions& out) {
  look_for_hopeless_ = false;
  // refuse_all takes at most its own model out of the list.
  for (auto next = waiting_.begin(); next != waiting_.end();) {
    const EntryIndex index = (next++)->second;
    const Entry& entry = entry_at(index);
    if (entry.state != State::kQueued) continue;
    if (std::optional<Refuse> refusal = impossible(entry)) refuse_all(index, *refusal, out);
  }
}

void Yard::repay_deficits(Actions& out) {
  Charge owed;
  for (std::size_t i = 0; i < device_count(); ++i) {
    const auto device = static_cast<DeviceIndex>(i);
    const Account& account = ledger_.account(device);
    owed.set(device, std::min(saturating_sub(account.deficit, account.draining), Bytes{kMaxBytes}));
  }
  if (owed.empty()) return;
  const std::vector<Resident> all = residents(0.0);
  Sharing sharing;
  if (shares_.size() > 0) sharing.table = &shares_;
  sharing.count_leaving = true;  // Who drains has been taken off what is owed.
  // What nobody can repay (pinned or still loading) must not keep the rest from being repaid.
  const Charge freed = freed_by_all(all, sharing);
  Charge most;
  owed.for_each([&](DeviceIndex d, Bytes b) { most.set(d, std::min(freed.on(d), b)); });
  if (std::optional<Plan> plan =
          plan_eviction(all, most, budgets_, *policy_, request_clock_, sharing)) {
    DeviceIndex owing = kNoDevice;
    owed.for_each([&](DeviceIndex d, Bytes) {
      if (owing == kNoDevice) owing = d;
    });
    evict(*plan, Cause{.why = Why::kBudget, .device = owing}, out);
  }
}

void Yard::schedule_model(const Turn& turn, Pass& pass, Actions& out) {
  const EntryIndex index = turn.entry;
  const Entry& entry = entry_at(index);
  const Duration takes = from_seconds(entry.reload_seconds);

  // 1. Load where it fits now, where most room is left.
  constexpr auto kNone = static_cast<std::uint32_t>(kMaxPlacements);
  std::uint32_t chosen = kNone;
  std::uint32_t soon = kNone;
  std::uint32_t later = kNone;
  std::uint32_t open = kNone;
  Bytes most_room{};
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touching(entry.placements[p], shares_device(entry, p));
    if (is_closed(touched) || is_meant_for_another(entry, touched)) continue;
    if (open == kNone) open = p;
    const Need need = pass.unclaimed(need_of(entry, p));
    const bool channels = pass.has_channels(touched, now_, takes);
    switch (pass.reach(need)) {
      case Pass::Reach::kNow:
        if (!channels) {
          if (soon == kNone) soon = p;
        } else if (const Bytes room = pass.room_after(need.now);
                   chosen == kNone || room > most_room) {
          chosen = p;
          most_room = room;
        }
        break;
      case Pass::Reach::kSoon:
        if (soon == kNone) soon = p;
        break;
      case Pass::Reach::kLater:
        if (later == kNone && channels) later = p;
        break;
      case Pass::Reach::kNot:
        break;
    }
  }
  if (chosen != kNone) {
    // Cannot be that they do not fit: what a pass calls available is free in the ledger.
    if (!ledger_.fits(needed(entry, chosen, Present::kAny))) return;
    const Room before = room();
    if (Status reserved = ledger_.reserve(entry.placements[chosen]); !reserved) return;
    start_load(index, chosen, out);
    pass.follow(before, room());
    pass.claim_channels(touching(entry.held, entry.held_shares_on));
    return;
  }

  // 2. Keep what is on its way, and the turn to load with it.
  const auto touched_by = [&](std::uint32_t p) {
    return touching(entry.placements[p], shares_device(entry, p));
  };
  if (soon != kNone) {
    const Charge touched = touched_by(soon);
    pass.claim_later(pass.unclaimed(need_of(entry, soon)).now);
    if (pass.has_channels(touched, now_, takes)) {
      pass.claim_channels(touched);
    } else if (!pass.has_channels(touched)) {
      pass.keep_channels(touched, saturating_add(now_, channels_free_in(touched)));
    }
    return;
  }
  const bool overdue = turn.overdue;
  // Requests that run may run for long: the bytes are kept, the channel is not.
  if (later != kNone && !overdue) {
    pass.claim(need_of(entry, later).later);
    return;
  }

  // 3. Make room, where it costs least: by idle models, and for an overdue one by models in use.
  if (!pass.idle_known) {
    pass.idle = residents(std::nullopt);
    pass.idle_known = true;
    if (device_count() > 1) pass.demands = demands();
  }
  Way way = cheapest_way(entry, pass, pass.idle, Count::kUnloading, !overdue);
  if (!way.plan && later != kNone) {
    pass.claim(need_of(entry, later).later);  // Those who are to leave suffice, once they do.
    return;
  }
  if (!way.plan) way = cheapest_way(entry, pass, pass.idle, Count::kLeaving, !overdue);
  if (!way.plan && (overdue || impatient_at(entry) <= now_)) {
    const double worked = overdue ? kWorkedForOverdue : kWorkedForImpatient;
    way = cheapest_way(entry, pass, residents(worked), Count::kLeaving, !overdue);
  }
  pressed_ = pressed_ || (way.pressed && !way.plan);
  if (way.plan) {
    const Room before = room();
    evict(*way.plan, Cause{.why = Why::kModel, .model = entries_.id_at(index)}, out);
    pass.follow(before, room());
    pass.idle_known = false;
    // Shares may be on their way out with victims.
    const Need need = pass.unclaimed(need_of(entry, way.placement));
    const bool at_once = std::none_of(way.plan->victims.begin(), way.plan->victims.end(),
                                      [](const Victim& victim) { return victim.leased; });
    pass.claim(at_once ? need.now : need.later);
    if (at_once) pass.claim_channels(touched_by(way.placement));
    return;
  }

  // 4. Nothing can be done for it now. Others may pass, unless it has waited long enough. One that
  // only lacks some of the channels keeps those that are free.
  if (overdue && open != kNone) {
    pass.claim(need_of(entry, open).later);
    pass.claim_channels(touched_by(open));
    return;
  }
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touched_by(p);
    if (is_closed(touched) || is_meant_for_another(entry, touched)) continue;
    if (pass.has_channels(touched) || !pass.has_a_channel(touched)) continue;
    if (!plan_eviction(pass.idle, pass.shortfall(pass.unclaimed(need_of(entry, p)), true), budgets_,
                       *policy_, request_clock_, sharing_for(entry, p, true))) {
      continue;
    }
    pass.keep_channels(touched, saturating_add(now_, channels_free_in(touched)));
    return;
  }
}

// The placement for which making room costs least, when what is on its way back is counted as
// `count` says. Only placements with a load channel: nobody leaves for a model before it can come.
Yard::Way Yard::cheapest_way(const Entry& entry, const Pass& pass,
                             std::span<const Resident> candidates, Count count,
                             bool under_pressure) const {
  Way best;
  const Duration takes = from_seconds(entry.reload_seconds);
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touching(entry.placements[p], shares_device(entry, p));
    if (is_closed(touched) || is_meant_for_another(entry, touched)) continue;
    if (!pass.has_channels(touched, now_, takes)) continue;
    if (under_pressure && is_backed_up(entry, touched)) {
      best.pressed = true;
      continue;
    }
    const bool leaving = count == Count::kLeaving;
    std::optional<Plan> plan =
        plan_eviction(candidates, pass.shortfall(pass.unclaimed(need_of(entry, p)), leaving),
                      budgets_, *policy_, request_clock_, sharing_for(entry, p, leaving));
    if (!plan) continue;
    // What is asked of a device is asked of it in vain once it is behind: cheap and busy is dear.
    const double cost = plan->cost * (1 + pass.demand_on(first_of(touched)));
    if (!best.plan || cost < best.cost) {
      best.plan = std::move(plan);
      best.cost = cost;
      best.placement = p;
    }
  }
  return best;
}

void Yard::evict(const Plan& plan, const Cause& cause, Actions& out) {
  for (const Victim& victim : plan.victims) {
    Entry& entry = entry_at(victim.entry);
    explain(victim.leased ? Decision::kDrained : Decision::kEvicted, entries_.id_at(victim.entry),
            cause, victim.score, going_with(entry));
    policy_->on_evict(victim.entry, victim.score);
    ++entry.eviction_count;
    ++counters_.eviction_count;
    touching(entry.held, entry.held_shares_on).for_each([&](DeviceIndex d, Bytes) {
      ++device_counters_[position(d)].eviction_count;
    });
    start_drain(victim.entry, out);
  }
}

std::optional<Plan> Yard::plan_for(ModelId model) const {
  const Entry* entry = entries_.find(model);
  if (entry == nullptr || (entry->state != State::kCold && entry->state != State::kQueued &&
                           entry->state != State::kFailed)) {
    return std::nullopt;
  }
  const Pass pass = make_pass();
  for (std::uint32_t p = 0; p < entry->placements.size(); ++p) {
    const Charge touched = touching(entry->placements[p], shares_device(*entry, p));
    if (!is_closed(touched) &&
        pass.reach(pass.unclaimed(need_of(*entry, p))) != Pass::Reach::kNot) {
      return std::nullopt;
    }
  }
  const std::vector<Resident> idle = residents(std::nullopt);
  Way way = cheapest_way(*entry, pass, idle, Count::kUnloading, false);
  if (!way.plan) way = cheapest_way(*entry, pass, idle, Count::kLeaving, false);
  return std::move(way.plan);
}

void Yard::wake(Actions& out) {
  Tick next = deadlines_.empty() ? kNever : deadlines_.begin()->first;
  // Who waits becomes impatient and then overdue, and who is in use then may leave in the end.
  bool impatient = false;
  bool overdue = false;
  for (const auto& [sequence, index] : waiting_) {
    const Entry& entry = entry_at(index);
    if (entry.state != State::kQueued) continue;
    for (const Tick at : {impatient_at(entry), overdue_at(entry), kept_from_others_until(entry)}) {
      if (at > now_) next = std::min(next, at);
    }
    for (std::size_t i = 0; pressed_ && i < device_count(); ++i) {
      const Tick at = served_at(entry, static_cast<DeviceIndex>(i));
      if (at > now_) next = std::min(next, at);
    }
    overdue = overdue || overdue_at(entry) <= now_;
    impatient = impatient || impatient_at(entry) <= now_;
  }
  if (impatient || overdue) {
    const double worked = overdue ? kWorkedForOverdue : kWorkedForImpatient;
    for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
      const Entry* entry = entries_.at(i);
      if (entry == nullptr || entry->state != State::kResident || entry->pinned) continue;
      if (entry->lease_count == 0) continue;
      if (const Tick at = worked_at(*entry, worked); at > now_) next = std::min(next, at);
      if (const Tick at = worked_at(*entry, kWorkedForImpatient); at > now_ && impatient) {
        next = std::min(next, at);
      }
    }
  }
  // An earlier wake-up that is still to come will do: it asks again.
  if (next >= wake_at_) return;
  wake_at_ = next;
  out.push_back(WakeAt{next});
}

void Yard::explain(Decision decision, ModelId model, const Cause& cause, double score,
                   Bytes bytes) {
  Explanation explanation;
  explanation.at = now_;
  explanation.decision = decision;
  explanation.model = model;
  explanation.why = cause.why;
  explanation.cause = cause.model;
  explanation.device = cause.device;
  explanation.score = score;
  explanation.bytes = bytes;
  if (const Entry* about = entries_.find(model)) {
    for (const ShareId id : about->held_shares) {
      const Share& share = *shares_.find(id);
      if (others_keep(*about, share)) explanation.shared_bytes += share.bytes;
    }
  }
  const Entry* whose = entries_.find(cause.model == ModelId{} ? model : cause.model);
  if (whose != nullptr && whose->waiting_count > 0) {
    explanation.waited = now_ - tickets_.find(whose->oldest)->arrival;
  }
  tell_cost(explanation);
  explain_.add(explanation);
}

}  // namespace modelyard

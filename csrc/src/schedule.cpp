#include <algorithm>
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

std::vector<Resident> Yard::residents(bool with_leased) const {
  std::vector<Resident> found;
  found.reserve(entries_.size());
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->state != State::kResident || entry->pinned) continue;
    const bool leased = entry->lease_count > 0;
    if (leased && !with_leased) continue;
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
  if (waiting_.empty() && !ledger_.any_deficit()) return;
  tidy_tier(out);
  repay_deficits(out);
  Pass pass = make_pass();
  // schedule_model takes at most its own model out of the list.
  for (auto next = waiting_.begin(); next != waiting_.end();) {
    const EntryIndex index = (next++)->second;
    schedule_model(index, pass, out);
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
  const std::vector<Resident> all = residents(true);
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

void Yard::schedule_model(EntryIndex index, Pass& pass, Actions& out) {
  const Entry& entry = entry_at(index);
  if (entry.state != State::kQueued) return;
  if (std::optional<Refuse> refusal = impossible(entry)) {
    refuse_all(index, *refusal, out);
    return;
  }

  // 1. Load where it fits now, where most room is left.
  constexpr auto kNone = static_cast<std::uint32_t>(kMaxPlacements);
  std::uint32_t chosen = kNone;
  std::uint32_t soon = kNone;
  std::uint32_t later = kNone;
  std::uint32_t open = kNone;
  Bytes most_room{};
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touching(entry.placements[p], shares_device(entry, p));
    if (is_closed(touched)) continue;
    if (open == kNone) open = p;
    const Need need = pass.unclaimed(need_of(entry, p));
    const bool channels = pass.has_channels(touched);
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
    pass.claim_later(pass.unclaimed(need_of(entry, soon)).now);
    pass.claim_channels(touched_by(soon));
    return;
  }
  const bool overdue = overdue_at(entry) <= now_;
  // Requests that run may run for long: the bytes are kept, the channel is not.
  if (later != kNone && !overdue) {
    pass.claim(need_of(entry, later).later);
    return;
  }

  // 3. Make room, where it costs least: by idle models, and for an overdue one by models in use.
  if (!pass.idle_known) {
    pass.idle = residents(false);
    pass.idle_known = true;
  }
  Way way = cheapest_way(entry, pass, pass.idle, Count::kUnloading);
  if (!way.plan && later != kNone) {
    pass.claim(need_of(entry, later).later);  // Those who are to leave suffice, once they do.
    return;
  }
  if (!way.plan) way = cheapest_way(entry, pass, pass.idle, Count::kLeaving);
  if (!way.plan && overdue) {
    way = cheapest_way(entry, pass, residents(true), Count::kLeaving);
  }
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

  // 4. Nothing can be done for it now. Younger ones may pass, unless it has waited long enough.
  if (overdue && open != kNone) {
    pass.claim(need_of(entry, open).later);
    pass.claim_channels(touched_by(open));
  }
}

// The placement for which making room costs least, when what is on its way back is counted as
// `count` says. Only placements with a load channel: nobody leaves for a model before it can come.
Yard::Way Yard::cheapest_way(const Entry& entry, const Pass& pass,
                             std::span<const Resident> candidates, Count count) const {
  Way best;
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge touched = touching(entry.placements[p], shares_device(entry, p));
    if (is_closed(touched) || !pass.has_channels(touched)) continue;
    const bool leaving = count == Count::kLeaving;
    std::optional<Plan> plan =
        plan_eviction(candidates, pass.shortfall(pass.unclaimed(need_of(entry, p)), leaving),
                      budgets_, *policy_, request_clock_, sharing_for(entry, p, leaving));
    if (plan && (!best.plan || plan->cost < best.plan->cost)) {
      best.plan = std::move(plan);
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
  const std::vector<Resident> idle = residents(false);
  Way way = cheapest_way(*entry, pass, idle, Count::kUnloading);
  if (!way.plan) way = cheapest_way(*entry, pass, idle, Count::kLeaving);
  return std::move(way.plan);
}

void Yard::wake(Actions& out) {
  Tick next = deadlines_.empty() ? kNever : deadlines_.begin()->first;
  for (const auto& [sequence, index] : waiting_) {
    const Entry& entry = entry_at(index);
    if (entry.state != State::kQueued) continue;
    const Tick overdue = overdue_at(entry);
    if (overdue > now_) next = std::min(next, overdue);
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
  explain_.add(explanation);
}

}  // namespace modelyard

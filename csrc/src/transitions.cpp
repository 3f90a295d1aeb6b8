#include <algorithm>
#include <optional>
#include <utility>

#include "modelyard/yard.hpp"

// Tickets, leases, and a model's way from state to state. Each function here keeps the ledger, the
// waiting list and the per-device sums in step with the entries.

namespace modelyard {

// --- Tickets and leases

TicketId Yard::add_ticket(EntryIndex index, Tick deadline) {
  Entry& entry = entry_at(index);
  Ticket ticket;
  ticket.entry = index;
  ticket.sequence = next_sequence_++;
  ticket.arrival = now_;
  ticket.deadline = deadline;
  for (std::size_t i = 0; i < paces_.size(); ++i) {
    ticket.ahead[i] = static_cast<float>(paces_[i].backlog_seconds(now_));
  }
  ticket.previous = entry.newest;
  const TicketId id = tickets_.insert(ticket);
  if (entry.waiting_count++ == 0) {
    entry.oldest = id;
  } else {
    tickets_.find(entry.newest)->next = id;
  }
  entry.newest = id;
  if (deadline != kNever) deadlines_.emplace(deadline, id);
  return id;
}

void Yard::unlink_ticket(TicketId id) {
  const Ticket ticket = *tickets_.find(id);
  Entry& entry = entry_at(ticket.entry);
  // The entry's place in the waiting list is that of its oldest ticket: leave and come back if that
  // one goes.
  const bool moves = entry.oldest == id;
  if (moves) leave_waiting(ticket.entry);
  if (ticket.previous != TicketId{}) {
    tickets_.find(ticket.previous)->next = ticket.next;
  } else {
    entry.oldest = ticket.next;
  }
  if (ticket.next != TicketId{}) {
    tickets_.find(ticket.next)->previous = ticket.previous;
  } else {
    entry.newest = ticket.previous;
  }
  --entry.waiting_count;
  if (ticket.deadline != kNever) deadlines_.erase({ticket.deadline, id});
  tickets_.erase(id);
  if (moves) join_waiting(ticket.entry);
}

void Yard::drop_ticket(TicketId id) {
  Entry& entry = entry_at(tickets_.find(id)->entry);
  unlink_ticket(id);
  if (entry.waiting_count == 0 && entry.state == State::kQueued) entry.state = State::kCold;
}

void Yard::refuse(TicketId id, Refuse refusal, Actions& out) {
  const EntryIndex index = tickets_.find(id)->entry;
  refusal.ticket = id;
  explain(Decision::kRefused, entries_.id_at(index), Cause{}, static_cast<double>(refusal.reason),
          refusal.needed);
  drop_ticket(id);
  out.push_back(refusal);
}

void Yard::refuse_all(EntryIndex index, const Refuse& refusal, Actions& out) {
  const Entry& entry = entry_at(index);
  while (entry.waiting_count > 0) refuse(entry.oldest, refusal, out);
}

LeaseId Yard::add_lease(EntryIndex index) {
  Entry& entry = entry_at(index);
  if (entry.lease_count++ == 0) entry.used_since = now_;
  if (entry.home != kNoDevice) paces_[position(entry.home)].begin(now_);
  return leases_.insert(Lease{index});
}

void Yard::grant_waiting(EntryIndex index, Actions& out) {
  const Entry& entry = entry_at(index);
  while (entry.waiting_count > 0) {
    const TicketId ticket = entry.oldest;
    drop_ticket(ticket);
    out.push_back(Grant{ticket, add_lease(index)});
  }
}

void Yard::expire(Actions& out) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_) {
    const TicketId ticket = deadlines_.begin()->second;
    const Entry& entry = entry_at(tickets_.find(ticket)->entry);
    refuse(ticket, too_late(entry), out);
    pass_owed_ = true;
  }
}

bool Yard::stands_in_waiting(const Entry& entry) {
  return entry.waiting_count > 0 &&
         (entry.state == State::kQueued || entry.state == State::kDraining ||
          entry.state == State::kUnloading);
}

void Yard::join_waiting(EntryIndex index) {
  const Entry& entry = entry_at(index);
  if (stands_in_waiting(entry)) {
    waiting_.emplace(tickets_.find(entry.oldest)->sequence, index);
  }
}

void Yard::leave_waiting(EntryIndex index) {
  const Entry& entry = entry_at(index);
  if (entry.waiting_count > 0) waiting_.erase({tickets_.find(entry.oldest)->sequence, index});
}

// --- Transitions

void Yard::start_load(EntryIndex index, std::uint32_t placement, Actions& out) {
  Entry& entry = entry_at(index);
  leave_waiting(index);
  entry.placement = placement;
  entry.forgotten = false;
  entry.held = entry.placements[placement];
  entry.state = State::kLoading;
  entry.load_began = now_;
  entry.meant_for = kNoDevice;
  take_shares(entry, shares_device(entry, placement));
  entry.home = first_of(touching(entry.held, entry.held_shares_on));
  if (entry.pinned) {
    entry.held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] += b; });
    look_for_hopeless_ = true;
  }
  touching(entry.held, entry.held_shares_on).for_each([&](DeviceIndex d, Bytes) {
    ++loading_[position(d)];
    loaded_at_[position(d)] = saturating_add(now_, from_seconds(entry.reload_seconds));
  });
  explain(Decision::kLoadStarted, entries_.id_at(index), Cause{}, 0, going_with(entry));
  out.push_back(Load{entries_.id_at(index), placement});
}

void Yard::stop_load(EntryIndex index, Actions& out) {
  Entry& entry = entry_at(index);
  if (std::exchange(entry.stop_sent, true)) return;
  out.push_back(CancelLoad{entries_.id_at(index)});
}

// Gives back the load channels. The reservation is the caller's to settle.
void Yard::end_load(Entry& entry) {
  entry.stop_sent = false;
  if (entry.pinned) {
    entry.held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] -= b; });
  }
  touching(entry.held, entry.held_shares_on).for_each([&](DeviceIndex d, Bytes) {
    --loading_[position(d)];
  });
}

void Yard::start_drain(EntryIndex index, Actions& out) {
  Entry& entry = entry_at(index);
  ledger_.begin_drain(entry.held);
  if (entry.pinned) {
    entry.held.for_each([&](DeviceIndex d, Bytes b) { pinned_[position(d)] -= b; });
    pin_shares(entry, false);
  }
  turn_shares(entry, Holding::kResident, Holding::kDraining);
  entry.state = State::kDraining;
  if (entry.lease_count == 0) {
    start_unload(index, out);
  } else {
    out.push_back(Drain{entries_.id_at(index)});
  }
}

// A model leaves for a reason that no policy weighed.
void Yard::send_away(EntryIndex index, const Cause& cause, Actions& out) {
  Entry& entry = entry_at(index);
  explain(entry.lease_count > 0 ? Decision::kDrained : Decision::kEvicted, entries_.id_at(index),
          cause, 0, going_with(entry));
  if (cause.why == Why::kAsked || cause.why == Why::kRemoved) forget(index, cause, out);
  start_drain(index, out);
}

void Yard::start_unload(EntryIndex index, Actions& out) {
  Entry& entry = entry_at(index);
  entry.state = State::kUnloading;
  entry.held.for_each([&](DeviceIndex d, Bytes b) { unloading_[position(d)] += b; });
  turn_shares(entry, Holding::kDraining, Holding::kUnloading);
  send_unload(index, out);
}

// A model leaves for good, and so does its copy.
void Yard::forget(EntryIndex index, const Cause& cause, Actions& out) {
  Entry& entry = entry_at(index);
  entry.forgotten = true;
  if (entry.copy.state == CopyState::kKept) drop_copy(index, cause, 0, out);
}

// The entry holds nothing any more: it waits again, rests, or is gone.
void Yard::come_to_rest(EntryIndex index) {
  Entry& entry = entry_at(index);
  leave_waiting(index);
  entry.state = entry.waiting_count > 0 ? State::kQueued : State::kCold;
  entry.rests_since = now_;
  join_waiting(index);
  if (entry.removed && entry.quarantined.empty() && entry.copy.state == CopyState::kNone) {
    unrefer(entry.shares);
    entries_.erase(entries_.id_at(index));
  }
}

void Yard::drain_closed(Actions& out) {
  if (std::find(closed_.begin(), closed_.end(), true) == closed_.end()) return;
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->state != State::kResident || entry->pinned) continue;
    const DeviceIndex closed = closed_device(touching(entry->held, entry->held_shares_on));
    if (closed != kNoDevice) {
      send_away(i, Cause{.why = Why::kDeviceClosed, .device = closed}, out);
    }
  }
}

void Yard::learn_size(EntryIndex index, const Charge& actual) {
  Entry& entry = entry_at(index);
  const bool promised = entry.placement < entry.placements.size();
  // While it loads, held is what was promised, also if its placements have been replaced since.
  const Charge& promise =
      promised && entry.state != State::kLoading ? entry.placements[entry.placement] : entry.held;
  if (actual.fits_within(promise)) return;
  const Charge over = actual.saturating_minus(promise);
  explain(Decision::kOvershoot, entries_.id_at(index), Cause{}, 0, over.total());
  // Once caught out, the same promise is not made again.
  if (promised) entry.placements[entry.placement] = entry.placements[entry.placement].max(actual);
}

}  // namespace modelyard

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "modelyard/yard.hpp"

// The yard's invariants, recomputed from the entries, tickets and leases. Shares no code with what
// keeps them.

namespace modelyard {
namespace {

Error violated(const std::string& text) { return {ErrorCode::kWrongState, text}; }

struct Sums {
  Bytes reserved, resident, draining, quarantined, pinned, unloading;
  std::uint32_t loading{0};
};

std::optional<Holding> holding_of(State state) {
  switch (state) {
    case State::kLoading:
      return Holding::kLoading;
    case State::kResident:
      return Holding::kResident;
    case State::kDraining:
      return Holding::kDraining;
    case State::kUnloading:
      return Holding::kUnloading;
    default:
      return std::nullopt;
  }
}

std::optional<Holding> holding_of(const Copy& copy) {
  switch (copy.state) {
    case CopyState::kMaking:
      return Holding::kLoading;
    case CopyState::kKept:
      return Holding::kResident;
    case CopyState::kDropping:
      return copy.in_use ? Holding::kDraining : Holding::kUnloading;
    default:
      return std::nullopt;
  }
}

// Adds a copy to the sums of the tier and to the holders of its shares.
Status add_copy(const Entry& entry, DeviceIndex tier, std::vector<Sums>& sums,
                std::map<ShareId, Share>& shares, const std::string& who) {
  const Copy& copy = entry.copy;
  const std::optional<Holding> holding = holding_of(copy);
  if (copy.in_use && copy.state != CopyState::kDropping) {
    return violated("I10: a copy is in use that is not being dropped: " + who);
  }
  if (!holding) {
    if (!copy.held.empty() || !copy.shares.empty()) {
      return violated("I10: there is no copy, and it holds bytes: " + who);
    }
    return Done{};
  }
  if (tier == kNoDevice) return violated("I10: a copy without a tier: " + who);
  const Bytes own = copy.held.on(tier);
  if (copy.held != Charge(tier, own)) return violated("I10: a copy beside the tier: " + who);
  Sums& sum = sums[position(tier)];
  switch (*holding) {
    case Holding::kLoading:
      sum.reserved += own;
      break;
    case Holding::kResident:
      sum.resident += own;
      break;
    case Holding::kDraining:
      sum.draining += own;
      break;
    case Holding::kUnloading:
      sum.draining += own;
      sum.unloading += own;
      break;
  }
  for (const ShareId id : copy.shares) {
    ++shares[id].model_count;
    ++shares[id].on(tier).by[static_cast<std::size_t>(*holding)];
  }
  return Done{};
}

bool holds_bytes(State state) {
  return state == State::kLoading || state == State::kResident || state == State::kDraining ||
         state == State::kUnloading;
}

}  // namespace

Status Yard::audit() const {
  std::vector<Sums> sums(ledger_.device_count());
  std::vector<std::uint32_t> leases(entries_.slot_count());
  std::vector<std::uint32_t> aside(entries_.slot_count());
  std::vector<std::uint32_t> given(device_count());  // To each device.
  std::vector<std::uint32_t> waiting(entries_.slot_count());
  std::map<ShareId, Share> shares;  // As they should be.

  for (std::uint32_t i = 0; i < leases_.slot_count(); ++i) {
    const Lease* lease = leases_.at(i);
    if (lease == nullptr) continue;
    if (lease->entry >= leases.size() || entries_.at(lease->entry) == nullptr) {
      return violated("I3: a lease names no model");
    }
    ++leases[lease->entry];
    if (lease->aside) ++aside[lease->entry];
    const DeviceIndex home = entries_.at(lease->entry)->home;
    if (home != kNoDevice && !lease->aside) ++given[position(home)];
  }
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (paces_[i].given() != given[i]) {
      return violated("I3: leases on device " + std::to_string(i));
    }
  }
  std::size_t timed = 0;
  for (std::uint32_t i = 0; i < tickets_.slot_count(); ++i) {
    const Ticket* ticket = tickets_.at(i);
    if (ticket == nullptr) continue;
    if (ticket->entry >= waiting.size() || entries_.at(ticket->entry) == nullptr) {
      return violated("I6: a ticket names no model");
    }
    ++waiting[ticket->entry];
    if (ticket->deadline == kNever) continue;
    ++timed;
    if (!deadlines_.contains({ticket->deadline, tickets_.id_at(i)})) {
      return violated("I6: a deadline is not watched");
    }
  }
  if (timed != deadlines_.size()) return violated("I6: a deadline of no ticket is watched");

  std::size_t awaited = 0;
  std::size_t in_waiting = 0;
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr) continue;
    const std::string who =
        "model \"" + entry->label + "\" (" + std::string(to_string(entry->state)) + ")";
    if (entry->lease_count != leases[i]) return violated("I3: leases of " + who);
    if (entry->aside_count != aside[i]) return violated("I3: leases set aside of " + who);
    if (entry->meant_for != kNoDevice &&
        (entry->state == State::kResident || entry->state == State::kLoading)) {
      return violated("I8: given away and not gone: " + who);
    }
    if (entry->waiting_count != waiting[i]) return violated("I6: tickets of " + who);
    if (entry->lease_count > 0 && entry->state != State::kResident &&
        entry->state != State::kDraining) {
      return violated("I3: a lease on " + who);
    }
    if (entry->state == State::kDraining && entry->lease_count == 0) {
      return violated("I3: nobody uses it and it is not unloaded: " + who);
    }
    if (entry->state == State::kResident && entry->waiting_count > 0) {
      return violated("I4: tickets wait for " + who);
    }
    if (entry->removed && (entry->waiting_count > 0 || entry->pinned)) {
      return violated("I6: removed, but waited for or pinned: " + who);
    }
    if (!holds_bytes(entry->state) && !(entry->held.empty() && entry->held_shares.empty())) {
      return violated("I1: bytes are held by " + who);
    }
    if (entry->held_shares.empty() != (entry->held_shares_on == kNoDevice)) {
      return violated("I9: shares are held nowhere by " + who);
    }
    if (Status copied = add_copy(*entry, tier_, sums, shares, who); !copied) return copied;
    const bool leaves_with_copy =
        entry->copy.state == CopyState::kAwaited || entry->copy.state == CopyState::kMaking;
    if (leaves_with_copy && entry->state != State::kUnloading) {
      return violated("I10: a copy is being made without an unload: " + who);
    }
    if (entry->copy.state == CopyState::kAwaited) ++awaited;
    for (const ShareId id : entry->shares) ++shares[id].model_count;
    for (const ShareId id : entry->held_shares) {
      ++shares[id].model_count;
      Holders& holders = shares[id].on(entry->held_shares_on);
      ++holders.by[static_cast<std::size_t>(*holding_of(entry->state))];
      if (entry->pinned && (entry->state == State::kLoading || entry->state == State::kResident)) {
        ++holders.pinned;
      }
    }
    if (entry->state == State::kLoading && entry->held_shares_on != kNoDevice &&
        entry->held.on(entry->held_shares_on) == Bytes{0}) {
      ++sums[position(entry->held_shares_on)]
            .loading;  // The loop below sees bytes of its own only.
    }
    if (entry->state == State::kQueued && entry->waiting_count == 0) {
      return violated("I8: nobody waits for " + who);
    }
    if ((entry->state == State::kCold || entry->state == State::kFailed) &&
        entry->waiting_count > 0) {
      return violated("I8: tickets wait for " + who);
    }

    // The queue, walked from the oldest ticket.
    std::uint32_t walked = 0;
    std::uint64_t last = 0;
    TicketId previous{};
    for (TicketId id = entry->waiting_count > 0 ? entry->oldest : TicketId{}; id != TicketId{};) {
      const Ticket* ticket = tickets_.find(id);
      if (ticket == nullptr || ticket->entry != i || ticket->previous != previous ||
          ticket->sequence <= last || ++walked > entry->waiting_count) {
        return violated("I6: the queue of " + who + " is broken");
      }
      last = ticket->sequence;
      previous = id;
      id = ticket->next;
    }
    if (walked != entry->waiting_count) return violated("I6: the queue of " + who + " is short");

    if (stands_in_waiting(*entry)) {
      ++in_waiting;
      if (!waiting_.contains({tickets_.find(entry->oldest)->sequence, i})) {
        return violated("I8: the waiting list lacks " + who);
      }
    }

    entry->held.for_each([&](DeviceIndex d, Bytes bytes) {
      Sums& sum = sums[position(d)];
      switch (entry->state) {
        case State::kLoading:
          sum.reserved += bytes;
          ++sum.loading;
          break;
        case State::kResident:
          sum.resident += bytes;
          break;
        case State::kUnloading:
          sum.unloading += bytes;
          [[fallthrough]];
        case State::kDraining:
          sum.draining += bytes;
          break;
        case State::kCold:
        case State::kQueued:
        case State::kFailed:
          break;
      }
      if (entry->pinned && (entry->state == State::kLoading || entry->state == State::kResident)) {
        sum.pinned += bytes;
      }
    });
    entry->quarantined.for_each(
        [&](DeviceIndex d, Bytes bytes) { sums[position(d)].quarantined += bytes; });
  }
  if (in_waiting != waiting_.size()) return violated("I8: the waiting list has a model too many");
  for (const EntryIndex index : awaited_) {
    const Entry* entry = entries_.at(index);
    if (entry == nullptr || entry->copy.state != CopyState::kAwaited) {
      return violated("I10: an unload is held back for no copy");
    }
  }
  if (awaited != awaited_.size()) return violated("I10: an unload is held back for ever");
  if (awaited > 0 && unloading_[position(tier_)] == Bytes{0}) {
    return violated("I10: an unload is held back though nothing leaves the tier");
  }

  for (std::uint32_t i = 0; i < shares_.slot_count(); ++i) {
    const Share* share = shares_.at(i);
    if (share == nullptr) continue;
    const std::string who = "share " + std::to_string(i);
    const Share& expected = shares[shares_.id_at(i)];
    if (share->model_count != expected.model_count) return violated("I9: models of " + who);
    for (std::size_t d = 0; d < kMaxDevices; ++d) {
      const Holders& holders = expected.holders[d];
      if (share->holders[d].by != holders.by || share->holders[d].pinned != holders.pinned) {
        return violated("I9: holders of " + who);
      }
      if (holders.total() == 0) continue;
      if (holders.of(Holding::kResident) > 0) {
        sums[d].resident += share->bytes;
      } else if (holders.of(Holding::kLoading) > 0) {
        sums[d].reserved += share->bytes;
      } else {
        sums[d].draining += share->bytes;
        if (holders.of(Holding::kDraining) == 0) sums[d].unloading += share->bytes;
      }
      if (holders.pinned > 0) sums[d].pinned += share->bytes;
    }
  }
  for (const auto& [id, share] : shares) {
    if (shares_.find(id) == nullptr) return violated("I9: a model is made of a share there is not");
  }

  for (std::size_t i = 0; i < ledger_.device_count(); ++i) {
    const Account& account = ledger_.account(static_cast<DeviceIndex>(i));
    const Sums& sum = sums[i];
    const std::string where = "device " + std::to_string(i);
    if (account.reserved != sum.reserved || account.resident != sum.resident ||
        account.draining != sum.draining || account.quarantined != sum.quarantined) {
      return violated("I1: the ledger differs from the entries on " + where);
    }
    if (pinned_[i] != sum.pinned || unloading_[i] != sum.unloading || loading_[i] != sum.loading) {
      return violated("I1: a sum over the entries is wrong on " + where);
    }
    if (account.budget != budgets_[i]) return violated("I1: two budgets for " + where);
    if (account.used() > account.budget + account.deficit ||
        account.deficit != saturating_sub(account.used(), account.budget)) {
      return violated("I2: over the budget of " + where);
    }
    if (loading_[i] > options_.load_channels_per_device) {
      return violated("I1: more loads than channels on " + where);
    }
  }
  return Done{};
}

}  // namespace modelyard

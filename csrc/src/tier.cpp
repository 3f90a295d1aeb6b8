#include <algorithm>
#include <cassert>
#include <optional>

#include "modelyard/yard.hpp"

// The host tier: which evicted models keep a copy of their weights in host memory, and which copy
// goes for another. Weights never change, so a model whose copy is there is dropped without a word;
// one whose copy is worth its room is copied on its way out. The tier is one more account of the
// ledger. The rules are in the comment of class Yard.

namespace modelyard {
namespace {

// While a model is on a device, its copy is worth a part of what it will be worth afterwards.
constexpr double kWorthWhileResident = 0.25;
// How much more than what is likely a copy's worth believes of a first load: while there is a copy
// nobody would find out that only the first load from files took so long.
constexpr double kNoMoreThanLikely = 1;

}  // namespace

// --- What a copy weighs and what it is worth

// All bytes of a model: what it holds, or what its copy does.
Bytes Yard::weight_of(const Entry& entry) const {
  const bool here = !entry.held.empty() || !entry.held_shares.empty();
  Bytes sum = std::min(here ? entry.held.total() : entry.copy.held.total(), Bytes{kMaxBytes});
  for (const ShareId id : here ? entry.held_shares : entry.copy.shares) {
    sum = saturating_add(sum, shares_.find(id)->bytes);
  }
  return sum;
}

double Yard::seconds_from_files(const Entry& entry, double believed) const {
  return prices_.file_seconds(entry.times, believed);
}

double Yard::seconds_from_copy(const Entry& entry) const {
  const double measured = entry.times.from_copy();
  if (measured > 0) return measured;
  return prices_.copy_seconds(weight_of(entry), entry.times.from_files(prices_.cached_share()));
}

// Something has been learned about a model's loads, or a copy has come or gone.
void Yard::reprice(Entry& entry) {
  const bool copied =
      entry.copy.state == CopyState::kMaking || entry.copy.state == CopyState::kKept;
  entry.reload_seconds =
      std::max(copied ? seconds_from_copy(entry) : seconds_from_files(entry), kLeastSeconds);
}

// What reloads take has been learned: models that were loaded once may be thought too dear. What is
// kept too long for it would never be loaded again, and nobody would find out.
void Yard::reprice_firsts() {
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    Entry* entry = entries_.at(i);
    if (entry != nullptr && entry->times.is_first()) reprice(*entry);
  }
}

// What a copy of a model that is leaving holds alone: as much as the last one, or what the model
// does. A copy that would hold more is not made, and then it is known.
Bytes Yard::own_of_copy(const Entry& entry) const {
  if (entry.copy_bytes > Bytes{0}) return entry.copy_bytes;
  return saturating_add(std::min(entry.held.total(), Bytes{kMaxBytes}), options_.copy_padding);
}

// What a copy of a model that is leaving needs on the tier beside what other copies hold there.
// What is being dropped is as good as gone.
Bytes Yard::room_for_copy(const Entry& entry) const {
  Bytes need = own_of_copy(entry);
  for (const ShareId id : entry.held_shares) {
    const Share& share = *shares_.find(id);
    if (share.on(tier_).staying() == 0) need = saturating_add(need, share.bytes);
  }
  return need;
}

Charge Yard::exclusive_of(const Copy& copy) const {
  Charge sum = copy.held;
  for (const ShareId id : copy.shares) {
    const Share& share = *shares_.find(id);
    if (share.on(tier_).total() > 1) continue;
    sum.set(tier_, saturating_add(sum.on(tier_), share.bytes));
  }
  return sum;
}

Bytes Yard::copy_exclusive(ModelId model) const {
  const Entry* entry = entries_.find(model);
  return entry == nullptr || tier_ == kNoDevice ? Bytes{} : exclusive_of(entry->copy).on(tier_);
}

// Seconds that a copy is expected to save at the next load; the more it costs to make it, the less
// there is in it.
double Yard::worth_of_copy(const Entry& entry) const {
  return seconds_from_files(entry, kNoMoreThanLikely) - seconds_from_copy(entry);
}

bool Yard::may_be_copied(const Entry& entry) const {
  if (tier_ == kNoDevice || entry.forgotten || entry.removed ||
      entry.copy.state != CopyState::kNone || entry.quarantined.on(tier_) > Bytes{0}) {
    return false;
  }
  bool above = true;
  touching(entry.held, entry.held_shares_on).for_each([&](DeviceIndex d, Bytes) {
    above = above && options_.above_tier[position(d)];
  });
  return above && worth_of_copy(entry) > prices_.keep_seconds(weight_of(entry));
}

// The copies that may be dropped. One from which a load reads is not among them; nor, unless there
// is no choice, one that somebody waits for, who will soon read from it.
std::vector<Resident> Yard::copies(bool wanted_too) const {
  std::vector<Resident> found;
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->copy.state != CopyState::kKept ||
        entry->state == State::kLoading || (entry->waiting_count > 0 && !wanted_too)) {
      continue;
    }
    const double share = entry->state == State::kResident ? kWorthWhileResident : 1;
    found.push_back({.entry = i,
                     .held = &entry->copy.held,
                     .reload_seconds = std::max(worth_of_copy(*entry) * share, kLeastSeconds),
                     .leased = false,
                     .shares = entry->copy.shares,
                     .shares_on = entry->copy.shares.empty() ? kNoDevice : tier_});
  }
  return found;
}

// --- A model leaves

// The last thing before a model's memory is given back: with a copy of it or without.
void Yard::send_unload(EntryIndex index, Actions& out) {
  Entry& entry = entry_at(index);
  if (may_be_copied(entry) && make_room_for_copy(index, out)) {
    entry.copy.state = CopyState::kAwaited;
    awaited_.push_back(index);
    resume_awaited(out);
  } else {
    out.push_back(Unload{entries_.id_at(index)});
  }
}

// Sees to it that the copy of a leaving model will fit, by dropping copies that are worth less.
// False, and nothing is touched, if that cannot be done or does not pay.
bool Yard::make_room_for_copy(EntryIndex index, Actions& out) {
  const Entry& entry = entry_at(index);
  const Bytes need = room_for_copy(entry);
  // What older ones wait for is theirs.
  Bytes wanted = need;
  for (const EntryIndex older : awaited_) wanted += room_for_copy(entry_at(older));
  const Account& account = ledger_.account(tier_);
  const Bytes coming = saturating_sub(unloading_[position(tier_)], account.deficit);
  const Bytes shortfall = saturating_sub(wanted, account.free() + coming);
  if (shortfall == Bytes{0}) return true;
  if (shortfall > need) return false;  // The older ones' room is not there either.

  Sharing sharing;
  sharing.table = &shares_;
  sharing.wanted = entry.held_shares;
  sharing.wanted_on = tier_;
  const std::optional<Plan> plan = plan_eviction(copies(false), Charge(tier_, shortfall), budgets_,
                                                 *policy_, request_clock_, sharing);
  if (!plan) return false;
  // It will not need its padding for good.
  const Bytes holds =
      entry.copy_bytes > Bytes{0} ? need : saturating_sub(need, options_.copy_padding);
  const double weight = static_cast<double>(std::max(holds, Bytes{1}).value) /
                        static_cast<double>(std::max(account.budget, Bytes{1}).value);
  const double score =
      policy_->score(Candidate{index, weight, worth_of_copy(entry)}, request_clock_);
  for (const Victim& victim : plan->victims) {
    if (victim.score >= score) return false;
  }
  for (const Victim& victim : plan->victims) {
    drop_copy(victim.entry, Cause{.why = Why::kModel, .model = entries_.id_at(index)}, victim.score,
              out);
  }
  return true;
}

// Sends off those who wait for room on the tier and have it now, in the order in which they came;
// and, without a copy, those who will not get it any more.
void Yard::resume_awaited(Actions& out) {
  Bytes kept{};  // For older ones that go on waiting.
  for (auto next = awaited_.begin(); next != awaited_.end();) {
    const EntryIndex index = *next;
    Entry& entry = entry_at(index);
    const Bytes need = room_for_copy(entry);
    const Account& account = ledger_.account(tier_);
    const Bytes coming = saturating_sub(unloading_[position(tier_)], account.deficit);
    if (entry.forgotten || need + kept > account.free() + coming) {
      entry.copy.state = CopyState::kNone;
      out.push_back(Unload{entries_.id_at(index)});
    } else if (need + kept <= account.free()) {
      begin_copy(index);
      out.push_back(Unload{entries_.id_at(index), true, entry.copy.held.on(tier_)});
    } else {
      kept += need;
      ++next;
      continue;
    }
    next = awaited_.erase(next);
  }
}

// --- A copy's way from state to state

void Yard::begin_copy(EntryIndex index) {
  Entry& entry = entry_at(index);
  Copy& copy = entry.copy;
  copy.held = Charge(tier_, own_of_copy(entry));
  [[maybe_unused]] const Status reserved = ledger_.reserve(copy.held);
  assert(reserved);
  copy.shares = entry.held_shares;
  refer(copy.shares);
  move_holders(copy.shares, std::nullopt, Holding::kLoading);
  copy.state = CopyState::kMaking;
  reprice(entry);
}

// The model's memory is back, and its copy has been made, or not.
void Yard::end_copy(EntryIndex index, const std::optional<Kept>& kept) {
  Entry& entry = entry_at(index);
  Copy& copy = entry.copy;
  if (kept) entry.copy_bytes = kept->bytes;
  if (!kept || !kept->made) {
    ledger_.cancel_reservation(copy.held);
    forget_copy(entry, Holding::kLoading, true);
    return;
  }
  const Charge actual(tier_, kept->bytes);
  ledger_.commit(copy.held, actual);
  copy.held = actual;
  move_holders(copy.shares, Holding::kLoading, Holding::kResident);
  copy.state = CopyState::kKept;
  ++counters_.copy_count;
  prices_.kept(std::chrono::duration<double>(std::max(kept->took, Duration{0})).count(),
               weight_of(entry));
  reprice(entry);
  explain(Decision::kCopyKept, entries_.id_at(index), Cause{.device = tier_}, 0,
          exclusive_of(copy).total());
}

void Yard::drop_copy(EntryIndex index, Cause cause, double score, Actions& out) {
  Entry& entry = entry_at(index);
  Copy& copy = entry.copy;
  cause.device = tier_;
  explain(Decision::kCopyDropped, entries_.id_at(index), cause, score, exclusive_of(copy).total());
  ledger_.begin_drain(copy.held);
  unloading_[position(tier_)] += copy.held.on(tier_);
  move_holders(copy.shares, Holding::kResident, Holding::kUnloading);
  copy.state = CopyState::kDropping;
  ++counters_.copy_drop_count;
  reprice(entry);
  out.push_back(DropCopy{entries_.id_at(index)});
}

// A copy has gone; `freed` of what it held alone is back, and the rest is quarantined.
void Yard::end_drop(EntryIndex index, const Charge& freed) {
  Entry& entry = entry_at(index);
  const Charge exclusive = exclusive_of(entry.copy);
  ledger_.finish_drain(exclusive, freed);
  if (entry.copy.in_use) {
    forget_copy(entry, Holding::kDraining, false);
  } else {
    unloading_[position(tier_)] -= entry.copy.held.on(tier_);
    forget_copy(entry, Holding::kUnloading, false);
  }
  const Charge missing = exclusive.saturating_minus(freed);
  if (missing.empty()) return;
  entry.quarantined = entry.quarantined.saturating_plus(missing);
  explain(Decision::kQuarantined, entries_.id_at(index), Cause{.device = tier_}, 0,
          missing.total());
}

// `charged` if the ledger is still to be told of its shares.
void Yard::forget_copy(Entry& entry, Holding from, bool charged) {
  move_holders(entry.copy.shares, from, std::nullopt, charged);
  unrefer(entry.copy.shares);
  entry.copy = Copy{};
  reprice(entry);
}

// Drops copies until the tier is within its budget again, those that are worth least first.
void Yard::tidy_tier(Actions& out) {
  if (tier_ == kNoDevice) return;
  const Account& account = ledger_.account(tier_);
  // What is in use repays nothing for now.
  const Bytes coming = unloading_[position(tier_)];
  const Bytes owed = std::min(saturating_sub(account.deficit, coming), Bytes{kMaxBytes});
  if (owed == Bytes{0}) return;
  Sharing sharing;
  sharing.table = &shares_;
  const std::vector<Resident> all = copies(true);
  const Bytes most = std::min(freed_by_all(all, sharing).on(tier_), owed);
  const std::optional<Plan> plan =
      plan_eviction(all, Charge(tier_, most), budgets_, *policy_, request_clock_, sharing);
  if (!plan) return;
  for (const Victim& victim : plan->victims) {
    drop_copy(victim.entry, Cause{.why = Why::kBudget}, victim.score, out);
  }
}

// --- Events

Status Yard::set_tier_budget(Bytes budget, Tick now, Actions& out) {
  if (tier_ == kNoDevice) return Error{ErrorCode::kWrongState, "there is no host tier"};
  if (!is_valid(budget)) return Error{ErrorCode::kInvalidArgument, "a budget out of range"};
  begin(now, out);
  ledger_.set_budget(tier_, budget);
  budgets_[position(tier_)] = budget;
  explain(Decision::kBudgetChanged, ModelId{}, Cause{.device = tier_}, 0, budget);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::copy_dropped(ModelId model, Tick now, Bytes freed, Actions& out) {
  const Entry* entry = entries_.find(model);
  if (entry == nullptr) return Error{ErrorCode::kStaleId, "the model is not known"};
  if (entry->copy.state != CopyState::kDropping) {
    return Error{ErrorCode::kWrongState, "copy_dropped does not fit a copy that is " +
                                             std::string(to_string(entry->copy.state))};
  }
  if (freed < Bytes{0} || freed > exclusive_of(entry->copy).on(tier_)) {
    return Error{ErrorCode::kInvalidArgument, "more bytes came back than were held"};
  }
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  end_drop(index, Charge(tier_, freed));
  if (entry->removed && entry->state == State::kCold) come_to_rest(index);
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::copy_in_use(ModelId model, Tick now, Actions& out) {
  Entry* entry = entries_.find(model);
  if (entry == nullptr) return Error{ErrorCode::kStaleId, "the model is not known"};
  Copy& copy = entry->copy;
  if (copy.state != CopyState::kDropping) {
    return Error{ErrorCode::kWrongState,
                 "copy_in_use does not fit a copy that is " + std::string(to_string(copy.state))};
  }
  begin(now, out);
  if (!copy.in_use) {
    copy.in_use = true;
    unloading_[position(tier_)] -= copy.held.on(tier_);
    move_holders(copy.shares, Holding::kUnloading, Holding::kDraining);
  }
  schedule(out);
  finish(out);
  return Done{};
}

Status Yard::copy_lost(ModelId model, Tick now, Actions& out) {
  const Entry* entry = entries_.find(model);
  if (entry == nullptr) return Error{ErrorCode::kStaleId, "the model is not known"};
  if (entry->copy.state != CopyState::kKept) {
    return Error{ErrorCode::kWrongState, "copy_lost does not fit a copy that is " +
                                             std::string(to_string(entry->copy.state))};
  }
  begin(now, out);
  const EntryIndex index = EntryTable::index_of(model);
  drop_copy(index, Cause{.why = Why::kLost}, 0, out);
  schedule(out);
  finish(out);
  return Done{};
}

}  // namespace modelyard

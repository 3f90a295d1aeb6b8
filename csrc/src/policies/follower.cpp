#include "policies/follower.hpp"

#include <algorithm>

namespace modelyard {

void Follower::add(const Footprints& footprints, EntryIndex entry) {
  if (places_.size() <= entry) places_.resize(entry + std::size_t{1}, kNowhere);
  if (holds(entry)) leave(footprints.of(entry), entry);
}

double Follower::access(const History& history, const Footprints& footprints, const Wish& wish,
                        const Shadow& leader, RequestClock now) {
  const Footprint& before = footprints.of(wish.entry);
  const bool there = holds(wish.entry);
  if (there && before.held == *wish.held) return 0;
  if (there) leave(before, wish.entry);
  const Charge need = missing_for(*wish.held, used_, footprints.budgets());
  if (!need.empty()) make_room(history, footprints, need, leader, now);
  if (missing_for(*wish.held, used_, footprints.budgets()).empty()) enter(wish);
  return there ? 0 : wish.reload_seconds;
}

void Follower::enter(const Wish& wish) {
  places_[wish.entry] = static_cast<std::uint32_t>(members_.size());
  members_.push_back(wish.entry);
  wish.held->for_each([&](DeviceIndex d, Bytes b) { used_[position(d)] += b.value; });
}

void Follower::leave(const Footprint& footprint, EntryIndex entry) {
  footprint.held.for_each([&](DeviceIndex d, Bytes b) { used_[position(d)] -= b.value; });
  const std::uint32_t place = places_[entry];
  members_[place] = members_.back();
  places_[members_.back()] = place;
  places_[entry] = kNowhere;
  members_.pop_back();
}

// Whoever the leader's shadow does not hold is enough: the shadow has room for the same model.
// Only what a lowered budget has left over there may keep others from it.
void Follower::make_room(const History& history, const Footprints& footprints, const Charge& need,
                         const Shadow& leader, RequestClock now) {
  leavers_.clear();
  Charge left = need;
  choose(history, footprints, need, left, leader, false, now);
  if (!left.empty()) choose(history, footprints, need, left, leader, true, now);
  if (!left.empty()) return;  // Not even all of them are enough.
  each_needed(leavers_, footprints, need,
              [&](const Leaving& each) { leave(footprints.of(each.entry), each.entry); });
}

// Adds to leavers_, the lowest worth first, of those that the leader has kept, or has not.
void Follower::choose(const History& history, const Footprints& footprints, const Charge& need,
                      Charge& left, const Shadow& leader, bool kept, RequestClock now) {
  heap_.clear();
  for (const EntryIndex entry : members_) {
    if (leader.holds(entry) != kept) continue;
    const Footprint& footprint = footprints.of(entry);
    const double weight = footprints.weight(footprint.held, need);
    if (weight <= 0) continue;
    heap_.push_back(
        {leader.expert().score(history, {entry, weight, footprint.reload_seconds}, now), entry});
  }
  std::make_heap(heap_.begin(), heap_.end(), goes_later);
  for (auto end = heap_.end(); !left.empty() && end != heap_.begin(); --end) {
    std::pop_heap(heap_.begin(), end, goes_later);
    const Leaving next = *(end - 1);
    const Charge& held = footprints.of(next.entry).held;
    if (!held.overlaps(left)) continue;
    left.reduce(held);
    leavers_.push_back(next);
  }
}

}  // namespace modelyard

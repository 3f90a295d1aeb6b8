#include "policies/shadow.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace modelyard {
namespace {

constexpr double kNotToLeave = std::numeric_limits<double>::infinity();

double power(double base, int exponent) {
  if (exponent == 0) return 1;
  return exponent == 1 ? base : base * base;
}

}  // namespace

Shadow::Shadow(const Shadow& other)
    : expert_(other.expert_->clone()),
      places_(other.places_),
      members_(other.members_),
      tops_(other.tops_),
      spans_(other.spans_),
      late_after_(other.late_after_),
      base_(other.base_),
      used_(other.used_),
      content_seconds_(other.content_seconds_) {}

void Shadow::add(const Footprints& footprints, EntryIndex entry) {
  if (places_.size() <= entry) places_.resize(entry + std::size_t{1}, kNowhere);
  if (holds(entry)) leave(footprints.of(entry), entry);
  expert_->on_add(entry);
}

double Shadow::access(const History& history, const Footprints& footprints, const Wish& wish,
                      RequestClock now) {
  expert_->on_request(history, {wish.entry, wish.weight, wish.reload_seconds}, now);
  if (history.base() != base_) reweigh(history, footprints);
  const Footprint& before = footprints.of(wish.entry);
  const bool there = holds(wish.entry);
  // Its size may have been learned since.
  if (there && before.held == *wish.held) {
    content_seconds_ += wish.reload_seconds - before.reload_seconds;
    set_curve(history, wish.entry, wish.weight, wish.reload_seconds);
    return 0;
  }
  if (there) leave(before, wish.entry);
  const Charge need = missing_for(*wish.held, used_, footprints.budgets());
  if (!need.empty()) make_room(history, footprints, need, now);
  // What is larger than a budget is nowhere, and costs its load each time.
  if (missing_for(*wish.held, used_, footprints.budgets()).empty()) enter(history, wish);
  return there ? 0 : wish.reload_seconds;
}

void Shadow::reweigh(const History& history, const Footprints& footprints) {
  base_ = history.base();
  for (const EntryIndex entry : members_) {
    const Footprint& footprint = footprints.of(entry);
    set_curve(history, entry, footprint.weight, footprint.reload_seconds);
  }
}

void Shadow::set_curve(const History& history, EntryIndex entry, double weight,
                       double reload_seconds) {
  if (!expert_->draws_curves()) return;
  const std::size_t place = places_[entry];
  const Curve curve = expert_->curve(history, entry, reload_seconds);
  tops_[place] = curve.top / power(weight, expert_->weight_power());
  spans_[place] = curve.span;
  late_after_[place] = curve.late_after;
}

void Shadow::enter(const History& history, const Wish& wish) {
  places_[wish.entry] = static_cast<std::uint32_t>(members_.size());
  members_.push_back(wish.entry);
  tops_.push_back(0);
  spans_.push_back(0);
  late_after_.push_back(0);
  set_curve(history, wish.entry, wish.weight, wish.reload_seconds);
  content_seconds_ += wish.reload_seconds;
  wish.held->for_each([&](DeviceIndex d, Bytes b) { used_[position(d)] += b.value; });
}

void Shadow::leave(const Footprint& footprint, EntryIndex entry) {
  footprint.held.for_each([&](DeviceIndex d, Bytes b) { used_[position(d)] -= b.value; });
  content_seconds_ -= footprint.reload_seconds;
  const std::size_t place = places_[entry];
  places_[members_.back()] = places_[entry];
  places_[entry] = kNowhere;
  members_[place] = members_.back();
  members_.pop_back();
  for (std::vector<double>* values : {&tops_, &spans_, &late_after_}) {
    (*values)[place] = values->back();
    values->pop_back();
  }
  if (members_.empty()) content_seconds_ = 0;  // What rounding has left.
}

// What each member is worth for what it holds where bytes are missing.
void Shadow::value_members(const Footprints& footprints, const Charge& need, RequestClock now) {
  worths_.resize(members_.size());
  const auto time = static_cast<double>(now);
  // A loop for each: without a branch inside they are done several members at a time.
  if (expert_->rises()) {
    for (std::size_t i = 0; i < worths_.size(); ++i) {
      worths_[i] = tops_[i] / (spans_[i] + std::abs(time - late_after_[i]));
    }
  } else {
    for (std::size_t i = 0; i < worths_.size(); ++i) {
      worths_[i] = tops_[i] / (spans_[i] + std::max(0.0, time - late_after_[i]));
    }
  }
  if (footprints.budgets().size() == 1) return;
  for (std::size_t i = 0; i < worths_.size(); ++i) {
    const Footprint& footprint = footprints.of(members_[i]);
    const double weight = footprints.weight(footprint.held, need);
    worths_[i] = weight <= 0
                     ? kNotToLeave
                     : worths_[i] * power(footprint.weight / weight, expert_->weight_power());
  }
}

// The same member by member, for an expert that draws no curves, and only for every step-th, from
// another one each time.
void Shadow::ask_expert(const History& history, const Footprints& footprints, const Charge& need,
                        RequestClock now, std::size_t step) {
  worths_.assign(members_.size(), kNotToLeave);
  for (std::size_t i = now % step; i < worths_.size(); i += step) {
    const Footprint& footprint = footprints.of(members_[i]);
    const double weight = footprints.weight(footprint.held, need);
    if (weight <= 0) continue;
    worths_[i] = expert_->score(history, {members_[i], weight, footprint.reload_seconds}, now);
  }
}

// The place of the lowest worth; among equals of the lowest entry, as in the planner.
std::size_t Shadow::least_worth() const {
  // Four minima side by side: each alone would wait for its last comparison.
  std::array<double, 4> lows{kNotToLeave, kNotToLeave, kNotToLeave, kNotToLeave};
  std::size_t i = 0;
  for (; i + lows.size() <= worths_.size(); i += lows.size()) {
    for (std::size_t k = 0; k < lows.size(); ++k) lows[k] = std::min(lows[k], worths_[i + k]);
  }
  double lowest = *std::min_element(lows.begin(), lows.end());
  for (; i < worths_.size(); ++i) lowest = std::min(lowest, worths_[i]);
  std::size_t best = worths_.size();
  if (lowest == kNotToLeave) return best;
  for (i = 0; i < worths_.size(); ++i) {
    if (worths_[i] == lowest && (best == worths_.size() || members_[i] < members_[best])) best = i;
  }
  return best;
}

// Fills leavers_, the lowest worth first, with those that hold something where bytes are missing
// when their turn comes. Most often one or two are enough, and found by reading worths_ again; a
// heap is made only after some more.
void Shadow::choose_leavers(const Footprints& footprints, const Charge& need) {
  constexpr int kReadings = 4;
  leavers_.clear();
  Charge left = need;
  const auto take = [&](Leaving next) {
    const Charge& held = footprints.of(next.entry).held;
    if (!held.overlaps(left)) return;
    left.reduce(held);
    leavers_.push_back(next);
  };
  for (int reading = 0; reading < kReadings && !left.empty(); ++reading) {
    const std::size_t place = least_worth();
    if (place == worths_.size()) break;
    take({worths_[place], members_[place]});
    worths_[place] = kNotToLeave;
  }
  if (!left.empty()) {
    heap_.clear();
    for (std::size_t i = 0; i < worths_.size(); ++i) {
      if (worths_[i] != kNotToLeave) heap_.push_back({worths_[i], members_[i]});
    }
    std::make_heap(heap_.begin(), heap_.end(), goes_later);
    for (auto end = heap_.end(); !left.empty() && end != heap_.begin(); --end) {
      std::pop_heap(heap_.begin(), end, goes_later);
      take(*(end - 1));
    }
  }
  if (!left.empty()) leavers_.clear();  // Not even all of them are enough.
}

// The lowest worth first, only where bytes are still missing; then gives back, the highest first,
// who turned out not to be needed.
void Shadow::make_room(const History& history, const Footprints& footprints, const Charge& need,
                       RequestClock now) {
  if (expert_->draws_curves()) {
    value_members(footprints, need, now);
    choose_leavers(footprints, need);
  } else {
    const std::size_t step = members_.size() / kMostAsked + 1;
    ask_expert(history, footprints, need, now, step);
    choose_leavers(footprints, need);
    if (leavers_.empty() && step > 1) {
      ask_expert(history, footprints, need, now, 1);
      choose_leavers(footprints, need);
    }
  }
  if (leavers_.empty()) return;
  double highest = 0;
  each_needed(leavers_, footprints, need, [&](const Leaving& each) {
    highest = std::max(highest, each.worth);
    leave(footprints.of(each.entry), each.entry);
  });
  expert_->on_evict(highest);
}

}  // namespace modelyard

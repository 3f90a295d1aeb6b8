#include <algorithm>
#include <optional>
#include <vector>

#include "modelyard/yard.hpp"
#include "pass.hpp"

// A device that is behind with its work gives a model away to one that is not. The rule is in the
// comment of class Yard.

namespace modelyard {

// Until when a model that waits is loaded only where it was given to. From when it has left,
// however long that took: it would be in vain otherwise, and the further behind the device is the
// longer that takes. A request with a deadline waits for half of what it can spare.
Tick Yard::kept_from_others_until(const Entry& entry) const {
  if (entry.meant_for == kNoDevice || entry.waiting_count == 0) return now_;
  const Ticket& oldest = *tickets_.find(entry.oldest);
  Duration patience = std::min(kMeantFor, options_.overdue_after);
  if (oldest.deadline != kNever) {
    const Duration spare = oldest.deadline - oldest.arrival - from_seconds(entry.reload_seconds);
    patience = std::clamp(spare / 2, Duration::zero(), patience);
  }
  return saturating_add(std::max(oldest.arrival, entry.rests_since), patience);
}

// A model that was given away goes where it was given to and not where most room is: that may be
// where it comes from, or another one that is behind as well. Unless it may not go there any more,
// or its requests have waited too long for that.
bool Yard::is_meant_for_another(const Entry& entry, const Charge& touched) const {
  if (entry.meant_for == kNoDevice || first_of(touched) == entry.meant_for) return false;
  if (entry.waiting_count > 0 && kept_from_others_until(entry) <= now_) return false;
  for (std::uint32_t p = 0; p < entry.placements.size(); ++p) {
    const Charge other = touching(entry.placements[p], shares_device(entry, p));
    if (first_of(other) == entry.meant_for && !is_closed(other)) return true;
  }
  return false;
}

// What will be asked of each device when those who were given to it have come.
std::vector<double> Yard::demands_after_relief() const {
  std::vector<double> found = demands();
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->meant_for == kNoDevice || entry->removed) continue;
    found[position(entry->meant_for)] += demand_of(*entry);
  }
  return found;
}

// The device that has been behind for long enough, and is the furthest so; kNoDevice if none is.
DeviceIndex Yard::look_who_is_behind() {
  DeviceIndex worst = kNoDevice;
  double most = 0;
  for (std::size_t i = 0; i < device_count(); ++i) {
    const auto device = static_cast<DeviceIndex>(i);
    const double backlog = backlog_seconds(device);
    const bool behind = backlog > kBehindSeconds && paces_[i].given() > kBehindRequests;
    if (!behind || closed_[i]) {
      behind_since_[i] = kNever;
      continue;
    }
    if (behind_since_[i] == kNever) behind_since_[i] = now_;
    if (saturating_add(behind_since_[i], kBehindFor) > now_ || backlog <= most) continue;
    worst = device;
    most = backlog;
  }
  return worst;
}

// How much of what is asked of a device would be asked of another one, for a second of loading, if
// it gave the model away for one of its placements. Zero if that would not help.
double Yard::worth_giving_away(const Entry& entry, std::uint32_t placement, DeviceIndex from,
                               std::span<const double> asked) const {
  const Charge there = touching(entry.placements[placement], shares_device(entry, placement));
  const DeviceIndex to = first_of(there);
  if (to == kNoDevice || there.on(from) > Bytes{0} || is_closed(there)) return 0;
  const double sooner = backlog_seconds(from) - backlog_seconds(to) - entry.reload_seconds;
  if (sooner < kReliefLeast) return 0;
  const double demand = demand_of(entry);
  const double gap = asked[position(from)] - asked[position(to)];
  if (gap < kReliefGap * asked[position(from)]) return 0;
  return std::min(demand, gap - demand) / std::max(entry.reload_seconds, kLeastSeconds);
}

// True if there is room for it now, or if idle models could make some: all of them free `idle`.
bool Yard::could_go_to(const Entry& entry, std::uint32_t placement, const Pass& pass,
                       const Charge& idle) const {
  const Need need = pass.unclaimed(need_of(entry, placement));
  return pass.reach(need) != Pass::Reach::kNot || pass.shortfall(need, true).fits_within(idle);
}

void Yard::relieve(Actions& out) {
  if (now_ < relieve_at_) return;
  relieve_at_ = saturating_add(now_, kReliefEvery);
  const DeviceIndex from = look_who_is_behind();
  if (from == kNoDevice) return;

  const std::vector<double> asked = demands_after_relief();
  const Pass pass = make_pass();
  // Summed up once: a plan for each of many models would look at all idle ones each time.
  Sharing sharing;
  if (shares_.size() > 0) sharing.table = &shares_;
  sharing.count_leaving = true;
  const Charge idle = freed_by_all(residents(std::nullopt), sharing);
  EntryIndex chosen{0};
  DeviceIndex to = kNoDevice;
  double best = 0;
  for (EntryIndex i = 0; i < entries_.slot_count(); ++i) {
    const Entry* entry = entries_.at(i);
    if (entry == nullptr || entry->state != State::kResident || entry->pinned) continue;
    // Who is on several devices would take work off all of them, and those that last stay long.
    const Charge here = touching(entry->held, entry->held_shares_on);
    if (here.on(from) == Bytes{0} || here.on(from) != here.total()) continue;
    if (entry->aside_count > 0) continue;
    if (worked_at(*entry, kWorkedForOverdue) > now_) continue;
    for (std::uint32_t p = 0; p < entry->placements.size(); ++p) {
      const double worth = worth_giving_away(*entry, p, from, asked);
      if (worth <= 0 || worth < best) continue;
      const DeviceIndex there = first_of(touching(entry->placements[p], shares_device(*entry, p)));
      // Where one is as good as another for that: the one that is asked for least.
      if (worth == best && asked[position(there)] >= asked[position(to)]) continue;
      if (!could_go_to(*entry, p, pass, idle)) continue;
      chosen = i;
      to = there;
      best = worth;
    }
  }
  if (best <= 0) return;
  Entry& entry = entry_at(chosen);
  entry.meant_for = to;
  // It serves what it has before it leaves; what it has brought shows after that.
  behind_since_[position(from)] =
      saturating_add(now_, from_seconds(backlog_seconds(from) + entry.reload_seconds));
  send_away(chosen, Cause{.why = Why::kDeviceBehind, .device = from}, out);
}

}  // namespace modelyard

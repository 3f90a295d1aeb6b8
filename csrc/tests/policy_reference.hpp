#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "modelyard/policy.hpp"
#include "policies/expert.hpp"

namespace modelyard::test {

/// What policies know of requests, the slow way: every request there was.
class SlowHistory {
 public:
  void add(EntryIndex entry) { times_[entry].clear(); }
  void copy(EntryIndex entry, EntryIndex from) { times_[entry] = times_[from]; }
  void request(EntryIndex entry, RequestClock now) { times_[entry].push_back(now); }

  [[nodiscard]] const std::vector<RequestClock>& times(EntryIndex entry) const {
    return times_.at(entry);
  }
  /// facts on eviction, section 5: K = min(4, count - 1), span = last - the K-th request before it,
  /// K / (span + max(0, (now - last) - span / K)); below two requests 0.3 / (age + 1).
  [[nodiscard]] double gap_rate(EntryIndex entry, RequestClock now) const {
    const std::vector<RequestClock>& all = times(entry);
    const RequestClock last = all.empty() ? 0 : all.back();
    const auto age = static_cast<double>(now - last);
    if (all.size() < 2) return 0.3 / (age + 1);
    const std::size_t k = std::min<std::size_t>(4, all.size() - 1);
    const auto span = static_cast<double>(last - all[all.size() - 1 - k]);
    const auto gaps = static_cast<double>(k);
    return gaps / (span + std::max(0.0, age - span / gaps));
  }
  [[nodiscard]] double count(EntryIndex entry, double half_life, RequestClock now) const {
    double sum = 0;
    for (const RequestClock time : times(entry)) {
      sum += std::exp2(-static_cast<double>(now - time) / half_life);
    }
    return sum;
  }
  [[nodiscard]] double decayed_rate(EntryIndex entry, double half_life, RequestClock now) const {
    return std::log(2.0) / half_life * count(entry, half_life, now);
  }

 private:
  std::map<EntryIndex, std::vector<RequestClock>> times_;
};

/// A shadow cache, the slow way: everybody is scored and sorted whenever room is needed.
class SlowShadow {
 public:
  explicit SlowShadow(std::unique_ptr<Expert> expert) : expert_(std::move(expert)) {}

  void add(EntryIndex entry) {
    members_.erase(entry);
    expert_->on_add(entry);
  }
  double access(const History& history, const Wish& wish, std::span<const Bytes> budgets,
                RequestClock now) {
    expert_->on_request(history, {wish.entry, wish.weight, wish.reload_seconds}, now);
    const auto found = members_.find(wish.entry);
    const bool there = found != members_.end();
    if (there && found->second.held == *wish.held) {
      found->second.reload_seconds = wish.reload_seconds;
      return 0;
    }
    if (there) members_.erase(found);
    make_room(history, *wish.held, budgets, now);
    bool fits = true;
    for (std::size_t d = 0; d < budgets.size(); ++d)
      fits = fits && over(*wish.held, budgets, d) <= 0;
    if (fits) members_[wish.entry] = {*wish.held, wish.reload_seconds};
    return there ? 0 : wish.reload_seconds;
  }
  [[nodiscard]] bool holds(EntryIndex entry) const { return members_.contains(entry); }
  [[nodiscard]] std::size_t size() const { return members_.size(); }
  [[nodiscard]] double content_seconds() const {
    double sum = 0;
    for (const auto& [entry, member] : members_) sum += member.reload_seconds;
    return sum;
  }

 private:
  struct Member {
    Charge held;
    double reload_seconds{0};
  };

  [[nodiscard]] std::int64_t over(const Charge& wanted, std::span<const Bytes> budgets,
                                  std::size_t d) const {
    const auto device = static_cast<DeviceIndex>(d);
    std::int64_t used = wanted.on(device).value;
    for (const auto& [entry, member] : members_) used += member.held.on(device).value;
    return used - budgets[d].value;
  }

  void make_room(const History& history, const Charge& wanted, std::span<const Bytes> budgets,
                 RequestClock now) {
    std::array<std::int64_t, kMaxDevices> need{};
    for (std::size_t d = 0; d < budgets.size(); ++d) {
      need[d] = std::max<std::int64_t>(0, over(wanted, budgets, d));
    }
    const auto useful = [&](const Charge& held, const auto& short_of) {
      bool any = false;
      for (std::size_t d = 0; d < budgets.size(); ++d) {
        any = any || (short_of[d] > 0 && held.on(static_cast<DeviceIndex>(d)).value > 0);
      }
      return any;
    };
    std::vector<std::pair<double, EntryIndex>> order;
    for (const auto& [entry, member] : members_) {
      if (!useful(member.held, need)) continue;
      double weight = 0;
      for (std::size_t d = 0; d < budgets.size(); ++d) {
        if (need[d] == 0) continue;
        weight += static_cast<double>(member.held.on(static_cast<DeviceIndex>(d)).value) /
                  static_cast<double>(std::max<std::int64_t>(budgets[d].value, 1));
      }
      order.emplace_back(expert_->score(history, {entry, weight, member.reload_seconds}, now),
                         entry);
    }
    std::sort(order.begin(), order.end());
    std::vector<std::pair<double, EntryIndex>> chosen;
    std::array<std::int64_t, kMaxDevices> left = need;
    for (const auto& each : order) {
      const Charge& held = members_[each.second].held;
      if (!useful(held, left)) continue;
      for (std::size_t d = 0; d < budgets.size(); ++d) {
        left[d] -= held.on(static_cast<DeviceIndex>(d)).value;
      }
      chosen.push_back(each);
    }
    for (std::size_t d = 0; d < budgets.size(); ++d) {
      if (left[d] > 0) return;
    }
    double highest = 0;
    bool any = false;
    for (std::size_t i = chosen.size(); i-- > 0;) {
      const Charge held = members_[chosen[i].second].held;
      // Would the others do?
      bool others_do = true;
      for (std::size_t d = 0; d < budgets.size(); ++d) {
        if (need[d] == 0) continue;
        others_do = others_do && left[d] + held.on(static_cast<DeviceIndex>(d)).value <= 0;
      }
      if (others_do) {
        for (std::size_t d = 0; d < budgets.size(); ++d) {
          left[d] += held.on(static_cast<DeviceIndex>(d)).value;
        }
        continue;
      }
      highest = std::max(highest, chosen[i].first);
      any = true;
      members_.erase(chosen[i].second);
    }
    if (any) expert_->on_evict(highest);
  }

  std::unique_ptr<Expert> expert_;
  std::map<EntryIndex, Member> members_;
};

}  // namespace modelyard::test

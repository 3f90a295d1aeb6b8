#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "state_referee.hpp"

namespace modelyard::test {

/// What must happen happens, and no more than that:
///   - a deficit is made or widened by news only (I2), and is being repaid by whoever can repay it;
///   - victims of the only waiting model are a complete and minimal set (I7), where a share comes
///   back with the last of its holders only;
///   - a model whose memory is lost leaves, also a pinned one;
///   - one that a device gave away has another place to go to, and is left waiting only for that,
///   and not for longer than a request may wait before it is overdue;
///   - the only waiting model is not left waiting while it fits, or while idle models could make
///   room, and nobody is left waiting for what will not come;
///   - deadlines are kept, wakes are asked for.
class ProgressReferee : protected StateReferee {
 protected:
  using StateReferee::StateReferee;

  [[nodiscard]] Verdict check_deficits(const Event& event, const std::vector<Bytes>& before) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (deficits_[where] <= before[where]) continue;
      if (event.kind != EventKind::kLoadDone && event.kind != EventKind::kRemeasured &&
          event.kind != EventKind::kSetBudget) {
        return "the deficit of device " + std::to_string(where) + " grew without a reason";
      }
    }
    return std::nullopt;
  }

  // Whoever could still give back bytes of a deficit that leavers do not cover is asked to leave.
  [[nodiscard]] Verdict check_repayment() const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      const std::int64_t back = leaving(where);
      if (deficits_[where].value <= back) continue;
      const auto may_go = [](ModelId, const Model& model) {
        return model.phase == Phase::kResident && !model.pinned;
      };
      const std::int64_t most = supposing(
          may_go, Phase::kUnloading, [&](const Books& without) { return without.leaving(where); });
      if (most > back) return "nobody repays the deficit of device " + std::to_string(where);
    }
    return std::nullopt;
  }

  // A model whose memory is gone does not stay.
  [[nodiscard]] Verdict check_lost(const Event& event, const Outcome& outcome) const {
    if (event.kind != EventKind::kLost || outcome.error) return std::nullopt;
    const auto found = models_.find(event.model);
    return unless(found == models_.end() || found->second.phase == Phase::kDraining ||
                      found->second.phase == Phase::kUnloading,
                  "a model that was lost stays");
  }

  [[nodiscard]] Verdict check_times(const Event& event) const {
    if (event.kind == EventKind::kTick && wake_at_ <= now_) return "asks to be woken in the past";
    for (const auto& [id, ticket] : tickets_) {
      if (ticket.second < wake_at_) return "nobody is woken for a deadline";
      if (event.kind == EventKind::kTick && ticket.second <= now_) return "a deadline was missed";
    }
    return std::nullopt;
  }

  [[nodiscard]] Verdict check_no_hopeless_waiter() const {
    for (const auto& [id, model] : models_) {
      if (model.waiting.empty() || model.phase != Phase::kAway) continue;
      // What pinned models hold of it already it need not bring, so it may be larger than a budget.
      if (!exhausted(model, false) || !exhausted(model, true)) continue;
      return describe(id) + (never_fits(model) ? " waits and can never fit"
                                               : " waits for bytes that nobody will give back");
    }
    return std::nullopt;
  }

  // With one waiting model there are no claims of others to weigh, so what must happen is plain.
  [[nodiscard]] Verdict check_progress(const Yard& yard) const {
    if (waiting_models() != 1) return std::nullopt;
    const auto found = std::find_if(models_.begin(), models_.end(),
                                    [](const auto& item) { return !item.second.waiting.empty(); });
    const Model& model = found->second;
    if (model.phase != Phase::kAway) return std::nullopt;
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (!open_for_load(model, p) || is_meant_for_another(found->first, model, p)) continue;
      bool fits = everywhere(need_now(model, p), [&](std::size_t where, std::int64_t bytes) {
        return bytes <= room(where);
      });
      for (std::size_t where = 0; where < budgets_.size(); ++where) {
        // A deficit is repaid first, also by a share that could be taken over.
        fits = fits && (!touches(model, p, where) || deficits_[where] == Bytes{0});
      }
      if (fits) return describe(found->first) + " waits though it fits";
      if (fits_later(model, p)) return std::nullopt;
    }
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (waits_for_channel(model, p)) return std::nullopt;
    }
    const auto idle = [](ModelId, const Model& each) {
      return each.phase == Phase::kResident && each.leases.empty() && !each.pinned;
    };
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      if (!open_for_load(model, p) || is_meant_for_another(found->first, model, p)) continue;
      if (is_backed_up(yard, found->first, model, p)) continue;
      const bool could_be_made = supposing(idle, Phase::kUnloading, [&](const Books& without) {
        return without.fits_later(model, p);
      });
      if (could_be_made) return describe(found->first) + " waits though idle models could go";
    }
    return std::nullopt;
  }

  // Whom a device has given away in this call, if the yard counts one more: the only model that it
  // says is meant for a device and that was not known to. A load makes that be forgotten.
  [[nodiscard]] Verdict note_given_away(const Yard& yard) {
    std::erase_if(given_away_, [&](const auto& item) {
      const auto found = models_.find(item.first);
      return found == models_.end() || found->second.phase == Phase::kLoading;
    });
    for (auto& [id, given] : given_away_) {
      if (!given.gone_at && models_.at(id).phase == Phase::kAway) given.gone_at = now_;
    }
    const std::uint64_t count = yard.departures().count(Why::kDeviceBehind);
    if (count == given_away_count_) return std::nullopt;
    if (count != ++given_away_count_) return "more than one model was given away at once";
    for (const auto& [id, model] : models_) {
      const Entry* entry = yard.entry(id);
      if (entry == nullptr || entry->meant_for == kNoDevice || given_away_.contains(id)) continue;
      given_away_[id] = GivenAway{.to = position(entry->meant_for)};
      if (model.phase == Phase::kAway) return describe(id) + " was not there and was given away";
      if (model.pinned) return describe(id) + " is pinned and was given away";
      if (model.phase != Phase::kDraining && model.phase != Phase::kUnloading) {
        return describe(id) + " was given away and stays";
      }
      // Where it is now: it may have held nothing when it was loaded, and has no home then.
      DeviceIndex from = model.held_shares_on;
      model.held.for_each([&](DeviceIndex device, Bytes) { from = device; });
      if (yard.work_seconds(from) <= kBehindSeconds) return "its device is not behind";
      return unless(from != entry->meant_for && may_be_on(model, position(entry->meant_for)),
                    describe(id) + " was given away to where it may not be");
    }
    return "nobody was given away";
  }

  // Reads the decisions of this call. If nothing else went on, the victims must be a set that makes
  // the one waiting model fit, and none of them can be left out: either with what leaves when its
  // requests have ended, or, for one that will not wait for those, without it.
  [[nodiscard]] Verdict check_victims(const Yard& yard, bool quiet) {
    std::map<ModelId, std::vector<ModelId>> victims;
    const auto& log = yard.explanations().entries();
    const std::uint64_t last = explained_;
    for (auto entry = log.rbegin(); entry != log.rend() && entry->sequence > last; ++entry) {
      const Explanation& each = *entry;
      explained_ = std::max(explained_, each.sequence);
      if (each.decision != Decision::kEvicted && each.decision != Decision::kDrained) continue;
      if (each.cause == ModelId{}) continue;
      if (models_.contains(each.model)) victims[each.cause].push_back(each.model);
    }
    if (!quiet) return std::nullopt;
    for (const auto& item : victims) {
      const auto cause = models_.find(item.first);
      if (cause == models_.end() || cause->second.phase != Phase::kAway) continue;
      bool good = false;
      for (std::size_t p = 0; p < cause->second.placements.size(); ++p) {
        good = good || complete_and_minimal(item.second, cause->second, p, true) ||
               complete_and_minimal(item.second, cause->second, p, false);
      }
      if (!good) return "the victims for " + describe(item.first) + " are too few or too many";
    }
    return std::nullopt;
  }

 private:
  struct GivenAway {
    std::size_t to{0};
    std::optional<Tick> gone_at{};
  };

  // The first device that a placement touches.
  [[nodiscard]] std::size_t home_of(const Model& model, std::size_t placement) const {
    std::size_t where = 0;
    while (where < budgets_.size() && !touches(model, placement, where)) ++where;
    return where;
  }

  // On open devices of which this is the first.
  [[nodiscard]] bool may_be_on(const Model& model, std::size_t first) const {
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      bool open = home_of(model, p) == first;
      for (std::size_t where = 0; where < budgets_.size(); ++where) {
        open = open && !(touches(model, p, where) && closed_[where]);
      }
      if (open) return true;
    }
    return false;
  }

  // It was given to another device and may be kept waiting for that.
  [[nodiscard]] bool is_meant_for_another(ModelId id, const Model& model,
                                          std::size_t placement) const {
    const auto found = given_away_.find(id);
    if (found == given_away_.end() || !found->second.gone_at) return false;
    const Tick since = std::max(came_.at(model.waiting.front()).at, *found->second.gone_at);
    return home_of(model, placement) != found->second.to && may_be_on(model, found->second.to) &&
           (now_ - since < std::min(kMeantFor, options_.overdue_after) ||
            wake_at_ <= now_);  // A tick is asked for then.
  }

  // Nobody leaves for a model whose device is behind with its work by more than a load takes.
  [[nodiscard]] bool is_backed_up(const Yard& yard, ModelId id, const Model& model,
                                  std::size_t placement) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      const double least = yard.entry(id)->reload_seconds + kPressureSlack;
      const Came& oldest = came_.at(model.waiting.front());
      // What the device had to do when it came gets less with time; a tick is asked for then.
      const double ahead = oldest.ahead[where] - seconds_of(now_ - oldest.at);
      return (ahead > least || wake_at_ <= now_) &&
             yard.work_seconds(static_cast<DeviceIndex>(where)) > least;
    }
    return false;
  }

  // It will be loaded there as soon as another load has ended: nobody leaves for it elsewhere.
  [[nodiscard]] bool waits_for_channel(const Model& model, std::size_t placement) const {
    bool busy = false;
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      if (closed_[where]) return false;
      busy = busy || loads_on(where) >= options_.load_channels_per_device;
    }
    return busy && fits_soon(model, placement);
  }

  [[nodiscard]] bool open_for_load(const Model& model, std::size_t placement) const {
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      if (!touches(model, placement, where)) continue;
      if (closed_[where] || loads_on(where) >= options_.load_channels_per_device) return false;
    }
    return true;
  }

  // The victims, who are on their way out, make a model fit, and would not if one of them stayed.
  [[nodiscard]] bool complete_and_minimal(const std::vector<ModelId>& victims, const Model& model,
                                          std::size_t placement, bool with_leaving) const {
    const auto covers = [&](const Books& books) {
      return with_leaving ? books.fits_later(model, placement) : books.fits_soon(model, placement);
    };
    const auto needless = [&](ModelId spared) {
      return supposing([&](ModelId id, const Model&) { return id == spared; }, Phase::kResident,
                       covers);
    };
    return covers(*this) && std::none_of(victims.begin(), victims.end(), needless);
  }

  std::uint64_t explained_{0};
  std::uint64_t given_away_count_{0};
  std::map<ModelId, GivenAway> given_away_;  // Until they are loaded.
};

}  // namespace modelyard::test

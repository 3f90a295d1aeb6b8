#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "referee.hpp"

namespace modelyard::test {

/// Draws from a seeded generator; the same on every machine.
class SeededSource {
 public:
  explicit SeededSource(std::uint32_t seed) : random_(seed) {}
  [[nodiscard]] std::uint32_t below(std::uint32_t n) {
    return static_cast<std::uint32_t>(random_() % n);
  }

 private:
  std::mt19937 random_;
};

/// Draws from a fuzzer's bytes, and zero when they are used up.
class ByteSource {
 public:
  ByteSource(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  [[nodiscard]] bool empty() const { return left_ == 0; }
  [[nodiscard]] std::uint32_t below(std::uint32_t n) {
    std::uint32_t value = next();
    if (n > 256) value = value << 8 | next();
    return value % n;
  }

 private:
  std::uint32_t next() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }

  const std::uint8_t* data_;
  std::size_t left_;
};

template <typename Source>
YardOptions draw_options(Source& source) {
  YardOptions drawn;
  const std::uint32_t devices = 1 + source.below(4);
  for (std::uint32_t i = 0; i < devices; ++i) {
    drawn.budgets.push_back(Bytes{60 + static_cast<std::int64_t>(source.below(80))});
  }
  const auto policies = policy_names();
  drawn.policy = policies[source.below(static_cast<std::uint32_t>(policies.size()))];
  drawn.max_waiting_per_model = 1 + source.below(6);
  drawn.max_waiting = 1 + source.below(16);
  drawn.load_channels_per_device = 1 + source.below(3);
  drawn.overdue_after = seconds{1 + source.below(40)};
  drawn.backoff_max = seconds{1 + source.below(30)};
  drawn.explain_capacity = 64;
  if (source.below(3) != 0) {
    drawn.tier_budget = Bytes{30 + static_cast<std::int64_t>(source.below(80))};
    drawn.copy_padding = Bytes{source.below(3) == 0 ? 1 + source.below(9) : 0};
    for (std::uint32_t i = 0; i < devices; ++i) drawn.above_tier.push_back(source.below(5) != 0);
  }
  return drawn;
}

/// Makes events that mostly make sense: loads and unloads that run come to an end, leases are
/// released, tickets cancelled, time passes. Some do not make sense on purpose: stale ids, wrong
/// states, bad charges, a clock that runs backwards.
template <typename Source>
class EventMaker {
 public:
  /// `about_copies`: everything comes back in the end, so that more copies are made, and those that
  /// are dropped are in use more often and for longer.
  EventMaker(Source& source, std::uint32_t most_models, bool about_copies = false)
      : source_(source), most_models_(most_models), about_copies_(about_copies) {}

  [[nodiscard]] Event next(const Referee& referee) {
    Event event;
    pass_time(referee);
    event.now = now_;
    const std::uint32_t draw = source_.below(113);
    if (referee.models().empty() || draw < 3) return add(event, referee);
    if (draw < 30) return request(event, referee);
    if (draw < 38) {
      if (source_.below(3) == 0) event.deadline = now_ + seconds{source_.below(20)};
      return of(event, EventKind::kTryAcquire, any_model(referee));
    }
    if (draw < 54) return release(event, referee);
    if (draw < 58) return cancel(event, referee);
    if (draw < 78) return end_io(event, referee);
    if (draw < 82) return of(event, EventKind::kTick, ModelId{});
    if (draw < 84) return of(event, EventKind::kPin, any_model(referee));
    if (draw < 87) return of(event, EventKind::kUnpin, any_model(referee));
    if (draw < 89) return of(event, EventKind::kUnload, any_model(referee));
    if (draw < 91) return set_budget(event, referee);
    if (draw < 93) return set_closed(event, referee);
    if (draw < 94) return of(event, EventKind::kRemoveModel, any_model(referee));
    if (draw < 95) return update(event, referee);
    if (draw < 97) return remeasure(event, referee);
    if (draw < 98) return reclaim(event, referee);
    if (draw < 100) return nonsense(event, referee);
    if (draw < 102) return add_share(event, referee);
    if (draw < 104) return split_share(event, referee);
    if (draw < 105) return forget_share(event, referee);
    if (draw < 108) return lose(event, referee);
    if (draw < 110) return set_tier_budget(event, referee);
    if (draw < 111) return of(event, EventKind::kForgive, any_model(referee));
    return lose_copy(event, referee);
  }

 private:
  using Phase = Referee::Phase;
  using CopyPhase = Referee::CopyPhase;

  static Event of(Event event, EventKind kind, ModelId model) {
    event.kind = kind;
    event.model = model;
    return event;
  }

  void pass_time(const Referee& referee) {
    switch (source_.below(16)) {
      case 0:
        now_ += seconds{source_.below(12)};
        break;
      case 1:
        if (referee.wake_at() != kNever && referee.wake_at() > now_) now_ = referee.wake_at();
        break;
      case 2:
      case 3:
      case 4:
        now_ += milliseconds{source_.below(900)};
        break;
      case 5:
        if (source_.below(8) == 0) now_ -= seconds{source_.below(5)};
        break;
      default:
        break;
    }
  }

  template <typename Map>
  [[nodiscard]] auto pick(const Map& from) {
    return std::next(from.begin(), source_.below(static_cast<std::uint32_t>(from.size())));
  }
  [[nodiscard]] ModelId any_model(const Referee& referee) { return pick(referee.models())->first; }

  [[nodiscard]] Charge draw_charge(const Referee& referee, std::uint32_t most) {
    Charge drawn;
    const auto devices = static_cast<std::uint32_t>(referee.device_count());
    const std::uint32_t parts = 1 + source_.below(2);
    for (std::uint32_t i = 0; i < parts; ++i) {
      drawn.set(device(source_.below(devices)), Bytes{source_.below(most)});
    }
    return drawn;
  }
  // Often some of the shares there are, on one device for each placement. Own bytes are then few,
  // or none: a fine-tune, or the same model once more.
  void draw_shares(ModelSpec& spec, const Referee& referee) {
    if (referee.shares().empty() || source_.below(3) == 0) return;
    for (const auto& [id, share] : referee.shares()) {
      if (source_.below(2) == 0) spec.shares.push_back(id);
    }
    if (source_.below(12) == 0) return;
    const auto devices = static_cast<std::uint32_t>(referee.device_count());
    for (Charge& placement : spec.placements) {
      const DeviceIndex on = device(source_.below(2) == 0 ? 0 : source_.below(devices));
      spec.shares_on.push_back(source_.below(6) == 0 ? kNoDevice : on);
      if (source_.below(3) != 0) placement = Charge(on, Bytes{source_.below(3) * 7});
    }
  }
  [[nodiscard]] std::vector<Charge> draw_placements(const Referee& referee) {
    std::vector<Charge> drawn;
    const std::uint32_t count = source_.below(3) == 0 ? 1 + source_.below(3) : 1;
    for (std::uint32_t i = 0; i < count; ++i) {
      drawn.push_back(draw_charge(referee, source_.below(20) == 0 ? 200 : 75));
    }
    return drawn;
  }
  // Mostly the very charge, sometimes a little less or more on some devices.
  [[nodiscard]] Charge near(const Charge& held, const Referee& referee) {
    Charge drawn = held;
    if (source_.below(4) != 0) return drawn;
    for (std::uint32_t i = 0; i < referee.device_count(); ++i) {
      if (source_.below(3) != 0) continue;
      const std::int64_t change = static_cast<std::int64_t>(source_.below(41)) - 25;
      drawn.set(device(i), Bytes{std::max<std::int64_t>(0, held.on(device(i)).value + change)});
    }
    return drawn;
  }
  [[nodiscard]] Charge part_of(const Charge& held) {
    Charge drawn = held;
    if (about_copies_ || source_.below(6) != 0) return drawn;
    held.for_each([&](DeviceIndex at, Bytes bytes) {
      drawn.set(at, Bytes{source_.below(static_cast<std::uint32_t>(bytes.value) + 1)});
    });
    return drawn;
  }

  [[nodiscard]] Event add(Event event, const Referee& referee) {
    if (referee.models().size() >= most_models_) return request(event, referee);
    event.kind = EventKind::kAddModel;
    event.spec.placements = draw_placements(referee);
    event.spec.reload_seconds = 0.1 * (1 + source_.below(100));
    draw_shares(event.spec, referee);
    if (!referee.models().empty() && source_.below(4) == 0) {
      event.spec.replaces = any_model(referee);
    }
    return event;
  }
  [[nodiscard]] Event request(Event event, const Referee& referee) {
    event = of(event, EventKind::kRequest, any_model(referee));
    if (source_.below(3) == 0) event.deadline = now_ + seconds{source_.below(50)} - seconds{1};
    return event;
  }
  [[nodiscard]] Event release(Event event, const Referee& referee) {
    if (referee.leases().empty()) return end_io(event, referee);
    event.kind = EventKind::kRelease;
    event.lease = pick(referee.leases())->first;
    return event;
  }
  [[nodiscard]] Event cancel(Event event, const Referee& referee) {
    if (referee.tickets().empty()) return request(event, referee);
    event.kind = EventKind::kCancel;
    event.ticket = pick(referee.tickets())->first;
    return event;
  }
  [[nodiscard]] Event end_io(Event event, const Referee& referee) {
    std::vector<ModelId> running;
    std::vector<ModelId> dropping;
    bool any_held_back = false;
    for (const auto& [id, model] : referee.models()) {
      const bool held_back = model.copy.phase == CopyPhase::kAwaited;
      any_held_back = any_held_back || held_back;
      if (model.phase == Phase::kLoading || (model.phase == Phase::kUnloading && !held_back)) {
        running.push_back(id);
      }
      const bool over =
          model.copy.phase == CopyPhase::kInUse && source_.below(about_copies_ ? 30 : 6) == 0;
      if (model.copy.phase == CopyPhase::kDropping || over) dropping.push_back(id);
    }
    // Often where something waits for it: that is what ends seldom by itself.
    if (!dropping.empty() && (any_held_back ? source_.below(5) != 0 : source_.below(2) == 0)) {
      event.model = dropping[source_.below(static_cast<std::uint32_t>(dropping.size()))];
      const bool often = about_copies_ && any_held_back;
      if (source_.below(often ? 2 : about_copies_ ? 3 : 6) == 0) {
        event.kind = EventKind::kCopyInUse;
        return event;
      }
      event.kind = EventKind::kCopyDropped;
      event.budget = referee.copy_exclusive(event.model);
      if (!about_copies_ && source_.below(5) == 0) {
        event.budget = Bytes{source_.below(static_cast<std::uint32_t>(event.budget.value) + 1)};
      }
      return event;
    }
    if (running.empty()) return request(event, referee);
    event.model = running[source_.below(static_cast<std::uint32_t>(running.size()))];
    const Referee::Model& model = referee.models().at(event.model);
    if (model.phase == Phase::kUnloading) {
      event.kind = EventKind::kUnloadDone;
      event.charge = part_of(referee.exclusive(event.model));
      if (model.copy.phase == CopyPhase::kMaking && source_.below(6) != 0) keep(event, model);
    } else if (source_.below(6) == 0 || model.stopping) {
      event.kind = EventKind::kLoadFailed;
      event.failure = static_cast<LoadFailure>(model.stopping ? 2 : source_.below(3));
    } else {
      event.kind = EventKind::kLoadDone;
      event.charge = near(model.held, referee);
      const std::uint32_t took_ms = source_.below(5000);
      // What only a first load does may take longer than all the rest.
      const bool is_long = !referee.was_loaded(event.model) && took_ms % 10 == 0;
      event.took = milliseconds{is_long ? 20 * took_ms : took_ms};
      const bool copied = model.copy.phase == CopyPhase::kKept && source_.below(4) != 0;
      event.source =
          copied ? modelyard::Source::kCopy
                 : static_cast<modelyard::Source>(source_.below(24) == 0 ? 2 : source_.below(2));
      if (copied) event.took /= 16;
    }
    return event;
  }
  // Mostly what was reserved, sometimes less; or more, and then none is made. Now and then it took
  // long.
  void keep(Event& event, const Referee::Model& model) {
    std::int64_t bytes = model.copy.own;
    if (source_.below(5) == 0) {
      bytes = std::max<std::int64_t>(0, bytes + static_cast<std::int64_t>(source_.below(41)) - 25);
    }
    event.kept = Kept{.bytes = Bytes{bytes},
                      .took = milliseconds{1 + source_.below(source_.below(24) == 0 ? 4000 : 20)},
                      .made = bytes <= model.copy.own};
  }
  [[nodiscard]] Event set_budget(Event event, const Referee& referee) {
    event.kind = EventKind::kSetBudget;
    event.device = device(source_.below(static_cast<std::uint32_t>(referee.device_count())));
    event.budget = Bytes{source_.below(10) == 0 ? 0 : 40 + source_.below(110)};
    return event;
  }
  [[nodiscard]] Event set_tier_budget(Event event, const Referee& referee) {
    if (!referee.has_tier()) return end_io(event, referee);
    event.kind = EventKind::kSetTierBudget;
    event.budget = Bytes{source_.below(10) == 0 ? 0 : 20 + source_.below(130)};
    return event;
  }
  // Of a model that has a copy, if there is one.
  [[nodiscard]] Event lose_copy(Event event, const Referee& referee) {
    event = of(event, EventKind::kCopyLost, any_model(referee));
    for (const auto& [id, model] : referee.models()) {
      if (model.copy.phase == CopyPhase::kKept && source_.below(2) == 0) event.model = id;
    }
    return event;
  }
  [[nodiscard]] Event set_closed(Event event, const Referee& referee) {
    event.kind = EventKind::kSetClosed;
    event.device = device(source_.below(static_cast<std::uint32_t>(referee.device_count())));
    event.closed = source_.below(3) == 0;
    return event;
  }
  [[nodiscard]] Event update(Event event, const Referee& referee) {
    event = of(event, EventKind::kUpdatePlacements, any_model(referee));
    event.spec.placements = draw_placements(referee);
    draw_shares(event.spec, referee);
    return event;
  }
  [[nodiscard]] Event add_share(Event event, const Referee& referee) {
    if (referee.shares().size() >= kMostShares) return split_share(event, referee);
    event.kind = EventKind::kAddShare;
    // Some have fewer bytes than holders.
    event.budget = Bytes{1 + (source_.below(4) == 0 ? source_.below(3) : source_.below(45))};
    return event;
  }
  [[nodiscard]] Event split_share(Event event, const Referee& referee) {
    if (referee.shares().empty() || referee.shares().size() >= kMostShares) {
      return end_io(event, referee);
    }
    event.kind = EventKind::kSplitShare;
    const auto share = pick(referee.shares());
    event.share = share->first;
    event.budget = Bytes{source_.below(static_cast<std::uint32_t>(share->second.bytes) + 1)};
    return event;
  }
  [[nodiscard]] Event forget_share(Event event, const Referee& referee) {
    if (referee.shares().empty()) return end_io(event, referee);
    event.kind = EventKind::kForgetShare;
    event.share = pick(referee.shares())->first;
    return event;
  }
  // Mostly of a model that can be lost.
  [[nodiscard]] Event lose(Event event, const Referee& referee) {
    event = of(event, EventKind::kLost, any_model(referee));
    const bool pinned = source_.below(3) == 0;
    for (const auto& [id, model] : referee.models()) {
      const bool there = model.phase == Phase::kResident || model.phase == Phase::kDraining;
      if (there && model.pinned == pinned && source_.below(2) == 0) event.model = id;
    }
    return event;
  }
  [[nodiscard]] Event remeasure(Event event, const Referee& referee) {
    event = of(event, EventKind::kRemeasured, any_model(referee));
    event.charge = near(referee.models().at(event.model).held, referee);
    return event;
  }
  [[nodiscard]] Event reclaim(Event event, const Referee& referee) {
    event.model = any_model(referee);
    for (const auto& [id, model] : referee.models()) {
      if (!model.quarantined.empty()) event.model = id;
    }
    event.kind = EventKind::kReclaimed;
    event.charge = part_of(referee.models().at(event.model).quarantined);
    return event;
  }
  // Events that a broken shell might send. The referee knows which of them are errors.
  [[nodiscard]] Event nonsense(Event event, const Referee& referee) {
    event = of(event, static_cast<EventKind>(source_.below(kEventKinds)), any_model(referee));
    if (source_.below(3) == 0) {
      const auto raw = static_cast<std::uint64_t>(event.model);
      event.model = static_cast<ModelId>(raw ^ (std::uint64_t{1 + source_.below(3)} << 32));
    }
    event.ticket = static_cast<TicketId>(source_.below(1000));
    event.lease = static_cast<LeaseId>(std::uint64_t{source_.below(4)} << 32 | source_.below(10));
    event.device = device(source_.below(20));
    event.budget = Bytes{static_cast<std::int64_t>(source_.below(3)) - 1};
    if (event.budget.value == 1) event.budget = Bytes{kMaxBytes + 1};
    event.charge.set(device(source_.below(kMaxDevices)), Bytes{source_.below(200)});
    if (source_.below(2) == 0) event.spec.placements = {event.charge};
    event.spec.reload_seconds = static_cast<double>(source_.below(3)) - 1;
    event.share = static_cast<ShareId>(std::uint64_t{source_.below(4)} << 32 | source_.below(8));
    for (std::uint32_t i = source_.below(4); i > 0; --i) {
      if (referee.shares().empty() || source_.below(4) == 0)
        event.spec.shares.push_back(event.share);
      if (!referee.shares().empty()) event.spec.shares.push_back(pick(referee.shares())->first);
    }
    for (std::uint32_t i = source_.below(3); i > 0; --i) {
      event.spec.shares_on.push_back(source_.below(3) == 0 ? kNoDevice : device(source_.below(20)));
    }
    if (source_.below(3) == 0) event.spec.replaces = event.model;
    if (source_.below(2) == 0) {
      event.kept = Kept{.bytes = event.budget, .took = seconds{1}, .made = source_.below(2) == 0};
    }
    return event;
  }

  static constexpr std::size_t kMostShares = 6;

  Source& source_;
  std::uint32_t most_models_;
  bool about_copies_;
  Tick now_{seconds{100}};
};

}  // namespace modelyard::test

#pragma once

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "modelyard/yard.hpp"

// A yard's calls as values: what a test, the fuzzer and the referee have in common. An event can be
// made at random, applied, judged, printed and replayed.

namespace modelyard::test {

using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr DeviceIndex device(std::uint32_t index) { return static_cast<DeviceIndex>(index); }

/// A charge from (device, bytes) pairs.
inline Charge charge(std::initializer_list<std::pair<std::uint32_t, std::int64_t>> amounts) {
  Charge result;
  for (const auto& [index, bytes] : amounts) result.set(device(index), Bytes{bytes});
  return result;
}

inline Charge sum(const Charge& a, const Charge& b) {
  Charge result = a;
  b.for_each([&](DeviceIndex at, Bytes bytes) { result.set(at, a.on(at) + bytes); });
  return result;
}

enum class EventKind : std::uint8_t {
  kAddModel,
  kUpdatePlacements,
  kRemoveModel,
  kPin,
  kUnpin,
  kUnload,
  kSetBudget,
  kSetClosed,
  kTryAcquire,
  kRequest,
  kCancel,
  kRelease,
  kLoadDone,
  kLoadFailed,
  kUnloadDone,
  kReclaimed,
  kRemeasured,
  kLost,
  kAddShare,
  kSplitShare,
  kForgetShare,
  kSetTierBudget,
  kForgive,
  kCopyDropped,
  kCopyInUse,
  kCopyLost,
  kTick,
};

inline constexpr std::uint32_t kEventKinds = static_cast<std::uint32_t>(EventKind::kTick) + 1;

inline std::string_view to_string(EventKind kind) {
  switch (kind) {
    case EventKind::kAddModel:
      return "add_model";
    case EventKind::kUpdatePlacements:
      return "update_placements";
    case EventKind::kRemoveModel:
      return "remove_model";
    case EventKind::kPin:
      return "pin";
    case EventKind::kUnpin:
      return "unpin";
    case EventKind::kUnload:
      return "unload";
    case EventKind::kSetBudget:
      return "set_budget";
    case EventKind::kSetClosed:
      return "set_device_closed";
    case EventKind::kTryAcquire:
      return "try_acquire";
    case EventKind::kRequest:
      return "request";
    case EventKind::kCancel:
      return "cancel";
    case EventKind::kRelease:
      return "release";
    case EventKind::kLoadDone:
      return "load_done";
    case EventKind::kLoadFailed:
      return "load_failed";
    case EventKind::kUnloadDone:
      return "unload_done";
    case EventKind::kReclaimed:
      return "reclaimed";
    case EventKind::kRemeasured:
      return "remeasured";
    case EventKind::kLost:
      return "lost";
    case EventKind::kAddShare:
      return "add_share";
    case EventKind::kSplitShare:
      return "split_share";
    case EventKind::kForgetShare:
      return "forget_share";
    case EventKind::kSetTierBudget:
      return "set_tier_budget";
    case EventKind::kForgive:
      return "forgive";
    case EventKind::kCopyDropped:
      return "copy_dropped";
    case EventKind::kCopyInUse:
      return "copy_in_use";
    case EventKind::kCopyLost:
      return "copy_lost";
    case EventKind::kTick:
      return "tick";
  }
  return "?";
}

/// One call of a yard. Fields that the kind has no use for keep their defaults.
struct Event {
  EventKind kind{EventKind::kTick};
  Tick now{};
  ModelId model{};
  TicketId ticket{};
  LeaseId lease{};
  ShareId share{};
  DeviceIndex device{};
  Bytes budget{};  ///< Of set_budget and set_tier_budget; of add_share and split_share the share's
                   ///< bytes; of copy_dropped what is back.
  bool closed{false};
  Tick deadline{kNever};
  Charge charge{};  ///< Actual, freed, reclaimed or measured bytes.
  Duration took{seconds{1}};
  Source source{Source::kStorage};
  std::optional<Kept> kept;  ///< Of unload_done.
  LoadFailure failure{LoadFailure::kTransient};
  ModelSpec spec{};  ///< Of add_model; of update_placements the placements and shares only.
};

/// What a call returned and asked for.
struct Outcome {
  std::optional<ErrorCode> error;
  std::string message;
  ModelId model{};
  ShareId share{};
  TicketId ticket{};
  std::optional<LeaseId> lease;
  Actions actions;
};

/// Calls the yard as the event says.
inline Outcome apply(Yard& yard, const Event& event) {
  Outcome outcome;
  const auto note = [&](const auto& result) {
    if (!result.ok()) {
      outcome.error = result.error().code;
      outcome.message = result.error().message;
    }
    return result.ok();
  };
  Actions& out = outcome.actions;
  switch (event.kind) {
    case EventKind::kAddModel: {
      const auto result = yard.add_model(event.spec);
      if (note(result)) outcome.model = result.value();
      break;
    }
    case EventKind::kUpdatePlacements:
      note(yard.update_placements(event.model, event.spec.placements, event.spec.shares,
                                  event.spec.shares_on, event.now, out));
      break;
    case EventKind::kRemoveModel:
      note(yard.remove_model(event.model, event.now, out));
      break;
    case EventKind::kPin:
      note(yard.pin(event.model, event.now, out));
      break;
    case EventKind::kUnpin:
      note(yard.unpin(event.model, event.now, out));
      break;
    case EventKind::kUnload:
      note(yard.unload(event.model, event.now, out));
      break;
    case EventKind::kSetBudget:
      note(yard.set_budget(event.device, event.budget, event.now, out));
      break;
    case EventKind::kSetClosed:
      note(yard.set_device_closed(event.device, event.closed, event.now, out));
      break;
    case EventKind::kTryAcquire: {
      const auto result = yard.try_acquire(event.model, event.now, event.deadline);
      if (note(result)) outcome.lease = result.value();
      break;
    }
    case EventKind::kRequest: {
      const auto result = yard.request(event.model, event.now, event.deadline, out);
      if (note(result)) outcome.ticket = result.value();
      break;
    }
    case EventKind::kCancel:
      note(yard.cancel(event.ticket, event.now, out));
      break;
    case EventKind::kRelease:
      note(yard.release(event.lease, event.now, out));
      break;
    case EventKind::kLoadDone:
      note(yard.load_done(event.model, event.now, event.charge, event.took, event.source, out));
      break;
    case EventKind::kLoadFailed:
      note(yard.load_failed(event.model, event.now, event.failure, out));
      break;
    case EventKind::kUnloadDone:
      note(yard.unload_done(event.model, event.now, event.charge, event.kept, out));
      break;
    case EventKind::kReclaimed:
      note(yard.reclaimed(event.model, event.now, event.charge, out));
      break;
    case EventKind::kRemeasured:
      note(yard.remeasured(event.model, event.now, event.charge, out));
      break;
    case EventKind::kLost:
      note(yard.lost(event.model, event.now, out));
      break;
    case EventKind::kAddShare: {
      const auto result = yard.add_share(event.budget);
      if (note(result)) outcome.share = result.value();
      break;
    }
    case EventKind::kSplitShare: {
      const auto result = yard.split_share(event.share, event.budget);
      if (note(result)) outcome.share = result.value();
      break;
    }
    case EventKind::kForgetShare:
      note(yard.forget_share(event.share));
      break;
    case EventKind::kSetTierBudget:
      note(yard.set_tier_budget(event.budget, event.now, out));
      break;
    case EventKind::kForgive:
      note(yard.forgive(event.model, event.now));
      break;
    case EventKind::kCopyDropped:
      note(yard.copy_dropped(event.model, event.now, event.budget, out));
      break;
    case EventKind::kCopyInUse:
      note(yard.copy_in_use(event.model, event.now, out));
      break;
    case EventKind::kCopyLost:
      note(yard.copy_lost(event.model, event.now, out));
      break;
    case EventKind::kTick:
      yard.tick(event.now, out);
      break;
  }
  return outcome;
}

inline std::string describe(const Charge& held) {
  std::ostringstream text;
  held.for_each([&](DeviceIndex at, Bytes bytes) {
    if (text.tellp() > 0) text << '+';
    text << bytes.value << '@' << position(at);
  });
  return text.tellp() > 0 ? text.str() : "0";
}

inline std::string describe(const std::vector<Charge>& placements) {
  std::string text;
  for (const Charge& placement : placements) {
    if (!text.empty()) text += '|';
    text += describe(placement);
  }
  return text;
}

/// A model's id, short: slot.generation.
inline std::string describe(ModelId model) {
  const auto raw = static_cast<std::uint64_t>(model);
  return "m" + std::to_string(raw & 0xffffffffU) + "." + std::to_string(raw >> 32);
}

inline std::string describe(ShareId share) {
  const auto raw = static_cast<std::uint64_t>(share);
  return "s" + std::to_string(raw & 0xffffffffU) + "." + std::to_string(raw >> 32);
}

/// " and s0.1 s1.1 on 0|-": what a model is made of besides its placements, and where.
inline std::string describe_shares(const ModelSpec& spec) {
  if (spec.shares.empty()) return {};
  std::string text = " and";
  for (const ShareId share : spec.shares) text.append(" ").append(describe(share));
  text += " on ";
  for (const DeviceIndex where : spec.shares_on) {
    if (text.back() != ' ') text += '|';
    text += where == kNoDevice ? "-" : std::to_string(position(where));
  }
  return text;
}

inline std::string describe(const Event& event) {
  std::ostringstream text;
  text << event.now.time_since_epoch().count() << "ns " << to_string(event.kind);
  switch (event.kind) {
    case EventKind::kAddModel:
      text << ' ' << describe(event.spec.placements) << describe_shares(event.spec) << " reload "
           << event.spec.reload_seconds;
      break;
    case EventKind::kUpdatePlacements:
      text << ' ' << describe(event.model) << ' ' << describe(event.spec.placements)
           << describe_shares(event.spec);
      break;
    case EventKind::kSetBudget:
      text << ' ' << position(event.device) << ' ' << event.budget.value;
      break;
    case EventKind::kSetClosed:
      text << ' ' << position(event.device) << (event.closed ? " closed" : " open");
      break;
    case EventKind::kRequest:
      text << ' ' << describe(event.model);
      if (event.deadline != kNever) {
        text << " deadline " << event.deadline.time_since_epoch().count() << "ns";
      }
      break;
    case EventKind::kCancel:
      text << " ticket " << static_cast<std::uint64_t>(event.ticket);
      break;
    case EventKind::kRelease:
      text << " lease " << static_cast<std::uint64_t>(event.lease);
      break;
    case EventKind::kLoadFailed:
      text << ' ' << describe(event.model) << " failure " << static_cast<int>(event.failure);
      break;
    case EventKind::kLoadDone:
      text << ' ' << describe(event.model) << ' ' << describe(event.charge) << " from "
           << to_string(event.source) << " in " << event.took.count() << "ns";
      break;
    case EventKind::kUnloadDone:
      text << ' ' << describe(event.model) << ' ' << describe(event.charge);
      if (event.kept) {
        text << (event.kept->made ? " kept " : " would have kept ") << event.kept->bytes.value
             << " in " << event.kept->took.count() << "ns";
      }
      break;
    case EventKind::kReclaimed:
    case EventKind::kRemeasured:
      text << ' ' << describe(event.model) << ' ' << describe(event.charge);
      break;
    case EventKind::kCopyDropped:
      text << ' ' << describe(event.model) << ' ' << event.budget.value;
      break;
    case EventKind::kSetTierBudget:
    case EventKind::kAddShare:
      text << ' ' << event.budget.value;
      break;
    case EventKind::kSplitShare:
      text << ' ' << describe(event.share) << ' ' << event.budget.value;
      break;
    case EventKind::kForgetShare:
      text << ' ' << describe(event.share);
      break;
    case EventKind::kTick:
      break;
    default:
      text << ' ' << describe(event.model);
      break;
  }
  return text.str();
}

inline std::string describe(const Action& action) {
  std::ostringstream text;
  if (const auto* grant = std::get_if<Grant>(&action)) {
    text << "grant ticket " << static_cast<std::uint64_t>(grant->ticket);
  } else if (const auto* load = std::get_if<Load>(&action)) {
    text << "load " << describe(load->model) << " placement " << load->placement;
  } else if (const auto* stop = std::get_if<CancelLoad>(&action)) {
    text << "cancel_load " << describe(stop->model);
  } else if (const auto* drain = std::get_if<Drain>(&action)) {
    text << "drain " << describe(drain->model);
  } else if (const auto* unload = std::get_if<Unload>(&action)) {
    text << "unload " << describe(unload->model) << (unload->keep ? " and keep a copy" : "");
    if (unload->keep) text << " of at most " << unload->most.value;
  } else if (const auto* dropped = std::get_if<DropCopy>(&action)) {
    text << "drop the copy of " << describe(dropped->model);
  } else if (const auto* refuse = std::get_if<Refuse>(&action)) {
    text << "refuse ticket " << static_cast<std::uint64_t>(refuse->ticket) << ' '
         << to_string(refuse->reason);
  } else if (const auto* wake = std::get_if<WakeAt>(&action)) {
    text << "wake at " << wake->at.time_since_epoch().count() << "ns";
  }
  return text.str();
}

}  // namespace modelyard::test

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/reload.hpp"
#include "modelyard/shares.hpp"
#include "modelyard/slot_map.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// Where a model stands.
///
///   COLD -> QUEUED -> LOADING -> RESIDENT -> DRAINING -> UNLOADING -> COLD
///                        |          `--------------------^   (nobody uses it)
///                        `-> FAILED -> QUEUED                 (after its back-off)
///
/// Nothing leads from DRAINING back to RESIDENT: a request that comes too late waits and loads the
/// model again.
enum class State : std::uint8_t {
  kCold,
  kQueued,
  kLoading,
  kResident,
  kDraining,
  kUnloading,
  kFailed,
};

[[nodiscard]] std::string_view to_string(State state);

/// Why a load failed.
enum class LoadFailure : std::uint8_t {
  kTransient,  ///< The same files may load another time.
  kPermanent,  ///< Somebody has to change something; tried again after the back-off all the same.
  kCancelled,  ///< It was asked to stop. Not held against the model.
};

/// A request that waits for a model.
struct Ticket {
  EntryIndex entry{0};
  std::uint64_t sequence{0};  ///< Order of arrival over all tickets.
  Tick arrival{};
  Tick deadline{kNever};
  std::array<float, kMaxDevices> ahead{};  ///< Seconds of work that each device had when it came.
  TicketId previous{};  ///< Neighbours in the model's queue, oldest first; zero at the ends.
  TicketId next{};
};

/// One request's right that a resident model stays.
struct Lease {
  EntryIndex entry{0};
  bool aside{false};  // It is none of the requests that its device ends one after the other.
};

/// Where the copy of a model's weights on the host tier stands.
///
///   NONE -> MAKING -> KEPT -> DROPPING -> NONE
///     `-> AWAITED -^            (the model is being unloaded while AWAITED or MAKING)
///
/// AWAITED: its room is being made, and the unload with which it is made waits for that.
enum class CopyState : std::uint8_t { kNone, kAwaited, kMaking, kKept, kDropping };

[[nodiscard]] std::string_view to_string(CopyState state);

/// A copy of a model's weights on the host tier.
struct Copy {
  CopyState state{CopyState::kNone};
  Charge held;  ///< On the tier alone: reserved while MAKING, really held while KEPT or DROPPING.
  std::vector<ShareId> shares;  ///< Held there like `held`.
  bool in_use{false};  ///< While DROPPING: somebody is still in its memory, see copy_in_use.
};

/// A model as the core sees it.
struct Entry {
  // First, and together: what a scan for victims looks at in every entry.
  State state{State::kCold};
  bool pinned{false};
  bool removed{false};      ///< Takes no requests; the slot is freed when nothing is held any more.
  bool leave_after{false};  ///< Asked to leave while LOADING: goes as soon as the load has ended.
  bool stop_sent{false};    ///< CancelLoad was sent for the load that runs.
  bool forgotten{false};    ///< Leaves for good: no copy of it is to be kept.
  std::uint32_t lease_count{0};  ///< Requests that use it.
  double reload_seconds{0};      ///< What its next load is expected to take if it leaves now.
  Charge held;  ///< Reserved while LOADING; really held while RESIDENT, DRAINING or UNLOADING.

  DeviceIndex home{kNoDevice};  ///< The first device it holds bytes on, since its last load: where
                                ///< its requests are counted.
  DeviceIndex meant_for{kNoDevice};  ///< It was given away to this device, by one that was behind
                                     ///< with its work; until its next load begins.
  Tick rests_since{};  ///< When it last came to hold nothing; meaningful while meant_for is.
  std::uint32_t aside_count{0};  ///< Of its leases, those that were set aside.
  double demand{0};              ///< Requests for it lately, older ones fading; as of demand_at.
  RequestClock demand_at{0};
  Tick load_began{};  ///< Of the load that runs or was the last.
  Tick used_since{};  ///< Since when somebody uses it; meaningful while lease_count is not 0.
  Duration used{};    ///< How long it was in use since its last load, before used_since.

  std::uint32_t placement{0};      ///< The alternative in use while held is not empty.
  std::uint32_t waiting_count{0};  ///< Requests that wait for it, from the oldest to the newest.
  TicketId oldest{};
  TicketId newest{};

  std::uint32_t failure_count{0};
  LoadFailure failure{LoadFailure::kTransient};
  Tick retry_at{};  ///< Until then requests are refused; meaningful while FAILED.

  std::uint64_t load_count{0};
  std::uint64_t eviction_count{0};
  Charge quarantined;              ///< Did not come back from earlier unloads.
  std::vector<Charge> placements;  ///< What a load may take for the model alone; each load chooses
                                   ///< one of them.
  std::vector<ShareId> shares;     ///< What it is made of besides, together with others.
  std::vector<DeviceIndex>
      shares_on;  ///< Where each placement holds the shares; kNoDevice if it has copies of its own.
  std::vector<ShareId> held_shares;       ///< Held now, like `held`.
  DeviceIndex held_shares_on{kNoDevice};  ///< Where; kNoDevice if held_shares is empty.
  ReloadTimes times;                      ///< What its loads took.
  Copy copy;
  Bytes copy_bytes;   ///< What its last copy held alone, or would have; zero before the first.
  std::string label;  ///< What people call it; for explanations only.
};

using EntryTable = SlotMap<Entry, ModelId>;
using TicketTable = SlotMap<Ticket, TicketId>;
using LeaseTable = SlotMap<Lease, LeaseId>;

}  // namespace modelyard

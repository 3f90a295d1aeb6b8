#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <variant>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/entry_table.hpp"
#include "modelyard/types.hpp"

// What the yard asks its shell to do. Actions of one call are to be carried out in their order.

namespace modelyard {

/// The ticket is answered: its request may use the model until it releases the lease.
struct Grant {
  TicketId ticket;
  LeaseId lease;
};

/// Load the model as its placement `placement` says; answer with load_done or load_failed. The
/// bytes are reserved.
struct Load {
  ModelId model;
  std::uint32_t placement;
};

/// Stop the load if that is possible; answer with load_failed(kCancelled), or load_done if it came
/// too late. Sent once a load at most.
struct CancelLoad {
  ModelId model;
};

/// Tell whom it concerns that the model takes no new requests. Unload follows when its last lease
/// is released.
struct Drain {
  ModelId model;
};

/// Give the model's memory back; answer with unload_done. Nobody holds a lease on it.
struct Unload {
  ModelId model{};
  bool keep{false};  ///< Copy its weights to the host tier before; room for them is reserved there.
  Bytes most{};      ///< Most that the copy may hold beside the model's shares.
};

/// Give back the memory of the model's copy on the host tier; answer with copy_dropped.
struct DropCopy {
  ModelId model;
};

enum class RefuseReason : std::uint8_t {
  kNeverFits,        ///< Larger than a budget.
  kBudgetExhausted,  ///< Pinned and quarantined bytes leave no room.
  kQueueFull,
  kLoadFailed,  ///< Just now, or lately: see `failure` and `retry_after`.
  kDeadlineInQueue,
  kDeadlineInLoad,
  kDeadlineUnreachable,  ///< It would pass before the answer: see `needs` and `retry_after`.
  kRemoved,
};

[[nodiscard]] std::string_view to_string(RefuseReason reason);

struct Holder {
  ModelId model{};
  Bytes bytes{};
};

/// The ticket will not be granted. The numbers are those of the device that is shortest.
struct Refuse {
  TicketId ticket{};
  RefuseReason reason{RefuseReason::kQueueFull};
  LoadFailure failure{LoadFailure::kTransient};
  DeviceIndex device{};
  Bytes needed{};
  Bytes free{};
  Bytes budget{};
  std::array<Holder, 3> holders{};  ///< Who holds most there, largest first; unused ones are zero.
  Duration retry_after{};           ///< Zero where waiting does not help.
  Duration needs{};  ///< Of kDeadlineUnreachable: what it is expected to take from now,
  Duration left{};   ///< and what is left until the deadline.
};

/// Call tick at this time. Replaces the WakeAt before it.
struct WakeAt {
  Tick at;
};

using Action = std::variant<Grant, Load, CancelLoad, Drain, Unload, DropCopy, Refuse, WakeAt>;
using Actions = std::vector<Action>;

}  // namespace modelyard

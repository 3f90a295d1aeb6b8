#pragma once

#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "modelyard/ledger.hpp"
#include "modelyard/slot_map.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// Names a share; see Share.
enum class ShareId : std::uint64_t {};

/// What a model that holds a share is doing.
enum class Holding : std::uint8_t { kLoading, kResident, kDraining, kUnloading };

/// How many models hold a share on one device, by what they are doing.
struct Holders {
  std::array<std::uint32_t, 4> by{};  ///< Indexed by Holding.
  std::uint32_t pinned{0};            ///< Pinned ones that are loading or resident.

  [[nodiscard]] std::uint32_t of(Holding holding) const {
    return by[static_cast<std::size_t>(holding)];
  }
  [[nodiscard]] std::uint32_t total() const { return std::accumulate(by.begin(), by.end(), 0U); }
  /// Those that keep it for as long as nobody asks them to leave.
  [[nodiscard]] std::uint32_t firm() const {
    return of(Holding::kLoading) + of(Holding::kResident);
  }
  /// The same, and those that keep it until their requests have ended.
  [[nodiscard]] std::uint32_t staying() const { return firm() + of(Holding::kDraining); }

  /// As what its bytes stand in the ledger: it is charged once, to the liveliest of its holders.
  [[nodiscard]] Kind kind() const {
    if (of(Holding::kResident) > 0) return Kind::kResident;
    if (of(Holding::kLoading) > 0) return Kind::kReserved;
    return total() > 0 ? Kind::kDraining : Kind::kNone;
  }
  /// True if it is there only for models that are being unloaded: its bytes come back with them.
  [[nodiscard]] bool only_unloading() const {
    return total() > 0 && of(Holding::kUnloading) == total();
  }
};

/// Bytes that several models hold together: the same tensors. On each device they are charged once,
/// from the first model that is loaded there until the last one's memory is back.
struct Share {
  Bytes bytes;
  std::uint32_t model_count{
      0};  ///< Models that are made of it or hold it; at zero it is forgotten.
  std::array<Holders, kMaxDevices> holders{};

  [[nodiscard]] Holders& on(DeviceIndex device) { return holders[position(device)]; }
  [[nodiscard]] const Holders& on(DeviceIndex device) const { return holders[position(device)]; }
};

using ShareTable = SlotMap<Share, ShareId>;

}  // namespace modelyard

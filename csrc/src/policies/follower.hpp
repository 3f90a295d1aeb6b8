#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "policies/footprints.hpp"
#include "policies/history.hpp"
#include "policies/leaving.hpp"
#include "policies/shadow.hpp"

namespace modelyard {

/// What the devices would hold if every load were over at once and nothing were pinned, under a
/// policy that follows one shadow cache now and another one later: whoever the leader's shadow does
/// not hold goes first, and among those the leader's worth decides. A change of leader moves
/// nothing.
///
/// So it pays what the leader's shadow pays, and in addition for what the change has cost: the
/// loads of models that the new leader has long had. A yard that serves one request after the other
/// pays the same.
///
/// Invariant: as of a shadow, no device holds more than its budget, but for what a lowered one has
/// left over. Not thread-safe.
class Follower {
 public:
  /// A slot starts anew. Its old footprint is still known.
  void add(const Footprints& footprints, EntryIndex entry);
  /// A model was asked for. `history` and `leader` know it already, `footprints` not yet.
  /// Returns the seconds of the load that this makes necessary; 0 if it is there.
  double access(const History& history, const Footprints& footprints, const Wish& wish,
                const Shadow& leader, RequestClock now);

 private:
  static constexpr std::uint32_t kNowhere = 0xffffffffU;

  [[nodiscard]] bool holds(EntryIndex entry) const {
    return entry < places_.size() && places_[entry] != kNowhere;
  }
  void enter(const Wish& wish);
  void leave(const Footprint& footprint, EntryIndex entry);
  void make_room(const History& history, const Footprints& footprints, const Charge& need,
                 const Shadow& leader, RequestClock now);
  void choose(const History& history, const Footprints& footprints, const Charge& need,
              Charge& left, const Shadow& leader, bool kept, RequestClock now);

  std::vector<std::uint32_t> places_;  // By entry: where it is among the members.
  std::vector<EntryIndex> members_;    // In no order.
  std::array<std::int64_t, kMaxDevices> used_{};
  std::vector<Leaving> heap_, leavers_;  // Kept for their memory.
};

}  // namespace modelyard

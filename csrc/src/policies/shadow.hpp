#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "modelyard/charge.hpp"
#include "policies/expert.hpp"
#include "policies/footprints.hpp"
#include "policies/history.hpp"
#include "policies/leaving.hpp"

namespace modelyard {

/// What the devices would hold if one expert had its way and every load were free of time: ids and
/// bytes, no memory, no pins. It says what following the expert would have cost.
///
/// What an expert thinks of a member changes only with time until the member is asked for again. So
/// each member's worth is kept as a function of time (see Curve), in arrays that making room reads
/// from one end to the other.
///
/// Invariant: no device holds more than its budget, but for what a lowered budget has left over
/// until the next miss makes room for what it brings.
class Shadow {
 public:
  explicit Shadow(std::unique_ptr<Expert> expert) : expert_(std::move(expert)) {}
  Shadow(const Shadow& other);
  Shadow(Shadow&&) = default;
  Shadow& operator=(const Shadow&) = delete;
  Shadow& operator=(Shadow&&) = delete;
  ~Shadow() = default;

  /// A slot starts anew. Its old footprint is still known.
  void add(const Footprints& footprints, EntryIndex entry);
  void replace(EntryIndex entry, EntryIndex before) { expert_->on_replace(entry, before); }
  /// A model was asked for. `history` knows it already, `footprints` not yet.
  /// Returns the seconds of the load that this makes necessary; 0 if it is there.
  double access(const History& history, const Footprints& footprints, const Wish& wish,
                RequestClock now);
  /// Budgets have changed, and with them all weights.
  void reweigh(const History& history, const Footprints& footprints);

  [[nodiscard]] bool holds(EntryIndex entry) const {
    return entry < places_.size() && places_[entry] != kNowhere;
  }
  /// Seconds that loading all it holds takes.
  [[nodiscard]] double content_seconds() const { return content_seconds_; }
  [[nodiscard]] const Expert& expert() const { return *expert_; }

 private:
  static constexpr std::uint32_t kNowhere = 0xffffffffU;
  // Members that an expert without curves is asked about, about, when room is made.
  static constexpr std::size_t kMostAsked = 512;

  void enter(const History& history, const Wish& wish);
  void leave(const Footprint& footprint, EntryIndex entry);
  void set_curve(const History& history, EntryIndex entry, double weight, double reload_seconds);
  void make_room(const History& history, const Footprints& footprints, const Charge& need,
                 RequestClock now);
  void value_members(const Footprints& footprints, const Charge& need, RequestClock now);
  void ask_expert(const History& history, const Footprints& footprints, const Charge& need,
                  RequestClock now, std::size_t step);
  void choose_leavers(const Footprints& footprints, const Charge& need);
  [[nodiscard]] std::size_t least_worth() const;

  std::unique_ptr<Expert> expert_;
  std::vector<std::uint32_t> places_;  // By entry: where it is among the members.
  // Of the members, in no order.
  std::vector<EntryIndex> members_;
  std::vector<double> tops_;  // The curve's, for the weight over all devices.
  std::vector<double> spans_;
  std::vector<double> late_after_;

  RequestClock base_{0};  // Of the history, when the curves were drawn.
  std::array<std::int64_t, kMaxDevices> used_{};
  double content_seconds_{0};
  // Kept for their memory.
  std::vector<double> worths_;  // Of the members.
  std::vector<Leaving> leavers_, heap_;
};

}  // namespace modelyard

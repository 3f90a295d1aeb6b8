#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "books.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// A deliberately naive second opinion on a yard.
///
/// It sees what went in (events), what came out (results, actions) and what the yard's read
/// accessors say afterwards, and keeps books of its own with maps and whole recounts. From these it
/// re-derives the promises of yard.hpp:
///   - actions fit the state of the model they are about (I3, I5), tickets end exactly once and
///   oldest first (I6);
///   - used <= budget + deficit on every device, and a load never makes or widens a deficit (I2);
///   - who waits is QUEUED, LOADING or on its way out, and never RESIDENT (I4, I8);
///   - victims of the only waiting model are a complete and minimal set (I7), where a share comes
///   back with the last of its holders only;
///   - a share is charged once, as what its liveliest holder is, and gone with its last model (I9);
///   - a deficit is being repaid by whoever can repay it;
///   - a model whose memory is lost leaves, also a pinned one;
///   - the only waiting model is not left waiting while it fits, or while idle models could make
///   room;
///   - refusals have the cause they name, back-off grows within its bounds, deadlines are kept,
///   wakes are asked for;
///   - errors change nothing, and are given exactly where the contract says;
///   - what TierReferee says of the host tier.
/// It knows nothing of policies and does not predict who is chosen.
class Referee {
 public:
  using CopyPhase = Books::CopyPhase;
  using Model = Books::Model;
  using Phase = Books::Phase;
  using SharedBytes = Books::SharedBytes;
  using Verdict = std::optional<std::string>;

  explicit Referee(YardOptions options);
  ~Referee();
  Referee(const Referee&) = delete;
  Referee& operator=(const Referee&) = delete;

  [[nodiscard]] static bool is_leaving(CopyPhase phase) { return Books::is_leaving(phase); }

  // What it believes; random events are made from this, never from the yard.
  [[nodiscard]] const std::map<ModelId, Model>& models() const;
  [[nodiscard]] const std::map<ShareId, SharedBytes>& shares() const;
  [[nodiscard]] std::size_t device_count() const;
  [[nodiscard]] bool closed(std::size_t where) const;
  [[nodiscard]] Bytes budget(std::size_t where) const;
  [[nodiscard]] Charge exclusive(ModelId id) const;
  [[nodiscard]] bool has_tier() const;
  [[nodiscard]] DeviceIndex tier() const;
  [[nodiscard]] Bytes tier_budget() const;
  [[nodiscard]] Bytes copy_exclusive(ModelId id) const;
  [[nodiscard]] bool was_loaded(ModelId id) const;
  [[nodiscard]] Verdict unrest() const;
  [[nodiscard]] const std::map<TicketId, std::pair<ModelId, Tick>>& tickets() const;
  [[nodiscard]] const std::map<LeaseId, ModelId>& leases() const;
  [[nodiscard]] Tick now() const;
  [[nodiscard]] Tick wake_at() const;
  [[nodiscard]] const YardOptions& options() const;

  /// Judges one call. `yard` is the state after it. The text of the first violation, or nothing.
  [[nodiscard]] Verdict judge(const Event& event, const Outcome& outcome, const Yard& yard);

 private:
  class Judge;
  std::unique_ptr<Judge> judge_;
};

}  // namespace modelyard::test

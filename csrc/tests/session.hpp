#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <string>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "referee.hpp"

namespace modelyard::test {

/// A yard and its referee: every event is applied and judged. Remembers the events so that a
/// failure can be replayed.
class Session {
 public:
  explicit Session(Yard yard, const YardOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  [[nodiscard]] const Yard& yard() const { return yard_; }
  [[nodiscard]] Yard& yard() { return yard_; }
  [[nodiscard]] const Referee& referee() const { return referee_; }
  /// The first violation, with the events that led to it, or nothing.
  [[nodiscard]] const std::optional<std::string>& violation() const { return violation_; }

  Outcome step(const Event& event);

  /// Faults stop and everybody releases: every waiting ticket must then be granted or refused after
  /// finitely many steps.
  void settle();

  /// Removes all models and gives everything back. The ledger must then be zero.
  void tear_down();

 private:
  static constexpr std::size_t kHistory = 60;

  [[nodiscard]] Event event(EventKind kind) const;

  // Ends what runs: loads, unloads, drops of copies and leases. False if there was nothing.
  bool finish_everything();

  Yard yard_;
  Referee referee_;
  std::deque<std::string> history_;
  std::optional<std::string> violation_;
};

}  // namespace modelyard::test

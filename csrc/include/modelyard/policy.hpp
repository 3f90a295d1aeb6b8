#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "modelyard/types.hpp"

namespace modelyard {

/// A resident model that may be evicted, as a policy sees it.
struct Candidate {
  EntryIndex entry{0};
  double weight{
      0};  ///< Share of the short devices' budgets it holds, summed over them; above zero.
  double reload_seconds{0};  ///< Expected cost of its absence.
};

/// Says which resident model is worth least.
///
/// The contract, checked by csrc/tests/policy_test.cpp for every policy:
/// - on_add comes before anything else about an entry and forgets what the slot was before.
/// - on_replace comes right after the on_add of its entry, if at all; `before` stays as it is.
/// - on_request comes once for every request of a model, resident or not, with a clock that grows
///   by one each time.
/// - score is a pure function of what was reported: finite, the same when asked again, and of no
///   effect.
/// - Candidates are resident: the yard never shows a policy a pinned, loading or leaving model, and
///   a leased one only for a model that is overdue, behind every idle one.
/// - A policy keeps history over evictions; that a model left is no reason to forget how often it
///   was wanted.
///
/// The candidate with the lowest score goes first. Scores of one policy compare with each other
/// only. Not thread-safe.
class Policy {
 public:
  Policy() = default;
  Policy& operator=(const Policy&) = delete;
  virtual ~Policy() = default;

  [[nodiscard]] virtual std::string_view name() const = 0;
  /// A policy that knows the same and goes its own way from here.
  [[nodiscard]] virtual std::unique_ptr<Policy> clone() const = 0;
  virtual void on_add(EntryIndex entry) = 0;
  /// `entry` was added to take the place of `before`: it starts with that one's history.
  virtual void on_replace(EntryIndex entry, EntryIndex before) = 0;
  virtual void on_request(EntryIndex entry, RequestClock now) = 0;
  [[nodiscard]] virtual double score(const Candidate& candidate, RequestClock now) const = 0;

 protected:
  Policy(const Policy&) = default;  // For clone alone: a copy of the base would be half a policy.
};

/// The policies there are, the default first: "gap", "lru".
[[nodiscard]] std::span<const std::string_view> policy_names();

/// A new policy, or null if there is none of that name.
[[nodiscard]] std::unique_ptr<Policy> make_policy(std::string_view name);

}  // namespace modelyard

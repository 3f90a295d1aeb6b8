#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "modelyard/charge.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// A resident model that may be evicted, as a policy sees it.
struct Candidate {
  EntryIndex entry{0};
  double weight{
      0};  ///< Share of the short devices' budgets it holds, summed over them; above zero.
  double reload_seconds{0};  ///< Expected cost of its absence.
};

/// A request for a model, as a policy sees it.
struct Wish {
  EntryIndex entry{0};
  const Charge* held{nullptr};  ///< What the model holds, or would; valid during the call. What it
                                ///< shares counts by its part.
  double weight{0};  ///< Share of the devices' budgets that is, summed over them; above zero.
  double reload_seconds{0};  ///< What loading it takes; above zero.
};

/// What following a policy would have cost on its own, and what LRU would have: in seconds of
/// loading, each from its own shadow cache, since the policy was made.
struct ShadowSeconds {
  double own{0};  ///< What its leaders' shadows have paid, each while it led.
  double lru{0};
  double yard{0};  ///< What the yard itself has paid: with what it holds of former leaders.
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
/// - on_budgets comes before the first request, and whenever a budget changes.
/// - lru_missed tells of the last request only, and is as pure as score.
/// - on_evict comes for every candidate that is made to leave, with the score it had.
/// - keeps is as pure as score.
/// - A policy keeps history over evictions; that a model left is no reason to forget how often it
///   was wanted.
///
/// The candidate with the lowest score goes first; among all of them first those that the policy
/// does not keep. Scores of one policy compare with each other only. Not thread-safe.
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
  virtual void on_request(const Wish& wish, RequestClock now) = 0;
  virtual void on_budgets(std::span<const Bytes>) {}
  virtual void on_evict(EntryIndex, double /*score*/) {}
  [[nodiscard]] virtual double score(const Candidate& candidate, RequestClock now) const = 0;
  /// True for a model that the policy would still have in memory if it had its way.
  [[nodiscard]] virtual bool keeps(EntryIndex) const { return false; }
  /// The rule it goes by at the moment.
  [[nodiscard]] virtual std::string_view leader() const { return name(); }
  /// True if a cache of the same budgets that goes by LRU did not have the model of the last
  /// on_request. What that is for, and what it is not: see LruBill. All policies
  /// of make_policy say it.
  [[nodiscard]] virtual bool lru_missed() const { return false; }
  /// Nothing if it does not go by shadow caches.
  [[nodiscard]] virtual std::optional<ShadowSeconds> shadow_seconds() const { return std::nullopt; }

 protected:
  Policy(const Policy&) = default;  // For clone alone: a copy of the base would be half a policy.
};

/// The policies there are, the default first.
[[nodiscard]] std::span<const std::string_view> policy_names();

/// A new policy, or null if there is none of that name.
[[nodiscard]] std::unique_ptr<Policy> make_policy(std::string_view name);

}  // namespace modelyard

#pragma once

#include <array>
#include <limits>
#include <memory>
#include <string_view>

#include "modelyard/policy.hpp"
#include "policies/history.hpp"

namespace modelyard {

/// What a model is worth as time goes by while nobody asks for it:
///
///   top / (span + max(0, now - late_after)) / weight ^ weight_power
///
/// or, where the expert rises (Expert::rises), with |now - late_after|: highest at that moment.
///
/// It orders models as the expert's score does, and compares with curves of the same expert drawn
/// while the history has the same base.
struct Curve {
  double top{0};
  double span{1};
  double late_after{std::numeric_limits<double>::infinity()};  // It never falls, then.
};

/// A rule that says what a model is worth, from the history of requests, its cost and its weight.
/// The lowest worth goes first.
///
/// An expert that remembers what left the cache it judges (`on_evict`) has one copy a cache. Not
/// thread-safe.
class Expert {
 public:
  Expert() = default;
  Expert& operator=(const Expert&) = delete;
  virtual ~Expert() = default;

  [[nodiscard]] virtual std::string_view name() const = 0;
  [[nodiscard]] virtual std::unique_ptr<Expert> clone() const = 0;
  /// What a model is worth now. Finite, and of no effect.
  [[nodiscard]] virtual double score(const History& history, const Candidate& candidate,
                                     RequestClock now) const = 0;
  /// False if no curve says it; the two below are not asked then.
  [[nodiscard]] virtual bool draws_curves() const { return true; }
  /// The same for all times to come until the model is asked for again.
  [[nodiscard]] virtual Curve curve(const History&, EntryIndex, double /*reload_seconds*/) const {
    return {};
  }
  /// True if its curves rise until late_after and fall from then on; else they only fall.
  [[nodiscard]] virtual bool rises() const { return false; }
  /// To which power the weight divides the curve: 0, 1 or 2.
  [[nodiscard]] virtual int weight_power() const { return 0; }
  /// A slot starts anew, or, with `before`, with another's past.
  virtual void on_add(EntryIndex) {}
  virtual void on_replace(EntryIndex, EntryIndex) {}
  /// A model was asked for; the history knows. Its weight is over all devices.
  virtual void on_request(const History&, const Candidate&, RequestClock) {}
  /// A model was made to leave, by this score.
  virtual void on_evict(double /*score*/) {}

 protected:
  Expert(const Expert&) = default;
};

/// The experts there are.
///
///   lru       the time of the last request
///   gap       cost / weight * rate of the last gaps
///   mix       cost / weight * the geometric mean of that rate and of the one decayed over 1,000
///   decay     cost / weight * rate decayed over 4,000 requests
///   gdsf      GreedyDual-Size-Frequency (Cherkasova 1998), with a count that decays over 2,000
///             requests and outlives evictions: L + cost / weight * count as of the last request,
///             where L is the worth of the last one that was made to leave
///   due       cost / weight / (requests from when it is due, or since, and what that may be wrong
///             by): see Due in expert.cpp
///   next-use  cost / weight / the requests until the next one, as learned: see NextUse
[[nodiscard]] std::unique_ptr<Expert> make_expert(std::string_view name);

/// In the order in which the ensembles have them: the first one leads at the beginning, the last
/// one is only in the ensemble that learns.
inline constexpr std::array<std::string_view, 7> kExperts{"lru",   "mix", "gdsf",    "gap",
                                                          "decay", "due", "next-use"};

}  // namespace modelyard

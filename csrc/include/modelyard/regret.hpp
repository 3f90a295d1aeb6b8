#pragma once

#include <cstdint>
#include <vector>

#include "modelyard/types.hpp"

namespace modelyard {

/// What a cache that evicts by LRU would have spent on loading, had it been asked for the same
/// models. A yard's regret is measured against it:
///
///   regret = YardCounters::load_seconds - LruBill::seconds()
///
/// Above zero, the yard has loaded for longer than LRU would have; below zero, for less.
///
/// The cache. Every policy keeps one shadow of an LRU by bytes (Policy::lru_missed): the same
/// devices with the budgets they have now, one request after the other in the order of arrival, and
/// each load is over before the next request. It holds ids and sizes, no weights.
///
/// The price. Where the yard lacks the model as well, LRU's miss is owed until the yard's next load
/// of that model has ended, and then costs what that took: the same for both, whatever anybody
/// expected. First loads are such, which nobody avoids; they are in both sums, and cancel. Where
/// the yard has the model, the miss costs what the yard expects of a load of it at that moment,
/// which is a mean of those it has measured. What is owed for a model that is not loaded any more
/// is never paid.
///
/// What is not comparable:
/// - LRU's loads take no time, and nothing is in its way: no pins, no leases, no models that are
///   being unloaded, no closed devices, no back-off. Where the yard holds a model because of one of
///   these, the difference is no mistake of its policy. What a lowered budget leaves over stays
///   with LRU until its next miss.
/// - The yard serves requests for a resident model first. Where requests overlap, LRU takes them in
///   the order of arrival and loads more often: a regret below zero is in part what grouping saves.
/// - Requests that were refused or cancelled count for LRU, and what it is owed for them is paid by
///   the model's next load, whoever that is for. Loads that failed cost neither.
/// - LRU has no host tier. Where the yard loads from a copy, or would, LRU's miss is priced so.
/// - Of models that may be placed in several ways, LRU takes what they hold now, else the first
///   way. Shares count by each holder's part.
/// - A load of the yard that runs now is in neither sum yet.
///
/// So a single second means nothing. A regret that grows for hours says that LRU would do better.
///
/// Not thread-safe.
class LruBill {
 public:
  /// A slot starts anew: what its last model was owed is forgotten.
  void add(EntryIndex entry) {
    if (owed_.size() <= entry) owed_.resize(entry + std::size_t{1});
    owed_[entry] = 0;
  }
  /// A request was a miss for LRU. If the yard `has_it`, it costs what a load is `expected` to
  /// take.
  void missed(EntryIndex entry, double expected, bool has_it) {
    ++misses_;
    if (has_it) {
      seconds_ += expected;
    } else {
      ++owed_[entry];
    }
  }
  /// A load of the model has taken so long.
  void measured(EntryIndex entry, double seconds) {
    seconds_ += static_cast<double>(owed_[entry]) * seconds;
    owed_[entry] = 0;
  }

  /// Seconds that LRU would have spent on loading.
  [[nodiscard]] double seconds() const { return seconds_; }
  /// Requests that were misses for LRU, those included that are not paid.
  [[nodiscard]] std::uint64_t misses() const { return misses_; }

 private:
  std::vector<std::uint64_t> owed_;  // By entry: misses since its last load.
  double seconds_{0};
  std::uint64_t misses_{0};
};

}  // namespace modelyard

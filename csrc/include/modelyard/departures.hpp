#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "modelyard/explain.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// How old a model was when it was made to leave.
struct Age {
  Duration idle{};    ///< Since it was last asked for. A request that waited for its load asked
                      ///< before that: this may be the longer of the two.
  Duration stayed{};  ///< Since its load ended.
};

/// Which models were made to leave, by cause, and how old the last victims were.
///
/// A victim is a model that was chosen to leave, for another one or for a budget. Models that leave
/// for other causes are counted, but their age says nothing of how well victims are chosen.
///
/// Invariant: as many ages as victims, up to the last kRecent. Not thread-safe.
class Departures {
 public:
  static constexpr std::size_t kRecent = 256;

  /// A slot starts anew.
  void add(EntryIndex entry) {
    if (times_.size() <= entry) times_.resize(entry + std::size_t{1});
    times_[entry] = Times{};
  }
  /// A model was asked for.
  void asked(EntryIndex entry, Tick now) { times_[entry].asked = now; }
  /// A load of it has ended.
  void loaded(EntryIndex entry, Tick now) { times_[entry].loaded = now; }
  /// A resident model was told to leave. Returns how old it was.
  Age left(EntryIndex entry, Why why, Tick now) {
    const Age age{.idle = now - times_[entry].asked, .stayed = now - times_[entry].loaded};
    ++counts_[static_cast<std::size_t>(why)];
    if (is_choice(why)) {
      if (ages_.size() < kRecent) {
        ages_.push_back(age);
      } else {
        ages_[next_] = age;
      }
      next_ = (next_ + 1) % kRecent;
    }
    return age;
  }

  /// True if somebody had to go and a policy chose whom.
  [[nodiscard]] static bool is_choice(Why why) { return why == Why::kModel || why == Why::kBudget; }
  /// Models that were told to leave for a cause, idle or in use.
  [[nodiscard]] std::uint64_t count(Why why) const {
    return counts_[static_cast<std::size_t>(why)];
  }
  /// Of the last victims, in no order.
  [[nodiscard]] const std::vector<Age>& ages() const { return ages_; }

 private:
  struct Times {
    Tick asked{};
    Tick loaded{};
  };

  std::vector<Times> times_;  // By entry.
  std::array<std::uint64_t, kWhyCount> counts_{};
  std::vector<Age> ages_;
  std::size_t next_{0};  // Where the next age goes.
};

}  // namespace modelyard

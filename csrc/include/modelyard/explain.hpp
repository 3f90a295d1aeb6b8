#pragma once

#include <cstdint>
#include <deque>
#include <string_view>

#include "modelyard/types.hpp"

namespace modelyard {

/// What the yard decided or was told.
enum class Decision : std::uint8_t {
  kLoadStarted,
  kLoadDone,
  kLoadFailed,
  kEvicted,      ///< Made to leave for another model, or for a budget.
  kDrained,      ///< Told to take no more requests, for another model or for a budget.
  kUnloaded,     ///< Its memory is back.
  kQuarantined,  ///< Some of its memory is not.
  kRefused,
  kOvershoot,  ///< Turned out larger than what was reserved.
  kBudgetChanged,
};

[[nodiscard]] std::string_view to_string(Decision decision);

/// One decision. Fields that a decision has no use for are zero.
struct Explanation {
  std::uint64_t sequence{0};
  Tick at{};
  Decision decision{Decision::kLoadStarted};
  ModelId model{};    ///< Whom it was about.
  ModelId cause{};    ///< For whom it was done.
  double score{0};    ///< By which score the model was chosen.
  Bytes bytes{};      ///< How much memory it was about, over all devices.
  Duration waited{};  ///< How long the oldest request had waited for it.
};

/// The last decisions, oldest first. Bounded: the oldest is dropped for a new one. Not thread-safe.
class ExplainLog {
 public:
  explicit ExplainLog(std::size_t capacity) : capacity_(capacity) {}

  /// Adds a decision and numbers it.
  void add(Explanation explanation);

  [[nodiscard]] const std::deque<Explanation>& entries() const { return entries_; }

 private:
  std::size_t capacity_;
  std::uint64_t next_sequence_{1};
  std::deque<Explanation> entries_;
};

}  // namespace modelyard

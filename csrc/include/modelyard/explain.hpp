#pragma once

#include <cstddef>
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
  kEvicted,      ///< An idle model was made to leave; see `why`.
  kDrained,      ///< A model in use was told to take no more requests; see `why`.
  kUnloaded,     ///< Its memory is back.
  kQuarantined,  ///< Some of its memory is not.
  kRefused,
  kOvershoot,  ///< Turned out larger than what was reserved.
  kBudgetChanged,
  kPinned,
  kUnpinned,
  kDeviceClosed,
  kDeviceOpened,
  kQueued,       ///< The first request began to wait for it.
  kLost,         ///< Its memory is gone without anybody having asked.
  kCopyKept,     ///< A copy of it is on the host tier.
  kCopyDropped,  ///< That copy is to go; see `why`. `score` is by which it was chosen.
};

/// Why a model was made to leave.
enum class Why : std::uint8_t {
  kNone,
  kModel,         ///< For another model; see `cause`.
  kBudget,        ///< `device` holds more than its budget.
  kDeviceClosed,  ///< `device` was closed.
  kAsked,         ///< Somebody asked for it by hand.
  kRemoved,
  kLost,          ///< Its memory was gone already: what held it has died.
  kNotWorth,      ///< Loading from the copy takes no less time than from files.
  kDeviceBehind,  ///< `device` is behind with its work, and another one where it may be is not.
};

inline constexpr std::size_t kWhyCount = static_cast<std::size_t>(Why::kDeviceBehind) + 1;

[[nodiscard]] std::string_view to_string(Why why);

[[nodiscard]] std::string_view to_string(Decision decision);

/// One decision. Fields that a decision has no use for are zero.
struct Explanation {
  std::uint64_t sequence{0};
  Tick at{};
  Decision decision{Decision::kLoadStarted};
  ModelId model{};  ///< Whom it was about.
  Why why{Why::kNone};
  ModelId cause{};                ///< For whom it was done.
  DeviceIndex device{kNoDevice};  ///< Which device it was about or done for.
  double score{0};                ///< By which score the model was chosen.
  Bytes bytes{};  ///< How much memory it was about, over all devices: of a model that leaves, what
                  ///< comes back with it.
  Bytes shared_bytes{};  ///< What else the model holds, and others with it: stays when it leaves.
  Duration waited{};     ///< How long the oldest request had waited for it.

  // Of a resident model that was made to leave:
  Duration idle{};             ///< Since it was last asked for.
  Duration stayed{};           ///< Since its load ended.
  double expected_seconds{0};  ///< What its next load was expected to take then.
  std::string_view rule{};     ///< By which rule it was chosen, if it was; of static storage.

  // Of a load that has ended:
  std::uint64_t waiting_count{0};  ///< Requests that had waited for it,
  Duration waited_sum{};           ///< and for how long, all of them together.
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

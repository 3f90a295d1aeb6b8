#include "modelyard/explain.hpp"

namespace modelyard {

std::string_view to_string(Decision decision) {
  switch (decision) {
    case Decision::kLoadStarted:
      return "LOAD_STARTED";
    case Decision::kLoadDone:
      return "LOAD_DONE";
    case Decision::kLoadFailed:
      return "LOAD_FAILED";
    case Decision::kEvicted:
      return "EVICTED";
    case Decision::kDrained:
      return "DRAINED";
    case Decision::kUnloaded:
      return "UNLOADED";
    case Decision::kQuarantined:
      return "QUARANTINED";
    case Decision::kRefused:
      return "REFUSED";
    case Decision::kOvershoot:
      return "OVERSHOOT";
    case Decision::kBudgetChanged:
      return "BUDGET_CHANGED";
    case Decision::kPinned:
      return "PINNED";
    case Decision::kUnpinned:
      return "UNPINNED";
    case Decision::kDeviceClosed:
      return "DEVICE_DRAINED";
    case Decision::kDeviceOpened:
      return "DEVICE_UNDRAINED";
    case Decision::kQueued:
      return "QUEUED";
    case Decision::kLost:
      return "LOST";
    case Decision::kCopyKept:
      return "COPY_KEPT";
    case Decision::kCopyDropped:
      return "COPY_DROPPED";
  }
  return "?";
}

std::string_view to_string(Why why) {
  switch (why) {
    case Why::kNone:
      return "NONE";
    case Why::kModel:
      return "MODEL";
    case Why::kBudget:
      return "BUDGET";
    case Why::kDeviceClosed:
      return "DEVICE_CLOSED";
    case Why::kAsked:
      return "OPERATOR";
    case Why::kRemoved:
      return "REMOVED";
    case Why::kLost:
      return "LOST";
    case Why::kNotWorth:
      return "NOT_WORTH";
    case Why::kDeviceBehind:
      return "DEVICE_BEHIND";
  }
  return "?";
}

void ExplainLog::add(Explanation explanation) {
  explanation.sequence = next_sequence_++;
  if (capacity_ == 0) return;
  if (entries_.size() == capacity_) entries_.pop_front();
  entries_.push_back(explanation);
}

}  // namespace modelyard

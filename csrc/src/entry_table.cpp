#include "modelyard/entry_table.hpp"

#include "modelyard/action.hpp"

namespace modelyard {

std::string_view to_string(State state) {
  switch (state) {
    case State::kCold:
      return "COLD";
    case State::kQueued:
      return "QUEUED";
    case State::kLoading:
      return "LOADING";
    case State::kResident:
      return "RESIDENT";
    case State::kDraining:
      return "DRAINING";
    case State::kUnloading:
      return "UNLOADING";
    case State::kFailed:
      return "FAILED";
  }
  return "?";
}

std::string_view to_string(CopyState state) {
  switch (state) {
    case CopyState::kNone:
      return "NONE";
    case CopyState::kAwaited:
      return "AWAITED";
    case CopyState::kMaking:
      return "MAKING";
    case CopyState::kKept:
      return "KEPT";
    case CopyState::kDropping:
      return "DROPPING";
  }
  return "?";
}

std::string_view to_string(RefuseReason reason) {
  switch (reason) {
    case RefuseReason::kNeverFits:
      return "NEVER_FITS";
    case RefuseReason::kBudgetExhausted:
      return "BUDGET_EXHAUSTED";
    case RefuseReason::kQueueFull:
      return "QUEUE_FULL";
    case RefuseReason::kLoadFailed:
      return "LOAD_FAILED";
    case RefuseReason::kDeadlineInQueue:
      return "DEADLINE_IN_QUEUE";
    case RefuseReason::kDeadlineUnreachable:
      return "DEADLINE_UNREACHABLE";
    case RefuseReason::kDeadlineInLoad:
      return "DEADLINE_IN_LOAD";
    case RefuseReason::kRemoved:
      return "REMOVED";
  }
  return "?";
}

}  // namespace modelyard

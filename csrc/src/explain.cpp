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

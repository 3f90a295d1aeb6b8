#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "diary.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// Errors are given exactly where the contract says, and are the ones it names.
class ErrorReferee : protected Diary {
 protected:
  using Diary::Diary;

  [[nodiscard]] Verdict judge_result(const Event& event, const Outcome& outcome) const {
    const std::set<ErrorCode> expected = expected_errors(event);
    if (outcome.error ? expected.contains(*outcome.error) : expected.empty()) return std::nullopt;
    if (!outcome.error) return "the call succeeded where it should have failed";
    if (expected.empty()) return "the call failed: " + outcome.message;
    return "the call failed with error " + std::to_string(static_cast<int>(*outcome.error)) +
           " instead of " + std::to_string(static_cast<int>(*expected.begin())) + ": " +
           outcome.message;
  }

 private:
  [[nodiscard]] bool valid(const Charge& amounts) const {
    bool good = amounts.within(budgets_.size());
    amounts.for_each([&](DeviceIndex, Bytes bytes) { good = good && is_valid(bytes); });
    return good;
  }

  [[nodiscard]] bool valid(const std::vector<Charge>& placements) const {
    return !placements.empty() && placements.size() <= 16 &&
           std::all_of(placements.begin(), placements.end(),
                       [&](const Charge& each) { return valid(each); });
  }

  // What is wrong with the shares a model is said to be made of.
  [[nodiscard]] std::set<ErrorCode> share_errors(const ModelSpec& spec) const {
    std::set<ErrorCode> wrong;
    const auto known = [&](ShareId share) { return shares_.contains(share); };
    const auto exists = [&](DeviceIndex on) {
      return on == kNoDevice || position(on) < budgets_.size();
    };
    const std::set<ShareId> distinct(spec.shares.begin(), spec.shares.end());
    if (!std::all_of(distinct.begin(), distinct.end(), known)) wrong.insert(ErrorCode::kStaleId);
    if (distinct.size() != spec.shares.size() ||
        (!spec.shares_on.empty() && spec.shares_on.size() != spec.placements.size()) ||
        !std::all_of(spec.shares_on.begin(), spec.shares_on.end(), exists)) {
      wrong.insert(ErrorCode::kInvalidArgument);
    }
    return wrong;
  }

  // The errors the contract allows, where several things are wrong at once; none for success.
  [[nodiscard]] std::set<ErrorCode> expected_errors(const Event& event) const {
    std::set<ErrorCode> expected;
    if (const std::optional<ErrorCode> error = expected_error(event)) expected.insert(*error);
    const auto found = models_.find(event.model);
    const bool known = found != models_.end() && !found->second.removed;
    if (event.kind == EventKind::kAddModel ||
        (event.kind == EventKind::kUpdatePlacements && known)) {
      expected.merge(share_errors(event.spec));
    }
    return expected;
  }

  // Which error the contract asks for, shares of a model aside; nullopt for success.
  [[nodiscard]] std::optional<ErrorCode> expected_error(const Event& event) const {
    const auto found = models_.find(event.model);
    const Model* model = found == models_.end() ? nullptr : &found->second;
    const bool known = model != nullptr && !model->removed;
    const auto in = [&](Phase phase) { return model->phase == phase; };
    switch (event.kind) {
      case EventKind::kAddModel:
        if (!valid(event.spec.placements)) return ErrorCode::kInvalidArgument;
        if (!(event.spec.reload_seconds > 0) || !std::isfinite(event.spec.reload_seconds)) {
          return ErrorCode::kInvalidArgument;
        }
        if (event.spec.replaces) {
          const auto old = models_.find(*event.spec.replaces);
          if (old == models_.end() || old->second.removed) return ErrorCode::kStaleId;
        }
        return std::nullopt;
      case EventKind::kUpdatePlacements:
        if (!known) return ErrorCode::kStaleId;
        if (!valid(event.spec.placements)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kRemoveModel:
      case EventKind::kPin:
      case EventKind::kUnpin:
      case EventKind::kTryAcquire:
      case EventKind::kRequest:
      case EventKind::kForgive:
        if (!known) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kUnload:
        if (!known) return ErrorCode::kStaleId;
        if (model->pinned) return ErrorCode::kPinned;
        return std::nullopt;
      case EventKind::kSetBudget:
        if (position(event.device) >= budgets_.size() || !is_valid(event.budget)) {
          return ErrorCode::kInvalidArgument;
        }
        return std::nullopt;
      case EventKind::kSetClosed:
        if (position(event.device) >= budgets_.size()) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kCancel:
        if (!tickets_.contains(event.ticket)) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kRelease:
        if (!leases_.contains(event.lease)) return ErrorCode::kStaleId;
        return std::nullopt;
      case EventKind::kLoadDone:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kLoading)) return ErrorCode::kWrongState;
        if (!valid(event.charge)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kLoadFailed:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kLoading)) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kUnloadDone:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kUnloading)) return ErrorCode::kWrongState;
        if (const auto error = kept_error(event, *model)) return error;
        if (!valid(event.charge) || !event.charge.fits_within(exclusive(event.model))) {
          return ErrorCode::kInvalidArgument;
        }
        return std::nullopt;
      case EventKind::kReclaimed:
        if (model == nullptr) return ErrorCode::kStaleId;
        // Also what copies have left on the tier.
        if (!event.charge.fits_within(model->quarantined)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kRemeasured:
        // A fact about memory that is held, also where the model is removed.
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kResident) && !in(Phase::kDraining)) return ErrorCode::kWrongState;
        if (!valid(event.charge)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kLost:
        // The same: who holds it has died, removed or not.
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!in(Phase::kResident) && !in(Phase::kDraining)) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kAddShare:
        if (!is_valid(event.budget) || event.budget == Bytes{0}) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kSplitShare: {
        const auto share = shares_.find(event.share);
        if (share == shares_.end()) return ErrorCode::kStaleId;
        const std::int64_t part = event.budget.value;
        if (part <= 0 || part >= share->second.bytes) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      }
      case EventKind::kForgetShare:
        if (!shares_.contains(event.share)) return ErrorCode::kStaleId;
        if (models_made_of(event.share) > 0) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kSetTierBudget:
      case EventKind::kCopyDropped:
      case EventKind::kCopyInUse:
      case EventKind::kCopyLost:
        return tier_error(event);
      case EventKind::kTick:
        return std::nullopt;
    }
    return std::nullopt;
  }
};

}  // namespace modelyard::test

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "books.hpp"
#include "event.hpp"
#include "modelyard/yard.hpp"
#include "price_book.hpp"

namespace modelyard::test {

/// The referee's second opinion on the host tier: what copies hold there, counted anew whenever it
/// is asked for, and the promises of yard.hpp about them:
///   - the tier's account is the sum of the copies, their shares charged once (I9, I10);
///   - a copy is asked for only of a model on devices above the tier that has none and has left
///   none behind that did not come back, has not been asked to leave and is not lost, if it pays,
///   and into free bytes; and it is, if nothing is in the way;
///   - an unload is held back only while dropped copies make room for it in whose memory nobody is,
///   goes in its turn, and is given up when the room will not come;
///   - a dropped copy in whose memory somebody is holds its bytes and shares until it is back;
///   - a copy is dropped because its model is to leave for good, because it is lost, because the
///   tier is over its budget, or for another copy, and then no copy too many; never while a load
///   may read from it;
///   - a deficit of the tier is repaid by whoever can.
/// Which copies go for another is the policy's business, of which it knows nothing.
class TierReferee : protected Books {
 public:
  using Verdict = std::optional<std::string>;

  [[nodiscard]] bool has_tier() const { return has_tier_; }
  /// Where copies are charged: behind the devices.
  [[nodiscard]] DeviceIndex tier() const { return at(budgets_.size()); }
  [[nodiscard]] Bytes tier_budget() const { return Bytes{tier_budget_}; }

  /// What comes back when a model's copy goes: its own, and the shares that no other copy holds.
  [[nodiscard]] Bytes copy_exclusive(ModelId id) const {
    const CopyOf& copy = models_.at(id).copy;
    std::int64_t total = copy.own;
    for (const ShareId share : copy.shares) {
      if (copies_of(share, {}) == 1) total += shares_.at(share).bytes;
    }
    return Bytes{total};
  }

  /// A load of it has been measured.
  [[nodiscard]] bool was_loaded(ModelId model) const { return prices_.was_loaded(model); }

  /// What a rest may not find: an unload that is held back, a copy on its way in or out.
  [[nodiscard]] Verdict unrest() const {
    for (const auto& [id, model] : models_) {
      if (model.copy.phase == CopyPhase::kNone || model.copy.phase == CopyPhase::kKept) continue;
      return describe(id) + ": its copy is at rest neither here nor away";
    }
    return std::nullopt;
  }

 protected:
  explicit TierReferee(const YardOptions& options)
      : Books(options.budgets),
        has_tier_(options.tier_budget > Bytes{0}),
        tier_budget_(options.tier_budget.value),
        padding_(options.copy_padding.value),
        above_(options.above_tier) {}

  // --- Bytes ------------------------------------------------------------------------------------

  // Copies that hold a share, in one of some phases; in any if none is named.
  [[nodiscard]] std::size_t copies_of(ShareId share, const std::set<CopyPhase>& phases) const {
    std::size_t found = 0;
    for (const auto& [id, model] : models_) {
      if (!phases.empty() && !phases.contains(model.copy.phase)) continue;
      const auto& list = model.copy.shares;
      found += static_cast<std::size_t>(std::count(list.begin(), list.end(), share));
    }
    return found;
  }

  // Own bytes of copies in a phase, and the shares charged as that: as their liveliest copy.
  [[nodiscard]] std::int64_t tier_bytes(CopyPhase phase) const {
    std::int64_t total = 0;
    for (const auto& [id, model] : models_) {
      if (model.copy.phase == phase) total += model.copy.own;
    }
    for (const auto& [share, bytes] : shares_) {
      for (const CopyPhase each :
           {CopyPhase::kKept, CopyPhase::kMaking, CopyPhase::kInUse, CopyPhase::kDropping}) {
        if (copies_of(share, {each}) == 0) continue;
        if (each == phase) total += bytes.bytes;
        break;
      }
    }
    return total;
  }

  [[nodiscard]] std::int64_t tier_quarantined() const {
    std::int64_t total = 0;
    for (const auto& [id, model] : models_) total += model.quarantined.on(tier()).value;
    return total;
  }
  [[nodiscard]] std::int64_t tier_used() const {
    return tier_quarantined() + tier_bytes(CopyPhase::kMaking) + tier_bytes(CopyPhase::kKept) +
           tier_bytes(CopyPhase::kInUse) + tier_bytes(CopyPhase::kDropping);
  }
  // Below zero by the deficit.
  [[nodiscard]] std::int64_t tier_room() const { return tier_budget_ - tier_used(); }
  [[nodiscard]] std::int64_t tier_room_then() const {
    return tier_room() + tier_bytes(CopyPhase::kDropping);
  }
  [[nodiscard]] std::int64_t tier_deficit() const {
    return std::max<std::int64_t>(-tier_room(), 0);
  }

  [[nodiscard]] static std::int64_t own_bytes_of(const Model& model) {
    std::int64_t total = 0;
    model.held.for_each([&](DeviceIndex, Bytes bytes) { total += bytes.value; });
    return total;
  }
  // What a copy of a model is expected to hold alone.
  [[nodiscard]] std::int64_t own_bytes_of_copy(const Model& model) const {
    return model.copy_bytes > 0 ? model.copy_bytes : own_bytes_of(model) + padding_;
  }
  // All bytes of a model: what it holds, or, if that is nothing, what its copy does.
  [[nodiscard]] std::int64_t weight_of(const Model& model) const {
    const bool here = !model.held.empty() || !model.held_shares.empty();
    std::int64_t total = here ? own_bytes_of(model) : model.copy.own;
    for (const ShareId share : here ? model.held_shares : model.copy.shares) {
      total += shares_.at(share).bytes;
    }
    return total;
  }

  // What a copy of a model needs beside what copies hold there now.
  [[nodiscard]] std::int64_t copy_need(const Model& model) const { return copy_need(model, {}); }
  // The same when those that are being dropped have gone; not those in whose memory somebody is.
  [[nodiscard]] std::int64_t copy_need_then(const Model& model) const {
    return copy_need(model, {CopyPhase::kMaking, CopyPhase::kKept, CopyPhase::kInUse});
  }

  // --- Errors -----------------------------------------------------------------------------------

  [[nodiscard]] std::optional<ErrorCode> tier_error(const Event& event) const {
    const auto found = models_.find(event.model);
    const Model* model = found == models_.end() ? nullptr : &found->second;
    switch (event.kind) {
      case EventKind::kSetTierBudget:
        if (!has_tier_) return ErrorCode::kWrongState;
        if (!is_valid(event.budget)) return ErrorCode::kInvalidArgument;
        return std::nullopt;
      case EventKind::kCopyDropped:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!is_leaving(model->copy.phase)) return ErrorCode::kWrongState;
        if (event.budget < Bytes{0} || event.budget > copy_exclusive(event.model)) {
          return ErrorCode::kInvalidArgument;
        }
        return std::nullopt;
      case EventKind::kCopyInUse:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (!is_leaving(model->copy.phase)) return ErrorCode::kWrongState;
        return std::nullopt;
      case EventKind::kCopyLost:
        if (model == nullptr) return ErrorCode::kStaleId;
        if (model->copy.phase != CopyPhase::kKept) return ErrorCode::kWrongState;
        return std::nullopt;
      default:
        return std::nullopt;
    }
  }

  // What is wrong with the copy that an unload is said to have made.
  [[nodiscard]] std::optional<ErrorCode> kept_error(const Event& event, const Model& model) const {
    if (model.copy.phase == CopyPhase::kAwaited) return ErrorCode::kWrongState;
    if (!event.kept) return std::nullopt;
    if (model.copy.phase != CopyPhase::kMaking) return ErrorCode::kWrongState;
    // What was promised room is made, and nothing else; with its shares it has a bound.
    std::int64_t total = event.kept->bytes.value;
    if (!is_valid(event.kept->bytes)) return ErrorCode::kInvalidArgument;
    if (event.kept->made != (total <= model.copy.own)) return ErrorCode::kInvalidArgument;
    for (const ShareId share : model.copy.shares) total += shares_.at(share).bytes;
    if (total > kMaxBytes) return ErrorCode::kInvalidArgument;
    return std::nullopt;
  }

  // --- Facts ------------------------------------------------------------------------------------

  void begin_call(const Event& event) {
    dropped_.clear();
    new_held_back_.clear();
    uncopied_.clear();
    waited_before_ = !held_back_.empty();
    deficit_before_ = tier_deficit();
    const auto subject = models_.find(event.model);
    const bool known = subject != models_.end();
    leaves_after_ = known && subject->second.goes_after;
    asked_before_ = known && subject->second.asked;
    queued_before_ =
        known && subject->second.phase == Phase::kAway && !subject->second.waiting.empty();
  }

  // What the event says of copies; before the referee writes down what it says of the model.
  void believe_tier(const Event& event, const Outcome& outcome) {
    switch (event.kind) {
      case EventKind::kAddModel:
        prices_.add(outcome.model, event.spec.reload_seconds, event.spec.replaces);
        return;
      case EventKind::kSetTierBudget:
        tier_budget_ = event.budget.value;
        return;
      default:
        break;
    }
    const auto found = models_.find(event.model);
    if (found != models_.end()) believe_copy(event, found->first, found->second);
  }

  // The facts of load_done that need the model as it is after it.
  void believe_times(const Event& event) {
    const Model& model = models_.at(event.model);
    taught_ = prices_.loaded(event.model, event.source, event.took, weight_of(model));
  }

  // --- Actions ----------------------------------------------------------------------------------

  [[nodiscard]] bool is_held_back(const Model& model) const {
    return model.phase == Phase::kUnloading && model.copy.phase == CopyPhase::kAwaited;
  }

  // A model is given back, with a copy or without.
  [[nodiscard]] Verdict obey_keep(ModelId id, Model& model, const Unload& unload) {
    const bool waited = is_held_back(model);
    const bool keep = unload.keep;
    if (unload.most != Bytes{keep ? own_bytes_of_copy(model) : 0}) return "the most is another";
    if (!keep) {
      if (waited) {
        model.copy = CopyOf{};
        std::erase(held_back_, id);
      } else if (may_be_copied(model) && pays(id, model) > 0 &&
                 copy_need_then(model) <= tier_room()) {
        uncopied_.push_back(id);
      }
      return std::nullopt;
    }
    if (!has_tier_) return "there is no tier for a copy";
    if (!waited && model.copy.phase != CopyPhase::kNone) return "there is a copy of it already";
    if (waited) model.copy = CopyOf{};
    if (!may_be_copied(model)) return "no copy of it is to be made";
    if (!waited && pays(id, model) < 0) return "a copy does not pay";
    if (in_order_ && !held_back_.empty() && held_back_.front() != id) {
      return "an older one waits for room on the tier";
    }
    if (copy_need(model) > 0 && copy_need(model) > tier_room()) return "no room on the tier";
    std::erase(held_back_, id);
    model.copy = {CopyPhase::kMaking, own_bytes_of_copy(model), model.held_shares};
    return std::nullopt;
  }

  [[nodiscard]] Verdict obey_drop(const Event& event, const DropCopy& drop) {
    const auto found = models_.find(drop.model);
    if (found == models_.end()) return "no such model";
    Model& model = found->second;
    if (model.copy.phase != CopyPhase::kKept) return "there is no copy to be dropped";
    if (is_no_gain(event, drop.model, model)) return drop_it(drop.model, model);
    const bool goes = event.model == drop.model &&
                      (event.kind == EventKind::kRemoveModel || event.kind == EventKind::kCopyLost);
    if (model.phase == Phase::kLoading && !goes) return "a load may be reading from the copy";
    return drop_it(drop.model, model);
  }

  [[nodiscard]] Verdict drop_it(ModelId id, Model& model) {
    model.copy.phase = CopyPhase::kDropping;
    dropped_.push_back(id);
    return std::nullopt;
  }

  // A load from the copy has just shown that files are no slower, or may be no slower.
  [[nodiscard]] bool is_no_gain(const Event& event, ModelId id, const Model& model) const {
    if (event.kind != EventKind::kLoadDone || event.model != id ||
        event.source != modelyard::Source::kCopy) {
      return false;
    }
    const std::int64_t bytes = weight_of(model);
    const double files = prices_.from_files(id);
    return prices_.from_copy(id, bytes) >= files * (1 - 1e-9);
  }

  // Unloads that the yard holds back show in no action, only in what it says of the model.
  [[nodiscard]] Verdict find_held_back(const Yard& yard) {
    for (auto& [id, model] : models_) {
      const Entry* entry = yard.entry(id);
      const bool there = model.phase == Phase::kResident || model.phase == Phase::kDraining;
      if (entry == nullptr || entry->copy.state != CopyState::kAwaited || !there) continue;
      const std::string who = describe(id) + " is held back, and ";
      if (!model.leases.empty()) return who + "somebody uses it";
      if (model.phase == Phase::kResident && model.pinned) return who + "it is pinned";
      if (model.copy.phase != CopyPhase::kNone) return who + "there is a copy already";
      if (!may_be_copied(model)) return who + "no copy of it is to be made";
      if (pays(id, model) < 0) return who + "a copy does not pay";
      model.phase = Phase::kUnloading;
      model.copy.phase = CopyPhase::kAwaited;
      new_held_back_.push_back(id);
    }
    if (held_back_.empty()) in_order_ = true;
    // Of several at once nothing says who came first.
    in_order_ = in_order_ && new_held_back_.size() <= 1;
    held_back_.insert(held_back_.end(), new_held_back_.begin(), new_held_back_.end());
    return std::nullopt;
  }

  // --- After the call ---------------------------------------------------------------------------

  [[nodiscard]] Verdict compare_tier(const Yard& yard) const {
    if (yard.tier() != (has_tier_ ? tier() : kNoDevice)) return "the tier is elsewhere";
    for (const auto& [id, model] : models_) {
      const Entry& entry = *yard.entry(id);
      if (entry.copy.state != state_of(model.copy.phase)) {
        return describe(id) + ": its copy is " + std::string(to_string(entry.copy.state));
      }
      const Bytes own{model.copy.own};
      if (entry.copy.held != (has_tier_ ? Charge(tier(), own) : Charge{})) {
        return describe(id) + ": its copy holds other bytes";
      }
      if (entry.copy.in_use != (model.copy.phase == CopyPhase::kInUse)) {
        return describe(id) + ": its copy is in use, or is not";
      }
      if (entry.copy.shares != model.copy.shares) return describe(id) + ": other shares are copied";
      if (has_tier_ && yard.copy_exclusive(id) != copy_exclusive(id)) {
        return describe(id) + ": other bytes of the copy are exclusive";
      }
    }
    if (!has_tier_) return std::nullopt;
    for (const auto& [id, bytes] : shares_) {
      const Holders& there = yard.share(id)->on(tier());
      if (there.of(Holding::kLoading) != copies_of(id, {CopyPhase::kMaking}) ||
          there.of(Holding::kResident) != copies_of(id, {CopyPhase::kKept}) ||
          there.of(Holding::kUnloading) != copies_of(id, {CopyPhase::kDropping}) ||
          there.of(Holding::kDraining) != copies_of(id, {CopyPhase::kInUse}) || there.pinned != 0) {
        return describe(id) + ": holders on the tier differ";
      }
    }
    return compare_account(yard.account(tier()));
  }

  [[nodiscard]] Verdict check_tier(const Event& event) const {
    if (!has_tier_) return std::nullopt;
    if (tier_deficit() > deficit_before_ && event.kind != EventKind::kSetTierBudget) {
      return "the deficit of the tier grew without a reason";
    }
    if (Verdict verdict = check_departures(event)) return verdict;
    if (Verdict verdict = check_held_back()) return verdict;
    if (Verdict verdict = check_drops(event)) return verdict;
    if (Verdict verdict = check_tier_repayment()) return verdict;
    const bool free_tier = !waited_before_ && held_back_.empty();
    if (free_tier && !uncopied_.empty()) {
      return describe(uncopied_.front()) + " left without a copy that pays and fits";
    }
    return std::nullopt;
  }

  // What a load is expected to take, right after one was measured; also of other models that were
  // loaded once only, if that one has taught what reloads take.
  [[nodiscard]] Verdict check_price(const Event& event, const Yard& yard) const {
    if (event.kind != EventKind::kLoadDone) return std::nullopt;
    for (const auto& [id, model] : models_) {
      const Entry* entry = yard.entry(id);
      const bool copied =
          model.copy.phase == CopyPhase::kMaking || model.copy.phase == CopyPhase::kKept;
      const bool told = id == event.model || (taught_ && !copied && prices_.was_loaded_once(id));
      if (!told || entry == nullptr) continue;
      const double expected = std::max(
          copied ? prices_.from_copy(id, weight_of(model)) : prices_.expected_from_files(id), 1e-6);
      const double said = entry->reload_seconds;
      if (said > expected * 0.999999 && said < expected * 1.000001) continue;
      return describe(id) + ": a load is expected to take " + std::to_string(said) +
             " s instead of " + std::to_string(expected);
    }
    return std::nullopt;
  }

 private:
  [[nodiscard]] std::int64_t copy_need(const Model& model,
                                       const std::set<CopyPhase>& counted) const {
    std::int64_t total = own_bytes_of_copy(model);
    for (const ShareId share : model.held_shares) {
      if (copies_of(share, counted) == 0) total += shares_.at(share).bytes;
    }
    return total;
  }

  // Its weights may be copied as far as the model goes; if that pays is another question.
  [[nodiscard]] bool may_be_copied(const Model& model) const {
    if (!has_tier_ || model.removed || model.asked || model.lost) return false;
    if (model.copy.phase != CopyPhase::kNone) return false;
    if (model.quarantined.on(tier()) > Bytes{0}) return false;
    for (std::size_t where = 0; where < budgets_.size(); ++where) {
      const bool touched = model.held.on(at(where)) > Bytes{0} || model.held_shares_on == at(where);
      if (touched && !above_[where]) return false;
    }
    return true;
  }

  // Above zero if a copy clearly saves more seconds than it takes, below if clearly not, else zero.
  [[nodiscard]] int pays(ModelId id, const Model& model) const {
    const std::int64_t bytes = weight_of(model);
    const double gain = prices_.from_files(id) - prices_.from_copy(id, bytes);
    const double cost = prices_.keeping(bytes);
    const double doubt = 1e-9 * (prices_.from_files(id) + cost);
    if (gain > cost + doubt) return 1;
    return gain < cost - doubt ? -1 : 0;
  }

  void believe_copy(const Event& event, ModelId id, Model& model) {
    switch (event.kind) {
      case EventKind::kUnloadDone:
        if (model.copy.phase != CopyPhase::kMaking) break;
        if (event.kept) model.copy_bytes = event.kept->bytes.value;
        if (event.kept && event.kept->made) {
          prices_.kept(event.kept->took, weight_of(model));
          model.copy.phase = CopyPhase::kKept;
          model.copy.own = event.kept->bytes.value;
        } else {
          model.copy = CopyOf{};
        }
        break;
      case EventKind::kCopyDropped: {
        const Bytes missing = copy_exclusive(id) - event.budget;
        model.quarantined = sum(model.quarantined, Charge(tier(), missing));
        model.copy = CopyOf{};
        break;
      }
      case EventKind::kCopyInUse:
        model.copy.phase = CopyPhase::kInUse;
        break;
      case EventKind::kUpdatePlacements:
        model.copy_bytes = 0;
        break;
      case EventKind::kLost:
        model.lost = true;
        break;
      case EventKind::kRemoveModel:
        model.asked = true;
        break;
      case EventKind::kUnload:
        if (model.phase == Phase::kLoading) {
          model.goes_after = true;
        } else if (model.phase != Phase::kAway) {
          model.asked = true;
        }
        break;
      case EventKind::kPin:
        model.goes_after = false;
        break;
      case EventKind::kLoadDone:
        model.asked = model.goes_after || model.removed;
        model.goes_after = false;
        break;
      case EventKind::kLoadFailed:
        model.goes_after = false;
        break;
      default:
        break;
    }
  }

  // Who is asked to leave by hand, or removed, leaves no copy.
  [[nodiscard]] Verdict check_departures(const Event& event) const {
    const auto found = models_.find(event.model);
    if (found == models_.end()) return std::nullopt;
    const Model& model = found->second;
    bool leaves = false;
    switch (event.kind) {
      case EventKind::kUnload:
        leaves = model.phase != Phase::kLoading && !queued_before_;
        break;
      case EventKind::kRemoveModel:
      case EventKind::kCopyLost:
        leaves = true;
        break;
      case EventKind::kLoadDone:
      case EventKind::kLoadFailed:
        leaves = leaves_after_;
        break;
      case EventKind::kUnloadDone:
        leaves = asked_before_;
        break;
      default:
        break;
    }
    const bool stays =
        model.copy.phase == CopyPhase::kKept || model.copy.phase == CopyPhase::kAwaited;
    if (leaves && stays) return describe(event.model) + " was asked to leave, and its copy stays";
    return std::nullopt;
  }

  // Whose turn it is has been sent, and who will get no room has been given up.
  [[nodiscard]] Verdict check_held_back() const {
    std::int64_t older = 0;
    for (const ModelId id : held_back_) {
      const Model& model = models_.at(id);
      if (model.asked) return describe(id) + " is held back though it was asked to leave";
      if (tier_bytes(CopyPhase::kDropping) == 0) return describe(id) + " is held back for ever";
      if (!in_order_) continue;
      older += copy_need_then(model);
      if (older <= tier_room()) return describe(id) + " is held back needlessly";
      if (older > tier_room_then()) return describe(id) + " is held back in vain";
    }
    return std::nullopt;
  }

  [[nodiscard]] Verdict check_drops(const Event& event) const {
    std::vector<ModelId> for_room;
    for (const ModelId id : dropped_) {
      if (id == event.model) {
        const bool ends =
            event.kind == EventKind::kLoadDone || event.kind == EventKind::kLoadFailed;
        if (event.kind == EventKind::kUnload || event.kind == EventKind::kRemoveModel) continue;
        if (event.kind == EventKind::kCopyLost) continue;
        if (is_no_gain(event, id, models_.at(id))) continue;
        if (event.kind == EventKind::kUnloadDone && asked_before_) continue;
        if (ends && (leaves_after_ || models_.at(id).removed)) continue;
      }
      for_room.push_back(id);
    }
    if (for_room.empty()) return std::nullopt;
    const bool owed =
        without(for_room, [](const TierReferee& before) { return before.tier_room_then() < 0; });
    if (new_held_back_.empty() && !owed) return "a copy is dropped for nobody";
    if (!new_held_back_.empty() && (owed || new_held_back_.size() > 1)) return std::nullopt;
    for (const ModelId spared : for_room) {
      const bool enough = without({spared}, [&](const TierReferee& rest) {
        std::int64_t needed = 0;
        if (!owed) {
          for (const ModelId id : held_back_) needed += rest.copy_need_then(rest.models_.at(id));
        }
        return needed <= rest.tier_room_then();
      });
      if (enough) return "the copy of " + describe(spared) + " need not have been dropped";
    }
    return std::nullopt;
  }

  // Copies that could still give back bytes of a deficit that dropped ones do not cover are
  // dropped.
  [[nodiscard]] Verdict check_tier_repayment() const {
    if (tier_room_then() >= 0) return std::nullopt;
    TierReferee supposed(*this);
    for (auto& [id, model] : supposed.models_) {
      if (model.copy.phase == CopyPhase::kKept && model.phase != Phase::kLoading) {
        model.copy.phase = CopyPhase::kDropping;
      }
    }
    if (supposed.tier_room_then() == tier_room_then()) return std::nullopt;
    return "no copy repays the deficit of the tier";
  }

  // What `answer` is if the copies of some models were not being dropped.
  template <typename F>
  [[nodiscard]] bool without(const std::vector<ModelId>& drops, F&& answer) const {
    TierReferee supposed(*this);
    for (const ModelId id : drops) supposed.models_.at(id).copy.phase = CopyPhase::kKept;
    return answer(static_cast<const TierReferee&>(supposed));
  }

  [[nodiscard]] static CopyState state_of(CopyPhase phase) {
    switch (phase) {
      case CopyPhase::kNone:
        return CopyState::kNone;
      case CopyPhase::kAwaited:
        return CopyState::kAwaited;
      case CopyPhase::kMaking:
        return CopyState::kMaking;
      case CopyPhase::kKept:
        return CopyState::kKept;
      case CopyPhase::kInUse:
      case CopyPhase::kDropping:
        return CopyState::kDropping;
    }
    return CopyState::kNone;
  }

  [[nodiscard]] Verdict compare_account(const Account& account) const {
    if (account.budget != Bytes{tier_budget_}) return "the tier: another budget";
    if (account.reserved != Bytes{tier_bytes(CopyPhase::kMaking)}) {
      return "the tier: reserved bytes differ";
    }
    if (account.resident != Bytes{tier_bytes(CopyPhase::kKept)}) {
      return "the tier: kept bytes differ";
    }
    if (account.draining !=
        Bytes{tier_bytes(CopyPhase::kDropping) + tier_bytes(CopyPhase::kInUse)}) {
      return "the tier: bytes being dropped differ";
    }
    if (account.quarantined != Bytes{tier_quarantined()}) {
      return "the tier: quarantined bytes differ";
    }
    if (account.deficit != Bytes{tier_deficit()}) return "the tier: the deficit differs";
    if (account.peak < account.used()) return "the tier: the peak is below what is used";
    return std::nullopt;
  }

  bool has_tier_;
  std::int64_t tier_budget_;
  std::int64_t padding_;
  std::vector<bool> above_;
  PriceBook prices_;
  bool taught_{false};              // By the last load: what reloads from files take.
  std::vector<ModelId> held_back_;  // Oldest first, while `in_order_`.
  bool in_order_{true};

  // Of the call that is judged.
  std::vector<ModelId> dropped_;
  std::vector<ModelId> new_held_back_;
  std::vector<ModelId> uncopied_;  // Left without a copy though nothing was seen in its way.
  bool waited_before_{false};
  bool leaves_after_{false};
  bool asked_before_{false};
  bool queued_before_{false};
  std::int64_t deficit_before_{0};
};

}  // namespace modelyard::test

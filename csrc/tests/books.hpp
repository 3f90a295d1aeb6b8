#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// What a naive observer writes down about a yard: who is in which phase and holds what. Everything
/// else, also who holds a share and what it is charged as, is counted anew from that whenever it is
/// asked for.
class Books {
 public:
  enum class Phase : std::uint8_t { kAway, kLoading, kResident, kDraining, kUnloading };

  /// Of a model's copy on the host tier.
  /// In use: dropped, and somebody is still in its memory.
  enum class CopyPhase : std::uint8_t { kNone, kAwaited, kMaking, kKept, kInUse, kDropping };

  /// On its way out.
  static bool is_leaving(CopyPhase phase) {
    return phase == CopyPhase::kDropping || phase == CopyPhase::kInUse;
  }

  struct CopyOf {
    CopyPhase phase{CopyPhase::kNone};
    std::int64_t own{0};          ///< Bytes that it holds alone.
    std::vector<ShareId> shares;  ///< Held on the tier, with other copies.
  };

  struct Model {
    std::vector<Charge> placements;
    std::optional<std::uint32_t>
        in_use;  ///< The placement it was loaded by, unless replaced since.
    Phase phase{Phase::kAway};
    Charge held;
    Charge quarantined;
    std::vector<ShareId> shares;         ///< What it is made of, together with others.
    std::vector<DeviceIndex> shares_on;  ///< Where each placement holds them.
    std::vector<ShareId> held_shares;    ///< Held now, all on `held_shares_on`.
    DeviceIndex held_shares_on{kNoDevice};
    bool pinned{false};
    bool removed{false};
    bool stopping{false};  ///< CancelLoad was sent for the load that runs.
    std::set<LeaseId> leases;
    std::deque<TicketId> waiting;
    std::uint32_t failures{0};
    Tick retry_at{};
    Duration backoff{};
    CopyOf copy;
    std::int64_t copy_bytes{0};  ///< What its last copy held alone, or would have; zero if unknown.
    bool goes_after{false};      ///< Asked to leave by hand while it loads.
    bool asked{false};           ///< Asked to leave by hand, or removed, since it was loaded.
    bool lost{false};            ///< Its memory has gone since it was loaded.
  };

  struct SharedBytes {
    std::int64_t bytes{0};
    bool was_used{false};  ///< A model was made of it: it goes with its last one.
  };

  explicit Books(std::vector<Bytes> budgets)
      : budgets_(std::move(budgets)), closed_(budgets_.size(), false) {}

  [[nodiscard]] const std::map<ModelId, Model>& models() const { return models_; }
  [[nodiscard]] const std::map<ShareId, SharedBytes>& shares() const { return shares_; }
  [[nodiscard]] std::size_t device_count() const { return budgets_.size(); }
  [[nodiscard]] bool closed(std::size_t where) const { return closed_[where]; }
  [[nodiscard]] Bytes budget(std::size_t where) const { return budgets_[where]; }

  /// What comes back when a model leaves: its own, and the shares that nobody else holds.
  [[nodiscard]] Charge exclusive(ModelId id) const {
    const Model& model = models_.at(id);
    Charge total = model.held;
    for (const ShareId share : model.held_shares) {
      const std::size_t where = position(model.held_shares_on);
      if (holders(share, where, [](const Model&) { return true; }) > 1) continue;
      total = sum(total, Charge(model.held_shares_on, Bytes{shares_.at(share).bytes}));
    }
    return total;
  }

  [[nodiscard]] Charge held_with_shares(ModelId id) const {
    const Model& model = models_.at(id);
    Charge total = model.held;
    for (const ShareId share : model.held_shares) {
      total = sum(total, Charge(model.held_shares_on, Bytes{shares_.at(share).bytes}));
    }
    return total;
  }

  /// Bytes a load needs, one amount a device.
  using Amounts = std::vector<std::int64_t>;

  [[nodiscard]] static DeviceIndex at(std::size_t where) { return static_cast<DeviceIndex>(where); }

  // --- Shares -----------------------------------------------------------------------------------

  template <typename F>
  [[nodiscard]] std::size_t holders(ShareId share, std::size_t where, F&& counts) const {
    std::size_t found = 0;
    for (const auto& [id, model] : models_) {
      if (model.held_shares_on != at(where) || !counts(model)) continue;
      found += static_cast<std::size_t>(
          std::count(model.held_shares.begin(), model.held_shares.end(), share));
    }
    return found;
  }
  [[nodiscard]] std::size_t holders_in(ShareId share, std::size_t where, Phase phase) const {
    return holders(share, where, [&](const Model& model) { return model.phase == phase; });
  }

  // As what the shares that are on a device are charged: each as its liveliest holder.
  [[nodiscard]] std::map<ShareId, Phase> charged_as(std::size_t where) const {
    const auto rank = [](Phase phase) { return phase == Phase::kResident ? Phase::kAway : phase; };
    std::map<ShareId, Phase> phases;
    for (const auto& [id, model] : models_) {
      if (model.held_shares_on != at(where)) continue;
      for (const ShareId share : model.held_shares) {
        Phase& phase = phases.try_emplace(share, model.phase).first->second;
        if (rank(model.phase) < rank(phase)) phase = model.phase;
      }
    }
    return phases;
  }

  [[nodiscard]] std::size_t models_made_of(ShareId share) const {
    std::size_t found = 0;
    for (const auto& [id, model] : models_) {
      for (const auto* list : {&model.shares, &model.held_shares, &model.copy.shares}) {
        found += static_cast<std::size_t>(std::count(list->begin(), list->end(), share));
      }
    }
    return found;
  }

  void forget_unused_shares() {
    std::erase_if(shares_, [&](const auto& item) {
      return item.second.was_used && models_made_of(item.first) == 0;
    });
  }

  // --- Bytes ------------------------------------------------------------------------------------

  template <typename F>
  [[nodiscard]] std::int64_t own_bytes(std::size_t where, F&& counts) const {
    std::int64_t total = 0;
    for (const auto& [id, model] : models_) {
      if (counts(model)) total += model.held.on(at(where)).value;
    }
    return total;
  }

  // Own bytes of models in a phase, and the shares charged as that.
  [[nodiscard]] std::int64_t bytes_in(Phase phase, std::size_t where) const {
    std::int64_t total = own_bytes(where, [&](const Model& model) { return model.phase == phase; });
    for (const auto& [share, charged] : charged_as(where)) {
      if (charged == phase) total += shares_.at(share).bytes;
    }
    return total;
  }

  [[nodiscard]] std::int64_t quarantined(std::size_t where) const {
    std::int64_t total = 0;
    for (const auto& [id, model] : models_) total += model.quarantined.on(at(where)).value;
    return total;
  }

  [[nodiscard]] std::int64_t used(std::size_t where) const {
    std::int64_t total = own_bytes(where, [](const Model&) { return true; }) + quarantined(where);
    for (const auto& [share, charged] : charged_as(where)) total += shares_.at(share).bytes;
    return total;
  }

  // Bytes on their way back.
  [[nodiscard]] std::int64_t leaving(std::size_t where) const {
    return bytes_in(Phase::kDraining, where) + unloading(where);
  }
  [[nodiscard]] std::int64_t unloading(std::size_t where) const {
    return bytes_in(Phase::kUnloading, where);
  }

  // Free bytes, below zero by the deficit.
  [[nodiscard]] std::int64_t room(std::size_t where) const {
    return budgets_[where].value - used(where);
  }

  // Bytes that no eviction can bring back: held by pinned models that stay, or quarantined. What a
  // pinned model's load has reserved may count or not: the load may yet fail, or take less.
  [[nodiscard]] std::int64_t fixed(std::size_t where, bool with_loads) const {
    const auto stays = [&](const Model& model) { return is_fixed(model, with_loads); };
    std::int64_t total = quarantined(where) + own_bytes(where, stays);
    for (const auto& [id, share] : shares_) {
      if (holders(id, where, stays) > 0) total += share.bytes;
    }
    return total;
  }
  [[nodiscard]] static bool is_fixed(const Model& model, bool with_loads) {
    return model.pinned && !model.removed &&
           (model.phase == Phase::kResident || (with_loads && model.phase == Phase::kLoading));
  }

  // --- What a load takes ------------------------------------------------------------------------

  [[nodiscard]] static DeviceIndex shares_device(const Model& model, std::size_t placement) {
    if (model.shares.empty() || placement >= model.shares_on.size()) return kNoDevice;
    return model.shares_on[placement];
  }

  [[nodiscard]] static bool touches(const Model& model, std::size_t placement, std::size_t where) {
    return model.placements[placement].on(at(where)) > Bytes{0} ||
           shares_device(model, placement) == at(where);
  }

  // The bytes a load needs besides the shares that some model has there for which `there` holds.
  template <typename F>
  [[nodiscard]] Amounts need(const Model& model, std::size_t placement, F&& there) const {
    Amounts amounts(budgets_.size());
    for (std::size_t where = 0; where < amounts.size(); ++where) {
      amounts[where] = model.placements[placement].on(at(where)).value;
      if (shares_device(model, placement) != at(where)) continue;
      for (const ShareId share : model.shares) {
        if (holders(share, where, there) == 0) amounts[where] += shares_.at(share).bytes;
      }
    }
    return amounts;
  }
  // Beside what anybody holds.
  [[nodiscard]] Amounts need_at_all(const Model& model, std::size_t placement) const {
    return need(model, placement, [](const Model&) { return true; });
  }
  // Beside what stays for as long as requests run. What is being unloaded is as good as gone.
  [[nodiscard]] Amounts need_now(const Model& model, std::size_t placement) const {
    return need(model, placement, [](const Model& other) {
      return other.phase != Phase::kUnloading && other.phase != Phase::kAway;
    });
  }
  // Beside what stays until somebody asks for its room.
  [[nodiscard]] Amounts need_later(const Model& model, std::size_t placement) const {
    return need(model, placement, [](const Model& other) {
      return other.phase == Phase::kLoading || other.phase == Phase::kResident;
    });
  }

  template <typename F>
  [[nodiscard]] static bool everywhere(const Amounts& wanted, F&& holds) {
    for (std::size_t where = 0; where < wanted.size(); ++where) {
      if (wanted[where] > 0 && !holds(where, wanted[where])) return false;
    }
    return true;
  }

  // It fits into what is free and what is being unloaded.
  [[nodiscard]] bool fits_soon(const Model& model, std::size_t placement) const {
    return everywhere(need_now(model, placement), [&](std::size_t where, std::int64_t bytes) {
      return bytes <= room(where) + unloading(where);
    });
  }
  // It fits when all those who leave have left.
  [[nodiscard]] bool fits_later(const Model& model, std::size_t placement) const {
    return everywhere(need_later(model, placement), [&](std::size_t where, std::int64_t bytes) {
      return bytes <= room(where) + leaving(where);
    });
  }

  // No budget is as large as the model, whatever others hold of it.
  [[nodiscard]] bool never_fits(const Model& model) const {
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      const Amounts all = need(model, p, [](const Model&) { return false; });
      if (everywhere(all, [&](std::size_t where, std::int64_t bytes) {
            return bytes <= budgets_[where].value;
          })) {
        return false;
      }
    }
    return true;
  }

  // Pinned and quarantined bytes leave no room for it.
  [[nodiscard]] bool exhausted(const Model& model, bool with_loads) const {
    for (std::size_t p = 0; p < model.placements.size(); ++p) {
      const Amounts rest =
          need(model, p, [&](const Model& other) { return is_fixed(other, with_loads); });
      if (everywhere(rest, [&](std::size_t where, std::int64_t bytes) {
            return bytes + fixed(where, with_loads) <= budgets_[where].value;
          })) {
        return false;
      }
    }
    return true;
  }

  // What `answer` is if the models for which `chosen` holds were in another phase.
  template <typename Chosen, typename F>
  [[nodiscard]] auto supposing(Chosen&& chosen, Phase phase, F&& answer) const {
    Books supposed(*this);
    for (auto& [id, model] : supposed.models_) {
      if (chosen(id, model)) model.phase = phase;
    }
    return answer(static_cast<const Books&>(supposed));
  }

 protected:
  std::vector<Bytes> budgets_;
  std::vector<bool> closed_;
  std::map<ModelId, Model> models_;
  std::map<ShareId, SharedBytes> shares_;
};

}  // namespace modelyard::test

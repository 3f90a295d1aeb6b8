#pragma once

#include <optional>
#include <span>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/policy.hpp"
#include "modelyard/shares.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// A model that may be asked to leave.
struct Resident {
  EntryIndex entry{0};
  const Charge* held{nullptr};  ///< What it holds alone.
  double reload_seconds{0};
  bool leased{false};  ///< Somebody uses it. Only taken when the idle ones together are not enough.
  std::span<const ShareId> shares{};  ///< What it holds together with others, all on one device.
  DeviceIndex shares_on{kNoDevice};
};

/// What a plan has to know of shares.
struct Sharing {
  const ShareTable* table{nullptr};   ///< Null if no resident holds any.
  std::span<const ShareId> wanted{};  ///< What the waiting model is made of: nobody frees these,
  DeviceIndex wanted_on{kNoDevice};   ///< if they are there.
  bool count_leaving{false};  ///< Models that drain are taken as gone, like those being unloaded.
};

struct Victim {
  EntryIndex entry{0};
  double score{0};
  bool leased{false};
};

/// Who has to leave so that a model fits.
struct Plan {
  std::vector<Victim> victims;  ///< In the order they were chosen.
  double cost{0};  ///< What their absence is expected to cost: the sum of their scores.
};

/// The victims that cover `shortfall` on every device, or nothing if all residents together do not.
///
/// Takes the lowest score first, idle models before leased ones, and only models that hold bytes
/// where some are still missing. Then gives back, highest score first, every victim the others make
/// unnecessary: no proper subset of the answer covers the shortfall. A model's score weighs its
/// bytes by the budgets of the short devices only, since bytes elsewhere do not help. `budgets`
/// holds each device's budget. A pure function: a plan is complete before anything is touched.
///
/// A share comes back with the last of its holders: a plan counts on it only if it takes all that
/// do not leave by themselves. In a model's score it weighs its part, bytes / holders.
[[nodiscard]] std::optional<Plan> plan_eviction(std::span<const Resident> residents,
                                                const Charge& shortfall,
                                                std::span<const Bytes> budgets,
                                                const Policy& policy, RequestClock now,
                                                const Sharing& sharing = {});

/// What all residents together would give back.
[[nodiscard]] Charge freed_by_all(std::span<const Resident> residents, const Sharing& sharing);

}  // namespace modelyard

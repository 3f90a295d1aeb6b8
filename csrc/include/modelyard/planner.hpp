#pragma once

#include <optional>
#include <span>
#include <vector>

#include "modelyard/charge.hpp"
#include "modelyard/policy.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// A model that may be asked to leave.
struct Resident {
  EntryIndex entry{0};
  const Charge* held{nullptr};
  double reload_seconds{0};
  bool leased{false};  ///< Somebody uses it. Only taken when the idle ones together are not enough.
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
[[nodiscard]] std::optional<Plan> plan_eviction(std::span<const Resident> residents,
                                                const Charge& shortfall,
                                                std::span<const Bytes> budgets,
                                                const Policy& policy, RequestClock now);

}  // namespace modelyard

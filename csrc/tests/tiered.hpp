#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {

/// Devices that are all above a tier. Least recently used, unless a test is about prices.
inline YardOptions tiered(std::initializer_list<std::int64_t> budgets, std::int64_t tier,
                          std::string policy = "lru") {
  YardOptions wanted = options(budgets);
  wanted.tier_budget = Bytes{tier};
  wanted.above_tier.assign(budgets.size(), true);
  wanted.policy = std::move(policy);
  wanted.load_channels_per_device = 4;
  return wanted;
}

inline ModelId on(Harness& h, const char* label, std::uint32_t where, std::int64_t bytes = 60) {
  return h.add(label, charge({{where, bytes}}));
}

/// A request of the policy's clock that changes nothing else: it comes too late.
inline void wish(Harness& h, ModelId model) {
  h.request(model, h.now());
  h.forget();
}

/// A device for one model, a tier for two copies: of a and b, in the order of their requests.
struct FullTier {
  explicit FullTier(std::string policy = "lru") : h(tiered({60, 60}, 120, std::move(policy))) {
    h.warm(a);
    h.warm(b);
    h.warm(c);
    EXPECT_EQ(h.tier().resident, Bytes{120});
    EXPECT_EQ(h.copy_state(a), CopyState::kKept);
    EXPECT_EQ(h.copy_state(b), CopyState::kKept);
  }

  Harness h;
  ModelId a = on(h, "a", 0);
  ModelId b = on(h, "b", 0);
  ModelId c = on(h, "c", 0);
  ModelId d = on(h, "d", 0);
};

}  // namespace modelyard::test

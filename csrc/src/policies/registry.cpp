#include <array>

#include "modelyard/policy.hpp"
#include "policies/gap.hpp"
#include "policies/lru.hpp"

namespace modelyard {

std::span<const std::string_view> policy_names() {
  static constexpr std::array<std::string_view, 2> kNames{"gap", "lru"};
  return kNames;
}

std::unique_ptr<Policy> make_policy(std::string_view name) {
  if (name == "gap") return std::make_unique<Gap>();
  if (name == "lru") return std::make_unique<Lru>();
  return nullptr;
}

}  // namespace modelyard

#include <array>
#include <memory>

#include "modelyard/policy.hpp"
#include "policies/ensemble.hpp"
#include "policies/expert.hpp"
#include "policies/single.hpp"

namespace modelyard {

std::span<const std::string_view> policy_names() {
  static constexpr std::array<std::string_view, 9> kNames{
      "ensemble", "learned", "next-use", "due", "gap", "mix", "decay", "gdsf", "lru"};
  return kNames;
}

std::unique_ptr<Policy> make_policy(std::string_view name) {
  const std::span<const std::string_view> experts(kExperts);
  if (name == "ensemble") {
    return std::make_unique<Ensemble>("ensemble", experts.first(experts.size() - 1));
  }
  if (name == "learned") return std::make_unique<Ensemble>("learned", experts);
  std::unique_ptr<Expert> expert = make_expert(name);
  return expert == nullptr ? nullptr : std::make_unique<Single>(std::move(expert));
}

}  // namespace modelyard

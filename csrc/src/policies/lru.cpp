#include "policies/lru.hpp"

namespace modelyard {

void Lru::on_add(EntryIndex entry) {
  if (last_.size() <= entry) last_.resize(entry + std::size_t{1});
  last_[entry] = 0;
}

double Lru::score(const Candidate& candidate, RequestClock) const {
  return static_cast<double>(last_[candidate.entry]);
}

}  // namespace modelyard

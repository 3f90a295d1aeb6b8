#include "referee.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "progress_referee.hpp"

namespace modelyard::test {

// Books, TierReferee and Diary keep the books; what is checked is in a class each: ErrorReferee,
// ActionReferee, StateReferee, ProgressReferee. Every one sees what those below it have written.
// All of it is compiled here, once, and not with every test.
class Referee::Judge : private ProgressReferee {
 public:
  explicit Judge(YardOptions options) : ProgressReferee(std::move(options)) {}

  using Books::budget;
  using Books::closed;
  using Books::device_count;
  using Books::exclusive;
  using Books::models;
  using Books::shares;
  using Diary::leases;
  using Diary::now;
  using Diary::options;
  using Diary::tickets;
  using Diary::wake_at;
  using TierReferee::copy_exclusive;
  using TierReferee::has_tier;
  using TierReferee::tier;
  using TierReferee::tier_budget;
  using TierReferee::unrest;
  using TierReferee::was_loaded;

  [[nodiscard]] Verdict judge(const Event& event, const Outcome& outcome, const Yard& yard);
};

Referee::Verdict Referee::Judge::judge(const Event& event, const Outcome& outcome,
                                       const Yard& yard) {
  const std::size_t waiting_before = waiting_models();
  const std::vector<Bytes> deficits_before = deficits_;
  begin_call(event);
  const auto subject = models_.find(event.model);
  phase_before_ = subject == models_.end() ? Phase::kAway : subject->second.phase;
  if (Verdict verdict = judge_result(event, outcome)) return verdict;
  if (outcome.error) {
    if (!outcome.actions.empty()) return "a call that failed asked for something";
  } else {
    if (is_told_the_time(event.kind)) now_ = std::max(now_, event.now);
    if (Verdict verdict = believe(event, outcome)) return verdict;
  }
  bool loaded = false;
  for (const Action& action : outcome.actions) {
    loaded = loaded || std::holds_alternative<Load>(action);
    if (Verdict verdict = obey(event, action, yard)) return describe(action) + ": " + *verdict;
  }
  note_work(event, outcome, yard);
  if (Verdict verdict = find_held_back(yard)) return verdict;
  forget_what_is_gone();
  if (Verdict verdict = check_lost(event, outcome)) return verdict;
  if (Verdict verdict = compare(yard)) return verdict;
  if (Verdict verdict = compare_tier(yard)) return verdict;
  if (!outcome.error) {
    if (Verdict verdict = check_tier(event)) return verdict;
    if (Verdict verdict = check_price(event, yard)) return verdict;
  }
  if (Verdict verdict = check_deficits(event, deficits_before)) return verdict;
  if (Verdict verdict = check_repayment()) return verdict;
  if (Verdict verdict = check_times(event)) return verdict;
  if (Verdict verdict = check_no_hopeless_waiter()) return verdict;
  if (Verdict verdict = note_given_away(yard)) return verdict;
  if (Verdict verdict = check_progress(yard)) return verdict;
  const bool quiet = waiting_before <= 1 && waiting_models() == 1 && !loaded && !any_deficit() &&
                     !outcome.error &&
                     (event.kind == EventKind::kRequest || event.kind == EventKind::kTick ||
                      event.kind == EventKind::kRelease);
  if (Verdict verdict = check_victims(yard, quiet)) return verdict;
  const Status audit = yard.audit();
  if (!audit.ok()) return "audit: " + audit.error().message;
  return std::nullopt;
}

Referee::Referee(YardOptions options) : judge_(std::make_unique<Judge>(std::move(options))) {}

Referee::~Referee() = default;

Referee::Verdict Referee::judge(const Event& event, const Outcome& outcome, const Yard& yard) {
  return judge_->judge(event, outcome, yard);
}

const std::map<ModelId, Referee::Model>& Referee::models() const { return judge_->models(); }

const std::map<ShareId, Referee::SharedBytes>& Referee::shares() const { return judge_->shares(); }

std::size_t Referee::device_count() const { return judge_->device_count(); }

bool Referee::closed(std::size_t where) const { return judge_->closed(where); }

Bytes Referee::budget(std::size_t where) const { return judge_->budget(where); }

Charge Referee::exclusive(ModelId id) const { return judge_->exclusive(id); }

bool Referee::has_tier() const { return judge_->has_tier(); }

DeviceIndex Referee::tier() const { return judge_->tier(); }

Bytes Referee::tier_budget() const { return judge_->tier_budget(); }

Bytes Referee::copy_exclusive(ModelId id) const { return judge_->copy_exclusive(id); }

bool Referee::was_loaded(ModelId id) const { return judge_->was_loaded(id); }

Referee::Verdict Referee::unrest() const { return judge_->unrest(); }

const std::map<TicketId, std::pair<ModelId, Tick>>& Referee::tickets() const {
  return judge_->tickets();
}

const std::map<LeaseId, ModelId>& Referee::leases() const { return judge_->leases(); }

Tick Referee::now() const { return judge_->now(); }

Tick Referee::wake_at() const { return judge_->wake_at(); }

const YardOptions& Referee::options() const { return judge_->options(); }

}  // namespace modelyard::test

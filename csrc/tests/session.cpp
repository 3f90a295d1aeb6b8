#include "session.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"
#include "referee.hpp"

namespace modelyard::test {

Session::Session(Yard yard, const YardOptions& options)
    : yard_(std::move(yard)), referee_(options) {}

Session::~Session() = default;

Outcome Session::step(const Event& event) {
  if (history_.size() == kHistory) history_.pop_front();
  history_.push_back(describe(event));
  Outcome outcome = apply(yard_, event);
  for (const Action& action : outcome.actions) history_.back() += "\n    -> " + describe(action);
  if (outcome.error) history_.back() += "\n    -> error " + outcome.message;
  if (!violation_) {
    if (Referee::Verdict verdict = referee_.judge(event, outcome, yard_)) {
      std::string text = *verdict + "\n  last events:";
      for (const std::string& line : history_) text += "\n  " + line;
      violation_ = std::move(text);
    }
  }
  return outcome;
}

void Session::settle() {
  for (std::size_t where = 0; where < referee_.device_count(); ++where) {
    if (!referee_.closed(where)) continue;
    Event open = event(EventKind::kSetClosed);
    open.device = static_cast<DeviceIndex>(where);
    step(open);
  }
  const std::size_t bound = 100 + 20 * (referee_.tickets().size() + referee_.models().size());
  for (std::size_t round = 0; round < bound && !violation_; ++round) {
    if (finish_everything()) continue;
    if (Referee::Verdict verdict = referee_.unrest()) {
      violation_ = "nothing goes on, and " + *verdict;
      return;
    }
    if (referee_.tickets().empty()) return;
    if (referee_.wake_at() == kNever) {
      violation_ = "tickets wait, nothing goes on and nobody is woken\n  last: " +
                   (history_.empty() ? std::string{} : history_.back());
      return;
    }
    Event tick = event(EventKind::kTick);
    tick.now = std::max(referee_.now(), referee_.wake_at());
    step(tick);
  }
  if (!violation_) violation_ = "tickets still wait though everybody has released";
}

void Session::tear_down() {
  std::vector<ModelId> ids;
  for (const auto& [id, model] : referee_.models()) {
    if (!model.removed) ids.push_back(id);
  }
  for (const ModelId id : ids) {
    Event remove = event(EventKind::kRemoveModel);
    remove.model = id;
    step(remove);
  }
  while (!violation_ && finish_everything()) {
  }
  const std::map unused = referee_.shares();  // Those that models were made of have gone.
  for (const auto& [id, share] : unused) {
    Event forget = event(EventKind::kForgetShare);
    forget.share = id;
    if (!share.was_used) step(forget);
  }
  std::vector<std::pair<ModelId, Charge>> kept;
  for (const auto& [id, model] : referee_.models()) kept.emplace_back(id, model.quarantined);
  for (const auto& [id, quarantined] : kept) {
    Event back = event(EventKind::kReclaimed);
    back.model = id;
    back.charge = quarantined;
    step(back);
  }
  if (violation_) return;
  const std::size_t accounts = yard_.device_count() + (referee_.has_tier() ? 1 : 0);
  for (std::size_t where = 0; where < accounts; ++where) {
    const Account& account = yard_.account(static_cast<DeviceIndex>(where));
    if (account.used() != Bytes{0} || account.deficit != Bytes{0}) {
      violation_ = "bytes are left on device " + std::to_string(where);
    }
  }
  if (yard_.model_count() != 0) violation_ = "models are left";
  if (yard_.share_count() != 0) violation_ = "shares are left";
  if (yard_.waiting_count() != 0) violation_ = "tickets are left";
  if (yard_.lease_count() != 0) violation_ = "leases are left";
}

Event Session::event(EventKind kind) const {
  Event made;
  made.kind = kind;
  made.now = referee_.now();
  return made;
}

bool Session::finish_everything() {
  std::vector<Event> events;
  for (const auto& [lease, model] : referee_.leases()) {
    Event release = event(EventKind::kRelease);
    release.lease = lease;
    events.push_back(release);
  }
  for (const auto& [id, model] : referee_.models()) {
    Event done = event(EventKind::kLoadDone);
    done.model = id;
    done.charge = model.held;
    const Referee::CopyPhase copy = model.copy.phase;
    if (copy == Referee::CopyPhase::kMaking) {
      done.kept = Kept{.bytes = Bytes{model.copy.own}, .took = seconds{1}};
    }
    if (copy == Referee::CopyPhase::kKept) done.source = Source::kCopy;
    if (model.phase == Referee::Phase::kUnloading) done.kind = EventKind::kUnloadDone;
    const bool held_back = copy == Referee::CopyPhase::kAwaited;
    if ((model.phase == Referee::Phase::kUnloading && !held_back) ||
        model.phase == Referee::Phase::kLoading) {
      events.push_back(done);
    }
    if (Referee::is_leaving(copy)) {
      done.kind = EventKind::kCopyDropped;
      events.push_back(done);
    }
  }
  for (Event& each : events) {
    // The last of a share's holders brings it back: who that is shows only now.
    if (each.kind == EventKind::kUnloadDone) each.charge = referee_.exclusive(each.model);
    if (each.kind == EventKind::kCopyDropped) each.budget = referee_.copy_exclusive(each.model);
    step(each);
  }
  return !events.empty();
}

}  // namespace modelyard::test

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "random_events.hpp"
#include "referee.hpp"
#include "session.hpp"

namespace modelyard::test {
namespace {

// How often each kind of action was seen, so that a test that never gets anywhere is noticed.
struct Seen {
  std::map<std::string, std::size_t> actions;
  std::map<std::string, std::size_t> sharing;
  std::map<std::string, std::size_t> tier;
  std::size_t steps{0};
};

void count(const Outcome& outcome, Seen& seen) {
  for (const Action& action : outcome.actions) {
    std::string name = "wake";
    if (std::holds_alternative<Grant>(action)) name = "grant";
    if (std::holds_alternative<Load>(action)) name = "load";
    if (std::holds_alternative<CancelLoad>(action)) name = "cancel_load";
    if (std::holds_alternative<Drain>(action)) name = "drain";
    if (const auto* unload = std::get_if<Unload>(&action)) {
      name = unload->keep ? "unload and keep" : "unload";
    }
    if (std::holds_alternative<DropCopy>(action)) name = "drop a copy";
    if (const auto* refuse = std::get_if<Refuse>(&action)) {
      name = "refuse " + std::string(to_string(refuse->reason));
    }
    ++seen.actions[name];
  }
}

// What shares an event was about, as it went well.
void count_sharing(const Event& event, const Outcome& outcome, const Yard& yard, Seen& seen) {
  if (outcome.error) return;
  if (event.kind == EventKind::kLost) ++seen.sharing["lost"];
  if (event.kind == EventKind::kForgetShare) ++seen.sharing["forgotten"];
  const auto phases = [&](const Share& share) {
    const Holders& there = share.on(device(0));
    std::size_t found = 0;
    for (const std::uint32_t holders : there.by) found += holders > 0 ? 1 : 0;
    return found;
  };
  if (event.kind == EventKind::kSplitShare && yard.share(event.share)->on(device(0)).total() > 0) {
    ++seen.sharing["split while held"];
  }
  for (const Action& action : outcome.actions) {
    const auto* load = std::get_if<Load>(&action);
    const Entry* entry = load == nullptr ? nullptr : yard.entry(load->model);
    if (entry == nullptr) continue;
    for (const ShareId id : entry->held_shares) {
      const Share& share = *yard.share(id);
      if (share.on(entry->held_shares_on).total() > 1) ++seen.sharing["load of what is there"];
      if (phases(share) > 2) ++seen.sharing["held in three phases"];
      const Holders& there = share.on(entry->held_shares_on);
      if (there.total() > there.firm() && there.firm() == 1) ++seen.sharing["taken over"];
    }
  }
}

// True if a copy that is being made has a share of one that was dropped and is still in use.
bool takes_from_use(const Entry& entry, const Yard& yard) {
  return std::any_of(entry.copy.shares.begin(), entry.copy.shares.end(), [&](ShareId id) {
    return yard.share(id)->on(yard.tier()).of(Holding::kDraining) > 0;
  });
}

// What an event did to the host tier.
void count_tier(const Event& event, const Outcome& outcome, const Yard& yard, Seen& seen) {
  if (outcome.error || yard.tier() == kNoDevice) return;
  if (event.kind == EventKind::kCopyLost) ++seen.tier["lost"];
  if (event.kind == EventKind::kLoadDone && event.source == Source::kCopy) ++seen.tier["promotion"];
  if (event.kind == EventKind::kUnloadDone && event.kept) {
    ++seen.tier[event.kept->made ? "kept" : "too large"];
  }
  if (event.kind == EventKind::kCopyInUse) ++seen.tier["in use"];
  if (event.kind == EventKind::kCopyDropped && event.budget > Bytes{0}) ++seen.tier["dropped"];
  if (yard.account(yard.tier()).deficit > Bytes{0}) ++seen.tier["in deficit"];
  if (yard.account(yard.tier()).quarantined > Bytes{0}) ++seen.tier["with quarantine"];
  for (const Action& action : outcome.actions) {
    if (const auto* unload = std::get_if<Unload>(&action)) {
      const bool waited =
          event.kind == EventKind::kCopyDropped || event.kind == EventKind::kSetTierBudget;
      if (unload->keep && waited) ++seen.tier["sent after a wait"];
      if (!unload->keep && waited) ++seen.tier["given up"];
      if (!unload->keep && event.kind == EventKind::kCopyInUse) ++seen.tier["given up for use"];
      if (unload->keep && takes_from_use(*yard.entry(unload->model), yard)) {
        ++seen.tier["taken over in use"];
      }
      if (unload->keep && !yard.entry(unload->model)->copy.shares.empty()) {
        ++seen.tier["with shares"];
      }
    }
  }
}

// One random life of a yard: bursts of events, after each of which faults stop and everybody
// releases.
std::optional<std::string> live(const YardOptions& options, EventMaker<SeededSource>& maker,
                                int bursts, int steps, Seen& seen) {
  Session session(make_yard(options), options);
  for (int burst = 0; burst < bursts; ++burst) {
    for (int step = 0; step < steps && !session.violation(); ++step) {
      const Event event = maker.next(session.referee());
      const Outcome outcome = session.step(event);
      count(outcome, seen);
      count_sharing(event, outcome, session.yard(), seen);
      count_tier(event, outcome, session.yard(), seen);
      ++seen.steps;
    }
    session.settle();
    if (session.violation()) return session.violation();
  }
  session.tear_down();
  return session.violation();
}

// A sanitizer makes a step ten times as long.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint32_t kLives = 100;
#else
constexpr std::uint32_t kLives = 300;
#endif

TEST(ModelBased, RandomLivesKeepEveryPromise) {
  Seen seen;
  for (std::uint32_t seed = 1; seed <= kLives; ++seed) {
    SeededSource source(seed);
    const YardOptions options = draw_options(source);
    EventMaker maker(source, 3 + source.below(10));
    const std::optional<std::string> violation = live(options, maker, 4, 700, seen);
    ASSERT_FALSE(violation) << "seed " << seed << ": " << *violation;
  }
  EXPECT_GE(seen.steps, kLives * 2000U);
  for (const char* action :
       {"grant", "load", "cancel_load", "drain", "unload", "wake", "refuse NEVER_FITS",
        "refuse BUDGET_EXHAUSTED", "refuse QUEUE_FULL", "refuse LOAD_FAILED",
        "refuse DEADLINE_IN_QUEUE", "refuse DEADLINE_IN_LOAD", "refuse DEADLINE_UNREACHABLE",
        "refuse REMOVED", "unload and keep", "drop a copy"}) {
    EXPECT_GT(seen.actions[action], kLives / 6) << "the events are too tame: " << action;
  }
  for (const char* what : {"lost", "forgotten", "split while held", "load of what is there",
                           "held in three phases", "taken over"}) {
    EXPECT_GT(seen.sharing[what], kLives / 6) << "the events are too tame: " << what;
  }
  for (const char* what : {"lost", "promotion", "kept", "too large", "dropped", "in deficit",
                           "with quarantine", "sent after a wait", "with shares", "in use"}) {
    EXPECT_GT(seen.tier[what], kLives / 30) << "the events are too tame: " << what;
  }
}

// Every device is above the tier, and what leaves it comes back: more copies are made, wait for
// each other and take shares over.
TEST(ModelBased, LivesAboveATierKeepEveryPromise) {
  Seen seen;
  // As many under sanitizers: fewer do not meet the rarest of what is counted below.
  constexpr std::uint32_t lives = 100;
  for (std::uint32_t seed = 1; seed <= lives; ++seed) {
    SeededSource source(seed);
    YardOptions options = draw_options(source);
    options.tier_budget = Bytes{60 + static_cast<std::int64_t>(source.below(120))};
    options.above_tier.assign(options.budgets.size(), true);
    EventMaker maker(source, 5 + source.below(8), true);
    const std::optional<std::string> violation = live(options, maker, 4, 700, seen);
    ASSERT_FALSE(violation) << "seed " << seed << ": " << *violation;
  }
  for (const char* what : {"kept", "dropped", "sent after a wait", "with shares", "in use",
                           "given up for use", "taken over in use"}) {
    EXPECT_GT(seen.tier[what], lives / 20) << "the events are too tame: " << what;
  }
}

// --- Negative controls: a referee that catches nothing is worth nothing --------------------------

// Lets a random life go on until `corrupt` has changed an observation, and returns what the referee
// says then.
using Corruption = std::function<bool(Event&, Outcome&, const Referee&)>;

std::optional<std::string> verdict_on(const Corruption& corrupt) {
  for (std::uint32_t seed = 1; seed <= 20; ++seed) {
    SeededSource source(seed);
    YardOptions options = draw_options(source);
    options.max_waiting_per_model = 100;
    options.max_waiting = 1000;
    Yard yard = make_yard(options);
    Referee referee(options);
    EventMaker maker(source, 8);
    for (int step = 0; step < 3000; ++step) {
      Event event = maker.next(referee);
      Outcome outcome = apply(yard, event);
      const bool corrupted = corrupt(event, outcome, referee);
      const Referee::Verdict verdict = referee.judge(event, outcome, yard);
      if (corrupted) return verdict;
      if (verdict) return "before the corruption: " + *verdict;
    }
  }
  return "the corruption never applied";
}

// Drops the first action of a kind.
template <typename Kind>
bool drop(Actions& actions) {
  const auto found = std::find_if(actions.begin(), actions.end(), [](const Action& action) {
    return std::holds_alternative<Kind>(action);
  });
  if (found == actions.end()) return false;
  actions.erase(found);
  return true;
}

template <typename Kind>
bool repeat(Actions& actions) {
  const auto found = std::find_if(actions.begin(), actions.end(), [](const Action& action) {
    return std::holds_alternative<Kind>(action);
  });
  if (found == actions.end()) return false;
  const Action again = *found;
  actions.push_back(again);
  return true;
}

void expect_caught(const std::string& what, const Corruption& corrupt) {
  const std::optional<std::string> verdict = verdict_on(corrupt);
  ASSERT_TRUE(verdict) << "not caught: " << what;
  EXPECT_EQ(verdict->find("before the corruption"), std::string::npos) << what << ": " << *verdict;
  EXPECT_EQ(verdict->find("never applied"), std::string::npos) << what << ": " << *verdict;
}

TEST(Referee, CatchesActionsThatAreLost) {
  expect_caught("a lost grant",
                [](Event&, Outcome& seen, const Referee&) { return drop<Grant>(seen.actions); });
  expect_caught("a lost load",
                [](Event&, Outcome& seen, const Referee&) { return drop<Load>(seen.actions); });
  expect_caught("a lost unload",
                [](Event&, Outcome& seen, const Referee&) { return drop<Unload>(seen.actions); });
  expect_caught("a lost drain",
                [](Event&, Outcome& seen, const Referee&) { return drop<Drain>(seen.actions); });
  expect_caught("a lost refusal",
                [](Event&, Outcome& seen, const Referee&) { return drop<Refuse>(seen.actions); });
}

TEST(Referee, CatchesTicketsThatEndTwice) {
  expect_caught("a grant twice",
                [](Event&, Outcome& seen, const Referee&) { return repeat<Grant>(seen.actions); });
  expect_caught("a refusal twice",
                [](Event&, Outcome& seen, const Referee&) { return repeat<Refuse>(seen.actions); });
  expect_caught("a load twice",
                [](Event&, Outcome& seen, const Referee&) { return repeat<Load>(seen.actions); });
}

TEST(Referee, CatchesALostWake) {
  expect_caught("a lost wake for a deadline", [](Event& event, Outcome& seen,
                                                 const Referee& referee) {
    const bool first = referee.wake_at() == kNever && event.kind == EventKind::kRequest &&
                       event.deadline != kNever && !seen.error;
    const bool waits = std::none_of(seen.actions.begin(), seen.actions.end(), [](const Action& a) {
      return std::holds_alternative<Grant>(a) || std::holds_alternative<Refuse>(a);
    });
    return first && waits && drop<WakeAt>(seen.actions);
  });
}

TEST(Referee, CatchesAnUnloadOfAModelInUse) {
  expect_caught("an unload of a leased model", [](Event&, Outcome& seen, const Referee& referee) {
    for (const auto& [id, model] : referee.models()) {
      if (model.phase != Referee::Phase::kResident || model.leases.empty() || seen.error) continue;
      seen.actions.insert(seen.actions.begin(), Unload{id});
      return true;
    }
    return false;
  });
}

TEST(Referee, CatchesAnActionOnAPinnedModel) {
  expect_caught(
      "an unload of a pinned model", [](Event& event, Outcome& seen, const Referee& referee) {
        for (const auto& [id, model] : referee.models()) {
          const bool stays = model.phase == Referee::Phase::kResident && model.leases.empty();
          if (!model.pinned || model.removed || !stays || seen.error) continue;
          if (event.kind != EventKind::kTick) continue;
          seen.actions.insert(seen.actions.begin(), Unload{id});
          return true;
        }
        return false;
      });
}

TEST(Referee, CatchesALoadOverBudget) {
  const YardOptions wanted = options({100});
  Yard yard = make_yard(wanted);
  Referee referee(wanted);
  std::vector<ModelId> ids;
  Event event;
  event.kind = EventKind::kAddModel;
  event.spec.placements = {charge({{0, 60}})};
  for (int i = 0; i < 2; ++i) {
    const Outcome outcome = apply(yard, event);
    ASSERT_EQ(referee.judge(event, outcome, yard), std::nullopt);
    ids.push_back(outcome.model);
  }
  event = Event{};
  event.kind = EventKind::kRequest;
  event.model = ids[0];
  ASSERT_EQ(referee.judge(event, apply(yard, event), yard), std::nullopt);
  event.model = ids[1];
  Outcome outcome = apply(yard, event);
  outcome.actions.push_back(Load{ids[1], 0});
  const Referee::Verdict verdict = referee.judge(event, outcome, yard);
  ASSERT_TRUE(verdict);
  EXPECT_NE(verdict->find("over budget"), std::string::npos) << *verdict;
}

TEST(Referee, CatchesAFactThatTheYardDidNotHear) {
  expect_caught("an unload that freed less than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kUnloadDone || seen.error || event.charge.empty()) {
                    return false;
                  }
                  event.charge = Charge{};
                  return true;
                });
  expect_caught("a load that took more than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kLoadDone || seen.error) return false;
                  event.charge.set(device(0), event.charge.on(device(0)) + Bytes{1});
                  return true;
                });
}

TEST(Referee, CatchesAShareOfOtherBytesOrOtherHolders) {
  expect_caught("a share of one byte more than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kAddShare || seen.error) return false;
                  event.budget += Bytes{1};
                  return true;
                });
  expect_caught("a model that is made of less than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kAddModel || seen.error) return false;
                  if (event.spec.shares.empty()) return false;
                  event.spec.shares.pop_back();
                  return true;
                });
  expect_caught("a split that the yard did not hear of",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kSplitShare || seen.error) return false;
                  event.budget = Bytes{event.budget.value == 1 ? 2 : event.budget.value - 1};
                  return true;
                });
}

TEST(Referee, CatchesALostModelThatStays) {
  expect_caught("a lost model that goes on",
                [](Event& event, Outcome& seen, const Referee& referee) {
                  if (event.kind != EventKind::kLost || seen.error) return false;
                  if (referee.models().at(event.model).phase != Referee::Phase::kResident)
                    return false;
                  return drop<Drain>(seen.actions) || drop<Unload>(seen.actions);
                });
}

TEST(Referee, CatchesACopyThatIsNotToBeMadeOrDropped) {
  expect_caught("a copy that nobody was told of", [](Event&, Outcome& seen, const Referee&) {
    for (Action& action : seen.actions) {
      auto* unload = std::get_if<Unload>(&action);
      if (unload == nullptr || !unload->keep) continue;
      *unload = Unload{unload->model};
      return true;
    }
    return false;
  });
  expect_caught("a copy of a byte more than was reserved",
                [](Event&, Outcome& seen, const Referee&) {
                  for (Action& action : seen.actions) {
                    auto* unload = std::get_if<Unload>(&action);
                    if (unload == nullptr || !unload->keep) continue;
                    unload->most += Bytes{1};
                    return true;
                  }
                  return false;
                });
  expect_caught("a lost drop of a copy",
                [](Event&, Outcome& seen, const Referee&) { return drop<DropCopy>(seen.actions); });
  expect_caught("a copy that is dropped for nobody",
                [](Event& event, Outcome& seen, const Referee& referee) {
                  if (event.kind != EventKind::kTick || seen.error) return false;
                  for (const auto& [id, model] : referee.models()) {
                    if (model.copy.phase != Referee::CopyPhase::kKept) continue;
                    seen.actions.push_back(DropCopy{id});
                    return true;
                  }
                  return false;
                });
}

TEST(Referee, CatchesAFactOfACopyThatTheYardDidNotHear) {
  expect_caught("a copy of a byte less than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kUnloadDone || seen.error || !event.kept)
                    return false;
                  if (!event.kept->made || event.kept->bytes == Bytes{0}) return false;
                  event.kept->bytes -= Bytes{1};
                  return true;
                });
  expect_caught("a dropped copy that freed less than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kCopyDropped || seen.error) return false;
                  if (event.budget == Bytes{0}) return false;
                  event.budget -= Bytes{1};
                  return true;
                });
  expect_caught("a copy in use of which the yard was told that it is back",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kCopyDropped || seen.error) return false;
                  event.kind = EventKind::kCopyInUse;
                  return true;
                });
  expect_caught("another budget of the tier", [](Event& event, Outcome& seen, const Referee&) {
    if (event.kind != EventKind::kSetTierBudget || seen.error) return false;
    event.budget += Bytes{1};
    return true;
  });
  expect_caught("a load that took longer than the yard was told",
                [](Event& event, Outcome& seen, const Referee&) {
                  if (event.kind != EventKind::kLoadDone || seen.error) return false;
                  event.took += seconds{1};
                  return true;
                });
}

TEST(Referee, CatchesAnErrorThatShouldHaveBeenASuccess) {
  expect_caught("a failed tick", [](Event& event, Outcome& seen, const Referee&) {
    if (event.kind != EventKind::kTick) return false;
    seen.error = ErrorCode::kWrongState;
    return true;
  });
}

TEST(Session, ReportsATicketThatWaitsForEver) {
  // A closed device cannot be settled around if nobody opens it: here the yard is closed behind the
  // referee's back.
  const YardOptions wanted = options({100});
  Session session(make_yard(wanted), wanted);
  Event event;
  event.kind = EventKind::kAddModel;
  event.spec.placements = {charge({{0, 60}})};
  const ModelId a = session.step(event).model;
  Actions out;
  ASSERT_TRUE(session.yard().set_device_closed(device(0), true, Tick{}, out).ok());
  event = Event{};
  event.kind = EventKind::kRequest;
  event.model = a;
  session.step(event);
  session.settle();
  EXPECT_TRUE(session.violation());
}

}  // namespace
}  // namespace modelyard::test

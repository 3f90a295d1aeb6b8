#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

// Runs the scripts in csrc/tests/scenarios. A script is a list of blocks: commands, a line `----`,
// and what they are expected to print, up to an empty line. Lines that begin with # are for
// readers.
//
//   yard 100,100 [tier=BYTES [above=0,1] [padding=BYTES]] [policy=lru] [channels=1] [overdue=30s]
//        [backoff=1s..60s] [queue=N] [explain=N]    all devices are above the tier unless said
//   model NAME PLACEMENT[|PLACEMENT...] [reload=SECONDS]
//        PLACEMENT is BYTES@DEVICE[+BYTES@DEVICE...]
//   request NAME as TICKET [within=TIME]    acquire NAME as TICKET
//   cancel TICKET    release TICKET
//   loaded NAME [PLACEMENT] [took=TIME] [from=storage|cache|copy]
//   failed NAME transient|permanent|cancelled
//   unloaded NAME [PLACEMENT] [kept=BYTES [keeping=TIME]]    no copy is made of more than may be
//   reclaimed NAME PLACEMENT
//   copydropped NAME [BYTES]    copylost NAME    remeasured NAME PLACEMENT    lost NAME
//   pin|unpin|unload|remove|forgive NAME    placements NAME PLACEMENT[|PLACEMENT...]
//   budget DEVICE BYTES    tierbudget BYTES    close|open DEVICE
//   wait TIME       lets time pass; the yard is called whenever it asked to be woken
//   show            prints all models and devices
//   explain         prints the decisions since the last time
//
// Printed is what the yard asks for, in its order, each with the time it was asked at, and errors
// by their code. With MODELYARD_REWRITE=1 in the environment the expectations are written anew
// instead of compared: read the difference before it is committed.

namespace modelyard::test {
namespace {

struct BadScript : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

std::int64_t number(const std::string& text) {
  std::size_t used = 0;
  std::int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    throw BadScript("not a number: " + text);
  }
  if (used != text.size()) throw BadScript("not a number: " + text);
  return value;
}

Duration duration(const std::string& text) {
  if (text.ends_with("ms")) return milliseconds{number(text.substr(0, text.size() - 2))};
  if (text.ends_with("s")) return seconds{number(text.substr(0, text.size() - 1))};
  throw BadScript("not a time (say 5s or 200ms): " + text);
}

std::string show(Duration time) {
  const auto ms = std::chrono::duration_cast<milliseconds>(time).count();
  return ms % 1000 == 0 ? std::to_string(ms / 1000) + "s" : std::to_string(ms) + "ms";
}

std::string show(Tick time) { return time == kNever ? "never" : show(time.time_since_epoch()); }

Charge parse_charge(const std::string& text) {
  Charge held;
  if (text == "0") return held;
  for (const std::string& part : split(text, '+')) {
    const auto pair = split(part, '@');
    if (pair.size() != 2) throw BadScript("not a charge (say 60@0+20@1): " + text);
    const std::int64_t index = number(pair[1]);
    if (index < 0 || index >= static_cast<std::int64_t>(kMaxDevices)) {
      throw BadScript("no such device: " + text);
    }
    held.set(device(static_cast<std::uint32_t>(index)), Bytes{number(pair[0])});
  }
  return held;
}

std::vector<Charge> parse_placements(const std::string& text) {
  std::vector<Charge> placements;
  for (const std::string& part : split(text, '|')) placements.push_back(parse_charge(part));
  return placements;
}

std::string show(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kStaleId:
      return "stale id";
    case ErrorCode::kWrongState:
      return "wrong state";
    case ErrorCode::kPinned:
      return "pinned";
    case ErrorCode::kCapacity:
      return "capacity";
  }
  return "?";
}

std::string show(LoadFailure failure) {
  switch (failure) {
    case LoadFailure::kTransient:
      return "transient";
    case LoadFailure::kPermanent:
      return "permanent";
    case LoadFailure::kCancelled:
      return "cancelled";
  }
  return "?";
}

// A command's words, and its name=value options.
struct Command {
  explicit Command(const std::string& line) {
    std::istringstream stream(line);
    for (std::string word; stream >> word;) {
      const std::size_t equals = word.find('=');
      if (equals == std::string::npos) {
        words.push_back(word);
      } else {
        options[word.substr(0, equals)] = word.substr(equals + 1);
      }
    }
  }
  [[nodiscard]] const std::string& word(std::size_t at) const {
    if (at >= words.size()) throw BadScript("something is missing after: " + words.back());
    return words[at];
  }
  [[nodiscard]] std::optional<std::string> option(const std::string& name) const {
    const auto found = options.find(name);
    return found == options.end() ? std::nullopt : std::optional(found->second);
  }

  std::vector<std::string> words;
  std::map<std::string, std::string> options;
};

// One script's world.
class Stage {
 public:
  // Runs one command and returns what it printed.
  std::string run(const std::string& line) {
    printed_.str("");
    const Command command(line);
    try {
      dispatch(command);
    } catch (const BadScript& bad) {
      throw BadScript("`" + line + "`: " + bad.what());
    }
    return printed_.str();
  }

 private:
  void dispatch(const Command& command) {
    const std::string& verb = command.word(0);
    if (verb == "yard") return make_yard_from(command);
    if (harness_ == nullptr) throw BadScript("the first command is `yard`");
    if (verb == "wait") return wait(duration(command.word(1)));
    if (verb == "show") return show_all();
    if (verb == "explain") return show_explanations();
    step(event_of(command), command);
  }

  void make_yard_from(const Command& command) {
    if (harness_ != nullptr) throw BadScript("a script has one yard");
    YardOptions wanted;
    for (const std::string& budget : split(command.word(1), ',')) {
      wanted.budgets.push_back(Bytes{number(budget)});
    }
    const auto count = [&](const char* name, std::uint32_t& into) {
      if (const auto given = command.option(name))
        into = static_cast<std::uint32_t>(number(*given));
    };
    if (const auto tier = command.option("tier")) {
      wanted.tier_budget = Bytes{number(*tier)};
      wanted.copy_padding = Bytes{number(command.option("padding").value_or("0"))};
      const auto above = command.option("above");
      wanted.above_tier.assign(wanted.budgets.size(), !above);
      for (const std::string& each : split(above.value_or(""), ',')) {
        wanted.above_tier.at(static_cast<std::size_t>(number(each))) = true;
      }
    }
    wanted.policy = command.option("policy").value_or(wanted.policy);
    count("channels", wanted.load_channels_per_device);
    count("queue", wanted.max_waiting_per_model);
    count("explain", wanted.explain_capacity);
    if (const auto given = command.option("overdue")) wanted.overdue_after = duration(*given);
    if (const auto given = command.option("backoff")) {
      const std::size_t dots = given->find("..");
      if (dots == std::string::npos) throw BadScript("say backoff=1s..60s");
      wanted.backoff_initial = duration(given->substr(0, dots));
      wanted.backoff_max = duration(given->substr(dots + 2));
    }
    harness_ = std::make_unique<Harness>(wanted);
  }

  [[nodiscard]] ModelId model(const std::string& name) const {
    const auto found = models_.find(name);
    if (found == models_.end()) throw BadScript("no model " + name);
    return found->second;
  }
  [[nodiscard]] TicketId ticket(const std::string& name) const {
    const auto found = tickets_.find(name);
    if (found == tickets_.end()) throw BadScript("no ticket " + name);
    return found->second;
  }

  [[nodiscard]] Event event_of(const Command& command) const {
    static const std::map<std::string, EventKind> kinds{
        {"model", EventKind::kAddModel},
        {"placements", EventKind::kUpdatePlacements},
        {"remove", EventKind::kRemoveModel},
        {"pin", EventKind::kPin},
        {"unpin", EventKind::kUnpin},
        {"unload", EventKind::kUnload},
        {"budget", EventKind::kSetBudget},
        {"close", EventKind::kSetClosed},
        {"open", EventKind::kSetClosed},
        {"acquire", EventKind::kTryAcquire},
        {"request", EventKind::kRequest},
        {"cancel", EventKind::kCancel},
        {"release", EventKind::kRelease},
        {"loaded", EventKind::kLoadDone},
        {"failed", EventKind::kLoadFailed},
        {"unloaded", EventKind::kUnloadDone},
        {"reclaimed", EventKind::kReclaimed},
        {"remeasured", EventKind::kRemeasured},
        {"lost", EventKind::kLost},
        {"forgive", EventKind::kForgive},
        {"copylost", EventKind::kCopyLost},
        {"copydropped", EventKind::kCopyDropped},
        {"tierbudget", EventKind::kSetTierBudget}};
    const auto kind = kinds.find(command.word(0));
    if (kind == kinds.end()) throw BadScript("no such command");
    Event event = harness_->make(kind->second);
    const std::string& subject = command.word(1);
    const auto charge_or_held = [&] {
      return command.words.size() > 2 ? parse_charge(command.word(2)) : harness_->held(event.model);
    };
    switch (event.kind) {
      case EventKind::kAddModel:
        event.spec.label = subject;
        event.spec.placements = parse_placements(command.word(2));
        event.spec.reload_seconds =
            static_cast<double>(number(command.option("reload").value_or("1")));
        break;
      case EventKind::kSetBudget:
        event.budget = Bytes{number(command.word(2))};
        [[fallthrough]];
      case EventKind::kSetClosed:
        event.device = device(static_cast<std::uint32_t>(number(subject)));
        event.closed = command.word(0) == "close";
        break;
      case EventKind::kSetTierBudget:
        event.budget = Bytes{number(subject)};
        break;
      case EventKind::kCancel:
        event.ticket = ticket(subject);
        break;
      case EventKind::kRelease:
        if (!leases_.contains(subject)) throw BadScript("no lease of " + subject);
        event.lease = leases_.at(subject);
        break;
      default:
        event.model = model(subject);
        break;
    }
    switch (event.kind) {
      case EventKind::kUpdatePlacements:
        event.spec.placements = parse_placements(command.word(2));
        break;
      case EventKind::kRequest:
        if (const auto within = command.option("within")) {
          event.deadline = event.now + duration(*within);
        }
        break;
      case EventKind::kLoadDone:
        if (const auto took = command.option("took")) event.took = duration(*took);
        event.source = source(command.option("from").value_or("storage"));
        event.charge = charge_or_held();
        break;
      case EventKind::kUnloadDone:
        event.charge = charge_or_held();
        if (const auto kept = command.option("kept")) {
          event.kept = Kept{.bytes = Bytes{number(*kept)},
                            .took = duration(command.option("keeping").value_or("0s"))};
          event.kept->made = event.kept->bytes <= harness_->entry(event.model).copy.held.total();
        }
        break;
      case EventKind::kCopyDropped:
        event.budget = command.words.size() > 2 ? Bytes{number(command.word(2))}
                                                : harness_->yard().copy_exclusive(event.model);
        break;
      case EventKind::kReclaimed:
      case EventKind::kRemeasured:
        event.charge = parse_charge(command.word(2));
        break;
      case EventKind::kLoadFailed:
        event.failure = failure(command.word(2));
        break;
      default:
        break;
    }
    return event;
  }

  static LoadFailure failure(const std::string& text) {
    for (const LoadFailure each :
         {LoadFailure::kTransient, LoadFailure::kPermanent, LoadFailure::kCancelled}) {
      if (test::show(each) == text) return each;
    }
    throw BadScript("no such failure: " + text);
  }

  static Source source(const std::string& text) {
    if (text == "storage") return Source::kStorage;
    if (text == "cache") return Source::kPageCache;
    if (text == "copy") return Source::kCopy;
    throw BadScript("no such source: " + text);
  }

  void step(const Event& event, const Command& command) {
    const Outcome outcome = harness_->step(event);
    if (outcome.error) {
      print("error: " + test::show(*outcome.error));
      return;
    }
    if (event.kind == EventKind::kAddModel) {
      models_[event.spec.label] = outcome.model;
      names_[outcome.model] = event.spec.label;
    }
    if (event.kind == EventKind::kRequest || event.kind == EventKind::kTryAcquire) {
      if (command.words.size() != 4 || command.word(2) != "as") {
        throw BadScript("say `" + command.word(0) + " NAME as TICKET`");
      }
      const std::string& name = command.word(3);
      if (event.kind == EventKind::kRequest) {
        tickets_[name] = outcome.ticket;
        ticket_names_[outcome.ticket] = name;
      } else if (outcome.lease) {
        leases_[name] = *outcome.lease;
        print("hit " + name);
      } else {
        print("miss");
      }
    }
    print(outcome.actions);
  }

  void wait(Duration time) {
    const Tick end = harness_->now() + time;
    for (int wakes = 0; harness_->wake_at() <= end; ++wakes) {
      if (wakes > 1000) throw BadScript("the yard asks to be woken for ever");
      harness_->set_clock(std::max(harness_->now(), harness_->wake_at()));
      print(harness_->step(harness_->make(EventKind::kTick)).actions);
    }
    harness_->set_clock(end);
  }

  void print(const std::string& line) {
    printed_ << '[' << test::show(harness_->now()) << "] " << line << '\n';
  }

  void print(const Actions& actions) {
    for (const Action& action : actions) print(words(action));
  }

  [[nodiscard]] std::string name(ModelId id) const {
    const auto found = names_.find(id);
    return found == names_.end() ? "nobody" : found->second;
  }

  [[nodiscard]] std::string words(const Action& action) {
    if (const auto* grant = std::get_if<Grant>(&action)) {
      const std::string& granted = ticket_names_[grant->ticket];
      leases_[granted] = grant->lease;
      return "grant " + granted;
    }
    if (const auto* load = std::get_if<Load>(&action)) {
      return "load " + name(load->model) + " " + describe(harness_->held(load->model));
    }
    if (const auto* stop = std::get_if<CancelLoad>(&action))
      return "cancel load " + name(stop->model);
    if (const auto* drain = std::get_if<Drain>(&action)) return "drain " + name(drain->model);
    if (const auto* unload = std::get_if<Unload>(&action)) {
      return "unload " + name(unload->model) + (unload->keep ? " keep" : "");
    }
    if (const auto* dropped = std::get_if<DropCopy>(&action)) {
      return "drop copy " + name(dropped->model);
    }
    if (const auto* wake = std::get_if<WakeAt>(&action)) return "wake at " + test::show(wake->at);
    return words(std::get<Refuse>(action));
  }

  [[nodiscard]] std::string words(const Refuse& refusal) {
    std::ostringstream text;
    text << "refuse " << ticket_names_[refusal.ticket] << ": " << to_string(refusal.reason);
    if (refusal.reason == RefuseReason::kLoadFailed) text << ", " << test::show(refusal.failure);
    if (refusal.needed > Bytes{0}) {
      text << ", device " << position(refusal.device) << " needs " << refusal.needed.value
           << ", free " << refusal.free.value << " of " << refusal.budget.value;
      for (const Holder& holder : refusal.holders) {
        if (holder.bytes > Bytes{0}) {
          text << ", " << name(holder.model) << " holds " << holder.bytes.value;
        }
      }
    }
    if (refusal.retry_after > Duration::zero()) {
      text << ", retry after " << test::show(refusal.retry_after);
    }
    return text.str();
  }

  void show_all() {
    for (const auto& [label, id] : models_) {
      const Entry* entry = harness_->yard().entry(id);
      if (entry == nullptr) continue;
      printed_ << label << ": " << to_string(entry->state);
      if (!entry->held.empty()) printed_ << ", holds " << describe(entry->held);
      if (!entry->quarantined.empty()) printed_ << ", quarantined " << describe(entry->quarantined);
      if (entry->lease_count > 0) printed_ << ", leases " << entry->lease_count;
      if (entry->waiting_count > 0) printed_ << ", waiting " << entry->waiting_count;
      if (entry->pinned) printed_ << ", pinned";
      if (entry->removed) printed_ << ", removed";
      if (entry->copy.state != CopyState::kNone) {
        printed_ << ", copy " << to_string(entry->copy.state);
        if (!entry->copy.held.empty()) printed_ << ' ' << entry->copy.held.total().value;
      }
      printed_ << '\n';
    }
    const Yard& yard = harness_->yard();
    const auto devices = static_cast<std::uint32_t>(yard.device_count());
    const bool tier = yard.tier() != kNoDevice;
    for (std::uint32_t i = 0; i < devices + (tier ? 1 : 0); ++i) {
      const Account& account = harness_->account(i);
      printed_ << (i < devices ? "device " + std::to_string(i) : "tier") << ": used "
               << account.used().value << " of " << account.budget.value;
      const auto part = [&](const char* what, Bytes bytes) {
        if (bytes > Bytes{0}) printed_ << ", " << what << ' ' << bytes.value;
      };
      part("reserved", account.reserved);
      part("resident", account.resident);
      part("draining", account.draining);
      part("quarantined", account.quarantined);
      part("deficit", account.deficit);
      if (harness_->yard().device_closed(device(i))) printed_ << ", closed";
      printed_ << '\n';
    }
  }

  void show_explanations() {
    for (const Explanation& each : harness_->yard().explanations().entries()) {
      if (each.sequence <= explained_) continue;
      explained_ = each.sequence;
      printed_ << '[' << test::show(each.at) << "] " << to_string(each.decision);
      if (each.model != ModelId{}) printed_ << ' ' << name(each.model);
      if (each.cause != ModelId{}) {
        printed_ << " for " << name(each.cause);
      } else if (each.why != Why::kNone) {
        printed_ << ", " << to_string(each.why);
      }
      if (each.device != kNoDevice) printed_ << " of device " << position(each.device);
      if (each.bytes > Bytes{0}) printed_ << ", bytes " << each.bytes.value;
      if (each.waited > Duration::zero()) printed_ << ", waited " << test::show(each.waited);
      printed_ << '\n';
    }
  }

  std::unique_ptr<Harness> harness_;
  std::map<std::string, ModelId> models_;
  std::map<ModelId, std::string> names_;
  std::map<std::string, TicketId> tickets_;
  std::map<TicketId, std::string> ticket_names_;
  std::map<std::string, LeaseId> leases_;
  std::uint64_t explained_{0};
  std::ostringstream printed_;
};

// The script with what its commands print in place of what it expected.
std::string replay(const std::string& script) {
  Stage stage;
  std::ostringstream result;
  std::istringstream lines(script);
  std::string printed;
  bool expecting = false;
  for (std::string line; std::getline(lines, line);) {
    if (expecting) {
      expecting = !line.empty();
      if (!expecting) result << '\n';
    } else if (line == "----") {
      result << "----\n" << printed;
      printed.clear();
      expecting = true;
    } else {
      result << line << '\n';
      if (!line.empty() && !line.starts_with('#')) printed += stage.run(line);
      if (line.empty() && !printed.empty())
        throw BadScript("a block without ---- printed:\n" + printed);
    }
  }
  if (!printed.empty()) throw BadScript("the last block has no ----");
  return result.str();
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> scripts() {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(MODELYARD_SCENARIO_DIR)) {
    if (file.path().extension() == ".txt") names.push_back(file.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Scenario : public ::testing::TestWithParam<std::string> {};

TEST_P(Scenario, GoesAsWritten) {
  const std::filesystem::path path =
      std::filesystem::path(MODELYARD_SCENARIO_DIR) / (GetParam() + ".txt");
  const std::string script = read(path);
  const std::string result = replay(script);
  const char* rewrite = std::getenv("MODELYARD_REWRITE");
  if (rewrite != nullptr && std::string(rewrite) == "1") {
    std::ofstream(path, std::ios::binary) << result;
    return;
  }
  EXPECT_EQ(script, result) << "to accept the new output: MODELYARD_REWRITE=1";
}

INSTANTIATE_TEST_SUITE_P(Scripts, Scenario, ::testing::ValuesIn(scripts()),
                         [](const auto& each) { return each.param; });

TEST(ScenarioRunner, FindsTheScripts) { EXPECT_GE(scripts().size(), 14U); }

TEST(ScenarioRunner, NoticesAnExpectationThatIsWrong) {
  const std::string good = "yard 100\nmodel a 60@0\nrequest a as r\n----\n[0s] load a 60@0\n";
  EXPECT_EQ(replay(good), good);
  const std::string wrong = "yard 100\nmodel a 60@0\nrequest a as r\n----\n[0s] grant r\n";
  EXPECT_EQ(replay(wrong), good);
  const std::string silent = "yard 100\nmodel a 60@0\nrequest a as r\n----\n";
  EXPECT_EQ(replay(silent), good);
}

TEST(ScenarioRunner, RefusesAScriptItDoesNotUnderstand) {
  for (const char* bad :
       {"model a 60@0\n----\n", "yard 100\nfly\n----\n", "yard 100\nrequest a as r\n----\n",
        "yard 100\nmodel a 60\n----\n", "yard 100\nwait 5\n----\n", "yard x\n----\n",
        "yard 100\nmodel a 60@0\nrequest a\n----\n", "yard 100\nmodel a 6@0\nrequest a as r\n"}) {
    EXPECT_THROW(replay(bad), BadScript) << bad;
  }
}

}  // namespace
}  // namespace modelyard::test

#pragma once

#include <array>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "modelyard/action.hpp"
#include "modelyard/charge.hpp"
#include "modelyard/departures.hpp"
#include "modelyard/entry_table.hpp"
#include "modelyard/explain.hpp"
#include "modelyard/ledger.hpp"
#include "modelyard/pace.hpp"
#include "modelyard/planner.hpp"
#include "modelyard/policy.hpp"
#include "modelyard/regret.hpp"
#include "modelyard/reload.hpp"
#include "modelyard/result.hpp"
#include "modelyard/shares.hpp"
#include "modelyard/types.hpp"

namespace modelyard {

/// A model that has waited for so many times what its load takes, and for five seconds at least,
/// may make models in use leave that have paid for their own loads amply.
inline constexpr double kImpatientLoads = 30;
inline constexpr Duration kLeastImpatience{std::chrono::seconds{5}};
/// How long a model has to have been in use before others may make it leave while it is, in loads
/// of its own: for an impatient model, and for an overdue one.
inline constexpr double kWorkedForImpatient = 10;
inline constexpr double kWorkedForOverdue = 1;
/// Nobody leaves for a model whose device has to do for longer than the load takes, and this.
inline constexpr double kPressureSlack = 0.1;
/// After so many requests for other models a request counts half in a model's demand.
inline constexpr double kDemandFades = 2000;
/// A device is behind that has more work than this, and gives a model away once it has been so for
/// that long: a burst is over by then.
inline constexpr double kBehindSeconds = 2;
/// And more requests than this: where each takes seconds a few that run are no sign of it.
inline constexpr std::uint32_t kBehindRequests = 8;
inline constexpr Duration kBehindFor{std::chrono::seconds{10}};
/// How often that is looked at, at most.
inline constexpr Duration kReliefEvery{std::chrono::milliseconds{500}};
/// What is asked of two devices has to differ by this part of what is asked of the busier one: less
/// comes and goes by chance, and models would go to and fro with it.
inline constexpr double kReliefGap = 0.05;
/// How long a model that was given away waits for the other device, once it has left and is wanted.
inline constexpr Duration kMeantFor{std::chrono::seconds{10}};
/// How many seconds sooner, beside its load, a model given away has to be served elsewhere.
inline constexpr double kReliefLeast = 1;
/// A request is out of reach of its device if this many times what it is expected to take is more
/// than it has: an estimate that is a little too low must not make everybody a little late.
inline constexpr double kReachMargin = 1.25;
/// Nobody is told to come again sooner.
inline constexpr Duration kLeastRetry{std::chrono::milliseconds{10}};

/// How a yard behaves. Every bound is explicit.
struct YardOptions {
  std::vector<Bytes> budgets;  ///< One a device, 1 to kMaxDevices; with a host tier one less.
  Bytes tier_budget{0};        ///< Of the host tier; 0 for none.
  Bytes copy_padding{0};       ///< What a copy may take beyond the model's bytes, as long as none
                               ///< of the model has been made: it fills whole pages.
  std::vector<bool> above_tier{};  ///< For each device, if copies of its models may be kept on the
                                   ///< host tier. Not looked at without one.
  std::string policy{"ensemble"};
  std::uint32_t max_waiting_per_model{1024};
  std::uint32_t max_waiting{65536};
  std::uint32_t load_channels_per_device{1};  ///< Loads that may run on a device at once.
  Duration overdue_after{
      std::chrono::seconds{30}};  ///< A request this old may make models in use drain.
  Duration backoff_initial{std::chrono::seconds{1}};
  Duration backoff_max{std::chrono::seconds{60}};
  std::uint32_t explain_capacity{4096};
};

/// A model to be added.
struct ModelSpec {
  std::string label;
  std::vector<Charge> placements;  ///< 1 to 16 alternatives, the preferred one first. Upper bounds
                                   ///< of what a load takes.
  double reload_seconds{1};        ///< Until a load has been measured. Above zero, finite.
  std::vector<ShareId> shares{};   ///< What it holds together with others, each once, besides the
                                   ///< placement's bytes; see add_share.
  std::vector<DeviceIndex> shares_on{};  ///< For each placement where it holds them; kNoDevice, or
                                         ///< an empty list, for copies of its own, which the
                                         ///< placement's bytes then include.
  std::optional<ModelId>
      replaces{};  ///< A model whose place it takes: it inherits how often that
                   ///< one was wanted and how long it took to load. Both stay
                   ///< models of their own; removing the old one is the caller's.
};

/// Counters since the yard was made.
struct YardCounters {
  std::uint64_t request_count{0};
  std::uint64_t hit_count{0};
  std::uint64_t load_count{0};
  std::uint64_t load_failure_count{0};
  std::uint64_t eviction_count{0};
  std::uint64_t promotion_count{0};  ///< Of the loads, those from a copy on the host tier.
  std::uint64_t copy_count{0};       ///< Copies made.
  std::uint64_t copy_drop_count{0};  ///< Copies dropped.
  double load_seconds{0};
};

/// What became of a copy that an unload was to make.
struct Kept {
  Bytes bytes;      ///< What it holds beside the model's shares, all of which it holds too; or
                    ///< what it would have needed.
  Duration took{};  ///< How long making it took.
  bool made{true};  ///< False if it would have been larger than Unload::most: there is none.
};

/// Counters of one device.
struct DeviceCounters {
  std::uint64_t load_count{0};
  std::uint64_t eviction_count{0};
};

/// Owns which model is resident where. Events in, actions out; nothing else changes it.
///
/// It is told what happened (a request, the end of a load, a new budget) and at what time, and
/// appends to `out` what is to be done about it (grant, load, unload, refuse). It does no I/O, has
/// no clock and no threads, and never calls out: the server, the simulator, the fuzzer and the
/// tests run this very class.
///
/// Invariants, checked by audit() and, where MODELYARD_CHECK_INVARIANTS is set, after every event:
/// - I1: The ledger is the sum of the entries, per device and kind.
/// - I2: On every device used <= budget + deficit, and admitting a model never makes or widens a
///   deficit.
/// - I3: A model is unloaded only when nobody holds a lease on it; a lease is granted only on a
///   RESIDENT model.
/// - I4: A RESIDENT model has no waiting tickets: whoever waits is granted when the load ends.
/// - I5: A pinned model is never a victim. It leaves only if it is removed or lost, or was already
///   leaving when it was pinned.
/// - I6: Every ticket ends in exactly one of Grant, Refuse, or a cancel by its owner.
/// - I7: Victims are chosen only as a complete set that makes the waiting model fit.
/// - I8: A model that waits is QUEUED (or on its way out, to be QUEUED then) and stands in the
///   waiting list at the place of its oldest ticket.
/// - I9: A share is charged once on each device where anybody holds it, as what its liveliest
///   holder is: resident, reserved or draining. On the host tier likewise.
/// - I10: The host tier's account is the sum of the copies. An unload is held back only while room
///   for its copy is being made, and only by copies that are on their way out and not in use.
///
/// Scheduling. Waiting models are looked at in the order of their urgency,
/// (1 + age / c) * sqrt(n): `age` of the oldest request, `c` seconds of a load, `n` requests that
/// wait. Overdue ones come first, in the order in which they became so. A model whose bytes are
/// free is loaded, where most room is left; one whose bytes are on their way back keeps them to
/// itself; one that needs victims gets them if the idle models suffice, where it costs least. One
/// that needs the load channels of several devices and cannot have all of them keeps the free ones,
/// except from loads that are over by the time the others are free.
///
/// Three rules keep models from chasing each other out. A model in use leaves only after it has
/// been in use for as long as its load took (use before evict). Its requests are served before it
/// leaves, so nobody is passed over by whom it leaves for (older head only). And nobody leaves for
/// a model that would only join the queue of a device that is behind with its work by more than the
/// load takes (back-pressure).
///
/// One that could only get room from models in use lets others pass, but not for ever. When it is
/// impatient (it has waited for 30 times its load, and 5 s) models that have been in use for 10
/// times theirs drain for it. When it is overdue, because its oldest request has waited for
/// `overdue_after`, or for half the time to its deadline if a load fits into the other half, the
/// cheapest set is drained for it, what becomes free is its own, and back-pressure does not hold
/// it. So a small load is not stuck behind a big one, a big one is not starved by small ones, and a
/// model in endless use is asked to leave in the end.
///
/// Relief. Models stay where they are while they are wanted, and so a few hot ones may keep a
/// device busy while others idle. One that has been behind with its work for 10 s (more than 2 s of
/// it, and more than 8 requests, at every look) gives a model away: it serves the requests that it
/// has, leaves, and is loaded on another device where it may be. The one is chosen that moves the
/// most of what is asked, for a second of loading, to a device that is not asked more than this one
/// then, and is asked less by a twentieth now; that would serve it sooner by the load and 1 s; and
/// that has room, or idle models to make some. Nobody who is pinned, on several devices, set aside
/// for, or has not been in use for as long as its load took. There it goes, and for 10 s of waiting
/// once it has left (half of what a deadline leaves beside the load) nowhere else: most room may be
/// where it comes from, or on another device that is behind.
///
/// The bound. A request that is neither refused nor cancelled, on open devices whose models are not
/// pinned, waits for no longer than W + (k + 1) * (L + U + R + C), where W is `overdue_after`, k is
/// how many models were overdue before its own, L the longest load, U the longest unload, R the
/// longest that a request uses a model, and C the seconds of a load that a model in use has to pay
/// for. Requests that come later do not count, however many there are. For a model that is given
/// away W is R + 10 s if that is longer: it serves what it has first, and waits for its new place.
///
/// Deadlines. A request whose deadline is sure to pass is refused when it comes, with the time it
/// would need: if the model is resident and its device has more to do than the time left, or if a
/// load of the model, the last of which was measured, takes longer. If nobody else waits, the
/// model is loaded all the same: the request may come again.
///
/// Shares. What several models have in common (a share) is held by each of them and charged once.
/// Loading a model needs the shares that are not there yet; evicting one frees those that nobody
/// else holds. A share held only by models that are being unloaded counts as on its way back: a
/// model that wants it and loads before it is gone takes it over.
///
/// The host tier. Weights never change, so a copy of them in host memory is as good as the files,
/// and nearer. It is made when a model is evicted from a device that is above the tier, if the
/// seconds that the next load is expected to save are more than making the copy takes, and if there
/// is room, or room can be made by dropping copies that the policy scores lower: by the seconds
/// they save, for the share of the tier they hold. A copy of a model that is on a device counts a
/// quarter of that. A copy outlives the loads from it; then the model is dropped without another.
/// One that turns out to save nothing is dropped. Who is unloaded by hand, or removed, leaves no
/// copy. Shares are charged once on the tier too. A copy that is dropped while somebody is still in
/// its memory holds its bytes and shares until it is back; nobody waits for it, and a copy that is
/// made meanwhile takes its shares over as they are.
///
/// Prices. What a load takes depends on where the weights come from: each model's loads are
/// measured apart by their source. Expected is what the copy takes if there is one, else what files
/// take: from storage and from the page cache, in the proportion in which reloads find the latter.
///
/// Sizes. A placement is an upper bound that the caller vouches for. A load that turns out larger
/// makes a deficit, which is repaid before anything else is loaded on the device, and the placement
/// grows to what was measured: the same promise is not made twice.
///
/// Errors: a call with a stale id, or that does not fit the model's state, changes nothing and says
/// so. Times that run backwards are taken as standing still.
///
/// Cost: try_acquire and release of a resident model touch one entry, one lease slot and one
/// device's pace. Everything else is O(waiting models * log(waiting models) + residents * loads
/// begun) at worst.
///
/// Not thread-safe.
class Yard {
 public:
  /// A yard without models. Fails with kInvalidArgument if an option is out of range or the policy
  /// unknown.
  static Result<Yard> create(YardOptions options);

  Yard(Yard&&) = default;
  Yard& operator=(Yard&&) = default;
  Yard& operator=(const Yard&) = delete;
  ~Yard() = default;

  // --- Models and devices

  /// Adds a model, cold. A model larger than every budget may be added; its requests are refused
  /// with kNeverFits. kStaleId if it replaces a model that is not known.
  Result<ModelId> add_model(ModelSpec spec);
  /// Replaces what a model's next loads may take. What it holds now stays as it is.
  Status update_placements(ModelId model, std::vector<Charge> placements, Tick now, Actions& out) {
    return update_placements(model, std::move(placements), {}, {}, now, out);
  }
  Status update_placements(ModelId model, std::vector<Charge> placements,
                           std::vector<ShareId> shares, std::vector<DeviceIndex> shares_on,
                           Tick now, Actions& out);
  /// Takes a model out. Its waiting tickets are refused (kRemoved), leases run on, its memory comes
  /// back after them. The id stays good for the events of that (load_done, load_failed,
  /// release, unload_done, remeasured, reclaimed) and for nothing else.
  Status remove_model(ModelId model, Tick now, Actions& out);
  /// A pinned model is never a victim. Pinning does not load it.
  Status pin(ModelId model, Tick now, Actions& out);
  Status unpin(ModelId model, Tick now, Actions& out);
  /// Asks a model to leave: at once if it is resident, after its load if somebody waits for that.
  /// Its copy goes too, unless somebody waits for the model. Nothing happens to one that holds
  /// nothing. kPinned if it is pinned.
  Status unload(ModelId model, Tick now, Actions& out);
  /// Changes a budget. Models that no longer fit are drained, idle ones first.
  Status set_budget(DeviceIndex device, Bytes budget, Tick now, Actions& out);
  /// Changes the budget of the host tier; copies go until what is left fits. kWrongState if there
  /// is no tier.
  Status set_tier_budget(Bytes budget, Tick now, Actions& out);
  /// Forgets that loads have failed: a FAILED model is COLD, and may be tried at once.
  Status forgive(ModelId model, Tick now);
  /// While a device is closed nothing is loaded onto it, and what is there drains, pinned models
  /// excepted.
  Status set_device_closed(DeviceIndex device, bool closed, Tick now, Actions& out);

  // --- Shares

  /// Bytes that models may hold together; above zero. It is forgotten with the last model that is
  /// made of it.
  Result<ShareId> add_share(Bytes bytes);
  /// Cuts `part` off a share, less than all of it: a new share that the same models are made of and
  /// hold. For a new model that has only that part in common with them.
  Result<ShareId> split_share(ShareId share, Bytes part);
  /// Forgets a share that no model is made of. kWrongState if one is.
  Status forget_share(ShareId share);

  // --- Requests

  /// The way of a hit: a lease if the model is RESIDENT and the deadline within reach, nothing (and
  /// no change) if not.
  Result<std::optional<LeaseId>> try_acquire(ModelId model, Tick now, Tick deadline = kNever);
  /// Asks for a model, resident or not. The answer to the ticket is a Grant or a Refuse among the
  /// actions of this or a later call. A deadline that has passed, or is out of reach, is refused at
  /// once.
  Result<TicketId> request(ModelId model, Tick now, Tick deadline, Actions& out);
  /// The request behind a ticket is gone. A load that has not begun is dropped with its last
  /// ticket; one that runs goes on.
  Status cancel(TicketId ticket, Tick now, Actions& out);
  /// The request behind a lease is not one that others of its device wait behind: it lasts, and
  /// leaves the device to them in between. Until it is released it keeps its model where it is, as
  /// all do, and counts neither as work of the device nor as a measure of its pace.
  Status set_aside(LeaseId lease);
  /// The request behind a lease has ended.
  Status release(LeaseId lease, Tick now, Actions& out);

  // --- What became of the actions

  /// A load has ended well: the model holds `actual` besides its shares, and loading from `source`
  /// took `took`.
  Status load_done(ModelId model, Tick now, const Charge& actual, Duration took, Source source,
                   Actions& out);
  Status load_done(ModelId model, Tick now, const Charge& actual, Duration took, Actions& out) {
    return load_done(model, now, actual, took, Source::kStorage, out);
  }
  /// A load has failed and holds nothing any more.
  Status load_failed(ModelId model, Tick now, LoadFailure failure, Actions& out);
  /// An unload has ended: `freed` is measurably back, at most exclusive(model). What is missing is
  /// quarantined. `kept` tells of the copy, if one was asked for; nothing if it could not be made.
  Status unload_done(ModelId model, Tick now, const Charge& freed, const std::optional<Kept>& kept,
                     Actions& out);
  Status unload_done(ModelId model, Tick now, const Charge& freed, Actions& out) {
    return unload_done(model, now, freed, std::nullopt, out);
  }
  /// A copy has been dropped: `freed` is measurably back, at most copy_exclusive(model). What is
  /// missing is quarantined on the tier.
  Status copy_dropped(ModelId model, Tick now, Bytes freed, Actions& out);
  /// Somebody is still in the memory of a copy that is being dropped, who knows for how long. It
  /// stays DROPPING and on the books until copy_dropped, and is waited for no longer: unloads that
  /// were held back for it are sent off. Said again it changes nothing. kWrongState unless it is
  /// DROPPING.
  Status copy_in_use(ModelId model, Tick now, Actions& out);
  /// The memory of a model's copy is gone, or going, without anybody having asked: a DropCopy says
  /// when to tell that it is back. kWrongState unless it is KEPT: one that is being made ends with
  /// its unload, one that is being dropped with copy_dropped.
  Status copy_lost(ModelId model, Tick now, Actions& out);
  /// Quarantined bytes of a model have come back.
  Status reclaimed(ModelId model, Tick now, const Charge& bytes, Actions& out);
  /// A resident or draining model was measured again.
  Status remeasured(ModelId model, Tick now, const Charge& actual, Actions& out);
  /// A model's memory is gone without anybody having asked: what held it has died. A resident model
  /// leaves, a pinned one too; who uses it is waited for, and an Unload follows as always.
  /// kWrongState unless it is resident or draining.
  Status lost(ModelId model, Tick now, Actions& out);
  /// Time has passed.
  void tick(Tick now, Actions& out);

  // --- Looking

  /// A yard in the same state that goes its own way from here: for finding out what would happen.
  /// Its ids are the same; what it answers concerns nobody else.
  [[nodiscard]] Yard clone() const { return Yard(*this); }
  /// What comes back when a model leaves now: what it holds alone, and the shares that nobody else
  /// holds. Empty if the id is stale.
  [[nodiscard]] Charge exclusive(ModelId model) const;
  /// What comes back when the model's copy is dropped now.
  [[nodiscard]] Bytes copy_exclusive(ModelId model) const;
  /// Where the host tier's account is; kNoDevice if there is none. It comes after the devices.
  [[nodiscard]] DeviceIndex tier() const { return tier_; }
  /// All that a model holds, shares included. Empty if the id is stale.
  [[nodiscard]] Charge held_with_shares(ModelId model) const;
  /// A share, or null if the id is stale.
  [[nodiscard]] const Share* share(ShareId id) const { return shares_.find(id); }
  [[nodiscard]] std::size_t share_count() const { return shares_.size(); }
  /// Bytes that models would hold more on a device if each held its shares alone. May be above
  /// kMaxBytes. O(shares).
  [[nodiscard]] Bytes saved(DeviceIndex device) const;
  /// Seconds until a device has ended what it has been given, at its present pace; 0 while that is
  /// not known.
  [[nodiscard]] double backlog_seconds(DeviceIndex device) const {
    return paces_[position(device)].backlog_seconds(now_);
  }
  /// The same with what has been done of what runs: changes only with leases.
  [[nodiscard]] double work_seconds(DeviceIndex device) const {
    return paces_[position(device)].work_seconds();
  }
  /// Seconds that it takes to answer a request for a model that comes now: for its device to end
  /// what it has and this one, or for a load alone. 0 if that is not known, or the id is stale.
  [[nodiscard]] double expected_wait_seconds(ModelId model) const;
  /// The leases on a model, in no order. O(leases).
  [[nodiscard]] std::vector<LeaseId> leases_of(ModelId model) const;
  /// The entry of a model, or null if the id is stale. Valid until the next call that changes the
  /// yard.
  [[nodiscard]] const Entry* entry(ModelId model) const { return entries_.find(model); }
  [[nodiscard]] std::size_t model_count() const { return entries_.size(); }
  /// Devices, the host tier not among them.
  [[nodiscard]] std::size_t device_count() const { return options_.budgets.size(); }
  [[nodiscard]] std::size_t waiting_count() const { return tickets_.size(); }
  [[nodiscard]] std::size_t lease_count() const { return leases_.size(); }
  [[nodiscard]] const Account& account(DeviceIndex device) const { return ledger_.account(device); }
  [[nodiscard]] bool device_closed(DeviceIndex device) const { return closed_[position(device)]; }
  [[nodiscard]] const DeviceCounters& device_counters(DeviceIndex device) const {
    return device_counters_[position(device)];
  }
  [[nodiscard]] const YardCounters& counters() const { return counters_; }
  [[nodiscard]] const ExplainLog& explanations() const { return explain_; }
  /// Who was made to leave, by cause and age.
  [[nodiscard]] const Departures& departures() const { return departures_; }
  /// What LRU would have spent on loading, to be compared with counters().load_seconds.
  [[nodiscard]] const LruBill& lru_bill() const { return lru_bill_; }
  [[nodiscard]] std::string_view policy_name() const { return policy_->name(); }
  /// Looks at the policy: by which rule it goes, what its shadow caches cost.
  [[nodiscard]] const Policy& policy() const { return *policy_; }

  /// Who would have to leave for the model to be loaded now: the answer the scheduler would act
  /// upon. Nothing if it needs nobody, or if the idle models do not suffice.
  [[nodiscard]] std::optional<Plan> plan_for(ModelId model) const;

  /// Checks I1 to I10 against the entries, tickets and leases themselves. The error names the first
  /// violation.
  [[nodiscard]] Status audit() const;

 private:
  Yard(const Yard&) = default;  // See clone.

  // Copies with its owner.
  struct OwnedPolicy {
    explicit OwnedPolicy(std::unique_ptr<Policy> owned) : policy(std::move(owned)) {}
    OwnedPolicy(const OwnedPolicy& other) : policy(other.policy->clone()) {}
    OwnedPolicy(OwnedPolicy&&) = default;
    OwnedPolicy& operator=(const OwnedPolicy&) = delete;
    OwnedPolicy& operator=(OwnedPolicy&&) = default;
    ~OwnedPolicy() = default;
    Policy* operator->() const { return policy.get(); }
    Policy& operator*() const { return *policy; }

    std::unique_ptr<Policy> policy;
  };

  // For whom or what something is done.
  struct Cause {
    Why why{Why::kNone};
    ModelId model{};
    DeviceIndex device{kNoDevice};
  };

  // What is free on every device, and what will be.
  struct Room {
    std::array<Bytes, kMaxDevices> available{};  // Free now.
    std::array<Bytes, kMaxDevices> unloading{};  // Free soon: nobody uses them any more.
    std::array<Bytes, kMaxDevices> leaving{};    // Free when their requests have ended.
  };
  // What one scheduling pass has left for the models it has not looked at yet.
  struct Pass;
  // A waiting model's place in a pass: overdue ones by the time since when, then the most urgent.
  struct Turn {
    bool overdue{false};
    Tick since{};
    double urgency{0};
    std::uint64_t sequence{0};
    EntryIndex entry{0};

    bool operator<(const Turn& other) const {
      if (overdue != other.overdue) return overdue;
      if (overdue && since != other.since) return since < other.since;
      if (!overdue && urgency != other.urgency) return urgency > other.urgency;
      return sequence < other.sequence;
    }
  };
  // Where room can be made, and by whom.
  struct Way {
    std::optional<Plan> plan;
    std::uint32_t placement{0};
    double cost{0};
    bool pressed{false};  // A device was passed over because it is behind with its work.
  };

  // Which holders of a share make it be there for a model that is to be loaded.
  enum class Present { kAny, kStaying, kFirm, kPinned };

  // What a load needs beside what is there. The two differ by shares of models that drain: they are
  // there as long as those are.
  struct Need {
    Charge now;    // With what is there now.
    Charge later;  // With what is there when those who drain have left.
  };

  // What a plan counts on besides free bytes: what is being unloaded, or also what leaves when its
  // requests have ended.
  enum class Count { kUnloading, kLeaving };

  Yard(YardOptions options, std::unique_ptr<Policy> policy);

  // Every event starts with begin and ends with finish. `bounds` says whether what models may hold
  // at most can have changed: somebody may wait in vain then.
  enum class Bounds { kSame, kMayDiffer };
  void begin(Tick now, Actions& out, Bounds bounds = Bounds::kMayDiffer);
  void finish(Actions& out);

  void tell_policy(EntryIndex index);
  void tell_budgets();
  [[nodiscard]] Entry* live(ModelId model);
  [[nodiscard]] Status check_placements(std::span<const Charge> placements) const;
  [[nodiscard]] Status check_shares(std::span<const ShareId> shares,
                                    std::span<const DeviceIndex> shares_on,
                                    std::span<const Charge> placements) const;
  [[nodiscard]] Status check_measured(const Entry& entry, const Charge& actual) const;
  [[nodiscard]] Status check_kept(const Entry& entry, const std::optional<Kept>& kept) const;
  [[nodiscard]] Entry& entry_at(EntryIndex index) { return *entries_.at(index); }
  [[nodiscard]] const Entry& entry_at(EntryIndex index) const { return *entries_.at(index); }

  // Tickets and leases.
  TicketId add_ticket(EntryIndex index, Tick deadline);
  void unlink_ticket(TicketId id);
  void drop_ticket(TicketId id);
  void refuse(TicketId id, Refuse refusal, Actions& out);
  void refuse_all(EntryIndex index, const Refuse& refusal, Actions& out);
  LeaseId add_lease(EntryIndex index);
  void grant_waiting(EntryIndex index, Actions& out);
  void expire(Actions& out);

  // The list of waiting models. An entry stands in it while stands_in_waiting says so.
  [[nodiscard]] static bool stands_in_waiting(const Entry& entry);
  void join_waiting(EntryIndex index);
  void leave_waiting(EntryIndex index);

  // Shares.
  [[nodiscard]] static DeviceIndex shares_device(const Entry& entry, std::uint32_t placement) {
    return entry.shares.empty() || placement >= entry.shares_on.size() ? kNoDevice
                                                                       : entry.shares_on[placement];
  }
  [[nodiscard]] static Charge touching(const Charge& own, DeviceIndex shares_on);
  void note_empty_placements(const Entry& entry);
  [[nodiscard]] std::optional<Bytes> with_bytes_of(std::span<const ShareId> shares,
                                                   Bytes own) const;
  [[nodiscard]] Charge needed(const Entry& entry, std::uint32_t placement, Present present) const;
  [[nodiscard]] Need need_of(const Entry& entry, std::uint32_t placement) const;
  [[nodiscard]] Charge exclusive_of(const Entry& entry) const;
  [[nodiscard]] bool others_keep(const Entry& entry, const Share& share) const;
  [[nodiscard]] Bytes going_with(const Entry& entry) const;
  [[nodiscard]] Sharing sharing_for(const Entry& entry, std::uint32_t placement,
                                    bool count_leaving) const;
  void take_shares(Entry& entry, DeviceIndex device);
  void turn_shares(const Entry& entry, Holding from, Holding to);
  void pin_shares(const Entry& entry, bool pinned);
  void drop_shares(Entry& entry, Holding from, bool settled);
  void move_holders(std::span<const ShareId> shares, std::optional<Holding> from,
                    std::optional<Holding> to, bool charged = true);
  void change_holders(ShareId id, DeviceIndex device, bool charged, auto&& change);
  void refer(std::span<const ShareId> shares);
  void unrefer(std::span<const ShareId> shares);

  // Transitions.
  void start_load(EntryIndex index, std::uint32_t placement, Actions& out);
  void stop_load(EntryIndex index, Actions& out);
  void end_load(Entry& entry);
  void start_drain(EntryIndex index, Actions& out);
  void send_away(EntryIndex index, const Cause& cause, Actions& out);
  void start_unload(EntryIndex index, Actions& out);
  void come_to_rest(EntryIndex index);
  void drain_closed(Actions& out);
  void learn_size(EntryIndex index, const Charge& actual);

  // The host tier.
  [[nodiscard]] Bytes weight_of(const Entry& entry) const;
  [[nodiscard]] Bytes own_of_copy(const Entry& entry) const;
  [[nodiscard]] double seconds_from_files(const Entry& entry,
                                          double believed = kFirstBelieved) const;
  [[nodiscard]] double seconds_from_copy(const Entry& entry) const;
  void reprice(Entry& entry);
  void reprice_firsts();
  [[nodiscard]] Bytes room_for_copy(const Entry& entry) const;
  [[nodiscard]] Charge exclusive_of(const Copy& copy) const;
  [[nodiscard]] double worth_of_copy(const Entry& entry) const;
  [[nodiscard]] bool may_be_copied(const Entry& entry) const;
  [[nodiscard]] std::vector<Resident> copies(bool wanted_too) const;
  void send_unload(EntryIndex index, Actions& out);
  bool make_room_for_copy(EntryIndex index, Actions& out);
  void resume_awaited(Actions& out);
  void begin_copy(EntryIndex index);
  void end_copy(EntryIndex index, const std::optional<Kept>& kept);
  void drop_copy(EntryIndex index, Cause cause, double score, Actions& out);
  void end_drop(EntryIndex index, const Charge& freed);
  void forget_copy(Entry& entry, Holding from, bool charged);
  void forget(EntryIndex index, const Cause& cause, Actions& out);
  void tidy_tier(Actions& out);

  // Scheduling.
  [[nodiscard]] Tick overdue_at(const Entry& entry) const;
  [[nodiscard]] Tick impatient_at(const Entry& entry) const;
  [[nodiscard]] double urgency(const Entry& entry) const;
  [[nodiscard]] std::vector<Turn> turns() const;
  [[nodiscard]] double demand_of(const Entry& entry) const {
    return entry.demand * kDemandFades /
           (kDemandFades + static_cast<double>(request_clock_ - entry.demand_at));
  }
  [[nodiscard]] std::vector<double> demands() const;
  [[nodiscard]] Duration used_for(const Entry& entry) const;
  [[nodiscard]] Tick worked_at(const Entry& entry, double loads) const;
  [[nodiscard]] double expected_wait(const Entry& entry) const;
  [[nodiscard]] double reach(const Entry& entry) const;
  [[nodiscard]] bool is_within_reach(const Entry& entry, Tick deadline) const;
  [[nodiscard]] Refuse out_of_reach(const Entry& entry, Tick deadline) const;
  /// For a deadline that has passed: the model may be there once it has been loaded.
  [[nodiscard]] Refuse too_late(const Entry& entry) const;
  [[nodiscard]] Duration channels_free_in(const Charge& touched) const;
  // kNoDevice if the charge is empty.
  [[nodiscard]] static DeviceIndex first_of(const Charge& charge) {
    DeviceIndex first = kNoDevice;
    charge.for_each([&](DeviceIndex d, Bytes) { first = std::min(first, d); });
    return first;
  }
  [[nodiscard]] bool is_backed_up(const Entry& entry, const Charge& touched) const;
  [[nodiscard]] Tick served_at(const Entry& entry, DeviceIndex device) const;
  void refuse_hopeless(Actions& out);
  void relieve(Actions& out);
  [[nodiscard]] DeviceIndex look_who_is_behind();
  [[nodiscard]] double worth_giving_away(const Entry& entry, std::uint32_t placement,
                                         DeviceIndex from, std::span<const double> asked) const;
  [[nodiscard]] bool could_go_to(const Entry& entry, std::uint32_t placement, const Pass& pass,
                                 const Charge& idle) const;
  [[nodiscard]] std::vector<double> demands_after_relief() const;
  [[nodiscard]] Tick kept_from_others_until(const Entry& entry) const;
  [[nodiscard]] bool is_meant_for_another(const Entry& entry, const Charge& touched) const;
  [[nodiscard]] std::optional<Refuse> impossible(const Entry& entry) const;
  [[nodiscard]] bool is_closed(const Charge& placement) const {
    return closed_device(placement) != kNoDevice;
  }
  [[nodiscard]] DeviceIndex closed_device(const Charge& placement) const;
  // Who may be asked to leave: the idle ones, and of those in use who have been so for `worked` of
  // their loads.
  [[nodiscard]] std::vector<Resident> residents(std::optional<double> worked) const;
  void fill_holders(Refuse& refusal) const;
  [[nodiscard]] Pass make_pass() const;
  [[nodiscard]] Room room() const;
  [[nodiscard]] Way cheapest_way(const Entry& entry, const Pass& pass,
                                 std::span<const Resident> candidates, Count count,
                                 bool under_pressure = true) const;
  void schedule(Actions& out);
  void repay_deficits(Actions& out);
  void schedule_model(const Turn& turn, Pass& pass, Actions& out);
  void evict(const Plan& plan, const Cause& cause, Actions& out);
  void wake(Actions& out);
  void explain(Decision decision, ModelId model, const Cause& cause, double score, Bytes bytes);
  void tell_cost(Explanation& explanation);

  YardOptions options_;
  OwnedPolicy policy_;
  // As in the ledger, in the form the planner takes. What has one element a device has one for the
  // host tier as well, behind them.
  std::vector<Bytes> budgets_;
  DeviceIndex tier_{kNoDevice};
  Ledger ledger_;
  EntryTable entries_;
  TicketTable tickets_;
  LeaseTable leases_;
  ShareTable shares_;
  ExplainLog explain_;
  YardCounters counters_;
  Departures departures_;
  LruBill lru_bill_;
  std::vector<DeviceCounters> device_counters_;
  TransferPrices prices_;
  std::vector<EntryIndex> awaited_;  // Unloads held back until there is room for a copy, in order.
  std::vector<Bytes> pinned_;     // Held by pinned models that are LOADING or RESIDENT, per device.
  std::vector<Bytes> unloading_;  // Held by models that are UNLOADING, per device.
  std::vector<std::uint32_t> loading_;  // Loads that run, per device.
  std::vector<Tick> loaded_at_;     // When the load that began last is expected to end, per device.
  std::vector<Pace> paces_;         // Of the requests that hold leases, by the home of their model.
  std::vector<Tick> behind_since_;  // Since when each device is behind; kNever if it is not.
  std::vector<bool> closed_;
  std::set<std::pair<std::uint64_t, EntryIndex>> waiting_;  // By the sequence of the oldest ticket.
  std::set<std::pair<Tick, TicketId>> deadlines_;
  RequestClock request_clock_{0};
  std::uint64_t next_sequence_{1};
  Tick now_{};
  Tick wake_at_{kNever};
  Tick relieve_at_{kNever};  // When to look next who is behind; never where there is one device.
  bool pass_owed_{false};    // Tickets have expired, or a wake was due, since the last pass.
  bool look_for_hopeless_{false};  // Somebody who waits may have come to do so in vain.
  bool some_hold_nothing_{false};  // There has been a placement that touches no device.
  bool pressed_{false};            // The last pass held somebody back for a device's backlog.
};

}  // namespace modelyard

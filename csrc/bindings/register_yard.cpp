#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "modelyard/yard.hpp"
#include "register.hpp"

// The GIL is held throughout: every call here is shorter than giving it up and taking it back.

namespace modelyard::bindings {
namespace py = pybind11;

namespace {

ModelId model_id(std::int64_t id) { return static_cast<ModelId>(id); }

DeviceIndex device_index(const Yard& yard, std::int64_t device) {
  if (device < 0 || device >= static_cast<std::int64_t>(yard.device_count())) {
    throw py::value_error("no device has position " + std::to_string(device));
  }
  return static_cast<DeviceIndex>(device);
}

std::vector<Charge> to_placements(const py::list& placements) {
  std::vector<Charge> charges;
  charges.reserve(placements.size());
  for (const py::handle placement : placements)
    charges.push_back(to_charge(placement.cast<py::dict>()));
  return charges;
}

std::vector<ShareId> to_shares(const std::vector<std::int64_t>& ids) {
  std::vector<ShareId> shares;
  shares.reserve(ids.size());
  for (const std::int64_t id : ids) shares.push_back(static_cast<ShareId>(id));
  return shares;
}

std::vector<DeviceIndex> to_devices(const std::vector<std::int64_t>& positions) {
  std::vector<DeviceIndex> devices;
  devices.reserve(positions.size());
  for (const std::int64_t at : positions) {
    devices.push_back(at < 0 || at > std::int64_t{kMaxDevices} ? kNoDevice
                                                               : static_cast<DeviceIndex>(at));
  }
  return devices;
}

Duration nanoseconds_of(double seconds, const char* what) {
  constexpr double kMost = 9e9;
  if (!(seconds >= 0) || seconds > kMost) {
    throw py::value_error(std::string(what) + " must be 0 to 9e9 seconds");
  }
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// A device, or the host tier.
DeviceIndex account_index(const Yard& yard, std::int64_t at) {
  if (yard.tier() != kNoDevice && at == static_cast<std::int64_t>(position(yard.tier()))) {
    return yard.tier();
  }
  return device_index(yard, at);
}

Yard make_yard(const std::vector<std::int64_t>& budgets, const std::string& policy,
               std::uint32_t max_waiting_per_model, std::uint32_t max_waiting,
               std::uint32_t loads_per_device, double overdue_after_s, double backoff_initial_s,
               double backoff_max_s, std::uint32_t explain_capacity, std::int64_t tier_budget,
               std::vector<bool> above_tier, std::int64_t copy_padding) {
  YardOptions options;
  for (std::int64_t budget : budgets) options.budgets.push_back(Bytes{budget});
  options.policy = policy;
  options.max_waiting_per_model = max_waiting_per_model;
  options.max_waiting = max_waiting;
  options.load_channels_per_device = loads_per_device;
  options.overdue_after = nanoseconds_of(overdue_after_s, "overdue_after_s");
  options.backoff_initial = nanoseconds_of(backoff_initial_s, "backoff_initial_s");
  options.backoff_max = nanoseconds_of(backoff_max_s, "backoff_max_s");
  options.explain_capacity = explain_capacity;
  options.tier_budget = Bytes{tier_budget};
  options.above_tier = std::move(above_tier);
  options.copy_padding = Bytes{copy_padding};
  return unwrap(Yard::create(std::move(options)));
}

// Calls an event that appends actions, and translates what comes of it.
template <typename Event>
py::object actions_of(Event&& event) {
  Actions actions;
  if (Status status = event(actions); !status) raise(status.error());
  return to_python(actions);
}

py::dict to_python(const Explanation& e) {
  const std::string_view decision = to_string(e.decision);
  py::dict record;
  record["sequence"] = e.sequence;
  record["at_ns"] = e.at.time_since_epoch().count();
  record["decision"] = py::str(decision.data(), decision.size());
  record["model"] = to_integer(e.model);
  const std::string_view why = to_string(e.why);
  record["why"] = py::str(why.data(), why.size());
  record["cause"] = to_integer(e.cause);
  record["device"] =
      e.device == kNoDevice ? std::int64_t{-1} : std::int64_t{static_cast<std::uint32_t>(e.device)};
  record["score"] = e.score;
  record["seconds"] = e.decision == Decision::kLoadDone ? e.score : 0.0;
  record["bytes"] = e.bytes.value;
  record["shared_bytes"] = e.shared_bytes.value;
  record["waited_ns"] = e.waited.count();
  record["idle_ns"] = e.idle.count();
  record["stayed_ns"] = e.stayed.count();
  record["expected_s"] = e.expected_seconds;
  record["rule"] = py::str(e.rule.data(), e.rule.size());
  record["waiting_count"] = e.waiting_count;
  record["waited_sum_ns"] = e.waited_sum.count();
  return record;
}

}  // namespace

void register_yard(py::module_& module) {
  py::class_<YardCounters>(module, "Counters", "What the yard has counted since it was made.")
      .def_readonly("request_count", &YardCounters::request_count)
      .def_readonly("hit_count", &YardCounters::hit_count)
      .def_readonly("load_count", &YardCounters::load_count)
      .def_readonly("load_failure_count", &YardCounters::load_failure_count)
      .def_readonly("eviction_count", &YardCounters::eviction_count)
      .def_readonly("promotion_count", &YardCounters::promotion_count)
      .def_readonly("copy_count", &YardCounters::copy_count)
      .def_readonly("copy_drop_count", &YardCounters::copy_drop_count)
      .def_readonly("load_seconds", &YardCounters::load_seconds);

  py::class_<Yard>(module, "Yard",
                   "Owns which model is resident where. Times are nanoseconds of the caller's "
                   "clock; charges are {device position: bytes}. Methods that can have "
                   "consequences return the actions to carry out, in order, or None.")
      .def(py::init(&make_yard), py::kw_only(), py::arg("budgets"), py::arg("policy") = "ensemble",
           py::arg("max_waiting_per_model") = 1024, py::arg("max_waiting") = 65536,
           py::arg("loads_per_device") = 1, py::arg("overdue_after_s") = 30.0,
           py::arg("backoff_initial_s") = 1.0, py::arg("backoff_max_s") = 60.0,
           py::arg("explain_capacity") = 4096, py::arg("tier_budget") = 0,
           py::arg("above_tier") = std::vector<bool>{}, py::arg("copy_padding") = 0)
      .def(
          "add_model",
          [](Yard& yard, std::string label, const py::list& placements, double reload_seconds,
             std::int64_t replaces, const std::vector<std::int64_t>& shares,
             const std::vector<std::int64_t>& shares_on) {
            ModelSpec spec;
            spec.shares = to_shares(shares);
            spec.shares_on = to_devices(shares_on);
            if (replaces != 0) spec.replaces = model_id(replaces);
            spec.label = std::move(label);
            spec.placements = to_placements(placements);
            spec.reload_seconds = reload_seconds;
            return to_integer(unwrap(yard.add_model(std::move(spec))));
          },
          "Adds a model, cold. `replaces` is a model whose history it takes over, or 0. `shares` "
          "are "
          "held besides each placement's bytes, on the device at its place in `shares_on`; -1 "
          "there "
          "for a placement that holds none.",
          py::arg("label"), py::arg("placements"), py::arg("reload_seconds"),
          py::arg("replaces") = 0, py::arg("shares") = std::vector<std::int64_t>{},
          py::arg("shares_on") = std::vector<std::int64_t>{})
      .def(
          "add_share",
          [](Yard& yard, std::int64_t bytes) {
            return to_integer(unwrap(yard.add_share(Bytes{bytes})));
          },
          "Bytes that models may hold together; they are charged once a device.", py::arg("bytes"))
      .def(
          "split_share",
          [](Yard& yard, std::int64_t share, std::int64_t part) {
            return to_integer(unwrap(yard.split_share(static_cast<ShareId>(share), Bytes{part})));
          },
          "Cuts a part off a share: a new share of the same models.", py::arg("share"),
          py::arg("part"))
      .def(
          "forget_share",
          [](Yard& yard, std::int64_t share) {
            if (Status done = yard.forget_share(static_cast<ShareId>(share)); !done) {
              raise(done.error());
            }
          },
          "Forgets a share that no model is made of.", py::arg("share"))
      .def(
          "update_placements",
          [](Yard& yard, std::int64_t model, const py::list& placements, std::int64_t now,
             const std::vector<std::int64_t>& shares, const std::vector<std::int64_t>& shares_on) {
            return actions_of([&](Actions& out) {
              return yard.update_placements(model_id(model), to_placements(placements),
                                            to_shares(shares), to_devices(shares_on), to_tick(now),
                                            out);
            });
          },
          py::arg("model"), py::arg("placements"), py::arg("now_ns"),
          py::arg("shares") = std::vector<std::int64_t>{},
          py::arg("shares_on") = std::vector<std::int64_t>{})
      .def(
          "remove_model",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of([&](Actions& out) {
              return yard.remove_model(model_id(model), to_tick(now), out);
            });
          },
          py::arg("model"), py::arg("now_ns"))
      .def(
          "pin",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.pin(model_id(model), to_tick(now), out); });
          },
          py::arg("model"), py::arg("now_ns"))
      .def(
          "unpin",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.unpin(model_id(model), to_tick(now), out); });
          },
          py::arg("model"), py::arg("now_ns"))
      .def(
          "unload",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.unload(model_id(model), to_tick(now), out); });
          },
          py::arg("model"), py::arg("now_ns"))
      .def(
          "set_budget",
          [](Yard& yard, std::int64_t device, std::int64_t budget, std::int64_t now) {
            const DeviceIndex index = device_index(yard, device);
            return actions_of([&](Actions& out) {
              return yard.set_budget(index, Bytes{budget}, to_tick(now), out);
            });
          },
          py::arg("device"), py::arg("budget"), py::arg("now_ns"))
      .def(
          "set_device_closed",
          [](Yard& yard, std::int64_t device, bool closed, std::int64_t now) {
            const DeviceIndex index = device_index(yard, device);
            return actions_of([&](Actions& out) {
              return yard.set_device_closed(index, closed, to_tick(now), out);
            });
          },
          py::arg("device"), py::arg("closed"), py::arg("now_ns"))
      .def(
          "try_acquire",
          [](Yard& yard, std::int64_t model, std::int64_t now, std::int64_t deadline) {
            const std::optional<LeaseId> lease =
                unwrap(yard.try_acquire(model_id(model), to_tick(now), to_tick(deadline)));
            return lease ? to_integer(*lease) : std::int64_t{0};
          },
          "A lease, or 0 if the model is not resident or would answer after the deadline.",
          py::arg("model"), py::arg("now_ns"),
          py::arg("deadline_ns") = kNever.time_since_epoch().count())
      .def(
          "request",
          [](Yard& yard, std::int64_t model, std::int64_t now, std::int64_t deadline) {
            Actions actions;
            const TicketId ticket =
                unwrap(yard.request(model_id(model), to_tick(now), to_tick(deadline), actions));
            return py::make_tuple(to_integer(ticket), bindings::to_python(actions));
          },
          "The ticket, and the actions, among which its answer may be already.", py::arg("model"),
          py::arg("now_ns"), py::arg("deadline_ns"))
      .def(
          "cancel",
          [](Yard& yard, std::int64_t ticket, std::int64_t now) {
            return actions_of([&](Actions& out) {
              return yard.cancel(static_cast<TicketId>(ticket), to_tick(now), out);
            });
          },
          py::arg("ticket"), py::arg("now_ns"))
      .def(
          "set_aside",
          [](Yard& yard, std::int64_t lease) {
            if (Status done = yard.set_aside(static_cast<LeaseId>(lease)); !done) {
              raise(done.error());
            }
          },
          py::arg("lease"))
      .def(
          "release",
          [](Yard& yard, std::int64_t lease, std::int64_t now) {
            return actions_of([&](Actions& out) {
              return yard.release(static_cast<LeaseId>(lease), to_tick(now), out);
            });
          },
          py::arg("lease"), py::arg("now_ns"))
      .def(
          "load_done",
          [](Yard& yard, std::int64_t model, std::int64_t now, const py::dict& actual,
             double took_s, Source source) {
            const Charge charge = to_charge(actual);
            const Duration took = nanoseconds_of(took_s, "took_s");
            return actions_of([&](Actions& out) {
              return yard.load_done(model_id(model), to_tick(now), charge, took, source, out);
            });
          },
          py::arg("model"), py::arg("now_ns"), py::arg("actual"), py::arg("took_s"),
          py::arg_v("source", Source::kStorage, "Source.STORAGE"))
      .def(
          "load_failed",
          [](Yard& yard, std::int64_t model, std::int64_t now, LoadFailure failure) {
            return actions_of([&](Actions& out) {
              return yard.load_failed(model_id(model), to_tick(now), failure, out);
            });
          },
          py::arg("model"), py::arg("now_ns"), py::arg("failure"))
      .def(
          "unload_done",
          [](Yard& yard, std::int64_t model, std::int64_t now, const py::dict& freed,
             std::optional<std::int64_t> kept_bytes, double keep_s, bool is_kept) {
            const Charge charge = to_charge(freed);
            std::optional<Kept> kept;
            if (kept_bytes) {
              kept = Kept{Bytes{*kept_bytes}, nanoseconds_of(keep_s, "keep_s"), is_kept};
            }
            return actions_of([&](Actions& out) {
              return yard.unload_done(model_id(model), to_tick(now), charge, kept, out);
            });
          },
          "`kept_bytes`: what the copy holds beside the model's shares, or would have, if "
          "`is_kept` is False; None if there is nothing to be said of a copy.",
          py::arg("model"), py::arg("now_ns"), py::arg("freed"), py::arg("kept_bytes") = py::none(),
          py::arg("keep_s") = 0.0, py::arg("is_kept") = true)
      .def(
          "copy_dropped",
          [](Yard& yard, std::int64_t model, std::int64_t now, std::int64_t freed) {
            return actions_of([&](Actions& out) {
              return yard.copy_dropped(model_id(model), to_tick(now), Bytes{freed}, out);
            });
          },
          py::arg("model"), py::arg("now_ns"), py::arg("freed"))
      .def(
          "copy_in_use",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.copy_in_use(model_id(model), to_tick(now), out); });
          },
          "Somebody is still in the memory of a copy that is being dropped.", py::arg("model"),
          py::arg("now_ns"))
      .def(
          "copy_lost",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.copy_lost(model_id(model), to_tick(now), out); });
          },
          "The memory of a kept copy is gone without anybody having asked.", py::arg("model"),
          py::arg("now_ns"))
      .def(
          "set_tier_budget",
          [](Yard& yard, std::int64_t budget, std::int64_t now) {
            return actions_of([&](Actions& out) {
              return yard.set_tier_budget(Bytes{budget}, to_tick(now), out);
            });
          },
          py::arg("budget"), py::arg("now_ns"))
      .def(
          "forgive",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            if (Status done = yard.forgive(model_id(model), to_tick(now)); !done) {
              raise(done.error());
            }
          },
          "Forgets that loads have failed: a FAILED model is COLD.", py::arg("model"),
          py::arg("now_ns"))
      .def(
          "reclaimed",
          [](Yard& yard, std::int64_t model, std::int64_t now, const py::dict& bytes) {
            const Charge charge = to_charge(bytes);
            return actions_of([&](Actions& out) {
              return yard.reclaimed(model_id(model), to_tick(now), charge, out);
            });
          },
          py::arg("model"), py::arg("now_ns"), py::arg("freed"))
      .def(
          "remeasured",
          [](Yard& yard, std::int64_t model, std::int64_t now, const py::dict& actual) {
            const Charge charge = to_charge(actual);
            return actions_of([&](Actions& out) {
              return yard.remeasured(model_id(model), to_tick(now), charge, out);
            });
          },
          py::arg("model"), py::arg("now_ns"), py::arg("actual"))
      .def(
          "lost",
          [](Yard& yard, std::int64_t model, std::int64_t now) {
            return actions_of(
                [&](Actions& out) { return yard.lost(model_id(model), to_tick(now), out); });
          },
          "A resident model's memory is gone without anybody having asked.", py::arg("model"),
          py::arg("now_ns"))
      .def(
          "tick",
          [](Yard& yard, std::int64_t now) {
            Actions actions;
            yard.tick(to_tick(now), actions);
            return bindings::to_python(actions);
          },
          py::arg("now_ns"))
      .def(
          "entry",
          [](const Yard& yard, std::int64_t model) -> py::object {
            const Entry* entry = yard.entry(model_id(model));
            return entry == nullptr ? py::object(py::none()) : py::cast(*entry);
          },
          "A copy of the model's entry, or None if the id is stale.", py::arg("model"))
      .def(
          "exclusive",
          [](const Yard& yard, std::int64_t model) {
            return bindings::to_python(yard.exclusive(model_id(model)));
          },
          "What comes back when a model leaves now: without what others hold as well.",
          py::arg("model"))
      .def(
          "held_with_shares",
          [](const Yard& yard, std::int64_t model) {
            return bindings::to_python(yard.held_with_shares(model_id(model)));
          },
          "All that a model holds.", py::arg("model"))
      .def(
          "copy_exclusive",
          [](const Yard& yard, std::int64_t model) {
            return yard.copy_exclusive(model_id(model)).value;
          },
          "Bytes that come back when the model's copy is dropped now.", py::arg("model"))
      .def_property_readonly(
          "tier",
          [](const Yard& yard) -> std::optional<std::int64_t> {
            if (yard.tier() == kNoDevice) return std::nullopt;
            return static_cast<std::int64_t>(position(yard.tier()));
          },
          "Position of the host tier's account, behind the devices; None if there is no tier.")
      .def(
          "account",
          [](const Yard& yard, std::int64_t device) {
            return yard.account(account_index(yard, device));
          },
          "The account of a device or of the host tier.", py::arg("device"))
      .def(
          "saved",
          [](const Yard& yard, std::int64_t device) {
            return yard.saved(account_index(yard, device)).value;
          },
          "Bytes that models would hold more there if each held its shares alone.",
          py::arg("device"))
      .def(
          "device_counters",
          [](const Yard& yard, std::int64_t device) {
            const DeviceCounters& counters = yard.device_counters(device_index(yard, device));
            return py::make_tuple(counters.load_count, counters.eviction_count);
          },
          "(loads, evictions) of the device.", py::arg("device"))
      .def(
          "explanations",
          [](const Yard& yard) {
            py::list records;
            for (const Explanation& e : yard.explanations().entries()) records.append(to_python(e));
            return records;
          },
          "The last decisions, oldest first.")
      .def(
          "explanations_after",
          [](const Yard& yard, std::uint64_t sequence) {
            const auto& entries = yard.explanations().entries();
            auto first = entries.end();
            while (first != entries.begin() && std::prev(first)->sequence > sequence) --first;
            py::list records;
            for (; first != entries.end(); ++first) records.append(to_python(*first));
            return records;
          },
          "The decisions behind the one of this sequence, oldest first.", py::arg("sequence"))
      .def_property_readonly(
          "last_explained",
          [](const Yard& yard) {
            const auto& entries = yard.explanations().entries();
            return entries.empty() ? std::uint64_t{0} : entries.back().sequence;
          },
          "Sequence of the last decision; 0 before the first.")
      .def(
          "clone", [](const Yard& yard) { return yard.clone(); },
          "A yard in the same state that goes its own way: for finding out what would happen.")
      .def(
          "leases_of",
          [](const Yard& yard, std::int64_t model) {
            py::list leases;
            for (LeaseId lease : yard.leases_of(model_id(model))) leases.append(to_integer(lease));
            return leases;
          },
          "The leases on a model, in no order.", py::arg("model"))
      .def(
          "device_closed",
          [](const Yard& yard, std::int64_t device) {
            return yard.device_closed(device_index(yard, device));
          },
          py::arg("device"))
      .def(
          "audit",
          [](const Yard& yard) {
            if (Status status = yard.audit(); !status) raise(status.error());
          },
          "WrongStateError, with the first violation, unless every invariant holds.")
      .def_property_readonly("counters", [](const Yard& yard) { return yard.counters(); })
      .def_property_readonly("policy",
                             [](const Yard& yard) { return std::string(yard.policy_name()); })
      .def_property_readonly(
          "leader", [](const Yard& yard) { return std::string(yard.policy().leader()); },
          "The rule by which the policy goes at the moment.")
      .def_property_readonly(
          "shadow_seconds",
          [](const Yard& yard) -> py::object {
            const std::optional<ShadowSeconds> seconds = yard.policy().shadow_seconds();
            if (!seconds) return py::none();
            return py::make_tuple(seconds->own, seconds->lru);
          },
          "Seconds of loading that the policy's own rule would have cost, and those of LRU; None "
          "if it goes by no shadow caches.")
      .def_property_readonly(
          "lru_seconds", [](const Yard& yard) { return yard.lru_bill().seconds(); },
          "Seconds that a cache of the same budgets that evicts by LRU would have spent on loading "
          "for the same requests; to be compared with Counters.load_seconds.")
      .def_property_readonly(
          "departure_counts",
          [](const Yard& yard) {
            py::dict counts;
            for (std::size_t i = 0; i < kWhyCount; ++i) {
              const auto why = static_cast<Why>(i);
              const std::uint64_t count = yard.departures().count(why);
              if (count > 0) counts[py::str(std::string(to_string(why)))] = count;
            }
            return counts;
          },
          "Models that were told to leave, by why; without zeros.")
      .def_property_readonly(
          "victim_ages",
          [](const Yard& yard) {
            py::list ages;
            for (const Age& age : yard.departures().ages()) {
              ages.append(py::make_tuple(age.idle.count(), age.stayed.count()));
            }
            return ages;
          },
          "Of the last 256 models that were chosen to leave, in no order: nanoseconds since it was "
          "last asked for, and since it was loaded.")
      .def_property_readonly("model_count", &Yard::model_count)
      .def_property_readonly("share_count", &Yard::share_count)
      .def_property_readonly("device_count", &Yard::device_count)
      .def_property_readonly("waiting_count", &Yard::waiting_count)
      .def_property_readonly("lease_count", &Yard::lease_count);
}

}  // namespace modelyard::bindings

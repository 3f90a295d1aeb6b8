#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include "modelyard/entry_table.hpp"
#include "modelyard/ledger.hpp"
#include "modelyard/policy.hpp"
#include "modelyard/types.hpp"
#include "register.hpp"

namespace modelyard::bindings {
namespace py = pybind11;

namespace {

py::handle stale_id_error;
py::handle wrong_state_error;
py::handle pinned_error;
py::handle capacity_error;

py::handle add_exception(py::module_& module, const char* name, const char* doc) {
  const std::string full = "modelyard_server._core." + std::string(name);
  PyObject* type = PyErr_NewExceptionWithDoc(full.c_str(), doc, PyExc_RuntimeError, nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.add_object(name, type);
  return type;
}

// An int that fits 64 bits; TypeError for what is no int, ValueError for one that does not fit.
std::int64_t to_int64(py::handle value) {
  if (!PyLong_Check(value.ptr())) {
    throw py::type_error("a charge is {int: int}, not of " +
                         std::string(py::str(py::type::handle_of(value).attr("__name__"))));
  }
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) throw py::value_error("a charge is out of range");
  return number;
}

}  // namespace

void raise(const Error& error) {
  py::handle type = PyExc_ValueError;
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
      break;
    case ErrorCode::kStaleId:
      type = stale_id_error;
      break;
    case ErrorCode::kWrongState:
      type = wrong_state_error;
      break;
    case ErrorCode::kPinned:
      type = pinned_error;
      break;
    case ErrorCode::kCapacity:
      type = capacity_error;
      break;
  }
  PyErr_SetString(type.ptr(), error.message.c_str());
  throw py::error_already_set();
}

py::dict to_python(const Charge& charge) {
  py::dict amounts;
  charge.for_each([&](DeviceIndex device, Bytes amount) {
    amounts[py::int_(position(device))] = py::int_(amount.value);
  });
  return amounts;
}

Charge to_charge(const py::dict& amounts) {
  Charge charge;
  for (const auto& [key, value] : amounts) {
    const std::int64_t device = to_int64(key);
    const Bytes amount{to_int64(value)};
    if (device < 0 || device >= static_cast<std::int64_t>(kMaxDevices)) {
      throw py::value_error("no device has position " + std::to_string(device));
    }
    if (!is_valid(amount)) {
      throw py::value_error("a charge is negative or above 64 TiB: " +
                            std::to_string(amount.value));
    }
    charge.set(static_cast<DeviceIndex>(device), amount);
  }
  return charge;
}

void register_types(py::module_& module) {
  stale_id_error = add_exception(module, "StaleIdError", "The id names nothing any more.");
  wrong_state_error =
      add_exception(module, "WrongStateError", "The event does not fit the model's state.");
  pinned_error = add_exception(module, "PinnedError", "The model is pinned.");
  capacity_error = add_exception(module, "CapacityError", "A bound of the yard is reached.");

  module.attr("MAX_DEVICES") = kMaxDevices;
  module.attr("MAX_BYTES") = kMaxBytes;
  module.attr("NEVER_NS") = kNever.time_since_epoch().count();
  py::list policies;
  for (std::string_view name : policy_names()) policies.append(py::str(name.data(), name.size()));
  module.attr("POLICIES") = py::tuple(policies);

  py::native_enum<State>(module, "State", "enum.Enum", "Where a model stands.")
      .value("COLD", State::kCold)
      .value("QUEUED", State::kQueued)
      .value("LOADING", State::kLoading)
      .value("RESIDENT", State::kResident)
      .value("DRAINING", State::kDraining)
      .value("UNLOADING", State::kUnloading)
      .value("FAILED", State::kFailed)
      .finalize();
  py::native_enum<LoadFailure>(module, "LoadFailure", "enum.Enum", "Why a load failed.")
      .value("TRANSIENT", LoadFailure::kTransient)
      .value("PERMANENT", LoadFailure::kPermanent)
      .value("CANCELLED", LoadFailure::kCancelled)
      .finalize();

  py::native_enum<Source>(module, "Source", "enum.Enum", "Where a load had the weights from.")
      .value("STORAGE", Source::kStorage)
      .value("PAGE_CACHE", Source::kPageCache)
      .value("COPY", Source::kCopy)
      .finalize();
  py::native_enum<CopyState>(module, "CopyState", "enum.Enum",
                             "Where the copy of a model's weights on the host tier stands.")
      .value("NONE", CopyState::kNone)
      .value("AWAITED", CopyState::kAwaited)
      .value("MAKING", CopyState::kMaking)
      .value("KEPT", CopyState::kKept)
      .value("DROPPING", CopyState::kDropping)
      .finalize();

  const auto amount = [](Bytes Account::* field) {
    return [field](const Account& account) { return (account.*field).value; };
  };
  py::class_<Account>(module, "Account", "What one device has promised and holds, in bytes.")
      .def_property_readonly("budget", amount(&Account::budget))
      .def_property_readonly("reserved", amount(&Account::reserved))
      .def_property_readonly("resident", amount(&Account::resident))
      .def_property_readonly("draining", amount(&Account::draining))
      .def_property_readonly("quarantined", amount(&Account::quarantined))
      .def_property_readonly("deficit", amount(&Account::deficit))
      .def_property_readonly("peak", amount(&Account::peak))
      .def_property_readonly("used", [](const Account& a) { return a.used().value; })
      .def_property_readonly("free", [](const Account& a) { return a.free().value; });

  py::class_<Entry>(module, "Entry", "A model as the core sees it; a copy.")
      .def_readonly("label", &Entry::label)
      .def_readonly("state", &Entry::state)
      .def_readonly("placement", &Entry::placement)
      .def_property_readonly("held", [](const Entry& e) { return to_python(e.held); })
      .def_property_readonly("quarantined", [](const Entry& e) { return to_python(e.quarantined); })
      .def_property_readonly("placements",
                             [](const Entry& e) {
                               py::list placements;
                               for (const Charge& p : e.placements) placements.append(to_python(p));
                               return placements;
                             })
      .def_property_readonly("shares",
                             [](const Entry& e) {
                               py::list shares;
                               for (ShareId id : e.shares) shares.append(to_integer(id));
                               return shares;
                             })
      .def_property_readonly(
          "meant_for",
          [](const Entry& e) {
            return e.meant_for == kNoDevice ? -1 : static_cast<int>(position(e.meant_for));
          },
          "Where it was given to by a device that was behind, until its next load begins; or -1.")
      .def_readonly("pinned", &Entry::pinned)
      .def_readonly("removed", &Entry::removed)
      .def_readonly("lease_count", &Entry::lease_count)
      .def_readonly("waiting_count", &Entry::waiting_count)
      .def_readonly("failure_count", &Entry::failure_count)
      .def_readonly("failure", &Entry::failure)
      .def_property_readonly("retry_at_ns",
                             [](const Entry& e) { return e.retry_at.time_since_epoch().count(); })
      .def_readonly("reload_seconds", &Entry::reload_seconds)
      .def_property_readonly("copy_state", [](const Entry& e) { return e.copy.state; })
      .def_property_readonly("copy_in_use", [](const Entry& e) { return e.copy.in_use; })
      .def_property_readonly("copy_seconds", [](const Entry& e) { return e.times.from_copy(); })
      .def_readonly("load_count", &Entry::load_count)
      .def_readonly("eviction_count", &Entry::eviction_count);
}

}  // namespace modelyard::bindings

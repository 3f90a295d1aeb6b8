#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include "modelyard/action.hpp"
#include "register.hpp"

namespace modelyard::bindings {
namespace py = pybind11;

py::object to_python(const Actions& actions) {
  if (actions.empty()) return py::none();
  py::list list(actions.size());
  for (std::size_t i = 0; i < actions.size(); ++i) {
    list[i] = std::visit([](const auto& action) { return py::cast(action); }, actions[i]);
  }
  return list;
}

void register_actions(py::module_& module) {
  py::class_<Grant>(module, "Grant", "The ticket is answered with a lease.")
      .def_property_readonly("ticket", [](const Grant& a) { return to_integer(a.ticket); })
      .def_property_readonly("lease", [](const Grant& a) { return to_integer(a.lease); });
  py::class_<Load>(module, "Load", "Load the model as its placement says.")
      .def_property_readonly("model", [](const Load& a) { return to_integer(a.model); })
      .def_readonly("placement", &Load::placement);
  py::class_<CancelLoad>(module, "CancelLoad", "Stop the load if that is possible.")
      .def_property_readonly("model", [](const CancelLoad& a) { return to_integer(a.model); });
  py::class_<Drain>(module, "Drain", "The model takes no new requests.")
      .def_property_readonly("model", [](const Drain& a) { return to_integer(a.model); });
  py::class_<Unload>(module, "Unload", "Give the model's memory back.")
      .def_property_readonly("model", [](const Unload& a) { return to_integer(a.model); })
      .def_readonly("keep", &Unload::keep)
      .def_property_readonly("most", [](const Unload& a) { return a.most.value; });
  py::class_<DropCopy>(module, "DropCopy", "Give the memory of the model's copy back.")
      .def_property_readonly("model", [](const DropCopy& a) { return to_integer(a.model); });

  py::native_enum<RefuseReason>(module, "RefuseReason", "enum.Enum",
                                "Why a ticket will not be granted.")
      .value("NEVER_FITS", RefuseReason::kNeverFits)
      .value("BUDGET_EXHAUSTED", RefuseReason::kBudgetExhausted)
      .value("QUEUE_FULL", RefuseReason::kQueueFull)
      .value("LOAD_FAILED", RefuseReason::kLoadFailed)
      .value("DEADLINE_IN_QUEUE", RefuseReason::kDeadlineInQueue)
      .value("DEADLINE_IN_LOAD", RefuseReason::kDeadlineInLoad)
      .value("DEADLINE_UNREACHABLE", RefuseReason::kDeadlineUnreachable)
      .value("REMOVED", RefuseReason::kRemoved)
      .finalize();
  py::class_<Refuse>(module, "Refuse", "The ticket will not be granted.")
      .def_property_readonly("ticket", [](const Refuse& a) { return to_integer(a.ticket); })
      .def_readonly("reason", &Refuse::reason)
      .def_readonly("failure", &Refuse::failure)
      .def_property_readonly("device", [](const Refuse& a) { return position(a.device); })
      .def_property_readonly("needed", [](const Refuse& a) { return a.needed.value; })
      .def_property_readonly("free", [](const Refuse& a) { return a.free.value; })
      .def_property_readonly("budget", [](const Refuse& a) { return a.budget.value; })
      .def_property_readonly(
          "holders",
          [](const Refuse& a) {
            py::list holders;
            for (const Holder& holder : a.holders) {
              if (holder.bytes == Bytes{0}) break;
              holders.append(py::make_tuple(to_integer(holder.model), holder.bytes.value));
            }
            return holders;
          })
      .def_property_readonly("retry_after_ns",
                             [](const Refuse& a) { return a.retry_after.count(); })
      .def_property_readonly("needs_ns", [](const Refuse& a) { return a.needs.count(); })
      .def_property_readonly("left_ns", [](const Refuse& a) { return a.left.count(); });
  py::class_<WakeAt>(module, "WakeAt", "Call tick at this time.")
      .def_property_readonly("at_ns",
                             [](const WakeAt& a) { return a.at.time_since_epoch().count(); });
}

}  // namespace modelyard::bindings

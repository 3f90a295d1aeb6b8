#pragma once

#include <pybind11/pybind11.h>

#include "modelyard/action.hpp"
#include "modelyard/result.hpp"

// What the bindings share. They translate and do nothing else: no state, no decisions.

namespace modelyard::bindings {

void register_types(pybind11::module_& module);
void register_actions(pybind11::module_& module);
void register_yard(pybind11::module_& module);

/// Throws the Python exception for a core error: StaleIdError, WrongStateError, PinnedError,
/// CapacityError, or ValueError.
[[noreturn]] void raise(const Error& error);

/// The value, or the exception for the error.
template <typename T>
T unwrap(Result<T> result) {
  if (!result) raise(result.error());
  return std::move(result).value();
}

/// Actions as a list of Python objects, or None if there are none: most calls have none, and an
/// empty list costs more.
[[nodiscard]] pybind11::object to_python(const Actions& actions);

/// A charge as {device position: bytes}, and back. ValueError for what is no charge.
[[nodiscard]] pybind11::dict to_python(const Charge& charge);
[[nodiscard]] Charge to_charge(const pybind11::dict& amounts);

[[nodiscard]] inline Tick to_tick(std::int64_t nanoseconds) { return Tick{Duration{nanoseconds}}; }

template <typename Id>
[[nodiscard]] std::int64_t to_integer(Id id) {
  return static_cast<std::int64_t>(id);
}

}  // namespace modelyard::bindings

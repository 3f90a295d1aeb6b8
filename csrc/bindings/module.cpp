#include <pybind11/pybind11.h>

#include "register.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The core of modelyard: decides which model is resident where. Pure: events in, actions out.";
  modelyard::bindings::register_types(module);
  modelyard::bindings::register_actions(module);
  modelyard::bindings::register_yard(module);
}

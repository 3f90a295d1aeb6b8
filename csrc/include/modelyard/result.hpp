#pragma once

#include <cassert>
#include <string>
#include <utility>
#include <variant>

namespace modelyard {

/// What a caller did wrong. Refusals of a request (no room, back-off, deadline) are not errors but
/// actions: see Refuse.
enum class ErrorCode {
  kInvalidArgument,  ///< A value breaks its rule: negative bytes, an unknown device, no placement.
  kStaleId,          ///< The id was never given out, or what it named is gone.
  kWrongState,  ///< The event does not fit the model's state, for instance load_done of a model
                ///< nobody loads.
  kPinned,      ///< The model is pinned and was asked to leave.
  kCapacity,    ///< A bound of the yard is reached.
};

struct Error {
  ErrorCode code;
  std::string message;
};

/// A value or an error. The core throws nothing of its own; bindings turn errors into exceptions.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  [[nodiscard]] bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  /// The value. Only where ok().
  [[nodiscard]] const T& value() const& {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  [[nodiscard]] T& value() & {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  [[nodiscard]] T&& value() && {
    assert(ok());
    return std::move(*std::get_if<0>(&state_));
  }
  /// The error. Only where not ok().
  [[nodiscard]] const Error& error() const {
    assert(!ok());
    return *std::get_if<1>(&state_);
  }

 private:
  std::variant<T, Error> state_;
};

struct Done {};

/// Success without a value, or an error.
using Status = Result<Done>;

}  // namespace modelyard

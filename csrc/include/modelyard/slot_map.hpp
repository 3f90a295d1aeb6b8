#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace modelyard {

/// Values in reusable slots, named by ids of slot and generation.
///
/// Invariants: an id is valid from insert to erase and never again; zero is never an id; a slot
/// that has used up its generations is retired. Pointers into the map are valid until the next
/// insert. Not thread-safe.
template <typename T, typename Id>
class SlotMap {
 public:
  /// Puts a value into a slot and names it.
  [[nodiscard]] Id insert(T value) {
    std::uint32_t index = 0;
    if (free_.empty()) {
      index = static_cast<std::uint32_t>(slots_.size());
      slots_.push_back(Slot{});
    } else {
      index = free_.back();
      free_.pop_back();
    }
    Slot& slot = slots_[index];
    slot.value.emplace(std::move(value));
    ++size_;
    return make_id(index, slot.generation);
  }

  /// The value an id names, or null if the id is stale.
  [[nodiscard]] T* find(Id id) {
    Slot* slot = slot_of(id);
    return slot == nullptr ? nullptr : &*slot->value;
  }
  [[nodiscard]] const T* find(Id id) const { return const_cast<SlotMap*>(this)->find(id); }

  /// Empties a slot. True if the id was valid.
  bool erase(Id id) {
    Slot* slot = slot_of(id);
    if (slot == nullptr) return false;
    slot->value.reset();
    --size_;
    if (++slot->generation != kLastGeneration) free_.push_back(index_of(id));
    return true;
  }

  [[nodiscard]] std::size_t size() const { return size_; }
  /// Number of slots, used or not: the bound for at().
  [[nodiscard]] std::uint32_t slot_count() const {
    return static_cast<std::uint32_t>(slots_.size());
  }
  /// The value in a slot, or null if the slot is empty.
  [[nodiscard]] T* at(std::uint32_t index) {
    return slots_[index].value ? &*slots_[index].value : nullptr;
  }
  [[nodiscard]] const T* at(std::uint32_t index) const {
    return slots_[index].value ? &*slots_[index].value : nullptr;
  }
  /// The id that names a used slot's value now.
  [[nodiscard]] Id id_at(std::uint32_t index) const {
    return make_id(index, slots_[index].generation);
  }

  [[nodiscard]] static constexpr std::uint32_t index_of(Id id) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(id));
  }

 private:
  /// Generations stay below 2^31 so that ids fit a signed 64-bit integer.
  static constexpr std::uint32_t kLastGeneration = 0x7fffffffU;

  struct Slot {
    std::optional<T> value;
    std::uint32_t generation{1};
  };

  [[nodiscard]] static constexpr Id make_id(std::uint32_t index, std::uint32_t generation) {
    return static_cast<Id>((std::uint64_t{generation} << 32) | index);
  }
  [[nodiscard]] Slot* slot_of(Id id) {
    const auto raw = static_cast<std::uint64_t>(id);
    const auto index = static_cast<std::uint32_t>(raw);
    if (index >= slots_.size()) return nullptr;
    Slot& slot = slots_[index];
    if (slot.generation != static_cast<std::uint32_t>(raw >> 32) || !slot.value) return nullptr;
    return &slot;
  }

  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::size_t size_{0};
};

}  // namespace modelyard

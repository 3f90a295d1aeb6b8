#include <algorithm>
#include <optional>

#include "modelyard/yard.hpp"

// Shares: who holds them, where they are charged, and what they leave of a model's need. The only
// place where holders are counted; keeps the ledger and the per-device sums in step with them.

namespace modelyard {

// What a model touches that holds `own` and, on a device, shares: `own`, with a byte there at
// least.
Charge Yard::touching(const Charge& own, DeviceIndex shares_on) {
  Charge touched = own;
  if (shares_on != kNoDevice) touched.set(shares_on, std::max(own.on(shares_on), Bytes{1}));
  return touched;
}

// `own` and the bytes of shares, or nothing if that is above kMaxBytes.
std::optional<Bytes> Yard::with_bytes_of(std::span<const ShareId> shares, Bytes own) const {
  std::optional<Bytes> sum = own;
  for (const ShareId id : shares) {
    if (sum) sum = checked_add(*sum, shares_.find(id)->bytes);
  }
  return sum;
}

// The bytes a load needs beside the shares that are there already.
Charge Yard::needed(const Entry& entry, std::uint32_t placement, Present present) const {
  Charge need = entry.placements[placement];
  const DeviceIndex device = shares_device(entry, placement);
  if (device == kNoDevice) return need;
  Bytes sum = need.on(device);
  for (const ShareId id : entry.shares) {
    const Share& share = *shares_.find(id);
    const Holders& holders = share.on(device);
    bool there = false;
    switch (present) {
      case Present::kAny:
        there = holders.total() > 0;
        break;
      case Present::kStaying:
        there = holders.staying() > 0;
        break;
      case Present::kFirm:
        there = holders.firm() > 0;
        break;
      case Present::kPinned:
        there = holders.pinned > 0;
        break;
    }
    if (!there) sum = saturating_add(sum, share.bytes);
  }
  need.set(device, sum);
  return need;
}

Yard::Need Yard::need_of(const Entry& entry, std::uint32_t placement) const {
  Need need;
  need.now = needed(entry, placement, Present::kStaying);
  need.later = shares_device(entry, placement) == kNoDevice
                   ? need.now
                   : needed(entry, placement, Present::kFirm);
  return need;
}

Charge Yard::exclusive_of(const Entry& entry) const {
  Charge sum = entry.held;
  for (const ShareId id : entry.held_shares) {
    const Share& share = *shares_.find(id);
    if (share.on(entry.held_shares_on).total() > 1) continue;
    sum.set(entry.held_shares_on, saturating_add(sum.on(entry.held_shares_on), share.bytes));
  }
  return sum;
}

// True if a share that the model holds stays when it goes: others have it who are not being
// unloaded themselves.
bool Yard::others_keep(const Entry& entry, const Share& share) const {
  const std::uint32_t self = entry.state == State::kUnloading ? 0 : 1;
  return share.on(entry.held_shares_on).staying() > self;
}

// What is told of a model: the bytes that go with it, over all devices.
Bytes Yard::going_with(const Entry& entry) const {
  Bytes sum = entry.held.total();
  for (const ShareId id : entry.held_shares) {
    const Share& share = *shares_.find(id);
    if (!others_keep(entry, share)) sum += share.bytes;
  }
  return sum;
}

Charge Yard::exclusive(ModelId model) const {
  const Entry* entry = entries_.find(model);
  return entry == nullptr ? Charge{} : exclusive_of(*entry);
}

Charge Yard::held_with_shares(ModelId model) const {
  const Entry* entry = entries_.find(model);
  if (entry == nullptr) return Charge{};
  Charge sum = entry->held;
  for (const ShareId id : entry->held_shares) {
    const DeviceIndex device = entry->held_shares_on;
    sum.set(device, saturating_add(sum.on(device), shares_.find(id)->bytes));
  }
  return sum;
}

Bytes Yard::saved(DeviceIndex device) const {
  Bytes sum{};
  for (std::uint32_t i = 0; i < shares_.slot_count(); ++i) {
    const Share* share = shares_.at(i);
    if (share == nullptr) continue;
    const std::uint32_t holders = share->on(device).total();
    if (holders > 1) sum += Bytes{share->bytes.value * (holders - 1)};
  }
  return sum;
}

Sharing Yard::sharing_for(const Entry& entry, std::uint32_t placement, bool count_leaving) const {
  Sharing sharing;
  if (shares_.size() == 0) return sharing;
  sharing.table = &shares_;
  sharing.wanted = entry.shares;
  sharing.wanted_on = shares_device(entry, placement);
  sharing.count_leaving = count_leaving;
  return sharing;
}

// Changes the holders of a share on a device, and with them what its bytes are for. `charged` is
// false if the ledger has been told of the bytes already.
void Yard::change_holders(ShareId id, DeviceIndex device, bool charged, auto&& change) {
  Share& share = *shares_.find(id);
  Holders& holders = share.on(device);
  const Holders before = holders;
  change(holders);
  if (charged && holders.kind() != before.kind()) {
    ledger_.shift(device, share.bytes, before.kind(), holders.kind());
  }
  Bytes& unloading = unloading_[position(device)];
  if (before.only_unloading()) unloading -= share.bytes;
  if (holders.only_unloading()) unloading += share.bytes;
  Bytes& pinned = pinned_[position(device)];
  if (before.pinned > 0) pinned -= share.bytes;
  if (holders.pinned > 0) pinned += share.bytes;
}

// A load begins: those of its shares that are not there are reserved; that they fit is known.
void Yard::take_shares(Entry& entry, DeviceIndex device) {
  if (device == kNoDevice) return;
  entry.held_shares = entry.shares;
  entry.held_shares_on = device;
  refer(entry.held_shares);
  for (const ShareId id : entry.held_shares) {
    change_holders(id, device, true, [&](Holders& holders) {
      ++holders.by[static_cast<std::size_t>(Holding::kLoading)];
      if (entry.pinned) ++holders.pinned;
    });
  }
}

// A copy that holds shares on the tier is somewhere else now: it came from nothing, or is gone.
// `charged` as in change_holders.
void Yard::move_holders(std::span<const ShareId> shares, std::optional<Holding> from,
                        std::optional<Holding> to, bool charged) {
  for (const ShareId id : shares) {
    change_holders(id, tier_, charged, [&](Holders& holders) {
      if (from) --holders.by[static_cast<std::size_t>(*from)];
      if (to) ++holders.by[static_cast<std::size_t>(*to)];
    });
  }
}

// A model that holds shares is doing something else now.
void Yard::turn_shares(const Entry& entry, Holding from, Holding to) {
  for (const ShareId id : entry.held_shares) {
    change_holders(id, entry.held_shares_on, true, [&](Holders& holders) {
      --holders.by[static_cast<std::size_t>(from)];
      ++holders.by[static_cast<std::size_t>(to)];
    });
  }
}

void Yard::pin_shares(const Entry& entry, bool pinned) {
  for (const ShareId id : entry.held_shares) {
    change_holders(id, entry.held_shares_on, true, [&](Holders& holders) {
      if (pinned) {
        ++holders.pinned;
      } else {
        --holders.pinned;
      }
    });
  }
}

// A model holds its shares no more. `settled` if the ledger knows which bytes are back.
void Yard::drop_shares(Entry& entry, Holding from, bool settled) {
  const bool unpins = entry.pinned && from == Holding::kLoading;
  for (const ShareId id : entry.held_shares) {
    change_holders(id, entry.held_shares_on, !settled, [&](Holders& holders) {
      --holders.by[static_cast<std::size_t>(from)];
      if (unpins) --holders.pinned;
    });
  }
  unrefer(entry.held_shares);
  entry.held_shares.clear();
  entry.held_shares_on = kNoDevice;
}

void Yard::refer(std::span<const ShareId> shares) {
  for (const ShareId id : shares) ++shares_.find(id)->model_count;
}

void Yard::unrefer(std::span<const ShareId> shares) {
  for (const ShareId id : shares) {
    if (--shares_.find(id)->model_count == 0) shares_.erase(id);
  }
}

}  // namespace modelyard

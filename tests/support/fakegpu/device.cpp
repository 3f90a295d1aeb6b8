// What torch asks of a device: memory, which one is current, streams and events (everything here is
// done when the call returns, so there is nothing to wait for), and a few questions about it.

#include "device.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "memory.hpp"

namespace fakegpu {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr DeviceType kType = DeviceType::PrivateUse1;

thread_local DeviceIndex current_device = 0;

// Bytes of a device, held as long as this lives.
class Charge {
 public:
  Charge(Device device, std::size_t bytes) : index_(device.index()), bytes_(bytes) {
    if (ledger(index_).reserve(bytes)) return;
    const Ledger::Totals totals = ledger(index_).totals();
    TORCH_CHECK_WITH(OutOfMemoryError, false, device, " is out of memory: tried to allocate ",
                     bytes, " bytes; ", totals.used, " of ", totals.budget, " bytes are used");
  }
  ~Charge() { ledger(index_).release(bytes_); }
  Charge(const Charge&) = delete;
  Charge& operator=(const Charge&) = delete;

 private:
  DeviceIndex index_;
  std::size_t bytes_;
};

// In this order: the memory is freed before its bytes are given back.
struct Block {
  Charge charge;
  c10::DataPtr host;
};

c10::DataPtr as_data_ptr(std::unique_ptr<Block> block, Device device) {
  void* const data = block->host.get();
  return {data, block.release(), [](void* context) { delete static_cast<Block*>(context); },
          device};
}

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    const Device device(kType, current_device);
    if (bytes == 0) return {nullptr, device};
    // The charge comes first: what does not fit is never allocated.
    auto block = std::unique_ptr<Block>(new Block{Charge(device, bytes), c10::DataPtr()});
    block->host = c10::GetAllocator(DeviceType::CPU)->allocate(bytes);
    return as_data_ptr(std::move(block), device);
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override {
    const Ledger::Totals totals = ledger(index).totals();
    c10::CachingDeviceAllocator::DeviceStats stats;
    constexpr auto kAll = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes}) {
      stat->at(kAll).current = static_cast<std::int64_t>(totals.used);
      stat->at(kAll).peak = static_cast<std::int64_t>(totals.peak);
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex index) override { ledger(index).reset_peak(); }
  std::pair<std::size_t, std::size_t> getMemoryInfo(DeviceIndex index) override {
    const Ledger::Totals totals = ledger(index).totals();
    return {totals.budget - std::min(totals.used, totals.budget), totals.budget};
  }
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  DeviceType type() const override { return kType; }
  DeviceIndex deviceCount() const noexcept override { return kDeviceCount; }
  Device getDevice() const override { return {kType, current_device}; }
  void setDevice(Device device) const override { current_device = checked(device).index(); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    return {kType, std::exchange(current_device, checked(device).index())};
  }

  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, checked(device));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}

  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, DeviceIndex) const override { return 0.0; }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDeviceCount; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override {
    current_device = checked({kType, index}).index();
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current_device, checked({kType, index}).index());
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current_device : exchangeDevice(index);
  }

  // Operators run on the CPU, and so their random numbers come from there.
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    c10::DataPtr data = allocator()->allocate(bytes);
    const std::size_t kept = std::min(bytes, storage.nbytes());
    if (kept != 0) allocator()->copy_data(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Runs when the library is loaded. Neither object is ever destroyed: tensors may outlive them.
[[maybe_unused]] const bool registered = [] {
  c10::SetAllocator(kType, allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace

Device checked(Device device) {
  TORCH_CHECK(device.type() == kType, "not a fakegpu device: ", device);
  if (!device.has_index()) return {kType, current_device};
  TORCH_CHECK(device.index() < kDeviceCount, "invalid device ordinal: ", device, " of ",
              kDeviceCount, " devices");
  return device;
}

c10::Allocator* allocator() {
  static auto* const instance = new Allocator;
  return instance;
}

c10::DataPtr adopt(c10::DataPtr host, std::size_t bytes, Device device) {
  if (bytes == 0) return {nullptr, device};
  return as_data_ptr(std::unique_ptr<Block>(new Block{Charge(device, bytes), std::move(host)}),
                     device);
}

}  // namespace fakegpu

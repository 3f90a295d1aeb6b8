#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <cstddef>

namespace fakegpu {

// A device with a number that exists; the current device where none is given. Throws c10::Error for
// another type of device or a number out of range.
c10::Device checked(c10::Device device);

// The allocator of all devices: takes from the current one.
c10::Allocator* allocator();

// Makes host memory a device's own, charged from now until it is freed. Throws
// c10::OutOfMemoryError when the device has no room; the memory is then freed.
c10::DataPtr adopt(c10::DataPtr host, std::size_t bytes, c10::Device device);

}  // namespace fakegpu

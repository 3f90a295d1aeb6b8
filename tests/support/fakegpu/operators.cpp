// Every operator runs on the CPU, over the very memory of the fakegpu tensors: each is given to the
// CPU's kernel as a CPU tensor on the same bytes. What the kernel makes new becomes the device's
// own memory and is charged to it, so used and peak bytes count exactly the results. What a kernel
// allocates for itself and frees again before it returns is not counted.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "device.hpp"

namespace fakegpu {
namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;

constexpr DeviceType kType = DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kCpuKeys(c10::DispatchKey::CPU);
// The CPU's key is dispatched to never, ours being above it. It is there because Module.to moves a
// parameter in place, so that tied parameters stay tied, only between backends torch knows as
// dense.
constexpr c10::DispatchKeySet kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | kCpuKeys;

// The tensor, with the sizes and strides of another, which may be on another device.
Tensor with_layout(Tensor made, const Tensor& like) {
  at::TensorImpl* const impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  // Conjugation and negation are lazy: marks on a tensor whose bytes are as before.
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  return made;
}

Tensor make_tensor(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  return with_layout(
      at::detail::make_tensor<at::TensorImpl>(std::move(storage), keys, like.dtype()), like);
}

// With the keys of the base: whether it is an inference tensor is among them.
Tensor make_view(const Tensor& base, const Tensor& like) {
  return with_layout(
      at::detail::make_tensor<at::TensorImpl>(at::TensorImpl::VIEW, c10::Storage(base.storage()),
                                              base.key_set(), like.dtype()),
      like);
}

bool same_layout(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.storage_offset() == b.storage_offset();
}

// The CPU tensors that stand for fakegpu tensors during one operator. One tensor has one alias and
// one storage has one alias, so that the kernel sees what overlaps.
class Aliases {
 public:
  // The tensor itself if it is on the CPU.
  Tensor of(const Tensor& original) {
    if (!original.defined() || original.device().is_cpu()) return original;
    TORCH_CHECK_NOT_IMPLEMENTED(
        original.device().type() == kType && original.layout() == c10::kStrided, "fakegpu has no ",
        original.layout(), " tensors on ", original.device());
    for (const auto& [known, alias] : tensors_) {
      if (known.is_same(original)) return alias;
    }
    Tensor alias = make_tensor(alias_of(original.storage()), kCpuKeys, original);
    if (original.unsafeGetTensorImpl()->is_wrapped_number()) {
      alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    tensors_.emplace_back(original, alias);
    return alias;
  }

  // Brings what the kernel changed about sizes and memory (resize_, out=) back to the originals.
  void write_back() {
    for (auto& [original, alias] : storages_) {
      if (alias.data() == original.data() && alias.nbytes() == original.nbytes()) continue;
      const std::size_t bytes = alias.nbytes();
      original.set_data_ptr_noswap(
          adopt(alias.set_data_ptr(c10::DataPtr(nullptr, c10::kCPU)), bytes, original.device()));
      original.set_nbytes(bytes);
    }
    for (auto& [original, alias] : tensors_) {
      TORCH_CHECK_NOT_IMPLEMENTED(original_of(alias.storage()) != nullptr,
                                  "fakegpu: an operator gave its argument other memory");
      if (same_layout(original, alias)) continue;
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(),
                                                            alias.storage_offset());
    }
  }

  // The fakegpu tensor for a result of the kernel: an argument, a view of one, or new memory.
  Tensor result(const Tensor& made, Device device) {
    if (!made.defined() || !made.device().is_cpu()) return made;
    const Tensor* base = nullptr;
    for (const auto& [original, alias] : tensors_) {
      if (alias.is_same(made)) return original;
      if (base == nullptr && alias.storage().is_alias_of(made.storage())) base = &original;
    }
    if (base != nullptr) return make_view(*base, made);
    return make_tensor(adopted(made.storage(), device), kKeys, made);
  }

 private:
  using Pair = std::pair<c10::Storage, c10::Storage>;

  c10::Storage alias_of(const c10::Storage& original) {
    for (const auto& [known, alias] : storages_) {
      if (known.is_alias_of(original)) return alias;
    }
    c10::DataPtr data(original.mutable_data(), c10::kCPU);
    c10::Storage alias(c10::Storage::use_byte_size_t(), original.nbytes(), std::move(data),
                       c10::GetAllocator(DeviceType::CPU), original.resizable());
    storages_.emplace_back(original, alias);
    return alias;
  }

  const c10::Storage* original_of(const c10::Storage& alias) const {
    for (const auto& [original, known] : storages_) {
      if (known.is_alias_of(alias)) return &original;
    }
    return nullptr;
  }

  // Results that share memory go on sharing it.
  c10::Storage adopted(const c10::Storage& made, Device device) {
    for (const auto& [host, storage] : adopted_) {
      if (host.is_alias_of(made)) return storage;
    }
    const std::size_t bytes = made.nbytes();
    // The storage itself is kept as the context: other things on the CPU may still refer to it.
    auto* const held = new c10::Storage(made);
    c10::DataPtr host(
        held->mutable_data(), held,
        [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::kCPU);
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                         adopt(std::move(host), bytes, device), allocator(), true);
    adopted_.emplace_back(made, storage);
    return storage;
  }

  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<Pair> storages_;
  std::vector<Pair> adopted_;
};

// Replaces every tensor of a value, inside lists too.
template <typename Replace>
void replace_tensors(IValue& value, Replace replace) {
  if (value.isTensor()) {
    value = replace(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(replace(tensor));
    value = std::move(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional(replace(*tensor)) : std::nullopt);
    }
    value = std::move(list);
  }
}

// Where the operator's arguments are. Throws when they are on different devices. As on a real
// device two things may stay on the CPU: numbers (tensors without dimensions) that are only read,
// and the indices of x[i, j].
class CommonDevice {
 public:
  explicit CommonDevice(const c10::FunctionSchema& schema) : schema_(schema) {}

  void see(const Tensor& tensor, bool may_be_on_cpu) {
    if (!tensor.defined()) return;
    const Device device = tensor.device();
    if (device.is_cpu() && may_be_on_cpu) return;
    if (!found_) found_ = device;
    TORCH_CHECK(*found_ == device,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *found_, " and ", device, "! (in ", schema_.operator_name(), ")");
  }

  void see(const IValue& value, const c10::Argument& argument) {
    const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      const Tensor& tensor = value.toTensor();
      see(tensor, !is_written && tensor.defined() && tensor.dim() == 0);
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) {
        see(tensor, !is_written && tensor.defined() && tensor.dim() == 0);
      }
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor) see(*tensor, true);
      }
    }
  }

  // Of the results: the device that was asked for, else that of the arguments.
  Device of_results(std::optional<Device> asked) const {
    if (asked) return asked->type() == kType ? checked(*asked) : *asked;
    TORCH_CHECK(found_.has_value(), "fakegpu: ", schema_.operator_name(), " names no device");
    return *found_;
  }

 private:
  const c10::FunctionSchema& schema_;
  std::optional<Device> found_;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const auto& arguments = schema.arguments();
  const std::size_t first = stack->size() - arguments.size();

  CommonDevice common(schema);
  std::optional<Device> asked;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[first + i];
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isStorage(), "fakegpu: ", schema.operator_name(),
                                " takes a storage");
    common.see(value, arguments[i]);
    if (value.isDevice()) {
      asked = value.toDevice();
      value = IValue(Device(c10::kCPU));
    }
  }
  const Device device = common.of_results(asked);

  Aliases aliases;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    replace_tensors((*stack)[first + i], [&](const Tensor& tensor) { return aliases.of(tensor); });
  }
  {
    // The layers above have done their part for the originals; the aliases have no history.
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(kCpuKeys, stack);
  }
  aliases.write_back();
  if (device.type() != kType) return;
  for (std::size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    replace_tensors((*stack)[i], [&](const Tensor& t) { return aliases.result(t, device); });
  }
}

// Convolutions have a door of their own for backends that torch does not know.
void convolve(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  run_on_cpu(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", ""), stack);
}

// Where a new tensor goes. Throws for what no fakegpu tensor can be.
Device of_new_tensor(std::optional<Device> device, std::optional<at::Layout> layout,
                     std::optional<bool> pin_memory) {
  TORCH_CHECK_NOT_IMPLEMENTED(c10::layout_or_default(layout) == c10::kStrided, "fakegpu has no ",
                              *layout, " tensors");
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "only CPU tensors can be pinned");
  return checked(c10::device_or_default(device));
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout> layout, std::optional<Device> device,
             std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(of_new_tensor(device, layout, pin_memory));
  return at::detail::empty_generic(sizes, allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                     std::optional<Device> device, std::optional<bool> pin_memory) {
  const c10::DeviceGuard guard(of_new_tensor(device, layout, pin_memory));
  return at::detail::empty_strided_generic(sizes, strides, allocator(), kKeys,
                                           c10::dtype_or_default(dtype));
}

// The one operator between devices: either side may be any fakegpu or the CPU.
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Aliases aliases;
  const Tensor source = aliases.of(from);
  Tensor target = aliases.of(to);
  const at::AutoDispatchBelowADInplaceOrView below;
  target.copy_(source, non_blocking);
  return to;
}

Tensor& set_storage_part(Tensor& self, c10::Storage source, std::int64_t offset,
                         at::IntArrayRef sizes, at::IntArrayRef strides) {
  TORCH_CHECK(source.device() == self.device(), "a storage on ", source.device(),
              " cannot be that of a tensor on ", self.device());
  TORCH_CHECK(offset >= 0, "a tensor begins before its storage: ", offset);
  const auto begin = static_cast<std::size_t>(offset);
  const bool is_contiguous = strides.empty();
  const std::size_t needed =
      is_contiguous ? at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), begin)
                    : at::detail::computeStorageNbytes(sizes, strides, self.itemsize(), begin);
  TORCH_CHECK(needed <= source.nbytes(), "a tensor of ", needed,
              " bytes does not fit a storage of ", source.nbytes());
  at::TensorImpl* const impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (is_contiguous) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, strides);
  }
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source) {
  const auto count = static_cast<std::int64_t>(source.nbytes() / self.itemsize());
  return set_storage_part(self, std::move(source), 0, count, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_part(self, source.storage(), source.storage_offset(), source.sizes(),
                          source.strides());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  // For other backends torch makes these of smaller operators, whose results differ from the CPU's
  // in the last bits. The price: no gradient goes through the last three.
  for (const char* name : {"native_layer_norm", "native_group_norm", "scaled_dot_product_attention",
                           "lstm.input", "gru.input"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolve>());
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage_part);
  library.impl("set_.source_Tensor", &set_tensor);
}

// The copy itself minds the marks. What torch would do by default, to copy first, never ends here.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace fakegpu

// A simulated HPU: PyTorch's own HPU dispatch key and an "hccl" backend, both on host memory. For tests only.
//
// Tensors on device "hpu" live in host memory; every operator without a kernel here falls back to the CPU. What a
// Gaudi refuses is refused here too: device indices other than 0, and reductions that HCCL does not have.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/extension.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace {

using namespace at;
constexpr auto kDevice = DeviceType::HPU;

int device_count() {
  const char* count = std::getenv("SIMULATED_HPU_COUNT");
  return count ? std::atoi(count) : 8;
}

// One card per process, as on a Gaudi: its index is always 0.
void check_index(Device device) {
  TORCH_CHECK(device.index() <= 0, "a process owns one HPU, hpu:0; got ", device);
}

// ---- memory -------------------------------------------------------------------------------------------------------

struct MemoryStats {
  std::mutex mutex;
  std::unordered_map<void*, size_t> sizes;
  size_t in_use = 0, peak = 0, allocations = 0, frees = 0;
};

MemoryStats& memory() {
  static auto* stats = new MemoryStats();  // never destroyed: tensors may outlive static destructors
  return *stats;
}

void release(void* pointer) {
  if (!pointer) return;
  auto& stats = memory();
  {
    std::lock_guard<std::mutex> lock(stats.mutex);
    auto entry = stats.sizes.find(pointer);
    stats.in_use -= entry->second;
    stats.frees++;
    stats.sizes.erase(entry);
  }
  std::free(pointer);
}

struct Allocator final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    void* pointer = bytes ? std::malloc(bytes) : nullptr;
    TORCH_CHECK(pointer || !bytes, "simulated HPU: out of memory");
    if (pointer) {
      auto& stats = memory();
      std::lock_guard<std::mutex> lock(stats.mutex);
      stats.sizes[pointer] = bytes;
      stats.in_use += bytes;
      stats.peak = std::max(stats.peak, stats.in_use);
      stats.allocations++;
    }
    return {pointer, pointer, &release, Device(kDevice, 0)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;

// ---- device guard and hooks: one device, one stream, everything synchronous ----------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kDevice; }
  Device getDevice() const override { return Device(kDevice, 0); }
  Device exchangeDevice(Device device) const override { check_index(device); return getDevice(); }
  void setDevice(Device device) const override { check_index(device); }
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  void record(void**, const Stream&, DeviceIndex, EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(HPU, Guard);

struct HPUHooks final : HPUHooksInterface {
  explicit HPUHooks(HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex index) const override { check_index(Device(kDevice, index)); }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return getCPUAllocator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};
REGISTER_HPU_HOOKS(HPUHooks);  // PyTorch looks them up by this name

// ---- operators: creation, views and copies here, everything else on the CPU -----------------------------------------

constexpr DispatchKeySet kKeySet(DispatchKey::HPU);

void check_device(std::optional<Device> device) {
  if (device) check_index(*device);
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  check_device(device);
  return at::detail::empty_generic(size, &allocator, kKeySet, dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  check_device(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeySet, dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().type() != kDevice) return tensor;
  auto storage = tensor.storage();
  auto elements = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  auto flat = from_blob(const_cast<void*>(storage.data()), {elements}, [storage](void*) {}, tensor.options().device(kCPU));
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

const Tensor& resize_(const Tensor& tensor, SymIntArrayRef size, std::optional<MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (tensor.sizes() == sizes) return tensor;  // and its strides stay
  impl->set_sizes_contiguous(sizes);
  size_t needed = impl->numel() ? (impl->numel() + impl->storage_offset()) * tensor.itemsize() : 0;
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    auto data = allocator.allocate(needed);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  return tensor;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  // PyTorch would decompose these, where the CPU has a kernel of its own that rounds otherwise.
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward", "addr"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", [](const Tensor& tensor) -> Scalar { return on_host(tensor).item(); });
  m.impl("view", [](const Tensor& t, SymIntArrayRef size) { return at::cpu::view_symint(t, size); });
  m.impl("as_strided", [](const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
    return at::cpu::as_strided_symint(t, size, stride, offset);
  });
  m.impl("_reshape_alias", [](const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride) {
    return at::cpu::_reshape_alias_symint(t, size, stride);
  });
  m.impl("unfold", [](const Tensor& t, int64_t dimension, int64_t size, int64_t step) {
    return at::cpu::unfold(t, dimension, size, step);
  });
  m.impl("set_.source_Storage", [](Tensor& t, Storage source) -> Tensor& { return at::cpu::set_(t, source); });
  m.impl("set_.source_Storage_storage_offset",
         [](Tensor& t, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) -> Tensor& {
           return at::cpu::set_(t, source, offset, size, stride);
         });
  m.impl("set_.source_Tensor", [](Tensor& t, const Tensor& source) -> Tensor& {
    return at::cpu::set_(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
  });
}

// Autocast with PyTorch's standard lists of lower-precision and fp32 operators.
TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
#define LOWER_PRECISION(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, lower_precision_fp)
#define FULL_PRECISION(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FULL_PRECISION)
}

[[maybe_unused]] const bool allocator_registered = [] { c10::SetAllocator(kDevice, &allocator); return true; }();

// ---- hccl: gloo on the host's view of the same memory, with HCCL's reductions only ----------------------------------

using c10d::Backend;
using Tensors = std::vector<Tensor>;
using TensorLists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

struct HCCL final : Backend {
  explicit HCCL(c10::intrusive_ptr<Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "hccl"; }

  static Tensor host(const Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == kDevice, "hccl: expected a tensor on hpu, got one on ", tensor.device());
    return on_host(tensor);
  }
  static Tensors host(const Tensors& tensors) {
    Tensors result;
    for (const auto& tensor : tensors) result.push_back(host(tensor));
    return result;
  }
  static TensorLists host(const TensorLists& lists) {
    TensorLists result;
    for (const auto& tensors : lists) result.push_back(host(tensors));
    return result;
  }
  static void check(const c10d::ReduceOp& op) {
    using Op = c10d::ReduceOp;
    TORCH_CHECK(op == Op::SUM || op == Op::MIN || op == Op::MAX || op == Op::PRODUCT, "hccl: unsupported ReduceOp");
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    check(options.reduceOp);
    auto on_host = host(tensors);
    return gloo_->allreduce(on_host, options);
  }
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto on_host = host(tensors);
    return gloo_->broadcast(on_host, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    check(options.reduceOp);
    auto on_host = host(tensors);
    return gloo_->reduce(on_host, options);
  }
  WorkPtr allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return through_gloo(&Backend::allgather, outputs, inputs, options);
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    return through_gloo(&Backend::_allgather_base, output, input, options);
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    check(options.reduceOp);
    return through_gloo(&Backend::_reduce_scatter_base, output, input, options);
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    return through_gloo(&Backend::allgather_into_tensor_coalesced, outputs, inputs, options);
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    check(options.reduceOp);
    return through_gloo(&Backend::reduce_scatter_tensor_coalesced, outputs, inputs, options);
  }
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    return through_gloo(&Backend::scatter, outputs, inputs, options);
  }
  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    return through_gloo(&Backend::gather, outputs, inputs, options);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }

 private:
  template <class Outputs, class Inputs, class Options>
  WorkPtr through_gloo(WorkPtr (Backend::*collective)(Outputs&, Inputs&, const Options&), Outputs& outputs,
                       Inputs& inputs, const Options& options) {
    auto out = host(outputs);
    auto in = host(inputs);
    return ((*gloo_).*collective)(out, in, options);
  }

  c10::intrusive_ptr<Backend> gloo_;
};

// c10d dispatches its operators on the tensors' key, so that each needs a kernel for HPU.
using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;
using ReduceOpPtr = c10::intrusive_ptr<c10d::ReduceOp>;

auto backend(const GroupPtr& group) { return group->getBackend(kDevice); }

template <class Options>
Options with_timeout(int64_t milliseconds) {
  Options options;
  if (milliseconds > 0) options.timeout = std::chrono::milliseconds(milliseconds);
  return options;
}

TORCH_LIBRARY_IMPL(c10d, HPU, m) {
  m.impl("allreduce_", [](TensorList tensors, const GroupPtr& group, const ReduceOpPtr& op,
                          const std::optional<Tensor>&, bool, int64_t timeout) {
    auto list = tensors.vec();
    auto options = with_timeout<c10d::AllreduceOptions>(timeout);
    options.reduceOp = *op;
    auto work = backend(group)->allreduce(list, options);
    return std::make_tuple(std::move(list), work);
  });
  m.impl("broadcast_", [](TensorList tensors, const GroupPtr& group, int64_t root, int64_t root_tensor, bool,
                          int64_t timeout) {
    auto list = tensors.vec();
    auto options = with_timeout<c10d::BroadcastOptions>(timeout);
    options.rootRank = root;
    options.rootTensor = root_tensor;
    auto work = backend(group)->broadcast(list, options);
    return std::make_tuple(std::move(list), work);
  });
  m.impl("reduce_", [](TensorList tensors, const GroupPtr& group, const ReduceOpPtr& op, int64_t root,
                       int64_t root_tensor, bool, int64_t timeout) -> WorkPtr {
    auto list = tensors.vec();
    auto options = with_timeout<c10d::ReduceOptions>(timeout);
    options.reduceOp = *op;
    options.rootRank = root;
    options.rootTensor = root_tensor;
    return backend(group)->reduce(list, options);
  });
  m.impl("allgather_", [](const TensorLists& outputs, TensorList inputs, const GroupPtr& group, bool, int64_t timeout) {
    auto out = outputs;
    auto in = inputs.vec();
    auto work = backend(group)->allgather(out, in, with_timeout<c10d::AllgatherOptions>(timeout));
    return std::make_tuple(outputs, work);
  });
  m.impl("_allgather_base_", [](Tensor& output, Tensor& input, const GroupPtr& group, bool, int64_t timeout) {
    auto work = backend(group)->_allgather_base(output, input, with_timeout<c10d::AllgatherOptions>(timeout));
    return std::make_tuple(output, work);
  });
  m.impl("_reduce_scatter_base_", [](Tensor& output, Tensor& input, const GroupPtr& group, const ReduceOpPtr& op, bool,
                                     int64_t timeout) {
    auto options = with_timeout<c10d::ReduceScatterOptions>(timeout);
    options.reduceOp = *op;
    auto work = backend(group)->_reduce_scatter_base(output, input, options);
    return std::make_tuple(output, work);
  });
  m.impl("allgather_into_tensor_coalesced_",
         [](TensorList outputs, TensorList inputs, const GroupPtr& group, bool) -> WorkPtr {
           auto out = outputs.vec();
           auto in = inputs.vec();
           return backend(group)->allgather_into_tensor_coalesced(out, in, {});
         });
  m.impl("reduce_scatter_tensor_coalesced_", [](TensorList outputs, TensorList inputs, const GroupPtr& group,
                                                const ReduceOpPtr& op, bool, int64_t timeout) -> WorkPtr {
    auto out = outputs.vec();
    auto in = inputs.vec();
    auto options = with_timeout<c10d::ReduceScatterOptions>(timeout);
    options.reduceOp = *op;
    return backend(group)->reduce_scatter_tensor_coalesced(out, in, options);
  });
  m.impl("scatter_", [](const TensorList& outputs, const TensorLists& inputs, const GroupPtr& group, int64_t root, bool,
                        int64_t timeout) {
    auto out = outputs.vec();
    auto in = inputs;
    auto options = with_timeout<c10d::ScatterOptions>(timeout);
    options.rootRank = root;
    auto work = backend(group)->scatter(out, in, options);
    return std::make_tuple(std::move(out), work);
  });
  m.impl("gather_", [](const TensorLists& outputs, const TensorList& inputs, const GroupPtr& group, int64_t root, bool,
                       int64_t timeout) -> WorkPtr {
    auto out = outputs;
    auto in = inputs.vec();
    auto options = with_timeout<c10d::GatherOptions>(timeout);
    options.rootRank = root;
    return backend(group)->gather(out, in, options);
  });
  m.impl("barrier", [](Tensor, const GroupPtr& group, const std::vector<int64_t>&, bool, int64_t timeout) -> WorkPtr {
    return backend(group)->barrier(with_timeout<c10d::BarrierOptions>(timeout));
  });
}

std::map<std::string, size_t> memory_stats() {
  auto& stats = memory();
  std::lock_guard<std::mutex> lock(stats.mutex);
  return {{"Limit", size_t{96} << 30},      {"InUse", stats.in_use},   {"MaxInUse", stats.peak},
          {"NumAllocs", stats.allocations}, {"NumFrees", stats.frees}, {"ActiveAllocs", stats.sizes.size()}};
}

c10::intrusive_ptr<c10d::Backend> hccl_over(c10::intrusive_ptr<c10d::Backend> gloo) {
  return c10::make_intrusive<HCCL>(std::move(gloo));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("device_count", &device_count);
  m.def("memory_stats", &memory_stats);
  m.def("hccl_over", &hccl_over);
}

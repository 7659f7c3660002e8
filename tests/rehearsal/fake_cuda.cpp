// Lets a CPU build of PyTorch hold fake tensors on 'cuda', with backward, where there is no GPU.
//
// Three things of a CUDA build are registered: a device guard, which autograd asks for the current
// device and stream; the hooks, which answer that CUDA is built and has one device; and the choice
// of SDPA's kernel, which takes the first enabled backend in the order of sdpa_kernel, as CUDA's
// does after its checks of shapes. Nothing is ever computed: all tensors are fake.
// To be loaded before torch is imported; the process must end with os._exit.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device exchangeDevice(Device) const override { return {kCUDA, 0}; }
  Device getDevice() const override { return {kCUDA, 0}; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, {kCUDA, 0}); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard);

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace native {

int64_t first_enabled(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double,
    bool, std::optional<double>, bool) {
  auto& context = globalContext();
  const bool half = query.scalar_type() != kFloat;
  for (auto backend : context.sDPPriorityOrder()) {
    const bool enabled =
        (backend == SDPBackend::cudnn_attention && context.userEnabledCuDNNSDP() && half) ||
        (backend == SDPBackend::flash_attention && context.userEnabledFlashSDP() && half &&
         !mask.has_value()) ||
        (backend == SDPBackend::efficient_attention && context.userEnabledMemEfficientSDP()) ||
        (backend == SDPBackend::math && context.userEnabledMathSDP());
    if (enabled) return static_cast<int64_t>(backend);
  }
  return static_cast<int64_t>(SDPBackend::error);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &first_enabled);

} // namespace native
} // namespace at

#include <c10/core/impl/DeviceGuardImplInterface.h>
// A CPU build of torch has no device guard for CUDA, and every operation on a tensor that says it is there wants one.
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

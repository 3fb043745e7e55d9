// SPDX-License-Identifier: Apache-2.0
// Launching with checked errors, dynamic shared memory, thread-block clusters and programmatic dependent launch.
//
// Dependent launch: a kernel launched here may start while the kernel before it in the stream still runs. It must call
// wait_for_previous_kernel() before it reads anything an earlier kernel may have written and before it writes anything;
// from there on the stream's order holds as usual. let_next_kernel_start() only says when waiting for a free place on
// the chip ends for the next such kernel, so it can be called at any time. Kernels of others, launched the ordinary
// way, are not affected.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/cuda_check.h"

namespace vericache::cuda {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct DeviceInfo {
  int device, multiprocessors, smem_optin;
  bool hopper_or_later;      // clusters and dependent launch
  bool hopper;               // wgmma
  int gigabytes_per_second;  // of device memory, by its clock and width
  double memory_rate() const { return 1e9 * gigabytes_per_second; }
};

// Of the current device. Reads attributes only: legal while a stream is captured.
inline DeviceInfo device_info() {
  constexpr int kMaxDevices = 64;
  // multiprocessors | smem << 16 | major << 40 | rate << 48; 0: not read yet
  static std::atomic<uint64_t> cache[kMaxDevices];
  int device = 0;
  VC_CUDA_CHECK(cudaGetDevice(&device));
  uint64_t packed = device < kMaxDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int sms = 0, smem = 0, major = 0, kilohertz = 0, bits = 0;
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device));
    VC_CUDA_CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device));
    const uint64_t rate = std::min<uint64_t>(uint64_t(kilohertz) * 2 * (bits / 8) / 1000000, 0xffff);  // two a clock
    packed = uint64_t(sms) | uint64_t(smem) << 16 | uint64_t(major) << 40 | rate << 48;
    if (device < kMaxDevices) cache[device].store(packed, std::memory_order_relaxed);
  }
  const int major = int(packed >> 40 & 0xff);
  return {device, int(packed & 0xffff), int(packed >> 16 & 0xffffff), major >= 9, major == 9, int(packed >> 48)};
}

// Raises a kernel's dynamic shared memory limit to what the device and its static shared memory leave, once a device.
// One instance of `Kernel` a function.
template <auto Kernel>
void allow_all_smem(const DeviceInfo& info) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = info.device < 64 ? uint64_t(1) << info.device : 0;
  if (done.load(std::memory_order_relaxed) & bit) return;
  cudaFuncAttributes attributes{};
  VC_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(Kernel)));
  VC_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(Kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     info.smem_optin - int(attributes.sharedSizeBytes)));
  done.fetch_or(bit, std::memory_order_relaxed);
}

struct LaunchShape {
  dim3 grid, block;
  size_t smem = 0;
  int cluster = 1;  // blocks a cluster, along x
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, const DeviceInfo& info, cudaStream_t stream,
            Args&&... args) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (info.hopper_or_later) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(shape.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  VC_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace vericache::cuda

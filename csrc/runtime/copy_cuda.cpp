// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of the copy engine: one non-blocking stream a direction, so that copies overlap compute and each
// other, and never serialize with the default stream behind anybody's back.
#include "common/error.h"
#include "runtime/copy_backend.h"

#ifdef VERICACHE_WITH_CUDA

#include <array>

#include "runtime/cuda_device.h"

namespace vericache {
namespace {

cudaMemcpyKind kind_of(CopyDirection direction) {
  switch (direction) {
    case CopyDirection::kHostToDevice:
      return cudaMemcpyHostToDevice;
    case CopyDirection::kDeviceToHost:
      return cudaMemcpyDeviceToHost;
    case CopyDirection::kDeviceToDevice:
      return cudaMemcpyDeviceToDevice;
  }
  throw Error(detail::concat("unknown copy direction ", static_cast<int>(direction)));
}

class CudaBackend final : public CopyBackend {
 public:
  explicit CudaBackend(int device) : device_(device) {
    DeviceGuard guard(device_);
    for (cudaStream_t& stream : streams_) {
      VC_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
  }

  ~CudaBackend() override {
    for (cudaStream_t stream : streams_) {
      if (stream != nullptr && cudaStreamDestroy(stream) != cudaSuccess) (void)cudaGetLastError();
    }
  }

  void submit(const CopyJobPtr& job) noexcept override {
    const cudaStream_t stream = streams_[static_cast<size_t>(job->direction)];
    try {
      DeviceGuard guard(device_);
      try {
        enqueue(*job, stream);
      } catch (const std::exception& error) {
        // Part of the job may be in the stream: the ticket completes, as failed, only after that part.
        job->end->fail_on_completion(error.what());
      }
      job->end->record(reinterpret_cast<int64_t>(stream));
    } catch (const std::exception& error) {
      job->end->set_failed(error.what());
    }
  }

  void stop(bool) noexcept override {
    // Work in a stream cannot be taken back; when it is through, no byte moves any more.
    for (cudaStream_t stream : streams_) {
      if (cudaStreamSynchronize(stream) != cudaSuccess) (void)cudaGetLastError();
    }
  }

  bool notifies() const noexcept override { return false; }

 private:
  void enqueue(const CopyJob& job, cudaStream_t stream) {
    const auto handle = reinterpret_cast<int64_t>(stream);
    // Orders the reads and writes that the caller's stream holds now (say, the tail page that leaves) before the copy.
    if (job.has_after_stream) {
      Event caller(device_);
      caller.record(job.after_stream);
      caller.block_stream(handle);  // the wait is in the stream: the event itself may go
    }
    // Orders the last reads of the slots whose bytes the copy takes over before its writes.
    for (const EventPtr& event : job.before) event->block_stream(handle);
    // Orders another direction's copy (say, the page's way to the host) before this one.
    if (job.after_copy) {
      VC_CHECK(!job.after_copy->failing(), "the copy it follows failed: ", job.after_copy->reason());
      job.after_copy->block_stream(handle);
    }
    VC_CHECK(job.failure.empty(), job.failure);
    if (job.begin) job.begin->record(handle);
    const cudaMemcpyKind kind = kind_of(job.direction);
    for (const CopyRow& row : job.rows) {
      VC_CUDA_CHECK(cudaMemcpyAsync(reinterpret_cast<void*>(row.dst), reinterpret_cast<const void*>(row.src),
                                    static_cast<size_t>(row.bytes), kind, stream));
    }
  }

  const int device_;
  std::array<cudaStream_t, kCopyDirections> streams_{};
};

}  // namespace

std::unique_ptr<CopyBackend> make_cuda_backend(int device) { return std::make_unique<CudaBackend>(device); }

}  // namespace vericache

#else

namespace vericache {

std::unique_ptr<CopyBackend> make_cuda_backend(int device) {
  throw Error(detail::concat("device ", device, " needs a build with CUDA; this one has the CPU only (use device=-1)"));
}

}  // namespace vericache

#endif

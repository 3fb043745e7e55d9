// SPDX-License-Identifier: Apache-2.0
// What the stand-alone GPU checks and benchmarks share: device buffers, random and poisoned contents, byte comparison,
// graph timing, and a JSON line a result. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/cuda_check.h"
#include "common/types.h"
#include "kernels/device/launch.cuh"

namespace vericache::bench {

// Device memory, move-only.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) { VC_CUDA_CHECK(cudaMalloc(&data_, std::max<size_t>(bytes, 16))); }
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(o.bytes_) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  template <class T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }
  int64_t address() const { return reinterpret_cast<int64_t>(data_); }
  size_t bytes() const { return bytes_; }
  void poison() const { VC_CUDA_CHECK(cudaMemset(data_, 0xff, bytes_)); }
  template <class T>
  std::vector<T> to_host() const {
    std::vector<T> host(bytes_ / sizeof(T));
    VC_CUDA_CHECK(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

template <class T>
Buffer upload(const std::vector<T>& host) {
  Buffer b(host.size() * sizeof(T));
  VC_CUDA_CHECK(cudaMemcpy(b.get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return b;
}

// Pinned host memory.
class Pinned {
 public:
  explicit Pinned(size_t bytes) { VC_CUDA_CHECK(cudaMallocHost(&data_, std::max<size_t>(bytes, 16))); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { cudaFreeHost(data_); }
  uint8_t* get() const { return static_cast<uint8_t*>(data_); }

 private:
  void* data_ = nullptr;
};

// Addresses of `count` pages of `bytes` each, one after the other.
inline std::vector<int64_t> page_table(const void* first, int64_t bytes, int64_t count) {
  std::vector<int64_t> table(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) table[size_t(i)] = reinterpret_cast<int64_t>(first) + i * bytes;
  return table;
}

__host__ __device__ inline uint32_t hash32(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return uint32_t((x ^ (x >> 31)) >> 16);
}

template <class T>
__global__ void fill_normal(T* out, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const float u = (float(hash32(seed * 0x9e3779b97f4a7c15ull + 2 * i) >> 8) + 0.5f) * 0x1p-24f;
    const float v = float(hash32(seed * 0x9e3779b97f4a7c15ull + 2 * i + 1) >> 8) * 0x1p-24f;
    out[i] = T(scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
  }
}

template <class T>
void randomize(const Buffer& b, uint64_t seed, float scale = 1.0f) {
  fill_normal<<<2048, 256>>>(b.get<T>(), int64_t(b.bytes() / sizeof(T)), seed, scale);
  VC_CUDA_CHECK(cudaGetLastError());
}

template <class T>
Buffer random_buffer(size_t count, uint64_t seed, float scale = 1.0f) {
  Buffer b(count * sizeof(T));
  randomize<T>(b, seed, scale);
  return b;
}

// Rows of `row_bytes` that differ between a (row i) and b (row map[i], or i if map is null): counted on the device.
static __global__ void count_different(const uint8_t* a, const uint8_t* b, const int* map, int64_t rows,
                                       int64_t row_bytes, unsigned long long* out) {
  unsigned long long different = 0;
  const int64_t words = row_bytes / 2;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * words;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = i / words, other = map ? map[row] : row;
    different +=
        reinterpret_cast<const uint16_t*>(a)[i] != reinterpret_cast<const uint16_t*>(b)[other * words + i % words];
  }
  if (different) atomicAdd(out, different);
}

inline uint64_t differences(const void* a, const void* b, const int* map, int64_t rows, int64_t row_bytes) {
  static Buffer counter(8);
  VC_CUDA_CHECK(cudaMemset(counter.get(), 0, 8));
  count_different<<<1024, 256>>>(static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b), map, rows, row_bytes,
                                 counter.get<unsigned long long>());
  VC_CUDA_CHECK(cudaGetLastError());
  return counter.to_host<uint64_t>()[0];
}

inline double median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Median time of one of `launches` calls of work(i, stream), captured in one graph, over `replays` replays, in us.
inline double time_graph(int launches, int replays, const std::function<void(int, cudaStream_t)>& work) {
  cudaStream_t stream;
  VC_CUDA_CHECK(cudaStreamCreate(&stream));
  work(0, stream);  // loads the module, raises limits
  VC_CUDA_CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  VC_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) work(i, stream);
  VC_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  VC_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  VC_CUDA_CHECK(cudaEventCreate(&start));
  VC_CUDA_CHECK(cudaEventCreate(&stop));
  std::vector<double> times;
  for (int r = 0; r < replays + 3; ++r) {
    VC_CUDA_CHECK(cudaEventRecord(start, stream));
    VC_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    VC_CUDA_CHECK(cudaEventRecord(stop, stream));
    VC_CUDA_CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    VC_CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (r >= 3) times.push_back(ms * 1000.0 / launches);
  }
  VC_CUDA_CHECK(cudaEventDestroy(start));
  VC_CUDA_CHECK(cudaEventDestroy(stop));
  VC_CUDA_CHECK(cudaGraphExecDestroy(exec));
  VC_CUDA_CHECK(cudaGraphDestroy(graph));
  VC_CUDA_CHECK(cudaStreamDestroy(stream));
  return median(std::move(times));
}

// Bytes a second of device memory by its clock and width, two transfers a clock: nothing can be faster.
inline double memory_rate() { return cuda::device_info().memory_rate(); }

// Results: a line on stdout each; JSON objects to a file.
class Report {
 public:
  explicit Report(const std::string& path) : file_(path.empty() ? nullptr : std::fopen(path.c_str(), "w")) {
    if (file_) std::fprintf(file_, "[\n");
  }
  ~Report() {
    if (file_) {
      std::fprintf(file_, "\n]\n");
      std::fclose(file_);
    }
  }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void check(const std::string& name, bool ok, const std::string& detail) {
    failures_ += !ok;
    std::printf("%s %-34s %s\n", ok ? "ok  " : "FAIL", name.c_str(), detail.c_str());
    entry("{\"check\": \"" + name + "\", \"ok\": " + (ok ? "true" : "false") + ", \"detail\": \"" + detail + "\"}");
  }
  // R1 at one shape: rows that were computed among others, against the same rows alone.
  void bitwise(const std::string& shape, const std::string& row_counts, int64_t compared, uint64_t different,
               bool control) {
    const bool ok = different == 0 && control;
    failures_ += !ok;
    const std::string detail = vericache::detail::concat(row_counts, " rows, ", compared, " rows compared, ", different,
                                                         " values differ, control ", control ? "noticed" : "MISSED");
    std::printf("%s %-34s %s\n", ok ? "ok  " : "FAIL", ("bitwise " + shape).c_str(), detail.c_str());
    entry("{\"check\": \"bitwise " + shape + "\", \"ok\": " + (ok ? "true" : "false") + ", \"detail\": \"" + detail +
          "\", \"shape\": \"" + shape + "\", \"row_counts\": \"" + row_counts +
          "\", \"compared\": " + std::to_string(compared) + ", \"different\": " + std::to_string(different) +
          ", \"control_noticed\": " + (control ? "true" : "false") + "}");
  }
  void time(const std::string& name, double us, double bytes, double floor_us) {
    std::printf("time %-44s %9.2f us  %7.1f GB/s  floor %8.2f us\n", name.c_str(), us, bytes / us * 1e-3, floor_us);
    char text[256];
    std::snprintf(text, sizeof text, "{\"name\": \"%s\", \"us\": %.3f, \"gb_s\": %.1f, \"floor_us\": %.3f}",
                  name.c_str(), us, bytes / us * 1e-3, floor_us);
    entry(text);
  }
  void value(const std::string& name, double value) {
    std::printf("value %-43s %9.4f\n", name.c_str(), value);
    entry("{\"name\": \"" + name + "\", \"value\": " + std::to_string(value) + "}");
  }
  int failures() const { return failures_; }
  void entry(const std::string& text) {
    std::fflush(stdout);
    if (!file_) return;
    std::fprintf(file_, "%s  %s", first_ ? "" : ",\n", text.c_str());
    first_ = false;
  }

 private:
  std::FILE* file_;
  bool first_ = true;
  int failures_ = 0;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  return vericache::detail::concat(parts...);
}

}  // namespace vericache::bench

// SPDX-License-Identifier: Apache-2.0
#include "runtime/host_block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#ifdef VERICACHE_WITH_CUDA
#include "runtime/cuda_device.h"
#endif

namespace vericache {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

#ifdef VERICACHE_WITH_CUDA
void pin(void* base, int64_t bytes) {
  const cudaError_t status =
      cudaHostRegister(base, static_cast<size_t>(bytes), cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  VC_CHECK(false, "cannot pin a host block of ", bytes, " bytes at ", base, ": ", cudaGetErrorName(status), ", ",
           cudaGetErrorString(status),
           "; raise the locked-memory limit (ulimit -l), lower the host capacity, or use "
           "unpinned memory");
}
#endif

// C's file functions, plain strings for paths: some builds of torch export symbols of another libstdc++, and
// std::ifstream and std::filesystem then crash in ours.
std::string read_text(const std::string& path) {
  std::string text;
  if (FILE* file = std::fopen(path.c_str(), "r")) {
    char buffer[4096];
    for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
    std::fclose(file);
  }
  return text;
}

std::vector<std::string> read_lines(const std::string& path) {
  const std::string text = read_text(path);
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

// A cgroup limit file holds a number of bytes or "max"; v1 writes a huge number for "no limit".
int64_t read_limit(const std::string& path) {
  const long long value = std::strtoll(read_text(path).c_str(), nullptr, 10);
  return value > 0 ? value : kUnlimited;
}

// Limits nest: the tightest on the way from the process's own group ("/a/b") up to the mount's root holds.
int64_t tightest(const std::string& mount, std::string group, const char* file) {
  int64_t limit = kUnlimited;
  while (true) {
    limit = std::min(limit, read_limit(detail::concat(mount, group, '/', file)));
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return limit;
    group.resize(slash);
  }
}

int64_t cgroup_limit(const std::string& root) {
  const std::string mount = root + "/sys/fs/cgroup";
  int64_t limit = kUnlimited;
  // Each line is "number:controllers:path"; v2 is the one without controllers.
  for (const std::string& line : read_lines(root + "/proc/self/cgroup")) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = detail::concat(',', line.substr(first + 1, second - first - 1), ',');
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") limit = std::min(limit, tightest(mount, group, "memory.max"));
    if (controllers.find(",memory,") != std::string::npos) {
      limit = std::min(limit, tightest(mount + "/memory", group, "memory.limit_in_bytes"));
    }
  }
  return limit;
}

int64_t available_memory(const std::string& root) {
  for (const std::string& line : read_lines(root + "/proc/meminfo")) {
    long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lld", &kib) == 1) return kib * 1024;
  }
  return kUnlimited;
}

}  // namespace

HostBlock::HostBlock(int64_t bytes, int device) : bytes_(bytes) {
  VC_CHECK(bytes > 0 && bytes % kHostPageBytes == 0, "a host block needs a positive multiple of ", kHostPageBytes,
           " bytes, not ", bytes);
  void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    throw CapacityError(detail::concat("the system gives no further host block of ", bytes,
                                       " bytes: ", std::strerror(errno), "; lower the host capacity"));
  }
  address_ = reinterpret_cast<int64_t>(base);
  if (device < 0) return;
#ifdef VERICACHE_WITH_CUDA
  try {
    DeviceGuard guard(device);  // registering needs a context; portable makes it valid in all
    pin(base, bytes);
  } catch (...) {
    release();  // a constructor that throws runs no destructor
    throw;
  }
  pinned_ = true;
#else
  release();
  VC_CHECK(false, "cannot pin a host block of ", bytes, " bytes for device ", device,
           ": this build has no CUDA; use device=-1");
#endif
}

HostBlock::~HostBlock() { release(); }

HostBlock::HostBlock(HostBlock&& other) noexcept
    : address_(std::exchange(other.address_, 0)),
      bytes_(std::exchange(other.bytes_, 0)),
      pinned_(std::exchange(other.pinned_, false)) {}

HostBlock& HostBlock::operator=(HostBlock&& other) noexcept {
  if (this != &other) {
    release();
    address_ = std::exchange(other.address_, 0);
    bytes_ = std::exchange(other.bytes_, 0);
    pinned_ = std::exchange(other.pinned_, false);
  }
  return *this;
}

void HostBlock::release() noexcept {
  if (address_ == 0) return;
  void* base = reinterpret_cast<void*>(address_);
#ifdef VERICACHE_WITH_CUDA
  if (pinned_ && cudaHostUnregister(base) != cudaSuccess) (void)cudaGetLastError();
#endif
  (void)munmap(base, static_cast<size_t>(bytes_));
  address_ = 0;
}

int64_t default_host_capacity(const std::string& root) {
  const int64_t limit = std::min(cgroup_limit(root), available_memory(root));
  VC_CHECK(limit != kUnlimited, "cannot tell how much host memory there is: ", root,
           "/proc/meminfo has no MemAvailable; give the host capacity in bytes");
  return limit / 10 * 8 / kHostPageBytes * kHostPageBytes;
}

}  // namespace vericache

// SPDX-License-Identifier: Apache-2.0
// The exceptions of the C++ side. The bindings turn Error into vericache.errors.KernelError and CapacityError into
// vericache.errors.CapacityError; both carry one sentence that names the value and the remedy.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace vericache {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A pool, ring or budget has no room for what was asked.
class CapacityError : public Error {
 public:
  using Error::Error;
};

namespace detail {

// No iostreams: some builds of torch export symbols of another libstdc++, and a stream that prints a number then
// crashes in ours, just when there is something to say.
inline void append(std::string& text, std::string_view part) { text += part; }
inline void append(std::string& text, const char* part) { text += part; }  // else it would be an address
inline void append(std::string& text, char part) { text += part; }
inline void append(std::string& text, bool part) { text += part ? '1' : '0'; }

template <class T>
  requires std::is_arithmetic_v<T>
void append(std::string& text, T part) {
  if constexpr (std::is_integral_v<T>) {
    text += std::to_string(part);
  } else {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%g", static_cast<double>(part));
    text += buffer;
  }
}

inline void append(std::string& text, const void* part) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%p", part);
  text += buffer;
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

}  // namespace detail
}  // namespace vericache

// VC_CHECK(k > 0, "k is ", k, "; it must be positive.") throws vericache::Error when the condition is false.
#define VC_CHECK(condition, ...)                                          \
  do {                                                                    \
    if (!(condition)) [[unlikely]]                                        \
      throw ::vericache::Error(::vericache::detail::concat(__VA_ARGS__)); \
  } while (0)

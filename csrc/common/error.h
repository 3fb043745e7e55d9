// SPDX-License-Identifier: Apache-2.0
// The exceptions of the C++ side. The bindings turn Error into vericache.errors.KernelError and CapacityError into
// vericache.errors.CapacityError; both carry one sentence that names the value and the remedy.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace detail
}  // namespace vericache

// VC_CHECK(k > 0, "k is ", k, "; it must be positive.") throws vericache::Error when the condition is false.
#define VC_CHECK(condition, ...)                                          \
  do {                                                                    \
    if (!(condition)) [[unlikely]]                                        \
      throw ::vericache::Error(::vericache::detail::concat(__VA_ARGS__)); \
  } while (0)

// SPDX-License-Identifier: Apache-2.0
// Checks of the ops' arguments. Each throws vericache::Error with the argument's name, the value found and what it
// must be; all run before any work. Sizes below zero in a wanted shape match anything.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "common/error.h"
#include "common/types.h"

namespace vericache::bindings {

inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] < 0 ? "*" : std::to_string(sizes[i]);
  }
  return text + ']';
}

// torch's Python name of a dtype, where it is one of ours.
inline std::string dtype_text(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

// The storage type T of params.h.
inline DType storage_dtype(const at::Tensor& t, const char* name) {
  if (t.scalar_type() == at::kFloat) return DType::kFloat32;
  if (t.scalar_type() == at::kBFloat16) return DType::kBFloat16;
  throw Error(detail::concat(name, " has dtype ", dtype_text(t.scalar_type()), "; convert it to float32 or bfloat16."));
}

inline void check_dtype(const at::Tensor& t, at::ScalarType dtype, const char* name) {
  VC_CHECK(t.scalar_type() == dtype, name, " has dtype ", dtype_text(t.scalar_type()), "; it must be ",
           dtype_text(dtype), ".");
}

inline void check_shape(const at::Tensor& t, std::initializer_list<int64_t> want, const char* name) {
  const at::IntArrayRef wanted(want.begin(), want.size());
  bool ok = t.dim() == int64_t(want.size());
  for (size_t i = 0; ok && i < want.size(); ++i) ok = wanted[i] < 0 || t.size(int64_t(i)) == wanted[i];
  VC_CHECK(ok, name, " has shape ", shape_text(t.sizes()), "; it must be ", shape_text(wanted), ".");
}

inline void check_same_device(const at::Tensor& t, const at::Tensor& lead, const char* name, const char* lead_name) {
  VC_CHECK(t.device() == lead.device(), name, " is on ", t.device().str(), " and ", lead_name, " on ",
           lead.device().str(), "; move them to one device.");
}

inline void check_contiguous(const at::Tensor& t, const char* name) {
  VC_CHECK(t.is_contiguous(), name, " has shape ", shape_text(t.sizes()), " and strides ", shape_text(t.strides()),
           "; it must be contiguous: call .contiguous() on it.");
}

inline void check_last_axis_contiguous(const at::Tensor& t, const char* name) {
  VC_CHECK(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, name, " has strides ", shape_text(t.strides()),
           "; its last axis must be contiguous: call .contiguous() on it.");
}

// dtype, shape and device of a dense argument at once; contiguous.
inline void check_tensor(const at::Tensor& t, at::ScalarType dtype, std::initializer_list<int64_t> shape,
                         const at::Tensor& lead, const char* name, const char* lead_name) {
  check_dtype(t, dtype, name);
  check_shape(t, shape, name);
  check_same_device(t, lead, name, lead_name);
  check_contiguous(t, name);
}

inline int32_t positive_int(int64_t value, const char* name) {
  VC_CHECK(value > 0 && value <= std::numeric_limits<int32_t>::max(), name, " is ", value, "; it must be positive.");
  return int32_t(value);
}

// A tensor's extent as the int32 that the params structs carry.
inline int32_t extent(int64_t value, const char* name) {
  VC_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " is ", value,
           "; it must fit 31 bits: split the call.");
  return int32_t(value);
}

}  // namespace vericache::bindings

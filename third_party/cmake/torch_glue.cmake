# SPDX-License-Identifier: Apache-2.0
# Target torch_glue: the headers and libraries of the torch that Python imports, and the pybind11 that came with it.
# Not find_package(Torch): its CUDA half enables languages, resets architectures and wants a full toolkit.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "
import os, torch
from torch.utils import cpp_extension as ext
root = os.path.dirname(torch.__file__)
print(torch.__version__, torch.version.cuda or '', int(torch._C._GLIBCXX_USE_CXX11_ABI), root,
      ';'.join(ext.include_paths()), sep='|')"
  OUTPUT_VARIABLE torch_facts ERROR_VARIABLE torch_error RESULT_VARIABLE torch_rc OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_rc EQUAL 0)
  message(FATAL_ERROR "vericache builds against the torch that is installed, and ${Python_EXECUTABLE} has none: install "
                      "torch, then run 'pip install --no-build-isolation .'.\n${torch_error}")
endif()
string(REGEX MATCH "^([^|]*)\\|([^|]*)\\|([^|]*)\\|([^|]*)\\|(.*)$" _ "${torch_facts}")
set(TORCH_VERSION ${CMAKE_MATCH_1})
set(TORCH_CUDA_VERSION "${CMAKE_MATCH_2}")
set(torch_cxx11_abi ${CMAKE_MATCH_3})
set(torch_root ${CMAKE_MATCH_4})
set(torch_includes ${CMAKE_MATCH_5})
if(TORCH_CUDA_VERSION)
  set(TORCH_HAS_CUDA ON)
else()
  set(TORCH_HAS_CUDA OFF)
endif()
message(STATUS "vericache: torch ${TORCH_VERSION} (CUDA: '${TORCH_CUDA_VERSION}')")

add_library(torch_glue INTERFACE)
target_include_directories(torch_glue SYSTEM INTERFACE ${torch_includes})
target_compile_definitions(torch_glue INTERFACE _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi})
target_link_directories(torch_glue INTERFACE ${torch_root}/lib)
target_link_libraries(torch_glue INTERFACE c10 torch_cpu torch_python)
if(TORCH_HAS_CUDA)
  target_link_libraries(torch_glue INTERFACE c10_cuda torch_cuda)
endif()

# torch's bundled pybind11 first: headers and internals then agree with libtorch_python, so exceptions registered by
# our module are also translated when thrown through torch.ops.
if(NOT EXISTS ${torch_root}/include/pybind11/pybind11.h)
  find_package(pybind11 CONFIG REQUIRED)
  target_link_libraries(torch_glue INTERFACE pybind11::headers)
endif()

# SPDX-License-Identifier: Apache-2.0
# Target nvtx_glue: NVTX 3 (header only, in the CUDA toolkit). Defines VERICACHE_WITH_NVTX where the header is found.
add_library(nvtx_glue INTERFACE)
find_path(VERICACHE_NVTX_DIR nvtx3/nvToolsExt.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if(VERICACHE_NVTX_DIR)
  target_include_directories(nvtx_glue SYSTEM INTERFACE ${VERICACHE_NVTX_DIR})
  target_compile_definitions(nvtx_glue INTERFACE VERICACHE_WITH_NVTX)
  target_link_libraries(nvtx_glue INTERFACE ${CMAKE_DL_LIBS})
endif()

# The stable-ABI headers and libtorch_cpu of an installed torch. Unlike torch's own package this needs no CUDA
# toolkit for a torch that has CUDA, and tells nothing of torch's compiler flags.
#
#   TorchStable_ROOT     where to look: the folder that holds torch's include/ and lib/ (default: asks Python)
#   TorchStable::torch_cpu, and TorchStable::torch_cuda where torch has CUDA
if(NOT DEFINED TorchStable_ROOT)
  find_program(TorchStable_PYTHON NAMES python3 python)
  if(TorchStable_PYTHON)
    execute_process(
      COMMAND ${TorchStable_PYTHON} -c
              "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE TorchStable_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()

find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h HINTS ${TorchStable_ROOT}/include)
find_library(TorchStable_CPU_LIBRARY torch_cpu HINTS ${TorchStable_ROOT}/lib)
find_library(TorchStable_CUDA_LIBRARY torch_cuda HINTS ${TorchStable_ROOT}/lib)
mark_as_advanced(TorchStable_INCLUDE_DIR TorchStable_CPU_LIBRARY TorchStable_CUDA_LIBRARY TorchStable_PYTHON)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable REQUIRED_VARS TorchStable_CPU_LIBRARY TorchStable_INCLUDE_DIR)

if(TorchStable_FOUND)
  get_filename_component(TorchStable_LIBRARY_DIR ${TorchStable_CPU_LIBRARY} DIRECTORY)
  get_filename_component(TorchStable_ROOT_DIR ${TorchStable_LIBRARY_DIR} DIRECTORY)
  foreach(device IN ITEMS CPU CUDA)
    string(TOLOWER torch_${device} name)
    if(TorchStable_${device}_LIBRARY AND NOT TARGET TorchStable::${name})
      add_library(TorchStable::${name} SHARED IMPORTED)
      set_target_properties(
        TorchStable::${name}
        PROPERTIES IMPORTED_LOCATION ${TorchStable_${device}_LIBRARY}
                   INTERFACE_INCLUDE_DIRECTORIES ${TorchStable_INCLUDE_DIR}
                   # The least torch that loads the result: minimum_torch of csrc/build_facts.txt.
                   INTERFACE_COMPILE_DEFINITIONS TORCH_TARGET_VERSION=0x020b000000000000)
      # torch's libraries need further ones, whose place they know themselves.
      if(NOT APPLE)
        set_property(TARGET TorchStable::${name} PROPERTY INTERFACE_LINK_OPTIONS
                                                          LINKER:--allow-shlib-undefined)
      endif()
    endif()
  endforeach()
endif()

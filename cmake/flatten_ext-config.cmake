# find_package(flatten_ext): flatten_ext::flatten, and flatten_ext::flatten_cuda where it was built.
include(CMakeFindDependencyMacro)
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
find_dependency(TorchStable)
include(${CMAKE_CURRENT_LIST_DIR}/flatten_ext-targets.cmake)

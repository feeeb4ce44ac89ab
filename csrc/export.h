// Symbols that the shared libraries offer each other; everything else stays hidden.
#pragma once

#if defined(_WIN32)
#if defined(FLATTEN_BUILDING_LIBRARY)
#define FLATTEN_API __declspec(dllexport)
#else
#define FLATTEN_API __declspec(dllimport)
#endif
#else
#define FLATTEN_API __attribute__((visibility("default")))
#endif

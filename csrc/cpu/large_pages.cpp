#include "large_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace flatten::cpu {

/// The C library maps a very large block anew for every allocation (glibc: above 32 MiB) and gives smaller
/// ones back whenever enough of its heap is free; the system's faults for small pages then take up to half as
/// long as computing what goes there.
void prefer_large_pages(void* data, std::int64_t bytes) {
#ifdef __linux__
  // A block of two large pages (2 MiB each) holds a whole one wherever it begins. Measured: smaller blocks
  // gain nothing (benchmarks/NOTES.md, "Page faults of smaller blocks").
  constexpr std::int64_t kLeast = 4 << 20;  // [bytes]
  if (bytes < kLeast) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: refused, nothing is lost
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace flatten::cpu

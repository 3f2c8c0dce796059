// What instrument.py calls before each access to device (1), constant (2) or threadgroup (3) memory.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulated {
extern uintptr_t written_begin, written_bytes; // where arguments are that the kernel may write
void shared_access(uintptr_t address, size_t size, bool threadgroup_memory, bool writes, int line);
[[noreturn]] void misaligned_access(uintptr_t address, size_t alignment, int line);
} // namespace emulated

extern "C" __attribute__((always_inline, used)) inline void emulated_access(
    uintptr_t address, size_t size, size_t alignment, int space, int writes, int line)
{
    if (address % alignment) emulated::misaligned_access(address, alignment, line);
    if (space == 3 || (space == 1 && address - emulated::written_begin < emulated::written_bytes))
        emulated::shared_access(address, size, space == 3, writes != 0, line);
}

// The entry: one launch at a time, from its arguments to what went wrong.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

const Launch* launched;
void* bound[BUFFERS];
sigjmp_buf failed;
char message[512];

namespace emulated {
void fail(const char* format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    siglongjmp(failed, 1);
}

void check_argument(uint buffer, size_t size, size_t alignment)
{
    const Buffer& argument = launched->buffers[buffer];
    if (argument.bytes < size)
        fail("argument '%s' of %llu bytes is bound to a type of %zu", argument.name,
            static_cast<unsigned long long>(argument.bytes), size);
    if (uintptr_t(bound[buffer]) % alignment)
        fail("argument '%s' is not aligned to %zu bytes", argument.name, alignment);
}

void misaligned_access(uintptr_t address, size_t alignment, int line)
{
    fail("line %d: an address is %zu more than a multiple of the %zu bytes that it must be aligned to", line,
        address % alignment, alignment);
}
} // namespace emulated

// GPUs may take float32 numbers below 2^-126 for zero, and make zeros of them; float16's are as they are.
static void flush_small_numbers(bool on)
{
#if defined(__x86_64__)
    const unsigned bits = 1 << 15 | 1 << 6; // of results, of operands
    _mm_setcsr(on ? _mm_getcsr() | bits : _mm_getcsr() & ~bits);
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" : : "r"(on ? control | 1 << 24 : control & ~(uint64_t(1) << 24)));
#endif
}

// 0, or 1 with what went wrong in `error`.
extern "C" int metal_launch(const Launch* launch, char* error, size_t size)
{
    volatile bool good = false;
    launched = launch;
    catch_faults(true);
    if (sigsetjmp(failed, 1) == 0) {
        bring_in(*launch, bound);
        start_launch();
        flush_small_numbers(launch->order == REVERSED);
        run_grid(*launch);
        good = true;
    }
    flush_small_numbers(false);
    catch_faults(false);
    if (!bring_back()) good = false;
    if (!good) snprintf(error, size, "kernel %s: %s", launch->kernel, message);
    return good ? 0 : 1;
}

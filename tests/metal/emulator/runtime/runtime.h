// Shared by the parts of the runtime; kernels see include/emulator/execution.h only.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <emulator/execution.h>

// The shim's address spaces are macros that libraries' headers must not see.
#undef device
#undef constant
#undef threadgroup
#undef thread
#undef kernel

struct Buffer {
    void* data;
    uint64_t bytes;
    const char* name; // of the kernel's parameter
    uint32_t written; // not const
};
enum Guard : uint32_t { NO_GUARD, GUARD_END, GUARD_START };
enum Order : uint32_t { FORWARD, REVERSED, RANDOM };
struct Launch {
    const char* kernel;
    void (*body)(const emulated::Place&, void* const* buffers);
    const Buffer* buffers;
    uint32_t count;
    uint32_t threads[3], group[3];
    uint32_t order, guard;
    uint64_t seed;
};

extern const Launch* launched; // the one that runs
extern sigjmp_buf failed;      // where a failing thread goes; the message is in `message`
extern char message[512];

constexpr size_t BUFFERS = 31; // that Metal has

// memory.cpp
void poison_threadgroup_memory();                      // before a group
void bring_in(const Launch& launch, void** buffers);   // copies of the arguments between unreadable pages
bool bring_back(const Launch& launch);                 // what was written; false (and `message`) if also beside
void catch_faults(bool on);
unsigned char* make_stacks(size_t count, size_t size); // each with an unreadable page below
void say_fault(const void* address);                   // `message` for an access outside of everything

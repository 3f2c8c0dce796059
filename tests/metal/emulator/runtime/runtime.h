// Shared by the parts of the runtime; kernels see include/emulator only.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <emulator/access.h>
#include <emulator/execution.h>

// The shim's address spaces are macros that libraries' headers must not see.
#undef device
#undef constant
#undef threadgroup
#undef thread
#undef kernel

typedef unsigned char Byte;

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
extern void* bound[];          // its buffers as its threads see them
extern sigjmp_buf failed;      // where a failing thread goes; the message is in `message`
extern char message[512];

constexpr size_t BUFFERS = 31;   // that Metal has
constexpr size_t VARIABLES = 64; // of a threadgroup, more than fit
constexpr Byte POISON = 0xff;    // NaN as float, half and bfloat

// Memory that a kernel may use: an argument or a threadgroup variable.
struct Extent {
    Byte* begin;
    size_t bytes;
    size_t number;    // of the argument's copy, or of the variable
    const char* name; // for messages
};
void say_outside(const Extent& extent, const void* at); // into `message`

// scheduler.cpp
void run_grid(const Launch& launch);

// memory.cpp
Byte* reserve(size_t bytes);                    // addresses without memory
void open_pages(Byte* at, size_t bytes);        // makes whole pages of them readable and writable
Byte* make_stacks(size_t count, size_t size);   // each with an unreadable page below
void forget_threadgroup_memory();               // before a group
Extent threadgroup_variable(uintptr_t address); // the nearest one
void catch_faults(bool on);                     // while threads run
extern "C" unsigned metal_seconds;              // of the processor's time that a launch may take

// arguments.cpp
void bring_in(const Launch& launch, void** buffers); // copies of the arguments between unreadable pages
bool bring_back();                                   // what was written; false (and `message`) if also beside it
bool say_argument(const void* address);              // say_outside, if the address is near an argument
Extent written_argument(uintptr_t address);

// races.cpp
void start_launch();
void start_group();
void start_epoch(emulated::mem_flags ordered); // all threads of the group are at a barrier

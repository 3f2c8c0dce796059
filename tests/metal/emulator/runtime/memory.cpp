// Memory of kernels: arguments between unreadable pages, threadgroup memory, stacks; faults become messages.
#include "runtime.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace {
typedef unsigned char Byte;
constexpr size_t GAP = size_t(1) << 30; // unreadable on both sides; only addresses, no memory
constexpr size_t CANARY = 256;          // bytes looked at beside an argument
constexpr Byte POISON = 0xff;           // NaN as float, half and bfloat
constexpr size_t VARIABLES = 64, VARIABLE = 64 << 10; // of a threadgroup, and bytes of each
const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));

Byte* reserve(size_t bytes)
{
    void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    return static_cast<Byte*>(at);
}
void open_pages(Byte* at, size_t bytes)
{
    if (mprotect(at, bytes, PROT_READ | PROT_WRITE)) abort();
}

// Readable memory between two gaps.
struct Room {
    Byte* begin = nullptr;
    size_t bytes = 0;

    void grow(size_t wanted)
    {
        if (wanted <= bytes) return;
        if (begin) munmap(begin - GAP, bytes + 2 * GAP);
        bytes = (wanted + PAGE - 1) / PAGE * PAGE;
        begin = reserve(bytes + 2 * GAP) + GAP;
        open_pages(begin, bytes);
    }
    Byte* end() const { return begin + bytes; }
    bool near(const Byte* address) const { return begin && address >= begin - GAP && address < end() + GAP; }
};

// Arguments that share memory are copied together.
struct Copy {
    Byte *original, *original_end, *start;
    uint32_t argument;
    bool written;
    Room room;

    size_t bytes() const { return size_t(original_end - original); }
    Byte* end() const { return start + bytes(); }
    Byte* front() const { return std::max(room.begin, start - std::min(CANARY, size_t(start - room.begin))); }
    Byte* back() const { return end() + std::min(CANARY, size_t(room.end() - end())); }
};
Copy copies[BUFFERS];
size_t copy_count;

Byte* threadgroup_rooms;
size_t reached[VARIABLES]; // bytes of the variables that the group has come to; 0 of others
Byte *stacks_begin, *stacks_end;

void copy_in(Copy& copy, Guard guard)
{
    copy.room.grow(copy.bytes() + 32); // room for the remainder below
    const size_t remainder = reinterpret_cast<uintptr_t>(copy.original) % 16; // so vectors stay as aligned as they were
    if (guard == GUARD_START) {
        copy.start = copy.room.begin + remainder;
    } else {
        copy.start = copy.room.end() - copy.bytes();
        copy.start -= (reinterpret_cast<uintptr_t>(copy.start) - remainder) % 16;
    }
    memset(copy.front(), POISON, size_t(copy.start - copy.front()));
    memset(copy.end(), POISON, size_t(copy.back() - copy.end()));
    memcpy(copy.start, copy.original, copy.bytes());
}

void say_outside(const char* what, const char* name, size_t bytes, ptrdiff_t at)
{
    snprintf(message, sizeof message, "%s '%s' of %zu bytes: access at byte %td, %s", what, name, bytes, at,
        at < 0 ? "before its start" : "beyond its end");
}

void on_fault(int, siginfo_t* info, void*)
{
    say_fault(info->si_addr);
    siglongjmp(failed, 1);
}
} // namespace

void bring_in(const Launch& launch, void** buffers)
{
    copy_count = 0;
    for (uint32_t i = 0; i < launch.count; i++) buffers[i] = launch.buffers[i].data;
    if (launch.guard == NO_GUARD) return;

    uint32_t by_address[BUFFERS];
    for (uint32_t i = 0; i < launch.count; i++) by_address[i] = i;
    std::sort(by_address, by_address + launch.count,
        [&](uint32_t a, uint32_t b) { return launch.buffers[a].data < launch.buffers[b].data; });
    size_t copy_of[BUFFERS];
    for (uint32_t k = 0; k < launch.count; k++) {
        const Buffer& buffer = launch.buffers[by_address[k]];
        Byte* begin = static_cast<Byte*>(buffer.data);
        const bool shares = copy_count && begin < copies[copy_count - 1].original_end;
        Copy& copy = copies[shares ? copy_count - 1 : copy_count++];
        if (!shares) {
            copy.original = copy.original_end = begin;
            copy.argument = by_address[k];
            copy.written = false;
        }
        copy.original_end = std::max(copy.original_end, begin + buffer.bytes);
        copy.written |= buffer.written != 0;
        copy_of[by_address[k]] = copy_count - 1;
    }
    for (size_t k = 0; k < copy_count; k++) copy_in(copies[k], Guard(launch.guard));
    for (uint32_t i = 0; i < launch.count; i++) {
        const Copy& copy = copies[copy_of[i]];
        buffers[i] = copy.start + (static_cast<Byte*>(launch.buffers[i].data) - copy.original);
    }
}

bool bring_back(const Launch& launch)
{
    const auto is_poison = [](Byte byte) { return byte == POISON; };
    for (size_t k = 0; k < copy_count; k++) {
        const Copy& copy = copies[k];
        if (copy.written) memcpy(copy.original, copy.start, copy.bytes());
        const Byte* changed = std::find_if_not(copy.front(), copy.start, is_poison);
        if (changed == copy.start) changed = std::find_if_not(copy.end(), copy.back(), is_poison);
        if (changed == copy.back()) continue;
        say_outside("argument", launch.buffers[copy.argument].name, copy.bytes(), changed - copy.start);
        return false;
    }
    return true;
}

void poison_threadgroup_memory() { std::fill(reached, reached + VARIABLES, 0); }

void* emulated::threadgroup_memory(uint variable, size_t size)
{
    if (variable >= VARIABLES || size > VARIABLE) fail("too much threadgroup memory");
    if (!threadgroup_rooms) {
        threadgroup_rooms = reserve(VARIABLES * 2 * VARIABLE);
        for (size_t i = 0; i < VARIABLES; i++) open_pages(threadgroup_rooms + i * 2 * VARIABLE, VARIABLE);
    }
    Byte* at = threadgroup_rooms + variable * 2 * VARIABLE + VARIABLE - size;
    if (!reached[variable]) memset(at, POISON, size);
    reached[variable] = size;
    return at;
}

unsigned char* make_stacks(size_t count, size_t size)
{
    stacks_begin = reserve(count * size + PAGE);
    stacks_end = stacks_begin + count * size;
    for (size_t i = 0; i < count; i++) open_pages(stacks_begin + i * size + PAGE, size - PAGE);
    return stacks_begin;
}

void say_fault(const void* address)
{
    const Byte* at = static_cast<const Byte*>(address);
    for (size_t k = 0; k < copy_count; k++)
        if (copies[k].room.near(at)) {
            const Buffer& buffer = launched->buffers[copies[k].argument];
            return say_outside("argument", buffer.name, copies[k].bytes(), at - copies[k].start);
        }
    if (at >= stacks_begin && at < stacks_end) {
        snprintf(message, sizeof message, "a thread's own variables do not fit its stack");
        return;
    }
    for (size_t i = 0; i < VARIABLES; i++) {
        const Byte* room = threadgroup_rooms + i * 2 * VARIABLE;
        if (threadgroup_rooms && at >= room - VARIABLE && at < room + 2 * VARIABLE && reached[i]) {
            char name[32];
            snprintf(name, sizeof name, "number %zu", i);
            return say_outside("threadgroup variable", name, reached[i], at - (room + VARIABLE - reached[i]));
        }
    }
    snprintf(message, sizeof message, "access to %p, which is no memory of the kernel, or a misaligned vector", address);
}

void catch_faults(bool on)
{
    static const int signals[] = {SIGSEGV, SIGBUS};
    static struct sigaction before[2];
    static stack_t stack_before;
    static Byte stack[64 << 10]; // a thread's own stack may be what is full
    if (on) {
        stack_t own = {};
        own.ss_sp = stack;
        own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 2; i++) sigaction(signals[i], &action, &before[i]);
    } else {
        for (int i = 0; i < 2; i++) sigaction(signals[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
}

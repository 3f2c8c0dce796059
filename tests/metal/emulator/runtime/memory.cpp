// Memory that kernels bring along: threadgroup variables, stacks. Faults become messages.
#include "runtime.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

namespace {
constexpr size_t ROOM = 128 << 10; // of a threadgroup variable, which ends in the middle of it
const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));

Byte* rooms;
size_t sizes[VARIABLES]; // of the variables that the group has come to; 0 of others
Byte *stacks_begin, *stacks_end;
pthread_t launching;

void on_fault(int number, siginfo_t* info, void*)
{
    if (!pthread_equal(pthread_self(), launching)) {
        if (number == SIGVTALRM)
            pthread_kill(launching, number);
        else
            signal(number, SIG_DFL); // not a kernel's fault: as if nobody were here
        return;
    }
    const Byte* at = static_cast<const Byte*>(info->si_addr);
    if (number == SIGVTALRM)
        snprintf(message, sizeof message, "no end after %u seconds", metal_seconds);
    else if (number == SIGILL || number == SIGTRAP)
        snprintf(message, sizeof message, "an access outside of one of a thread's own arrays");
    else if (at >= stacks_begin && at < stacks_end)
        snprintf(message, sizeof message, "a thread's own variables do not fit its stack");
    else if (rooms && at >= rooms && at < rooms + VARIABLES * ROOM)
        say_outside(threadgroup_variable(uintptr_t(at)), at);
    else if (!say_argument(at))
        snprintf(message, sizeof message, "access to %p, which is no memory of the kernel", info->si_addr);
    siglongjmp(failed, 1);
}
} // namespace

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

Byte* make_stacks(size_t count, size_t size)
{
    stacks_begin = reserve(count * size);
    stacks_end = stacks_begin + count * size;
    for (size_t i = 0; i < count; i++) open_pages(stacks_begin + i * size + PAGE, size - PAGE);
    return stacks_begin;
}

void forget_threadgroup_memory() { std::fill(sizes, sizes + VARIABLES, 0); }

void* emulated::threadgroup_memory(uint variable, size_t size)
{
    if (variable >= VARIABLES || size > ROOM / 2) fail("too much threadgroup memory");
    if (!rooms) {
        rooms = reserve(VARIABLES * ROOM);
        for (size_t i = 0; i < VARIABLES; i++) open_pages(rooms + i * ROOM, ROOM / 2);
    }
    Byte* at = rooms + variable * ROOM + ROOM / 2 - size;
    if (!sizes[variable]) memset(at, POISON, size);
    sizes[variable] = size;
    return at;
}

Extent threadgroup_variable(uintptr_t address)
{
    const size_t i = (address - uintptr_t(rooms)) / ROOM;
    return {rooms + i * ROOM + ROOM / 2 - sizes[i], sizes[i], i, "a threadgroup variable"};
}

void say_outside(const Extent& extent, const void* at)
{
    const ptrdiff_t byte = static_cast<const Byte*>(at) - extent.begin;
    snprintf(message, sizeof message, "%s of %zu bytes: access at byte %td, %s", extent.name, extent.bytes, byte,
        byte < 0 ? "before its start" : "beyond its end");
}

unsigned metal_seconds = 60;

void catch_faults(bool on)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGVTALRM};
    static struct sigaction before[5];
    static stack_t stack_before;
    static Byte stack[64 << 10]; // a thread's own stack may be what is full
    struct itimerval limit = {};
    if (on) {
        launching = pthread_self();
        stack_t own = {};
        own.ss_sp = stack;
        own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 5; i++) sigaction(signals[i], &action, &before[i]);
        limit.it_value.tv_sec = metal_seconds;
        setitimer(ITIMER_VIRTUAL, &limit, nullptr);
    } else {
        setitimer(ITIMER_VIRTUAL, &limit, nullptr);
        for (int i = 0; i < 5; i++) sigaction(signals[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
}

// Two threads of which one writes bytes that the other uses, with nothing between that orders them: an error, whatever
// order they run in here. Barriers order the memory that their flags name, those of a SIMD group for its lanes only;
// nothing orders groups. Atomics are not looked at.
#include "runtime.h"

#include <cstdio>
#include <sys/mman.h>

using emulated::mem_flags;

namespace {
constexpr uint32_t SEVERAL = ~0u; // threads, SIMD groups or groups

// Who used a byte last. Numbers of launches, groups and epochs only grow, so nothing is ever cleared.
struct Use {
    uint32_t lifetime, group;      // of the memory: a launch, or a group
    uint32_t epoch, simd_epoch; // between which barriers of the group, of the SIMD group
    uint32_t thread, simd;
    uint32_t line;
};
struct Uses {
    Use written, read;
};

struct Shadow { // the uses of each byte of an argument or a threadgroup variable
    Uses* uses = nullptr;
    size_t bytes = 0;

    Uses* of(size_t wanted)
    {
        if (wanted > bytes) {
            if (uses) munmap(uses, bytes * sizeof(Uses));
            uses = reinterpret_cast<Uses*>(reserve(wanted * sizeof(Uses)));
            open_pages(reinterpret_cast<Byte*>(uses), wanted * sizeof(Uses));
            bytes = wanted;
        }
        return uses;
    }
};

uint32_t launch_number, group_number, epochs; // the last ones given
uint32_t epoch[2];                            // of device and of threadgroup memory
uint32_t simd_epoch[2][32];

bool ordered(const Use& before, const Use& now)
{
    if (before.lifetime != now.lifetime) return true;
    if (before.group != now.group) return false;
    if (before.epoch != now.epoch || before.thread == now.thread) return true;
    return before.simd == now.simd && before.simd_epoch != now.simd_epoch;
}

[[noreturn]] void race(const Use& now, bool writes, const Use& before, bool wrote, const char* what, size_t byte)
{
    char other[48] = "other threads";
    if (before.group != now.group)
        snprintf(other, sizeof other, "another threadgroup");
    else if (before.thread != SEVERAL)
        snprintf(other, sizeof other, "thread %u", before.thread);
    emulated::fail("line %u: race: thread %u %s byte %zu of %s, which %s %s in line %u; no barrier orders them",
        now.line, now.thread, writes ? "writes" : "reads", byte, what, other, wrote ? "wrote" : "read", before.line);
}

void note_read(Use& read, const Use& now)
{
    const Use before = read;
    read = now;
    if (ordered(before, now)) return;
    read.thread = SEVERAL;
    if (before.simd != now.simd || before.group != now.group) read.simd = SEVERAL;
    if (before.group != now.group) read.group = SEVERAL;
}
} // namespace

void start_launch() { launch_number++; }

void start_group()
{
    group_number++;
    start_epoch(mem_flags::mem_device | mem_flags::mem_threadgroup);
}

void start_epoch(mem_flags flags)
{
    epochs++;
    if (int(flags) & int(mem_flags::mem_device)) epoch[0] = epochs;
    if (int(flags) & int(mem_flags::mem_threadgroup)) epoch[1] = epochs;
}

void emulated::order_lanes(mem_flags flags)
{
    const uint simd = current->index / SimdGroup::width;
    epochs++;
    if (int(flags) & int(mem_flags::mem_device)) simd_epoch[0][simd] = epochs;
    if (int(flags) & int(mem_flags::mem_threadgroup)) simd_epoch[1][simd] = epochs;
}

void emulated::shared_access(uintptr_t address, size_t size, bool in_threadgroup, bool writes, int line)
{
    static Shadow arguments[BUFFERS], variables[VARIABLES];
    const Extent extent = in_threadgroup ? threadgroup_variable(address) : written_argument(address);
    const size_t first = address - uintptr_t(extent.begin);
    if (first >= extent.bytes || first + size > extent.bytes) return; // the access itself will be caught
    Uses* uses = (in_threadgroup ? variables : arguments)[extent.number].of(extent.bytes);

    const uint32_t thread = current->index, simd = thread / SimdGroup::width;
    const Use now = {in_threadgroup ? group_number : launch_number, group_number, epoch[in_threadgroup],
        simd_epoch[in_threadgroup][simd], thread, simd, uint32_t(line)};
    for (size_t i = first; i < first + size; i++) {
        const Use &written = uses[i].written, &read = uses[i].read;
        if (!ordered(written, now)) race(now, writes, written, true, extent.name, i);
        if (!writes) {
            note_read(uses[i].read, now);
            continue;
        }
        if (!ordered(read, now)) race(now, writes, read, false, extent.name, i);
        uses[i].written = now;
    }
}

// Arguments are copied for a launch so that one end lies against unreadable pages, and copied back.
#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <unistd.h>

namespace {
constexpr size_t GAP = size_t(1) << 30;  // unreadable, on both sides
constexpr size_t LARGEST = 2 * GAP;      // that an argument can be
constexpr size_t ROOM = LARGEST + 2 * GAP;
constexpr size_t CANARY = 256; // bytes looked at beside an argument
const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Addresses for one argument: gap, memory, gap. Memory is opened as needed, from the side where the argument lies.
struct Room {
    Byte* begin;
    size_t open_at_start = 0, open_at_end = 0;

    Byte* end() const { return begin + LARGEST; }
    size_t open(size_t bytes, Guard guard)
    {
        size_t& opened = guard == GUARD_START ? open_at_start : open_at_end;
        if (bytes > opened) {
            opened = pages(bytes);
            open_pages(guard == GUARD_START ? begin : end() - opened, opened);
        }
        return opened;
    }
};

// Memory of an argument, or of several that share it.
struct Copy {
    Byte *original, *original_end;
    bool written;
    Room* room;
    Byte *opened, *opened_end;
    Byte* start;
    char name[64];

    size_t bytes() const { return size_t(original_end - original); }
    Byte* end() const { return start + bytes(); }
    Byte* front() const { return start - std::min(CANARY, size_t(start - opened)); }
    Byte* back() const { return end() + std::min(CANARY, size_t(opened_end - end())); }
};
Copy copies[BUFFERS];
size_t copy_count;

// Rooms of what is written lie apart, so that a kernel's read of what is not is known by one comparison.
struct Rooms {
    Byte* begin = reserve(BUFFERS * ROOM);
    Room rooms[BUFFERS];
    Rooms()
    {
        for (size_t i = 0; i < BUFFERS; i++) rooms[i].begin = begin + i * ROOM + GAP;
    }
};
Rooms& rooms_of(bool written)
{
    static Rooms rooms[2];
    return rooms[written];
}

void copy_in(Copy& copy, Room& room, Guard guard)
{
    const size_t remainder = uintptr_t(copy.original) % 16; // so that vectors stay as aligned as they were
    const size_t opened = room.open(copy.bytes() + 16, guard);
    copy.room = &room;
    if (guard == GUARD_START) {
        copy.opened = room.begin;
        copy.start = room.begin + remainder;
    } else {
        copy.opened = room.end() - opened;
        copy.start = room.end() - copy.bytes();
        copy.start -= (uintptr_t(copy.start) - remainder) % 16;
    }
    copy.opened_end = copy.opened + opened;
    memset(copy.front(), POISON, size_t(copy.start - copy.front()));
    memset(copy.end(), POISON, size_t(copy.back() - copy.end()));
    memcpy(copy.start, copy.original, copy.bytes());
}

Extent extent_of(const Copy& copy) { return {copy.start, copy.bytes(), size_t(&copy - copies), copy.name}; }
} // namespace

namespace emulated {
uintptr_t written_begin, written_bytes;
}

void bring_in(const Launch& launch, void** buffers)
{
    copy_count = 0;
    emulated::written_bytes = 0;
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
            copy.written = false;
            snprintf(copy.name, sizeof copy.name, "argument '%s'", buffer.name);
        }
        copy.original_end = std::max(copy.original_end, begin + buffer.bytes);
        copy.written |= buffer.written != 0;
        copy_of[by_address[k]] = copy_count - 1;
    }
    for (size_t k = 0; k < copy_count; k++)
        if (copies[k].bytes() > LARGEST / 2) {
            copy_count = 0; // nothing to bring back
            emulated::fail("%s: too large for a guarded copy", copies[k].name);
        }
    for (size_t k = 0; k < copy_count; k++)
        copy_in(copies[k], rooms_of(copies[k].written).rooms[k], Guard(launch.guard));
    for (uint32_t i = 0; i < launch.count; i++) {
        const Copy& copy = copies[copy_of[i]];
        buffers[i] = copy.start + (static_cast<Byte*>(launch.buffers[i].data) - copy.original);
    }
    emulated::written_begin = uintptr_t(rooms_of(true).begin);
    emulated::written_bytes = BUFFERS * ROOM;
}

bool bring_back()
{
    const auto is_poison = [](Byte byte) { return byte == POISON; };
    for (size_t k = 0; k < copy_count; k++) {
        const Copy& copy = copies[k];
        if (copy.written) memcpy(copy.original, copy.start, copy.bytes());
        const Byte* changed = std::find_if_not(copy.front(), copy.start, is_poison);
        if (changed == copy.start) changed = std::find_if_not(copy.end(), copy.back(), is_poison);
        if (changed == copy.back()) continue;
        say_outside(extent_of(copy), changed);
        return false;
    }
    return true;
}

bool say_argument(const void* address)
{
    for (size_t k = 0; k < copy_count; k++) {
        const size_t distance = uintptr_t(address) - uintptr_t(copies[k].room->begin - GAP);
        if (distance >= ROOM) continue;
        say_outside(extent_of(copies[k]), address);
        return true;
    }
    return false;
}

Extent written_argument(uintptr_t address)
{
    return extent_of(copies[(address - emulated::written_begin) / ROOM]);
}

// Runs a grid: groups one after the other, each with a fiber per thread. A thread runs until it must wait for others.
#include "runtime.h"

#include "fiber.h"

#include <cstring>
#include <vector>

using emulated::Place;
using emulated::SimdGroup;

namespace {
constexpr uint WIDTH = SimdGroup::width;
constexpr uint MOST_THREADS = 1024; // of a threadgroup
constexpr size_t STACK = 128 << 10;

enum class State { ready, at_simd, at_barrier, done };

struct Fiber : emulated::Thread {
    Stack stack;
    State state;
    const char* operation; // what it waits at
    int line;
    size_t path;
};
struct Lanes : SimdGroup {
    uint count, arrived;
    Fiber* fibers;  // its lanes
    Fiber* waiting; // one at a SIMD operation
    Fiber* gone;    // one that has returned
};

Fiber fibers[MOST_THREADS];
Lanes simd_groups[MOST_THREADS / WIDTH];
Stack scheduler;
Place place; // of the group that runs; a thread adds its own part
uint thread_count, returned, at_barrier;
Fiber *waiting, *gone; // one at the group's barrier, one that has returned
uint64_t random_state;
std::vector<uint> group_order, thread_order;
Byte* stacks;

Fiber& self() { return *static_cast<Fiber*>(emulated::current); }
Lanes& lanes_of(Fiber& fiber) { return *static_cast<Lanes*>(fiber.simd); }

// Tells by which calls a thread came here: the return addresses on its stack, in one number. A helper that is called
// in both branches of a condition has one line, and two paths.
__attribute__((always_inline)) inline size_t path_here()
{
    const uintptr_t lowest = uintptr_t(stacks) + self().index * STACK;
    size_t path = 0;
    for (auto frame = uintptr_t(__builtin_frame_address(0)); frame - lowest < STACK;) {
        const uintptr_t* words = reinterpret_cast<const uintptr_t*>(frame);
        path = path * 31 + words[1];
        if (words[0] <= frame) break;
        frame = words[0];
    }
    return path;
}

void wait_for_others(State state, const char* operation, int line, size_t path)
{
    Fiber& fiber = self();
    fiber.state = state;
    fiber.operation = operation;
    fiber.line = line;
    fiber.path = path;
    switch_stack(fiber.stack, scheduler);
}

[[noreturn]] void diverged(const char* operation, int line, const Fiber& here, const Fiber& other)
{
    if (other.state == State::done)
        emulated::fail("line %d: %s in divergent flow: thread %u is here, thread %u has returned", line, operation,
            here.index, other.index);
    if (other.line == line && !strcmp(other.operation, operation))
        emulated::fail("line %d: %s in divergent flow: threads %u and %u came here through different calls", line,
            operation, here.index, other.index);
    emulated::fail("line %d: %s in divergent flow: thread %u is here, thread %u at %s of line %d", line, operation,
        here.index, other.index, other.operation, other.line);
}

uint64_t random_number()
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void put_in_order(std::vector<uint>& numbers, uint count, uint32_t order)
{
    numbers.resize(count);
    for (uint i = 0; i < count; i++) numbers[i] = order == REVERSED ? count - 1 - i : i;
    if (order == RANDOM)
        for (uint i = count; i > 1; i--) std::swap(numbers[i - 1], numbers[random_number() % i]);
}

void thread_main()
{
    Fiber& fiber = self();
    Place mine = place;
    const uint3 size = place.threads_per_threadgroup;
    const uint i = fiber.index;
    mine.thread_position_in_threadgroup = uint3 {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    const uint* full = launched->group;
    mine.thread_position_in_grid = place.threadgroup_position_in_grid * uint3 {full[0], full[1], full[2]}
        + mine.thread_position_in_threadgroup;
    mine.thread_index_in_threadgroup = i;
    mine.thread_index_in_simdgroup = fiber.lane;
    mine.simdgroup_index_in_threadgroup = i / WIDTH;
    launched->body(mine, bound);

    fiber.state = State::done;
    Lanes& lanes = lanes_of(fiber);
    lanes.gone = gone = &fiber;
    for (const Fiber* other : {lanes.waiting, waiting})
        if (other) diverged(other->operation, other->line, *other, fiber);
    returned++;
    switch_stack(fiber.stack, scheduler);
    __builtin_trap(); // a thread that is done is never resumed
}

void prepare_group()
{
    returned = at_barrier = 0;
    waiting = gone = nullptr;
    forget_threadgroup_memory();
    start_group();
    for (uint i = 0; i < thread_count; i++) {
        Fiber& fiber = fibers[i];
        Lanes& lanes = simd_groups[i / WIDTH];
        if (i % WIDTH == 0) {
            lanes.count = thread_count - i < WIDTH ? thread_count - i : WIDTH;
            lanes.active = lanes.count == WIDTH ? ~0u : (1u << lanes.count) - 1;
            lanes.arrived = 0;
            lanes.fibers = &fiber;
            lanes.waiting = lanes.gone = nullptr;
        }
        fiber.index = i;
        fiber.lane = i % WIDTH;
        fiber.simd = &lanes;
        fiber.state = State::ready;
        // Tops at different distances from a page: else all stacks would share few lines of the cache.
        prepare_stack(fiber.stack, stacks + i * STACK, STACK - i % 16 * 64, thread_main);
    }
}

void run_group()
{
    while (returned < thread_count) {
        bool progress = false;
        for (uint i : thread_order) {
            if (fibers[i].state != State::ready) continue;
            progress = true;
            emulated::current = &fibers[i];
            switch_stack(scheduler, fibers[i].stack);
        }
        if (progress) continue;
        // Nobody can go on: SIMD groups wait where others, at a barrier, do not come.
        for (uint i = 0; i < thread_count && waiting; i++)
            if (fibers[i].state == State::at_simd) diverged(fibers[i].operation, fibers[i].line, fibers[i], *waiting);
        emulated::fail("no thread can go on");
    }
}

} // namespace

void run_grid(const Launch& launch)
{
    if (!stacks) stacks = make_stacks(MOST_THREADS, STACK);
    const uint3 threads = {launch.threads[0], launch.threads[1], launch.threads[2]};
    const uint3 size = {launch.group[0], launch.group[1], launch.group[2]};
    const uint3 groups = (threads + size - 1u) / size;
    random_state = launch.seed * 2 + 1;
    place.threads_per_grid = threads;
    place.threadgroups_per_grid = groups;
    place.threads_per_simdgroup = WIDTH;
    put_in_order(group_order, groups.x * groups.y * groups.z, launch.order);
    for (uint group : group_order) {
        const uint3 at = {group % groups.x, group / groups.x % groups.y, group / (groups.x * groups.y)};
        const uint3 left = threads - at * size;
        const uint3 mine = {left.x < size.x ? left.x : size.x, left.y < size.y ? left.y : size.y,
            left.z < size.z ? left.z : size.z};
        place.threadgroup_position_in_grid = at;
        place.threads_per_threadgroup = mine;
        thread_count = mine.x * mine.y * mine.z;
        place.simdgroups_per_threadgroup = (thread_count + WIDTH - 1) / WIDTH;
        prepare_group();
        put_in_order(thread_order, thread_count, launch.order);
        run_group();
    }
}

namespace emulated {
Thread* current;

bool arrive(const char* operation, int line)
{
    Fiber& fiber = self();
    Lanes& lanes = lanes_of(fiber);
    const Fiber* other = lanes.gone ? lanes.gone : lanes.waiting;
    const size_t path = path_here();
    if (other && (other->state == State::done || other->path != path)) diverged(operation, line, fiber, *other);
    if (++lanes.arrived == lanes.count) return true;
    lanes.waiting = &fiber;
    wait_for_others(State::at_simd, operation, line, path);
    return false;
}

void depart()
{
    Lanes& lanes = lanes_of(self());
    lanes.arrived = 0;
    lanes.waiting = nullptr;
    for (uint i = 0; i < lanes.count; i++) lanes.fibers[i].state = State::ready;
}

void group_barrier(mem_flags flags, int line)
{
    const char* operation = "threadgroup_barrier";
    const Fiber* other = gone ? gone : waiting;
    const size_t path = path_here();
    if (other && (other->state == State::done || other->path != path)) diverged(operation, line, self(), *other);
    if (++at_barrier < thread_count) {
        waiting = &self();
        return wait_for_others(State::at_barrier, operation, line, path);
    }
    at_barrier = 0;
    waiting = nullptr;
    start_epoch(flags);
    for (uint i = 0; i < thread_count; i++) fibers[i].state = State::ready;
}
} // namespace emulated

// What a kernel sees of the execution model: its place in the grid, barriers, threadgroup memory, arguments.
// runtime/*.cpp implements it; a launcher generated for each kernel calls it.
#pragma once
#include <emulator/types.h>

namespace emulated {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

// A thread's place, by the names of Metal's attributes.
struct Place {
    uint3 thread_position_in_grid, threads_per_grid;
    uint3 threadgroup_position_in_grid, threadgroups_per_grid;
    uint3 thread_position_in_threadgroup, threads_per_threadgroup;
    uint thread_index_in_threadgroup;
    uint thread_index_in_simdgroup, threads_per_simdgroup;
    uint simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};

// A value of Place as the type of the kernel's parameter.
template <class T, class From> T placed(From value)
{
    T result = {};
    for (int i = 0; i < Shape<T>::count; i++)
        set_component(result, i, static_cast<typename Shape<T>::Element>(component(value, i)));
    return result;
}

// The value of every lane of a SIMD group on its way into an operation and out of it.
struct alignas(16) SimdGroup {
    static constexpr uint width = 32, largest = 16; // bytes of a value
    unsigned char in[width][largest], out[width][largest];
    uint source[width]; // of a shuffle
    uint active;        // a bit per lane
};
struct Thread {
    uint index, lane; // in the threadgroup, in the SIMD group
    SimdGroup* simd;
};
extern Thread* current;

// Waits until all lanes of the SIMD group are at this operation. True for the last one, which computes for all and
// then calls depart; false for the others, after that.
__attribute__((convergent, nomerge)) bool arrive(const char* operation, int line);
void depart();
void order_lanes(mem_flags flags); // memory that they use before and after a barrier of the SIMD group
__attribute__((convergent, nomerge)) void group_barrier(mem_flags flags, int line);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Memory of a threadgroup's variable: filled with bytes that are NaN as floats when a group first comes to it.
void* threadgroup_memory(uint variable, size_t size);

// A declaration "threadgroup T x[n]" in a kernel becomes a reference to Variable<T[n], ...>::here().
template <class T, class Kernel, uint index> struct Variable {
    static threadgroup T& here()
    {
        (void)&counted; // so that it is made, when the library is loaded
        return *(threadgroup T*)threadgroup_memory(index, sizeof(T));
    }
    static const uint counted;
};
template <class T, class Kernel, uint index>
const uint Variable<T, Kernel, index>::counted = Kernel::threadgroup_bytes += (sizeof(T) + 15) / 16 * 16;

// Argument i of a kernel's buffers as the pointer or reference that its parameter is.
void check_argument(uint buffer, size_t size, size_t alignment); // of what a reference refers to
template <class T> struct Argument;
#define EMULATED_ARGUMENT(SPACE)                                                          \
    template <class T> struct Argument<SPACE T*> {                                        \
        static SPACE T* of(void* const* buffers, uint i) { return (SPACE T*)buffers[i]; } \
    };                                                                                    \
    template <class T> struct Argument<SPACE T&> {                                        \
        static SPACE T& of(void* const* buffers, uint i)                                  \
        {                                                                                 \
            check_argument(i, sizeof(T), alignof(T));                                     \
            return *(SPACE T*)buffers[i];                                                 \
        }                                                                                 \
    };
EMULATED_ARGUMENT(device)
EMULATED_ARGUMENT(constant)
#undef EMULATED_ARGUMENT
} // namespace emulated

namespace metal {
using emulated::mem_flags;
inline __attribute__((always_inline)) void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE())
{
    emulated::group_barrier(flags, line);
}
inline __attribute__((always_inline)) void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE())
{
    if (emulated::arrive("simdgroup_barrier", line)) {
        emulated::order_lanes(flags);
        emulated::depart();
    }
}
} // namespace metal

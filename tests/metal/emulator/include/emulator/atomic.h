// Atomics of 32 bits in device and threadgroup memory, relaxed as Metal's. Threads here take turns, so plain is atomic.
#pragma once
#include <emulator/types.h>

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
    T value;
};
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
typedef atomic<float> atomic_float;

#define EMULATED_UPDATE(SPACE, name, expression)                                                \
    template <class T> T atomic_##name##_explicit(volatile SPACE atomic<T>* at, T value, memory_order) \
    {                                                                                           \
        T old = at->value;                                                                      \
        at->value = expression;                                                                 \
        return old;                                                                             \
    }
#define EMULATED_ATOMICS(SPACE)                                                                          \
    template <class T> T atomic_load_explicit(const volatile SPACE atomic<T>* at, memory_order) { return at->value; } \
    template <class T> void atomic_store_explicit(volatile SPACE atomic<T>* at, T value, memory_order)   \
    {                                                                                                    \
        at->value = value;                                                                               \
    }                                                                                                    \
    EMULATED_UPDATE(SPACE, exchange, value)                                                              \
    EMULATED_UPDATE(SPACE, fetch_add, T(old + value))                                                    \
    EMULATED_UPDATE(SPACE, fetch_sub, T(old - value))                                                    \
    EMULATED_UPDATE(SPACE, fetch_max, old > value ? old : value)                                         \
    EMULATED_UPDATE(SPACE, fetch_min, old < value ? old : value)                                         \
    EMULATED_UPDATE(SPACE, fetch_or, T(old | value))                                                     \
    EMULATED_UPDATE(SPACE, fetch_and, T(old & value))
EMULATED_ATOMICS(device)
EMULATED_ATOMICS(threadgroup)
#undef EMULATED_ATOMICS
#undef EMULATED_UPDATE
} // namespace metal

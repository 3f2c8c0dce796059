// Operations of the 32 lanes of a SIMD group. Every lane of the group must be there: see arrive().
#pragma once
#include <emulator/execution.h>

#define EMULATED_LINE int line = __builtin_LINE()
#define EMULATED_INLINE template <class T> inline __attribute__((always_inline)) T

namespace emulated {
template <class T> T read(const unsigned char* from)
{
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
template <class T> void write(unsigned char* to, T value) { __builtin_memcpy(to, &value, sizeof value); }

template <class T> struct Exchanged { // types that lanes can exchange, as Metal's tables have them
    typedef typename Shape<T>::Element E;
    static constexpr bool excluded = metal::is_same<E, bool>::value || metal::is_same<E, bfloat>::value;
    static constexpr bool allowed = sizeof(E) <= 4 && !excluded;
    static_assert(allowed, "SIMD operations take float, half and integers of up to 32 bits");
    static_assert(sizeof(T) <= SimdGroup::largest, "a value too large to exchange");
};

// Every lane gives a value; the last one computes the results of all, out of line, as kernels are large with it.
template <class T, class Compute> __attribute__((noinline)) void finish(SimdGroup& group, Compute compute)
{
    compute(group);
    depart();
}
template <class T, class Compute>
__attribute__((always_inline)) inline T together(const char* operation, int line, T value, Compute compute)
{
    (void)sizeof(Exchanged<T>);
    Thread* self = current;
    SimdGroup& group = *self->simd;
    write(group.in[self->lane], value);
    if (arrive(operation, line)) finish<T>(group, compute);
    return read<T>(group.out[self->lane]);
}

inline bool is_active(const SimdGroup& group, uint lane) { return group.active >> lane & 1; }

// As hardware does it: halves are added to halves. Inactive lanes take no part.
template <class T, class Combine>
__attribute__((always_inline)) inline T reduce(const char* operation, int line, T value, Combine combine)
{
    return together(operation, line, value, [combine](SimdGroup& group) {
        T values[SimdGroup::width];
        for (uint i = 0; i < SimdGroup::width; i++) values[i] = read<T>(group.in[i]);
        const uint count = uint(__builtin_popcount(group.active)); // the first lanes
        for (uint step = SimdGroup::width / 2; step; step /= 2)
            for (uint i = 0; i < step && i + step < count; i++) values[i] = combine(values[i], values[i + step]);
        for (uint i = 0; i < SimdGroup::width; i++) write(group.out[i], values[0]);
    });
}

// `source`: the lane whose value this one gets.
template <class T>
__attribute__((always_inline)) inline T shuffle(const char* operation, int line, T value, uint source)
{
    Thread* self = current;
    self->simd->source[self->lane] = source;
    return together(operation, line, value, [operation, line](SimdGroup& group) {
        for (uint i = 0; i < SimdGroup::width; i++) {
            if (!is_active(group, i)) continue;
            uint from = group.source[i];
            if (from >= SimdGroup::width || !is_active(group, from))
                fail("line %d: %s: lane %u reads lane %u, which is not active", line, operation, i, from);
            __builtin_memcpy(group.out[i], group.in[from], SimdGroup::largest);
        }
    });
}

// Each lane gets the combination of the active lanes before it, and of its own if inclusive.
template <class T, class Combine>
__attribute__((always_inline)) inline T prefix(
    const char* operation, int line, T value, T first, bool inclusive, Combine combine)
{
    return together(operation, line, value, [=](SimdGroup& group) {
        T sum = first;
        for (uint i = 0; i < SimdGroup::width; i++) {
            if (!is_active(group, i)) continue;
            T with = combine(sum, read<T>(group.in[i]));
            write(group.out[i], inclusive ? with : sum);
            sum = with;
        }
    });
}
} // namespace emulated

namespace metal {
EMULATED_INLINE simd_sum(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_sum", line, v, [](T a, T b) { return T(a + b); });
}
EMULATED_INLINE simd_product(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_product", line, v, [](T a, T b) { return T(a * b); });
}
EMULATED_INLINE simd_max(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_max", line, v, [](T a, T b) { return max(a, b); });
}
EMULATED_INLINE simd_min(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_min", line, v, [](T a, T b) { return min(a, b); });
}
EMULATED_INLINE simd_and(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_and", line, v, [](T a, T b) { return T(a & b); });
}
EMULATED_INLINE simd_or(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_or", line, v, [](T a, T b) { return T(a | b); });
}
EMULATED_INLINE simd_xor(T v, EMULATED_LINE)
{
    return emulated::reduce("simd_xor", line, v, [](T a, T b) { return T(a ^ b); });
}
inline __attribute__((always_inline)) bool simd_any(bool v, EMULATED_LINE)
{
    return emulated::reduce("simd_any", line, uint(v), [](uint a, uint b) { return a | b; }) != 0;
}
inline __attribute__((always_inline)) bool simd_all(bool v, EMULATED_LINE)
{
    return emulated::reduce("simd_all", line, uint(v), [](uint a, uint b) { return a & b; }) != 0;
}
EMULATED_INLINE simd_prefix_exclusive_sum(T v, EMULATED_LINE)
{
    return emulated::prefix("simd_prefix_exclusive_sum", line, v, T(0), false, [](T a, T b) { return T(a + b); });
}
EMULATED_INLINE simd_prefix_inclusive_sum(T v, EMULATED_LINE)
{
    return emulated::prefix("simd_prefix_inclusive_sum", line, v, T(0), true, [](T a, T b) { return T(a + b); });
}
EMULATED_INLINE simd_shuffle(T v, ushort lane, EMULATED_LINE)
{
    return emulated::shuffle("simd_shuffle", line, v, lane);
}
EMULATED_INLINE simd_broadcast(T v, ushort lane, EMULATED_LINE)
{
    return emulated::shuffle("simd_broadcast", line, v, lane);
}
EMULATED_INLINE simd_broadcast_first(T v, EMULATED_LINE)
{
    return emulated::shuffle("simd_broadcast_first", line, v, uint(__builtin_ctz(emulated::current->simd->active)));
}
EMULATED_INLINE simd_shuffle_xor(T v, ushort mask, EMULATED_LINE)
{
    return emulated::shuffle("simd_shuffle_xor", line, v, emulated::current->lane ^ mask);
}
// Lanes without a source keep their own value.
EMULATED_INLINE simd_shuffle_down(T v, ushort delta, EMULATED_LINE)
{
    uint lane = emulated::current->lane, source = lane + delta;
    return emulated::shuffle("simd_shuffle_down", line, v, source < emulated::SimdGroup::width ? source : lane);
}
EMULATED_INLINE simd_shuffle_up(T v, ushort delta, EMULATED_LINE)
{
    uint lane = emulated::current->lane;
    return emulated::shuffle("simd_shuffle_up", line, v, lane >= delta ? lane - delta : lane);
}
} // namespace metal
#undef EMULATED_LINE
#undef EMULATED_INLINE

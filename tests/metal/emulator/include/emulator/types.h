// Address spaces, scalars, vectors with their constructors, as_type.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Address spaces are types to clang, so a pointer into the wrong one does not compile.
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

#define EMULATED_VECTORS(T)                               \
    typedef T T##2 __attribute__((ext_vector_type(2)));   \
    typedef T T##3 __attribute__((ext_vector_type(3)));   \
    typedef T T##4 __attribute__((ext_vector_type(4)));
EMULATED_VECTORS(float)
EMULATED_VECTORS(half)
EMULATED_VECTORS(bfloat)
EMULATED_VECTORS(char)
EMULATED_VECTORS(uchar)
EMULATED_VECTORS(short)
EMULATED_VECTORS(ushort)
EMULATED_VECTORS(int)
EMULATED_VECTORS(uint)
EMULATED_VECTORS(long)
EMULATED_VECTORS(ulong)
#undef EMULATED_VECTORS

namespace metal {
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <bool B, class A, class C> struct conditional { typedef A type; };
template <class A, class C> struct conditional<false, A, C> { typedef C type; };
template <bool B, class A = void> struct enable_if {};
template <class A> struct enable_if<true, A> { typedef A type; };
} // namespace metal

namespace emulated {
// Components of a type: a scalar has one.
template <class T> struct Shape {
    static constexpr int count = 1;
    typedef T Element;
    static T get(T value, int) { return value; }
    static void set(T& value, int, T element) { value = element; }
};
template <class Vector, class E, int N> struct VectorShape {
    static constexpr int count = N;
    typedef E Element;
    static E get(Vector value, int i) { return value[i]; }
    static void set(Vector& value, int i, E element) { value[i] = element; }
};
#define EMULATED_SHAPE(T)                                         \
    template <> struct Shape<T##2> : VectorShape<T##2, T, 2> {};  \
    template <> struct Shape<T##3> : VectorShape<T##3, T, 3> {};  \
    template <> struct Shape<T##4> : VectorShape<T##4, T, 4> {};
EMULATED_SHAPE(float)
EMULATED_SHAPE(half)
EMULATED_SHAPE(bfloat)
EMULATED_SHAPE(char)
EMULATED_SHAPE(uchar)
EMULATED_SHAPE(short)
EMULATED_SHAPE(ushort)
EMULATED_SHAPE(int)
EMULATED_SHAPE(uint)
EMULATED_SHAPE(long)
EMULATED_SHAPE(ulong)
#undef EMULATED_SHAPE

template <class T> typename Shape<T>::Element component(T value, int i) { return Shape<T>::get(value, i); }
template <class T> void set_component(T& value, int i, typename Shape<T>::Element element)
{
    Shape<T>::set(value, i, element);
}

template <class Vector> void fill(Vector&, int) {}
template <class Vector, class First, class... Rest> void fill(Vector& vector, int at, First first, Rest... rest)
{
    typedef typename Shape<Vector>::Element Element;
    for (int i = 0; i < Shape<First>::count; i++)
        vector[at + i] = static_cast<Element>(component(first, i));
    fill(vector, at + Shape<First>::count, rest...);
}

constexpr int total() { return 0; }
template <class... Rest> constexpr int total(int first, Rest... rest) { return first + total(rest...); }

// float4(a, b.xy, c): the components in order. float4(a): all of them a, or a's converted.
template <class Vector, class... Parts> Vector construct(Parts... parts)
{
    static_assert(total(Shape<Parts>::count...) == Shape<Vector>::count, "a vector of another number of components");
    Vector vector = {};
    fill(vector, 0, parts...);
    return vector;
}
template <class Vector, class Part> Vector construct(Part part)
{
    constexpr int count = Shape<Part>::count;
    static_assert(count == 1 || count == Shape<Vector>::count, "a vector of another number of components");
    Vector vector = {};
    for (int i = 0; i < Shape<Vector>::count; i++)
        vector[i] = static_cast<typename Shape<Vector>::Element>(component(part, count == 1 ? 0 : i));
    return vector;
}
} // namespace emulated

#define float2(...) emulated::construct<float2>(__VA_ARGS__)
#define float3(...) emulated::construct<float3>(__VA_ARGS__)
#define float4(...) emulated::construct<float4>(__VA_ARGS__)
#define half2(...) emulated::construct<half2>(__VA_ARGS__)
#define half3(...) emulated::construct<half3>(__VA_ARGS__)
#define half4(...) emulated::construct<half4>(__VA_ARGS__)
#define bfloat2(...) emulated::construct<bfloat2>(__VA_ARGS__)
#define bfloat3(...) emulated::construct<bfloat3>(__VA_ARGS__)
#define bfloat4(...) emulated::construct<bfloat4>(__VA_ARGS__)
#define char2(...) emulated::construct<char2>(__VA_ARGS__)
#define char3(...) emulated::construct<char3>(__VA_ARGS__)
#define char4(...) emulated::construct<char4>(__VA_ARGS__)
#define uchar2(...) emulated::construct<uchar2>(__VA_ARGS__)
#define uchar3(...) emulated::construct<uchar3>(__VA_ARGS__)
#define uchar4(...) emulated::construct<uchar4>(__VA_ARGS__)
#define short2(...) emulated::construct<short2>(__VA_ARGS__)
#define short3(...) emulated::construct<short3>(__VA_ARGS__)
#define short4(...) emulated::construct<short4>(__VA_ARGS__)
#define ushort2(...) emulated::construct<ushort2>(__VA_ARGS__)
#define ushort3(...) emulated::construct<ushort3>(__VA_ARGS__)
#define ushort4(...) emulated::construct<ushort4>(__VA_ARGS__)
#define int2(...) emulated::construct<int2>(__VA_ARGS__)
#define int3(...) emulated::construct<int3>(__VA_ARGS__)
#define int4(...) emulated::construct<int4>(__VA_ARGS__)
#define uint2(...) emulated::construct<uint2>(__VA_ARGS__)
#define uint3(...) emulated::construct<uint3>(__VA_ARGS__)
#define uint4(...) emulated::construct<uint4>(__VA_ARGS__)
#define long2(...) emulated::construct<long2>(__VA_ARGS__)
#define long3(...) emulated::construct<long3>(__VA_ARGS__)
#define long4(...) emulated::construct<long4>(__VA_ARGS__)
#define ulong2(...) emulated::construct<ulong2>(__VA_ARGS__)
#define ulong3(...) emulated::construct<ulong3>(__VA_ARGS__)
#define ulong4(...) emulated::construct<ulong4>(__VA_ARGS__)

template <class To, class From> To as_type(From value)
{
    static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
    return __builtin_bit_cast(To, value);
}

// Functions of numbers, component by component. Metal's overloads and no others: exp of an int does not compile.
#pragma once
#include <emulator/types.h>

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__
#define HUGE_VALF __builtin_huge_valf()
#define M_PI_F 3.14159265358979323846f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f

namespace metal {
// For every floating-point vector of a scalar function; half is computed as float and rounded.
#define EMULATED_EACH(T, N, name)                         \
    inline T##N name(T##N x)                              \
    {                                                     \
        for (int i = 0; i < N; i++) x[i] = name(x[i]);    \
        return x;                                         \
    }
#define EMULATED_FUNCTION(name, expression)                                          \
    inline float name(float x) { return expression; }                                \
    inline half name(half h) { float x = h; return static_cast<half>(expression); }  \
    EMULATED_EACH(float, 2, name)                                                    \
    EMULATED_EACH(float, 3, name)                                                    \
    EMULATED_EACH(float, 4, name)                                                    \
    EMULATED_EACH(half, 2, name)                                                     \
    EMULATED_EACH(half, 3, name)                                                     \
    EMULATED_EACH(half, 4, name)

EMULATED_FUNCTION(exp, __builtin_expf(x))
EMULATED_FUNCTION(exp2, __builtin_exp2f(x))
EMULATED_FUNCTION(log, __builtin_logf(x))
EMULATED_FUNCTION(log2, __builtin_log2f(x))
EMULATED_FUNCTION(sqrt, __builtin_sqrtf(x))
EMULATED_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))
EMULATED_FUNCTION(sin, __builtin_sinf(x))
EMULATED_FUNCTION(cos, __builtin_cosf(x))
EMULATED_FUNCTION(tanh, __builtin_tanhf(x))
EMULATED_FUNCTION(floor, __builtin_floorf(x))
EMULATED_FUNCTION(ceil, __builtin_ceilf(x))
EMULATED_FUNCTION(round, __builtin_roundf(x))
EMULATED_FUNCTION(rint, __builtin_rintf(x))
EMULATED_FUNCTION(trunc, __builtin_truncf(x))
EMULATED_FUNCTION(fabs, __builtin_fabsf(x))
EMULATED_FUNCTION(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)
#undef EMULATED_FUNCTION
#undef EMULATED_EACH

// Of several arguments: scalars, and vectors of one shape.
#define EMULATED_EACH(T, N)                                                                \
    inline T##N fma(T##N a, T##N b, T##N c)                                                \
    {                                                                                      \
        for (int i = 0; i < N; i++) a[i] = fma(a[i], b[i], c[i]);                          \
        return a;                                                                          \
    }                                                                                      \
    inline T##N pow(T##N a, T##N b)                                                        \
    {                                                                                      \
        for (int i = 0; i < N; i++) a[i] = pow(a[i], b[i]);                                \
        return a;                                                                          \
    }                                                                                      \
    inline T dot(T##N a, T##N b)                                                           \
    {                                                                                      \
        T sum = 0;                                                                         \
        for (int i = 0; i < N; i++) sum += a[i] * b[i];                                    \
        return sum;                                                                        \
    }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return static_cast<half>(__builtin_fmaf(a, b, c)); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline half pow(half a, half b) { return static_cast<half>(__builtin_powf(a, b)); }
EMULATED_EACH(float, 2)
EMULATED_EACH(float, 3)
EMULATED_EACH(float, 4)
EMULATED_EACH(half, 2)
EMULATED_EACH(half, 3)
EMULATED_EACH(half, 4)
#undef EMULATED_EACH

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }

// Both arguments of one type: max(uint, int) is ambiguous in Metal too.
template <class T> T max(T a, T b)
{
    for (int i = 0; i < emulated::Shape<T>::count; i++)
        if (emulated::component(a, i) < emulated::component(b, i))
            emulated::set_component(a, i, emulated::component(b, i));
    return a;
}
template <class T> T min(T a, T b)
{
    for (int i = 0; i < emulated::Shape<T>::count; i++)
        if (emulated::component(b, i) < emulated::component(a, i))
            emulated::set_component(a, i, emulated::component(b, i));
    return a;
}
template <class T> T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> T select(T otherwise, T chosen, bool condition) { return condition ? chosen : otherwise; }
template <class T> T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> T saturate(T x) { return clamp(x, T(0), T(1)); }

inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32u; }
inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }

namespace precise {
using metal::cos;
using metal::exp;
using metal::exp2;
using metal::log;
using metal::log2;
using metal::pow;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
inline float divide(float a, float b) { return a / b; }
} // namespace precise
namespace fast {
using namespace precise;
} // namespace fast

template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
    static constexpr float max() { return __FLT_MAX__; }
    static constexpr float lowest() { return -__FLT_MAX__; }
    static constexpr float infinity() { return __builtin_inff(); }
};
template <> struct numeric_limits<int> {
    static constexpr int max() { return 0x7fffffff; }
    static constexpr int min() { return -0x7fffffff - 1; }
    static constexpr int lowest() { return min(); }
};
template <> struct numeric_limits<uint> {
    static constexpr uint max() { return 0xffffffffu; }
    static constexpr uint min() { return 0u; }
    static constexpr uint lowest() { return 0u; }
};
} // namespace metal

// What clang calls for a bfloat, and older libraries of compilers do not have.
#include <cstdint>
#include <cstring>

extern "C" __bf16 __truncsfbf2(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint16_t upper = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    __bf16 result;
    memcpy(&result, &upper, sizeof result);
    return result;
}

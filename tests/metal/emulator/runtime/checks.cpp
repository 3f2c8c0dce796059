// Undefined behaviour that clang's sanitizers find in a kernel: an error that names the line.
// These are the functions that -fsanitize calls; the first thing that each is given begins with a place in the source.
#include "runtime.h"

namespace {
struct Site {
    const char* file;
    uint32_t line, column;
};
} // namespace

#define CHECK(name, what)                                                                          \
    extern "C" void __ubsan_handle_##name##_abort(const Site* site)                                \
    {                                                                                              \
        emulated::fail("line %u: undefined behaviour: %s", site->line, what);                      \
    }
CHECK(add_overflow, "a signed sum overflows")
CHECK(sub_overflow, "a signed difference overflows")
CHECK(mul_overflow, "a signed product overflows")
CHECK(negate_overflow, "a negation overflows")
CHECK(divrem_overflow, "division by zero or overflow of a division")
CHECK(shift_out_of_bounds, "a shift by a negative number or by all bits and more")
CHECK(out_of_bounds, "an index outside of its array")
CHECK(float_cast_overflow, "a float does not fit the integer that it becomes")
CHECK(load_invalid_value, "a bool that is neither true nor false")
CHECK(vla_bound_not_positive, "an array of no or negative size")

extern "C" void __ubsan_handle_builtin_unreachable(const Site* site)
{
    emulated::fail("line %u: undefined behaviour: what cannot be reached is reached", site->line);
}
extern "C" void __ubsan_handle_missing_return(const Site* site)
{
    emulated::fail("line %u: undefined behaviour: a function ends without a value", site->line);
}

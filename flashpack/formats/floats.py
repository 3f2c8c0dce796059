"""The small floats of the format as tables: code -> float32, exactly (SPEC.md section 6)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _table(sign: int, exponents: int, fractions: int, bias: int) -> NDArray[np.float32]:
    """All codes of a float with these numbers of bits, without infinities or NaN; 0 is the subnormal exponent."""
    codes = np.arange(2 ** (sign + exponents + fractions))
    fraction = codes % 2**fractions
    exponent = codes >> fractions & 2**exponents - 1
    whole = np.where(exponent > 0, 2**fractions + fraction, fraction)
    values: NDArray[np.float64] = np.ldexp(whole.astype(np.float64), np.maximum(exponent, 1) - bias - fractions)
    values = np.where(codes >> (exponents + fractions) & 1, -values, values)
    return values.astype(np.float32)


E2M1 = _table(1, 2, 1, 1)
"""[16]: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and these negative from code 8 on."""

E4M3 = _table(1, 4, 3, 7)
"""[256]: up to 448, no infinities; codes 0x7f and 0xff are NaN."""
E4M3[[0x7F, 0xFF]] = np.nan

E8M0 = np.append(np.ldexp(np.ones(255), np.arange(255) - 127), np.nan).astype(np.float32)
"""[256]: 2**(code - 127); code 255 is NaN."""

for _shared in (E2M1, E4M3, E8M0):
    _shared.flags.writeable = False

"""Before all tests: one line, and not each of Metal's tests, says that their compiler is missing."""

import sys

from tests.metal.emulator.build import clang

try:
    clang()
except RuntimeError as e:
    sys.exit(str(e))

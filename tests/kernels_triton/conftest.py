"""Run every kernel of these tests in Triton's interpreter.

Triton reads the variable when a kernel is decorated, so it is set before any test imports one, and these tests are a
process of their own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

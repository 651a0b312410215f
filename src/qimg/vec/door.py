"""The one door to numpy: ``from qimg.vec.door import np``, inside functions only (its import is slow)."""

from __future__ import annotations

import os

# qimg does no linear algebra. One BLAS thread instead of one a core saves their start and, under an
# address-space limit, the reserved memory that would make the import fail.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

__all__ = ["np"]

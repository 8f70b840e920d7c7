"""How functions are compiled: without the GIL, so that threads run them at once."""

from collections.abc import Callable
from typing import TypeVar

import numba

_F = TypeVar("_F", bound=Callable)

compiled = numba.njit(nogil=True, error_model="numpy")
"""For functions that compiled ones call."""


def entry(function: _F) -> _F:
    """For functions that are called from Python: kept on disk, all they call included.

    Code is kept beside the source or in the user's cache folder, and made anew in every process
    where neither can be written to.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder
        return numba.njit(**options)(function)

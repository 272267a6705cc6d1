"""What one release of Triton's language has and another has not, for tests that hold on every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import triton
from triton.compiler.errors import CompilationError

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


@contextmanager
def known_if(known: bool, otherwise: str) -> Iterator[None]:
    """The body compiles and holds where `known`; elsewhere Triton's frontend must refuse it in the words `otherwise`.

    So a rule about releases is checked on both sides, and a release that brings a feature back fails here.
    """
    if known:
        yield
        return
    with pytest.raises(CompilationError, match=otherwise):
        yield

"""For your own tests: prove a kernel against a layer, and that no fault of a seed reaches a model.

```python
from esper_triton.testing import assert_equivalent, assert_never_breaks

def test_my_kernel(urza, artifact):
    assert_equivalent(torch.nn.LayerNorm(64), artifact, urza=urza)
```

`blueprints`, `layers`, `inputs` and `artifacts` are hypothesis strategies; they ask for the package hypothesis, the
assertions do not. Loaded on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "FAULTS": "faults",
    "artifacts": "strategies",
    "assert_equivalent": "equivalence",
    "assert_never_breaks": "faults",
    "blueprints": "graphs",
    "inputs": "strategies",
    "layers": "strategies",
    "respelled": "graphs",
}

__all__ = [
    "FAULTS",
    "artifacts",
    "assert_equivalent",
    "assert_never_breaks",
    "blueprints",
    "inputs",
    "layers",
    "respelled",
]

if TYPE_CHECKING:
    from esper_triton.testing.equivalence import assert_equivalent
    from esper_triton.testing.faults import FAULTS, assert_never_breaks
    from esper_triton.testing.graphs import blueprints, respelled
    from esper_triton.testing.strategies import artifacts, inputs, layers


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esper_triton.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"esper_triton.testing.{_HOME[name]}"), name)

"""The backend's errors say one line and survive what Triton does with them."""

from __future__ import annotations

import copy
import pickle

import pytest

from esper_triton.cpu.errors import CPUBackendError, LaunchError, MLIRSyntaxError, ObjectRefused, UnsupportedOperation


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize(
    "error",
    [
        UnsupportedOperation("tt.histogram", kernel="k", file="file.py", line=12, reason="no bins yet"),
        UnsupportedOperation("tt.histogram"),
        LaunchError("grid"),
        ObjectRefused("symbol"),
        MLIRSyntaxError("text"),
    ],
)
def test_an_error_survives_copying_and_pickling(error, clone):
    twin = clone(error)
    assert type(twin) is type(error)
    assert isinstance(twin, CPUBackendError)
    assert isinstance(twin, RuntimeError)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({}, "tt.histogram is not supported by the CPU backend yet"),
        (
            {"kernel": "k", "file": "file.py", "line": 12, "reason": "no bins"},
            "tt.histogram is not supported by the CPU backend yet (kernel 'k', file.py:12): no bins",
        ),
        ({"kernel": "k"}, "tt.histogram is not supported by the CPU backend yet (kernel 'k')"),
        ({"file": "file.py"}, "tt.histogram is not supported by the CPU backend yet (file.py)"),
    ],
)
def test_an_unsupported_operation_is_named_with_its_kernel_and_line(details, message):
    error = UnsupportedOperation("tt.histogram", **details)
    assert str(error) == message
    assert error.operation == "tt.histogram"
    assert (error.kernel, error.line) == (details.get("kernel"), details.get("line"))

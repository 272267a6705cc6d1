"""A graph built in Python is the one that its text says, and what does not fit raises at its own line."""

from __future__ import annotations

import pytest

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.building import GraphBuilder
from esper_triton.contracts.dims import Dim
from esper_triton.contracts.errors import BlueprintError

TEXT = """
name = "adapter"
input = "xh"
graph = '''
z = linear(h, w, b)
m = -z > 0.5
y = where(m, z, 2 / z) * 3 - leaky_relu(z, 0.25)
k = h + linear(y, u) + linear(x, v, transposed=True)
'''
[dims]
d = {}
d_in = { max = 128 }
r = { min = 2, max = 256 }
[parameters]
w = { shape = ["r", "d"], init = "kaiming_uniform" }
b = { shape = ["r"] }
u = { shape = ["d", "r"] }
v = { shape = ["d_in", "d"] }
"""


def builder() -> GraphBuilder:
    return Blueprint.build("adapter", input="h", dims={"d": {}, "r": (1, 256)})


def test_a_built_graph_equals_the_written_one():
    b = Blueprint.build("adapter", input="xh", dims={"d": {}, "d_in": Dim(max=128), "r": (2, 256)}, description="built")
    w = b.parameter("w", ("r", "d"), init="kaiming_uniform")
    z = b.linear(b.h, w, b.parameter("b", ("r",)))
    y = b.where(-z > 0.5, z, 2 / z) * 3 - b.leaky_relu(z, 0.25)
    both = b.h + b.linear(y, b.parameter("u", ("d", "r")))
    built = b.output(both + b.linear(b.x, b.parameter("v", ("d_in", "d")), transposed=True))
    assert built.id == Blueprint.from_text(TEXT).id
    assert built.description == "built"


def test_names_may_be_given():
    b = Blueprint.build("a", input="h", dims={"d": {}})
    assert b.output(b.relu(b.h, name="activated")).ops[0].name == "activated"


def test_what_does_not_fit_raises_where_it_is_asked_for_and_leaves_the_graph_as_it_was():
    b = builder()
    w = b.parameter("w", ("r", "d"))
    with pytest.raises(BlueprintError, match=r"weight w is \[r, d\], expected \[n, r\]"):
        b.linear(b.linear(b.h, w), w)
    with pytest.raises(BlueprintError, match=r"unknown attribute 'slop'"):
        b.leaky_relu(b.h, slop=3)
    with pytest.raises(BlueprintError, match="input is 'h', which has no 'x'"):
        b.h + b.x
    with pytest.raises(AttributeError, match="no operation 'gelo'; did you mean 'gelu'"):
        b.gelo(b.h)
    with pytest.raises(BlueprintError, match="parameter name 'w' is taken"):
        b.parameter("w", ("d",))
    with pytest.raises(BlueprintError, match="parameter 'q' has shape"):
        b.parameter("q", ("s",))
    with pytest.raises(BlueprintError, match="unknown init 'orthogonal'"):
        b.parameter("q", ("d",), init="orthogonal")
    with pytest.raises(BlueprintError, match="of another blueprint"):
        b.h + builder().h
    with pytest.raises(BlueprintError, match="expected a value or a number"):
        b.h + "h"
    with pytest.raises(BlueprintError, match="no truth value"):
        bool(b.h > 0)
    assert [op.op for op in b.ops] == ["linear", "gt"]


def test_what_only_the_whole_shows_is_told_at_the_output():
    b = builder()
    b.relu(b.h)
    b.parameter("w", ("r", "d"))
    with pytest.raises(BlueprintError, match=r"nothing uses it.*parameter 'w' is not used"):
        b.output(b.h)


def test_a_wrong_frame_is_refused_at_once():
    with pytest.raises(BlueprintError, match="unknown input 'hx'"):
        Blueprint.build("a", input="hx", dims={"d": {}})  # type: ignore[arg-type]
    with pytest.raises(BlueprintError, match="feature_dim 'd' is not a dim"):
        Blueprint.build("a", input="h", dims={"e": {}})
    with pytest.raises(BlueprintError, match="unknown field 'descriptio'"):
        Blueprint.build("a", input="h", dims={"d": {}}, descriptio="")
    with pytest.raises(BlueprintError, match="dim 'd' has limits"):
        Blueprint.build("a", input="h", dims={"d": (4, 2)})


def test_a_value_shows_its_type():
    b = builder()
    assert repr(b.pool_mean(b.h)) == "Value('v0', [batch; d])"

"""A graph is checked before anything is compiled: every fault at once, with the op and the shapes found and
expected."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.dims import Dim, assignments_within
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.expressions import Expression
from esper_triton.contracts.graph import ValueType, check, infer, layout_of
from esper_triton.testing.graphs import blueprints

HEAD = 'name = "a"\ninput = "{input}"\n'
REST = """
[dims]
d = {}
r = { max = 256 }
heads = { max = 16 }
[parameters]
w = { shape = ["r", "d"] }
u = { shape = ["d", "r"] }
b = { shape = ["r"] }
"""
BOTTLENECK = "z = gelu(linear(h, w, b))\nk = h + linear(z, u)\n"


def graph(text: str, rest: str = REST, input: str = "h") -> Blueprint:
    head = HEAD.replace("{input}", input)
    return Blueprint.from_text(f'{head}graph = """\n{text}"""\n{rest.replace("heads = { max = 16 }", "")}')


def with_heads(text: str, rest: str = REST) -> Blueprint:
    return Blueprint.from_text(f'{HEAD.replace("{input}", "h")}graph = """\n{text}"""\n{rest}')


def faults_of(text: str, rest: str = REST, input: str = "h") -> str:
    with pytest.raises(BlueprintError) as caught:
        graph(text, rest, input)
    return str(caught.value)


def test_types_are_worked_out_for_numbers():
    types = infer(graph(BOTTLENECK), {"d": 8, "r": 4})
    assert types["h"] == ValueType("rows", (8,))
    assert types["w"] == ValueType(None, (4, 8))
    assert types["z"] == ValueType("rows", (4,))
    assert types["k"] == ValueType("rows", (8,))


def test_pooling_leaves_one_value_for_each_batch_item_and_it_meets_rows_again():
    blueprint = graph("p = pool_mean(h)\nm = p > 0\nk = where(m, h, linear(linear(p, w, b), u))\n")
    types = infer(blueprint, {"d": 8, "r": 4})
    assert types["p"] == ValueType("batch", (8,))
    assert types["m"] == ValueType("batch", (8,), mask=True)
    assert types["k"] == ValueType("rows", (8,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = h + linear(h, w, b)\n", "do not broadcast: d against r"),
        ("k = linear(linear(h, w, b), w) + linear(b, u)\n", r"weight w is \[r, d\], expected \[n, r\]"),
        ("u2 = u\nk = linear(h, w, b)\n", r"u2 = identity\(u\): nothing uses it"),
        ("k = linear(h, w, b)\n", r"output 'k' is \[rows; r\], expected \[rows; d\]"),
        ("k = pool_mean(h)\n", r"output 'k' is \[batch; d\], expected \[rows; d\]"),
        ("k = h > 0\n", "output 'k' is mask"),
        ("k = h + (h > 0)\n", "is a mask .* which only 'where' takes"),
        ("k = where(h, h, 0)\n", r"mask h is \[rows; d\], expected a mask"),
        ("k = h + z\nz = relu(k)\n", "'z' comes only later, so it is a forward reference or part of a cycle"),
        ("k = h + k\n", "'k' is used in its own definition"),
        ("k = h + ww\n", "unknown value 'ww'; did you mean 'w'"),
        ("h = h + 1\n", "the name is reserved"),
        ("grad_h = h + 1\n", "the name is reserved"),
        ("_k = h + 1\n", "a value's name is a letter and up to 62"),
        ("größe = h + 1\n", "a value's name is a letter and up to 62"),
        ("w = h + 1\n", "the name is taken"),
        ("z = h + 1\nz = z + 1\n", "the name is taken"),
        ("k = gelu(h, approximate='tan')\n", "attribute approximate is 'tan'; did you mean 'tanh'"),
        ("k = leaky_relu(h, slop=0.1)\n", "unknown attribute 'slop'; did you mean 'slope'"),
        ("k = relu(h, slope=0.1)\n", "unknown attribute 'slope'; it takes none"),
        ("k = dropout(h)\n", "attribute 'p' is missing: dropout"),
        ("k = dropout(h, 1.0)\n", r"attribute p is 1.0, expected a number in \[0, 1\)"),
        ("k = clamp(h)\n", "has neither min nor max"),
        ("k = clamp(h, min=2, max=1)\n", "min 2 is above max 1"),
        ("k = add(h)\n", "1 inputs, expected 2"),
        ("k = layernorm(h, b)\n", r"weight b is \[r\], expected \[d\]"),
        ("k = slice(h, start=4, stop=4) + h\n", "slices 4 to 4"),
        ("k = slice(h, stop=q)\n", "stop: unknown symbol 'q'"),
        ("k = reshape(h, shape=[d, 2])\n", "does not have the elements"),
        ("k = transpose(h)\n", "expected at least 2 inner dims"),
        ("k = matmul(h, linear(h, w, b))\n", "expected at least 2 inner dims"),
        ("k = matmul(h, w)\n", "with one k: d against r"),
        ("k = attention(pool_mean(h), h, h, heads=1)\n", r"q k_1 is \[batch; d\], expected one value for each row"),
        ("k = attention(h, h, h, heads=0)\n", "heads is 0, expected at least 1"),
        ("k = gather(u, h)\n", "expected an activation whose last inner dim is 1"),
        ("k = conv1d(h, u) + h\n", r"weight u is \[d, r\], expected \[n, d, kernel\]"),
        ("k = depthwise_conv1d(h, w)\n", r"weight w is \[r, d\], expected \[d, kernel\]"),
        ("k = concat(h, transpose(u @ w))\n", "differ in more than the last inner dim"),
    ],
)
def test_a_fault_names_the_op_what_was_found_and_what_was_expected(text: str, message: str):
    found = faults_of(text)
    assert re.search(message, found), found


def test_every_fault_is_told_at_once():
    found = faults_of(
        "z = linear(h, u, b)\ny = gelu(q)\nk = h + linear(h, w)\n",
        REST.replace('b = { shape = ["r"] }', 'b = { shape = ["s"] }\nunused = { shape = ["d"] }\nq9 = { shape = [] }'),
        input="xh",
    )
    for part in ("unknown symbol 's'", "unknown value 'q'", "do not broadcast", "parameter 'unused'", "input 'x'"):
        assert part in found, (part, found)


def test_a_parameter_is_not_named_as_a_keyword_since_its_graph_could_not_be_written():
    assert "parameter name 'in' is a keyword" in faults_of(
        "k = h\n", '[dims]\nd = {}\n[parameters]\nin = { shape = ["d"] }\n'
    )


def test_a_dim_that_nothing_uses_and_a_dim_with_a_reserved_name_are_faults():
    found = faults_of("k = h\n", "[dims]\nd = {}\nr = {}\nlength = {}\n")
    assert "dim 'r' is not used" in found
    assert "dim name 'length' is reserved" in found


def test_an_unknown_operation_in_the_ops_of_json_is_told_with_the_nearest():
    with pytest.raises(BlueprintError, match="unknown operation 'gelo'; did you mean 'gelu'"):
        Blueprint.from_text('{"name":"a","input":"h","dims":{"d":{}},"ops":[{"name":"k","op":"gelo","inputs":["h"]}]}')


def test_one_graph_has_one_layout():
    rest = '[dims]\nd = {}\n[parameters]\na = { shape = ["d", "3"] }\nc = { shape = ["d", "3", "3"] }\n'
    assert "one graph has one layout" in faults_of("k = depthwise_conv1d(h, a) + depthwise_conv2d(h, c)\n", rest)


def test_the_layout_follows_from_the_ops():
    assert layout_of(graph(BOTTLENECK).ops) == "rows"
    assert layout_of(graph(BOTTLENECK + "y = k + pool_mean(h)\n").ops) == "sequence"
    rest = '[dims]\nd = {}\n[parameters]\nc = { shape = ["d", "d", "3", "3"] }\n'
    assert layout_of(graph("k = conv3x3(h, c) + pool_mean(h)\n", rest).ops) == "image"


def test_a_kernel_that_is_even_is_refused():
    rest = '[dims]\nd = {}\n[parameters]\na = { shape = ["d", "4"] }\n'
    assert "expected an odd kernel, found 4" in faults_of("k = depthwise_conv1d(h, a)\n", rest)


def test_dims_over_their_limits_are_refused_all_at_once():
    blueprint = graph(BOTTLENECK)
    assert check(blueprint, {"d": 8, "r": 257, "q": 1}) == [
        "unknown dim 'q'; known: 'd', 'r'",
        "dim 'r' is 257, expected 1 to 256",
    ]
    assert check(blueprint, {"d": True}) == [
        "dim 'd' is True, an integer is expected",
        "dim 'r' is missing; it takes 1 to 256",
    ]
    with pytest.raises(BlueprintError, match="blueprint 'a': dim 'r' is missing"):
        infer(blueprint, {"d": 4})


def test_a_dim_that_is_not_given_has_its_default():
    blueprint = graph(BOTTLENECK, REST.replace("r = { max = 256 }", "r = { max = 256, default = 3 }"))
    assert infer(blueprint, {"d": 8})["z"] == ValueType("rows", (3,))
    assert infer(blueprint, {"d": 8, "r": 5})["z"] == ValueType("rows", (5,))


def test_limits_of_any_size_are_stood_in_for_at_once():
    dims = {"d": Dim(min=10**30, max=10**40), "r": Dim(min=10**18, max=10**18)}
    assert all(value["r"] == 10**18 and value["d"] >= 10**30 for value in assignments_within(dims, []))


def test_what_only_some_dims_fulfil_is_checked_with_them():
    sliced = graph("k = concat(slice(h, stop=r), slice(h, start=r, stop=d)) + linear(linear(h, w, b), u)\n")
    assert check(sliced, {"d": 8, "r": 3}) == []
    assert "expected 0 <= start < stop <= the width" in check(sliced, {"d": 8, "r": 9})[0]
    rest = "[dims]\nd = {}\nheads = {}\n"
    attention = with_heads("k = attention(h, h, h, heads=heads)\n", rest)
    assert check(attention, {"d": 8, "heads": 4}) == []
    assert "q h is [rows; d], expected a multiple of heads = heads" in check(attention, {"d": 8, "heads": 3})[0]


def test_a_division_in_a_shape_is_taken_as_exact():
    rest = "[dims]\nd = {}\nheads = { max = 64 }\n"
    text = "q = reshape(h, shape=[heads, d // heads])\nk = reshape(q @ transpose(q) @ q, shape=[d])\n"
    blueprint = with_heads(text, rest)
    assert infer(blueprint, {"d": 12, "heads": 4})["q"] == ValueType("rows", (4, 3))
    assert "does not have the elements" in check(blueprint, {"d": 12, "heads": 5})[0]


def test_x_is_as_wide_as_h_without_a_dim_of_its_own():
    blueprint = graph("k = h + x\n", "[dims]\nd = {}\n", input="xh")
    assert infer(blueprint, {"d": 4})["x"] == ValueType("rows", (4,))
    assert "do not broadcast" in faults_of("k = h + x\n", "[dims]\nd = {}\nd_in = {}\n", input="xh")


@pytest.mark.parametrize(
    ("text", "affine"),
    [
        ("k = h + linear(linear(h, w, b), u)\n", True),
        ("k = h * sigmoid(linear(b, u)) - 2 * (-h) / 3 + linear(linear(h, w), u)\n", True),
        ("k = concat(slice(linear(h, w, b), stop=1), slice(h, start=1, stop=d)) + linear(b, u)\n", True),
        ("k = h * h + linear(linear(h, w, b), u)\n", False),
        (BOTTLENECK, False),
        ("k = 1 / h + linear(linear(h, w, b), u)\n", False),
        ("k = pool_mean(h) + h + linear(linear(h, w, b), u)\n", False),
        ("k = dropout(h, 0.5) + linear(linear(h, w, b), u)\n", False),
        ("k = where(h > 0, h, 0) + linear(linear(h, w, b), u)\n", False),
        ("k = mean(h) * linear(b, u) + h + linear(linear(h, w), u)\n", True),
    ],
)
def test_whether_k_is_affine_follows_from_the_graph(text: str, affine: bool):
    assert graph(text).affine is affine


def test_affine_is_not_written_where_it_follows():
    assert "affine is True, but it follows" in faults_of(BOTTLENECK, "affine = true\n" + REST)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_holds_for_all_dims_holds_for_some(data: st.DataObject):
    blueprint = data.draw(blueprints())
    dims = {name: data.draw(st.integers(1, 64)) for name in blueprint.dims}
    assert check(blueprint) == []
    types = infer(blueprint, dims)
    assert types[blueprint.output] == ValueType("rows", (dims["d"],))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 70000)), min_size=1, max_size=5))
def test_stand_ins_for_dims_lie_within_their_limits(limits: list[tuple[int, int]]):
    dims = {f"n{i}": Dim(min=low, max=low + more) for i, (low, more) in enumerate(limits)}
    division = [Expression("n0 // 3")]
    for assignment in assignments_within(dims, division):
        assert assignment.keys() == dims.keys()
        assert all(dims[name].min <= value <= dims[name].max for name, value in assignment.items())
        if dims["n0"].max // 3 * 3 >= dims["n0"].min:
            assert assignment["n0"] % 3 == 0


def test_stand_ins_are_different_odd_primes_where_that_is_possible():
    assert assignments_within({"d": Dim(), "r": Dim()}, []) == [
        {"d": 3, "r": 5},
        {"r": 101, "d": 103},
        {"d": 1009, "r": 1013},
    ]

"""Designs that are equal have one id, however they are spelled; designs that differ have two."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.canonical import canonical_extent
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.expressions import evaluate
from esper_triton.testing.graphs import UNARY, blueprints, respelled

COMMON = """
name = "a"
input = "h"
[dims]
d = {}
[parameters]
w = { shape = ["d", "d"] }
b = { shape = ["d"] }
"""


def graph(text: str, rest: str = COMMON) -> Blueprint:
    return Blueprint.from_text(f'graph = """\n{text}"""\n' + rest)


slow = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@slow
@given(st.data())
def test_another_spelling_has_the_same_id(data: st.DataObject):
    blueprint = data.draw(blueprints())
    other = data.draw(respelled(blueprint))
    assert other.id == blueprint.id
    assert other.canonical().ops == blueprint.canonical().ops


@slow
@given(blueprints())
def test_the_canonical_form_is_its_own(blueprint: Blueprint):
    canonical = blueprint.canonical()
    again = canonical.canonical()
    assert (again.ops, again.output, again.id) == (canonical.ops, canonical.output, blueprint.id)
    assert Blueprint.from_text(canonical.to_toml()) == canonical


@slow
@given(st.data())
def test_the_text_that_is_kept_is_one_for_all_spellings_and_gives_the_design_back(data: st.DataObject):
    blueprint = data.draw(blueprints())
    other = data.draw(respelled(blueprint)).model_copy(
        update={"name": blueprint.name, "description": blueprint.description}
    )
    text = blueprint.canonical_bytes()
    assert other.canonical_bytes() == text
    again = Blueprint.from_canonical_bytes(text)
    assert (again.id, again.name, again.dims) == (blueprint.id, blueprint.name, blueprint.dims)
    assert (again.layout, again.affine) == (blueprint.layout, blueprint.affine)
    assert again.canonical_bytes() == text


def test_the_text_of_a_hand_written_kernel_is_kept_without_its_source(adapter_path):
    blueprint = Blueprint.load(adapter_path)
    text = blueprint.canonical_bytes()
    assert b"triton" not in text
    again = Blueprint.from_canonical_bytes(text, source_text=blueprint.source_text)
    assert again == blueprint.model_copy(update={"path": None})
    assert again.id == blueprint.id
    assert Blueprint.from_canonical_bytes(text, source_text=blueprint.source_text + "\n").id != blueprint.id


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object but list"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"name": "a", "input": "h", "dims": {"d": {}}}', "has neither a graph nor a source"),
        (b'{"source_text": "import os"}', "'source_text' is filled in by the loader"),
        (b'{"path": "/etc/passwd"}', "'path' is filled in by the loader"),
        (b" " * ((1 << 20) + 1), "1048577 bytes; at most 1048576 are allowed"),
    ],
)
def test_what_is_no_blueprint_is_said_to_be_none(content: bytes, fault: str):
    with pytest.raises(BlueprintError, match=re.escape(fault)):
        Blueprint.from_canonical_bytes(content)


@slow
@given(st.data())
def test_another_operation_in_one_place_is_another_id(data: st.DataObject):
    blueprint = data.draw(blueprints())
    places = [i for i, op in enumerate(blueprint.ops) if op.op in UNARY and not op.attrs]
    assume(places)
    place = data.draw(st.sampled_from(places))
    op = data.draw(st.sampled_from([name for name in UNARY if name != blueprint.ops[place].op]))
    ops = list(blueprint.ops)
    ops[place] = ops[place].model_copy(update={"op": op})
    assert blueprint.model_copy(update={"ops": tuple(ops)}).id != blueprint.id


@slow
@given(st.data())
def test_another_attribute_or_number_in_one_place_is_another_id(data: st.DataObject):
    blueprint = data.draw(blueprints())
    changed = []
    for i, op in enumerate(blueprint.ops):
        attrs = {name: value + 0.125 for name, value in op.attrs.items() if isinstance(value, float)}
        inputs = tuple(item + 0.125 if isinstance(item, float) else item for item in op.inputs)
        if attrs or inputs != op.inputs:
            changed.append((i, op.model_copy(update={"attrs": op.attrs | attrs, "inputs": inputs})))
    assume(changed)
    place, op = data.draw(st.sampled_from(changed))
    ops = (*blueprint.ops[:place], op, *blueprint.ops[place + 1 :])
    assert blueprint.model_copy(update={"ops": ops}).id != blueprint.id


def test_sugar_is_written_out():
    plain = graph("k = linear(h, w, b) * b + h\n")
    assert graph("z = pointwise_conv(identity(h), w, b)\nk = bias(h, scale(b, z))\n").id == plain.id
    gate = graph("k = channel_gate(h, w, b, w, b)\n")
    assert graph("k = h * sigmoid(linear(relu(linear(pool_mean(h), w, b)), w, b))\n").id == gate.id


def test_what_is_not_commutative_keeps_its_order():
    assert graph("k = h - linear(h, w, b)\n").id != graph("k = linear(h, w, b) - h\n").id


def test_names_of_parameters_their_inits_and_limits_of_dims_count_and_prose_does_not():
    text = "k = linear(h, w, b)\n"
    base = graph(text)
    assert graph(text.replace("w", "v"), COMMON.replace("w =", "v =")).id != base.id
    assert graph(text, COMMON.replace('["d"] }', '["d"], init = "ones" }')).id != base.id
    assert graph(text, COMMON.replace("d = {}", "d = { max = 64 }")).id != base.id
    prose = 'description = "x"\nintroduced_by = "y"\nequivalent_to = "torch.nn.Linear"\n'
    assert (
        graph("# why\n" + text, prose + COMMON.replace('"a"', '"other"').replace("{}", "{ default = 8 }")).id == base.id
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("d*2", "2 * d"),
        ("d + d", "2 * d"),
        ("2*(r + d) - r*1 + 0", "2 * d + r"),
        ("r * d * 3", "3 * d * r"),
        ("(d + r) * (d - r)", "d * d - r * r"),
        ("d * 2 // (heads)", "((2 * d) // heads)"),
        ("max(d + d, cdiv(r, 3)) % 4", "((max((2 * d), (cdiv(r, 3)))) % 4)"),
        ("d - d", "0"),
        ("3 - 2 * r + d - 4", "d - 1 - 2 * r"),
        ("0 - r", "0 - r"),
        ("7", "7"),
    ],
)
def test_an_expression_has_one_form_and_keeps_its_value(text: str, canonical: str):
    assert canonical_extent(text) == canonical
    for dims in ({"d": 12, "r": 5, "heads": 3}, {"d": 7, "r": 11, "heads": 2}):
        assert eval(canonical, {"cdiv": lambda a, b: -(-a // b), "max": max}, dims) == evaluate(text, dims)
    assert canonical_extent(canonical_extent(text)) == canonical


def test_expressions_that_are_equal_are_one_design():
    rest = '[dims]\nd = {}\n[parameters]\nw = { shape = ["d + d", "d"] }\n'
    text = "z = linear(h, w)\nk = slice(z, stop=d) * slice(z, start=d, stop=2 * d)\n"
    head = 'name = "a"\ninput = "h"\n'
    other = text.replace("stop=2 * d", "stop=d*2")
    assert graph(text, head + rest).id == graph(other, head + rest.replace("d + d", "2*d")).id


def test_two_draws_are_not_one_and_are_told_apart_by_what_uses_them():
    rest = COMMON.split("[parameters]")[0]
    same = graph("u = dropout(h, 0.5)\nk = u + u * u\n", rest)
    two = graph("u = dropout(h, 0.5)\nv = dropout(h, 0.5)\nk = u + v * v\n", rest)
    mixed = graph("u = dropout(h, 0.5)\nv = dropout(h, 0.5)\nk = u + u * v\n", rest)
    assert len({same.id, two.id, mixed.id}) == 3
    assert graph("v = dropout(h, 0.5)\nu = dropout(h, 0.5)\nk = v * v + u\n", rest).id == two.id
    assert graph("v = dropout(h, 0.5)\nu = dropout(h, 0.5)\nk = u * v + u\n", rest).id == mixed.id

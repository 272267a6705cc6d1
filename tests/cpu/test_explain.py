"""`python -m esper_triton.cpu --explain`: what a kernel is compiled to, and how each access was emitted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import access_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_triton.cpu.__main__ import main
from esper_triton.cpu.errors import UsageError
from esper_triton.cpu.explain import Explanation, explain
from esper_triton.cpu.signature import Argument

FILE = Path(access_kernels.__file__)


def explained(kernel: str, *constexprs: str, args: tuple[str, ...] = ()) -> Explanation:
    return explain(f"{FILE}:{kernel}", args, constexprs)


def forms(kernel: str, *constexprs: str, args: tuple[str, ...] = ()) -> list[tuple[str, set[str]]]:
    """(operation, the forms' texts) of each access; stores that may go past the caches are told as others."""
    return [
        (access.operation, {str(form).removesuffix(", past the caches") for form in access.forms})
        for access in explained(kernel, *constexprs, args=args).accesses
    ]


def test_a_scalar_access_is_one_element() -> None:
    assert forms("scalar") == [("load", {"scalar"}), ("store", {"scalar, under one condition"})]


@pytest.mark.parametrize("block", [16, 1024])
def test_neighbours_without_a_mask_are_contiguous(block: int) -> None:
    assert forms("contiguous", f"BLOCK={block}") == [("load", {"contiguous"}), ("store", {"contiguous"})]


@pytest.mark.parametrize("block", [8, 1024])  # one chunk that the mask may cut; a loop of whole ones and a rest
def test_a_bound_on_neighbours_is_a_prefix_beside_whole_chunks(block: int) -> None:
    both = {"contiguous", "contiguous, masked (prefix)"}
    assert forms("prefix", f"BLOCK={block}") == [("load", both), ("store", both)]


def test_a_mask_that_is_the_same_everywhere_is_one_condition() -> None:
    once = {"contiguous, under one condition"}
    assert forms("one_condition", "BLOCK=64") == [("load", once), ("store", once)]


def test_any_other_mask_of_neighbours_goes_lane_by_lane_where_not_all_are_on() -> None:
    both = {"contiguous", "contiguous, masked lane by lane"}
    assert forms("odd_lanes", "BLOCK=64") == [("load", both), ("store", both)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(stride=st.integers(-9, 9).filter(lambda stride: stride not in (0, 1)), exponent=st.integers(2, 7))
def test_a_constant_step_is_told_in_elements(stride: int, exponent: int) -> None:
    found = explained("strided", f"STRIDE={stride}", f"BLOCK={2**exponent}", args=("x_ptr=*fp16", "out_ptr=*fp16"))
    assert [[(form.layout, form.stride, form.mask) for form in access.forms] for access in found.accesses] == [
        [("strided", stride, "")],
        [("strided", stride, "")],
    ]


def test_a_masked_step_goes_lane_by_lane_beside_whole_chunks() -> None:
    assert forms("masked_strides", "BLOCK=64") == [
        ("load", {"strided 3", "strided 3, masked lane by lane"}),
        ("store", {"strided 5", "strided 5, masked lane by lane"}),
    ]


def test_addresses_from_memory_are_gathered_and_scattered() -> None:
    assert forms("indirect", "BLOCK=64", args=("index_ptr=*i32",)) == [
        ("load", {"contiguous"}),
        ("load", {"contiguous where adjacent", "gathered"}),
        ("store", {"scattered"}),
    ]


def test_masked_addresses_from_memory_are_gathered_lane_by_lane_too() -> None:
    assert forms("masked_indirect", "BLOCK=64", args=("index_ptr=*i64",)) == [
        ("load", {"contiguous"}),
        ("load", {"contiguous where adjacent", "gathered", "gathered, masked lane by lane"}),
        ("store", {"scattered", "scattered, masked lane by lane"}),
    ]


def test_a_tile_that_lies_across_the_lanes_is_turned() -> None:
    assert forms("transposed", "ROWS=32", "COLUMNS=64") == [
        ("load", {"contiguous, block turned"}),
        ("store", {"contiguous"}),
    ]


def test_atomics_go_one_by_one() -> None:
    assert forms("atomics", "BLOCK=64") == [
        ("atomic", {"one by one, masked lane by lane"}),
        ("atomic", {"one by one"}),
        ("atomic", {"scalar, under one condition"}),
        ("atomic", {"scalar"}),
    ]


def test_a_store_of_whole_lines_may_go_past_the_caches() -> None:
    # Lines of 64 bytes are whole chunks of float64 whatever the width of the machine's registers.
    *_, store = explained("contiguous", "BLOCK=1024", args=("x_ptr=*fp64", "out_ptr=*fp64")).accesses
    assert [(form.layout, form.streamed) for form in store.forms] == [("contiguous", False), ("contiguous", True)]


def test_an_access_is_told_by_the_line_that_it_stands_on() -> None:
    load, store = explained("through_a_function", "BLOCK=64").accesses
    lines = FILE.read_text().splitlines()
    for access, text in ((load, "return tl.load(x_ptr + at)"), (store, "tl.store(out_ptr + at, x)")):
        assert access.source == text
        assert access.line is not None
        assert lines[access.line - 1].strip() == text
        assert access.file == str(FILE)
    assert (load.type, store.type) == ("tensor<64xf32>", "tensor<64xf32>")


def test_the_code_told_is_the_code_that_a_launch_runs() -> None:
    x, out = torch.arange(100.0), torch.zeros(100)
    compiled = access_kernels.prefix[(1,)](x, out, 99, BLOCK=128)
    found = explained("prefix", "BLOCK=128")
    assert (found.ttir, found.llir) == (compiled.asm["ttir"], compiled.asm["llir"])
    assert re.search(r"^prefix:", found.asm, re.MULTILINE)


def test_types_that_are_not_given_follow_from_names_uses_annotations_and_defaults() -> None:
    assert explained("by_use").arguments == (
        Argument(name="source", type="*fp32", aligned=True, why="default of a pointer"),
        Argument(name="rows", type="i32", why="default of a scalar"),
        Argument(name="limit", type="i64", why="annotation"),
        Argument(name="value", type="constexpr", value=1, why="the kernel's default"),
        Argument(name="BLOCK", type="constexpr", value=64, why="the kernel's default"),
    )


@pytest.mark.parametrize(
    ("text", "type_", "aligned", "value"),
    [
        ("i64", "i64", False, None),
        ("i32:16", "i32", True, None),
        ("int32", "i32", False, None),
        ("48", "i32", True, None),
        ("50", "i32", False, None),
        (str(2**31), "i64", True, None),
        ("1", "constexpr", False, 1),
    ],
)
def test_a_scalar_is_given_by_type_or_value(text: str, type_: str, aligned: bool, value: int | None) -> None:
    found = explained("by_use", args=(f"rows={text}",)).arguments[1]
    assert found == Argument(name="rows", type=type_, aligned=aligned, value=value, why="given")


def test_a_pointer_may_be_unaligned() -> None:
    found = explained("by_use", args=("source=*int64:1",)).arguments[0]
    assert found == Argument(name="source", type="*i64", aligned=False, why="given")


def test_wrappers_give_constexprs() -> None:
    even = explained("tuned", args=("n=512",))
    assert [(a.name, a.value, a.why) for a in even.arguments[2:]] == [
        ("EVEN", True, "heuristic"),
        ("BLOCK", 256, "first configuration of the autotuner"),
    ]
    assert "masked" not in str(even.accesses[0].forms[0])
    assert forms("tuned", "EVEN=False", "BLOCK=1024") == [("store", {"contiguous", "contiguous, masked (prefix)"})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add"], "'add' is not of the form FILE:KERNEL"),
        ([f"{FILE.parent / 'acces_kernels.py'}:scalar"], f"acces_kernels.py'; did you mean '{FILE}'?"),
        ([f"{FILE}:scalr"], "'scalr' is not in"),
        ([f"{FILE}:scalr"], "did you mean 'scalar'?"),
        ([f"{FILE}:BLOCK"], "'BLOCK' is not a @triton.jit function of"),
        ([f"{FILE}:transposed"], "give --constexpr ROWS=... --constexpr COLUMNS=..."),
        ([f"{FILE}:tuned"], "'tuned' has constexprs without a value: give --constexpr EVEN=..."),
        ([f"{FILE}:scalar", "--arg", "xptr=*fp32"], "'xptr' is not one of kernel 'scalar'; did you mean 'x_ptr' or"),
        ([f"{FILE}:scalar", "--arg", "x_ptr"], "--arg 'x_ptr' is not of the form NAME=..., such as x_ptr=*fp32"),
        ([f"{FILE}:scalar", "--arg", "flag=i3", "--arg", "flag=i4"], "--arg 'flag' is given twice"),
        ([f"{FILE}:scalar", "--arg", "flag=i33"], "--arg flag=i33: expected a type such as"),
        ([f"{FILE}:scalar", "--arg", "x_ptr=*float33"], "did you mean 'float32'"),
        ([f"{FILE}:prefix", "--arg", "BLOCK=4"], "kernel 'prefix'; 'BLOCK' takes --constexpr"),
        ([f"{FILE}:prefix", "--constexpr", "n=4"], "--constexpr 'n' is not one of kernel 'prefix'; 'n' takes --arg"),
        ([f"{FILE}:scalar", "--show", "llvm"], "--show 'llvm' is not a section"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_that_says_what_could(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("wrong_range", "'wrong_range' does not compile ({place}): arange's range must be a power of 2"),
        ("wrong_range", "; taken by default, unless --arg says otherwise: x_ptr=*fp32"),
        ("unsupported", "tt.elementwise_inline_asm is not supported by the CPU backend yet ({place})"),
    ],
)
def test_a_kernel_that_does_not_compile_is_told_with_its_line(
    kernel: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = FILE.read_text().splitlines()
    line = next(k for k, text in enumerate(lines, 1) if text.startswith(f"def {kernel}(")) + 1
    assert main(["--explain", f"{FILE}:{kernel}"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message.format(place=f"{FILE}:{line}") in err.replace(f"kernel 'unsupported', {FILE}", str(FILE))


def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import triton\nimport no_such_module_at_all\n")
    with pytest.raises(UsageError, match=r"broken\.py' cannot be imported: ModuleNotFoundError: No module named 'no_"):
        explain(f"{broken}:kernel")
    assert "explained_broken" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_a_kernel_of_a_package_is_imported_as_part_of_it(tmp_path: Path) -> None:
    package = tmp_path / "explained_package"
    package.mkdir()
    (package / "__init__.py").write_text("SIZE = 32\n")
    source = "import triton\nimport triton.language as tl\nfrom . import SIZE\nN = tl.constexpr(SIZE)\n"
    source += "@triton.jit\ndef zero(x_ptr):\n    tl.store(x_ptr + tl.arange(0, N), 0.0)\n"
    (package / "kernels.py").write_text(source)
    try:
        (store,) = explain(f"{package / 'kernels.py'}:zero").accesses
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "explained_package"]:
            del sys.modules[name]
    assert (store.type, store.source) == ("tensor<32xf32>", "tl.store(x_ptr + tl.arange(0, N), 0.0)")


def test_json_has_the_sections_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{FILE}:prefix"
    assert main(["--explain", target, "--constexpr", "BLOCK=1024", "--json", "--show", "accesses,ttir"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["kernel", "file", "line", "arguments", "ttir", "accesses"]
    assert "tt.func public @prefix" in found["ttir"]
    load, _ = found["accesses"]
    assert (load["operation"], load["type"]) == ("load", "tensor<1024xf32>")
    assert [(form["layout"], form["mask"]) for form in load["forms"]] == [("contiguous", ""), ("contiguous", "prefix")]
    assert load["forms"][1]["text"] == "contiguous, masked (prefix)"


def test_the_command_prints_every_section_in_a_process_of_its_own() -> None:
    options = ["--arg", "index_ptr=*i32", "--constexpr", "BLOCK=64"]
    done = subprocess.run(
        [sys.executable, "-m", "esper_triton.cpu", "--explain", f"{FILE}:indirect", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    order = [done.stdout.index(text) for text in ("index_ptr", "= TTIR =", "= LLVM IR =", "= assembly =", "emitted as")]
    assert order == sorted(order)
    table = done.stdout[order[-1] :]
    assert re.search(r"tl\.load\(x_ptr \+ index\).* load .* (gathered|contiguous where adjacent)", table)

"""The parser reads what Triton's own frontend and printer produce."""

from __future__ import annotations

import inspect
import math
import textwrap
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from esper_triton.cpu import compiler, mlir
from esper_triton.cpu.errors import MLIRSyntaxError
from esper_triton.cpu.mlir import DialectAttribute, OpaqueType, PointerType, ScalarType, TensorType

F32, I32 = ScalarType("f32"), ScalarType("i32")


@triton.jit
def scale(x, factor):
    return x * factor


@triton.jit
def softmax(x, out, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, mask=columns < n, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * stride + columns, values / tl.sum(values, axis=0), mask=columns < n)


@triton.jit
def matmul(a, b, c, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    left = a + i[:, None] * K + i[None, :]
    right = b + i[:, None] * BLOCK + i[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(0, K, BLOCK):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += BLOCK
        right += BLOCK * BLOCK
    tl.store(c + i[:, None] * BLOCK + i[None, :], scale(total, 2.0))


@triton.jit
def branches(x, n, skip):
    if skip != 0:
        return
    i = 0
    while i < n:
        value = tl.load(x + i)
        if value > 0:
            tl.store(x + i, -value)
        else:
            tl.store(x + i, value * 2)
        i += 1


def frontend(fn, signature: dict[str, str], constants: dict[str, int], *, optimise: bool = True):
    """(module, context) of Triton's IR for `fn`."""
    backend = make_backend(GPUTarget("cpu", "native", 1))
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    types = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    source = ASTSource(fn, types, {(fn.arg_names.index(name),): value for name, value in constants.items()})
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(backend.target, options, codegen, modules, context)
    if optimise:
        stages: dict = {}
        backend.add_stages(stages, options)
        module = stages["ttir"](module, {})
    return module, context


def parsed(fn, signature: dict[str, str], constants: dict[str, int] | None = None, **kwargs) -> mlir.Module:
    return mlir.parse(mlir.generic_text(*frontend(fn, signature, constants or {}, **kwargs)))


def from_text(text: str, tmp_path: Path) -> mlir.Module:
    """Custom-form IR, through MLIR's parser and printer, through ours."""
    path = tmp_path / "kernel.ttir"
    path.write_text(textwrap.dedent(text))
    context = ir.context()
    ir.load_dialects(context)
    module = ir.parse_mlir_module(str(path), context)
    module.context = context
    return mlir.parse(mlir.generic_text(module, context))


def named(module: mlir.Module, function: str, operation: str) -> list[mlir.Operation]:
    return [op for op in module.functions[function].walk() if op.name == operation]


def line_of(fn, text: str) -> int:
    lines, first = inspect.getsourcelines(fn.fn)
    return first + next(k for k, line in enumerate(lines) if text in line)


@pytest.fixture(scope="module")
def softmax_module() -> mlir.Module:
    return parsed(softmax, {"x": "*fp32", "out": "*fp32", "n": "i32", "stride": "i32"}, {"BLOCK": 128})


@pytest.fixture(scope="module")
def matmul_module() -> mlir.Module:
    return parsed(matmul, {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}, {"BLOCK": 16})


@pytest.fixture(scope="module")
def branches_module() -> mlir.Module:
    return parsed(branches, {"x": "*fp32", "n": "i32", "skip": "i32"})


def test_a_function_has_its_arguments_with_types_and_a_public_name(softmax_module):
    function = softmax_module.functions["softmax"]
    assert function.attributes["sym_visibility"] == "public"
    assert [value.type for value in function.regions[0].block.arguments] == [
        PointerType(F32),
        PointerType(F32),
        I32,
        I32,
    ]
    assert function.attributes["function_type"].results == ()
    assert function.regions[0].block.terminator.name == "tt.return"


def test_operands_point_at_the_operations_that_define_them(softmax_module):
    (load,) = named(softmax_module, "softmax", "tt.load")
    pointers, mask, other = load.operands
    assert load.attributes["operandSegmentSizes"] == (1, 1, 1)
    assert pointers.type == TensorType((128,), PointerType(F32))
    assert pointers.defining_op.name == "tt.addptr"
    assert mask.defining_op.name == "arith.cmpi"
    assert mask.type == TensorType((128,), ScalarType("i1"))
    constant = other.defining_op.attributes["value"]
    assert (constant.value, constant.splat) == (-math.inf, True)
    (store,) = named(softmax_module, "softmax", "tt.store")
    assert store in mask.users
    assert load in mask.users


def test_a_reduction_carries_its_combiner_as_a_region(softmax_module):
    largest, total = named(softmax_module, "softmax", "tt.reduce")
    for reduce, combiner in ((largest, "arith.maxnumf"), (total, "arith.addf")):
        assert reduce.attributes["axis"] == 0
        body = reduce.regions[0].block
        assert [value.type for value in body.arguments] == [F32, F32]
        assert [op.name for op in body.operations] == [combiner, "tt.reduce.return"]
        assert body.operations[0].operands == body.arguments
        assert body.operations[0].parent is reduce


def test_every_use_is_recorded_once_and_every_value_knows_where_it_comes_from(softmax_module, matmul_module):
    for module in (softmax_module, matmul_module):
        for operation in module.operation.walk():
            for value in operation.operands:
                assert value.users.count(operation) == 1
                assert (value.defining_op is None) != (value.block is None)
            for index, value in enumerate(operation.results):
                assert (value.defining_op, value.index) == (operation, index)
                assert all(value in user.operands for user in value.users)
            for region in operation.regions:
                assert region.parent is operation
                assert all(block.region is region for block in region.blocks)
                assert all(op.block is block for block in region.blocks for op in block.operations)


def test_an_operation_that_uses_a_value_twice_is_one_user(tmp_path):
    module = from_text(
        """
        module { tt.func public @k(%x: f32) { %y = arith.mulf %x, %x : f32
          tt.return } }
        """,
        tmp_path,
    )
    (product,) = named(module, "k", "arith.mulf")
    assert product.operands[0] is product.operands[1]
    assert product.operands[0].users == [product]


def test_a_loop_has_carried_values_as_arguments_and_results(matmul_module):
    (loop,) = named(matmul_module, "matmul", "scf.for")
    body = loop.regions[0].block
    assert len(loop.operands) == 3 + len(loop.results) == 6
    assert len(body.arguments) == 1 + len(loop.results)
    assert [value.type for value in body.arguments[1:]] == [value.type for value in loop.results]
    assert body.terminator.name == "scf.yield"
    (dot,) = named(matmul_module, "matmul", "tt.dot")
    assert dot.operands[2] in body.arguments
    assert dot.result in body.terminator.operands
    assert dot.result.type == TensorType((16, 16), F32)
    scaled = next(op for value in loop.results for op in value.users if op.name == "arith.mulf")
    assert scaled.operands[0] is loop.results[scaled.operands[0].index]


def test_branches_have_successors_with_the_operands_passed_to_each(branches_module):
    (branch,) = named(branches_module, "branches", "cf.cond_br")
    early, rest = branch.successors
    blocks = branches_module.functions["branches"].regions[0].blocks
    assert blocks[0].terminator is branch
    assert [early, rest] == [blocks[1], blocks[2]]
    assert [op.name for op in early.operations] == ["tt.return"]
    assert branch.successor_operands == [[], []]


def test_while_and_if_have_both_regions(branches_module):
    (loop,) = named(branches_module, "branches", "scf.while")
    before, after = (region.block for region in loop.regions)
    assert before.terminator.name == "scf.condition"
    assert before.terminator.operands[1] is before.arguments[0]
    assert after.terminator.name == "scf.yield"
    (choice,) = named(branches_module, "branches", "scf.if")
    assert choice.block is after
    assert [region.block.operations[-2].name for region in choice.regions] == ["tt.store", "tt.store"]


def test_branches_pass_each_successor_its_own_values(tmp_path):
    module = from_text(
        """
        module { tt.func public @k(%c: i1, %x: i32, %y: i32) {
          cf.cond_br %c, ^one(%x : i32), ^two(%x, %y : i32, i32)
        ^one(%a: i32):
          cf.br ^two(%a, %a : i32, i32)
        ^two(%b: i32, %d: i32):
          tt.return
        } }
        """,
        tmp_path,
    )
    entry, one, two = module.functions["k"].regions[0].blocks
    _, x, y = entry.arguments
    assert entry.terminator.successors == [one, two]
    assert entry.terminator.successor_operands == [[x], [x, y]]
    assert one.terminator.successor_operands == [[one.arguments[0]] * 2]
    assert [value.block for value in two.arguments] == [two, two]


def test_a_value_may_be_used_above_the_block_that_defines_it():
    module = mlir.parse(
        """
        "builtin.module"() ({
          "tt.func"() <{sym_name = "k"}> ({
            "cf.br"()[^bb2] : () -> ()
          ^bb1:  // pred: ^bb2
            "scf.if"(%1) ({
              "use"(%0, %0) : (i32, i32) -> ()
              "scf.yield"() : () -> ()
            }, {
            }) : (i1) -> ()
            "use"(%0) : (i32) -> ()
            "tt.return"() : () -> ()
          ^bb2:  // pred: ^bb0
            %0:2 = "make"() : () -> (i32, i32)
            %1 = "test"(%0#1) : (i32) -> i1
            "cf.br"()[^bb1] : () -> ()
          }) : () -> ()
        }) : () -> ()
        """.replace("%0, %0", "%0#0, %0#0").replace('"use"(%0)', '"use"(%0#0)')
    )
    (make,), (test,) = named(module, "k", "make"), named(module, "k", "test")
    inner, outer = named(module, "k", "use")
    assert make.results[0].users == [outer, inner] or make.results[0].users == [inner, outer]
    assert inner.operands == [make.results[0]] * 2
    assert outer.operands == [make.results[0]]
    assert test.operands == [make.results[1]]
    assert make.results[0].type == I32


def test_sibling_regions_may_reuse_a_name():
    module = mlir.parse(
        """
        "builtin.module"() ({
          "tt.func"() <{sym_name = "k"}> ({
          ^bb0(%c: i1):
            "scf.if"(%c) ({
              %0 = "left"() : () -> f32
              "use"(%0) : (f32) -> ()
            }, {
              %0 = "right"() : () -> i32
              "use"(%0) : (i32) -> ()
            }) : (i1) -> ()
          }) : () -> ()
        }) : () -> ()
        """
    )
    left, right = named(module, "k", "use")
    assert left.operands[0].defining_op.name == "left"
    assert right.operands[0].defining_op.name == "right"


def test_locations_are_lines_of_the_kernels_own_source(softmax_module, matmul_module):
    (load,) = named(softmax_module, "softmax", "tt.load")
    assert load.location.file == __file__
    assert load.location.line == line_of(softmax, "tl.load")
    # tl.max and the inlined helper live in other functions: the first is Triton's own code, the second is not.
    assert named(softmax_module, "softmax", "tt.reduce")[0].location.line == line_of(softmax, "tl.max")
    (product,) = named(matmul_module, "matmul", "arith.mulf")
    assert product.location.line == line_of(scale, "x * factor")


def test_private_functions_and_calls_between_them_are_read():
    module = parsed(matmul, {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}, {"BLOCK": 16}, optimise=False)
    callees = [op.attributes["callee"] for op in named(module, "matmul", "tt.call")]
    assert any("scale" in callee for callee in callees)
    assert set(callees) <= set(module.functions)
    assert all(isinstance(callee, mlir.SymbolRef) for callee in callees)


def test_constants_have_the_values_that_were_written(tmp_path):
    numbers = [k * k - 50 for k in range(128)]
    flags = [k % 3 == 0 for k in range(128)]
    module = from_text(
        f"""
        module {{ tt.func public @k() {{
          %0 = arith.constant dense<{numbers}> : tensor<128xi32>
          %1 = arith.constant dense<{[n / 4 for n in numbers]}> : tensor<128xf32>
          %2 = arith.constant dense<{[float(k) for k in range(128)]}> : tensor<128xbf16>
          %3 = arith.constant dense<{str(flags).lower()}> : tensor<128xi1>
          %4 = arith.constant dense<[[1, 2, 3], [4, 5, -6]]> : tensor<2x3xi32>
          %5 = arith.constant dense<[0x7FC00000, 0xFF800000, -1.5]> : tensor<3xf32>
          %6 = arith.constant dense<-7> : tensor<4x4xi64>
          %7 = arith.constant 0x7C00 : f16
          %8 = arith.constant 0xFF80 : bf16
          %9 = arith.constant -1.0e-20 : f64
          %10 = arith.constant -9223372036854775808 : i64
          %11 = arith.constant true
          %12 = arith.constant 448.0 : f8E4M3FN
          %13 = arith.constant 0x7C : f8E5M2
          tt.return
        }} }}
        """,
        tmp_path,
    )
    values = [op.attributes["value"] for op in named(module, "k", "arith.constant")]
    dense, scalars = values[:7], values[7:]
    assert dense[0].value == tuple(numbers)
    assert dense[1].value == tuple(n / 4 for n in numbers)
    assert dense[2].value == tuple(float(k) for k in range(128))
    assert dense[3].value == tuple(flags)
    assert (dense[4].value, dense[4].type) == ((1, 2, 3, 4, 5, -6), TensorType((2, 3), I32))
    assert math.isnan(dense[5].value[0])
    assert dense[5].value[1:] == (-math.inf, -1.5)
    assert (dense[6].value, dense[6].splat) == (-7, True)
    assert not any(value.splat for value in dense[:6])
    assert scalars == [math.inf, -math.inf, -1e-20, -(2**63), True, 448.0, math.inf]
    assert scalars[4] is True


@pytest.mark.parametrize(
    ("bits", "value"),
    [("0x00", 0.0), ("0x38", 1.0), ("0x01", 2.0**-9), ("0x7E", 448.0), ("0x88", -(2.0**-6))],
)
def test_hexadecimal_fp8_numbers_follow_the_ocp_tables(bits, value):
    text = f'"builtin.module"() ({{ "c"() <{{value = {bits} : f8E4M3FN}}> : () -> () }}) : () -> ()'
    assert mlir.parse(text).operation.regions[0].block.operations[0].attributes["value"] == value


def test_attributes_of_every_kind_become_python_values():
    text = """
    #loc = loc("k.py":3:1)
    #shared = #ttg.swizzled<{vec = 1, order = [1, 0]}>
    "builtin.module"() ({
      "op"() <{a = 3 : i32, b = -2.5 : f32, c = "tab\\09quote\\22 \\E2\\82\\AC", d = [1 : i64, "x", @f], unit,
               e = array<i32: 1, -2>, f = array<i1: true, false>, g = array<i64>, h = #arith.fastmath<nnan,ninf>,
               i = {tt.divisibility = 16 : i32}, j = tensor<2x!tt.ptr<f16>>, k = (i32, f32) -> (), l = @"odd name",
               m = #shared, n = !tt.ptr<f32, 3>, o = loc(#loc), p = false, q = 7 : index}> {
               "r.s" = 1 : i8, t.u = @m::@n} : () -> () loc(callsite("x"("a.py":1:2) at #loc))
    }) : () -> ()
    """
    operation = mlir.parse(textwrap.dedent(text)).operation.regions[0].block.operations[0]
    assert operation.attributes == {
        "a": 3,
        "b": -2.5,
        "c": 'tab\tquote" €',
        "d": (1, "x", mlir.SymbolRef("f")),
        "unit": True,
        "e": (1, -2),
        "f": (True, False),
        "g": (),
        "h": DialectAttribute("arith.fastmath", "nnan,ninf"),
        "i": {"tt.divisibility": 16},
        "j": TensorType((2,), PointerType(ScalarType("f16"))),
        "k": mlir.FunctionType((I32, F32), ()),
        "l": "odd name",
        "m": DialectAttribute("ttg.swizzled", "{vec = 1, order = [1, 0]}"),
        "n": PointerType(F32, 3),
        "o": mlir.Location("k.py", 3),
        "p": False,
        "q": 7,
        "r.s": 1,
        "t.u": "m::n",
    }
    assert operation.location == mlir.Location("a.py", 1)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ('"k.py":4:2', ("k.py", 4)),
        ('"k.py":4:2 to 5:6', ("k.py", 4)),
        ('"name"("k.py":5:1)', ("k.py", 5)),
        ("unknown", None),
        ('fused["k.py":6:1, "k.py":7:1]', ("k.py", 6)),
        ('fused<"meta">[unknown, "k.py":7:1]', ("k.py", 7)),
        ('callsite("callee.py":1:1 at "caller.py":2:1)', ("callee.py", 1)),
        ('callsite("/p/triton/language/standard.py":1:1 at "caller.py":2:1)', ("caller.py", 2)),
        ('callsite(unknown at "caller.py":2:1)', ("caller.py", 2)),
    ],
)
def test_locations_of_every_form_resolve_to_one_line(location, expected):
    text = f'"builtin.module"() ({{ "op"() : () -> () loc({location}) }}) : () -> ()'
    found = mlir.parse(text).operation.regions[0].block.operations[0].location
    assert found == (mlir.Location(*expected) if expected else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i1", ScalarType("i1")),
        ("bf16", ScalarType("bf16")),
        ("!tt.ptr<f32>", PointerType(F32)),
        ("!tt.ptr<f32, 3>", PointerType(F32, 3)),
        ("!tt.ptr<!tt.ptr<i8>>", PointerType(PointerType(ScalarType("i8")))),
        ("!tt.ptr<tensor<8x4xf32>>", PointerType(TensorType((8, 4), F32))),
        ("tensor<f32>", TensorType((), F32)),
        ("tensor<8x4x!tt.ptr<f32>>", TensorType((8, 4), PointerType(F32))),
        ("tensor<?xf32>", OpaqueType("tensor<?xf32>")),
        ("tensor<4xf32, #blocked>", OpaqueType("tensor<4xf32, #blocked>")),
        ("!tt.tensordesc<tensor<8x8xf16>>", OpaqueType("!tt.tensordesc<tensor<8x8xf16>>")),
        ("none", OpaqueType("none")),
    ],
)
def test_types_are_read_and_the_unknown_ones_kept_as_text(text, expected):
    assert mlir.parse_type(text) == expected
    module = mlir.parse(f'"builtin.module"() ({{ %0 = "op"() : () -> {text} }}) : () -> ()')
    assert module.operation.regions[0].block.operations[0].result.type == expected


def test_types_print_as_mlir_spells_them_and_know_their_sizes():
    assert str(TensorType((8, 4), PointerType(F32))) == "tensor<8x4x!tt.ptr<f32>>"
    assert TensorType((8, 4), F32).size == 32
    assert TensorType((), F32).size == 1
    assert [ScalarType(name).bits for name in ("i1", "index", "bf16", "f8E5M2", "f64")] == [1, 64, 16, 8, 64]
    assert ScalarType("bf16").is_float
    assert ScalarType("index").is_integer


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: expected an operation in generic form"),
        ("tt.func @k() {\n tt.return\n}", "line 1: expected an operation in generic form, found 'tt.func'"),
        (
            '"builtin.module"() ({\n "op"(%0) : (i32) -> () }) : () -> ()',
            "a definition of every value used, found '%0'",
        ),
        ('"builtin.module"() ({\n "op"() : (i32) -> () }) : () -> ()', "line 2: expected 1 operands of op, found '0'"),
        ('"builtin.module"() ({\n "op"()[^bb7] : () -> () }) : () -> ()', "a block for each label, found '^bb7'"),
        ('"builtin.module"() ({\n\n "op"(x) : () -> () }) : () -> ()', "line 3: expected an operand, found 'x'"),
        ('"builtin.module"() ({', "expected"),
        ('"builtin.module"() ({ "op"() <{a = dense<[1, 2]> : tensor<3xi32>}> : () -> () }) : () -> ()', "2 elements"),
    ],
)
def test_text_that_is_not_the_generic_form_is_refused_with_its_line(text, complaint):
    with pytest.raises(MLIRSyntaxError) as refusal:
        mlir.parse(text)
    assert complaint in str(refusal.value)


def test_a_printer_that_keeps_the_custom_form_is_reported_at_once():
    class CustomFormOnly:
        def set_attr(self, name, value):
            pass

        def __str__(self):
            return "module { }"

    with pytest.raises(MLIRSyntaxError, match=r"triton .* did not give the generic form"):
        mlir.generic_text(CustomFormOnly(), ir.context())


def test_the_backend_and_its_ir_stages_have_the_names_that_triton_caches_by():
    stages: dict = {}
    backend = make_backend(GPUTarget("cpu", "native", 1))
    assert isinstance(backend, compiler.CPUBackend)
    backend.add_stages(stages, backend.parse_options({}))
    assert list(stages) == ["ttir", "llir", "o"]

"""Launches of CPU kernels as builtin functions of Python, made of machine code.

A launch that goes through Python costs microseconds before the kernel runs. The functions made here do the same
through Python's C API: they read numbers and tensors into the frame of the launch (see `native`), release the global
interpreter lock, run the kernel, and look at its status. One piece of code serves all kernels: a kernel's table tells
it the types of the arguments.

The fast path refuses nothing and explains nothing. Whatever it does not know (a tuple, a launch hook, a tensor on
another device, a number out of range, a wrong count) it hands to a Python function with the same arguments, before
anything ran, and that one launches or raises. So errors have one place, and where this module cannot work, that
function does it all.

Reference counts change only in functions of the C API, and no layout of an object is assumed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from esper_triton.cpu.place import Placed, place
from esper_triton.cpu.trap import FRAME_CLAIMS, FRAME_SLOTS, FRAME_STATUS
from esper_triton.cpu.watchdog import WATCHED

__all__ = ["KernelTable", "Launch", "unavailable", "use_threads"]

Launch = Callable[..., None]

# Codes of arguments. From _INTEGERS on: an integer in the range that stands at this place of _RANGES.
_SKIP, _POINTER, _FLOAT, _DOUBLE, _UNSIGNED, _OTHER, _INTEGERS = range(7)
_RANGES = {
    "i1": (0, 1),
    **{f"i{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"u{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)},
}
_CODES = {
    "constexpr": _SKIP,
    **dict.fromkeys(("fp32", "f32", "fp16", "bf16"), _FLOAT),
    **dict.fromkeys(("fp64", "f64"), _DOUBLE),
    "u64": _UNSIGNED,
    "u1": _INTEGERS,
    **{name: _INTEGERS + index for index, name in enumerate(_RANGES)},
}
# The table of a kernel: identity of its code object (0: not known yet), entry point, least and most arguments, slots,
# number of threads (0: torch's, asked each time), programs that make one thread more worthwhile. One byte for each
# argument follows, its code.
_TABLE = struct.Struct("=7q")
# What all launches share: GOMP_parallel, omp_get_thread_num, omp_get_num_threads (null: one thread), then the Python
# objects torch.get_num_threads, "data_ptr", "is_cpu"; where to see whether any deadline is set; Triton's HookChain (or
# null, where the wheel has none) and "calls", the name of the list of its hooks.
_RUNTIME_WORDS = 9
# Launches through Triton come with this many arguments before the kernel's own; direct ones with the grid alone.
_STOCK_HEADER, _DIRECT_HEADER = 9, 3
_METH_FASTCALL = 0x80
_FILE = "launcher.o"

_IR = f"""
@runtime = global [{_RUNTIME_WORDS} x ptr] zeroinitializer
@lows = internal constant [{len(_RANGES)} x i64] [{", ".join(f"i64 {low}" for low, _ in _RANGES.values())}]
@highs = internal constant [{len(_RANGES)} x i64] [{", ".join(f"i64 {high}" for _, high in _RANGES.values())}]
@_Py_NoneStruct = external global i8
@_Py_TrueStruct = external global i8
@PyLong_Type = external global i8
@PyExc_Exception = external global ptr

declare void @PyErr_Clear()
declare i32 @PyErr_ExceptionMatches(ptr)
declare ptr @PyErr_Occurred()
declare ptr @PyByteArray_AsString(ptr)
declare ptr @PyBytes_FromStringAndSize(ptr, i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare double @PyFloat_AsDouble(ptr)
declare i64 @PyList_Size(ptr)
declare i64 @PyLong_AsLongLong(ptr)
declare i64 @PyLong_AsUnsignedLongLong(ptr)
declare ptr @PyObject_CallNoArgs(ptr)
declare ptr @PyObject_CallOneArg(ptr, ptr)
declare ptr @PyObject_GetAttr(ptr, ptr)
declare ptr @PyObject_Type(ptr)
declare ptr @PyObject_Vectorcall(ptr, ptr, i64, ptr)
declare ptr @PyObject_VectorcallMethod(ptr, ptr, i64, ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare void @Py_DecRef(ptr)
declare void @Py_IncRef(ptr)
declare {{i64, i1}} @llvm.umul.with.overflow.i64(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

; Both take (self, arguments, how many); self is (bytearray of the table, slow path, what to do with a failed frame).
define ptr @stock(ptr %self, ptr %args, i64 %n) {{
  %holder = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %table = call ptr @PyByteArray_AsString(ptr %holder)
  %known = load ptr, ptr %table
  %few = icmp ult i64 %n, {_STOCK_HEADER}
  br i1 %few, label %slow, label %header
header:  ; x, y, z, stream, code, packed metadata, launch metadata, enter hook, exit hook
  %code_at = getelementptr ptr, ptr %args, i64 4
  %enter_at = getelementptr ptr, ptr %args, i64 7
  %exit_at = getelementptr ptr, ptr %args, i64 8
  %code = load ptr, ptr %code_at
  %enter = load ptr, ptr %enter_at
  %exit = load ptr, ptr %exit_at
  %same = icmp eq ptr %code, %known
  br i1 %same, label %enter_hook, label %slow
enter_hook:
  %no_enter = call i1 @is_no_hook(ptr %enter)
  br i1 %no_enter, label %exit_hook, label %slow
exit_hook:
  %no_exit = call i1 @is_no_hook(ptr %exit)
  br i1 %no_exit, label %fast, label %slow
fast:
  %done = call ptr @launch(ptr %self, ptr %table, ptr %args, i64 %n, i64 {_STOCK_HEADER})
  ret ptr %done
slow:
  %passed = call ptr @pass_on(ptr %self, ptr %args, i64 %n)
  ret ptr %passed
}}

define ptr @direct(ptr %self, ptr %args, i64 %n) {{
  %holder = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %table = call ptr @PyByteArray_AsString(ptr %holder)
  %few = icmp ult i64 %n, {_DIRECT_HEADER}
  br i1 %few, label %slow, label %fast
fast:
  %done = call ptr @launch(ptr %self, ptr %table, ptr %args, i64 %n, i64 {_DIRECT_HEADER})
  ret ptr %done
slow:
  %passed = call ptr @pass_on(ptr %self, ptr %args, i64 %n)
  ret ptr %passed
}}

define internal i1 @is_no_hook(ptr %hook) {{
  %is_none = icmp eq ptr %hook, @_Py_NoneStruct
  br i1 %is_none, label %yes, label %look
look:
  %type = call ptr @PyObject_Type(ptr %hook)
  call void @Py_DecRef(ptr %type)
  %chain_at = getelementptr ptr, ptr @runtime, i64 7
  %chain = load ptr, ptr %chain_at
  %is_chain = icmp eq ptr %type, %chain
  br i1 %is_chain, label %open, label %no
open:
  %name_at = getelementptr ptr, ptr @runtime, i64 8
  %name = load ptr, ptr %name_at
  %calls = call ptr @PyObject_GetAttr(ptr %hook, ptr %name)
  %missing = icmp eq ptr %calls, null
  br i1 %missing, label %no, label %count
count:
  %size = call i64 @PyList_Size(ptr %calls)
  call void @Py_DecRef(ptr %calls)
  %empty = icmp eq i64 %size, 0
  ret i1 %empty
yes:
  ret i1 true
no:
  ret i1 false
}}

; To the slow path. An error that reading an argument has set is what that path will find as well, unless it is none of
; the argument's doing (KeyboardInterrupt).
define internal ptr @pass_on(ptr %self, ptr %args, i64 %n) {{
  %pending = call ptr @PyErr_Occurred()
  %clean = icmp eq ptr %pending, null
  br i1 %clean, label %pass, label %look
look:
  %ordinary = load ptr, ptr @PyExc_Exception
  %matches = call i32 @PyErr_ExceptionMatches(ptr %ordinary)
  %foreign = icmp eq i32 %matches, 0
  br i1 %foreign, label %leave, label %clear
clear:
  call void @PyErr_Clear()
  br label %pass
pass:
  %slow = call ptr @PyTuple_GetItem(ptr %self, i64 1)
  %result = call ptr @PyObject_Vectorcall(ptr %slow, ptr %args, i64 %n, ptr null)
  ret ptr %result
leave:
  ret ptr null
}}

define internal ptr @launch(ptr %self, ptr %table, ptr %args, i64 %n, i64 %header) {{
entry:
  %entry_at = getelementptr i64, ptr %table, i64 1
  %least_at = getelementptr i64, ptr %table, i64 2
  %most_at = getelementptr i64, ptr %table, i64 3
  %slots_at = getelementptr i64, ptr %table, i64 4
  %threads_at = getelementptr i64, ptr %table, i64 5
  %per_thread_at = getelementptr i64, ptr %table, i64 6
  %codes = getelementptr i64, ptr %table, i64 7
  %least = load i64, ptr %least_at
  %most = load i64, ptr %most_at
  %slot_count = load i64, ptr %slots_at
  %frame = alloca [{FRAME_SLOTS} x i64], align 16
  %slots = alloca i64, i64 %slot_count, align 16
  %argv = alloca ptr
  %count = sub i64 %n, %header
  %too_few = icmp slt i64 %count, %least
  %too_many = icmp sgt i64 %count, %most
  %wrong_count = or i1 %too_few, %too_many
  br i1 %wrong_count, label %slow, label %start
start:
  %watched_at_at = getelementptr ptr, ptr @runtime, i64 6
  %watched_at = load ptr, ptr %watched_at_at
  %watched = load i64, ptr %watched_at
  %is_watched = icmp ne i64 %watched, 0
  br i1 %is_watched, label %slow, label %prepare
prepare:
  call void @llvm.memset.p0.i64(ptr %frame, i8 0, i64 {8 * FRAME_SLOTS}, i1 false)
  store ptr %slots, ptr %frame
  br label %grid

grid:
  %axis = phi i64 [0, %prepare], [%next_axis, %grid_next]
  %before = phi i64 [1, %prepare], [%programs, %grid_next]
  %extent_at = getelementptr ptr, ptr %args, i64 %axis
  %extent_object = load ptr, ptr %extent_at
  %extent = call i64 @PyLong_AsLongLong(ptr %extent_object)
  %extent_fits = icmp ult i64 %extent, {2**31}  ; not so for -1, which may be an error
  br i1 %extent_fits, label %grid_count, label %slow
grid_count:
  %next_axis = add i64 %axis, 1
  %frame_extent = getelementptr i64, ptr %frame, i64 %next_axis
  store i64 %extent, ptr %frame_extent
  %product = call {{i64, i1}} @llvm.umul.with.overflow.i64(i64 %before, i64 %extent)
  %programs = extractvalue {{i64, i1}} %product, 0
  %overflow = extractvalue {{i64, i1}} %product, 1
  %negative = icmp slt i64 %programs, 0
  %too_large = or i1 %overflow, %negative
  br i1 %too_large, label %slow, label %grid_next
grid_next:
  %grid_done = icmp eq i64 %next_axis, 3
  br i1 %grid_done, label %arguments, label %grid

arguments:
  %i = phi i64 [0, %grid_next], [%next_i, %stored], [%next_i, %argument]
  %slot = phi i64 [0, %grid_next], [%next_slot, %stored], [%slot, %argument]
  %arguments_done = icmp eq i64 %i, %count
  br i1 %arguments_done, label %ready, label %argument
argument:
  %next_i = add i64 %i, 1
  %position = add i64 %header, %i
  %value_at = getelementptr ptr, ptr %args, i64 %position
  %value = load ptr, ptr %value_at
  %code_at = getelementptr i8, ptr %codes, i64 %i
  %code = load i8, ptr %code_at
  switch i8 %code, label %integer [
    i8 {_SKIP}, label %arguments
    i8 {_POINTER}, label %pointer
    i8 {_FLOAT}, label %number
    i8 {_DOUBLE}, label %number
    i8 {_UNSIGNED}, label %unsigned
    i8 {_OTHER}, label %slow
  ]

pointer:
  %is_none = icmp eq ptr %value, @_Py_NoneStruct
  br i1 %is_none, label %stored, label %pointer_type
pointer_type:
  %type = call ptr @PyObject_Type(ptr %value)
  call void @Py_DecRef(ptr %type)
  %is_address = icmp eq ptr %type, @PyLong_Type
  br i1 %is_address, label %unsigned, label %tensor
tensor:
  %is_cpu_at = getelementptr ptr, ptr @runtime, i64 5
  %is_cpu_name = load ptr, ptr %is_cpu_at
  %is_cpu = call ptr @PyObject_GetAttr(ptr %value, ptr %is_cpu_name)
  %no_tensor = icmp eq ptr %is_cpu, null
  br i1 %no_tensor, label %slow, label %tensor_device
tensor_device:
  call void @Py_DecRef(ptr %is_cpu)
  %here = icmp eq ptr %is_cpu, @_Py_TrueStruct
  br i1 %here, label %tensor_address, label %slow
tensor_address:
  %data_ptr_at = getelementptr ptr, ptr @runtime, i64 4
  %data_ptr_name = load ptr, ptr %data_ptr_at
  store ptr %value, ptr %argv
  %address_object = call ptr @PyObject_VectorcallMethod(ptr %data_ptr_name, ptr %argv, i64 1, ptr null)
  %no_address = icmp eq ptr %address_object, null
  br i1 %no_address, label %slow, label %tensor_read
tensor_read:
  %address = call i64 @PyLong_AsUnsignedLongLong(ptr %address_object)
  call void @Py_DecRef(ptr %address_object)
  br label %unsigned_check
unsigned:
  %whole = call i64 @PyLong_AsUnsignedLongLong(ptr %value)
  br label %unsigned_check
unsigned_check:
  %word = phi i64 [%address, %tensor_read], [%whole, %unsigned]
  %all_ones = icmp eq i64 %word, -1
  br i1 %all_ones, label %unsigned_error, label %stored
unsigned_error:
  %word_error = call ptr @PyErr_Occurred()
  %word_fits = icmp eq ptr %word_error, null
  br i1 %word_fits, label %stored, label %slow

integer:
  %signed = call i64 @PyLong_AsLongLong(ptr %value)
  %row = sub i8 %code, {_INTEGERS}
  %row64 = zext i8 %row to i64
  %low_at = getelementptr i64, ptr @lows, i64 %row64
  %high_at = getelementptr i64, ptr @highs, i64 %row64
  %low = load i64, ptr %low_at
  %high = load i64, ptr %high_at
  %below = icmp slt i64 %signed, %low
  %above = icmp sgt i64 %signed, %high
  %outside = or i1 %below, %above
  br i1 %outside, label %slow, label %integer_inside
integer_inside:
  %minus_one = icmp eq i64 %signed, -1
  br i1 %minus_one, label %integer_error, label %stored
integer_error:
  %signed_error = call ptr @PyErr_Occurred()
  %signed_fits = icmp eq ptr %signed_error, null
  br i1 %signed_fits, label %stored, label %slow

number:
  %double = call double @PyFloat_AsDouble(ptr %value)
  %is_minus_one = fcmp oeq double %double, -1.0
  br i1 %is_minus_one, label %number_error, label %number_fits
number_error:
  %double_error = call ptr @PyErr_Occurred()
  %double_fits = icmp eq ptr %double_error, null
  br i1 %double_fits, label %number_fits, label %slow
number_fits:
  %float = fptrunc double %double to float
  %float_bits = bitcast float %float to i32
  %float_word = zext i32 %float_bits to i64
  %double_word = bitcast double %double to i64
  %is_double = icmp eq i8 %code, {_DOUBLE}
  %number_word = select i1 %is_double, i64 %double_word, i64 %float_word
  br label %stored

stored:
  %content = phi i64 [0, %pointer], [%word, %unsigned_check], [%word, %unsigned_error],
                     [%signed, %integer_inside], [%signed, %integer_error], [%number_word, %number_fits]
  %slot_at = getelementptr i64, ptr %slots, i64 %slot
  store i64 %content, ptr %slot_at
  %next_slot = add i64 %slot, 1
  br label %arguments

ready:
  %nothing = icmp eq i64 %programs, 0
  br i1 %nothing, label %done, label %count_threads
count_threads:
  %wish = load i64, ptr %threads_at
  %parallel = load ptr, ptr @runtime
  %per_thread = load i64, ptr %per_thread_at
  %full_threads = udiv i64 %programs, %per_thread
  %worthwhile = add i64 %full_threads, 1
  %one_worthwhile = icmp eq i64 %worthwhile, 1
  %one_program = icmp eq i64 %programs, 1
  %single = or i1 %one_worthwhile, %one_program
  %one_wished = icmp eq i64 %wish, 1
  %no_parallel = icmp eq ptr %parallel, null
  %not_several = or i1 %single, %one_wished
  %alone = or i1 %not_several, %no_parallel
  br i1 %alone, label %run, label %which_threads
which_threads:
  %torchs = icmp eq i64 %wish, 0
  br i1 %torchs, label %ask_torch, label %threads_known
ask_torch:
  %torch_threads_at = getelementptr ptr, ptr @runtime, i64 3
  %torch_threads = load ptr, ptr %torch_threads_at
  %answer = call ptr @PyObject_CallNoArgs(ptr %torch_threads)
  %no_answer = icmp eq ptr %answer, null
  br i1 %no_answer, label %slow, label %read_answer
read_answer:
  %torchs_number = call i64 @PyLong_AsLongLong(ptr %answer)
  call void @Py_DecRef(ptr %answer)
  br label %threads_known
threads_known:
  %available = phi i64 [%wish, %which_threads], [%torchs_number, %read_answer]
  %enough = icmp ult i64 %programs, %available
  %at_most = select i1 %enough, i64 %programs, i64 %available
  %worth_fewer = icmp ult i64 %worthwhile, %at_most
  %several = select i1 %worth_fewer, i64 %worthwhile, i64 %at_most
  %is_several = icmp sgt i64 %several, 1
  br i1 %is_several, label %run, label %run_alone
run_alone:
  br label %run
run:
  %threads = phi i64 [1, %count_threads], [%several, %threads_known], [1, %run_alone]
  %entry_point = load ptr, ptr %entry_at
  %state = call ptr @PyEval_SaveThread()
  %on_one = icmp eq i64 %threads, 1
  br i1 %on_one, label %run_here, label %run_parallel
run_here:
  call void %entry_point(ptr %frame)
  br label %ran
run_parallel:
  %thread_num_at = getelementptr ptr, ptr @runtime, i64 1
  %num_threads_at = getelementptr ptr, ptr @runtime, i64 2
  %thread_num = load ptr, ptr %thread_num_at
  %num_threads = load ptr, ptr %num_threads_at
  %frame_thread_num = getelementptr ptr, ptr %frame, i64 4
  %frame_num_threads = getelementptr ptr, ptr %frame, i64 5
  store ptr %thread_num, ptr %frame_thread_num
  store ptr %num_threads, ptr %frame_num_threads
  %claims = alloca i64, i64 %threads, align 16
  %claims_size = mul i64 %threads, 8
  call void @llvm.memset.p0.i64(ptr %claims, i8 0, i64 %claims_size, i1 false)
  %frame_claims = getelementptr ptr, ptr %frame, i64 {FRAME_CLAIMS}
  store ptr %claims, ptr %frame_claims
  %threads32 = trunc i64 %threads to i32
  call void %parallel(ptr %entry_point, ptr %frame, i32 %threads32, i32 0)
  br label %ran
ran:
  call void @PyEval_RestoreThread(ptr %state)
  %status_at = getelementptr i64, ptr %frame, i64 {FRAME_STATUS}
  %status = load i64, ptr %status_at
  %well = icmp eq i64 %status, 0
  br i1 %well, label %done, label %failed
failed:
  %report = call ptr @PyBytes_FromStringAndSize(ptr %frame, i64 {8 * FRAME_SLOTS})
  %no_report = icmp eq ptr %report, null
  br i1 %no_report, label %leave, label %fail
fail:
  %raise = call ptr @PyTuple_GetItem(ptr %self, i64 2)
  %raised = call ptr @PyObject_CallOneArg(ptr %raise, ptr %report)
  call void @Py_DecRef(ptr %report)
  ret ptr %raised
leave:
  ret ptr null
done:
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
slow:
  %passed = call ptr @pass_on(ptr %self, ptr %args, i64 %n)
  ret ptr %passed
}}
"""


class Code(Protocol):
    """Machine code of a kernel; see `native.LoadedCode`."""

    address: int
    programs_per_thread: int


class KernelTable:
    """What the machine code has to know of one kernel.

    Args:
        types: Triton's type strings of the arguments as they are passed; constexprs are skipped. What is not known here
            (tuples, descriptors) makes every launch a slow one.
        num_threads: at most this many, or None for torch's number.

    Attributes:
        least_arguments: how many there must be; what follows are constexprs.
    """

    def __init__(self, types: Sequence[Any], num_threads: int | None = None) -> None:
        codes = bytes(_code(type) for type in types)
        # Constants at the end may be left out.
        self.least_arguments = len(codes.rstrip(bytes([_SKIP])))
        slots = len(codes) - codes.count(_SKIP)
        self._content = bytearray(
            _TABLE.pack(0, 0, self.least_arguments, len(codes), slots, num_threads or 0, 1) + codes
        )
        self._code: Code | None = None

    def bind(self, code: Code) -> None:
        """Make launches of this code fast. The first one stays."""
        if self._code is None:
            self._code = code  # its identity must not be another's while this table knows it
            struct.pack_into("=q", self._content, 8, code.address)
            struct.pack_into("=q", self._content, 48, code.programs_per_thread)
            struct.pack_into("=q", self._content, 0, id(code))

    def stock_launch(self, slow: Launch, failed: Callable[[bytes], Any]) -> Launch:
        """Called as Triton calls a launcher: grid x, y, z, stream, code, packed metadata, launch metadata, enter hook,
        exit hook, arguments.

        Args:
            slow: takes the same. Returned as it is where there is no machine code. failed: is given the frame of a
                launch whose status is not 0, as bytes, and raises.
        """
        return self._make(0, slow, failed)

    def direct_launch(self, slow: Launch, failed: Callable[[bytes], Any]) -> Launch:
        """Called with grid x, y, z and the arguments; `bind` comes first. For the rest as `stock_launch`."""
        return self._make(1, slow, failed)

    def _make(self, which: int, slow: Launch, failed: Callable[[bytes], Any]) -> Launch:
        machine = _ready()
        if machine is None:
            return slow
        method = ctypes.byref(machine.methods[which])
        function: Launch = machine.new_function(method, (self._content, slow, failed), None)
        return function


def _code(type: Any) -> int:
    if not isinstance(type, str):
        return _OTHER
    return _POINTER if type.startswith("*") else _CODES.get(type, _OTHER)


class _MethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


class _Machine:
    """The machine code in this process, and what it calls. Stays for the life of the process: any number of functions
    made of it may be around.

    Attributes:
        methods: PyMethodDef of the functions `stock` and `direct`. new_function: PyCFunction_NewEx.
    """

    def __init__(self) -> None:
        self._code = _load_code()
        self.methods = [
            _MethodDef(b"launch", self._code.addresses[name], _METH_FASTCALL, b"Launch a kernel on this CPU.")
            for name in ("stock", "direct")
        ]
        self._runtime = (ctypes.c_uint64 * _RUNTIME_WORDS).from_address(self._code.addresses["runtime"])
        self._kept = [sys.intern("data_ptr"), sys.intern("is_cpu"), sys.intern("calls"), _hook_chain()]
        data_ptr, is_cpu, calls, chain = (id(kept) for kept in self._kept)
        self._runtime[4:] = [data_ptr, is_cpu, ctypes.addressof(WATCHED), chain, calls]
        self._get_num_threads: Any = None
        prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        self.new_function = prototype(("PyCFunction_NewEx", ctypes.pythonapi))

    def use_threads(self, functions: tuple[int, int, int], get_num_threads: Any) -> None:
        parallel, *others = functions
        self._runtime[0] = 0  # nobody may see some of the old and some of the new
        self._runtime[1:4] = [*others, id(get_num_threads)]
        self._get_num_threads = get_num_threads
        self._runtime[0] = parallel

    def forget_threads(self) -> None:
        self._runtime[0] = 0


def _hook_chain() -> Any:
    """The class of Triton's launch hooks, which are there even if there is none; None is no object's class."""
    from triton import knobs

    return getattr(knobs, "HookChain", None)


def _load_code() -> Placed:
    """From the folder where Triton keeps its kernels, or made anew."""
    from triton.runtime.cache import get_cache_manager

    symbols = ("stock", "direct", "runtime")
    try:
        cache = get_cache_manager(hashlib.sha256(f"{platform.machine()}\n{_IR}".encode()).hexdigest())
        path = cache.get_file(_FILE)
    except (OSError, RuntimeError):  # a folder that cannot be written costs each process the compilation
        return place(_compile(), symbols)
    if path:
        try:
            with open(path, "rb") as file:
                return place(file.read(), symbols)
        except (OSError, ValueError, KeyError):
            pass  # not whole: it is replaced
    object_code = _compile()
    with suppress(OSError):
        cache.put(object_code, _FILE)
    return place(object_code, symbols)


def _compile() -> bytes:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    # For any processor of this kind, and libraries at any distance.
    machine = target.create_target_machine(opt=2, reloc="static", codemodel="large")
    module = llvm.parse_assembly(_IR, llvm.create_context())
    module.triple, module.data_layout = target.triple, str(machine.target_data)
    module.verify()
    return bytes(machine.emit_object(module))


_machine: _Machine | None = None
_failure: Exception | None = None
_lock = threading.Lock()


def _ready() -> _Machine | None:
    """The machine code, made or loaded on first use; None where that failed."""
    global _machine, _failure
    if _machine is None and _failure is None:
        with _lock:
            if _machine is None and _failure is None:
                try:
                    _machine = _Machine()
                except Exception as error:  # whatever it is, launches work without
                    _failure = error
    return _machine


def unavailable() -> str | None:
    """Why launches go through Python alone; None where they do not."""
    return None if _ready() else f"{type(_failure).__name__}: {_failure}"


def use_threads(functions: tuple[int, int, int], get_num_threads: Callable[[], int]) -> None:
    """Let launches run on several threads.

    Args:
        functions: addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads.
        get_num_threads: asked at each launch of more than one program.
    """
    if machine := _ready():
        machine.use_threads(functions, get_num_threads)


def _forget_threads() -> None:
    """In a forked child launches run on their own thread alone, and no lock of the parent's is waited for."""
    global _lock
    _lock = threading.Lock()
    if _machine is not None:
        _machine.forget_threads()


os.register_at_fork(after_in_child=_forget_threads)

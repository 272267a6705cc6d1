"""What a process may still ask of the kernel: a seccomp filter that can only be made stricter, never taken off.

The filter lists what is allowed; everything else is a SIGSYS, or, for Python, an error. Afterwards there are no
sockets, no processes but threads, no signals to others, and files cannot be opened, or only for reading. It is
installed by `prctl` through ctypes, so nothing has to be compiled or installed for it (Linux, x86-64 and aarch64).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

__all__ = ["confine", "forbid_new_privileges", "name_of", "unavailable"]

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_KILL, _TRAP, _ERRNO, _ALLOW = 0x80000000, 0x00030000, 0x00050000, 0x7FFF0000
_ENOSYS, _EPERM = 38, 1
# Of BPF: load a word, jump where equal or where one of the bits is set, return.
_LOAD, _IF_EQUAL, _IF_BITS, _RETURN, _IF_AT_LEAST = 0x20, 0x15, 0x45, 0x06, 0x35
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # bytes into `struct seccomp_data`
_X32 = 0x40000000  # numbers of the other ABI of x86-64 have this bit
_CLONE_THREAD = 0x00010000
_PROT_EXEC = 4
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND and the bit of O_TMPFILE, as both architectures have them.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _read(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (pair.split("=") for pair in text.split())}


_NUMBERS = {
    "x86_64": _read(
        "read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 "
        "rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 pread64=17 access=21 select=23 sched_yield=24 "
        "mremap=25 madvise=28 dup=32 nanosleep=35 getpid=39 socket=41 connect=42 sendto=44 bind=49 socketpair=53 "
        "clone=56 fork=57 vfork=58 execve=59 exit=60 wait4=61 kill=62 uname=63 fcntl=72 getcwd=79 chdir=80 rename=82 "
        "mkdir=83 creat=85 unlink=87 readlink=89 gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99 times=100 "
        "ptrace=101 getuid=102 getgid=104 geteuid=107 getegid=108 setrlimit=160 tkill=200 sigaltstack=131 prctl=157 "
        "gettid=186 futex=202 sched_setaffinity=203 sched_getaffinity=204 getdents64=217 set_tid_address=218 "
        "clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 tgkill=234 openat=257 newfstatat=262 "
        "unlinkat=263 readlinkat=267 ppoll=271 set_robust_list=273 prlimit64=302 process_vm_readv=310 "
        "process_vm_writev=311 getcpu=309 seccomp=317 getrandom=318 memfd_create=319 bpf=321 execveat=322 "
        "membarrier=324 statx=332 rseq=334 io_uring_setup=425 clone3=435 openat2=437 faccessat2=439"
    ),
    "aarch64": _read(
        "getcwd=17 dup=23 fcntl=25 ioctl=29 mkdirat=34 unlinkat=35 renameat=38 faccessat=48 chdir=49 openat=56 "
        "close=57 getdents64=61 lseek=62 read=63 write=64 pread64=67 ppoll=73 readlinkat=78 newfstatat=79 fstat=80 "
        "exit=93 exit_group=94 set_tid_address=96 futex=98 set_robust_list=99 nanosleep=101 clock_gettime=113 "
        "clock_getres=114 clock_nanosleep=115 ptrace=117 sched_setaffinity=122 sched_getaffinity=123 sched_yield=124 "
        "kill=129 tkill=130 tgkill=131 sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 times=153 "
        "uname=160 getrlimit=163 setrlimit=164 getrusage=165 prctl=167 getcpu=168 gettimeofday=169 getpid=172 "
        "getuid=174 geteuid=175 getgid=176 getegid=177 gettid=178 sysinfo=179 socket=198 socketpair=199 bind=200 "
        "connect=203 sendto=206 brk=214 munmap=215 mremap=216 clone=220 execve=221 mmap=222 mprotect=226 madvise=233 "
        "wait4=260 prlimit64=261 seccomp=277 getrandom=278 memfd_create=279 bpf=280 execveat=281 membarrier=283 "
        "statx=291 rseq=293 io_uring_setup=425 clone3=435 openat2=437 faccessat2=439"
    ),
}
# Memory, time, locks, threads, and what an interpreter asks about itself.
_HARMLESS = (
    "read close fstat lseek poll ppoll select munmap mremap brk madvise rt_sigprocmask rt_sigreturn "
    "sched_yield sched_getaffinity nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday times getpid "
    "gettid getuid geteuid getgid getegid uname getrusage sysinfo getcpu getrandom futex set_robust_list "
    "set_tid_address sigaltstack membarrier rseq exit exit_group"
).split()
_READING = "open openat stat lstat newfstatat statx readlink readlinkat access faccessat getdents64 getcwd pread64"
# What libraries try, and do without.
_REFUSED = {
    **dict.fromkeys(("clone3", "statx", "faccessat2", "openat2"), _ENOSYS),
    **dict.fromkeys(("ioctl", "sched_setaffinity", "prctl", "rt_sigaction", "fcntl", "dup"), _EPERM),
}

_Instruction = tuple[int, int, int, int]  # code, jump where true, jump where false, operand


def unavailable() -> str | None:
    """Why there can be no filter here; None where there can."""
    if not sys.platform.startswith("linux"):
        return f"seccomp is of Linux, and this is {sys.platform}"
    if platform.machine() not in _MACHINES:
        return f"no filter is written for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    # With a null filter it fails with EFAULT where there is seccomp, and changes nothing.
    libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_void_p(None), 0, 0)
    error = ctypes.get_errno()
    return None if error == 14 else f"this kernel has no seccomp filters ({os.strerror(error)})"


def name_of(number: int) -> str:
    """What a system call is called on this machine."""
    names = _NUMBERS.get(platform.machine(), {})
    return next((name for name, value in names.items() if value == number), f"number {number}")


def forbid_new_privileges() -> None:
    """From now on no program that this process becomes has more rights than it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")


def confine(*, write_to: tuple[int, ...], is_python: bool = False) -> None:
    """Installs the filter for this process, which has one thread; its threads inherit it.

    Args:
        write_to: the file descriptors that it may still write to.
        is_python: whether it may open files for reading, as to import a module, and map new code, as torch does.

    Raises OSError where the kernel does not take the filter.
    """
    forbid_new_privileges()
    program = _program(_NUMBERS[platform.machine()], _MACHINES[platform.machine()], write_to, is_python)
    packed = b"".join(struct.pack("=HBBI", *one) for one in program)
    content = ctypes.create_string_buffer(packed, len(packed))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(content)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(header), 0, 0):
        raise OSError(ctypes.get_errno(), "the seccomp filter is refused")


def _program(
    numbers: dict[str, int], architecture: int, write_to: tuple[int, ...], is_python: bool
) -> list[_Instruction]:
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]

    def when(name: str, body: list[_Instruction]) -> None:
        if name in numbers:
            program.append((_IF_EQUAL, 0, len(body), numbers[name]))
            program.extend(body)

    allow: list[_Instruction] = [(_RETURN, 0, 0, _ALLOW)]
    # An interpreter's libraries try much that they do without; what is forbidden fails there and goes on.
    trap: list[_Instruction] = [(_RETURN, 0, 0, _ERRNO | _EPERM if is_python else _TRAP)]
    for name in (*_HARMLESS, *(_READING.split() if is_python else ())):
        if name not in ("open", "openat"):
            when(name, allow)
    if is_python:
        for name, flags in (("open", 1), ("openat", 2)):
            when(name, [_argument(flags), (_IF_BITS, 1, 0, _WRITING), *allow, *trap])
    when("write", [_argument(0), *(step for fd in write_to for step in ((_IF_EQUAL, 0, 1, fd), *allow)), *trap])
    for name in ("mmap", "mprotect"):  # memory, but no new code
        when(name, allow if is_python else [_argument(2), (_IF_BITS, 1, 0, _PROT_EXEC), *allow, *trap])
    # A thread, and no process; a signal to itself, as of `abort`; limits are asked for, not set.
    when("clone", [_argument(0), (_IF_BITS, 0, 1, _CLONE_THREAD), *allow, *trap])
    when("tgkill", [_argument(0), (_IF_EQUAL, 0, 1, os.getpid()), *allow, *trap])
    when(
        "prlimit64",
        [_argument(2), (_IF_EQUAL, 0, 3, 0), _argument(2, high=True), (_IF_EQUAL, 0, 1, 0), *allow, *trap],
    )
    for name, error in _REFUSED.items():
        if not (is_python and name == "statx"):
            when(name, [(_RETURN, 0, 0, _ERRNO | error)])
    return program + trap


def _argument(index: int, *, high: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index + 4 * high)

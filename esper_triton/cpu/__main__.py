"""`python -m esper_triton.cpu --check` and `--explain FILE:KERNEL`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from esper_triton.command_output import run_command
from esper_triton.cpu.errors import CPUBackendError, UsageError

if TYPE_CHECKING:
    from esper_triton.cpu.explain import Explanation
    from esper_triton.cpu.selftest import Outcome


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it."""
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m esper_triton.cpu",
        description="The CPU backend for Triton: what it finds on this machine, and what it makes of a kernel.",
        allow_abbrev=False,
    )
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--check", action="store_true", help="tell what was found here, and run a self-test")
    wish.add_argument("--explain", metavar="FILE:KERNEL", help="tell what a @triton.jit function is compiled to")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=TYPE|VALUE",
        help="type of a parameter, such as x_ptr=*fp16 (*fp16:1 where it is not aligned), or its value; "
        "else *fp32 for what is used as a pointer, i32 for the rest",
    )
    parser.add_argument("--constexpr", action="append", default=[], metavar="NAME=VALUE", help="such as BLOCK=1024")
    parser.add_argument("--show", metavar="LIST", help="of ttir,llir,asm,accesses; all where it is left out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 where the self-test failed, nothing can be compiled here, or the kernel does not
    compile; 2 on bad input. An error is a line of stderr."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.check and (options.arg or options.constexpr or options.show is not None):
        parser.error("--arg, --constexpr and --show belong to --explain")
    try:
        from esper_triton.cpu.check import check_environment

        check_environment()
        return _check(options.json) if options.check else _explain(options)
    except CPUBackendError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, UsageError) else 1


def _check(as_json: bool) -> int:
    from esper_triton.cpu import selftest
    from esper_triton.cpu.check import findings

    found = findings()
    if not as_json:
        _print_findings(found)
    outcomes = selftest.run()
    if as_json:
        tests = [{**asdict(one), "ok": not one.failure} for one in outcomes]
        sys.stdout.write(json.dumps({**found, "self-test": tests}, indent=1) + "\n")
    else:
        _print_outcomes(outcomes)
    return 1 if any(one.failure for one in outcomes) else 0


def _explain(options: argparse.Namespace) -> int:
    from esper_triton.cpu.explain import explain, sections

    chosen = sections(options.show)
    explanation = explain(options.explain, options.arg, options.constexpr)
    if options.json:
        sys.stdout.write(json.dumps(explanation.as_json(chosen), indent=1) + "\n")
    else:
        _print_explanation(explanation, chosen)
    return 0


def _print(title: str, table: Any) -> None:
    from rich.console import Console

    sys.stdout.write(f"{title}\n")  # not as the table's own, which is folded where the table is narrow
    # Piped, a line must hold a whole row: rich would fold it at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    return table


def _print_findings(found: dict[str, dict[str, Any]]) -> None:
    for title, group in found.items():
        table = _table()
        for name, value in group.items():
            table.add_row(name, _told(value))
        _print(title, table)


def _told(value: Any) -> str:
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case dict():
            lacks = [name for name, there in value.items() if not there]
            has = " ".join(name for name, there in value.items() if there)
            return has + (f" (not {' '.join(lacks)})" if lacks else "")
        case list():
            return " ".join(map(str, value))
    return str(value)


def _print_outcomes(outcomes: Iterable[Outcome]) -> None:
    table = _table("kernel", "", "ms to compile and run")
    for one in outcomes:
        table.add_row(one.name, f"failed: {one.failure}" if one.failure else "ok", f"{one.seconds * 1e3:,.0f}")
    _print("self-test", table)


def _print_explanation(explanation: Explanation, chosen: Sequence[str]) -> None:
    from esper_triton.cpu.explain import SECTIONS

    place = f"{explanation.file}:{explanation.line}"
    arguments = _table("parameter", "type or value", "from")
    for argument in explanation.arguments:
        arguments.add_row(argument.name, str(argument), argument.why)
    _print(f"{explanation.kernel} ({place}), compiled for", arguments)
    for section in chosen:
        if section != "accesses":
            sys.stdout.write(f"\n==== {SECTIONS[section]} ====\n{getattr(explanation, section).rstrip()}\n")
            continue
        table = _table("line", "source", "operation", "type", "emitted as")
        for access in explanation.accesses:
            line = "?" if access.line is None else str(access.line)
            if access.file is not None and access.file != explanation.file:
                line = f"{access.file}:{line}"
            forms = "\n".join(map(str, access.forms)) or "nothing: it is not used"
            table.add_row(line, access.source or "", access.operation, access.type, forms)
        _print("\n==== accesses ====", table)


if __name__ == "__main__":
    run_command(main)

"""What the command lines about a store have in common: errors of one line, and commands that are given the store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from esper_triton.urza import Urza

__all__ = ["AddCommand", "OneLineParser", "commands_of", "failed", "parser_of"]

Run = Callable[["Urza", argparse.Namespace], int]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """One line, without the usage above it."""
        self.exit(2, f"error: {message}; see --help\n")


class AddCommand(Protocol):
    """Adds a command by name: what runs it with the store and the options, and a line about it."""

    def __call__(self, name: str, run: Run, about: str) -> argparse.ArgumentParser: ...


def failed(error: BaseException, code: int) -> int:
    """Writes the error as a line of stderr. Returns the exit code."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return code


def parser_of(prog: str, about: str, epilog: str) -> OneLineParser:
    """A parser of commands, whose epilog keeps its lines."""
    return OneLineParser(
        prog=prog,
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def commands_of(parser: OneLineParser, common: OneLineParser) -> AddCommand:
    """Adds commands to `parser`, each with the options of `common` and the parser's epilog. `options.command` is then
    what runs the one that was given."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)

    def add(name: str, run: Run, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            parents=[common],
            help=about,
            description=about,
            epilog=parser.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(command=run)
        return added

    return add

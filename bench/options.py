"""What the benchmarks' command lines have in common."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["made_folder", "names_of", "numbers"]


def made_folder(text: str) -> Path:
    """The type of an option that takes a folder for results. Made at once: not to be had, it ends the program before
    hours of work and not after them."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no such folder can be made: {error}") from None
    return path


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these names, with commas between them."""
    names = list(known)

    def read(text: str) -> list[str]:
        found = text.split(",")
        if unknown := sorted(set(found) - set(names)):
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are: {', '.join(names)}")
        return found

    return read


def numbers(text: str) -> list[int]:
    """The type of an option that takes numbers from 1 on, with commas between them."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on with commas, found {text!r}")
    return [int(part) for part in text.split(",")]

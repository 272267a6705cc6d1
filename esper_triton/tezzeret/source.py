"""A blueprint's Triton source, as a module that exists in memory only."""

from __future__ import annotations

import linecache
from types import ModuleType

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.manifest import sha256

__all__ = ["load_source"]


def load_source(blueprint: Blueprint) -> ModuleType:
    """Runs `blueprint.source_text` and returns the module: exactly that text, whatever its file holds by now.

    The lines are given to `linecache`, where Triton (by `inspect.getsource`) and tracebacks find them. The name under
    which they stand there depends on nothing but the text and the source's file name: Triton writes it into the IR and
    the debug information of a binary, which have to be the same wherever a blueprint lies. Nothing is put on disk or
    into `sys.modules`, so threads may load at the same time. Raises BlueprintError where the source does not run.
    """
    text = blueprint.source_text
    digest = sha256(text.encode())[:12]
    filename = f"<source {digest}>/{blueprint.source}"
    # No modification time: `linecache.checkcache` keeps such an entry though no such file exists.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = ModuleType(f"esper_source_{digest}")
    module.__file__ = filename
    try:
        exec(compile(text, filename, "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BlueprintError(
            f"blueprint {blueprint.name!r}: its source {blueprint.source} does not run: {type(error).__name__}: {error}"
        ) from error
    return module

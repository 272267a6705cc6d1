"""`python -m esper_triton.urza`: what people ask of a store and do to it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from esper_triton.command_output import run_command
from esper_triton.contracts.errors import ArtifactNotFound, EsperError, InvalidCommit, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.query import Change, KernelMatch, KernelQuery
from esper_triton.urza import Urza, default_root
from esper_triton.urza.carrying import Imported, carry
from esper_triton.urza.command_line import OneLineParser, commands_of, failed, parser_of
from esper_triton.urza.elsewhere import elsewhere

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["main"]

Progress = Callable[[int, int], None]

_EXIT = """exit codes:
  0  done; with `verify`, nothing is wrong
  1  something is wrong with the store, an artifact or an archive
  2  the command line is wrong, or the store or a file cannot be read or written
"""
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code that --help documents. An error is a line of stderr."""
    options = _parser().parse_args(argv)
    root = options.urza or default_root()
    try:
        if options.command in (_serve, _sign) and elsewhere(root) is not None:
            raise ValueError(f"{root}: only a directory can be served, and signed for: do it where that is")
        store = _opened(root, options, trust=options.trust, keys=options.keys)
    except (ValueError, StoreUnavailable) as error:
        return failed(error, 2)
    command: Callable[[Urza, argparse.Namespace], int] = options.command
    try:
        if command not in (_import, _pull, _serve):
            _note_where_there_is_none(store)
        return command(store, options)
    except _Misused as error:
        return failed(error, 2)
    except EsperError as error:
        return failed(error, 2 if isinstance(error, StoreUnavailable) else 1)
    finally:
        store.close()


def _opened(root: str | Path, options: argparse.Namespace, **more: Any) -> Urza:
    if elsewhere(root) is None:
        return Urza(root, **more)
    token = None
    if options.token_file is not None:
        try:
            token = options.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreUnavailable(f"token file {options.token_file} cannot be read: {error}") from error
        if len(token.split()) != 1:
            raise ValueError(f"token file {options.token_file}: one token was expected, and nothing else")
    if str(root).startswith(("https://", "http://")):
        more |= {"token": token, "ca": options.ca}
    store = Urza(root, cache=options.cache, **more)
    store.on_event(lambda event: sys.stderr.write(f"note: {event.message}\n") if event.kind == "degraded" else None)
    return store


def _note_where_there_is_none(store: Urza) -> None:
    if elsewhere(store.location) is None and not store.root.exists():
        sys.stderr.write(f"note: there is no store at {store.root} yet\n")


class _Misused(ValueError):
    """The command line is wrong in a way that only the command finds."""


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "python -m esper_triton.urza", "Look into a store of compiled artifacts, check it, and keep it in order.", _EXIT
    )
    common = OneLineParser(add_help=False)
    common.add_argument(
        "--urza",
        default=None,
        metavar="DIR|URL",
        help="the store: a directory, https://... or s3://...; else $ESPER_URZA or ~/.cache/esper/urza",
    )
    common.add_argument(
        "--trust", default="local", metavar="POLICY", help="local (default), unsigned-ok, or keys:prover=HEX,forge=HEX"
    )
    common.add_argument("--keys", metavar="DIR", help="where the store's own keys are, if not in its keys/")
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument(
        "--cache", type=Path, metavar="DIR", help="of a URL; else one in $ESPER_CACHE or ~/.cache/esper"
    )
    common.add_argument("--ca", type=Path, metavar="FILE", help="certificates to trust for a URL, not the system's")
    common.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="with the token for a URL, else in $ESPER_URZA_TOKEN; for serve: ROLE[,ROLE] TOKEN on each line, where "
        "ROLE is read, write or validate",
    )
    add = commands_of(parser, common)

    ls = add("ls", _ls, "the artifacts that fit, the fastest first")
    ls.add_argument("--status", action="append", metavar="STATUS", help="VALIDATED and the like; all where not given")
    ls.add_argument("--blueprint", metavar="SHA256", help="made from this blueprint; its first 12 digits do")
    ls.add_argument("--target", metavar="TARGET", help="cpu, cuda90, ...")
    ls.add_argument("--tag", action="append", default=[], metavar="TAG", help="with this tag; may be repeated")
    ls.add_argument("--limit", type=int, default=50, metavar="N", help="the most that are shown (50)")
    show = add("show", _show, "one artifact: its manifest, record, signature and history")
    show.add_argument("id", metavar="ID")
    add("verify", _verify, "read every byte and signature, and the audit log from its first line")
    gc = add("gc", _gc, "remove what no artifact needs and, down to --max-bytes, artifacts")
    gc.add_argument("--max-bytes", type=_size, metavar="SIZE", help="such as 500M or 2G; of these least used ones go")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    pin = add("pin", _pin, "keep an artifact whatever gc is asked for; without ID, list those that are kept")
    pin.add_argument("id", metavar="ID", nargs="?")
    pin.add_argument("--remove", action="store_true", help="keep it no longer")
    history = add("history", _history, "every change of status of an artifact, or of all of a blueprint's")
    history.add_argument("id", metavar="ID|BLUEPRINT")
    export = add("export", _export, "write artifacts, by default all, into one archive")
    export.add_argument("file", metavar="FILE")
    export.add_argument("ids", metavar="ID", nargs="*")
    import_ = add("import", _import, "store the artifacts of an archive, after all of it has been verified")
    import_.add_argument("file", metavar="FILE")
    import_.add_argument(
        "--resign",
        action="store_true",
        help="take what nobody trusted has signed, as unproven; proving it runs its code, so know where it is from",
    )
    for name, run, about in (
        ("push", _push, "store this store's artifacts, by default all, in another: a URL or a directory"),
        ("pull", _pull, "store another's artifacts, by default all, in this store"),
    ):
        carried = add(name, run, about)
        carried.add_argument("other", metavar="DIR|URL")
        carried.add_argument("ids", metavar="ID", nargs="*")
        carried.add_argument("--other-trust", default="local", metavar="POLICY", help="as --trust, of the other store")
        carried.add_argument(
            "--resign",
            action="store_true",
            help="what the receiver does not trust is taken as unproven; proving it runs its code",
        )
    serve = add("serve", _serve, "let other machines read and write the store, over HTTPS")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8443, help="8443; 0 takes one that is free")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM)")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    serve.add_argument("--insecure", action="store_true", help="other addresses without TLS: tokens can be read there")
    serve.add_argument("--max-object", type=_size, default=256 << 20, metavar="SIZE", help="the largest object (256M)")
    serve.add_argument("--rate", type=float, default=200.0, metavar="N", help="requests a second of each token (200)")
    sign = add("sign", _sign, "sign what an older release has stored, if you know it to be yours")
    sign.add_argument("ids", metavar="ID", nargs="*", help="by default all that are not signed")
    return parser


def _ls(store: Urza, options: argparse.Namespace) -> int:
    statuses = tuple(KernelStatus) if options.status is None else tuple(options.status)
    try:
        query = KernelQuery(
            statuses=statuses,
            blueprint_id=_whole_blueprint(store, options.blueprint),
            target=options.target,
            required=tuple(options.tag),
            limit=options.limit,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = {"statuses": "status", "blueprint_id": "blueprint", "required": "tag"}
        name = str(first["loc"][0])
        raise _Misused(f"argument --{option.get(name, name)}: {first['input']!r}: {first['msg']}") from None
    found = store.query(query)
    if options.json:
        return _print_json({"artifacts": [match.model_dump(mode="json") for match in found]})
    table = _table(("artifact", "blueprint", "status", "tags"), ("dims", "latency us", "bytes", "uses"))
    for match in found:
        table.add_row(match.id, match.blueprint_name, match.status.value, " ".join(match.tags), *_numbers(match))
    _print(table)
    shown = "" if len(found) < options.limit else f"; there may be more than --limit {options.limit}"
    sys.stdout.write(f"{_count(len(found), 'artifact')} in {store.location}{shown}\n")
    return 0


def _whole_blueprint(store: Urza, begin: str | None) -> str | None:
    """A blueprint's id by its first digits, as artifacts' ids have 12 of them."""
    if begin is None or not re.fullmatch(r"[0-9a-f]{12,63}", begin):
        return begin
    for artifact_id in store.ids():
        if artifact_id.startswith(begin[:12]):
            whole = store.get(artifact_id).manifest.blueprint_id
            if whole.startswith(begin):
                return whole
    return begin.ljust(64, "0")  # which is nobody's


def _show(store: Urza, options: argparse.Namespace) -> int:
    artifact, record = store.get(options.id), store.record(options.id)
    changes = store.history(artifact.id)
    match = store.match(artifact.id)
    if options.json:
        body = {
            "digest": artifact.digest,
            "manifest": artifact.manifest.model_dump(mode="json"),
            "record": record.model_dump(mode="json"),
            "pinned": artifact.id in store.pins(),
            "uses": None if match is None else match.uses,
            "lineages": [] if match is None else list(match.lineages),
            "history": [change.model_dump(mode="json") for change in changes],
        }
        return _print_json(body)
    manifest = artifact.manifest
    table = _table(("", "what"), ())
    figures = record.figures
    signature = record.signature
    for name, value in (
        ("artifact", artifact.id),
        ("manifest", artifact.digest),
        ("blueprint", f"{manifest.blueprint_name} ({manifest.blueprint_id})"),
        ("status", manifest.status.value),
        ("signed by", "nobody" if signature is None else f"{signature.role}, key {signature.key}"),
        ("tags", " ".join(record.tags) or "-"),
        ("latency us", "-" if figures.latency_us is None else f"{figures.latency_us:,.1f}"),
        ("memory bytes", "-" if figures.memory_bytes is None else f"{figures.memory_bytes:,}"),
        ("target", f"{manifest.target.label} {manifest.target.arch}"),
        ("dims", " ".join(f"{key}={size}" for key, size in manifest.dims.items()) + f" {manifest.dtype}"),
        ("toolchain", " ".join(f"{key} {version}" for key, version in manifest.toolchain.model_dump().items())),
        ("compiled", f"{manifest.created_at}, in {manifest.compile_seconds:.2f} s"),
        ("kept", ", ".join(["pinned"] * (artifact.id in store.pins()) + list(match.lineages if match else ())) or "-"),
        ("uses", "-" if match is None else f"{match.uses:,}"),
    ):
        table.add_row(name, value)
    for kernel in manifest.kernels.values():
        table.add_row(f"kernel {kernel.name}", f"{kernel.binary_kind} {kernel.binary}")
    _print(table)
    _print(_change_table(changes))
    return 0


def _verify(store: Urza, options: argparse.Namespace) -> int:
    with _progress("verifying") as progress:
        verified = store.verify(progress)
    if options.json:
        _print_json(asdict(verified))
    else:
        if verified.faults:
            table = _table(("of", "fault"), ())
            for fault in verified.faults:
                table.add_row(fault.subject, fault.message)
            _print(table)
        sys.stdout.write(
            f"{_place(store)}: {_count(verified.artifacts, 'artifact')}, {_count(verified.objects, 'object')} "
            f"({verified.size_bytes:,} bytes), {_count(verified.entries, 'line')} of the audit log: "
            f"{_count(len(verified.faults), 'fault') if verified.faults else 'no faults'}\n"
        )
    return 1 if verified.faults else 0


def _place(store: Urza) -> str:
    """Whose bytes were looked at."""
    return str(store.root) if elsewhere(store.location) is None else f"{store.root}, the cache of {store.location}"


def _gc(store: Urza, options: argparse.Namespace) -> int:
    try:
        with _progress("collecting") as progress:
            done = store.gc(options.max_bytes, dry_run=options.dry_run, progress=progress)
    except InvalidCommit as error:  # a URL
        raise _Misused(str(error)) from error
    if options.json:
        return _print_json(asdict(done))
    table = _table(("artifact", "what became of it"), ())
    for artifact_id in done.removed:
        table.add_row(artifact_id, "would be removed" if done.dry_run else "removed")
    for reason, ids in done.kept.items():
        for artifact_id in ids:
            table.add_row(artifact_id, f"kept: {reason}")
    if table.row_count:
        _print(table)
    over = f", {done.over_bytes:,} more than allowed" if done.over_bytes else ""
    removed = ", ".join(
        _count(number, what)
        for number, what in (
            (len(done.removed), "artifact"),
            (done.objects, "object"),
            (done.requests, "request"),
            (done.freed_bytes, "byte"),
        )
    )
    sys.stdout.write(
        f"{'would remove' if done.dry_run else 'removed'} {removed}; {done.kept_bytes:,} bytes are left{over}\n"
    )
    return 0


def _pin(store: Urza, options: argparse.Namespace) -> int:
    if options.remove:
        if options.id is None:
            raise _Misused("--remove needs the ID of what is to be kept no longer")
        if not store.unpin(options.id):
            raise ArtifactNotFound(f"{options.id!r} is not pinned in {store.location}")
    elif options.id is not None:
        store.pin(options.id)
    pins = store.pins()
    if options.json:
        return _print_json({"pins": pins})
    sys.stdout.write("".join(f"{pin}\n" for pin in pins) or "nothing is pinned\n")
    return 0


def _history(store: Urza, options: argparse.Namespace) -> int:
    changes = store.history(options.id)
    if not changes:
        if re.fullmatch(r"[0-9a-f]{12,64}", options.id):
            raise ArtifactNotFound(f"no artifact of blueprint {options.id} was ever in {store.location}")
        store.get(options.id)  # says that there is none
    if options.json:
        return _print_json({"history": [change.model_dump(mode="json") for change in changes]})
    _print(_change_table(changes))
    return 0


def _export(store: Urza, options: argparse.Namespace) -> int:
    with _progress("exporting") as progress:
        count, size_bytes = store.export(options.file, options.ids or None, progress)
    if options.json:
        return _print_json({"file": options.file, "artifacts": count, "size_bytes": size_bytes})
    sys.stdout.write(f"{_count(count, 'artifact')}, {size_bytes:,} bytes: {options.file}\n")
    return 0


def _import(store: Urza, options: argparse.Namespace) -> int:
    with _progress("importing") as progress:
        done = store.import_(options.file, resign=options.resign, progress=progress)
    return _print_carried(done, options)


def _print_carried(done: Imported, options: argparse.Namespace) -> int:
    if options.json:
        return _print_json(asdict(done))
    for ids, what in ((done.taken, "stored"), (done.unproven, "stored as unproven"), (done.kept, "was there")):
        sys.stdout.write("".join(f"{one} {what}\n" for one in ids))
    if not done.taken + done.unproven + done.kept:
        sys.stdout.write("there was nothing to store\n")
    return 0


def _sign(store: Urza, options: argparse.Namespace) -> int:
    ids = options.ids or [one for one in store.ids() if store.is_unsigned(one)]
    with _progress("signing") as progress:
        for count, artifact_id in enumerate(ids, start=1):
            store.sign(artifact_id)
            progress(count, len(ids))
    if options.json:
        return _print_json({"signed": ids})
    sys.stdout.write("".join(f"{one} signed\n" for one in ids) or "every artifact is signed\n")
    return 0


def _push(store: Urza, options: argparse.Namespace) -> int:
    return _carry(store, options, push=True)


def _pull(store: Urza, options: argparse.Namespace) -> int:
    return _carry(store, options, push=False)


def _carry(store: Urza, options: argparse.Namespace, *, push: bool) -> int:
    try:
        if elsewhere(options.other) is not None and elsewhere(store.location) is not None:
            raise ValueError(f"{store.location} and {options.other} are both URLs; one of two must be a directory")
        other = _opened(options.other, options, trust=options.other_trust)
    except ValueError as error:
        raise _Misused(str(error)) from error
    try:
        if not push:
            _note_where_there_is_none(other)
        with _progress("pushing" if push else "pulling") as progress:
            source, target = (store, other) if push else (other, store)
            done = carry(source, target, options.ids or None, resign=options.resign, progress=progress)
    finally:
        other.close()
    return _print_carried(done, options)


def _serve(store: Urza, options: argparse.Namespace) -> int:
    import ssl

    from esper_triton.urza.server import Limits, serve
    from esper_triton.urza.tokens import read_tokens

    def announce(url: str) -> None:
        sys.stdout.write(json.dumps({"url": url}) + "\n" if options.json else f"serving {store.root} at {url}\n")
        sys.stdout.flush()

    try:
        if options.token_file is None:
            raise ValueError("--token-file is needed: a server without tokens would answer nobody")
        if (options.tls_cert is None) != (options.tls_key is None):
            raise ValueError("--tls-cert and --tls-key are needed together")
        if options.tls_cert is None and options.host not in ("127.0.0.1", "::1", "localhost") and not options.insecure:
            raise ValueError(
                f"--host {options.host} needs --tls-cert and --tls-key, or --insecure behind a proxy's TLS"
            )
        if not options.rate > 0:
            raise ValueError(f"--rate {options.rate}: a number above 0 was expected")
        tokens = read_tokens(options.token_file)
        tls = None
        if options.tls_cert is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                tls.load_cert_chain(options.tls_cert, options.tls_key)
            except OSError as error:
                named = f"--tls-cert {options.tls_cert} and --tls-key {options.tls_key}"
                raise ValueError(f"{named} cannot be used: {error.strerror or error}") from error
        limits = Limits(object_bytes=options.max_object, per_second=options.rate, burst=max(1, int(options.rate * 5)))
        serve(store, tokens, host=options.host, port=options.port, tls=tls, limits=limits, announce=announce)
    except StoreUnavailable:
        raise
    except (OSError, ValueError, OverflowError) as error:
        return failed(error, 2)
    return 0


# ---- printing


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _print_json(body: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(body, indent=1) + "\n")
    return 0


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table()
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def _change_table(changes: Sequence[Change]) -> Table:
    table = _table(("when", "artifact", "what", "from", "to", "by"), ())
    for change in changes:
        table.add_row(
            change.when[:19].replace("T", " "),
            change.artifact_id,
            change.what,
            change.source or "-",
            change.target or "-",
            change.role or "-",
        )
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # Piped, a line must hold a whole id: rich would fold it at 80 columns.
    Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False).print(table)


def _numbers(match: KernelMatch) -> Iterator[str]:
    yield " ".join(f"{name}={size}" for name, size in match.dims.items())
    yield "-" if match.figures.latency_us is None else f"{match.figures.latency_us:,.1f}"
    yield f"{match.size_bytes:,}"
    yield f"{match.uses:,}"


@contextmanager
def _progress(doing: str) -> Iterator[Progress]:
    """A bar on stderr, where people look and pipes do not; it goes when the work is done."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(doing, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in _UNITS else (text, "")
    try:
        size = int(number) * _UNITS.get(unit, 1)
    except ValueError:
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 1000000, 500M or 2G")
    return size


if __name__ == "__main__":
    run_command(main)

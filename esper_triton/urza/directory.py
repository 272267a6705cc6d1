"""The directory under a store: bytes on disk that are whole or not there, and bytes that are set aside.

Everything is opened relative to an already opened folder and never through a symbolic link, so nothing below the root
can lead a reader or a writer out of it. Knows digests and file names, and nothing of artifacts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.manifest import sha256

__all__ = ["Damage", "Directory", "object_parts"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a named pipe that somebody left in the place of an object must not wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def object_parts(digest: str) -> tuple[str, str, str]:
    """Where the object `digest` lies below the root. 256 folders keep each one short enough to list."""
    return ("objects", digest[:2], digest[2:])


class Damage(Exception):
    """What was read is not what was written. Internal: the library turns it into CorruptObject.

    Attributes:
        parts: the file at fault, below the root. what: its part in the artifact, such as "binary of kernel 'forward'".
        reason: one phrase. expected, found: hex SHA-256, found None where nothing was hashed. size_bytes: as found.
        missing: there is no file, hence nothing to set aside.
    """

    def __init__(
        self,
        parts: tuple[str, ...],
        what: str,
        reason: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        size_bytes: int | None = None,
        missing: bool = False,
    ) -> None:
        super().__init__(f"{what} {reason}")
        self.parts, self.what, self.reason = parts, what, reason
        self.expected, self.found, self.size_bytes, self.missing = expected, found, size_bytes, missing


class Directory:
    """Files under `root`. `write` and `set_aside` may be called only inside `lock()`; reading needs no lock."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive among all processes and threads; makes the root if need be. Raises StoreUnavailable.

        The kernel drops the lock with its holder, so a crash leaves nothing locked. Only the holder writes to `tmp/`:
        what lies there when the lock is taken was left by a writer that died, and is removed.
        """
        with self._translated("be opened for writing"):
            made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            for folder in made:
                with self._opened(os.open(folder.parent, _FOLDER)) as parent:
                    os.fsync(parent)
            with self._folder(()) as root:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open("lock", flags, 0o644, dir_fd=root)
        with self._opened(descriptor):
            with self._translated("be locked"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                with self._translated("be cleared of unfinished files"), self._folder(("tmp",), create=True) as tmp:
                    for name in os.listdir(tmp):
                        os.unlink(name, dir_fd=tmp)
                yield
            finally:
                # Closing would not do: a child forked meanwhile would share the descriptor, and hold the lock with it.
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def read(self, parts: tuple[str, ...], what: str, *, limit_bytes: int) -> bytes:
        """The bytes of one regular file. Raises FileNotFoundError, Damage (not a file, too large), StoreUnavailable."""
        *folders, name = parts
        with self._translated("be read", missing_ok=True), self._folder(folders) as folder:
            try:
                descriptor = os.open(name, _READ, dir_fd=folder)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise Damage(parts, what, "is a symbolic link, which is never followed") from error
                raise
            with self._opened(descriptor):
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise Damage(parts, what, "is not a regular file")
                if found.st_size > limit_bytes:
                    reason = f"is too large: {found.st_size} bytes, at most {limit_bytes} are allowed"
                    raise Damage(parts, what, reason, size_bytes=found.st_size)
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(limit_bytes + 1)

    def read_object(self, digest: str, what: str, *, limit_bytes: int) -> bytes:
        """The bytes whose SHA-256 is `digest`, hashed on this call. Raises Damage, StoreUnavailable."""
        parts = object_parts(digest)
        try:
            content = self.read(parts, what, limit_bytes=limit_bytes)
        except FileNotFoundError:
            reason = f"is missing: no object has the SHA-256 {digest}"
            raise Damage(parts, what, reason, expected=digest, missing=True) from None
        except Damage as damage:
            damage.expected = digest
            raise
        found = sha256(content)
        if found != digest:
            reason = f"is corrupt: SHA-256 expected {digest}, found {found} ({len(content)} bytes)"
            raise Damage(parts, what, reason, expected=digest, found=found, size_bytes=len(content))
        return content

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder of the root; none where it has not been made. Raises StoreUnavailable."""
        try:
            with self._translated("be listed", missing_ok=True), self._folder((folder,)) as opened:
                return sorted(os.listdir(opened))
        except FileNotFoundError:
            return []

    def write(self, parts: tuple[str, ...], content: bytes) -> None:
        """Puts `content` in place in one step, on stable storage when this returns. Raises StoreUnavailable."""
        *folders, name = parts
        with (
            self._translated("be written"),
            self._folder(("tmp",), create=True) as tmp,
            self._folder(folders, create=True) as folder,
        ):
            unfinished = secrets.token_hex(8)
            try:
                with open(os.open(unfinished, _CREATE, 0o644, dir_fd=tmp), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # before the rename: the name must never show bytes that are not there yet
                os.replace(unfinished, name, src_dir_fd=tmp, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=tmp)
                raise
            os.fsync(folder)  # else a power cut could take the name back after a later file came to rely on it

    def write_object(self, content: bytes, *, limit_bytes: int) -> str:
        """Stores `content`, in the place of a damaged one too, and returns its SHA-256. Raises StoreUnavailable."""
        digest = sha256(content)
        parts = object_parts(digest)
        try:
            self.read_object(digest, "object", limit_bytes=limit_bytes)
        except Damage as damage:
            self.set_aside(damage, None)
            self.write(parts, content)
            return digest
        with self._translated("be written"), self._folder(parts[:-1]) as folder:
            os.fsync(folder)  # its writer may have died between the rename and this
        return digest

    def set_aside(self, damage: Damage, artifact_id: str | None) -> Path | None:
        """Moves the file at fault to `quarantine/`, a JSON report beside it. None where there is nothing to move."""
        if damage.missing:
            return None
        *folders, name = damage.parts
        aside = f"{''.join(damage.parts[1:])}.{time.time_ns()}"
        with (
            self._translated("be moved to quarantine"),
            self._folder(folders) as source,
            self._folder(("quarantine",), create=True) as quarantine,
        ):
            os.rename(name, aside, src_dir_fd=source, dst_dir_fd=quarantine)
            os.fsync(quarantine)
            os.fsync(source)
        report = {
            "when": datetime.now(UTC).isoformat(),
            "file": "/".join(damage.parts),
            "artifact": artifact_id,
            "what": damage.what,
            "reason": damage.reason,
            "expected": damage.expected,
            "found": damage.found,
            "size_bytes": damage.size_bytes,
        }
        self.write(("quarantine", aside + ".json"), json.dumps(report, indent=1).encode())
        return self.root / "quarantine" / aside

    @contextlib.contextmanager
    def _folder(self, parts: tuple[str, ...] | list[str], *, create: bool = False) -> Iterator[int]:
        descriptor = os.open(self.root, _FOLDER)  # the root itself may be a link: the user named it
        try:
            for part in parts:
                try:
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except FileNotFoundError:
                    if not create:
                        raise
                    os.mkdir(part, dir_fd=descriptor)
                    os.fsync(descriptor)
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except NotADirectoryError as error:
                    message = f"store {self.root}: {'/'.join(parts)} is a link or a file; a folder was expected"
                    raise StoreUnavailable(message) from error
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    @staticmethod
    @contextlib.contextmanager
    def _opened(descriptor: int) -> Iterator[int]:
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _translated(self, doing: str, *, missing_ok: bool = False) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            raise
        except OSError as error:
            if missing_ok and isinstance(error, FileNotFoundError):
                raise
            raise StoreUnavailable(f"store {self.root} cannot {doing}: {error.strerror or error}") from error

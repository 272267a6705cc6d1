"""The directory under a store: bytes on disk that are whole or not there, and bytes that are set aside.

Everything is opened relative to an already opened folder and never through a symbolic link, so nothing below the root
can lead a reader or a writer out of it. Knows digests and file names, and nothing of artifacts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.manifest import sha256
from esper_triton.urza.filesystem import on_network
from esper_triton.urza.locks import HeldLock

__all__ = ["Damage", "Directory", "object_parts"]

# A file that was changed within one tick of its file system's clock keeps its times. What was changed so recently is
# hashed again: two seconds is the coarsest tick there is (FAT), and enough for a clock that is set a little wrong.
SETTLED_NS = 2_000_000_000
_REMEMBERED = 4096

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
    """Files under `root`. What writes may be called only inside `lock()`, where it does not say otherwise; reading
    needs no lock.

    What lies in the `replaceable` (names directly under the root) can be had again from elsewhere. Nobody waits until
    the disk has it: after a power cut it may be damaged, as whoever reads it finds.
    """

    def __init__(self, root: Path, *, replaceable: Iterable[str] = ()) -> None:
        self.root = root
        self._replaceable = frozenset(replaceable)
        self._verified: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._is_local: bool | None = None

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
                parent = os.open(folder.parent, _FOLDER)
                try:
                    os.fsync(parent)
                finally:
                    os.close(parent)
        with self.hold(("lock",)):
            with self._translated("be cleared of unfinished files"), self._folder(("tmp",), create=True) as tmp:
                for name in os.listdir(tmp):
                    os.unlink(name, dir_fd=tmp)
            yield

    def hold(self, parts: tuple[str, ...], *, shared: bool = False, wait: bool = True) -> HeldLock:
        """Takes a lock on a file, made if need be; needs no other lock. Raises StoreUnavailable, and BlockingIOError
        where `wait` is False and another has it."""
        *folders, name = parts
        with self._translated("be opened for writing"), self._folder(folders, create=True) as folder:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o644, dir_fd=folder)
        try:
            return HeldLock(descriptor, shared=shared, wait=wait)
        except BlockingIOError:
            raise
        except OSError as error:
            raise StoreUnavailable(f"store {self.root} cannot be locked: {error.strerror or error}") from error

    def same_file(self, parts: tuple[str, ...], descriptor: int) -> bool:
        """Whether `descriptor` is of the file that has this name now."""
        try:
            with self._folder(parts[:-1]) as folder:
                named = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def read(self, parts: tuple[str, ...], what: str, *, limit_bytes: int, touch_after_s: float | None = None) -> bytes:
        """The bytes of one regular file. Raises FileNotFoundError, Damage (not a file, too large), StoreUnavailable.

        touch_after_s: gives a file that was last written longer ago the present time, where this user may.
        """
        with self._translated("be read", missing_ok=True):
            descriptor = self._open(parts, what)
            try:
                content, found = self._content(descriptor, parts, what, limit_bytes)
                if touch_after_s is not None and abs(time.time() - found.st_mtime) > touch_after_s:
                    with contextlib.suppress(OSError):
                        os.utime(descriptor)
                return content
            finally:
                os.close(descriptor)

    def read_object(self, digest: str, what: str, *, limit_bytes: int) -> bytes:
        """The bytes whose SHA-256 is `digest`. Raises Damage, StoreUnavailable.

        They are hashed on this call, unless this process has hashed this very file before and it is unchanged since:
        the same inode, size, time of change of content and of inode, the last of which no program can set. On a network
        file system, whose times are another machine's, that is not relied on.
        """
        parts = object_parts(digest)
        try:
            with self._translated("be read", missing_ok=True):
                descriptor = self._open(parts, what)
                try:
                    began_ns = time.time_ns()
                    content, before = self._content(descriptor, parts, what, limit_bytes)
                    identity = _identity(before)
                    known = self._verified.get(digest) == identity == _identity(os.fstat(descriptor))
                    if known and self._may_rely():
                        return content
                    found = sha256(content)
                    after = os.fstat(descriptor)
                finally:
                    os.close(descriptor)
        except FileNotFoundError:
            reason = f"is missing: no object has the SHA-256 {digest}"
            raise Damage(parts, what, reason, expected=digest, missing=True) from None
        except Damage as damage:
            damage.expected = digest
            raise
        if found != digest:
            self._verified.pop(digest, None)
            reason = f"is corrupt: SHA-256 expected {digest}, found {found} ({len(content)} bytes)"
            raise Damage(parts, what, reason, expected=digest, found=found, size_bytes=len(content))
        settled = began_ns - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS
        if settled and identity == _identity(after):
            self._verified[digest] = identity
            if len(self._verified) > _REMEMBERED:
                with contextlib.suppress(KeyError):  # another thread may have emptied it
                    self._verified.popitem(last=False)
        return content

    def expect_objects(self, digests: Iterable[str]) -> None:
        """Has the system begin to read them, all at once, where they are not in memory. Never raises."""
        for digest in digests:
            parts = object_parts(digest)
            with contextlib.suppress(OSError, Damage, StoreUnavailable):
                descriptor = self._open(parts, "object")
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def open_object(self, digest: str, what: str, *, limit_bytes: int) -> tuple[int, int]:
        """A descriptor of the object, for its owner to close, and its size in bytes, after it has been hashed, a piece
        at a time, as `read_object` does. Raises as that does."""
        parts = object_parts(digest)
        try:
            with self._translated("be read", missing_ok=True):
                descriptor = self._open(parts, what)
        except FileNotFoundError:
            reason = f"is missing: no object has the SHA-256 {digest}"
            raise Damage(parts, what, reason, expected=digest, missing=True) from None
        try:
            with self._translated("be read"):
                began_ns = time.time_ns()
                before = self._regular(descriptor, parts, what)
                if before.st_size > limit_bytes:
                    reason = f"is too large: {before.st_size} bytes, at most {limit_bytes} are allowed"
                    raise Damage(parts, what, reason, expected=digest, size_bytes=before.st_size)
                identity = _identity(before)
                if self._verified.get(digest) == identity and self._may_rely():
                    return descriptor, before.st_size
                hashed, offset = hashlib.sha256(), 0
                while piece := os.pread(descriptor, 1 << 20, offset):
                    hashed.update(piece)
                    offset += len(piece)
                found = hashed.hexdigest()
                if found != digest:
                    self._verified.pop(digest, None)
                    reason = f"is corrupt: SHA-256 expected {digest}, found {found} ({offset} bytes)"
                    raise Damage(parts, what, reason, expected=digest, found=found, size_bytes=offset)
                settled = began_ns - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS
                if settled and identity == _identity(os.fstat(descriptor)):
                    self._verified[digest] = identity
            return descriptor, before.st_size
        except BaseException:
            os.close(descriptor)
            raise

    def sync_file(self, descriptor: int, parts: Sequence[str]) -> None:
        """Puts a file or folder that is, or will be, named `parts`, on stable storage. Raises OSError."""
        if not (parts and parts[0] in self._replaceable):
            os.fsync(descriptor)

    def move(self, source: tuple[str, ...], target: tuple[str, ...]) -> None:
        """Gives a file, synced already, another name, in place of what has it. Raises StoreUnavailable."""
        with (
            self._translated("be written"),
            self._folder(source[:-1]) as old,
            self._folder(target[:-1], create=True) as new,
        ):
            os.replace(source[-1], target[-1], src_dir_fd=old, dst_dir_fd=new)
            self.sync_file(new, target)

    def forget_verified(self) -> None:
        """Hashes every object again when it is read the next time."""
        self._verified.clear()

    def read_from(self, parts: tuple[str, ...], offset: int, what: str) -> bytes:
        """The bytes of a file from an offset on; none where there is no file. Raises StoreUnavailable."""
        try:
            with self._translated("be read", missing_ok=True):
                descriptor = self._open(parts, what)
                try:
                    size = self._regular(descriptor, parts, what).st_size
                    chunks = []
                    while offset < size and (chunk := os.pread(descriptor, size - offset, offset)):
                        chunks.append(chunk)
                        offset += len(chunk)
                    return b"".join(chunks)
                finally:
                    os.close(descriptor)
        except FileNotFoundError:
            return b""
        except Damage as damage:
            raise StoreUnavailable(f"store {self.root}: {damage}; move it away") from damage

    def stat(self, parts: tuple[str, ...]) -> os.stat_result | None:
        """Of what has this name, `()` for the root; links are not followed. None where nothing has. Raises
        StoreUnavailable."""
        try:
            with self._translated("be read", missing_ok=True), self._folder(parts[:-1]) as folder:
                if not parts:
                    return os.fstat(folder)
                return os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def names(self, *folders: str) -> list[str]:
        """Sorted names in a folder of the root; none where it has not been made. Raises StoreUnavailable."""
        try:
            with self._translated("be listed", missing_ok=True), self._folder(folders) as opened:
                return sorted(os.listdir(opened))
        except FileNotFoundError:
            return []

    def some_names(self, folder: str, *, at_most: int) -> list[str]:
        """Names in a folder of the root, in no order and not all where there are more. Raises StoreUnavailable."""
        try:
            with (
                self._translated("be listed", missing_ok=True),
                self._folder((folder,)) as opened,
                os.scandir(opened) as entries,
            ):
                return [entry.name for entry in itertools.islice(entries, at_most)]
        except FileNotFoundError:
            return []

    def sizes(self, *folders: str) -> dict[str, os.stat_result]:
        """The regular files of a folder by name. Raises StoreUnavailable."""
        found = {}
        try:
            with (
                self._translated("be listed", missing_ok=True),
                self._folder(folders) as opened,
                os.scandir(opened) as entries,
            ):
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        if entry.is_file(follow_symlinks=False):
                            found[entry.name] = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return {}
        return found

    def write(self, parts: tuple[str, ...], content: bytes, *, mode: int = 0o644) -> None:
        """Puts `content` in place in one step, on stable storage when this returns. Raises StoreUnavailable."""
        *folders, name = parts
        with (
            self._translated("be written"),
            self._folder(("tmp",), create=True) as tmp,
            self._folder(folders, create=True) as folder,
        ):
            unfinished = secrets.token_hex(8)
            try:
                descriptor = os.open(unfinished, _CREATE, mode, dir_fd=tmp)
                try:
                    _write_all(descriptor, content)
                    self.sync_file(descriptor, parts)  # first: the name must never show bytes that are not there yet
                finally:
                    os.close(descriptor)
                os.replace(unfinished, name, src_dir_fd=tmp, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=tmp)
                raise
            self.sync_file(folder, parts)  # else a power cut could take it back after a later file came to rely on it

    def append(self, parts: tuple[str, ...], content: bytes, offset: int) -> None:
        """Makes `content` what the file has from `offset` on, on stable storage when this returns: after a crash, a
        beginning of it may be there. Raises StoreUnavailable."""
        *folders, name = parts
        with self._translated("be written"), self._folder(folders, create=True) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o644, dir_fd=folder)
            try:
                os.ftruncate(descriptor, offset)
                os.lseek(descriptor, offset, os.SEEK_SET)
                try:
                    _write_all(descriptor, content)
                    self.sync_file(descriptor, parts)
                except OSError:
                    with contextlib.suppress(OSError):  # a full disk: half a line would be in the way of the next
                        os.ftruncate(descriptor, offset)
                    raise
            finally:
                os.close(descriptor)
            if offset == 0:
                self.sync_file(folder, parts)

    def remove(self, parts: tuple[str, ...]) -> bool:
        """Removes one file; whether it was there. Durable once `sync` has returned. Raises StoreUnavailable."""
        try:
            with self._translated("be written", missing_ok=True), self._folder(parts[:-1]) as folder:
                os.unlink(parts[-1], dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    def sync(self, *folders: str) -> None:
        """Puts the names in a folder on stable storage. Raises StoreUnavailable."""
        with self._translated("be written"), self._folder(folders) as folder:
            self.sync_file(folder, folders)

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
        self.sync(*parts[:-1])  # its writer may have died between the rename and this
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

    @staticmethod
    def _regular(descriptor: int, parts: tuple[str, ...], what: str) -> os.stat_result:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Damage(parts, what, "is not a regular file")
        return found

    def _content(
        self, descriptor: int, parts: tuple[str, ...], what: str, limit_bytes: int
    ) -> tuple[bytes, os.stat_result]:
        found = self._regular(descriptor, parts, what)
        if found.st_size > limit_bytes:
            reason = f"is too large: {found.st_size} bytes, at most {limit_bytes} are allowed"
            raise Damage(parts, what, reason, size_bytes=found.st_size)
        content = os.read(descriptor, found.st_size + 1)
        while len(content) < found.st_size and (more := os.read(descriptor, found.st_size - len(content))):
            content += more  # a read gives less than was asked for on some file systems, and of more than 2 GiB
        return content, found

    def _may_rely(self) -> bool:
        """On what was verified. Asked when there is such, since finding it out takes longer than to read an object."""
        if self._is_local is None:
            self._is_local = not on_network(self.root)
        return self._is_local

    def _open(self, parts: tuple[str, ...], what: str) -> int:
        """A descriptor to read one file by. Spelled out, since every load comes here several times."""
        folder = os.open(self.root, _FOLDER)  # the root itself may be a link: the user named it
        try:
            for part in parts[:-1]:
                try:
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                except NotADirectoryError as error:
                    raise self._not_a_folder(parts[:-1]) from error
                os.close(folder)
                folder = inner
            return os.open(parts[-1], _READ, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Damage(parts, what, "is a symbolic link, which is never followed") from error
            if error.errno == errno.ENXIO:  # a socket
                raise Damage(parts, what, "is not a regular file") from error
            raise
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _folder(self, parts: Sequence[str], *, create: bool = False) -> Iterator[int]:
        descriptor = os.open(self.root, _FOLDER)
        try:
            for part in parts:
                try:
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except FileNotFoundError:
                    if not create:
                        raise
                    with contextlib.suppress(FileExistsError):  # another reader's, who needs no lock for its lease
                        os.mkdir(part, dir_fd=descriptor)
                    self.sync_file(descriptor, parts)
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except NotADirectoryError as error:
                    raise self._not_a_folder(parts) from error
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    def _not_a_folder(self, parts: Sequence[str]) -> StoreUnavailable:
        return StoreUnavailable(f"store {self.root}: {'/'.join(parts)} is a link or a file; a folder was expected")

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


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]

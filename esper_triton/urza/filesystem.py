"""Whether a file system is a network's: other machines' clocks and caches, and no shared memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["on_network"]

_NETWORKS = frozenset(
    "9p afs beegfs ceph cifs coda fuse gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs smb3 smbfs virtiofs "
    "vboxsf".split()
)
_MOUNTS = Path("/proc/self/mountinfo")


def on_network(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether `folder` may be on another machine; True where that cannot be told.

    `mounts` has the form of /proc/self/mountinfo (proc(5)): the fifth field is where a file system is mounted, later
    ones over earlier ones, and its type follows a lone hyphen. Any FUSE file system counts: what is behind it cannot be
    seen.
    """
    try:
        text = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return True
    real, found, kind = os.path.realpath(folder), "", None
    for line in text.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:-1]:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(found):
            found, kind = point, fields[fields.index("-", 6) + 1]
    return kind is None or kind.partition(".")[0] in _NETWORKS

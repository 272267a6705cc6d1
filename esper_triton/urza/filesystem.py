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


def on_network(device: int, mounts: Path = _MOUNTS) -> bool:
    """Whether the file system with this `st_dev` may be on another machine; True where that cannot be told.

    `mounts` has the form of /proc/self/mountinfo (proc(5)): the third field is the device, and the type of the file
    system follows a lone hyphen. Any FUSE file system counts: what is behind it cannot be seen.
    """
    try:
        text = mounts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    number = re.escape(f"{os.major(device)}:{os.minor(device)}")
    found = re.search(rf"^\d+ \d+ {number} .*? - (\S+) ", text, re.MULTILINE)
    # Some file systems (btrfs, overlay) give files another device number than their mount has.
    return found is None or found[1].partition(".")[0] in _NETWORKS

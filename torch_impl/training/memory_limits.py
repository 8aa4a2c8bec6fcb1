"""Limits on this process's memory that are narrower than the machine.

A container, a batch system or systemd puts processes into a control group of Linux, nested in others. Those
of a group share what it may take, and the system kills one of them, without a message, when they take more.
`ulimit -v` is of each process for itself, and an allocation beyond it fails.
Not here: memory.high, beyond which a group is slowed down, and swap.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path("/")


class Limit(NamedTuple):
    """In bytes."""

    most: int
    held: int  # of these already; what the system would give up for the asking is not counted


class _Version(NamedTuple):
    """Where a version of control groups keeps what it says."""

    folder: str
    most: str
    held: str
    given_up: str  # the line of memory.stat with copies of files that nobody has used lately


_VERSION_1 = _Version(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_VERSION_2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def group_limits(root: Path = ROOT) -> list[Limit]:
    """Those of the control group that this process is in, and of each around it."""
    limits = []
    for folder, version in _groups(root):
        with suppress(OSError, ValueError):  # no such group is seen from in here, or its limit is "max"
            most, held = (int((folder / name).read_text("ascii")) for name in (version.most, version.held))
            lines = (folder / "memory.stat").read_text("ascii").splitlines()
            given_up = int(dict(line.split() for line in lines).get(version.given_up, 0))
            limits.append(Limit(most, max(held - given_up, 0)))
    return limits


def _groups(root: Path) -> Iterator[tuple[Path, _Version]]:
    """The folders of this process's groups of memory, from its own to the outermost. A container may see its
    own group as the outermost and still be told its name outside: a folder that is not there."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _VERSION_1 if controllers else _VERSION_2
        top = root / version.folder
        own = top / path.lstrip("/")
        yield from ((group, version) for group in (own, *own.parents) if group.is_relative_to(top))


def own_limits(root: Path = ROOT) -> list[Limit]:
    """That of this process alone, if there is one: on its addresses, without those that the code of its
    libraries takes."""
    if resource is None or (most := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return []
    try:
        pages = (root / "proc/self/statm").read_text("ascii").split()  # proc_pid_statm(5)
    except OSError:  # not Linux
        return [Limit(most, 0)]
    everything, data = (int(pages[field]) * resource.getpagesize() for field in (0, 5))
    return [Limit(most - (everything - data), data)]

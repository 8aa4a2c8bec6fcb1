"""Checkpoints that are kept beside last/ and best/: the newest of before, as step-N/, and those from before
the newest leaps of the loss, as before-step-N/.

A kept checkpoint is made of links to the files of last/, which are never written to again, and so takes a
moment; where the disk has no links, of copies.
"""

import os
import re
import shutil
from pathlib import Path

from torch_impl.training.files import REMOVED, WRITTEN, new_folder, patiently, unused_name, whole_folder

_STALE = re.compile(rf"(before-)?step-\d+\.[0-9a-f]{{8}}({WRITTEN}|{REMOVED})")  # half made, or half removed


def kept_checkpoints(run: Path, kind: str = "step") -> list[Path]:
    """The checkpoints of a run that are called kind-N, oldest first."""
    found = [path.parent for path in run.glob(f"{kind}-*/training.json")]
    steps = {path: path.name.removeprefix(f"{kind}-") for path in found}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def keep_newest(run: Path, step: int, number: int, kind: str = "step") -> None:
    """Keep last/ as kind-N, N being the step, and of all such folders no more than `number`; none is made or
    removed where that is 0.

    Does nothing that is done already: what a killed run left undone is done when it goes on. Raises OSError
    where the disk is full or not writable.
    """
    for path in run.iterdir():
        if _STALE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    if not number:
        return
    newest = run / f"{kind}-{step}"
    if not newest.exists():
        keep(whole_folder(run / "last"), newest)
    for surplus in kept_checkpoints(run, kind)[:-number]:
        if surplus != newest:  # whose number is not the highest where somebody went back
            remove(surplus)


def keep(checkpoint: Path, name: Path) -> None:
    """A whole copy of a checkpoint under another name. Raises OSError where it cannot be."""
    with new_folder(name) as new:
        for path in checkpoint.iterdir():
            try:
                os.link(path, new / path.name)
            except OSError:
                shutil.copy2(path, new / path.name)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, by way of another name: what has a checkpoint's is never half of one."""
    old = unused_name(checkpoint, REMOVED)
    patiently(checkpoint.rename, old)
    shutil.rmtree(old, ignore_errors=True)

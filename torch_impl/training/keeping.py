"""Checkpoints that are kept beside last/ and best/: the newest of before, as step-N/.

A kept checkpoint is made of links to the files of last/, which are never written to again, and so takes a
moment; where the disk has no links, of copies.
"""

import os
import shutil
from pathlib import Path

from torch_impl.training.files import new_folder


def kept_checkpoints(run: Path) -> list[Path]:
    """The step-N folders of a run, oldest first."""
    names = [path for path in run.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(names, key=lambda path: int(path.name[5:]))


def keep_newest(run: Path, step: int, number: int) -> None:
    """Keep last/, which is of this step, as step-N, and of all such folders no more than `number`.

    Does nothing that is done already: what a killed run left undone is done when it goes on. Raises OSError
    where the disk is full or not writable.
    """
    for stale in [*run.glob("step-*.new"), *run.glob("step-*.old")]:
        shutil.rmtree(stale)
    if number and not (run / f"step-{step}").exists():
        keep(run / "last", run / f"step-{step}")
    for surplus in kept_checkpoints(run)[: -number or None]:
        if number:
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
    """Nothing that has a checkpoint's name is half of one, also while it is removed."""
    old = checkpoint.with_name(checkpoint.name + ".old")
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)

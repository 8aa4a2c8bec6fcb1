"""kill -9 in a loop: at random instants, with no handler and no cleaning up, again and again."""

import os
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from run_tests import rank_worker
from run_tests.conftest import SMALL, content
from run_tests.test_ranks import forking
from torch_impl.training.files import whole_folder

KILLS = int(os.environ.get("KILLS", "4"))  # a hundred take a minute
FLAGS = ["--checkpoint-every", "1", "--eval-every", "2", "--keep-checkpoints", "2"]


@pytest.mark.xdist_group("ranks")  # whose processes start as quickly
def test_killed_at_random_instants_a_run_ends_in_the_same_bytes(small_run, text, tmp_path):
    """Each time the run goes on with what the one before left; a new one begins when it is finished."""
    assert small_run("--out", "whole", *FLAGS).code == 0
    whole, kept = content(Path("whole")), kept_steps(Path("whole"))
    new = [*SMALL.split(), "--train-file", str(text), *FLAGS]
    random, kills, length = Random(), 0, 1.0
    while kills < KILLS or Path("run").exists():
        going_on = whole_folder(Path("run/last")).is_dir()
        if not going_on:  # killed before there was anything to save
            shutil.rmtree("run", ignore_errors=True)
        arguments = ["--resume", "run"] if going_on else [*new, "--out", "run"]
        process = forking().Process(target=rank_worker.alone, args=(arguments, str(tmp_path)))
        began = time.perf_counter()
        process.start()
        process.join(random.uniform(0, length) if kills < KILLS else None)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        assert process.exitcode in (0, -9), f"the run that was killed {kills} times does not go on"
        if process.exitcode == 0:
            assert content(Path("run")) == whole, f"after {kills} kills"
            assert kept_steps(Path("run")) == kept
            shutil.rmtree("run")
            length = 1.1 * (time.perf_counter() - began) if not going_on else length


def kept_steps(run: Path) -> dict[str, bytes]:
    names = sorted(path for path in run.glob("step-*/*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in names}

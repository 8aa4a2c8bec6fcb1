"""The sums in docs/scaling.md are those that the accounting command makes."""

import re
import shlex
from pathlib import Path

import pytest

from torch_impl.training import account, costs, footprint
from torch_impl.training.presets import PRESETS

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^    \$ python -m torch_impl\.training\.account (.*)\n((?:    .+\n)+)", PAGE, re.M)


@pytest.mark.parametrize(("arguments", "quoted"), BLOCKS)
def test_a_quoted_table_is_what_the_command_prints(arguments, quoted, capsys):
    assert account.main(shlex.split(arguments)) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in quoted.splitlines():
        assert " ".join(line.split()) in printed


def test_every_command_of_the_page_is_compared():
    assert len(BLOCKS) == PAGE.count("torch_impl.training.account --") == 3


def test_the_times_follow_from_the_figures():
    """989 TFLOP/s, half of it kept; 50 and 12.5 GB/s between the nodes."""
    request = account.parse(shlex.split(BLOCKS[0][0]))
    flops = costs.palm_flops(request.model) * request.training.batch_size * request.model.context_length
    assert f"{flops / 1e15:.2f} PFLOP a step, {flops / 64e12:.0f} TFLOP in each" in PAGE
    computing = flops / 64 / 989e12 / 0.5
    assert f"so {computing:.3f} s" in PAGE and f"{computing * 2 / 3:.3f} s, in which" in PAGE
    sent = footprint.sent_bytes(request.model, request.training, 2, 64, shard=False)
    for link, rate in (("400", 50e9), ("100", 12.5e9)):
        sending = sent / rate
        hidden, plain = computing + max(0, sending - computing * 2 / 3), computing + sending
        row = f"| {link} Gbit/s | {sending:.3f} s "
        row += "".join(f"| {step:.2f} s | {0.5 * computing / step:.0%} " for step in (hidden, plain))
        assert f"{row}|" in PAGE


@pytest.mark.parametrize("processes", [2, 4])
def test_what_processes_divide_is_whole_again_together(processes):
    preset = PRESETS["gpt2-124m"]
    one, shared = (
        footprint.process_bytes(preset.model, preset.training, footprint.Kernels(), n, shard=True)
        for n in (1, processes)
    )
    for part in ("weights", "gradients", "moments", "activations"):
        together = getattr(shared, part) * processes
        assert getattr(one, part) <= together < getattr(one, part) * 1.001
    for shard in (False, True):
        assert footprint.sent_bytes(preset.model, preset.training, 4, 1, shard) == 0


def test_processes_that_do_not_divide_the_batch_are_refused(capsys):
    assert account.main(["cpu", "--processes", "5"]) == 2
    assert "--processes 5: 12 sequences at a time do not divide" in capsys.readouterr().err

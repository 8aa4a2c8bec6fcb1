"""The command that counts what a model costs: its table, its flags and its mistakes."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open

from ref_numpy.config import ModelConfig
from torch_impl.training import account
from torch_impl.training.presets import PRESETS
from torch_impl.transformer import Transformer

HOUSE = Path(__file__).parent.parent


@pytest.fixture
def table(call_main):
    return partial(call_main, account.main)


def test_a_checkpoint_has_the_size_that_was_said(small_run, table):
    """Beside a list of names, of which each file says how long it is."""
    assert small_run("--out", "run").code == 0
    code, out, _ = table("--model", "run", "--json", "numbers.json")
    assert code == 0 and out.startswith("run: decoder, L 1, C 16, H 2, K 2, F 64, V 256, T 8")
    numbers = json.loads(Path("numbers.json").read_text(encoding="utf-8"))
    for name in ("model", "optimizer"):
        file = Path(f"run/last/{name}.safetensors")
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with safe_open(file, "pt") as tensors:
            steps = sum(4 for tensor in tensors.keys() if tensor.endswith(".step"))  # noqa: SIM118 (no dict)
        said = numbers["checkpoint_bytes"][f"{name}.safetensors"]
        assert file.stat().st_size == header + said + steps


def test_flags_say_what_to_count(table):
    flags = ("--n-layer", 5, "--d-model", 64, "--n-kv-head", 2, "--activation", "swiglu", "--vocab-size", 300)
    code, out, _ = table("nanogpt-cpu", *flags, "--context-length", 32, "--json", "numbers.json")
    assert code == 0 and "L 5, C 64, H 4, K 2, F 256, V 300, T 32" in out
    numbers = json.loads(Path("numbers.json").read_text(encoding="utf-8"))
    model = Transformer(ModelConfig(**numbers["model"]))
    total = sum(p.numel() for p in model.parameters())
    assert numbers["parameters"]["total"] == total and f"{total:,}" in out
    assert numbers["training_bytes"]["moments"] == 2 * numbers["training_bytes"]["gradients"] == 8 * total


def test_micro_batches_and_frozen_embeddings_need_less(table):
    def numbers(*flags: object) -> dict:
        assert table("cpu", *flags, "--json", "numbers.json")[0] == 0
        return json.loads(Path("numbers.json").read_text(encoding="utf-8"))["training_bytes"]

    whole, parts, frozen = numbers(), numbers("--micro-batches", 4), numbers("--freeze-embeddings")
    share = parts["activations"] / whole["activations"]
    assert 1 / 4 < share < 1 / 3 and parts["peak"] < whole["peak"]  # the head's gradient is of all sizes
    assert whole["moments"] - frozen["moments"] == 8 * 512 * 128


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["huge"], "unknown preset 'huge'; the presets are cpu"),
        (["--n-head", 5], "d_model 128 does not divide into n_head 5 heads; try d_model 130"),
        (["--batch-size", 0], "batch_size is 0, but must be at least 1"),
        (["--processes", 0], "--processes is 0, but must be at least 1"),
        (["--processes", -3], "--processes is -3, but must be at least 1"),
        (["--layers", 5], "unknown flag --layers"),
        (["--model", "nowhere"], "nowhere"),
        (["cpu", "--model", "run"], "--model run is a model; leave out 'cpu'"),
        (["--n-layer", 10**400], "too large"),
        (["--json", "/"], "is a folder; name a file"),
    ],
)
def test_mistakes_are_one_line(table, arguments, complaint):
    code, out, err = table(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and complaint in err


def test_a_file_that_cannot_be_written(table):
    code, _, err = table("--json", "nowhere/numbers.json")
    assert code == 1 and err.count("\n") == 1 and "nowhere" in err


def test_the_table_does_not_wait_for_torch():
    code = (
        "import sys; from torch_impl.training.account import main; main(['gpt2-124m']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "124,439,808" in done.stdout


def test_numbers_are_finite():
    config = PRESETS["gpt2-124m"]
    numbers = account.account(account.Request("124M", config.model, config.training, "bfloat16", "cuda"))
    assert all(
        math.isfinite(number) and number >= 0 for group in numbers.values() for number in group.values()
    )


@pytest.mark.parametrize(("preset", "vocab_size"), [("masked", 512 + 1), ("chat", 1024 + 4)])
def test_a_preset_counts_the_tokens_that_a_run_of_it_adds(preset, vocab_size):
    """The mask token, and those of conversations, were missing."""
    assert account.parse([preset]).model.vocab_size == vocab_size


def test_a_vocabulary_that_only_the_text_decides_is_said_to_be_assumed(capsys):
    assert account.main(["dates"]) == 0
    assert "V 256, T 32 (V is assumed, as the text decides; --vocab-size sets it)" in capsys.readouterr().out
    assert account.main(["dates", "--vocab-size", "53"]) == 0
    assert "assumed" not in capsys.readouterr().out

"""What a model costs, as it is counted from its config, and what the model built from it really takes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parity_tests.strategies import model_configs
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.transformer import attention_mask
from torch_impl import attention, flash_attention, linear_cross_entropy
from torch_impl.kv_cache import KVCache
from torch_impl.optim import make_optimizer
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training import account, costs
from torch_impl.training.presets import PRESETS
from torch_impl.training.recompute import recompute_blocks
from torch_impl.transformer import Embedded, Transformer

HOUSE = Path(__file__).parent.parent
configs = model_configs(architectures=("decoder", "encoder", "encoder-decoder"))
some = settings(deadline=None, max_examples=40)


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Embedded:
    model = (Seq2Seq if config.architecture == "encoder-decoder" else Transformer)(config, dtype)
    model.initialise(0)
    return model


def loss_of(model: Embedded, sequences: int, length: int) -> Tensor:
    """Of random tokens, with dropout where the config has it."""
    ids, targets, source = torch.randint(model.config.vocab_size, (3, sequences, length))
    ids, targets, source = ids.clone(), targets.clone(), source.clone()  # memory of their own
    key = DropoutKey(1, 2) if model.config.dropout else None
    if isinstance(model, Seq2Seq):
        return model.loss((source, torch.ones(source.shape, dtype=torch.bool), ids, targets), key)
    return model.loss((ids, targets), key)


@some
@given(config=configs)
def test_parameters_are_those_of_the_model(config):
    model = build(config)
    parts = costs.parameters_by_part(config)
    assert sum(parts.values()) == costs.parameter_count(config) == sum(p.numel() for p in model.parameters())
    of_type = {"attention": ".attention.", "cross-attention": ".cross_attention.", "ffn": ".ffn."}
    for part, name in of_type.items():
        assert parts[part] == sum(
            p.numel() for n, p in model.named_parameters() if name in n and "_norm" not in n
        )
    assert parts["embedding"] == model.token_embedding.weight.numel()
    assert (parts["positions"] > 0) == (config.positions == "learned")
    assert (parts["head"] > 0) == (not config.tied_embeddings)


def test_parameters_of_gpt2():
    """As its authors' code has them: 124 million, of them 85 without the tables."""
    model = replace(PRESETS["gpt2-124m"].model, vocab_size=50257)
    assert costs.parameter_count(model) == 124_439_808
    assert costs.non_embedding_count(model) == 85_056_000


def test_a_thousand_billion_layers_are_counted_at_once():
    one, many = ModelConfig(n_layer=1), ModelConfig(n_layer=10**12)
    block = costs.parameter_count(ModelConfig(n_layer=2)) - costs.parameter_count(one)
    assert costs.parameter_count(many) == costs.parameter_count(one) + (10**12 - 1) * block
    assert costs.training_bytes(many, TrainConfig()).peak > 10**15


@some
@given(config=configs, sequences=st.integers(1, 3))
def test_flops_are_those_that_pytorch_counts(config, sequences):
    """Exactly, forward and backward, in plain attention: of the fused kernel the counter knows nothing on the
    CPU. It counts mm, addmm and bmm, and all scores, of which masks let a kernel leave out some.
    """
    model, T = build(config), config.context_length
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            loss_of(model, sequences, T)
        forward = counter.get_total_flops()
        loss_of(model, sequences, T).backward()
    assert forward == pytest.approx(
        sequences * T * costs.forward_flops(config, masked=False), rel=1e-12, abs=0
    )
    assert counter.get_total_flops() == 4 * forward


@some
@given(config=model_configs(), T=st.integers(1, 20))
def test_scores_that_are_seen_are_those_that_the_masks_leave(config, T):
    config = replace(config, context_length=T)
    masks = [attention_mask(config, layer, T, 0, None) for layer in range(config.n_layer)]
    assert costs.attention_pairs(config) == (sum(mask.sum() for mask in masks), sum(m.size for m in masks))


def kept_for_backward(model: Embedded, sequences: int) -> int:
    """Bytes of what autograd saves of a forward pass, parameters and tables aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage; kept alive, so that no two have one address

    def see(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss_of(model, sequences, model.config.context_length)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def places_bytes(config: ModelConfig, size: int) -> int:
    """At most, of places and their angles' cosines and sines, which costs.py leaves out, in each stack, and
    of the loss' own two numbers."""
    T, D, stacks = config.context_length, config.head_width, 1 + (config.architecture == "encoder-decoder")
    copies = 1 if size == 4 else 1 + 4 * config.n_layer
    return 16 + stacks * 2 * (8 * T + (4 * T * D * copies if config.positions == "rope" else 0))


@some
@given(
    config=configs,
    sequences=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    by_products=st.booleans(),
)
def test_activations_are_those_that_autograd_keeps(config, sequences, dtype, by_products):
    """To the byte, but for places and angles, and for what fills dropout's masks up to a multiple of eight in
    each sequence."""
    # Turned halves of one feature have strides that the fused kernel does not take.
    assume(config.positions != "rope" or config.head_width > 2)
    kernels = costs.Kernels(dtype.itemsize, by_products=by_products)
    estimated = costs.activation_bytes(config, sequences, kernels)
    with patch.object(attention, "products_pay", return_value=by_products):
        left_out = kept_for_backward(build(config, dtype), sequences) - estimated
    masks = 5 * config.n_layer + 2 if config.architecture == "encoder-decoder" else 2 * config.n_layer + 1
    if config.dropout:
        left_out -= masks * sequences * (-config.context_length * config.d_model % 8)
    assert 0 <= left_out <= places_bytes(config, dtype.itemsize)


@some
@given(config=model_configs(architectures=("decoder", "encoder")), sequences=st.integers(1, 3))
def test_blocks_that_are_computed_again_keep_their_inputs(config, sequences):
    """And one of them, at a time, what it keeps: which is left out while there is only the forward pass."""
    assume(config.positions not in ("rope", "alibi") and config.window == 0)
    estimated = costs.activation_bytes(config, sequences, costs.Kernels(recomputed=True))
    model = build(config)
    recompute_blocks(model)
    meanwhile = estimated - kept_for_backward(model, sequences)
    one, two = (costs.activation_bytes(replace(config, n_layer=n), sequences) for n in (1, 2))
    assert 0 <= meanwhile <= two - one


@some
@given(config=configs, sequences=st.integers(1, 3))
def test_half_precision_on_cuda_keeps_less(config, sequences):
    """Than on a CPU, whose kernels widen norms and attention; and more than half of what float32 keeps."""
    half, cpu, single = (
        costs.activation_bytes(config, sequences, costs.Kernels(*of))
        for of in ((2, False), (2, True), (4, False))
    )
    assert single / 2 <= half < cpu


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize("positions", ["none", "alibi"])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_activations_of_a_long_context(architecture, positions, window, qk_norm):
    """From here on masks are made for a block of queries at a time, and made again for the backward pass."""
    if window and architecture != "decoder":
        return
    config = ModelConfig(
        architecture,
        context_length=costs.QUERIES_AT_ONCE + 1,
        d_model=8,
        n_head=2,
        vocab_size=5,
        positions=positions,
        window=window,
        qk_norm=qk_norm,
        attention_pattern="local, full" if window else "full",
    )
    left_out = kept_for_backward(build(config), 2) - costs.activation_bytes(config, 2)
    assert 0 <= left_out <= places_bytes(config, 4)


def test_what_is_made_at_once_is_as_much_as_is_counted():
    assert costs.QUERIES_AT_ONCE == flash_attention.QUERIES_AT_ONCE
    assert costs.LOGITS_AT_ONCE == linear_cross_entropy.LOGITS_AT_ONCE


def test_logits_of_a_large_vocabulary_are_a_part_of_what_there_is_at_once():
    """On CUDA 268 million, less those that make no 64 places; of a small batch all."""
    large = ModelConfig(vocab_size=50_257, context_length=1024)
    on_cuda = costs.Kernels(2, of_cpu=False)
    assert costs.logits_bytes(large, 32, on_cuda) == 2 * 2 * 5312 * 50_257
    assert costs.logits_bytes(large, 1, on_cuda) == 2 * 2 * 1024 * 50_257
    whole = costs.training_bytes(large, TrainConfig(batch_size=32), on_cuda)
    assert whole.peak == whole.weights + whole.moments + whole.activations + whole.logits


@given(config=configs)
def test_keys_and_values_are_as_many_as_generation_keeps(config):
    """Of local layers a window's worth was counted, but room is taken for all; nothing in an encoder."""
    token, whole = costs.kv_cache_bytes(config, size=2)
    model = build(config)
    keys_and_values = sum(
        2 * 2 * module.kv_heads * config.head_width
        for name, module in model.named_modules()
        if name.endswith(".attention") and not name.startswith("encoder.")
    )
    if config.architecture == "encoder":
        assert (token, whole) == (0, 0)
        return
    assert token == keys_and_values
    past = KVCache(config, 1, torch.bfloat16)
    source = 2 * 2 * config.d_model * config.n_layer if config.architecture == "encoder-decoder" else 0
    assert whole == past.k.nbytes + past.v.nbytes + source * config.context_length


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


@pytest.mark.parametrize("preset", ["char-fast", "dates"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_that_the_optimizer_keeps(preset, optimizer):
    config = PRESETS[preset]
    training = replace(config.training, optimizer=optimizer)
    model = build(replace(config.model, vocab_size=30))
    state = make_optimizer(model, training)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    state.step()
    kept = [value for each in state.state.values() for name, value in each.items() if name != "step"]
    assert costs.training_bytes(model.config, training).moments == sum(value.nbytes for value in kept)


def test_flags_say_what_to_count(table):
    flags = ("--n-layer", 5, "--d-model", 64, "--n-kv-head", 2, "--activation", "swiglu", "--vocab-size", 300)
    code, out, _ = table("nanogpt-cpu", *flags, "--context-length", 32, "--json", "numbers.json")
    assert code == 0 and "L 5, C 64, H 4, K 2, F 256, V 300, T 32" in out
    numbers = json.loads(Path("numbers.json").read_text(encoding="utf-8"))
    model = ModelConfig(**numbers["model"])
    total = sum(p.numel() for p in build(model).parameters())
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

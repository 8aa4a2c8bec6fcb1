"""How cases are drawn: to find bugs.

Sizes are small, different from each other and mostly prime, so that no transposed axis fits by chance.
Values come from a seed and a regime, since Hypothesis' own arrays are mostly one constant.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.masks import PADDING
from ref_numpy.parameters import parameter_shapes

SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 13)
REGIMES = ("normal", "tiny", "huge", "offset", "ties", "constant_row", "one_hot")

seeds = st.integers(0, 2**32 - 1)


class Origin(NamedTuple):
    """How an array was made: function(*arguments), or an item of what that returned."""

    function: str
    arguments: tuple
    item: str | None = None


# Of the last cases' large arrays, by their contents, so that a report can name what is too long to spell out.
_origins: OrderedDict[bytes, Origin] = OrderedDict()
LARGE = 60


def _made(values: np.ndarray, origin: Origin) -> np.ndarray:
    if values.size > LARGE:
        _origins[values.tobytes()] = origin
        if len(_origins) > 1000:
            _origins.popitem(last=False)
    return values


def origin_of(values: np.ndarray) -> Origin | None:
    """How a large array was made, if it was made here a moment ago."""
    return _origins.get(values.tobytes()) if values.size > LARGE else None


def sizes(count: int, least: int = 1) -> st.SearchStrategy[list[int]]:
    """Several sizes, no two alike."""
    return st.lists(
        st.sampled_from([size for size in SIZES if size >= least]),
        min_size=count,
        max_size=count,
        unique=True,
    )


def array(random: np.random.Generator, shape: tuple[int, ...], regime: str = "normal") -> np.ndarray:
    """Values of a regime: where formulas cancel, saturate, tie or lose their scale."""
    values = np.asarray(random.standard_normal(shape))
    if regime == "tiny":  # below the square root of a norm's epsilon
        return values * 1e-4
    if regime == "huge":  # saturates a softmax
        return values * 1e2
    if regime == "offset":  # mean far above the spread
        return values + 1e3
    if regime == "ties":
        return np.sign(np.round(values))
    if regime == "constant_row":  # no variance
        return np.broadcast_to(values[..., :1], shape).copy() if values.ndim else values
    if regime == "one_hot":
        hot = np.zeros_like(values)
        if values.ndim:
            places = random.integers(shape[-1], size=shape[:-1])
            np.put_along_axis(hot, places[..., None], 1.0, axis=-1)
        return hot
    return values


def seeded(shape: tuple[int, ...], regime: str, seed: int) -> np.ndarray:
    """The array of a shape, a regime and a seed."""
    return _made(array(np.random.default_rng(seed), shape, regime), Origin("seeded", (shape, regime, seed)))


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], regimes: tuple[str, ...] = REGIMES) -> np.ndarray:
    """An array of a shape, its regime and seed drawn."""
    return seeded(shape, draw(st.sampled_from(regimes)), draw(seeds))


@st.composite
def optional_arrays(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array of normal numbers, or None: a bias."""
    return draw(st.none() | arrays(shape, ("normal",)))


@st.composite
def masks(draw: st.DrawFn, queries: int, keys: int) -> np.ndarray:
    """Boolean masks: causal, a window, random ones, and ones with rows that see nothing."""
    kind = draw(st.sampled_from(["causal", "window", "full", "random", "empty_rows"]))
    ages = np.arange(queries)[:, None] - np.arange(keys)[None, :]  # how far a key lies behind its query
    if kind == "causal":
        return ages >= 0
    if kind == "window":
        width = draw(st.sampled_from([1, max(keys - 1, 1), keys, keys + 1]))
        return (ages >= 0) & (ages < width)
    if kind == "full":
        return np.ones((queries, keys), bool)
    mask = np.random.default_rng(draw(seeds)).random((queries, keys)) < 0.5
    if kind == "empty_rows":
        mask[draw(st.integers(0, queries - 1))] = False
    return mask


@st.composite
def dropout_keys(draw: st.DrawFn) -> DropoutKey:
    seed = draw(st.integers(0, 2**64 - 1))
    step, row, site = draw(st.integers(0, 2**20)), draw(st.integers(0, 1000)), draw(st.integers(0, 50))
    return DropoutKey(seed, step, row, site)


@st.composite
def model_configs(
    draw: st.DrawFn, smooth: bool = False, architectures: tuple[str, ...] = ("decoder", "encoder")
) -> ModelConfig:
    """Small models over the whole product of options, or all but those with a kink in them."""
    n_head, head_width = draw(st.sampled_from([(1, 5), (2, 3), (3, 4), (4, 2), (6, 2), (1, 8)]))
    architecture = draw(st.sampled_from(architectures))
    rotary = ["rope"] * (head_width % 2 == 0)
    positions = draw(st.sampled_from(["none", "learned", "sinusoidal", "alibi", *rotary]))
    pattern = "full"
    if architecture == "decoder":
        pattern = draw(st.sampled_from(["full", "full", "local", "local, full"]))
    return ModelConfig(
        architecture=architecture,
        vocab_size=draw(st.sampled_from([5, 17, 23])),
        context_length=draw(st.sampled_from([7, 11])),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_kv_head=draw(st.sampled_from([0] + [k for k in range(1, n_head) if n_head % k == 0])),
        d_model=n_head * head_width,
        d_ff=draw(st.sampled_from([0, 9, 14])),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        norm_placement=draw(st.sampled_from(["pre", "post"])),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        qk_norm=draw(st.booleans()),
        attention_pattern=pattern,
        window=draw(st.integers(1, 6)) if "local" in pattern else 0,
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "silu", "swiglu"] + ["relu"] * (not smooth))),
        positions=positions,
        rope_base=draw(st.sampled_from([10000.0, 100.0])) if positions == "rope" else 10000.0,
        rope_layout=draw(st.sampled_from(["half", "interleaved"])) if positions == "rope" else "half",
        rope_scale=draw(st.sampled_from([1.0, 2.5])) if positions == "rope" else 1.0,
        bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )


@st.composite
def documents(draw: st.DrawFn, rows: int, length: int) -> np.ndarray | None:
    """Several texts in each row, perhaps padding before, between or after them; or no documents at all."""
    if draw(st.booleans()):
        return None
    random = np.random.default_rng(draw(seeds))
    starts = np.cumsum(random.random((rows, length)) < 0.3, axis=1)
    return np.where(
        random.random((rows, length + 1))[np.arange(rows)[:, None], starts] < 0.2, PADDING, starts
    )


def model_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1, unlike initial ones, which hide what is multiplied by 0.02.

    Norm weights and biases are random too: at their initial 1 and 0 a forgotten one would not be missed.
    """
    random = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        values = random.standard_normal(shape)
        if "norm" in name and name.endswith("weight"):
            params[name] = 1 + 0.3 * values
        elif len(shape) == 2 and "embedding" not in name:
            params[name] = values / shape[1] ** 0.5
        else:
            params[name] = 0.5 * values
        _made(params[name], Origin("model_params", (config, seed), name))
    return params


@st.composite
def sampling_configs(draw: st.DrawFn) -> SamplingConfig:
    """Every filter on or off, alone and together."""
    return SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.8, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 50])),
        top_p=draw(st.sampled_from([1e-9, 0.3, 0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.3])),
        forbidden=draw(st.sampled_from([(), (0,), (1, 3)])),
    )

"""Where the heads of a model look: their attention weights on a short passage, as pictures."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import ndarray as Array
from torch import Tensor

from torch_impl.attention import attention
from torch_impl.cross_attention import CrossAttention
from torch_impl.multi_head_attention import Attend, MultiHeadAttention, split_heads
from torch_impl.training.tokenizer import Tokenizer
from torch_impl.training.visible import visible
from torch_impl.transformer import Embedded

PASSAGE = 24  # tokens
_SHOWN = 8  # layers, and heads of each, in one picture
_CELL = 0.085  # inches, as all the margins: they hold twelve characters of a token
_LEFT, _ABOVE, _BELOW = 0.75, 0.55, 0.65
_COLOURS = colormaps["Blues"].with_extremes(bad="white")


class AttentionMap(NamedTuple):
    """What the heads of a layer look at: weights[h, t, s] is how much query t takes from key s."""

    kind: str  # self-attention, or which one of an encoder-decoder's three
    layer: int  # from 1
    weights: Float[Array, "H T S"]
    queries: list[str]
    keys: list[str]


def attention_maps(model: Embedded, tokenizer: Tokenizer, passage: tuple[Tensor, ...]) -> list[AttentionMap]:
    """The maps of all layers on a passage, which is what the model reads, a batch of one.

    The model computes as ever. All processes of a sharded run have to ask.
    """
    with torch.no_grad(), _watched(model) as found:
        model(*(side.to(next(model.parameters()).device) for side in passage))
    paired = model.config.architecture == "encoder-decoder"
    own = {model.config.begin_token: "<begin>", model.config.end_token: "<end>"} if paired else {}
    sides = (passage[0], passage[-1]) if paired else (passage[0],)
    labels = [_labels(ids[0].tolist(), tokenizer, own) for ids in sides]
    maps = []
    for name, weights in found:
        stack, _, rest = name.rpartition("blocks.")
        layer, _, module = rest.partition(".")
        kind, queries, keys = "self-attention", labels[0], labels[0]
        if stack.startswith("encoder"):
            kind = "the source looks at itself"
        elif stack.startswith("decoder"):
            across = module == "cross_attention"
            kind = "the target looks at " + ("the source" if across else "itself")
            queries, keys = labels[1], labels[0 if across else 1]
        maps.append(AttentionMap(kind, int(layer) + 1, weights, queries, keys))
    return sorted(maps, key=lambda found: (not found.kind.startswith("the source"), found.kind, found.layer))


@contextmanager
def _watched(model: Embedded) -> Iterator[list[tuple[str, Float[Array, "H T S"]]]]:
    """Within the block, the modules that attend tell their weights, beside what they do anyway."""
    found: list[tuple[str, Float[Array, "H T S"]]] = []

    def watch_itself(name: str) -> Callable[..., tuple]:
        def look(module: MultiHeadAttention, arguments: tuple) -> tuple:
            x, attend, *rest = arguments

            def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                found.append((name, _weights(attend, q, k)))
                return attend(q, k, v)

            return (x, seen, *rest)

        return look

    def watch_across(name: str) -> Callable[..., None]:
        def look(module: CrossAttention, arguments: tuple) -> None:
            x, memory, mask = arguments
            keys, _ = module.kv(memory).chunk(2, dim=-1)
            q, k = (split_heads(part, module.n_head) for part in (module.q(x), keys))
            found.append((name, _weights(partial(attention, mask=mask), q, k)))

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MultiHeadAttention):
                hooks.callback(module.register_forward_pre_hook(watch_itself(name)).remove)
            elif isinstance(module, CrossAttention):
                hooks.callback(module.register_forward_pre_hook(watch_across(name)).remove)
        yield found


def _weights(attend: Attend, q: Float[Tensor, "1 H T D"], k: Float[Tensor, "1 K S D"]) -> Array:
    """Whoever attends to the rows of an identity matrix, instead of values, gets the weights themselves.

    Its columns come D at a time, as wide as values are.
    """
    S, D = k.shape[2:]
    identity = F.pad(torch.eye(S, dtype=k.dtype, device=k.device), (0, -S % D))
    parts = [
        attend(q, k, part.expand(*k.shape[:2], -1, -1).contiguous()) for part in identity.split(D, dim=1)
    ]
    return torch.cat(parts, dim=-1)[0, :, :, :S].float().cpu().numpy()


def _labels(ids: list[int], tokenizer: Tokenizer, own: dict[int, str]) -> list[str]:
    """Each token as it can be read beside a picture; the model's own, which are no text, by their names."""
    texts = [own[id] if id in own else tokenizer.decode([id]) for id in ids]
    spelled = [visible(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")) for text in texts]
    return [text if len(text) <= 12 else text[:11] + "…" for text in spelled]


def _side_by_side(tiles: Float[Array, "n T S"]) -> Float[Array, "T all"]:
    """The tiles in a row, with a gap between two."""
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    return padded.transpose(1, 0, 2).reshape(tiles.shape[1], -1)[:, :-1]


def _brightness(weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The root makes small weights visible."""
    return np.sqrt(weights)


def picture(found: AttentionMap) -> Float[Array, "height width rgba"]:
    """The heads of a layer side by side, as colours; a row of a tile is what one token looks at."""
    row = _side_by_side(found.weights)
    size = min(max(1600 // row.shape[1], 2), 10)  # pixels
    return _COLOURS(np.ma.masked_invalid(_brightness(row))).repeat(size, axis=0).repeat(size, axis=1)


def _some(n: int) -> list[int]:
    """Of n layers or heads those that are shown, spread evenly."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(n, _SHOWN))})


def draw_attention(maps: list[AttentionMap]) -> bytes:
    """A PNG of layers below each other and heads side by side, with the tokens beside them."""
    kinds = [list(group) for _, group in groupby(maps, key=lambda found: found.kind)]
    sheets = []
    for group in kinds:
        layers = [group[n] for n in _some(len(group))]
        heads = _some(len(group[0].weights))
        rows = [_side_by_side(found.weights[heads]) for found in layers]
        gap = np.full((1, rows[0].shape[1]), np.nan)
        sheet = np.concatenate([part for row in rows for part in (row, gap)])[:-1]
        sheets.append((layers, heads, sheet))
    width = max(4.8, max(sheet.shape[1] for *_, sheet in sheets) * _CELL + _LEFT + 0.4)
    height = top = sum(sheet.shape[0] * _CELL + _ABOVE + _BELOW for *_, sheet in sheets)
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    for layers, heads, sheet in sheets:
        rows, columns = (n * _CELL for n in sheet.shape)
        bottom = top - _ABOVE - rows
        axes = figure.add_axes((_LEFT / width, bottom / height, columns / width, rows / height))
        _draw_sheet(axes, layers, heads, sheet)
        top = bottom - _BELOW
    png = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # characters that the font lacks
        figure.savefig(png, format="png")
    return png.getvalue()


def _draw_sheet(axes: Any, layers: list[AttentionMap], heads: list[int], sheet: Array) -> None:
    axes.imshow(_brightness(sheet), cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest")
    T, S = layers[0].weights.shape[1:]
    for side in axes.spines.values():
        side.set_visible(False)
    small = {"fontsize": 5, "parse_math": False}
    axes.set_yticks(
        [row * (T + 1) + t for row in range(len(layers)) for t in range(T)],
        [label for found in layers for label in found.queries],
        **small,
    )
    axes.set_xticks(
        [column * (S + 1) + s for column in range(len(heads)) for s in range(S)],
        layers[0].keys * len(heads),
        rotation=90,
        **small,
    )
    axes.tick_params(length=0, pad=1)
    for column, head in enumerate(heads):
        middle = column * (S + 1) + (S - 1) / 2
        axes.text(middle, -1.0, f"head {head + 1}", ha="center", va="bottom", fontsize=8)
    for row, found in enumerate(layers):
        middle = row * (T + 1) + (T - 1) / 2
        axes.text(sheet.shape[1] + 0.5, middle, f"layer {found.layer}", rotation=270, va="center", fontsize=8)
    axes.set_title(
        f"{layers[0].kind}: a row is what one token takes from which others", fontsize=9, pad=20, loc="left"
    )

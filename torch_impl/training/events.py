"""TensorBoard's event files: curves, texts, pictures and histograms.

All is written at once and in the calling thread, so that a full disk shows where it happens.
"""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float, Integer
from matplotlib.image import imsave
from numpy import ndarray as Array
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram_raw, text

from torch_impl.training.files import named_after
from torch_impl.training.telemetry import Row

_BINS = 64
_AT_ONCE = 1 << 22  # numbers: a few tens of MiB beside them
_LEAST, _MOST = 1e-30, 1e18  # between them, differences and squares are numbers in float32


class TensorBoardEvents:
    """An event file, as TensorBoard reads it. A resumed run adds one, which purges all from a step on."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        self.file = (folder / f"events.out.tfevents.{time.time_ns():020d}").open("xb")
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        try:
            self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self.file.flush()
        except OSError as error:
            named_after(error, Path(self.file.name))
            raise

    def scalars(self, step: int, values: Row) -> None:
        """One point on each named curve that has a value."""
        points = [
            Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None
        ]
        self._write(step=step, summary=Summary(value=points))

    def text(self, step: int, name: str, content: str) -> None:
        """A text as it is: TensorBoard reads Markdown, in which lines that are indented are not touched."""
        lines = content.replace("\r", "\n").split("\n")
        self._write(step=step, summary=text(name, "\n".join(f"    {line}" for line in lines)))

    def picture(self, step: int, name: str, colours: Float[Array, "height width rgba"]) -> None:
        """A picture of colours from 0 to 1."""
        png = io.BytesIO()
        imsave(png, colours, format="png")
        height, width, _ = colours.shape
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png.getvalue())
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """How numbers are distributed, but for those that are not finite; nothing is told of none."""
        found = [
            (
                part.min().item(),
                part.max().item(),
                part.numel(),
                part.sum().item(),
                part.square().sum().item(),
            )
            for part in _finite(values)
        ]
        if not found:
            return
        lows, highs, *sums = zip(*found, strict=True)
        low, high = min(lows), max(highs)
        if high - low < _LEAST:
            low, high = low - 0.5, high + 0.5
        counts = sum(_counts(part, low, high) for part in _finite(values)).tolist()
        limits = [low + (high - low) * (place + 1) / _BINS for place in range(_BINS)]
        number, total, squares = map(sum, sums)
        summary = histogram_raw(name, low, high, number, total, squares, limits, counts)
        self._write(step=step, summary=summary)

    def close(self) -> None:
        self.file.close()


def _finite(values: Tensor) -> Iterator[Float[Tensor, "_"]]:
    """The numbers that are finite, and not so large that their squares are not, a part at a time."""
    for part in values.detach().flatten().split(_AT_ONCE):
        part = part.float()
        part = part[part.abs() < _MOST]
        if part.numel():
            yield part


def _counts(part: Float[Tensor, "_"], low: float, high: float) -> Integer[Tensor, "bins"]:
    """How many fall into each of equal bins. torch.histc would not always add alike on CUDA."""
    places = (part - low) / (high - low) * _BINS
    return places.long().clamp(0, _BINS - 1).bincount(minlength=_BINS)

"""TensorBoard's event files: curves, texts, pictures and histograms.

All is written at once and in the calling thread, so that a full disk shows where it happens.
"""

import io
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.image import imsave
from numpy import ndarray as Array
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram_raw, text

from torch_impl.training.telemetry import Row

_BINS = 64


class TensorBoardEvents:
    """An event file, as TensorBoard reads it. A resumed run adds one, which purges what follows its step."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        self.file = (folder / f"events.out.tfevents.{time.time_ns():020d}").open("xb")
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.file.flush()

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
        """How numbers are distributed; but for those that are not finite; nothing is told of none."""
        finite = values.detach().flatten().float()
        finite = finite[finite.isfinite()]
        if not finite.numel():
            return
        low, high = finite.min().item(), finite.max().item()
        if low == high:  # histc would widen the range by itself, and not say so
            low, high = low - 0.5, high + 0.5
        limits = torch.linspace(low, high, _BINS + 1)[1:].tolist()
        counts = torch.histc(finite, _BINS, low, high).tolist()
        moments = finite.numel(), finite.sum().item(), finite.square().sum().item()
        self._write(step=step, summary=histogram_raw(name, low, high, *moments, limits, counts))

    def close(self) -> None:
        self.file.close()

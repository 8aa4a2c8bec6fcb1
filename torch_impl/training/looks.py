"""A look inside the model, a handful of times in a run: what it writes, where it looks, how its numbers lie.

A look only reads: a run ends in the same bytes with looks and without.
"""

from typing import NamedTuple

from torch_impl.train import TrainState
from torch_impl.training.attention_maps import PASSAGE, AttentionMap, attention_maps, picture
from torch_impl.training.config import RunSettings
from torch_impl.training.events import TensorBoardEvents
from torch_impl.training.objectives import Objective
from torch_impl.training.ranks import whole
from torch_impl.training.tokenizer import Tokenizer

_SAMPLE = 100  # tokens


class Look(NamedTuple):
    """What was seen last, for the report."""

    step: int
    sample: str
    maps: list[AttentionMap]


def look_is_due(step: int, steps: int, settings: RunSettings) -> bool:
    """Whether the evaluation after a step has a look: the first, and the first after each n-th of the run.

    A function of the step alone, so that a resumed run looks where the uninterrupted one does.
    """
    before = (step - 1) // settings.eval_every * settings.eval_every
    return settings.looks > 0 and (
        step == 0 or step * settings.looks // steps > before * settings.looks // steps
    )


def look(
    state: TrainState,
    tokenizer: Tokenizer,
    objective: Objective,
    settings: RunSettings,
    events: TensorBoardEvents | None,
) -> Look:
    """Look at the model, and show it in TensorBoard. All processes of a run take part; one has the events.

    Gradients are shown as the optimizer averages them: it is what the step leaves of them.
    """
    model, step = state.model, state.step
    length = min(settings.sample_tokens, _SAMPLE)
    sample = objective.example(model, length) if length else ""
    maps = attention_maps(model, tokenizer, objective.passage(PASSAGE))
    if events is not None:
        if sample:
            events.text(step, "sample", sample)
        for found in maps:
            events.picture(step, f"{found.kind}/layer {found.layer:02}", picture(found))
    for name, parameter in model.named_parameters():
        shown = {f"parameters/{name}": parameter}
        if "exp_avg" in state.optimizer.state.get(parameter, {}):
            shown[f"gradients, averaged/{name}"] = state.optimizer.state[parameter]["exp_avg"]
        for tag, tensor in shown.items():
            tensor = whole(tensor.detach())
            if events is not None:
                events.histogram(step, tag, tensor)
    return Look(step, sample, maps)

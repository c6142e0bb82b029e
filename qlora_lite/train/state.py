"""Everything that the next step of a trainer depends on, out of it and back in, bit for bit.

| file                      | holds                                                                              |
|---------------------------|------------------------------------------------------------------------------------|
| adapter_model.safetensors | the adapter, under the names of its method's files (LoRA: peft's); of full
|                           | fine-tuning all weights                                                            |
| optimizer.safetensors     | the optimizer's tensors, FACTOR.KEY                                                |
| generators.safetensors    | the random generators                                                              |
| state.json                | steps, place in the data, skipped steps, the memory limit, the loss scale, the
|                           | optimizer's numbers                                                                |

The schedule and the order of the rows are functions of the step and the epoch and have no state. Optimizer states are
copied into buffers that the optimizer itself has made: `load_state_dict` of bitsandbytes would give ordinary memory
for paged states, and torch's casts states to the parameter's type. What ranks have divided is put together for the
file, and each takes its part of it (``whole_tensors``).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.errors import CheckpointError, TrainingError
from qlora_lite.models.memory_options import settle

from .checkpoints import Checkpoint, Tensors
from .divided_weights import fill_here, tensors_here
from .generators import generator_states, restore_generators
from .loop import Trainer
from .loss_scale import LossScale
from .whole_tensors import Collection, layout_of, parts_here

OPTIMIZER, GENERATORS, STATE = "optimizer.safetensors", "generators.safetensors", "state.json"
_COUNTS = ("step", "epoch", "epoch_step", "skipped", "steps_without_gradient", "most_tokens")  # the last may be None
_TABLES = ("qmap1", "qmap2")  # bitsandbytes' code tables: constants that all states share


def capture(
    trainer: Trainer, copies: bool = True, collection: Collection | None = None
) -> tuple[dict[str, Tensors], dict]:
    """Copy a trainer's state to host memory; return the tensors by file, and the numbers.

    Args:
        copies: False returns the tensors themselves, to be written before the next step changes them.
        collection: of weights that ranks have divided, and of their states; see ``collection_of``.

    Raises:
        TrainingError: the factors are not finite, or do nothing although they were trained: no state to go back to.
    """
    tensors: dict[str, Tensors]
    if collection is None:
        tensors, numbers = _tensors_here(trainer)
    else:
        tensors, numbers = dict(collection.tensors), collection.numbers
    tensors |= {GENERATORS: generator_states(trainer.device)}
    if copies:
        tensors = {file: {name: _host_copy(t) for name, t in content.items()} for file, content in tensors.items()}
    return tensors, {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "epoch_step": trainer.epoch_step,
        "skipped": trainer.skipped,
        "steps_without_gradient": trainer.steps_without_gradient,
        "most_tokens": trainer.most_tokens,
        "total_steps": trainer.total_steps,
        "took_part": trainer.took_part,
        "loss_scale": trainer.loss_scale and asdict(trainer.loss_scale),
        "optimizer": numbers,
    }


def _tensors_here(trainer: Trainer) -> tuple[dict[str, Tensors], dict]:
    settle(trainer.model)
    factors = tensors_here(trainer.workload.method, trainer.model)
    _check_worth_keeping(trainer, factors)
    states, numbers = _optimizer_state(trainer)
    _wait(trainer.device)
    return {WEIGHTS_NAME: factors, OPTIMIZER: states}, numbers


def collection_of(trainer: Trainer, more: Mapping[str, Tensors]) -> Collection | None:
    """Return weights that ranks have divided and their states, to be put together on the first rank; None where they
    are whole. All ranks call it at the same time.

    Args:
        more: further tensors of weights, this rank's parts, by file.

    Raises:
        TrainingError: see ``capture``.
    """
    layout = layout_of(trainer.workload.method, trainer.model)
    if not layout.ranges:
        return None
    tensors, numbers = _tensors_here(trainer)
    return Collection(trainer.processes, layout, {**tensors, **more}, numbers)


def _wait(device: torch.device) -> None:
    """Wait for the GPU: paged states are read and written by the host where they lie."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_worth_keeping(trainer: Trainer, factors: Tensors) -> None:
    broken = [name for name, tensor in factors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"step {trainer.step}: the factor {broken[0]} is not finite; no checkpoint is made of it")
    updates = trainer.step - trainer.skipped if trainer.took_part else 0  # others had gradients of zero
    if updates and trainer.workload.method.does_nothing(trainer.model):
        raise TrainingError(f"after {updates} updates the adapter still does nothing: it is as it began")


def _optimizer_state(trainer: Trainer) -> tuple[Tensors, dict]:
    """Return the optimizer's tensors as FACTOR.KEY, and its numbers by factor and key."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in zip(trainer.names, trainer.parameters, strict=True):
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if key in _TABLES:
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a trainer into the state of a checkpoint.

    Raises:
        CheckpointError: a tensor is missing or too much, or has another shape or type.
    """
    state, saved = numbers_of(checkpoint), checkpoint.tensors
    trainer.take_turn(max(1, state["step"]))
    layout = layout_of(trainer.workload.method, trainer.model)
    rank = trainer.processes.shards.rank
    compare_tensors(saved[WEIGHTS_NAME], trainer.workload.method.tensors(trainer.model), WEIGHTS_NAME)
    if saved[OPTIMIZER]:
        _make_states(trainer)
    tensors, numbers = _optimizer_state(trainer)
    states, factors = (parts_here(layout, rank, saved[name]) for name in (OPTIMIZER, WEIGHTS_NAME))
    compare_tensors(states, tensors, OPTIMIZER)
    if {name: set(values) for name, values in numbers.items()} != {
        name: set(values) for name, values in state["optimizer"].items() if not layout.name_of(name) or name in numbers
    }:
        raise CheckpointError(f"{STATE}: the optimizer has other numbers than the one of this run")
    _wait(trainer.device)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(states[name])
    for name, parameter in zip(trainer.names, trainer.parameters, strict=True):
        trainer.optimizer.state.get(parameter, {}).update(state["optimizer"].get(name, {}))
    fill_here(trainer.workload.method, trainer.model, factors)
    for name in (*_COUNTS, "took_part"):
        setattr(trainer, name, state[name])
    if trainer.loss_scale and (scale := state.get("loss_scale")):
        trainer.loss_scale = LossScale(**scale)
    restore_generators(saved[GENERATORS], trainer.device)


def numbers_of(checkpoint: Checkpoint) -> dict:
    """Return the numbers of a checkpoint (see ``capture``).

    Raises:
        CheckpointError: it lacks a part of a trainer's state.
    """
    state = checkpoint.documents.get(STATE, {})
    state.setdefault("steps_without_gradient", 0)  # earlier versions did not keep it
    missing = [name for name in (WEIGHTS_NAME, OPTIMIZER, GENERATORS) if name not in checkpoint.tensors]
    counts = [state.get(name) for name in (*_COUNTS, "total_steps")]
    if "most_tokens" in state and state["most_tokens"] is None:
        counts.remove(None)
    numbers = state.get("optimizer")
    good = all(type(count) is int and count >= 0 for count in counts) and isinstance(numbers, dict)
    good = good and type(state.get("took_part")) is bool
    of_each = list(numbers.values()) if isinstance(numbers, dict) else []
    good = good and all(isinstance(values, dict) for values in of_each)
    good = good and all(map(_is_count, (number for values in of_each for number in values.values())))
    scale = state.get("loss_scale") or asdict(LossScale())  # of float16 only
    good = good and isinstance(scale, dict) and scale.keys() == asdict(LossScale()).keys()
    good = good and all(map(_is_count, scale.values())) and scale["value"] >= 1
    if missing or not good:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing) or f'numbers in {STATE}'}")
    if problem := _contradiction(state, checkpoint):
        raise CheckpointError(f"the checkpoint's numbers contradict each other: {problem}")
    return state


def _is_count(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number) and number >= 0


def _contradiction(state: dict, checkpoint: Checkpoint) -> str | None:
    """Say which numbers of a checkpoint cannot be together: an epoch that is over has had at least one step."""
    step, epoch, epoch_step = (state[name] for name in ("step", "epoch", "epoch_step"))
    steps = {name: tensor for name, tensor in checkpoint.tensors[OPTIMIZER].items() if name.endswith(".step")}
    if step != checkpoint.step:
        return f"{STATE} is of step {step}, the checkpoint of step {checkpoint.step}"
    if epoch + epoch_step > step or (epoch == 0 and epoch_step != step):
        return f"step {step} cannot be step {epoch_step} of epoch {epoch}"
    if state["skipped"] > step or step > state["total_steps"]:
        return f"{state['skipped']} skipped steps and {step} of {state['total_steps']} steps"
    broken = [name for name, tensor in steps.items() if not ((tensor >= 0) & tensor.isfinite()).all()]
    return f"{broken[0]} is no number of steps" if broken else None


def _make_states(trainer: Trainer) -> None:
    """Let the optimizer make its states where and as it wants them; with a rate of zero nothing else changes."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # each step sets it
    alone = trainer.settings.options.optimizer_in_backward  # there is no room for two gradients
    for together in [[parameter] for parameter in trainer.parameters] if alone else [trainer.parameters]:
        for parameter in together:
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)


def compare_tensors(saved: Tensors, wanted: Tensors, file: str) -> None:
    """Check that a file has exactly the tensors that are wanted, in their shapes and types."""
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} is not known here" for name in saved if name not in wanted]
    problems += [
        f"{name} is {_kind(saved[name])}, here {_kind(tensor)}"
        for name, tensor in wanted.items()
        if name in saved and _kind(saved[name]) != _kind(tensor)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"the checkpoint's {file} does not fit this run: {'; '.join(problems[:4])}{more}")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

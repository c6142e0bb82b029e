"""What learns in a frozen model: the interface that training, planning, checkpoints and files know.

A method says which weights it adds (or frees) and under which names files hold them. All else (the step, the ledger,
the optimizer, resuming) takes its parameters as it finds them, so that another method is one class like
``adapter.Lora``.
"""

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence

import torch
from torch import nn

from qlora_lite.errors import TrainingError
from qlora_lite.quant.merging import OFF

from .switch import Switch


class AdapterMethod:
    """A way to adapt a frozen model. ``apply`` and ``config`` are a method's own; the rest has defaults.

    Subclasses are frozen dataclasses: a plan compares them, and looks them up. A method whose adapters are used after
    training also has ``shapes`` and ``add_switched``, and an entry that is registered (``saved.SavedMethod``).

    ``why_not_merged`` says why its adapters can be neither merged nor exported ("" where they can), ``size_setting``
    names what in a recipe decides how much is trained, and ``trains_base`` says that the model's own weights learn, all
    of them, so that a run leaves a whole model and no adapter.
    """

    size_setting = "lora.rank"
    why_not_merged = "only LoRA adapters can be merged and exported"
    virtual_tokens: int = 0  # that are put before every row of a language model
    trains_unpacked = True  # whether it can be trained where rows of a batch run one by one and are recomputed so
    trains_base = False
    merge_aware = OFF  # see ``adapters.lora.inject.add_lora``

    @property
    def in_turn(self) -> bool:
        """Whether one block at a time is trained; see ``take_turn``."""
        return False

    @property
    def trained_tables(self) -> frozenset[str]:
        """Which of "embeddings" and "head" are trained, so that they cannot lie in host memory."""
        return frozenset()

    def apply(self, model: nn.Module) -> None:
        """Freeze a model and add what learns, in place.

        Of a model on the meta device no value may be drawn or read.

        Raises:
            ModelError: the model has no layer that it is for.
        """
        raise NotImplementedError

    def begin(self, model: nn.Module) -> None:
        """Give what learns those first values that only a model which computes has: before the first step of a run that
        begins afresh, with the weights in their places."""

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return what ``adapter_config.json`` says of an adapted model, enough to build the adapter again."""
        raise NotImplementedError

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained at present, with its names, always in the same order."""
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)

    def turn_begins(self, step: int) -> int:
        """Return the first step of the turn that a step is in, counted from 1; an optimizer begins afresh with each."""
        return 1

    def take_turn(self, model: nn.Module, step: int) -> None:
        """Free and freeze weights for the turn that a step is in, where not all is trained at all times."""

    def trained_base(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield those of the weights that a run trains that are the base model's own."""
        return iter(())

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that files hold by their names there; writing into them changes the adapter."""
        return {name: parameter.detach() for name, parameter in self.parameters(model)}

    def files(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors of a saved adapter, where using it takes others than resuming its training does.

        peft skips names that it does not know, with no more than a warning: a method that peft has too returns peft's
        names here, such as ``base_model.model.PATH.lora_A.weight``, and ``tensors`` the same ones for `fill`.
        """
        return self.tensors(model)

    def layers_not_reached(self, model: nn.Module, norms: Mapping[str, float]) -> list[str]:
        """Return the names of layers that the first backward pass gave no gradient although it should have.

        Args:
            norms: of the gradients of ``parameters``, by name.
        """
        return [name for name, _ in self.parameters(model) if not norms[name]]

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
        """Return what tells apart layers that are adapted differently, so that a plan knows which blocks are alike.

        The default says that no two are known to be: then a plan runs every block, which takes it longer.

        Args:
            linear: paths of linear layers.
            experts: paths of the weights of fused experts.
            in_blocks: paths of all modules inside of blocks.
        """
        return {name: name for name in (*linear, *experts)}

    def lr_ratios(self, names: Sequence[str], loraplus: float) -> list[float]:
        """Return what the learning rate of each parameter is multiplied by.

        Args:
            loraplus: train.loraplus_lr_ratio.

        Raises:
            TrainingError: the method has no weights that this ratio is for.
        """
        if loraplus != 1:
            raise TrainingError(f"train.loraplus_lr_ratio {loraplus:g} is for LoRA weights: set it to 1")
        return [1.0] * len(names)

    def does_nothing(self, model: nn.Module) -> bool:
        """Return whether an adapter that was trained for some steps is still the identity it began as."""
        return False

    def forget_pass(self, model: nn.Module) -> None:
        """Drop what a forward pass left behind that ended in an error."""

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that files hold, by their names there, of a base model without the adapter.

        Raises:
            ModelError: the model has no layer that it is for.
        """
        raise NotImplementedError

    def add_switched(self, model: nn.Module, switch: Switch, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter to a model for answers, used where a switch says so (``switch.Switch``).

        Args:
            model: its base, to which others may have been added.
            name: of the adapter in the switch.
            tensors: as files hold them.
        """
        raise NotImplementedError

    def fill(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of the names and shapes of ``tensors`` into an adapted model."""
        with torch.no_grad():
            for name, tensor in self.tensors(model).items():
                tensor.copy_(tensors[name])

    def check_reached(self, model: nn.Module, norms: Mapping[str, float]) -> None:
        """Check after the first backward pass that can show it that gradient reached every layer.

        Raises:
            TrainingError: naming the layers that got none.
        """
        if idle := self.layers_not_reached(model, norms):
            raise TrainingError(
                f"{len(idle)} of the wrapped layers got no gradient, first {idle[0]}; leave them out of lora.targets"
            )

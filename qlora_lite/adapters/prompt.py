"""Prompt tuning and p-tuning: embeddings of virtual tokens before every row are trained, and nothing in the model.

A virtual token is a negative id, -1 to -k. Whoever makes a row, for training or as a prompt, puts those ids in front of
it (``tokens.storage.virtual_ids``): so they count in lengths, packs, positions, plans and caches as any token does, and
the one place that knows more of them is the decoder's way from ids to embeddings.

    prompt tuning   e_i = P_i                               trained: P [k, D]
    p-tuning        e_i = MLP(P_i), of widths D, H, H, D    trained: P and the MLP, of which the saved adapter holds e

A model that scales its embeddings inside of the table (Gemma 3) does not scale these, and one that scales them behind
it (Gemma 2) does, as in peft.

Shapes: k virtual tokens, D the hidden size, T tokens of a micro-batch. All in float32.
Source: prompt tuning, arXiv 2104.08691; p-tuning, arXiv 2103.10385, its encoder here without the LSTM.
"""

import inspect
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import nn

from qlora_lite.errors import ModelError

from .method import AdapterMethod
from .switch import Switch

_NAME = "virtual_tokens"  # of the decoder's part
TENSOR = "prompt_embeddings"  # in adapter files, [k, D]


class VirtualPlaces(nn.Module):
    """The places of a decoder's virtual tokens, which is what this is a part of.

    It knows the ids of the pass under way, int64 [rows, T], of which the negative ones are virtual tokens.

    Args:
        count: k.
        first: tokens that they begin as what those do in the model; see ``AdapterMethod.begin``.
    """

    ids: torch.Tensor

    def __init__(self, count: int = 0, first: torch.Tensor | None = None):
        super().__init__()
        self._count, self.first = count, first

    @property
    def count(self) -> int:
        """How many of them a row wants."""
        return self._count

    def in_use(self) -> torch.Tensor | None:
        """Return their embeddings e; None where they may be any."""
        return None

    def replaced(self, found: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return a tensor [rows, T, F] with ``own`` [k, F] in the places of virtual tokens."""
        mine = own[(-1 - self.ids).clamp(min=0)].to(found.dtype)
        return torch.where((self.ids < 0)[..., None], mine, found)


class VirtualTokens(VirtualPlaces):
    """Virtual tokens whose embeddings are trained.

    Args:
        begin: what their embeddings begin as [k, D], float32.
        encoder_width: H of p-tuning; None is prompt tuning.
    """

    def __init__(self, begin: torch.Tensor, encoder_width: int | None = None):
        super().__init__(len(begin))
        self.embeddings = nn.Parameter(begin)
        self.encoder: nn.Module = nn.Identity()
        if encoder_width:
            width, device = begin.shape[1], begin.device
            sizes = (width, encoder_width), (encoder_width, encoder_width), (encoder_width, width)
            first, second, third = (nn.Linear(*size, device=device) for size in sizes)
            self.encoder = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self) -> torch.Tensor:
        """Return e, float32 [k, D]."""
        return self.encoder(self.embeddings)

    def in_use(self) -> torch.Tensor | None:
        """Return e."""
        return self()


class SwitchedTokens(VirtualPlaces):
    """The virtual tokens of several adapters, those used that a switch says (``switch``). Only for inference.

    Args:
        switch: of the model. Rows of one batch may not use several of them, since each wants tokens of its own.
    """

    def __init__(self, switch: Switch):
        super().__init__()
        self.switch = switch
        self.counts: dict[str, int] = {}
        self.by_name: dict[str, torch.Tensor] = {}  # e of each adapter that has its own

    @property
    def count(self) -> int:
        """How many a row wants, by the adapter in use."""
        return self.counts.get(self.name_in_use() or "", 0)

    def in_use(self) -> torch.Tensor | None:
        """Return e of the adapter in use; None where that has none."""
        return self.by_name.get(self.name_in_use() or "")

    def name_in_use(self) -> str | None:
        """Return the name of the adapter in use; None where that is the base, or several are."""
        rows = self.switch.rows
        return None if isinstance(rows, tuple) else rows


def virtual_tokens(model: nn.Module) -> VirtualPlaces | None:
    """Return the part of a model that has its virtual tokens; None where it has none."""
    return getattr(model.base_model, _NAME, None)


def count_virtual(model: nn.Module) -> int:
    """Return how many virtual tokens a model wants before every row, by the adapter in use."""
    part = virtual_tokens(model)
    return part.count if part else 0


def count_in(config: Mapping) -> int:
    """Return how many virtual tokens an adapter's configuration says, peft's too.

    Raises:
        ModelError: it says none.
    """
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ModelError(f"num_virtual_tokens must be a whole number of at least 1, not {count!r:.80}")
    return count


def switched_tokens(model: nn.Module, switch: Switch) -> SwitchedTokens:
    """Return the part of a model for the virtual tokens of several adapters, added to it where it is not there."""
    part = virtual_tokens(model)
    if not isinstance(part, SwitchedTokens):
        part = SwitchedTokens(switch)
        add_part(model, part)
    return part


def add_part(model: nn.Module, part: VirtualPlaces) -> None:
    """Give a decoder virtual tokens.

    Raises:
        ModelError: it has some already, or takes nothing but ids.
    """
    inner = model.base_model
    if virtual_tokens(model):
        raise ModelError("the model has virtual tokens already; load the base model again")
    config = model.config.get_text_config(decoder=True)
    of_ids = getattr(config, "hidden_size_per_layer_input", None)  # Gemma 3n's blocks look them up too
    if of_ids or "inputs_embeds" not in inspect.signature(inner.forward).parameters:
        raise ModelError(
            f"{type(model).__name__} computes more than embeddings from token ids, so that it has no "
            "place for virtual tokens; choose another adapter.method"
        )
    inner.add_module(_NAME, part.train(model.training))

    def embed(_decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return args, kwargs
        part.ids = ids
        found = model.get_input_embeddings()(ids.clamp(min=0))
        if (own := part.in_use()) is not None:
            found = part.replaced(found, own)
        return args[1:], kwargs | {"input_ids": None, "inputs_embeds": found}

    # OPT's forward calls its decoder past the model; of others, whichever comes first embeds
    for module in {inner, model.get_decoder()}:
        module.register_forward_pre_hook(embed, with_kwargs=True)


def first_tokens(model: nn.Module, count: int, ids: Sequence[int]) -> torch.Tensor:
    """Return tokens, repeated or cut to so many, or of a vocabulary those that are drawn; int64 [count]."""
    if ids:
        return torch.tensor(list(islice(cycle(ids), count)))
    return torch.randint(len(model.get_input_embeddings().weight), (count,))


def first_embeddings(model: nn.Module, count: int, ids: Sequence[int]) -> torch.Tensor:
    """Return the embeddings of ``first_tokens``; float32 [count, D]."""
    table = model.get_input_embeddings()
    if table.weight.is_meta:
        return torch.empty(count, table.weight.shape[1], device="meta")
    with torch.no_grad():
        return table(first_tokens(model, count, ids).to(table.weight.device)).float()


@dataclass(frozen=True)
class PromptTuning(AdapterMethod):
    """Virtual tokens before every row.

    Args:
        virtual_tokens: k.
        init_ids: tokens whose embeddings they begin with, repeated as often as it takes; none draws from the table.
        encoder_width: H of p-tuning's encoder; None trains the embeddings themselves.
    """

    virtual_tokens: int = 20
    init_ids: tuple[int, ...] = ()
    encoder_width: int | None = None

    size_setting = "prompt.virtual_tokens"
    why_not_merged = (
        "it is a prompt of virtual tokens, which no weight of the model holds; evaluate, generate, chat and serve use "
        "it as it is"
    )

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and give it virtual tokens.

        Raises:
            ModelError: the model has some already, or its decoder takes nothing but ids.
        """
        model.requires_grad_(False)
        begin = first_embeddings(model, self.virtual_tokens, self.init_ids)
        add_part(model, VirtualTokens(begin, self.encoder_width))

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return peft's configuration of prompt tuning, which p-tuning is too once its encoder has run."""
        text = model.config.get_text_config(decoder=True)
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "num_virtual_tokens": self.virtual_tokens,
            "token_dim": model.get_input_embeddings().weight.shape[1],  # OPT's may be narrower than its blocks
            "num_transformer_submodules": 1,
            "num_attention_heads": getattr(text, "num_attention_heads", 1),  # Mamba has none, and peft wants a number
            "num_layers": text.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        }

    @classmethod
    def described_by(cls, config: Mapping) -> "PromptTuning":
        """Return the method that a configuration describes, peft's too; of p-tuning, files hold what it computed.

        Raises:
            ModelError: it describes none.
        """
        return cls(count_in(config))

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return P, and the weights of p-tuning's network."""
        part = model.base_model.get_submodule(_NAME)
        encoder = {f"encoder.{name}": parameter.detach() for name, parameter in part.encoder.named_parameters()}
        return {TENSOR: part.embeddings.detach()} | encoder

    def files(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return e, which is all that using them takes."""
        with torch.no_grad():
            return {TENSOR: model.base_model.get_submodule(_NAME)().detach()}

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """See ``AdapterMethod``."""
        return {TENSOR: (self.virtual_tokens, model.get_input_embeddings().weight.shape[1])}

    def add_switched(self, model: nn.Module, switch: Switch, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """See ``AdapterMethod``."""
        part = switched_tokens(model, switch)
        part.counts[name], part.by_name[name] = self.virtual_tokens, tensors[TENSOR].to(model.device)

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
        """Say that no layer is adapted, so that all are alike."""
        return dict.fromkeys((*linear, *experts))

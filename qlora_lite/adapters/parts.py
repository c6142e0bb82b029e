"""Weights of the base model that are trained beside an adapter: embeddings, head, norms, biases, and rows of tokens.

They are trained in place, so that no second copy of them is in memory; who needs the original weights (a merge, a
comparison with the base) reads them from the model's files, or keeps those that it is about to change.

Tables and biases keep the type that the model computes in, and bfloat16 is rounded stochastically, as that of LoRA
weights is: a float32 copy of a table would take as much again as its gradient and its states. Norms are trained in
float32: they begin near 1, where a step of bfloat16 is 0.8 %, many times an update; each forward computes with them
rounded to the model's type.

Of single tokens rows of their own are trained (``kernels.token_rows``), in the type of the LoRA weights. They begin as
the table's; those of tokens that it has no row for, or that the tokenizer did not know, as the mean of all known
tokens' rows: so a new token is about as probable as one before training, and takes no probability from the others
(Hewitt, "Initializing new word embeddings for pretrained language models", 2021).

Shapes: tables [V, D], norms and biases [D].
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.kernels.token_rows import EmbeddingWithRows, HeadWithRows
from qlora_lite.offload.around import Around
from qlora_lite.quant.linear import QuantLinear

from .lora.layer import LoraWeights

TOKEN_ROWS = "token_rows"  # the rows of tokens in their table's module
EMBEDDINGS, HEAD, NORMS, BIASES, PROJECTOR = PARTS = "embeddings", "head", "norms", "biases", "projector"


class NormInFloat32(Around):
    """A norm with trained weights in float32, computed with in another type.

    Args:
        inner: the norm.
        dtype: that it computes in.
    """

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__(inner)
        self.dtype = dtype

    def forward(self, x: torch.Tensor, *others) -> torch.Tensor:
        rounded = {name: weight.to(self.dtype) for name, weight in self.named_parameters()}
        return functional_call(self.inner, rounded, (x, *others))


class LinearInFloat32(Around):
    """A linear layer with trained weights in float32, which computes in float32 whatever it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.float())


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with weights: transformers has no other mark for them than their class's
    name."""
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def is_headed(model: nn.Module) -> bool:
    """Return whether a model is transformers' for sequence classification, which its configuration says."""
    return bool(getattr(getattr(model, "config", None), "problem_type", None))


def base_path(model: nn.Module) -> str:
    """Return the name of a model's part between inputs and hidden states: of CLIP with a head, its vision tower."""
    prefix = model.base_model_prefix
    return prefix if hasattr(model, prefix) or not hasattr(model, "vision_model") else "vision_model"


def head_paths(model: nn.Module) -> set[str]:
    """Return the paths of the modules between hidden states and outputs of a model for classification.

    All that lies outside of its base model, and the base's pooler, which other architectures count to the head. A
    language model has none: its head is ``get_output_embeddings``.
    """
    if not is_headed(model):
        return set()
    inner = base_path(model)
    outside = {path for path, _ in model.named_modules() if path and path != inner and not path.startswith(f"{inner}.")}
    pooler = f"{inner}.pooler"
    return outside | {path for path, _ in model.named_modules() if path == pooler or path.startswith(f"{pooler}.")}


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the modules of ``head_paths`` by path."""
    paths = head_paths(model)
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in paths} if paths else {}


def train_head(model: nn.Module) -> None:
    """Let the head of a frozen model for sequence classification be trained, in float32: it has few weights, all new.

    Raises:
        ModelError: the model has none.
    """
    if not (paths := head_paths(model)):
        raise ModelError(f"{type(model).__name__} has no head for sequence classification to train")
    for path in sorted(paths):
        module = model.get_submodule(path)
        for leaf, parameter in module._parameters.items():
            module._parameters[leaf] = parameter if parameter is None else nn.Parameter(parameter.detach().float())
        if isinstance(module, nn.Linear) and model.dtype != torch.float32:
            model.set_submodule(path, LinearInFloat32(module))


def is_of_head(name: str) -> bool:
    """Return whether a parameter is one of those of ``train_head``, by its name."""
    return not {*name.split(".")}.isdisjoint(("score", "classifier", "pooler", "head"))


def reads_pictures(model: nn.Module) -> bool:
    """Return whether a model of transformers reads pictures and no tokens."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def has_vision_tower(model: nn.Module) -> bool:
    """Return whether a model of transformers reads pictures beside tokens."""
    return hasattr(getattr(model, "config", None), "vision_config") and not reads_pictures(model)


def tables_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return embeddings and head of a language model, None where it has none, as one of pictures does."""
    return None if reads_pictures(model) else model.get_input_embeddings(), model.get_output_embeddings()


def is_tied(model: nn.Module) -> bool:
    """Return whether the embeddings are the head too."""
    head = model.get_output_embeddings()  # first, since a model of pictures may have no embeddings
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def train_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Let parts of a frozen model be trained.

    Args:
        parts: some of ``PARTS``. Tied embeddings are trained as one table, which is the head too.

    Raises:
        ModelError: the model cannot have them trained.
    """
    if not parts:
        return
    if model.dtype == torch.float16:
        raise ModelError(
            _said(
                parts,
                "is trained in the type that the model computes in, and float16 loses small "
                "updates: set model.compute_dtype to float32",
            )
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if HEAD in parts and EMBEDDINGS not in parts and is_tied(model):
        raise ModelError(
            _said(
                [HEAD],
                "the head of this model is its embeddings (tie_word_embeddings): write "
                "embeddings, which trains the one table",
            )
        )
    tied_copy = EMBEDDINGS in parts and model.config.tie_word_embeddings
    if isinstance(head, QuantLinear) and (HEAD in parts or tied_copy):
        raise ModelError(
            _said(
                [HEAD if HEAD in parts else EMBEDDINGS], "a 4-bit head cannot be trained: set model.quant_head to false"
            )
        )
    named = dict(model.named_modules())
    chosen = {
        EMBEDDINGS: [name for name, module in named.items() if module is embedding],
        HEAD: [name for name, module in named.items() if module is head],
        NORMS: [name for name, module in named.items() if is_norm(module)],
        BIASES: [name for name, module in named.items() if _has_bias(module)],
        PROJECTOR: projector_paths(model),
    }
    for part in parts:
        if not chosen[part]:
            raise ModelError(_said([part], f"{type(model).__name__} has none; leave it out"))
        if part == PROJECTOR and any(isinstance(named[path], LoraWeights) for path in chosen[part]):
            raise ModelError(_said([part], "lora.targets adapt it too: leave it out of one of the two"))
        leaves = ("bias",) if part == BIASES else ("weight", "bias")
        own = {leaf for path in chosen[part] for leaf in named[path]._parameters}
        if part == PROJECTOR and (others := own - {*leaves}):
            raise ModelError(
                _said(
                    [part],
                    f"that of a {type(model).__name__} has a weight of its own form "
                    f"({min(others)}), which adapter files have no place for: leave it out",
                )
            )
        train_weights(
            model,
            (
                f"{path}.{leaf}"
                for path in chosen[part]
                for leaf in leaves
                if getattr(named[path], leaf, None) is not None
            ),
        )


def projector_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules with weights between a vision tower and a language model, both models of
    transformers."""
    if not has_vision_tower(model):
        return []
    prefix, inner = model.base_model_prefix, model.base_model
    parts = [name for name, part in inner.named_children() if not isinstance(part, PreTrainedModel)]
    return [
        f"{prefix}.{name}"
        for name, module in inner.named_modules()
        if name.split(".")[0] in parts and module._parameters
    ]


def _said(parts: Collection[str], what: str) -> str:
    return f"adapter.train_also {', '.join(parts)}: {what}"


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def train_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Let weights of a frozen model be trained.

    Args:
        names: paths of parameters.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[leaf]
        if is_norm(module) and parameter.dtype != torch.float32:
            module._parameters[leaf] = nn.Parameter(parameter.detach().float())
            if not isinstance(module, NormInFloat32):
                model.set_submodule(path, NormInFloat32(module, parameter.dtype))
        else:
            parameter.requires_grad_()


def train_tokens(model: nn.Module, tokens: Sequence[int], known: int, dtype: torch.dtype) -> None:
    """Let rows of tokens be trained, of a frozen model's embeddings and head.

    Args:
        tokens: rising.
        known: how many tokens the tokenizer had without new ones; those from there on are new.
        dtype: of the rows.

    Raises:
        ModelError: a table is trained whole, or its head has a bias or is in 4 bit.
    """
    if not tokens:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    fault = None
    if isinstance(head, QuantLinear):
        fault = "a 4-bit head has no rows to train: set model.quant_head to false"
    elif head.bias is not None:
        fault = "the head of this model has a bias for each token, which new ones would lack"
    elif embedding.weight.requires_grad or head.weight.requires_grad:
        fault = "embeddings or head are trained whole: leave these out of adapter.train_also"
    if fault:
        raise ModelError(f"adapter.train_tokens: {fault}")
    paths = {id(module): name for name, module in model.named_modules()}
    rows = {paths[id(embedding)]: _first_rows(embedding.weight, tokens, known, dtype)}
    rows[paths[id(head)]] = (
        rows[paths[id(embedding)]] if is_tied(model) else _first_rows(head.weight, tokens, known, dtype)
    )
    put_rows(model, {path: (tokens, each) for path, each in rows.items()})


def _first_rows(table: torch.Tensor, tokens: Sequence[int], known: int, dtype: torch.dtype) -> nn.Parameter:
    rows = torch.empty((len(tokens), table.shape[1]), dtype=dtype, device=table.device)
    if not rows.is_meta:
        old = [token for token in tokens if token < min(known, len(table))]
        rows[: len(old)] = table[old].to(dtype)
        rows[len(old) :] = table[:known].mean(0, dtype=torch.float32).to(dtype)
    return nn.Parameter(rows)


def put_rows(model: nn.Module, rows: Mapping[str, tuple[Sequence[int], nn.Parameter]]) -> None:
    """Give embeddings and head rows of tokens.

    Args:
        rows: tokens, rising, and their rows, by the path of the module; of tied tables the same parameter.
    """
    embedding, _ = tables_of(model)
    for path, (tokens, parameter) in rows.items():
        module = model.get_submodule(path)
        kind = EmbeddingWithRows if module is embedding else HeadWithRows
        model.set_submodule(path, kind(module, tokens, parameter))


def trained_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is trained of the base model, with its path, a tied table once: all that no LoRA layer added."""
    added = {id(p) for m in model.modules() if isinstance(m, LoraWeights) for p in m.parameters(recurse=False)}
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in added)


def freeze_weights(model: nn.Module) -> None:
    """Undo ``train_weights``: what was trained keeps its values, rounded to the model's type."""
    for name, parameter in list(trained_weights(model)):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == TOKEN_ROWS:
            continue
        if isinstance(module, NormInFloat32):
            module._parameters[leaf] = nn.Parameter(parameter.detach().to(module.dtype), requires_grad=False)
            if not any(p.requires_grad for p in module.parameters()):
                model.set_submodule(path, module.inner)
        else:
            parameter.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, EmbeddingWithRows | HeadWithRows):
            model.set_submodule(path, module.take_out())

"""How alike two models are, measured on the same tokens: loss, KL divergence, agreement on the first choice.

Logits of all tokens would be tokens x vocabulary for each model. What is kept of a model is its last hidden states and
its own head, a thousandth of that, and the logits are formed again for a few tokens at a time, in float32.

Legend: N target tokens, D hidden size.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.data.tokens.batch import Batch
from qlora_lite.kernels.loss import Head, head_logits
from qlora_lite.models.anatomy import device_of, head
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import hidden_states
from qlora_lite.train.workload import Workload

OF_TEXT = causal_lm()
CHUNK_TOKENS = 64  # of logits at once: 64 MiB for a vocabulary of 262,144


class Outputs(NamedTuple):
    """What a model says about target tokens: hidden states [N, D] and targets [N] on the host, and its head."""

    hidden: torch.Tensor
    head: Head
    targets: torch.Tensor
    device: torch.device


class Likeness(NamedTuple):
    """A model beside a reference.

    Args:
        loss: the model's mean loss per token.
        kl: mean over the tokens of KL(reference || model), in nats.
        agreement: share of tokens whose most probable next token is the reference's.
    """

    loss: float
    kl: float
    agreement: float


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Batch], work: Workload = OF_TEXT) -> Outputs:
    """Run a model over batches of a workload and keep what it says about their target tokens.

    Raises:
        ModelError: rows run together here would not give the model's own logits.
    """
    work.spec.check_forward(model.eval(), 0, work.batches)
    hidden, targets = [], []
    for batch in batches:
        inputs = work.batches.inputs(batch, device_of(model))
        hidden.append(hidden_states(model, inputs)[inputs.target_positions].cpu())
        targets.append(inputs.targets.cpu())
    own = head(model)
    kept: dict[str, Any] = {
        name: part.detach() for name, part in own._asdict().items() if isinstance(part, torch.Tensor)
    }
    return Outputs(torch.cat(hidden), own._replace(**kept), torch.cat(targets), device_of(model))


@torch.no_grad()
def compare(reference: Outputs, other: Outputs) -> Likeness:
    """Compare a model with a reference on the tokens that both saw; the reference with itself gives its loss."""
    total, loss, kl, agree = len(reference.targets), 0.0, 0.0, 0
    for start in range(0, total, CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        expected, found = (_log_probabilities(each, rows) for each in (reference, other))
        loss += functional.nll_loss(found, other.targets[rows], reduction="sum").item()
        kl += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
        agree += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return Likeness(loss / total, max(kl / total, 0.0), agree / total)  # in this order NaN stays


def _log_probabilities(model: Outputs, rows: slice) -> torch.Tensor:
    return torch.log_softmax(head_logits(model.hidden[rows].to(model.device), model.head), dim=-1).cpu()

"""Another package's loss in place of ``loss.chunked_cross_entropy``, on a GPU where it is the better one.

Liger (arXiv 2410.10989) and cut-cross-entropy (arXiv 2411.09009) do in one kernel what takes several passes over the
logits in plain torch. Neither is faster everywhere: Liger's multiplies the fewer tokens at once the larger the
vocabulary is beside the hidden size, cut-cross-entropy's multiplies by the head once more in backward. So no table
says which is used; each that is installed is tried on the run's own hidden states and head, and taken if it is faster,
holds no more memory on the largest micro-batch (a plan counts ours) and is about as near to float64 as ours.

Legend: N target tokens, D hidden size, V vocabulary.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch

from qlora_lite.memory.shapes import pieces

from .loss import Head, chunked_cross_entropy
from .trial import Trial, choose, timed

Loss = Callable[[torch.Tensor, torch.Tensor, Head], torch.Tensor]
"""The float32 sum over N tokens of hidden states [N, D] and targets int64 [N], as ``chunked_cross_entropy`` gives."""

CHECKED_TOKENS, CHECKED_WORDS = 16, 2048  # in float64, and words at once


def _liger(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    module = importlib.import_module("liger_kernel.transformers")
    return module.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap)(head.weight, hidden, targets)


def _cut(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    module = importlib.import_module("cut_cross_entropy")
    return module.linear_cross_entropy(hidden, head.weight, targets, softcap=head.softcap, reduction="sum")


FUSED: dict[str, tuple[str, Loss]] = {  # by the recipe's name: the package's, and its loss
    "liger": ("liger_kernel", _liger),
    "cut-cross-entropy": ("cut_cross_entropy", _cut),
}


def installed() -> list[str]:
    """Return the names in ``FUSED`` whose package is there; none is imported."""
    return [name for name, (package, _) in FUSED.items() if importlib.util.find_spec(package) is not None]


def candidates(setting: str, head: Head, device: torch.device) -> list[str]:
    """Return the losses to try for a setting of ``memory.fused_loss``, by name.

    None knows a head in 4 bit or in host memory, with a bias, or with a scale of its logits, none is tried with a head
    that is trained, and none promises the same bits each time.
    """
    is_plain = device.type == "cuda" and torch.is_tensor(head.weight) and head.weight.device == device
    is_plain = is_plain and not head.weight.requires_grad
    is_known = is_plain and head.bias is None and head.scale == 1.0
    if setting == "off" or not is_known or torch.are_deterministic_algorithms_enabled():
        return []
    return installed()


def choose_loss(
    names: Sequence[str], hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int
) -> str | None:
    """Return the name of the loss to use in place of ours, None to stay with it; say why.

    Args:
        names: of the losses to try.
        hidden: [N, D], those of a step; N at least 1.
        chunk_tokens: of ours.
    """
    ours = "the chunked loss", lambda hidden, targets, head: chunked_cross_entropy(hidden, targets, head, chunk_tokens)
    others = {name: FUSED[name][1] for name in names}
    return choose("memory.fused_loss", ours, others, lambda loss: try_loss(loss, hidden, targets, head))


def try_loss(loss: Loss, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> Trial:
    """Run a loss forward and backward a few times and compare its first tokens with float64."""
    took = timed(lambda: _value_and_gradient(loss, hidden, targets, head), hidden.device)
    return Trial(*took, *errors_of(loss, hidden[:CHECKED_TOKENS], targets[:CHECKED_TOKENS], head))


@torch.no_grad()
def errors_of(loss: Loss, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[float, float]:
    """Return how far a loss and its gradient are from float64's, relatively."""
    found, exact = _value_and_gradient(loss, hidden, targets, head), exact_loss(hidden, targets, head)
    value, gradient = (float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    return value, gradient


def _value_and_gradient(
    loss: Loss, hidden: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(hidden, targets, head)
        (gradient,) = torch.autograd.grad(value / len(targets), hidden)
    return value.detach(), gradient


def exact_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the gradient of its mean in float64, a few thousand words at a time; few tokens."""
    hidden, tiles = hidden.double(), list(pieces(head.weight.shape[0], CHECKED_WORDS))
    logits = torch.cat([hidden @ head.weight[words].double().T for words in tiles], dim=1)
    slopes = torch.ones((), dtype=torch.float64, device=hidden.device)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
        slopes = 1 - (logits / head.softcap).square()
    value = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    weights = logits.softmax(dim=1)
    weights[torch.arange(len(targets), device=hidden.device), targets] -= 1
    weights *= slopes / len(targets)
    return value, sum(weights[:, words] @ head.weight[words].double() for words in tiles)

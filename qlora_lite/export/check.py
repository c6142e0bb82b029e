"""Prove that an exported file does what the run's adapter does.

An export that loads elsewhere and silently does nothing is the fault that users report most. So every file is read
back, and must change the base model's logits as the run's adapter does. Logits are computed in float32, where an
adapter of the usual size stands far above rounding.

- Adapter files hold the run's own numbers:  error = ||exported - adapted|| / ||adapted - base||  is rounding.
- Merged files have rounded all weights, which may change the logits more than a small adapter does (Q8_0 moved those of
  SmolLM2 by 1.8 %, an adapter of its q_proj by 1.3 %). So the file is compared with the base rounded in the same way:
  share = <exported - rounded base, adapted - base> / ||adapted - base||^2 is 1 for the whole change, 0 for none. And
  the logits themselves must be near:  ||exported - adapted|| / ||adapted||.
- In 4 bits rounding changes more than many an adapter, so that the share is noise (0.4 to 1.9, seen with SmolLM2).
  Such a file must give the logits of the weights that were chosen for it, and what they cost is measured on rows.
"""

from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.adapters.files import attach_adapter, detach_adapter, weights_before
from qlora_lite.adapters.read import Adapter
from qlora_lite.errors import ModelError
from qlora_lite.models.anatomy import device_of

SEQUENCES, TOKENS = 2, 24
EXACT = 1e-3  # of an adapter file: rounding in float32 gives 1e-6, a scale wrong by 1 % gives 1e-2
SHARE = 0.2  # that a merged file's share may be off: the adapter's own rounding


class Change(NamedTuple):
    """Logits [rows, vocabulary] of the base model and of the base model with the run's adapter."""

    base: torch.Tensor
    adapted: torch.Tensor


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """Return a model's float32 logits for fixed random tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    device = device_of(model)
    ids = ids.to("cpu" if device.type == "meta" else device)  # a streamed model's weights come to the host
    return model.eval()(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().cpu()


def change_of(model: nn.Module, adapter: Adapter) -> Change:
    """Return what an adapter changes in a base model, which is left as it was.

    Raises:
        ModelError: it changes nothing.
    """
    base, before = logits_of(model), weights_before(model, adapter)
    adapted = logits_of(attach_adapter(model, adapter))
    detach_adapter(model, before)
    if torch.equal(base, adapted[:, : base.shape[1]]):
        raise ModelError("the run's adapter changes nothing in the base model's logits")
    return Change(base, adapted[:, : base.shape[1]])  # without tokens that the base does not have


def check_change(change: Change, exported: torch.Tensor, what: str) -> float:
    """Return the error of an adapter file's logits.

    Raises:
        ModelError: it is more than rounding; the text says so plainly where the file does nothing.
    """
    exported = exported[:, : change.base.shape[1]]
    error = ((exported - change.adapted).norm() / (change.adapted - change.base).norm()).item()
    if not error <= EXACT:
        share = share_of(change, exported, change.base)
        raise _wrong(what, share, f"relative error {error:.1e}, at most {EXACT:.0e} is allowed")
    return error


def check_merged(
    change: Change, exported: torch.Tensor, rounded: torch.Tensor, what: str, limit: float
) -> tuple[float, float]:
    """Return the share of the adapter's change in a merged file's logits, and their distance from the adapted ones.

    Args:
        rounded: logits of the base with its weights rounded as the file's are.
        limit: of the distance, or twice what rounding does to the base's logits where that is more.

    Raises:
        ModelError: one of them is out of bounds.
    """
    exported = exported[:, : change.base.shape[1]]
    limit = max(limit, 2 * distance_of(rounded, change.base))
    share, distance = share_of(change, exported, rounded), distance_of(exported, change.adapted)
    if not (abs(share - 1) <= SHARE and distance <= limit):
        raise _wrong(what, share, f"distance of the logits {distance:.1e}, at most {limit:.0e} is allowed")
    return share, distance


def check_model(own: torch.Tensor, exported: torch.Tensor, what: str, limit: float) -> float:
    """Return the distance of a whole model's logits, in a file of it, from its own.

    Args:
        limit: of the distance, from what rounding the weights does.

    Raises:
        ModelError: it is farther away.
    """
    if not (distance := distance_of(exported, own)) <= limit:
        found = f"distance of the logits {distance:.1e}, at most {limit:.0e} is allowed"
        raise ModelError(f"{what}, loaded back, does not do what the model does: {found}. Please report this")
    return distance


def distance_of(exported: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far logits are from others, of the size of those."""
    return ((exported - wanted).norm() / wanted.norm()).item()


def share_of(change: Change, exported: torch.Tensor, base: torch.Tensor) -> float:
    """Return how much of the adapter's change is in what a file changes in a base's logits."""
    wanted = change.adapted - change.base
    return ((exported - base).mul(wanted).sum() / wanted.square().sum()).item()


def _wrong(what: str, share: float, found: str) -> ModelError:
    nothing = " (it changes nothing)" if abs(share) < SHARE else ""
    return ModelError(
        f"{what}, loaded back, does not do what the adapter does{nothing}: it makes {share:.0%} of its change; "
        f"{found}. Please report this"
    )

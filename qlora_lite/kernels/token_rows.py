"""The rows of single tokens in place of a table's own, which stays frozen: of the embeddings, and of the head.

    e(t) = rows[i] if t = tokens[i], else table[t];     logits[tokens[i]] = hidden @ rows[i]

Tokens behind the table's end make it longer. What is trained is the rows alone: with their gradient and 8-bit states, 6
bytes a number in bfloat16, where the whole table would take its own size three times.

Legend: V rows of the table, n tokens, D hidden size.
Source: peft's ``trainable_token_indices`` does the same by a copy of the table with the rows in it, one a forward.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.offload.around import Around


class RowsOver:
    """A table with the rows of some tokens in place of its own: ``over[a:b]``, or ``over[numbers]``; without gradient.

    Args:
        table: [V, D], a tensor or anything that gives rows of one for a slice or for numbers.
        tokens: numbers of rows, rising.
        rows: [n, D], theirs.
        token_ids: the tokens int64 [n] where the rows are, for which a GPU need not be waited for; None makes them.
    """

    def __init__(self, table: Any, tokens: Sequence[int], rows: torch.Tensor, token_ids: torch.Tensor | None = None):
        self.table, self.tokens, self.trained = table, tuple(tokens), rows
        self.token_ids = torch.tensor(self.tokens, device=rows.device) if token_ids is None else token_ids
        self.shape = (max(table.shape[0], tokens[-1] + 1), table.shape[1])

    def __getitem__(self, which: slice | torch.Tensor) -> torch.Tensor:
        size = self.table.shape[0]
        if isinstance(which, torch.Tensor):
            found, places = self.table[which.clamp(max=size - 1)], self.places(which)
            own = self.trained.detach()[places.clamp(min=0)].to(found.dtype)
            return torch.where((places >= 0)[:, None], own, found)
        start, stop, _ = which.indices(self.shape[0])
        inside = slice(bisect_left(self.tokens, start), bisect_left(self.tokens, stop))
        found = self.table[min(start, size) : min(stop, size)]
        if inside.start == inside.stop:
            return found
        longer = found.new_zeros((stop - start, self.shape[1]))
        longer[: len(found)] = found
        longer[self.token_ids[inside] - start] = self.trained.detach()[inside].to(found.dtype)
        return longer

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the rows each token has, -1 for the table's own; int64 in the shape of ids."""
        return places_of(ids, self.token_ids)


def places_of(ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the place of each id among rising tokens int64 [n], or -1."""
    places = torch.searchsorted(tokens, ids.contiguous()).clamp_(max=len(tokens) - 1)
    return torch.where(tokens[places] == ids, places, -1)


class _WithRows(Around):
    """A table's module with rows of some tokens, its parameter ``token_rows`` [n, D].

    Args:
        inner: the module.
        tokens: rising.
        rows: theirs; of tied tables the same parameter.
    """

    token_ids: torch.Tensor
    token_rows: nn.Parameter

    def __init__(self, inner: nn.Module, tokens: Sequence[int], rows: nn.Parameter):
        super().__init__(inner)
        self.tokens = tuple(tokens)
        self.register_parameter("token_rows", rows)
        self.register_buffer("token_ids", torch.tensor(self.tokens, device=rows.device), persistent=False)

    @torch.no_grad()
    def put_in(self) -> nn.Module:
        """Return the module with the rows in its table, which must have a place for each."""
        self.inner.weight[self.token_ids] = self.token_rows.to(self.inner.weight.dtype)
        return self.take_out()

    def take_out(self) -> nn.Module:
        """Return the module without the rows."""
        del self._parameters["token_rows"], self._buffers["token_ids"]
        return self.inner


class EmbeddingWithRows(_WithRows):
    """Embeddings with rows of some tokens; what a model multiplies all embeddings by (Gemma) is theirs too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = places_of(ids, self.token_ids)
        is_own = places >= 0
        found = self.inner(ids.masked_fill(is_own, 0))
        own = functional.embedding(places.clamp(min=0), self.token_rows).to(found.dtype)
        scale = getattr(self.inner, "embed_scale", None)
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where(is_own[..., None], own, found)


class HeadWithRows(_WithRows):
    """A head without bias, with rows of some tokens."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.inner(hidden)
        own = functional.linear(hidden, self.token_rows.to(hidden.dtype))
        missing = max(0, self.tokens[-1] + 1 - logits.shape[-1])
        return functional.pad(logits, (0, missing)).index_copy(-1, self.token_ids, own)

"""Which adapter each row of a batch uses: the one thing that all layers of a model with several adapters look at.

The layers themselves belong to their methods: LoRA's are in ``lora.switch``, others in ``bottleneck``, ``prefix`` and
``prompt``.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from qlora_lite.errors import ModelError


class Switch:
    """The adapters of a model and which of them its rows use; all layers look here."""

    def __init__(self, adapters: Iterable[str]):
        self.names = tuple(adapters)
        self.rows: str | tuple[str | None, ...] | None = None
        self._places: dict[tuple, torch.Tensor] = {}

    def use(self, name: str | None) -> None:
        """Let every row use one adapter, or the bare base.

        Raises:
            ModelError: there is no such adapter.
        """
        self._check(name)
        self.rows = name

    def use_rows(self, names: Sequence[str | None]) -> None:
        """Let row i of the next calls use the adapter ``names[i]``; None is the bare base.

        Raises:
            ModelError: one of them is not there.
        """
        for name in names:
            self._check(name)
        self.rows = tuple(names) if len(set(names)) > 1 else next(iter(names), None)
        self._places.clear()

    def places(self, name: str | None, device: torch.device) -> torch.Tensor:
        """Return the numbers of the rows that use an adapter, int64 on a device; all layers get the same tensor."""
        key = self.rows, name, device
        if key not in self._places:
            rows = enumerate(self.rows or ())
            self._places[key] = torch.tensor([at for at, row in rows if row == name], device=device)
        return self._places[key]

    def per_row(self, x: torch.Tensor) -> int:
        """Return how much of x's first dimension each row has, where rows use several adapters.

        Args:
            x: [rows, ...]; or [rows * T, D] where an architecture joins the tokens of all rows, T of each (OPT's
                feed-forward part, experts), or also the heads of each token (the norms of gated delta networks).

        Raises:
            ModelError: x is of another number of rows.
        """
        count, size = len(self.rows or ()), x.shape[0]
        if size != count and (size % count or x.ndim > 2):
            raise ModelError(f"{count} rows have an adapter, the batch has {size}")
        return size // count

    def places_in(self, x: torch.Tensor, name: str | None) -> torch.Tensor:
        """Return where rows that use an adapter are in x's first dimension, int64 on its device; see ``per_row``."""
        places, count = self.places(name, x.device), self.per_row(x)
        return places if count == 1 else (places[:, None] * count + torch.arange(count, device=x.device)).flatten()

    @property
    def used(self) -> set[str | None]:
        """The names that rows use; None is the bare base."""
        return set(self.rows) if isinstance(self.rows, tuple) else {self.rows}

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Use an adapter inside the block, and what was used before again after it."""
        before = self.rows
        self.use(name)
        try:
            yield
        finally:
            self.rows = before

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ModelError(f"there is no adapter {name!r}; there are {', '.join(self.names)}")

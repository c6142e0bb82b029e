"""Remembered results are what the operators themselves would give."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.planning import meta_results
from qlora_lite.planning.meta_results import MetaResults, NeedsValuesError

META = torch.device("meta")


class Remembering(TorchDispatchMode):
    """Run every operation through one ``MetaResults``."""

    def __init__(self, with_values=False):
        super().__init__()
        self.results = MetaResults(with_values)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.results(func, args, kwargs or {})


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


MAKING = {
    "product": lambda: meta(3, 4) @ meta(4, 5),
    "product of a transposed matrix": lambda: meta(4, 3).t() @ meta(4, 5),
    "sum with promotion": lambda: meta(3, 4, dtype=torch.bfloat16) + meta(4),
    "times an integer": lambda: meta(3, dtype=torch.int64) * 2,
    "times a float": lambda: meta(3, dtype=torch.int64) * 2.0,
    "times a truth": lambda: meta(3, dtype=torch.bool) * True,
    "concatenation": lambda: torch.cat([meta(2, 3), meta(4, 3)]),
    "several results": lambda: torch.var_mean(meta(3, 4), dim=1),
    "another type": lambda: meta(3).to(torch.bfloat16),
    "an elementwise result of permuted strides": lambda: torch.sigmoid(meta(2, 3, 4).permute(2, 0, 1)),
    "gathered rows": lambda: meta(10, 4)[torch.empty(6, dtype=torch.int64, device=META)],
    "no values at all": lambda: meta(0, 4) * 2,
    "results of which one is left out": lambda: torch.ops.aten.native_layer_norm_backward(
        meta(3, 4), meta(3, 4), [4], meta(3, 1), meta(3, 1), None, None, [True, False, False]
    ),
}


@pytest.mark.parametrize("compute", MAKING.values(), ids=MAKING.keys())
def test_a_remembered_result_is_like_the_first_and_has_memory_of_its_own(compute):
    def parts():
        made = compute()
        return made if isinstance(made, tuple) else (made,)

    plain = parts()
    with Remembering():
        first, second = parts(), parts()
    for a, b, c in zip(plain, first, second, strict=True):
        if a is None:
            assert b is c is None
            continue
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert (a.shape, a.stride(), a.dtype, a.device) == (c.shape, c.stride(), c.dtype, c.device)
        assert a.untyped_storage().nbytes() == c.untyped_storage().nbytes()
        assert b.untyped_storage()._cdata != c.untyped_storage()._cdata


def test_equal_numbers_of_other_types_are_not_confused():
    with Remembering():
        whole, real = meta(3, dtype=torch.int64) * 2, meta(3, dtype=torch.int64) * 2.0
    assert (whole.dtype, real.dtype) == (torch.int64, torch.float32)


def test_what_writes_into_its_first_argument_gives_that_back():
    with Remembering():
        for _ in range(2):
            x = meta(3, 4)
            assert x.mul_(2) is x
            assert x.addmm_(meta(3, 5), meta(5, 4)) is x
            assert x.copy_(meta(4)) is x


def test_what_writes_into_an_argument_that_is_named_for_it_gives_that_back_in_its_shape():
    with Remembering():
        for _ in range(2):
            x, y = meta(3, 4), meta(0)
            assert torch.maximum(meta(4), meta(3, 1), out=x) is x and x.shape == (3, 4)
            assert torch.mm(meta(3, 5), meta(5, 4), out=y) is y and y.shape == (3, 4)


def test_an_operator_that_writes_into_a_named_argument_runs_once_for_its_shapes():
    with Remembering() as ours:
        for _ in range(3):
            torch.ops.aten.silu_backward(meta(3, 4), meta(3, 4), grad_input=meta(3, 4))
            torch.mm(meta(3, 5), meta(5, 4), out=meta(3, 4))
    known = [key[0] for key in ours.results._known]
    assert known.count(torch.ops.aten.silu_backward.grad_input) == known.count(torch.ops.aten.mm.out) == 1


def test_real_tensors_keep_their_values():
    with Remembering():
        for _ in range(2):
            assert torch.arange(4).tolist() == [0, 1, 2, 3]
            assert torch.zeros(2).add_(1).tolist() == [1, 1]


def test_views_share_memory_every_time():
    with Remembering():
        for _ in range(2):
            x = meta(3, 4)
            for view in (x[1:], x.t(), x.view(12), x.expand(2, 3, 4), x.detach(), torch.ops.aten._unsafe_view(x, [12])):
                assert view.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_an_operator_that_changes_shapes_in_place_runs_every_time():
    with Remembering():
        for _ in range(2):
            assert meta(3, 4).t_().shape == (4, 3)


def test_an_operator_runs_once_for_its_shapes():
    results, ran = MetaResults(), []

    class Counted:
        """An operator that says when it runs."""

        _schema, tags = torch.ops.aten.mm.default._schema, torch.ops.aten.mm.default.tags

        def __call__(self, *args):
            ran.append(args)
            return torch.ops.aten.mm.default(*args)

    operator = Counted()
    for _ in range(3):
        assert results(operator, (meta(2, 3), meta(3, 4)), {}).shape == (2, 4)
    assert results(operator, (meta(2, 3), meta(3, 5)), {}).shape == (2, 5)
    assert len(ran) == 2


def test_what_is_remembered_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(meta_results, "MAX_KNOWN", 3)
    results = MetaResults()
    for columns in range(1, 9):
        assert results(torch.ops.aten.mm.default, (meta(2, 3), meta(3, columns)), {}).shape == (2, columns)
        assert len(results._known) <= 3


def test_an_operator_that_needs_values_says_so():
    for look in (lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x.repeat_interleave(x.long())):
        with Remembering(), pytest.raises(NeedsValuesError, match=r"^aten\S+ cannot run without values \(.+\)$"):
            look(meta(3))


def test_what_is_made_of_counted_places_alone_is_known_and_nothing_else():
    with Remembering(with_values=True) as ours:
        for _ in range(2):
            places = torch.cat([torch.arange(length, device=META) for length in (3, 4)])[None]
            assert not (torch.diff(places, dim=-1) == 1).all()
            assert (torch.diff(places[:, 3:], dim=-1) == 1).all()
            assert places.max().item() == 3
        assert places.expand(4, -1)[2].max().item() == 3
        far = places.expand(5, -1), places[0][:, None] + places
        for unknown in (meta(7) + places, places + meta(7), *far, torch.zeros(7, device=META)):
            with pytest.raises(NeedsValuesError):
                unknown.sum().item()
        places.add_(1)
        with pytest.raises(NeedsValuesError):
            places.max().item()
        assert len(ours.results._values) == 0

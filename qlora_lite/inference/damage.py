"""How much four bits cost on a recipe's own held-out rows, and which layers to leave in 16 bit for it.

Measured are the model in 16 bit, with all linear layers in NF4, in FP4, and in 4 bit but for the layers of one kind
(all v_proj), or but for one block. What a set of several of these gains is guessed, as the sum of what each gains
alone, to choose the set, and then measured: gains overlap, and what is lost in one layer can make up for another's.
Recommended is the best of all that were measured, be it a single kind or block.

The choice is by the divergence from the 16-bit model, KL(16 bit || variant), and not by the loss. Losses of two models
on the same few rows differ at random by more than most single layers change them: on 12 rows of E2E, SmolLM2-135M in
NF4 but for its 15th block had 68 % of the loss gap closed, and 1 % of the divergence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qlora_lite.artifacts.trained_run import require_kind
from qlora_lite.errors import OutputError, RecipeError
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.damage_page import render_damage
from qlora_lite.train.causal_lm import TextBatches
from qlora_lite.units import format_bytes

from .evaluate import Watch
from .variants import SIXTEEN, StreamedBase, Variant

ROWS = 32
# What is recommended without a wish: the cheapest set for a share of the divergence, and the best for shares of the
# bytes of the whole base in 4 bit.
CLOSE, BYTES_SHARES = 0.5, (0.1, 0.25)
TRIES = 3  # sets that are measured until one closes the share that was asked for
OWN = "as the recipe says"


class Candidate(NamedTuple):
    """Layers that may stay in 16 bit: a kind or a block, the patterns that name it, the paths, what that takes."""

    group: str
    patterns: tuple[str, ...]
    kept: frozenset[str]
    more_bytes: int


def candidates_of(base: StreamedBase) -> dict[str, Candidate]:
    """Return each kind of layer and each block, by name."""
    linear = [path for path, weight in base.weights.items() if weight.name == "weight"]
    leaves = {path.rpartition(".")[2] for path in linear}
    kinds = dict.fromkeys(path.rpartition(".")[2] for path in linear)
    for path in sorted(base.weights.keys() - set(linear)):  # a name that linear layers have means those alone
        holder, leaf = path.split(".")[-2:]
        kinds[f"*.{holder}.{leaf}" if leaf in leaves else leaf] = None
    found = {kind: ("kind", (kind,)) for kind in kinds}
    for block in base.block_paths:
        experts = {
            path.rpartition(".")[0] for path in base.weights.keys() - set(linear) if path.startswith(f"{block}.")
        }
        found[block] = "block", (f"{block}.*", *(f"{path}.*" for path in sorted(experts)))
    candidates = {}
    for name, (group, patterns) in found.items():
        kept = base.kept(patterns)
        candidates[name] = Candidate(group, patterns, kept, base.more_bytes(kept))
    return candidates


@dataclass(slots=True)
class _Wish:
    """A set that is asked for, by the share of the divergence to close or by its bytes, and the one that was chosen.

    ``beyond`` is how many nats more than the share are guessed for it, after a set fell short.
    """

    close: float | None = None
    most_bytes: int | None = None
    beyond: float = 0.0
    names: tuple[str, ...] = ()
    guessed: float = 0.0
    kept: frozenset[str] = frozenset()

    @property
    def asked(self) -> str:
        """What is asked for, in words."""
        if self.most_bytes is None:
            return f"{100 * self.close:g}% of the divergence closed"
        return f"at most {format_bytes(self.most_bytes)} more"

    def best_of(self, measured: Mapping[frozenset[str], tuple[int, float]], whole: float) -> frozenset[str]:
        """Return the paths to keep, of those whose bytes and divergence were measured: the cheapest that close enough
        of the whole divergence, or else those with the least divergence, for the bytes if these are limited."""
        enough = [kept for kept, (_, kl) in measured.items() if self.close and kl <= (1 - self.close) * whole]
        if enough:
            return min(enough, key=lambda kept: measured[kept])
        small = [kept for kept, (more, _) in measured.items() if self.most_bytes is None or more <= self.most_bytes]
        return min(small, key=lambda kept: measured[kept][::-1])


def choose(
    base: StreamedBase,
    gains: Mapping[str, float],
    candidates: Mapping[str, Candidate],
    most_bytes: int | None,
    goal: float | None,
) -> tuple[tuple[str, ...], float]:
    """Return the names of kinds and blocks to leave in 16 bit, and what they are guessed to gain.

    Those that gain most for a byte come first; what one shares with those before is not counted again.

    Args:
        gains: nats of divergence by name, of each alone.
        most_bytes: that they may take more than in 4 bit; None is no limit.
        goal: nats at which to stop; None goes on while there is room.
    """
    chosen: list[str] = []
    have, guessed = frozenset[str](), 0.0
    for name in sorted(gains, key=lambda name: -gains[name] / candidates[name].more_bytes):
        each = candidates[name]
        new = base.more_bytes(each.kept - have)
        if gains[name] <= 0 or not new or (goal is not None and guessed >= goal):
            continue
        if most_bytes is not None and base.more_bytes(have) + new > most_bytes:
            continue
        chosen.append(name)
        have |= each.kept
        guessed += gains[name] * new / each.more_bytes
    return tuple(chosen), guessed


def measure_damage(
    recipe: Recipe,
    rows: int = ROWS,
    most_bytes: int | None = None,
    close: float | None = None,
    watch: Watch | None = None,
) -> dict:
    """Measure what four bits cost on a recipe's evaluation rows, and recommend what to leave in 16 bit.

    Args:
        rows: at most, to measure on.
        most_bytes: the set to recommend is the best for so many more bytes.
        close: it is the cheapest that closes this share of the divergence. Without either, those for ``CLOSE`` and
            for ``BYTES_SHARES`` of the whole base in 4 bit are.
        watch: told how far it is.

    Returns:
        model, quant, compute_dtype, rows, target_tokens, packed_bytes (of the layers in 4 bit), base_bytes (of the
        whole model so), models (each with name, group, loss, kl, closed, the share of the 4-bit model's divergence
        that it has not, loss_closed, the share of the loss, and more_bytes), and sets (asked, keep_16bit, guessed, and
        the same figures).

    Raises:
        QloraLiteError: see ``StreamedBase``; or nothing is as small as what may be taken.
    """
    require_kind(recipe, recipe.output.name or "the recipe", has_head=False)
    base = StreamedBase(recipe, rows, watch)
    quant, candidates = recipe.model.quant, candidates_of(base)
    least = min(candidates, key=lambda name: candidates[name].more_bytes)
    if most_bytes is not None and most_bytes < candidates[least].more_bytes:
        raise RecipeError(
            f"nothing fits in {format_bytes(most_bytes)}: the smallest, {least}, takes "
            f"{format_bytes(candidates[least].more_bytes)} more in 16 bit"
        )
    types = {quant: Variant(quant)} | {other: Variant(other) for other in ("nf4", "fp4")}
    own = {OWN: Variant(quant, base.kept(recipe.model.keep_16bit))} if recipe.model.keep_16bit else {}
    alone = {name: Variant(quant, each.kept) for name, each in candidates.items()}
    found = base.measure(types | own | alone, "measuring")
    plain, four = found[SIXTEEN], found[quant]

    def figures(measured: Mapping[str, float], kept: frozenset[str]) -> dict:
        whole = {key: four[key] - plain[key] for key in ("kl", "loss")}
        shares = {key: (four[key] - measured[key]) / gap if gap > 0 else None for key, gap in whole.items()}
        more = base.more_bytes(kept)
        return {**measured, "closed": shares["kl"], "loss_closed": shares["loss"], "more_bytes": more}

    packed = base.bytes_of(frozenset(base.weights), quant)
    groups = {SIXTEEN: ("type", frozenset(base.weights))}
    groups |= {name: ("type", each.kept) for name, each in (types | own).items()}
    groups |= {name: (each.group, each.kept) for name, each in candidates.items()}
    models = [{"name": name, "group": group} | figures(found[name], kept) for name, (group, kept) in groups.items()]
    result = {
        "model": base.name,
        "quant": quant,
        "compute_dtype": str(base.dtype).removeprefix("torch."),
        "rows": len(base.examples),
        "target_tokens": sum(map(int, TextBatches().target_counts(base.examples))),
        "packed_bytes": packed,
        "base_bytes": base.base_bytes,
        "models": models,
        "sets": [],
    }
    gains = {name: four["kl"] - found[name]["kl"] for name in candidates}
    wishes = (
        [_Wish(close, most_bytes)]
        if close or most_bytes
        else [_Wish(CLOSE), *(_Wish(most_bytes=int(share * base.base_bytes)) for share in BYTES_SHARES)]
    )
    measured = {frozenset[str](): four} | {each.kept: found[name] for name, each in candidates.items()}
    guesses = {frozenset[str](): ((), 0.0)} | {each.kept: ((name,), gains[name]) for name, each in candidates.items()}
    pending = wishes = wishes if four["kl"] > 0 else []
    for _ in range(TRIES):
        for wish in pending:
            goal = None if wish.close is None else wish.close * four["kl"] + wish.beyond
            wish.names, wish.guessed = choose(base, gains, candidates, wish.most_bytes, goal)
            wish.kept = frozenset[str]().union(*(candidates[name].kept for name in wish.names))
            guesses[wish.kept] = wish.names, wish.guessed
        if new := {wish.asked: Variant(quant, wish.kept) for wish in pending if wish.kept not in measured}:
            seen = base.measure({quant: Variant(quant)} | new, "checking sets")
            measured |= {each.kept: seen[asked] for asked, each in new.items()}
        short = {
            wish.asked: measured[wish.kept]["kl"] - (1 - wish.close) * four["kl"] for wish in pending if wish.close
        }
        pending = [wish for wish in pending if short.get(wish.asked, 0) > 0 and len(wish.kept) < len(base.weights)]
        for wish in pending:
            wish.beyond = wish.guessed - wish.close * four["kl"] + short[wish.asked]
    for wish in wishes:
        of_some = {kept: each for kept, each in measured.items() if len(kept) < len(base.weights)}  # else: quant none
        kept = wish.best_of({kept: (base.more_bytes(kept), each["kl"]) for kept, each in of_some.items()}, four["kl"])
        names, guessed = guesses[kept]
        missed = wish.close and measured[kept]["kl"] > (1 - wish.close) * four["kl"]
        asked = f"{wish.asked}, not reached" if missed else wish.asked
        patterns = [pattern for name in names for pattern in candidates[name].patterns]
        said = {"asked": asked, "keep_16bit": patterns, "guessed": guessed / four["kl"]}
        result["sets"].append(said | figures(measured[kept], kept))
    return result


def pages_of(out: Path) -> tuple[Path, Path]:
    """Return where the page and the figures beside it are written.

    Raises:
        OutputError: what is there is no figures of ours.
    """
    page = out if out.suffix == ".html" else out.with_name(f"{out.name}.html")
    data = page.with_suffix(".json")
    if data.exists():
        try:
            found = json.loads(data.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or not found.keys() >= {"models", "target_tokens"}:
            raise OutputError(f"{data}, where the figures would be, holds something else; choose another --out")
    return page, data


def write_damage(result: dict, out: Path) -> tuple[Path, Path]:
    """Write what was measured as one offline page and as JSON beside it; return their paths.

    Raises:
        OutputError: they cannot be written.
    """
    page, data = pages_of(out)
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(data, json.dumps(result, indent=2) + "\n")
    write_text(page, render_damage(result))
    return page, data

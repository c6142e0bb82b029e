"""Choose the fastest plan that fits, and say what else would.

A plan varies what changes memory and time and not the result: the memory options, and how many packs of a step go
through the model at once (their number per step stays). Every candidate is simulated; none is guessed. (Evaluation is
left out where it has no more tokens than training: it then needs less than training's forward pass, which keeps tensors
besides.) Among those that fit, the fastest by the time model wins; of plans that are as good as equally fast, the one
that moves less to the host, and then the one that needs the least memory.

The way begins with checkpointing per block. If that fits, keeping everything is tried. Where more packs at once
would pay and do not fit, or nothing fits at all, come the memory options that save more, in the order of what they
cost: tiles and, on a GPU, embeddings in host memory; then checkpoints there, the head, and at last the blocks' weights,
which come from the disk where the host has no room for any other plan. Several ranks first divide the blocks' weights
among them.
It ends where one more memory option makes nothing better. What memory the best then leaves buys back time: a block's
weights are dequantised once for its recomputation and its backward; on a GPU attention is not recomputed where rows
are so long that it shows; and as many of the last blocks are kept, or resident, as fit. More memory is then left, and
spent, with fewer packs at once and with what a GPU may have in host memory, as long as that makes the step faster.
"""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS
from qlora_lite.models.memory_options import MemoryOptions

from .candidate import EQUALLY_FAST, Candidate, Changes, Step, build_candidate, choose, settled, timed
from .largest import most
from .machine import Machine
from .predict import with_constants
from .simulate import along_last_blocks

FEWEST_ALIKE = 2  # blocks that run differently from the others, if any do; one alone is no line (``along_last_blocks``)
SPARED = 0.03  # of the limit, that is not spent on speed: a device's constants are known to a few percent
SMALL_CHUNK_TOKENS = 256
CHECKPOINT_EVERY = 2, 4  # blocks of a segment that are tried; more take more for themselves than they spare
TILE_TOKENS = 4096  # tokens of an automatic tile: dequantising a weight for each costs a few percent
SMALL_TILE_TOKENS = 1024  # the last resort


def search(step: Step, machine: Machine, limit_bytes: int) -> list[Candidate]:
    """Simulate the divisions and memory options that may be best; more packs at once as long as it fits and pays.

    What a disk costs is known least, so it is for what fits in no other way.
    """
    found: list[Candidate] = []
    if with_disk(step) != step:
        found = search(replace(step, fixed={**step.fixed, "offload_checkpoints": False}), machine, limit_bytes)
        if choose(found, limit_bytes) is not None:
            return found
    for each in with_less_on_host(with_disk(step)):
        found += _search(each, machine, limit_bytes)
        if choose(found, limit_bytes) is None:
            found += _in_segments(each, machine, found[-1], limit_bytes)
        if choose(found, limit_bytes) is not None or all(candidate.fits_host for candidate in found):
            break
    # The ways have candidates in common: those that keep on the device what they differ in.
    return list({(candidate.options, candidate.packs): candidate for candidate in found}.values())


def with_disk(step: Step) -> Step:
    """Return the step with its block inputs on a disk, if the user named one and did not say what to do with them."""
    if "offload_folder" not in step.fixed or "offload_checkpoints" in step.fixed:
        return step
    return replace(step, fixed={**step.fixed, "offload_checkpoints": True})


def with_less_on_host(step: Step) -> Iterator[Step]:
    """Yield the step, then with its block inputs on the device, then with all weights there too, as far as may be; at
    last with streamed weights on the disk, and then with its block inputs on the device."""
    yield step
    inputs: Changes = {"offload_checkpoints": False}
    on_disk: Changes = {"stream_from": "disk"}
    blocks: Changes = {"stream_from": "ranks"} if shards_of(step) > 1 else {"resident_layers": None}
    weights = {"host_embeddings": False, "host_head": False, **blocks}
    ways = [inputs, inputs | weights]
    if step.job.workload.spec.is_quantized and step.fixed.get("resident_layers", 0) is not None:
        ways += [on_disk, on_disk | inputs]
    seen = [step.fixed]
    for options in ways if step.job.device_type == "cuda" else ():
        fixed = {**options, **step.fixed}
        if fixed not in seen:
            yield replace(step, fixed=fixed)
            seen.append(fixed)


def in_segments(step: Step, options: MemoryOptions) -> Iterator[MemoryOptions]:
    """Yield the memory options with the inputs of fewer and fewer blocks kept, and no weights streamed, if that may
    be."""
    changes: Changes = {"layers_per_checkpoint": 1, "resident_layers": None}
    if options.recomputes and not changes.keys() & {name for name in step.fixed if step.fixed[name] is not None}:
        for every in CHECKPOINT_EVERY:
            yield replace(options, **changes | {"layers_per_checkpoint": every})


def _search(step: Step, machine: Machine, limit_bytes: int) -> list[Candidate]:
    start = first_options(step)
    found = _divisions(step, machine, start, limit_bytes)
    best = choose(found, limit_bytes)
    limited = best is None or any(
        candidate.peak_bytes > limit_bytes and candidate.step_seconds * EQUALLY_FAST < best.step_seconds
        for candidate in found
    )
    if best is not None and _may_keep_all(step):
        # What does not fit with blocks recomputed would not fit with more kept.
        keeping_all = _divisions(step, machine, replace(start, checkpointing="none"), limit_bytes)
        found += keeping_all
        if all(candidate.peak_bytes <= limit_bytes for candidate in keeping_all):
            return found  # more memory would change nothing
    for options in smaller(step) if limited else ():
        best = choose(found, limit_bytes)
        more = _divisions(step, machine, options, limit_bytes, best.packs if best else 1)
        found += more
        if best is not None and choose(found, limit_bytes) is best and all(each.fits_host for each in more):
            break
    best = choose(found, limit_bytes)
    if best is None:
        found += _with_less_to_stream(step, machine, found, limit_bytes)
        best = choose(found, limit_bytes)
    if best is not None:
        found += _spending(step, machine, best, limit_bytes)
        found += _freeing_and_spending(step, machine, best, choose(found, limit_bytes) or best, limit_bytes)
        return _with_single_changes(step, machine, found, limit_bytes)
    if "loss_chunk_tokens" not in step.fixed:
        small = replace(found[-1].options, loss_chunk_tokens=SMALL_CHUNK_TOKENS)
        found.append(build_candidate(step, machine, small, step.sizes()[0]))
    return found


def _in_segments(step: Step, machine: Machine, last: Candidate, limit_bytes: int) -> list[Candidate]:
    """Return the last candidate with the inputs of fewer blocks kept, where they are what there is no room for."""
    if last.options.offload_checkpoints and last.fits_host:
        return []
    found: list[Candidate] = []
    for options in in_segments(step, last.options):
        found.append(build_candidate(step, machine, options, last.packs))
        if found[-1].fits(limit_bytes):
            break
    return found


def first_options(step: Step) -> MemoryOptions:
    """Return the memory options that the search begins with: what the user fixed, checkpointing per block, and merged
    weights kept."""
    merged = step.fixed.get("resident_layers") is None
    return replace(MemoryOptions(loss_chunk_tokens=AUTO_CHUNK_TOKENS, cache_merged=merged), **step.fixed)


def smaller(step: Step) -> Iterator[MemoryOptions]:
    """Yield memory options that need less and less memory, the cheapest in time first."""
    options = first_options(step)
    changes: list[Changes] = [{"tile_tokens": TILE_TOKENS}]
    # blocks that keep their activations must stay where they are
    streamed = [_streamed(step, options)] if options.recomputes and _may_stream(step, options) else []
    if shards_of(step) > 1:
        changes += streamed
    if step.job.device_type == "cuda":  # elsewhere there is no other memory to go to
        tables = movable_tables(step)
        if tables and not step.job.workload.spec.tables_are_tied:
            changes[0] |= tables.pop(0)  # of the embeddings a few KiB a token travel
        inputs = [{"offload_checkpoints": True}] if options.recomputes else []
        changes += [*inputs, *tables, {"cache_merged": False}, *({**each, "stream_from": "host"} for each in streamed)]
    changes.append({"cache_merged": False})
    changes.append({"tile_tokens": SMALL_TILE_TOKENS})
    for change in changes:
        earlier, options = options, replace(options, **{k: v for k, v in change.items() if k not in step.fixed})
        if options != earlier:
            yield options


def shards_of(step: Step) -> int:
    """Return among how many ranks blocks can be divided."""
    return step.fixed["shards"].count if "shards" in step.fixed else 1


def _streamed(step: Step, options: MemoryOptions) -> Changes:
    """Return the memory options that stream all blocks but the uncheckpointed ones, from other ranks if there are
    any."""
    return {
        "cache_merged": False,
        "resident_layers": options.uncheckpointed_layers,
        "stream_from": "ranks" if options.shards.count > 1 else "host",
    }


def movable_tables(step: Step) -> list[dict[str, bool]]:
    """Return the memory options that put the embeddings and a 16-bit head into host memory; one where they are the
    same."""
    tables = dict.fromkeys(step.job.workload.spec.movable_tables(step.job.workload.method), True)
    return [tables] if step.job.workload.spec.tables_are_tied else [{name: True} for name in tables]


def _divisions(
    step: Step, machine: Machine, options: MemoryOptions, limit_bytes: int, fewest_packs: int = 1
) -> list[Candidate]:
    found: list[Candidate] = []
    for packs in (size for size in step.sizes() if size >= fewest_packs or not step.may_split):
        found.append(build_candidate(step, machine, options, packs))
        slower = len(found) > 1 and found[-1].step_seconds * EQUALLY_FAST > found[-2].step_seconds
        if found[-1].peak_bytes > limit_bytes or slower:
            break
    return found


def _may_keep_all(step: Step) -> bool:
    return "checkpointing" not in step.fixed and not first_options(step).is_of_second_runs


def _spending(step: Step, machine: Machine, best: Candidate, limit_bytes: int) -> list[Candidate]:
    """Return candidates that spend on speed what memory the best leaves."""
    reusing = _with_weights_reused(step, machine, best, limit_bytes)
    best = choose([best, *reusing], limit_bytes) or best
    selective = _with_attention_kept(step, machine, best, limit_bytes)
    room = int((1 - SPARED) * limit_bytes)
    more = [_with_more_on_device(step, machine, each, room) for each in (best, *selective)]
    return [*reusing, *selective, *chain.from_iterable(more)]


def _freeing_and_spending(
    step: Step, machine: Machine, start: Candidate, best: Candidate, limit_bytes: int
) -> list[Candidate]:
    """Return candidates that need less than where the spending began, and spend that too, as long as it pays.

    Fewer packs at once, and what a GPU has in host memory at next to no cost in time, make room for blocks that are
    not recomputed.
    """
    if not best.options.recomputes or best.options.resident_layers is not None or "uncheckpointed_layers" in step.fixed:
        return []
    found: list[Candidate] = []
    for options in _moved_to_host(step, start.options):
        for packs in (size for size in step.sizes() if size <= start.packs):
            if (options, packs) != (start.options, start.packs):
                freeing = build_candidate(step, machine, options, packs)
                if freeing.fits(limit_bytes):
                    found += [freeing, *_spending(step, machine, freeing, limit_bytes)]
        earlier, best = best, choose([best, *found], limit_bytes) or best
        if best is earlier and options != start.options:
            break
    return found


def _with_single_changes(step: Step, machine: Machine, found: list[Candidate], limit_bytes: int) -> list[Candidate]:
    """Return the candidates, and those that differ from the best of all in one memory option: the search goes another
    way.

    What moves more to the host is left out, since it is never faster, and what would spend the memory that is spared.
    """
    best: Candidate | None = None
    room = (1 - SPARED) * limit_bytes
    while best is not (best := choose(found, limit_bytes)):
        assert best is not None  # one fits
        known = {candidate.options for candidate in found if candidate.packs == best.packs}
        changed = [
            options
            for options in single_changes(step, best.options)
            if options not in known and options.host_rank <= best.options.host_rank
        ]
        more = [build_candidate(step, machine, options, best.packs) for options in changed]
        found = found + [candidate for candidate in more if candidate.peak_bytes <= max(room, best.peak_bytes)]
    return found


def single_changes(step: Step, options: MemoryOptions) -> Iterator[MemoryOptions]:
    """Yield memory options with one of them changed, those left out that the user fixed."""
    changes: list[Changes] = []
    if options.recomputes:
        changes.append({"tile_tokens": None if options.tile_tokens else TILE_TOKENS})
        if step.job.workload.spec.is_quantized:
            changes.append({"cache_dequantized": not options.cache_dequantized})
    if options.resident_layers is None:
        changes.append({"cache_merged": not options.cache_merged})
    if options.recomputes and step.job.device_type == "cuda":
        if not options.compile and not options.uses_disk:  # which would have to take twice as much
            changes.append({"checkpointing": "selective" if options.checkpointing == "block" else "block"})
        changes.append({"offload_checkpoints": not options.offload_checkpoints})
    if (
        options.recomputes
        and _may_stream(step, options)
        and "resident_layers" not in step.fixed
        and (step.job.device_type == "cuda" or options.shards.count > 1)
    ):
        other = _streamed(step, options) if options.resident_layers is None else {"resident_layers": None}
        changes.append({name: value for name, value in other.items() if name not in step.fixed})
    for table in movable_tables(step) if step.job.device_type == "cuda" else ():
        changes.append({name: not getattr(options, name) for name in table})
    for change in changes:
        if not change.keys() & step.fixed.keys():
            yield settled(step, replace(options, **change))


def _may_stream(step: Step, options: MemoryOptions) -> bool:
    """Return whether all blocks but the uncheckpointed ones may be streamed.

    Of blocks that are trained all are, or none, where they learn in turn or are divided: of the former a plan is that
    of the first block's turn, and of a resident one of either kind gradients and states lie on the device.
    """
    return (
        options.layers_per_checkpoint == 1
        and not (_all_or_none(step) and options.uncheckpointed_layers)
        and not step.fixed.get("cache_merged")
    )


def _all_or_none(step: Step) -> bool:
    method = step.job.workload.method
    return method.in_turn or (method.trains_base and shards_of(step) > 1)


def _moved_to_host(step: Step, options: MemoryOptions) -> Iterator[MemoryOptions]:
    """Yield the memory options, then with embeddings and head in a GPU's host memory, then with block inputs there too;
    where there are tiles, which cost time, with all of that at once in their place."""
    yield options
    changes: list[Changes] = [dict(ChainMap(*movable_tables(step))), {"offload_checkpoints": True}]
    if options.tile_tokens is not None:
        changes = [{"tile_tokens": None} | changes[0] | changes[1]]
    for change in changes if step.job.device_type == "cuda" else ():
        earlier, options = options, replace(options, **{k: v for k, v in change.items() if k not in step.fixed})
        if options != earlier:
            yield options


def _with_weights_reused(step: Step, machine: Machine, best: Candidate, limit_bytes: int) -> list[Candidate]:
    """Return the candidate that dequantises each weight of a block's backward once, if spare memory allows it.

    It comes before whole blocks are kept: it takes the weights of one and serves all.
    """
    if "cache_dequantized" in step.fixed or not step.job.workload.spec.is_quantized or not best.options.recomputes:
        return []
    reusing = build_candidate(step, machine, replace(best.options, cache_dequantized=True), best.packs)
    return [reusing] if reusing.fits((1 - SPARED) * limit_bytes) else []


def _with_attention_kept(step: Step, machine: Machine, best: Candidate, limit_bytes: int) -> list[Candidate]:
    """Return the candidate that does not compute attention again, if spare memory allows it and it shows in the time.

    Where the device has no room for what that keeps, it goes to host memory. A CPU keeps attention's results anyway.
    """
    x = best.options
    if "checkpointing" in step.fixed or step.job.device_type == "cpu" or x.checkpointing != "block" or x.compile:
        return []
    if x.uses_disk:  # which would have to take twice as much
        return []
    selective = replace(x, checkpointing="selective")
    ways = [selective]
    if "offload_checkpoints" not in step.fixed and not selective.offload_checkpoints:
        ways.append(replace(selective, offload_checkpoints=True))
    for options in ways:
        found = build_candidate(step, machine, options, best.packs)
        if found.step_seconds * EQUALLY_FAST > best.step_seconds:
            return []
        if found.fits((1 - SPARED) * limit_bytes):
            return [found]
    return []


def _with_more_on_device(step: Step, machine: Machine, best: Candidate, limit_bytes: int) -> list[Candidate]:
    """Return candidates with as many last blocks kept (of streamed ones resident, or both) as the limit allows, if it
    allows any; where it has room for nearly all, also one that keeps all."""
    if not best.options.recomputes:
        return []
    ways: list[tuple[str, ...]] = [("uncheckpointed_layers",)]
    if best.options.resident_layers is not None:  # of the same last blocks, so not where the user fixed some
        ways = (
            []
            if best.options.uncheckpointed_layers or _all_or_none(step)
            else [("resident_layers",), ("resident_layers", "uncheckpointed_layers")]
        )
    ways = [names for names in ways if not step.fixed.keys() & {*names}]
    raised = (_raised(step, machine, best, names, limit_bytes) for names in ways)
    found = [candidate for candidate in raised if candidate.options != best.options]
    nearly_all = step.job.workload.spec.depth - FEWEST_ALIKE, None
    kept = [(candidate.options.uncheckpointed_layers, candidate.options.resident_layers) for candidate in found]
    if nearly_all in kept and _may_keep_all(step):
        changes: Changes = {"checkpointing": "none", "cache_dequantized": False, "offload_checkpoints": False}
        unset = {name: value for name, value in changes.items() if name not in step.fixed}
        keeps_all = build_candidate(step, machine, replace(best.options, **unset), best.packs)
        found += [keeps_all] if keeps_all.fits(limit_bytes) else []
    return found


def _with_less_to_stream(step: Step, machine: Machine, found: list[Candidate], limit_bytes: int) -> list[Candidate]:
    """Return the last candidate that only the host has no room for in two ways that leave more on the device: with all
    blocks resident, and with as many as fit there."""
    streamed = [c for c in found if c.options.resident_layers is not None and c.peak_bytes <= limit_bytes]
    if not streamed or "resident_layers" in step.fixed:
        return []
    last = streamed[-1]
    resident = build_candidate(step, machine, replace(last.options, resident_layers=None), last.packs)
    return [resident, *_with_more_on_device(step, machine, last, limit_bytes)]


def _raised(step: Step, machine: Machine, best: Candidate, names: Sequence[str], limit_bytes: int) -> Candidate:
    """Return a candidate with as many last blocks kept, resident or both, by the memory options' names, as fit."""
    depth = step.job.workload.spec.depth

    def options_with(count: int) -> MemoryOptions:
        changes: Changes = dict.fromkeys(names, count)
        return replace(best.options, **changes)

    job = replace(best.prediction.job, options=options_with(1))
    at = along_last_blocks(job)
    line = {0: best.prediction.simulation}

    def peak_of(count: int) -> int:
        line[count] = at(count)
        return with_constants(job, line[count]).peak_bytes

    few = FEWEST_ALIKE - 1  # are left out at both ends
    count = most(lambda n: peak_of(n + few if n else 0), limit_bytes, depth - 1 - 2 * few)
    count += few if count else 0
    options = options_with(count)
    prediction = with_constants(replace(job, options=options), line[count])
    return timed(machine, options, best.packs, best.micro_batches, prediction)

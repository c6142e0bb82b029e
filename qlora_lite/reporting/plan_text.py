"""A plan as text, as a JSON object and as the record that the page draws; why it was chosen, in one line."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict

import torch

from qlora_lite.memory.bar import memory_bar
from qlora_lite.models.load import auto_dtype
from qlora_lite.planning.candidate import Candidate
from qlora_lite.planning.machine import DISK_BYTES_PER_SECOND, HOST_UPDATES_PER_SECOND
from qlora_lite.planning.simulate import simulate_whole
from qlora_lite.prepare.plan import Alternative, Plan, disk_bytes, host_bytes
from qlora_lite.prepare.ranks import part_of_base
from qlora_lite.units import counted, format_bytes, format_count, format_seconds

WIDTH = 80  # of a terminal
MUCH_FREE = 0.25  # of the budget: a plan that leaves more says why


def reason(plan: Plan) -> str:
    """Return what the plan chose, and why, in one line."""
    return f"{_in_words(plan.chosen)}: {_why(plan)}"


def _why(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit; this is the smallest of {len(plan.found)} plans tried"
    if len(plan.found) == 1:
        return "as the recipe says"
    faster = _faster(plan)
    too_large = [c for c in faster if c.peak_bytes > plan.limit_bytes]
    fastest = (
        "the fastest that fits"
        if too_large
        else (
            f"the fastest of {len(plan.found)} plans tried"
            if all(c.fits_host for c in faster)
            else "the fastest that fits in host memory"
        )
    )
    if any(c.fits(plan.limit_bytes) for c in faster):
        fastest = f"least host memory, then least GPU memory, among plans within 3 % of {fastest}"
    if not too_large:
        return fastest
    return f"{fastest}; a faster plan would need {_peak(plan, min(too_large, key=lambda c: c.peak_bytes))}"


def _faster(plan: Plan) -> list[Candidate]:
    return [c for c in plan.found if c.step_seconds < plan.chosen.step_seconds and c is not plan.chosen]


def _peak(plan: Plan, candidate: Candidate) -> str:
    return format_bytes(plan.machine.base_bytes + candidate.peak_bytes)


def _why_free(plan: Plan) -> str | None:
    """Return why much of the budget stays unused; None if little does."""
    free_bytes = plan.budget_bytes - plan.peak_bytes
    if not plan.fits or free_bytes < MUCH_FREE * plan.budget_bytes:
        return None
    faster = _faster(plan)
    fitting = [c for c in faster if c.fits(plan.limit_bytes)]
    if fitting:
        best = min(fitting, key=lambda c: c.step_seconds)
        share = 1 - best.step_seconds / plan.chosen.step_seconds
        what = f"the fastest plan that fits takes {_peak(plan, best)} and saves {100 * share:.1f} % of the time"
    elif len(plan.found) == 1:
        what = "the recipe leaves no memory option open"
    elif any(c.peak_bytes > plan.limit_bytes for c in faster):
        what = "the next faster plan does not fit"
    elif faster:
        what = "faster plans need more host memory than there is"
    else:
        what = "no plan that uses more is faster"
    return f"{format_bytes(free_bytes)}: {what}"


def _assumed_sequences(plan: Plan) -> str | None:
    """Return how many examples a sequence is assumed to pack; None if examples were read, or it holds one."""
    lengths = plan.step.pack.lengths
    if len(lengths) == 1 or plan.step.pack != plan.step.job.workload.batches.full_pack(sum(lengths), packing=True):
        return None
    assumed = f"{len(lengths)} examples per packed sequence, one of them with nearly all of its tokens"
    if len({*lengths}) == 1 and plan.step.job.workload.batches.sequences == len(lengths):
        assumed = f"{len(lengths)} sequences of one example, of {lengths[0]:,} tokens each"
    return f"no data was read; assumed: {assumed}"


def _compute_type(plan: Plan) -> str | None:
    """Return what the step computes in, where that is not bfloat16, and why if the model is the reason."""
    work, auto = plan.step.job.workload, plan.machine.dtype
    dtype = work.spec.compute_dtype
    if dtype == torch.bfloat16:
        return None
    exceeds = dtype != auto and dtype == auto_dtype(auto, work.spec.name)
    return _type_name(plan) + exceeds * f": {work.spec.name} exceeds float16"


def _type_name(plan: Plan) -> str:
    return str(plan.step.job.workload.spec.compute_dtype).removeprefix("torch.")


def _in_words(chosen: Candidate) -> str:
    x = chosen.options
    kept_layers = x.uncheckpointed_layers if x.recomputes else 0
    kept = f" except for the last {counted(kept_layers, 'layer')}" if kept_layers else ""
    where = {
        "host": "streamed from host memory" + (f" of {x.shards.count} ranks, each a part" if x.is_sharded else ""),
        "disk": "streamed from disk",
        "ranks": f"sharded over {x.shards.count} ranks",
    }[x.stream_from]
    resident = f" except for {counted(x.resident_layers, 'layer')}" if x.resident_layers else ""
    streamed = "" if x.resident_layers is None else f", weights {where}{resident}"
    place = "on disk" if x.uses_disk else "in host memory"
    return (
        f"checkpointing {x.checkpointing}{kept}"
        + (f", {x.layers_per_checkpoint} layers per checkpoint" if x.recomputes and x.layers_per_checkpoint > 1 else "")
        + (f", tiles of {x.tile_tokens} tokens" if x.tile_tokens else "")
        + (", weights dequantised once per backward" if x.dequantizes_once else "")
        + (", merged once a step" if x.cache_merged else "")
        + (", embeddings in host memory" if x.host_embeddings else "")
        + (", head in host memory" if x.host_head else "")
        + (f", block inputs {place}" if x.offload_checkpoints and x.recomputes else "")
        + (", weights updated in backward" if x.optimizer_in_backward else "")
        + (", blocks compiled" if x.compile else "")
        + streamed
        + (f", loss chunk {x.loss_chunk_tokens}" if x.loss_chunk_tokens else "")
        + f", micro-batch size {chosen.packs}, micro-batches {chosen.micro_batches}"
    )


def transfers(plan: Plan) -> str | None:
    """Return how long a step's copies from host or other ranks take, and whether they are hidden; None without any."""
    work, machine, steps = plan.chosen.prediction.simulation.work, plan.machine, plan.chosen.micro_batches
    bus, link, computing, starting = (
        steps * seconds(work)
        for seconds in (machine.bus_seconds, machine.link_seconds, machine.computing_seconds, machine.starting_seconds)
    )
    hides, what = max(computing, starting), "of launching operations" if starting > computing else "of computation"
    parts = []
    what_ranks_send = "weights and their gradients" if plan.step.job.workload.method.trains_base else "weights"
    for seconds, of in ((bus, "of copies between host and GPU"), (link, f"of {what_ranks_send} from the other ranks")):
        if seconds:
            hidden = (
                "hidden behind"
                if seconds <= hides and machine.device_type == "cuda"
                else ("longer than" if seconds > hides else "beside")
            )
            parts.append(f"{format_seconds(seconds)} {of}, {hidden} {format_seconds(hides)} {what}")
    if work.disk_bytes:
        disk, size = format_seconds(steps * machine.disk_seconds(work)), format_bytes(steps * work.disk_bytes)
        parts.append(f"{size} read from disk, {disk} at {DISK_BYTES_PER_SECOND / 1e9:g} GB/s")
    return "; ".join(parts) or None


def time_of_step(plan: Plan) -> str:
    """Return how long a step takes, and whether the host, which launches its operations, is what limits it."""
    chosen, machine = plan.chosen, plan.machine
    work, said = chosen.prediction.simulation.work, f"about {format_seconds(chosen.step_seconds)}"
    if beside := chosen.prediction.job.workload.objective.untimed:
        said += f", and {beside}, whose time is not planned"
    updates = chosen.prediction.host_updates
    if updates and chosen.step_seconds <= updates / HOST_UPDATES_PER_SECOND:
        return (
            f"{said}, limited by the host, which updates {format_count(updates)} weights in its memory, at "
            f"{HOST_UPDATES_PER_SECOND / 1e6:g} million a second, as measured on two cores"
        )
    if machine.device_type == "cpu" or machine.micro_batch_seconds(work) > machine.starting_seconds(work):
        return said
    return f"{said}, limited by the host, which launches {chosen.micro_batches * work.operations:,} operations"


def as_json(plan: Plan, others: Sequence[Alternative]) -> dict:
    """Return the plan as plain values."""
    peak = plan.chosen.prediction.simulation.peak()
    return {
        "fits": plan.fits,
        "machine": plan.machine.name,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "compute_dtype": _type_name(plan),
        "first_step_peak_bytes": plan.peak_bytes - peak.total + plan.chosen.prediction.simulation.first_step_bytes(),
        "peak_phase": peak.phase,
        "peak_module": peak.module,
        "breakdown": plan.breakdown,
        "host_bytes": host_bytes(plan),
        "disk_bytes": disk_bytes(plan),
        "offload_folder_bytes": plan.chosen.prediction.simulation.folder_bytes,
        "step_seconds_estimate": plan.chosen.step_seconds,
        "transfers": transfers(plan),
        "learning_rate": plan.learning_rate,
        "chosen": plan.chosen.settings,
        "why": reason(plan),
        "constants": [o._asdict() for o in plan.chosen.prediction.overheads],
        "measured_because": plan.chosen.prediction.simulation.measured_because,
        "alternatives": [asdict(alternative) for alternative in others],
    }


def ranks_as_json(plans: Sequence[Plan]) -> dict:
    """Return the plans of unequal ranks as plain values."""
    rows = [
        as_json(plan, [])
        | {
            "rank": rank,
            "packs": plan.chosen.packs * plan.chosen.micro_batches,
            "part_bytes": part,
            "part_share": share,
        }
        for rank, (plan, (part, share)) in enumerate(zip(plans, map(part_of_base, plans), strict=True))
    ]
    return {"fits": all(plan.fits for plan in plans), "why": _why_shares(plans), "ranks": rows}


def describe_ranks(plans: Sequence[Plan]) -> str:
    """Return the plans of unequal ranks for a terminal, in rich's markup: a line and the settings of each."""
    room = max(len(plan.machine.name) for plan in plans)
    lines = [f"rank {'GPU':{room}} {'needs':>9} of {'budget':>9}  {'of the layers':>16}  packs a step  computes"]
    for rank, plan in enumerate(plans):
        part, share = part_of_base(plan)
        base = f"{format_bytes(part)}, {share:3.0%}" if part else "all"
        x = plan.chosen
        lines.append(
            f"{rank:>4} {plan.machine.name:{room}} {format_bytes(plan.peak_bytes):>9} of "
            f"{format_bytes(plan.budget_bytes):>9}  {base:>16}  "
            f"{x.packs * x.micro_batches:>3} = {x.micro_batches:>2} x {x.packs:<2}  {format_seconds(x.step_seconds):>8}"
            + ("" if plan.fits else "  [bold red]does not fit[/]")
        )
    lines += ["", *_row("why", _why_shares(plans))]
    for rank, plan in enumerate(plans):
        lines += [*_row(f"rank {rank}", _in_words(plan.chosen))]
        lines += [*_row("transfers", transfers(plan))]
    return "\n".join(lines)


def _why_shares(plans: Sequence[Plan]) -> str:
    """Return why unequal ranks have the shares that they have."""
    rates = ", ".join(f"{plan.machine.flops_per_second / 1e12:.0f}" for plan in plans)
    packs = f"packs by speed ({rates} TFLOP/s), so that all end a step together"
    options = plans[0].chosen.options
    if not options.is_sharded:
        return f"each GPU has room for the whole model; {packs}"
    how = (
        ", equally in host memory, since not all have room for their part"
        if options.stream_from == "host"
        else " by what each budget leaves beside all else"
    )
    return (
        f"not every GPU has room for the whole model, so that they divide its layers{how}; {packs} as nearly as "
        "whole packs allow; all run as many micro-batches, since each layer is put together by all at one time"
    )


def page_record(plan: Plan, others: Sequence[Alternative], title: str) -> dict:
    """Return what ``memory_page`` draws: the timeline of every block, the peak and the alternatives."""
    simulation, timeline = simulate_whole(plan.chosen.prediction.job, timeline=True)
    peak = simulation.peak()
    host = [f"Host memory: {format_bytes(host_bytes(plan))}."] if simulation.offloaded_bytes else []
    return {
        "title": title,
        "subtitle": f"Planned for {plan.machine.name}: {format_bytes(plan.peak_bytes)} of "
        f"{format_bytes(plan.budget_bytes)}, about {format_seconds(plan.chosen.step_seconds)} a step",
        "budget_bytes": plan.budget_bytes,
        "peak": {"bytes": peak.total, "phase": peak.phase, "module": peak.module, "breakdown": peak.on_device},
        "timeline": [{"phase": m.phase, "module": m.module, "bytes": m.on_device} for m in timeline],
        "sentences": [reason(plan), *host],
        "predicted": peak.on_device,
        "measured": None,
        "constants": constants(plan),
        "alternatives": [asdict(alternative) for alternative in others],
    }


def constants(plan: Plan) -> list[dict]:
    """Return the non-tensor memory of the chosen plan, as ``memory_page`` shows it."""
    found = [overhead._asdict() for overhead in plan.chosen.prediction.overheads]
    if plan.machine.base_bytes:
        found.append({"name": "process", "bytes": plan.machine.base_bytes, "why": "Python and its libraries"})
    return found


def _row(name: str, text: str | None) -> list[str]:
    """Return the lines of a name and its text; none without a text."""
    indent = " " * 17
    return textwrap.wrap(
        text or "",
        WIDTH,
        initial_indent=f"{name:16} ",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def describe(plan: Plan, others: Sequence[Alternative]) -> str:
    """Return the plan for a terminal, in rich's markup."""
    peak = plan.chosen.prediction.simulation.peak()
    margin = plan.budget_bytes - plan.peak_bytes
    verdict = (
        f"[bold green]fits[/] with {format_bytes(margin)} to spare"
        if plan.fits
        else f"[bold red]does not fit[/]: {format_bytes(-margin)} too much"
        if margin < 0
        else "[bold red]does not fit[/] in host memory"
    )
    limit = "" if plan.machine.host_bytes is None else f" of {format_bytes(plan.machine.host_bytes)}"
    lines = [
        f"[bold]{format_bytes(plan.peak_bytes)}[/] of {format_bytes(plan.budget_bytes)} on {plan.machine.name}: "
        f"{verdict}",
        f"peak in {peak.phase}, {peak.module or 'outside of modules'}",
        "",
        memory_bar(plan.breakdown, plan.budget_bytes, WIDTH),
        "",
        *_row("settings", _in_words(plan.chosen)),
        f"{'learning rate':16} {plan.learning_rate:g}",
        *_row("compute type", _compute_type(plan)),
        *_row("sequences", _assumed_sequences(plan)),
        *_row("why", _why(plan)),
        *_row("headroom", _why_free(plan)),
        f"{'step':16} {time_of_step(plan)}",
        *([f"{'transfers':16} {transfers(plan)}"] if transfers(plan) else []),
        f"{'host memory':16} {format_bytes(host_bytes(plan))}{limit}",
        f"{'disk':16} {format_bytes(disk_bytes(plan))} for the prepared model and the run, besides the download",
    ]
    simulation = plan.chosen.prediction.simulation
    if simulation.folder_bytes:
        lines.append(f"{'offload folder':16} {format_bytes(simulation.folder_bytes)}")
    because = simulation.measured_because
    if because:
        lines.append(f"{'note':16} {because}: measured on small real models and extrapolated")
    room = max([38, *(len(a.change) for a in others)])
    table = [f"{'change, all else as above':{room}} {'peak':>10} {'step':>9}"]
    for a in others:
        mark = "fits" if a.fits else "too large" if a.fits_host else "too large for the host"
        table.append(f"{a.change:{room}} {format_bytes(a.peak_bytes):>10} {format_seconds(a.step_seconds):>9}  {mark}")
    return "\n".join([*lines, "", *table])

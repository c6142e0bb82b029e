"""Plan a recipe for several ranks: the share of a step that each computes, and of the base model that each holds.

Equal GPUs have equal shares, and one plan is that of all. Of unequal ones each has a plan of its own. A step ends with
its slowest rank, so a step's sequences are dealt by speed. Where all have room for the whole model, that is all. Else
they divide the layers, and wait for each other in each: all run as many micro-batches, a faster GPU larger ones, and
the parts of the layers are as large as what each budget leaves beside all else that the rank holds. Parts in proportion
to budgets are the obvious other way; what every rank needs for itself then leaves a small GPU no room for its part.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import gcd
from shutil import disk_usage

import torch

from qlora_lite.constraints import DIVIDED_ON_GPUS
from qlora_lite.errors import DoesNotFitError, OutputError, RecipeError
from qlora_lite.memory.gpus import GpuError, find_gpu
from qlora_lite.models.load import resolve_device
from qlora_lite.offload.stream import UNDIVIDED, Division
from qlora_lite.planning.candidate import EQUALLY_FAST
from qlora_lite.planning.machine import Machine, machine_of_gpu, this_machine
from qlora_lite.planning.search import SPARED
from qlora_lite.planning.shared_step import Cluster, SharedStep, shared_step
from qlora_lite.planning.simulate import streamed_sizes
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.epochs import Epochs
from qlora_lite.train.loop import largest_batches
from qlora_lite.train.processes import ALONE, Processes
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.shares import Share, deal
from qlora_lite.units import format_bytes

from .job import build_workload
from .method import find_method
from .objective import find_objective
from .plan import Plan, alternatives, budget_of, does_not_fit, plan_recipe
from .settings import train_settings, with_plan
from .share import check_packs, share_of, with_packs
from .task import find_task

log = logging.getLogger(__name__)

ALIKE = 0.9  # of the largest budget: ranks of which each has as much are planned alike
MIB = 2**20


def plan_run(
    recipe: Recipe,
    examples,
    eval_examples,
    headroom: int = 0,
    processes: Processes = ALONE,
    of_ranks: Sequence[dict] | None = None,
    kept: Mapping[str, object] | None = None,
) -> tuple[Plan, TrainSettings]:
    """Plan a recipe for the device at hand and the rows that were read; return the plan and its settings.

    Several processes plan one rank's share of a step, for the smallest of their budgets; where their GPUs or budgets
    are not alike, each its own share for its own budget.

    Args:
        examples, eval_examples: tokenised rows; none of the latter if there is no evaluation.
        headroom: bytes of the budget that the plan may not use.
        processes: that train together; those on one machine share its memory.
        of_ranks: ``Plan.of_ranks`` of a run that resumes; None finds out whether they are alike.
        kept: settings of a plan that all ranks keep (``with_plan``), likewise.

    Raises:
        DoesNotFitError: with the breakdown and the smallest change that fits.
        OutputError: the disk of memory.offload_folder has no room.
        ModelError: see ``plan_recipe``.
    """
    device = resolve_device(recipe.model.device)
    processes.connect(device, find_method(recipe).trains_base)  # first: what NCCL takes is not free for the run
    link = processes.shards.bytes_per_second(device)
    machine = this_machine(device, find_task(recipe).compute_dtype(recipe, device)).shared_by(
        processes.local_world_size
    )
    machine = replace(machine, link_bytes_per_second=link)
    settings = train_settings(recipe)
    packs = settings.micro_batch_size * settings.gradient_accumulation_steps
    one_by_one = replace(settings, micro_batch_size=1, gradient_accumulation_steps=packs)  # the same packs a step
    work, recipe = build_workload(recipe), recipe if kept is None else with_plan(recipe, kept)
    counts = work.batches.lengths(examples), work.batches.target_counts(examples)
    epochs = Epochs(*counts, one_by_one, pictures=work.batches.picture_counts(examples))
    pack, evaluation = largest_batches(work, examples, eval_examples, epochs)
    shapes = work.batches.shape(pack), evaluation and work.batches.shape(evaluation)
    ranks = _ranks_of(recipe, machine, headroom, processes)
    if of_ranks or (of_ranks is None and processes.shards.count == processes.world_size and not ranks.are_alike):
        plan, shares = _own_plan(recipe, machine, replace(ranks, shapes=shapes), processes, of_ranks or ())
    else:
        plan, shares = _common_plan(recipe, machine, replace(ranks, shapes=shapes), processes), ()
    chosen = plan.chosen
    if chosen.options.uses_disk and (folder := chosen.options.offload_folder):
        needed = chosen.prediction.simulation.folder_bytes * processes.local_world_size
        free = disk_usage(folder).free
        if needed > free:
            raise OutputError(
                f"memory.offload_folder: needs {format_bytes(needed)} and has {format_bytes(free)} free; "
                "make room, or name another folder"
            )
    unit = chosen.packs // (shares[processes.rank].joined if shares else 1)
    return plan, replace(
        settings,
        options=chosen.options,
        micro_batch_size=unit,
        shares=shares,
        gradient_accumulation_steps=packs // unit,
    )


def _ranks_of(recipe: Recipe, machine: Machine, headroom: int, processes: Processes) -> "Ranks":
    """Return the machines and budgets of all ranks as this one knows them."""
    left, host = budget_of(recipe, machine) - machine.base_bytes, machine.host_bytes
    numbers = left - headroom, machine.base_bytes, math.inf if host is None else host
    lefts, bases, hosts = map(processes.gather, numbers)
    speeds = speeds_of(recipe, processes)
    machines = [
        replace(
            machine,
            name=f"rank {rank}",
            base_bytes=int(base),
            host_bytes=None if host == math.inf else int(host),
            flops_per_second=machine.flops_per_second * speeds[rank] / speeds[processes.rank],
        )
        for rank, (base, host) in enumerate(zip(bases, hosts, strict=True))
    ]
    return Ranks(tuple(machines), tuple(int(own + base) for own, base in zip(lefts, bases, strict=True)))


def _known_speed(device: torch.device) -> float:
    """Return a GPU's speed by the table, which is the same in each run; 0 where it has none."""
    if device.type == "cpu":
        return 0.0
    name, size = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    for each in (name, f"{name} {round(size / 2**30)}gb"):
        with suppress(GpuError):
            return machine_of_gpu(find_gpu(each)).flops_per_second
    return 0.0


def _common_plan(recipe: Recipe, machine: Machine, ranks: "Ranks", processes: Processes) -> Plan:
    """Return the plan of this rank's share of a step, which is that of all."""
    left = min(budget - each.base_bytes for each, budget in zip(ranks.machines, ranks.budgets, strict=True))
    if machine.host_bytes is not None:
        machine = replace(machine, host_bytes=min(each.host_bytes or 0 for each in ranks.machines))
    machine = replace(machine, shards=Division((1,) * processes.shards.count))
    machine = dividing(recipe, machine, processes.world_size)
    own = share_of(recipe, processes.world_size)
    if not processes.is_first:  # whose machine's measured speed would choose otherwise
        own = with_plan(own, json.loads(processes.tell("")))
    plan = plan_recipe(own, machine, left + machine.base_bytes, *ranks.shapes)
    if not plan.fits:
        raise does_not_fit(plan, list(alternatives(plan)))
    if processes.is_first:
        processes.tell(json.dumps(plan.chosen.settings))
    return plan


def _own_plan(
    recipe: Recipe, machine: Machine, ranks: "Ranks", processes: Processes, of_ranks: Sequence[dict]
) -> tuple[Plan, tuple[Share, ...]]:
    """Return the plan of this rank's own share of a step, as the first rank has planned all of them, and all shares."""
    plans, said = [], ""
    if processes.is_first:
        plans = plan_ranks(recipe, ranks, of_ranks)
        require_fit(plans)
        log.info("ranks: %s", "; ".join(map(describe_share, range(len(plans)), plans)))
        said = json.dumps([[plan.chosen.settings for plan in plans], plans[0].machine.shards.weights])
    of_ranks, weights = json.loads(processes.tell(said))
    if len(weights) > 1:
        machine = replace(machine, shards=Division(tuple(weights), processes.rank))
    own = with_plan(recipe, of_ranks[processes.rank])
    plan = plans[0] if plans else plan_recipe(own, machine, ranks.budgets[processes.rank], *ranks.shapes)
    if not plan.fits:
        raise does_not_fit(plan, list(alternatives(plan)))
    sizes = [(each["train.micro_batch_size"], each["train.gradient_accumulation_steps"]) for each in of_ranks]
    unit = gcd(*(size for size, _ in sizes))
    shares = tuple(Share(size * runs // unit, size // unit) for size, runs in sizes)
    return replace(plan, of_ranks=tuple(of_ranks)), shares


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks to be planned for: the machine of each, its budget, and what ``plan_recipe`` is told of packs' shapes."""

    machines: tuple[Machine, ...]
    budgets: tuple[int, ...]
    shapes: tuple[BatchShape | None, BatchShape | None] = (None, None)

    @property
    def speeds(self) -> list[float]:
        """How fast each computes."""
        return [machine.flops_per_second for machine in self.machines]

    @property
    def are_alike(self) -> bool:
        """Whether one plan serves all: their speeds are equal, and their budgets nearly."""
        left = [budget - machine.base_bytes for machine, budget in zip(self.machines, self.budgets, strict=True)]
        return len({*self.speeds}) == 1 and (min(left) == max(left) or min(left) >= ALIKE * max(left))

    def plan(self, recipes: Sequence[Recipe], weights: Sequence[int] = ()) -> list[Plan]:
        """Return each rank's plan; ranks that differ in nothing have the same.

        Args:
            recipes: of the ranks' shares of a step.
            weights: of their parts of the model; none where each has the whole.
        """
        asked: list[tuple] = []
        plans: list[Plan] = []
        for rank, (machine, budget, own) in enumerate(zip(self.machines, self.budgets, recipes, strict=True)):
            key = (machine, budget, own, weights[rank] if weights else 0)
            if key in asked:
                plans.append(plans[asked.index(key)])
            else:
                shards = Division(tuple(weights), rank) if weights else UNDIVIDED
                plans.append(plan_recipe(own, replace(machine, shards=shards), budget, *self.shapes))
            asked.append(key)
        return plans


def plan_ranks(recipe: Recipe, ranks: Ranks, of_ranks: Sequence[dict] = ()) -> list[Plan]:
    """Plan each rank's share of a recipe's step; some of the plans may not fit.

    Args:
        ranks: in one machine, or each in one of its own; the budgets are of each process in all.
        of_ranks: settings of each, which are kept.

    Raises:
        RecipeError: there are fewer packs than ranks, or the GPUs would compute in different types.
    """
    memory = recipe.memory
    if of_ranks:
        recipes = [with_plan(recipe, each) for each in of_ranks]
        return ranks.plan(recipes) if recipes[0].memory.resident_layers == "all" else _divided(recipes, ranks)
    check_packs(recipe, ranks.speeds)
    divides = memory.stream_from == "ranks" or memory.optimizer_in_backward
    if find_method(recipe).trains_base and divides and len(ranks.machines) > 1:
        setting = "optimizer_in_backward" if memory.optimizer_in_backward else "stream_from ranks"
        raise RecipeError(f"memory.{setting}: {DIVIDED_ON_GPUS}, and these GPUs are not alike: leave it out")
    packs = recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps
    sources = {"auto": ("ranks", "host"), "disk": ()}.get(memory.stream_from, (memory.stream_from,))
    if len(ranks.machines) == 1 or memory.resident_layers == "all" or _has_no_unequal_parts(recipe):
        sources = ()
    plans: list[Plan] = []
    if not sources or (memory.stream_from != "ranks" and memory.resident_layers == "auto"):
        here = _with_memory(recipe, resident_layers="all") if sources else recipe
        plans = ranks.plan([with_packs(here, own) for own in deal(packs, ranks.speeds)])
    for source in sources:  # the last plans that do not fit are those to show
        if not plans or not all(plan.fits for plan in plans):
            plans = _fastest_divided(recipe, ranks, packs, source)
    if len({plan.step.job.workload.spec.compute_dtype for plan in plans}) > 1:
        raise RecipeError(
            "model.compute_dtype auto is not the same type on all of these GPUs, and they train one "
            "model: set it to float16, or to float32"
        )
    return plans


def _has_no_unequal_parts(recipe: Recipe) -> bool:
    """Return whether no rank can have an unequal part of the model."""
    return find_method(recipe).trains_base or find_objective(recipe).answers


def _fastest_divided(recipe: Recipe, ranks: Ranks, packs: int, source: str) -> list[Plan]:
    """Return the plans of ranks that divide the model, with as large micro-batches as fit and make a step faster.

    All run as many. The fewer they are, the finer their packs can be dealt, and the less often weights are on the wire.

    Args:
        source: where parts of layers wait, on GPUs ("ranks") or in host memory.
    """
    best: list[Plan] = []
    earliest_end, largest = math.inf, recipe.train.micro_batch_size
    for runs in range(packs // len(ranks.machines), 0, -1):
        if packs % runs:
            continue
        given = deal(packs // runs, ranks.speeds)
        end = runs * max(own / speed for own, speed in zip(given, ranks.speeds, strict=True))
        if best and (recipe.memory.micro_batches == "as-given" and max(given) > largest):
            break
        if best and end * EQUALLY_FAST > earliest_end and not any(map(_waits_for_weights, best)):
            continue
        recipes = [_with_memory(with_packs(recipe, own * runs, runs), stream_from=source) for own in given]
        plans = _divided(recipes, ranks)
        if best and (not all(plan.fits for plan in plans) or _slowest(plans) * EQUALLY_FAST > _slowest(best)):
            break
        best, earliest_end = plans, end
        if not all(plan.fits for plan in plans):
            break
    return best


def _divided(recipes: Sequence[Recipe], ranks: Ranks) -> list[Plan]:
    """Return the plans of ranks whose parts of the model are as large as the room that each has beside all else.

    In host memory, which GPUs of a machine share, all parts are equal.
    """
    resident = recipes[0].memory.resident_layers
    if recipes[0].memory.stream_from == "host":
        return _in_host_memory(recipes, ranks)
    begin = [_with_memory(own, resident_layers=0 if resident == "auto" else resident) for own in recipes]
    first = ranks.plan(begin, _weights(ranks.budgets))
    rooms = [plan.budget_bytes - plan.peak_bytes + part_of_base(plan)[0] for plan in first]
    plans = ranks.plan(begin, _weights(rooms))
    if resident != "auto" or not all(plan.fits for plan in plans) or not any(map(_waits_for_weights, plans)):
        return plans
    sizes, others = _streamed(plans[0]), len(recipes) - 1
    rooms = [room - int(SPARED * budget) for room, budget in zip(rooms, ranks.budgets, strict=True)]
    count = min((sum(rooms) - sum(sizes)) // (others * max(sizes)), min(rooms) // max(sizes), len(sizes) - 1)
    if count < 1:
        return plans
    more = [_with_memory(own, resident_layers=count) for own in recipes]
    found = ranks.plan(more, _weights([room - count * max(sizes) for room in rooms]))
    return found if all(plan.fits for plan in found) and _slowest(found) < _slowest(plans) else plans


def _in_host_memory(recipes: Sequence[Recipe], ranks: Ranks) -> list[Plan]:
    """Return the plans of ranks whose parts wait in host memory, with as many whole layers as all have room for."""
    plans = ranks.plan(recipes, equal := [1] * len(recipes))
    counts = {plan.chosen.options.resident_layers for plan in plans}
    if len(counts) == 1:
        return plans
    least = min(count for count in counts if count is not None)
    return ranks.plan([_with_memory(own, resident_layers=least) for own in recipes], equal)


def _weights(rooms: Sequence[int]) -> list[int]:
    return [max(1, room // MIB) for room in rooms]


def _with_memory(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update=changes)})


def _streamed(plan: Plan) -> list[int]:
    prediction = plan.chosen.prediction
    return streamed_sizes(prediction.job, prediction.simulation)


def part_of_base(plan: Plan) -> tuple[int, float]:
    """Return the bytes that a plan's rank holds of the divided layers, and their share; 0 where nothing is divided."""
    options = plan.chosen.options
    if not options.is_sharded:
        return 0, 0.0
    sizes = _streamed(plan)
    if not sizes:  # every layer is resident
        return 0, 0.0
    own = sum(map(options.shards.own_bytes, sizes))
    return own, own / sum(sizes)


def _waits_for_weights(plan: Plan) -> bool:
    machine, work = plan.machine, plan.chosen.prediction.simulation.work
    return machine.link_seconds(work) > max(machine.computing_seconds(work), machine.starting_seconds(work))


def _slowest(plans: Sequence[Plan]) -> float:
    return max(plan.chosen.step_seconds for plan in plans)


def require_fit(plans: Sequence[Plan]) -> None:
    """Check that all ranks have room for what they would do.

    Raises:
        DoesNotFitError: naming those that have not, and what helps the one that lacks most.
    """
    lacking = [plan for plan in plans if not plan.fits]
    if lacking:
        worst = max(lacking, key=lambda plan: plan.peak_bytes - plan.budget_bytes)
        others = ", ".join(
            f"rank {rank} ({format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)})"
            for rank, plan in enumerate(plans)
            if not plan.fits and plan is not worst
        )
        error = does_not_fit(worst, list(alternatives(worst)))
        raise DoesNotFitError(f"{error}; nor does {others}") if others else error


def describe_share(rank: int, plan: Plan) -> str:
    """Return in words what a rank has of a step, and of the model."""
    chosen, (part, share) = plan.chosen, part_of_base(plan)
    base = f"{format_bytes(part)} of the layers ({share:.0%})" if part else "the whole model"
    return (
        f"rank {rank} has {chosen.packs * chosen.micro_batches} sequences of a step ({chosen.micro_batches} x "
        f"{chosen.packs}) and {base}"
    )


def step_of_ranks(recipe: Recipe, ranks: Ranks, plans: Sequence[Plan], cluster: Cluster) -> SharedStep:
    """Return what a step takes, by its slowest rank, beside the fastest GPU alone; packs, which differ, are 0."""
    fastest = max(range(len(plans)), key=lambda rank: ranks.speeds[rank])
    slowest = max(plans, key=lambda plan: plan.chosen.step_seconds)
    alone = replace(ranks.machines[fastest], shards=UNDIVIDED)
    found = shared(recipe, alone, slowest, cluster, ranks.budgets[fastest])
    speed_up = found.speed_up if all(plan.fits for plan in plans) else None
    return found._replace(packs=0, speed_up=speed_up)


def dividing(recipe: Recipe, machine: Machine, world_size: int) -> Machine:
    """Return the machine, which divides nothing where each rank answers for itself.

    Raises:
        RecipeError: ranks of several machines would update what each machine divides in the backward pass, when a
            gradient is added up within the machine alone.
    """
    if find_objective(recipe).answers:
        return replace(machine, shards=UNDIVIDED)
    is_trained = find_method(recipe).trains_base and machine.shards.count not in (1, world_size)
    if is_trained and recipe.memory.optimizer_in_backward:
        raise RecipeError(
            "memory.optimizer_in_backward is for weights that are divided among the GPUs of one machine, "
            "or among machines with one GPU each: leave it out, or start fewer processes"
        )
    return machine


def speeds_of(recipe: Recipe, processes: Processes) -> list[float]:
    """Return how fast the GPU of each rank is by the table; all equal where it does not know one of them."""
    speeds = processes.gather(_known_speed(resolve_device(recipe.model.device)))
    return speeds if all(speeds) else [1.0] * len(speeds)


def shared(
    recipe: Recipe, machine: Machine, made: Plan, cluster: Cluster, budget_bytes: int | None = None
) -> SharedStep:
    """Return what a step takes whose share is planned; see ``planning.shared_step``.

    Args:
        machine: that of one GPU alone.
        made: the plan of the share.
        cluster: the GPUs and their links.
        budget_bytes: of that one GPU; None is the share's.
    """
    memory = recipe.memory.model_copy(update={"stream_from": "auto"})
    alone = plan_recipe(recipe.model_copy(update={"memory": memory}), machine, budget_bytes or made.budget_bytes)
    return shared_step(alone.chosen if alone.fits and made.fits else None, made.chosen, cluster)

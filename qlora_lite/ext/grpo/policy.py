"""Learn from rewards for the model's own answers: GRPO.

Before each step the model answers every prompt of the step ``group_size`` times, drawn at random, and functions of the
user's judge the answers. What an answer is worth is its reward beside those of its group: advantage = (reward - mean)
/ (standard deviation + 1e-4). The step makes the tokens of answers with a positive advantage likelier, and the others
less likely (DeepSeekMath, arXiv 2402.03300, equation 3). A step has one update and new answers come before the next
one, so the ratio to the policy that answered is 1, and nothing is ever clipped. There is no reference model: like DAPO
(arXiv 2503.14476) and Dr. GRPO (arXiv 2503.20783), this leaves its KL term out.

| policy_loss | what a token's gradient is divided by                   |
|-----------|---------------------------------------------------------|
| dapo      | the tokens of all answers of the step                   |
| grpo      | the tokens of its answer, times the answers of the step |
| dr_grpo   | ``max_completion_tokens``, times the answers of the step       |

Answers come from the very weights that are trained, packed and placed as they are: there is no second copy of the model
for them. A group is computed at once, packed like the rows of a language model, so an example's length is that of its
whole group, each answer as long as it may be; what a plan counts, and a memory probe measures, is that, and the keys
and values of a group beside it. The sums of log-probabilities by answer come from ``kernels.loss.sequence_losses``.

In an evaluation the model answers each prompt once, with the likeliest tokens, and the loss is minus the mean reward.

Shapes: R answers of a micro-batch, G of each prompt in turn.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import ClassVar, NamedTuple, Self
from zlib import crc32

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.tokens.batch import Batch, Extent
from qlora_lite.data.tokens.storage import Example, prompt_tokens
from qlora_lite.errors import DataError, ModelError, TrainingError
from qlora_lite.ext.preferences.objective import Sequences, sequences_in
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, sequence_losses
from qlora_lite.memory.marks import category
from qlora_lite.models import anatomy
from qlora_lite.models.load import uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions, stream_of
from qlora_lite.offload.transfer import sent
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.causal_lm import TextBatches, TextSpec, planned_rows
from qlora_lite.train.forward import Inputs
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.out_of_memory import free_cached_memory
from qlora_lite.train.processes import ALONE, Processes
from qlora_lite.train.workload import Workload

LEAST_DEVIATION = 1e-4  # is added to a group's standard deviation, as in trl
MANY_CUT = 0.5  # share of answers that are cut which is named as the cause where no answer is better than another
_ANSWERS_OF_A_ROW = 1 << 20  # apart in the numbers that random tokens are drawn by


class Answered(NamedTuple):
    """An answer's tokens, with the one that ends it if it ends, and its text."""

    token_ids: Sequence[int]
    text: str
    is_cut: bool


# Answer prompts [R] of tokens with a model: temperature, seed, a number for each, most tokens, how many at once
Answer = Callable[[nn.Module, Sequence[list[int]], float, int, Sequence[int], int, int], Sequence[Answered]]
# Judge the answers [R] to rows: rewards, float32 [R] of each function, by its name
Judge = Callable[[Sequence[Example], Sequence[str]], Mapping[str, torch.Tensor]]


class PolicyBatch(NamedTuple):
    """Packed answers behind their prompts, in host memory; before they are there, tokens as many as they may have.

    examples: the rows of the prompts.
    factors: float32 [R], of the gradient of each answer's log-probability.
    scores: of the answers, float32 [R] each, by the name of their mean.
    """

    answers: Batch
    examples: tuple[Example, ...]
    factors: torch.Tensor
    scores: dict[str, torch.Tensor]


class PolicyInputs(NamedTuple):
    """A micro-batch as the model computes on it; see ``PolicyBatch``."""

    sequences: Sequences
    factors: torch.Tensor
    scores: dict[str, torch.Tensor]

    @property
    def tokens(self) -> Inputs:
        """Those that the model computes on."""
        return self.sequences.tokens


@dataclass(frozen=True)
class GroupPolicy(Objective):
    """The loss of answers to prompts, by what they are worth.

    Args:
        group_size: answers to a prompt.
        max_completion_tokens: of an answer.
        temperature: of the distribution that tokens are drawn from, and whose log-probabilities are learned.
        policy_loss: see the module.
        scale_rewards: whether advantages are divided by the standard deviation of their group.
        chunk_tokens: tokens whose logits exist at once.
        answer, judge: make answers and rewards; a plan has none.
    """

    is_likelihood: ClassVar[bool] = False
    untimed: ClassVar[str] = "before it the answers"
    always_learns: ClassVar[bool] = False  # the answers of every group may be worth the same
    prepares_steps = True

    group_size: int = 8
    max_completion_tokens: int = 256
    temperature: float = 1.0
    policy_loss: str = "dapo"
    scale_rewards: bool = True
    chunk_tokens: int = AUTO_CHUNK_TOKENS
    answer: Answer | None = field(default=None, repr=False, compare=False, kw_only=True)
    judge: Judge | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def name(self) -> str:
        """Of the objective."""
        return "grpo"

    def with_options(self, options: MemoryOptions) -> Self:
        """Take the tokens at once from memory options."""
        return replace(self, chunk_tokens=options.loss_chunk_tokens or AUTO_CHUNK_TOKENS)

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return what answers are worth, float32 [R], of their rewards [R]."""
        groups = rewards.view(-1, self.group_size).double()  # in which the mean of equal rewards is their value
        found = groups - groups.mean(1, keepdim=True)
        if self.scale_rewards:
            found = found / (groups.std(1, keepdim=True) + LEAST_DEVIATION)
        return found.flatten().float()

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: PolicyInputs) -> LossSum:
        """Return the loss of hidden states [N, D] of the tokens before the answers' tokens."""
        sequences, its_head = inputs.sequences, anatomy.head(model)
        its_head = its_head._replace(scale=its_head.scale / self.temperature)
        count = len(sequences.counts)
        with category("logits"):
            targets = sequences.tokens.targets
            sums = -sequence_losses(outputs, targets, its_head, self.chunk_tokens, sequences.numbers, count)
        likelihoods = sums - sums.detach() + sequences.counts  # the ratios, which are 1
        return LossSum(
            -(inputs.factors * likelihoods).sum(), {name: each.sum() for name, each in inputs.scores.items()}
        )

    def loss(self, model: nn.Module, spec: ModelSpec, inputs: PolicyInputs) -> LossSum:
        """Return the loss over a micro-batch's answers; in an evaluation minus their rewards."""
        if not model.training and inputs.scores:
            scores = {name: each.sum() for name, each in inputs.scores.items()}
            return LossSum(-scores["reward"], scores)
        return super().loss(model, spec, inputs)

    def weight(self, inputs: PolicyInputs) -> int:
        """Return the number of answers."""
        return len(inputs.factors)

    def why_no_gradient(self, metrics: Mapping[str, float]) -> str:
        """Say that no group has answers of different rewards, and what to do about it."""
        if metrics.get("frac_reward_zero_std") != 1:
            return super().why_no_gradient(metrics)
        cut = metrics["completions/clipped_ratio"]
        cure = (
            "if these answers are wrong, fine-tune the model first or reward parts of an answer; if they are right, "
            "take harder prompts; if they are neither, correct the functions of objective.rewards"
        )
        if cut >= MANY_CUT:
            cure = (
                f"{cut:.0%} of them were cut at objective.max_completion_tokens {self.max_completion_tokens}: raise it"
            )
        return f"all {self.group_size} answers to a prompt got one reward (mean {metrics['reward']:.3g}); {cure}"

    def check(self, model: nn.Module) -> None:
        """Check that the model can answer while it is trained.

        Raises:
            ModelError: its weights are divided among ranks, or its head does more than a temperature can scale.
        """
        stream = stream_of(model)
        if stream is not None and stream.placement.gathers:
            raise ModelError(
                "train.objective grpo: a model whose weights are divided among GPUs cannot answer on each "
                "for itself; train on one GPU, or take a model that each has room for"
            )
        if anatomy.head(model).softcap is not None and self.temperature != 1:
            raise ModelError(
                "objective.sampling_temperature: this model's logits are capped, and learned at a "
                "temperature of 1 alone; set it to 1"
            )

    def prepare_step(
        self,
        model: nn.Module,
        spec: ModelSpec,
        maker: Batches,
        batches: Sequence[PolicyBatch],
        processes: Processes = ALONE,
        counted: int | None = None,
    ) -> Sequence[PolicyBatch]:
        """Return a step's micro-batches with answers of the model, and what each is worth beside its group.

        In an evaluation each prompt has one answer, of the likeliest tokens.

        Raises:
            TrainingError: there is nothing to answer or to judge with.
        """
        if self.answer is None or self.judge is None:
            raise TrainingError("a policy that learns has to be given what answers, and what judges the answers")
        assert isinstance(maker, Groups)
        learns = model.training
        seed = int(torch.randint(1 << 31, ())) if learns else 0  # an evaluation draws none, and can be done again
        rows = [maker.repeated(batch.examples) if learns else list(batch.examples) for batch in batches]
        flat = [example for some in rows for example in some]
        prompts = [example.token_ids[: prompt_tokens(example)].tolist() for example in flat]
        numbers = [
            crc32(example.token_ids.tobytes()) * _ANSWERS_OF_A_ROW + place % self.group_size
            for some in rows
            for place, example in enumerate(some)
        ]
        at_once = max(len(batch.factors) for batch in batches)
        drawn = self.temperature if learns else 0.0
        said = self.answer(model, prompts, drawn, seed, numbers, self.max_completion_tokens, at_once)
        free_cached_memory(spec.device(model))  # no tensor of the step gets what a recorded token took until then
        judged = self.judge(flat, [answer.text for answer in said])
        rewards = sum(judged.values(), torch.zeros(len(flat)))
        lengths = torch.tensor([float(len(answer.token_ids)) for answer in said])
        scores = {
            "reward": rewards,
            "completions/mean_length": lengths,
            "completions/clipped_ratio": torch.tensor([float(answer.is_cut) for answer in said]),
        }
        scores |= {f"rewards/{name}": each for name, each in judged.items()} if len(judged) > 1 else {}
        factors = torch.zeros(len(flat))
        if learns:
            spread = rewards.view(-1, self.group_size).double().std(1).float().repeat_interleave(self.group_size)
            scores |= {"reward_std": spread, "frac_reward_zero_std": (spread == 0).float()}
            own = sum(map(len, rows[:counted]))
            tokens, answers = processes.exchange(lengths[:own].sum().item(), own)
            shares = {"dapo": answers / max(1, tokens), "grpo": 1 / lengths, "dr_grpo": 1 / self.max_completion_tokens}
            factors = self.advantages(rewards) * shares[self.policy_loss]
        found, start = [], 0
        for batch, some in zip(batches, rows, strict=True):
            these = slice(start, start := start + len(some))
            packed = maker.answered(some, [answer.token_ids for answer in said[these]])
            own_scores = {name: each[these] for name, each in scores.items()}
            found.append(PolicyBatch(packed, batch.examples, factors[these], own_scores))
        return found

    def probe_preparation(self, model: nn.Module, inputs: PolicyInputs) -> None:
        """Read the prompts of a micro-batch, keep their keys and values, and those of answers, and make one token."""
        lengths, new = inputs.sequences.tokens.row_lengths, self.max_completion_tokens
        was_training, device = model.training, inputs.factors.device
        model.eval()
        self._read(model, len(lengths), max(1, max(lengths) - new), min(new, max(lengths) - 1), device)
        model.train(was_training)

    def _read(self, model: nn.Module, count: int, prompt: int, new: int, device: torch.device) -> None:
        ids = torch.zeros((count, prompt), dtype=torch.int64, device=device)
        no_mask = {"attention_mask": ids.new_empty((count, 1, 0, 0))} if uses_row_attention(model) else {}
        positions = torch.arange(prompt + new, device=device)[None]
        base = anatomy.decoder(model)
        # the argument's name in transformers from 5.2x on, and before; its result need not name what was kept
        name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        kept = DynamicCache(config=base.config)
        base(input_ids=ids, position_ids=positions[:, :prompt], use_cache=True, **{name: kept}, **no_mask)
        for layer in kept.layers:
            for name in ("keys", "values"):
                if isinstance(tensor := getattr(layer, name, None), torch.Tensor):  # other layers keep a state
                    longer = torch.cat([tensor, tensor[:, :, -1:].expand(-1, -1, new - 1, -1)], dim=2)
                    setattr(layer, name, longer)
        base(input_ids=ids[:, :1], position_ids=positions[:, -1:], use_cache=True, **{name: kept}, **no_mask)


@dataclass(frozen=True)
class Groups(TextBatches):
    """Groups of answers to prompts; examples are rows whose last answer is a reference.

    Args:
        group_size, max_completion_tokens: see ``GroupPolicy``.
    """

    group_size: int = 8
    max_completion_tokens: int = 256

    @property
    def fewer_positions(self) -> str:
        """See ``TextBatches``."""
        return "lower objective.max_completion_tokens by {over}, or leave longer prompts out"

    def check(self, model: nn.Module, examples: object) -> None:
        """See ``TextBatches``; each example has a prompt."""
        super().check(model, examples)
        assert isinstance(examples, Sequence)
        for example in examples:
            if not prompt_tokens(example):
                raise DataError(
                    f"{example.where}: there is no prompt before the answer; give rows with a prompt, or "
                    "remove this one"
                )

    def positions(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return how many positions each prompt takes with the longest answer."""
        beside = self.virtual + self.max_completion_tokens
        return [beside + prompt_tokens(example) for example in examples]

    @property
    def sequences(self) -> int:
        """Of an example: the answers of its group."""
        return self.group_size

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the tokens of each group, if its answers are as long as they may be."""
        return [
            self.group_size * (self.virtual + prompt_tokens(each) + self.max_completion_tokens) for each in examples
        ]

    def target_counts(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the tokens that the answers to each prompt may have."""
        return [self.group_size * self.max_completion_tokens] * len(examples)

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """Return examples whose prompts have as many tokens as any micro-batch's, the longest one among them."""
        tokens = np.concatenate([each.token_ids for each in examples])
        before = self.virtual + self.max_completion_tokens
        longest = max(1, most.longest // self.group_size - before)
        others = max(most.rows - 1, most.tokens // self.group_size - most.rows * before - longest)
        shares: Iterable = np.diff(np.arange(most.rows) * others // max(1, most.rows - 1)) if most.rows > 1 else ()
        return [_with_prompt(examples[0], np.resize(tokens, length)) for length in (longest, *map(int, shares))]

    def collate(self, examples: Sequence[Example]) -> PolicyBatch:
        """Pack groups of answers whose tokens mean nothing yet; ``prepare_step`` gives them theirs."""
        empty = torch.zeros(len(examples) * self.group_size)
        answers: list[np.ndarray] = [
            np.resize(each.token_ids, self.max_completion_tokens) for each in examples for _ in range(self.group_size)
        ]
        return PolicyBatch(self.answered(self.repeated(examples), answers), tuple(examples), empty, {})

    def repeated(self, examples: Sequence[Example]) -> list[Example]:
        """Return each example as often as it has answers."""
        return [each for each in examples for _ in range(self.group_size)]

    def answered(self, examples: Sequence[Example], answers: Iterable[np.ndarray | Sequence[int]]) -> Batch:
        """Return answers packed behind the prompts of examples, and nothing but the answers to be learned."""
        found = []
        for example, new in zip(examples, answers, strict=True):
            prompt = example.token_ids[: prompt_tokens(example)]
            ids = np.concatenate([prompt, np.asarray(new, np.int32)])
            found.append(replace(example, token_ids=ids, is_target=np.arange(len(ids)) >= len(prompt)))
        return self.packed(found)

    def shape(self, batch: PolicyBatch) -> BatchShape:
        """Return the tokens of each answer with its prompt, and how many are targets."""
        return super().shape(batch.answers)

    def inputs(self, batch: PolicyBatch, device: torch.device) -> PolicyInputs:
        """See ``forward.prepare``."""
        scores = {name: sent(each, device) for name, each in batch.scores.items()}
        return PolicyInputs(sequences_in(batch.answers, device), sent(batch.factors, device), scores)

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> PolicyInputs:
        """Return inputs of zeros, with positions."""
        zeros = torch.zeros(len(shape.lengths), device=device)
        numbers = torch.zeros(shape.targets, dtype=torch.int64, device=device)
        return PolicyInputs(Sequences(planned_rows(shape, device), numbers, zeros), zeros.clone(), {})

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a group whose answers and prompts together have so many tokens."""
        each = max(2, tokens // self.group_size)
        return BatchShape((each,) * self.group_size, min(self.max_completion_tokens, each - 1) * self.group_size)


def policy_lm(method: AdapterMethod, objective: GroupPolicy, spec: ModelSpec | None = None) -> Workload:
    """Return a causal language model that learns from rewards.

    Args:
        spec: of the model, for a plan.
    """
    batches = Groups(method.virtual_tokens, objective.group_size, objective.max_completion_tokens)
    return Workload(spec or TextSpec(), batches, objective, method)


def _with_prompt(example: Example, tokens: np.ndarray) -> Example:
    is_target: np.ndarray = np.zeros(len(tokens) + 1, np.bool_)
    is_target[-1] = True
    return replace(example, token_ids=np.append(tokens, tokens[:1]), is_target=is_target)

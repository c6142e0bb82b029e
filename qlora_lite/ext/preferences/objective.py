"""Learn from preferences: pairs of answers, or answers with a label; DPO and its family.

An example is two sequences (``tokens.preferences``), and a micro-batch packs both as it packs any rows, so that a pair
takes the memory of fine-tuning on its tokens. The loss of a pair is a function of its sequences' summed
log-probabilities, which come from the chunked loss with their gradients (``kernels.loss.sequence_losses``): one pass,
no logits of a whole batch, and every pair has the same weight, however a step is cut. What the reference model gives
the sequences is computed once, before the first step, by the model as training begins with it (``references``); a
second model, or a second forward pass in each step, is what others pay for that.

| objective | loss of a pair: c and r are log-ratios to the reference, p mean log-probabilities  | source           |
|-----------|-------------------------------------------------------------------------------------|------------------|
| dpo       | -log sigmoid(beta (c - r))                                                          | arXiv 2305.18290 |
| ipo       | (c - r - 1 / (2 beta))^2, of means over tokens                                      | arXiv 2310.12036 |
| hinge     | max(0, 1 - beta (c - r))                                                            | arXiv 2305.10425 |
| cpo       | -log sigmoid(beta (log-probability of chosen - of rejected)) - p(chosen)            | arXiv 2401.08417 |
| simpo     | -log sigmoid(beta (p(chosen) - p(rejected)) - gamma)                                | arXiv 2405.14734 |
| orpo      | -p(chosen) - beta log sigmoid(log odds of chosen - of rejected), of p               | arXiv 2403.07691 |
| kto       | 1 - sigmoid(beta (c - z)) of a good answer, 1 - sigmoid(beta (z - c)) of a bad one  | arXiv 2402.01306 |

KTO's z is the mean log-ratio of answers to other prompts, of all examples of a step, at least 0, and constant: a
forward pass over them comes before the step's own, so that z is the same however the step is cut. (trl takes the mean
of each micro-batch.) With label smoothing e, dpo, cpo and simpo take 1 - e of the loss and e of that with the answers
swapped. The odds of an answer that is learned completely are infinite; orpo takes those of p = -2^-23 there, which is
float32's precision.

Shapes: P examples of a micro-batch; R sequences, of pairs 2 P in turn, else P; N targets of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.tokens.batch import IGNORED_LABEL, Batch, Extent
from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, sequence_losses
from qlora_lite.memory.marks import category
from qlora_lite.models import anatomy
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.offload.transfer import sent
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.causal_lm import TextBatches, TextSpec, planned_rows
from qlora_lite.train.forward import Inputs, prepare
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.processes import ALONE, Processes
from qlora_lite.train.workload import Workload

OF_TWO = 4  # tokens that two sequences have at least: one of a prompt, and a target
WITH_REFERENCE = "dpo", "ipo", "hinge", "kto"  # objectives that compare with the model that training begins with
USUAL_BETA, BETAS, SFT_WEIGHTS = 0.1, {"simpo": 2.0}, {"orpo": 1.0, "cpo": 1.0}  # where a recipe leaves them open
OF_MEANS = "ipo", "simpo", "orpo"  # over a sequence's tokens, and not of sums
SURE = -torch.finfo(torch.float32).eps  # the greatest logarithm of a probability that odds are taken of


class PreferenceBatch(NamedTuple):
    """Packed examples of two sequences, in host memory.

    own: the sequences that are learned from: of pairs both of each example, in turn; else the first ones.
    other: the second ones, where they are measured apart.
    references: float32 [P, 2], what the reference model gives the sequences.
    desirable: bool [P], whether the first sequence's answer is one to imitate.
    moved: of kto what ``Preference.prepare_step`` has found for the step.
    """

    own: Batch
    other: Batch | None
    references: torch.Tensor
    desirable: torch.Tensor
    moved: float = 0.0


class Sequences(NamedTuple):
    """Packed sequences as the model computes on them.

    tokens: see ``forward.Inputs``.
    numbers: int64 [N], the sequence of each target.
    counts: float32 [R], the targets of each sequence.
    """

    tokens: Inputs
    numbers: torch.Tensor
    counts: torch.Tensor


class PreferenceInputs(NamedTuple):
    """A micro-batch as the model computes on it; see ``PreferenceBatch``. ``moved`` is float32 []."""

    own: Sequences
    other: Sequences | None
    references: torch.Tensor
    desirable: torch.Tensor
    moved: torch.Tensor

    @property
    def tokens(self) -> Inputs:
        """Those that the model computes on."""
        return self.own.tokens


@dataclass(frozen=True)
class Preference(Objective):
    """The loss of pairs, or of answers with a label.

    Args:
        kind: of the table of this module.
        beta: scale of the difference; of orpo the weight of the odds ratio.
        label_smoothing: share of pairs that are taken to be the wrong way round.
        gamma: simpo's margin.
        sft_weight: of the chosen answer's mean token loss, which is added.
        desirable_weight, undesirable_weight: of kto's two kinds of answers.
        chunk_tokens: tokens whose logits exist at once.
    """

    is_likelihood: ClassVar[bool] = False
    kind: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    chunk_tokens: int = AUTO_CHUNK_TOKENS

    @property
    def name(self) -> str:
        """Of the objective."""
        return self.kind

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model."""
        return self.kind in WITH_REFERENCE

    def with_options(self, options: MemoryOptions) -> Self:
        """Take the tokens at once from memory options."""
        return replace(self, chunk_tokens=options.loss_chunk_tokens or AUTO_CHUNK_TOKENS)

    @property
    def is_of_pairs(self) -> bool:
        """Whether it compares the two sequences of an example."""
        return self.kind != "kto"

    def log_probabilities(self, model: nn.Module, outputs: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Return the summed log-probability of each sequence's targets, float32 [R], of hidden states [N, D]."""
        with category("logits"):
            targets, its_head, count = sequences.tokens.targets, anatomy.head(model), len(sequences.counts)
            return -sequence_losses(outputs, targets, its_head, self.chunk_tokens, sequences.numbers, count)

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: PreferenceInputs) -> LossSum:
        """Return the loss of hidden states [N, D] of the tokens before the targets."""
        sums, counts = self.log_probabilities(model, outputs, inputs.own), inputs.own.counts
        if not self.is_of_pairs:
            return self._judged(sums - inputs.references[:, 0], inputs)
        means, scores = sums / counts, sums - inputs.references.flatten() if self.needs_reference else sums
        if self.kind in OF_MEANS:
            scores = scores / counts
        chosen, rejected = scores[::2], scores[1::2]
        losses = self._losses(chosen, rejected)
        if self.sft_weight:
            losses = losses - self.sft_weight * means[::2]
        with torch.no_grad():
            rewards = self.beta * chosen, self.beta * rejected
            metrics = {
                "rewards/chosen": rewards[0].sum(),
                "rewards/rejected": rewards[1].sum(),
                "rewards/margins": (rewards[0] - rewards[1]).sum(),
                "rewards/accuracies": (rewards[0] > rewards[1]).float().sum(),
                "logps/chosen": sums[::2].sum(),
                "logps/rejected": sums[1::2].sum(),
                "tokens/chosen": counts[::2].sum(),
                "tokens/rejected": counts[1::2].sum(),
            }
        return LossSum(losses.sum(), metrics)

    def _losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Return the loss of each pair, float32 [P], without the mean token loss that is added."""
        difference = chosen - rejected
        if self.kind == "ipo":
            return (difference - 1 / (2 * self.beta)).square()
        if self.kind == "hinge":
            return torch.relu(1 - self.beta * difference)
        if self.kind == "orpo":
            return -self.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
        logits = self.beta * difference - (self.gamma if self.kind == "simpo" else 0)
        right, wrong = logsigmoid(logits), logsigmoid(-logits)
        return -right if not self.label_smoothing else -torch.lerp(right, wrong, self.label_smoothing)

    def _judged(self, own: torch.Tensor, inputs: PreferenceInputs) -> LossSum:
        """Return the loss of answers with a label, of the log-ratio of each, float32 [P]."""
        signs = torch.where(inputs.desirable, 1.0, -1.0)
        weights = torch.where(inputs.desirable, self.desirable_weight, self.undesirable_weight)
        lead = signs * (own - inputs.moved)
        with torch.no_grad():
            metrics = {
                "rewards/signed": (self.beta * signs * own).sum(),
                "rewards/accuracies": (lead > 0).float().sum(),
                "kl": inputs.moved * len(own),
            }
        return LossSum((weights * (1 - torch.sigmoid(self.beta * lead))).sum(), metrics)

    def weight(self, inputs: PreferenceInputs) -> int:
        """Return the number of examples."""
        return len(inputs.desirable)

    @property
    def prepares_steps(self) -> bool:
        """Whether answers are judged one by one."""
        return not self.is_of_pairs

    def prepare_step(
        self,
        model: nn.Module,
        spec: ModelSpec,
        maker: Batches,
        batches: Sequence[PreferenceBatch],
        processes: Processes = ALONE,
        counted: int | None = None,
    ) -> Sequence[PreferenceBatch]:
        """Return a step's micro-batches with the mean log-ratio of all their answers to other prompts."""
        if self.is_of_pairs:
            return batches
        moved, device = [], spec.device(model)
        for each in batches:
            assert each.other is not None
            references, others = sent(each.references[:, 1], device), sequences_in(each.other, device)
            moved.append((self._of(model, spec, others) - references).sum().item())
        answers = sum(len(each.desirable) for each in batches[:counted])
        total, count = processes.exchange(sum(moved[:counted]), answers)
        return [each._replace(moved=max(0.0, total / count)) for each in batches]

    def references(self, model: nn.Module, spec: ModelSpec, inputs: PreferenceInputs) -> torch.Tensor:
        """Return what a model gives each example's sequences, float32 [P, 2]."""
        own = self._of(model, spec, inputs.own)
        if inputs.other is None:
            return own.view(-1, 2)
        return torch.stack([own, self._of(model, spec, inputs.other)], dim=1)

    @torch.no_grad()
    def _of(self, model: nn.Module, spec: ModelSpec, sequences: Sequences) -> torch.Tensor:
        return self.log_probabilities(model, spec.outputs(model, sequences), sequences)


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of log p, also where p is nearly 0 or nearly 1; source: Maechler 2012.

    Log p nearer to 0 than ``SURE``, or above it by rounding, counts as ``SURE``, for value and gradient: those of p = 1
    are infinite, and a gradient of 0 would let nothing move it. So the gradient to a chosen answer is its limit.
    """
    half = -math.log(2)
    known = log_probability - (log_probability - SURE).relu().detach()
    likely = torch.log(-torch.expm1(known.clamp(min=half)))
    return known - torch.where(known > half, likely, torch.log1p(-torch.exp(known.clamp(max=half))))


@dataclass(frozen=True)
class ComparedTexts(TextBatches):
    """Examples of two sequences, packed; examples of one sequence are rows of text.

    Args:
        is_of_pairs: whether both are learned from, in turn, or the first ones alone.
    """

    is_of_pairs: bool = True

    @property
    def sequences(self) -> int:
        """Of an example, both of which are learned from where they are compared."""
        return 2 if self.is_of_pairs else 1

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``data.tokens.batch.enlarged``; each example gets two sequences again, whose halves are learned alike."""
        second = self.virtual  # tokens before the second sequence of each; those of one are a language model's
        most = most._replace(tokens=most.tokens - second * most.rows, longest=most.longest - second)
        return enlarged_in_two(super().enlarged, examples, most)

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch | Batch:
        """Pack both sequences of each example; those of one sequence as a language model's."""
        if not examples[0].first:
            return self.packed(examples)
        both = [sequences_of(example) for example in examples]
        if self.is_of_pairs:
            own, other = self.packed([each for pair in both for each in pair]), None
        else:
            own, other = (self.packed(each) for each in zip(*both, strict=True))
        references = torch.tensor([example.references or (0.0, 0.0) for example in examples])
        return PreferenceBatch(own, other, references, torch.tensor([example.desirable for example in examples]))

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the tokens of each, virtual ones of both sequences included."""
        lengths, virtual = super().lengths(examples), self.virtual
        are_two = virtual and len(examples) and examples[0].first
        return [length + virtual for length in lengths] if are_two else lengths

    def shape(self, batch: PreferenceBatch | Batch) -> BatchShape:
        """Return the tokens of each sequence that is learned from, and how many are targets."""
        return super().shape(batch.own if isinstance(batch, PreferenceBatch) else batch)

    def inputs(self, batch: PreferenceBatch | Batch, device: torch.device) -> PreferenceInputs | Inputs:
        """See ``forward.prepare``."""
        if not isinstance(batch, PreferenceBatch):
            return super().inputs(batch, device)
        own = sequences_in(batch.own, device)
        other = None if batch.other is None else sequences_in(batch.other, device)
        references, desirable = (sent(tensor, device) for tensor in (batch.references, batch.desirable))
        return PreferenceInputs(own, other, references, desirable, torch.full((), batch.moved, device=device))

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> PreferenceInputs:
        """Return inputs of zeros, with positions."""
        count, zero = len(shape.lengths), torch.zeros((), device=device)
        numbers = torch.zeros(shape.targets, dtype=torch.int64, device=device)
        own = Sequences(planned_rows(shape, device), numbers, zero.expand(count).clone())
        examples = count // 2 if self.is_of_pairs else count
        desirable = torch.ones(examples, dtype=torch.bool, device=device)
        return PreferenceInputs(own, None, zero.expand(examples, 2).clone(), desirable, zero)

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack of so many tokens: of pairs, the longest is two of one length."""
        shape = super().full_pack(tokens, packing)
        return halved(shape) if self.is_of_pairs else shape


def preference_lm(method: AdapterMethod, objective: Preference, spec: ModelSpec | None = None) -> Workload:
    """Return a causal language model that learns from preferences.

    Args:
        spec: of the model, for a plan.
    """
    batches = ComparedTexts(method.virtual_tokens, objective.is_of_pairs)
    return Workload(spec or TextSpec(), batches, objective, method)


def sequences_in(batch: Batch, device: torch.device) -> Sequences:
    """Return packed sequences on a device, with what sums over each need."""
    targets, ends = (batch.labels != IGNORED_LABEL).nonzero().squeeze(1), torch.tensor(batch.row_lengths).cumsum(0)
    numbers = torch.searchsorted(ends, targets, right=True)
    counts = torch.bincount(numbers, minlength=len(ends)).clamp(min=1).float()
    return Sequences(prepare(batch, device), sent(numbers, device), sent(counts, device))


def enlarged_in_two(
    enlarged: Callable[[Sequence[Example], Extent], Sequence[Example]], examples: Sequence[Example], most: Extent
) -> list[Example]:
    """Return examples of two sequences that need as much memory as any; see ``data.tokens.batch.enlarged``.

    Args:
        enlarged: does so for examples of one.
    """
    tokens, longest = max(most.rows, most.tokens - OF_TWO * most.rows), max(1, most.longest - OF_TWO)
    shorter = most._replace(tokens=tokens, longest=longest)
    return [_in_two(each) for each in enlarged([replace(example, first=0) for example in examples], shorter)]


def halved(shape: BatchShape) -> BatchShape:
    """Return a shape whose longest sequence is two of one length, and whose others are an even number."""
    longest, *others = shape.lengths
    if len(others) % 2:
        longest, others = longest + others[0], others[1:]
    half = longest // 2
    return BatchShape((longest - half, half, *others), shape.targets)


def _in_two(example: Example) -> Example:
    """Return an example of two sequences for one of one, ``OF_TWO`` tokens longer, with as many targets."""
    token_ids = torch.from_numpy(example.token_ids)
    token_ids = torch.cat([token_ids, token_ids[:1].expand(OF_TWO)]).numpy()
    first = len(token_ids) // 2
    targets = max(2, int(example.is_target.sum()))
    of_first = min(targets // 2, first - 1)
    is_target = torch.zeros(len(token_ids), dtype=torch.bool)
    is_target[1 : 1 + of_first] = True
    is_target[first + 1 : first + 1 + targets - of_first] = True
    return replace(example, token_ids=token_ids, is_target=is_target.numpy(), first=first)

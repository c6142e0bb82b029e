"""The settings of a recipe: names, types, defaults, ranges and, as docstring, what each one does.

This is the one place where a default lives and the one text that documents it: messages, `--help` and
`qlora-lite explain` are made from it. The models are frozen and strict (no "16" for 16, no 1 for true, no unknown
key), because a typo or a value silently turned into another costs a night of training. pydantic is used and
not dataclasses with checks by hand, so that type, range and documentation stand together.

Units are in the names (`_tokens`, `_rows`, `_steps`); sizes carry their unit as text ("8GiB").
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_serializer

from qlora_lite.units import parse_bytes

ALL_LINEAR = "all-linear"
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Rule:
    """Say in words what a setting accepts, where its type alone would not read well."""

    text: str


def _one_or_many(field: str):
    """Return a validator that reads one string, or strings in a list, as objects with only `field` set."""

    def convert(value: object) -> object:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            return items
        return tuple({field: item} if isinstance(item, str) else item for item in items)

    return BeforeValidator(convert)


def _one_name_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _size_or_auto(value: str) -> str:
    if value != "auto" and parse_bytes(value) == 0:
        raise ValueError("a budget of 0 bytes")
    return value


def _file_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,49}", value):
        raise ValueError("not a file name")
    return value


def fault_of_pattern(value: str) -> str | None:
    """Return what is wrong with a regular expression; None if nothing is."""
    import regex  # here, since few recipes have one

    try:
        regex.compile(value)
    except regex.error as error:
        return str(error)
    return None


def _pattern(value: str) -> str:
    if fault := fault_of_pattern(value):
        raise ValueError(fault)
    return value


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True,
        validate_default=False,
    )  # fmt: skip


_Pattern = Annotated[Text, AfterValidator(_pattern), Rule("a regular expression")]


class Model(_Section):
    """The base model, frozen and quantised."""

    path: Text
    """Base model: a hub id (owner/name), a local folder with safetensors, a .gguf file, or
    package:NAME/FILE for a file inside an installed Python package."""
    quant: Literal["nf4", "fp4", "none"] = "nf4"
    """How the frozen linear layers and experts are stored: 4-bit NF4 or FP4 as in bitsandbytes, or none for 16 bit."""
    double_quant: bool = True
    """Quantise the block scales too: 4.13 instead of 4.5 bits per weight."""
    quant_head: bool = False
    """Keep a 4-bit copy of the head in place of the 16-bit one: less memory, and a model that answers a little
    differently, before training and after (qlora-lite explain memory-options). Where the embeddings are also the head
    their 16-bit table stays, and the copy saves memory only with memory.embeddings host."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 on devices fast at it, float16 on cards of compute
    capability 7.0 to 7.5, else float32, as there for models whose numbers exceed float16 (Gemma 2 to 4, gpt-oss and
    others). In float16 the loss is scaled, so that small gradients are not lost."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a CUDA GPU if there is one, and stops where torch cannot use it; cpu means the CPU."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model; null is the main branch."""


class Target(_Section):
    """Linear layers that get LoRA factors; a bare name is short for {pattern: NAME}."""

    pattern: Text
    """Layer name (q_proj), glob over the whole path (model.layers.*.mlp.*), or all-linear."""
    rank: PositiveInt | None = None
    """Rank of these layers; null is lora.rank."""
    alpha: PositiveFloat | None = None
    """Alpha of these layers; null is lora.alpha."""


class Lora(_Section):
    """The trainable low-rank factors."""

    rank: PositiveInt = 16
    """Width of the two factors of each layer."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with lora.rslora."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's inputs that are zeroed on the way into the factors."""
    targets: Annotated[
        tuple[Target, ...],
        Field(strict=False, min_length=1),
        _one_or_many("pattern"),
        Rule("all-linear, or a list of names, glob patterns and {pattern, rank, alpha}"),
    ] = (Target(pattern=ALL_LINEAR),)
    """Which linear layers get factors; all-linear is every one inside the blocks. Where several match, the
    last one wins."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks from learning too slowly."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the factors and their gradients."""
    init_from: Text | None = None
    """Adapter whose factors training begins with: a run folder, or a folder in the PEFT format, with the layers, ranks
    and alphas of this section; they are rounded to lora.dtype. null begins with new ones, which change nothing."""

    @field_serializer("targets")
    def _short_targets(self, targets: tuple[Target, ...]) -> object:
        bare = Target(pattern=ALL_LINEAR)
        if targets == (bare,):
            return ALL_LINEAR
        return [target.model_dump(exclude_none=True) for target in targets]


class Source(_Section):
    """One place that rows come from; a bare path is short for {path: PATH}."""

    path: Text
    """A data file (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; text kinds also as .gz or .zst), a folder or glob
    pattern with files of one kind, a split's folder as save_to_disk of datasets writes it, or a hub data set,
    hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or either with :SPLIT. Of a folder, .md files are read where it has no others,
    and never a .md, .txt or .text file whose name begins with the word readme, license, licence, changelog or
    contributing. Commas part the columns of a .csv file, unless its first line names another sign, as in sep=;"""
    format: Literal["messages", "sharegpt", "alpaca", "prompt-completion", "chosen", "text", "table"] | None = None
    """Shape of the rows; null recognises it from the first row. A table is any columns, with prompt and
    completion; chosen learns the chosen answers of preference rows as if they were the only ones; text is also the
    format of a plain-text file whose name does not say so."""
    weight: PositiveFloat = 1.0
    """How often each row is used per epoch: 2 is twice, 0.5 every second row."""
    prompt: Text | None = None
    """Template of the prompt over a row's columns, such as "{question}"; goes with completion."""
    completion: Text | None = None
    """Template of the answer over a row's columns, such as "{answer}"; goes with prompt."""
    documents: Literal["lines", "blank-lines", "file"] | None = None
    """What a document of a text file (.txt, .text, .md) is: a line, what stands between blank lines, or the whole file.
    null is blank-lines for a file with one between its lines, else lines."""


_Sources = Annotated[
    tuple[Source, ...],
    Field(strict=False, min_length=1),
    _one_or_many("path"),
    Rule("a path, or a list of {path, format, weight, prompt, completion, documents}"),
]


class Data(_Section):
    """The rows to learn from and how they become tokens."""

    train: _Sources
    """Training rows."""
    eval: _Sources | None = None
    """Evaluation rows; null evaluates nothing, or what data.eval_share holds out."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows that is held out as evaluation rows, where data.eval names none. They are chosen
    by their places in the files, whatever train.seed is; rows that are alike stay together, and so do those with the
    same prompt, unless it has more rows than a quarter of what is held out. A template that writes other prompts may
    hold other rows out."""
    template: Text | None = None
    """Chat template: a name or a .jinja file; null is the model's own. For a base model plain writes prompt, line end
    and answer, joined nothing between the two; chatml-tools writes tools, calls and results. Where one writes today's
    date, rows have 26 July 2024, so that they are the same every day; prompts to answer have the real one."""
    train_on: Literal["assistant", "completion", "all", "last"] = "assistant"
    """Which tokens are learned: every assistant message, the completion, all tokens, or the last answer."""
    train_on_end: bool = True
    """Learn the token that ends an answer; false teaches the model never to stop by itself."""
    max_bad_rows: Count = 0
    """Malformed rows that may be left out, with a count by reason; with more of them nothing is trained. Nor is it
    where none is left of a file or of a kind of row (with tools, tool calls, a system turn, several user turns), here
    or by data.overflow, while other rows are."""
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    """Longest row, and the length of a pack, in tokens."""
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a row longer than data.max_tokens; dropped and cut rows are counted and reported. split cuts a
    document into windows, and a conversation between exchanges, each part with the system turn."""
    packing: bool = True
    """Put several rows into one sequence; they do not see each other."""
    order: Literal["shuffle", "as-is", "longest-first", "by-length"] = "shuffle"
    """Order of the rows in an epoch; shuffle depends on train.seed and the epoch only. longest-first shows at once what
    does not fit; by-length puts rows of like length together and shuffles the steps."""
    streaming: bool = False
    """Make tokens while training, and keep none: for sources too large for a first pass. Hub data sets are then not
    downloaded but read over the network, once more for each epoch. Needs data.order as-is and train.max_steps; only the
    first 1,000 rows of each source are checked before, a bad row after them ends the run."""

    @property
    def has_eval(self) -> bool:
        """Whether there are evaluation rows."""
        return self.eval is not None or self.eval_share > 0


_Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio",
]  # fmt: skip


class Train(_Section):
    """The training steps."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; null trains for train.epochs."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows; not used where train.max_steps is given."""
    learning_rate: PositiveFloat = 2e-4
    """Highest learning rate, reached after the warm-up."""
    micro_batch_size: PositiveInt = 1
    """Packs (rows without data.packing) in one forward and backward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; each learned token counts the same."""
    optimizer: Literal[
        "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "lion_8bit", "paged_lion_8bit", "lion_32bit", "adamw_torch",
    ] = "adamw_8bit"  # fmt: skip
    """Optimizer; the paged ones can move their state to host memory when the GPU is full, which no plan counts on, and
    are as the others where its driver cannot do that (WSL, or a share of a card)."""
    stochastic_rounding: bool = True
    """Round updated bfloat16 factors up or down by chance, so that updates too small for the type count on average;
    false rounds to the nearest. Nothing changes with lora.dtype float32."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: kept, or lowered to zero along a line or a half cosine."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of a weight removed per step, times the learning rate."""
    compile: bool = False
    """Run the blocks through torch.compile: faster steps after a minute or so of compilation, with results that differ
    by rounding. Goes without dropout (lora.dropout or the model's own) and memory.checkpointing selective, and with
    memory.tile_tokens off, memory.resident_blocks all and memory.checkpoint_every 1, which auto then is; not for models
    whose rows run one by one or whose experts are in 4 bit; a CPU needs a C++ compiler."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the factors, the order of rows and dropout."""
    deterministic: bool = False
    """On a card, use only operations that give the same bits each time, so that a resumed run equals an uninterrupted
    one bit for bit; slower. On a CPU it does so anyway."""
    eval_every_steps: Count = 0
    """Steps between evaluations; 0 evaluates only before and after."""
    early_stopping_patience: Count = 0
    """Evaluations in a row without a better loss after which training ends; 0 never ends it early. The one before
    training does not count."""
    save_every_steps: Count = 0
    """Steps between checkpoints, from which train --resume goes on; 0 leaves it to train.save_every_minutes."""
    save_every_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints; 0 turns it off. One is always written when a run is stopped and after its last
    step."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept; each also holds the factors that were best so far."""
    max_hours: PositiveFloat | None = None
    """Hours after which training saves a checkpoint and stops, to go on with train --resume; null has no limit."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or leave the weights as they are for this step."""
    max_skipped_steps: PositiveInt = 10
    """Steps that may be skipped with train.on_not_finite skip; one more ends the run."""
    exact_match_rows: Count = 0
    """Evaluation rows answered by greedy generation before and after, to count exact matches."""
    exact_match_pattern: _Pattern | None = None
    """Regular expression that finds what is compared in the reference and in the answer: its first match, of which the
    first group if it has groups. For GSM8K "#### (-?[0-9.,]+)". An answer in which it finds nothing is no match. null
    compares the whole text. White space at the ends never counts."""
    exact_match_ignore: _Pattern | None = None
    """Regular expression of what is removed from both before they are compared, such as "[,$]|[.]$"."""
    exact_match_ignore_case: bool = False
    """Compare without regard to upper and lower case."""
    exact_match_new_tokens: Annotated[
        PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")
    ] = "auto"  # fmt: skip
    """Most tokens of an answer; auto is 8 more than the longest reference among the rows has. Chains of thought may
    need more."""
    trackers: Annotated[
        tuple[_Tracker, ...], Field(strict=False), BeforeValidator(_one_name_or_many),
        Rule(f"one or a list of {', '.join(get_args(_Tracker))}"),
    ] = ()  # fmt: skip
    """Experiment trackers that also get the metrics; each must be installed."""


class Memory(_Section):
    """How memory is traded for time in training; of a model in use, budget, tile_tokens and loss_chunk_tokens count."""

    budget: Annotated[str, AfterValidator(_size_or_auto), Rule("auto, or a size with its unit, such as 8GiB")] = "auto"
    """Most memory the run may use; auto is what the device has free. The fastest plan that fits is chosen for the
    settings below that are auto, then proved by one measured step before the first. A plan that takes more is
    replaced; what does not fit ends there."""
    host_budget: Annotated[str, AfterValidator(_size_or_auto), Rule("auto, or a size with its unit, such as 24GiB")] = (
        "auto"
    )
    """Most host memory that training may use beside a card; auto is what the host has free, and no limit where a plan
    is for another machine's card. (A model's first loading takes its own share before: all of its weights in 4 bit,
    unless they are streamed from the disk; those of a GGUF file in 16 bit.) On a CPU memory.budget is all there is."""
    checkpointing: Literal["auto", "block", "selective", "none"] = "auto"
    """block keeps each block's input and computes the rest again in backward; selective keeps attention's results too,
    where a fused kernel gives them (on a CPU block keeps them anyway, and the two are the same); none keeps
    everything."""
    kept_blocks: Annotated[Count | Literal["auto"], Rule("a whole number of at least 0, or auto")] = "auto"
    """Of the last blocks, how many keep everything although checkpointing is block or selective; auto is as many as
    fit."""
    checkpoint_every: Annotated[PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")] = "auto"
    """Of so many blocks in a row only the first keeps its input, and backward computes them all again at once; for
    memory.checkpointing block or selective, and weights that are not streamed. auto is 1 unless nothing else fits."""
    loss_chunk_tokens: Annotated[PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")] = "auto"
    """Learned tokens whose logits exist at one time."""
    fused_loss: Literal["auto", "off"] = "auto"
    """Liger's or cut-cross-entropy's loss in place of the chunked one, on a card and in training only. auto tries those
    that are installed on the run's own rows and head before the first step, and takes one that is faster, holds no more
    memory and is about as exact; none with train.deterministic. Results differ by rounding."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto takes fused kernels of a card, torch's for RMS norms, for attention over packed sequences and for capped
    scores and sinks (flex attention, compiled by Triton), Liger's where it is installed for gated MLPs (SwiGLU), and
    our own for experts in 4 bit, where a trial on the run's own shapes before the first step finds them faster and
    about as exact as plain operators; none with train.deterministic. plain always takes plain ones. Results differ by
    rounding. Nothing changes on a CPU and with train.compile."""
    tile_tokens: Annotated[PositiveInt | Literal["auto", "off"], Rule("a whole number of at least 1, auto or off")] = (
        "auto"
    )
    """Tokens that go through an MLP or a norm at one time; what they compute on the way is computed again in
    backward, tile by tile."""
    embeddings: Literal["auto", "device", "host"] = "auto"
    """Where the table of embeddings lies; of one in host memory only the rows of the batch travel. Where the embeddings
    are also the head, both are set to the same."""
    head: Literal["auto", "device", "host"] = "auto"
    """Where a 16-bit head's weight lies; of one in host memory a few thousand words travel at a time, in training for
    each memory.loss_chunk_tokens once, in exact matches for each token that is generated."""
    offload_checkpoints: bool | Literal["auto"] = "auto"
    """Keep the blocks' inputs, and the attention results that are kept, in host memory until backward; they travel
    beside the computation."""
    offload_folder: Text | None = None
    """Folder on a fast disk for what memory.offload_checkpoints moves, in files without a name and not in host memory.
    The device waits during each copy; estimates of time do not count the disk, so auto takes it only where nothing else
    fits. A folder that is kept in memory, as /tmp often is, spares nothing."""
    resident_blocks: Annotated[Count | Literal["auto", "all"], Rule("a whole number of at least 0, auto or all")] = (
        "auto"
    )
    """How many of the last blocks keep their frozen weights on the device; the others' lie in host memory and
    come, one block ahead, in forward and in backward. Results are the same to the bit."""
    stream_from: Literal["auto", "host", "disk"] = "auto"
    """Where streamed weights in 4 bit wait: host is pinned memory for all of them; disk leaves them in the file of the
    prepared model (of a 4-bit checkpoint, in its own), of which host memory holds two blocks, and more where the system
    has room for it. auto is disk only where the host has room for no other plan; estimates of time assume a disk that
    gives 2 GB/s. A file that cannot be read any more ends the process."""
    optimizer_in_backward: bool = False
    """Update each factor as soon as its gradient is there, so that the gradients of all never lie in memory at one
    time. Clipping, several micro-batches a step and leaving steps out need all of them first: with
    train.max_grad_norm 0, train.gradient_accumulation_steps 1 and train.on_not_finite stop only; never in float16."""
    reuse_dequantized: bool | Literal["auto"] = "auto"
    """Unpack the 4-bit weights of a block once for its second run and its backward, and those of an MLP once for all
    tiles: less work, for as long a block's weights in 16 bit."""
    micro_batches: Literal["auto", "as-given"] = "auto"
    """auto may cut a step's packs into other micro-batches than train.micro_batch_size says; the packs of a step, and
    what each token counts, stay the same."""

    @property
    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, or None for auto."""
        return None if self.budget == "auto" else parse_bytes(self.budget)

    @property
    def host_budget_bytes(self) -> int | None:
        """Return the budget of host memory in bytes, or None for auto."""
        return None if self.host_budget == "auto" else parse_bytes(self.host_budget)


class Output(_Section):
    """Where the results go."""

    dir: Text | None = None
    """The run folder, exactly; null makes runs/NAME-TIMESTAMP."""
    name: (
        Annotated[
            str,
            AfterValidator(_file_name),
            Rule("at most 50 letters, digits, '.', '_' and '-', no '.' first"),
        ]
        | None
    ) = None
    """Name of the run; null is the recipe file's name."""


class Recipe(_Section):
    """Everything a run is made from; get one from `load_recipe`, which also checks files and combinations."""

    model: Model
    lora: Lora = Lora()
    data: Data
    train: Train = Train()
    memory: Memory = Memory()
    output: Output = Output()

    @property
    def recipe_hash(self) -> str:
        """Return the SHA-256 (hex) of all settings that can change the result: every section but output."""
        settings = self.model_dump(mode="json", exclude={"output"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

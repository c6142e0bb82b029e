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
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    model_validator,
)

from qlora_lite.registry import names
from qlora_lite.units import parse_bytes

ALL_LINEAR = "all-linear"
SHORTEST_ROW = 8  # tokens that there must be room for
METRICS_EXAMPLES = 100  # where metrics are named, and not how many examples they are of
LONGEST_ROW = 2**24  # tokens: beyond the context of any model
# Settings by the names that they had before; recipes, overrides and runs with those still load.
FORMER_NAMES = {
    "train.exact_match_rows": "train.metrics_examples",
    "train.exact_match_examples": "train.metrics_examples",
    "train.exact_match_new_tokens": "train.metrics_new_tokens",
    "memory.kept_blocks": "memory.uncheckpointed_layers",
    "memory.checkpoint_every": "memory.layers_per_checkpoint",
    "memory.resident_blocks": "memory.resident_layers",
    "memory.reuse_dequantized": "memory.cache_dequantized",
}
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
S = TypeVar("S", bound="Section")


@dataclass(frozen=True, slots=True)
class Rule:
    """Describe what a setting accepts, where its type alone would not read well."""

    text: str


@dataclass(frozen=True, slots=True)
class Registered:
    """Accept the names of a group (``registry``)."""

    group: str


def _name_in(group: str):
    """Return a validator of names of a group."""

    def check(value: str) -> str:
        if value not in names(group):
            raise ValueError(f"not among the {group}")
        return value

    return AfterValidator(check)


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


def _at_least(count: int):
    """Return a validator of the length of a list whose items are valid; min_length also counts those that are not."""

    def check(value: tuple | None) -> tuple | None:
        if value is not None and len(value) < count:
            raise ValueError(f"{len(value)} items")
        return value

    return AfterValidator(check)


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


class Section(BaseModel):
    """A section of a recipe: settings with their defaults, each with a docstring that says what it does."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
    )


_Pattern = Annotated[Text, AfterValidator(_pattern), Rule("a regular expression")]


class Model(Section):
    """The base model, frozen and quantised."""

    path: Text
    """Base model: a hub id (owner/name), a local folder with safetensors, a .gguf file, or
    package:NAME/FILE for a file inside an installed Python package."""
    quant: Literal["nf4", "fp4", "keep", "none"] = "nf4"
    """How the frozen linear layers and experts are stored: 4-bit NF4 or FP4 as in bitsandbytes, or none for 16 bit.
    keep trains on a GGUF file's own codes (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K; its other layers in 16 bit),
    so that the adapter fits the very file that llama.cpp or Ollama serves. A checkpoint that is published packed (NF4,
    int8, FP8, GPTQ, AWQ, MXFP4) keeps its codes whatever this says (qlora-lite explain base-models)."""
    double_quant: bool = True
    """Quantise the absmax values too: 4.13 bits per weight instead of 4.5."""
    quant_head: bool = False
    """Quantise the head to 4 bit too: less memory, and a model that answers a little differently, before training and
    after (qlora-lite explain memory-options). With tied embeddings their 16-bit table stays, and this saves memory only
    with memory.embeddings host."""
    keep_16bit: Annotated[
        tuple[Text, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule("a name or glob pattern of layers, or a list of them"),
    ] = ()
    """Layers and weights of experts that stay in 16 bit while the others are quantised, by name or glob pattern as in
    lora.targets: [v_proj, "model.layers.0.*"]. They get LoRA weights like the others. qlora-lite damage measures which
    are worth their memory."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and matrix products. auto is bfloat16 on devices that are fast at it, float16 on GPUs of
    compute capability 7.0 to 7.5, else float32, which those GPUs also use for models whose activations exceed float16
    (Gemma 2 to 4, gpt-oss and others). With float16 the loss is scaled, so that small gradients do not underflow."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto takes a CUDA GPU if there is one, and is an error if torch cannot use it; cpu always means
    the CPU."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model; null is the main branch."""


class Task(Section):
    """What the model is trained to give: text, or labels of texts or pictures by way of a head that is trained too."""

    kind: Annotated[Text, _name_in("tasks"), Registered("tasks")] = "language-model"
    """language-model learns to write, image-text-to-text to write about pictures in chats, with a vision-language model
    (qlora-lite explain vision-language). The others put a head on a decoder (Llama, Qwen, ...) or an encoder (BERT,
    RoBERTa, DeBERTa, ModernBERT) and train it whole, beside LoRA weights or all of the model: classification gives one
    label of several, multi-label any number of them, regression a number. Rows are texts, or pairs of texts, with a
    label. reward scores chats: rows are those of train.objective dpo, and the chosen answer's score is to be the higher
    (qlora-lite explain heads). image-classification gives pictures one label of several, by a vision encoder (DINOv2,
    ViT, SigLIP, CLIP), image-segmentation one to each of their pixels, and image-embedding brings pictures of one label
    together for searches, all with model.quant none unless it says otherwise (qlora-lite explain pictures).
    image-generation trains the denoiser of a diffusion model (Stable Diffusion, SDXL, SD3, PixArt, FLUX, DiT) on
    pictures with captions (qlora-lite explain diffusion)."""
    labels: Annotated[
        tuple[Text, ...] | None,
        Field(strict=False),
        _at_least(1),
        Rule("null, or a list of names"),
    ] = None
    """Names of the labels, in the order of the head's outputs, or of a class-conditional denoiser's classes; null are
    those of the training rows, sorted (of a denoiser, those of its model_index.json, where it has some)."""


class Target(Section):
    """Linear layers or experts that get LoRA weights; a bare name is short for {pattern: NAME}."""

    pattern: Text
    """Name of a layer (q_proj) or of the fused weights of experts (gate_up_proj), glob over the whole path
    (model.layers.*.mlp.*), all-linear, or experts."""
    rank: PositiveInt | None = None
    """Rank of these layers, of experts of each one; null is lora.rank."""
    alpha: PositiveFloat | None = None
    """Alpha of these layers; null is lora.alpha."""


_Part = Literal["embeddings", "head", "norms", "biases", "projector"]


class Adapter(Section):
    """What is trained: weights beside the frozen model, or the model itself."""

    method: Annotated[Text, _name_in("methods"), Registered("methods")] = "lora"
    """lora trains LoRA weights. dora also trains the norm of each row of the adapted weights (DoRA, or QDoRA on a 4-bit
    model): a little more memory and time, and vLLM and llama.cpp take it merged only. The lora section sets up
    both. bottleneck trains small networks behind the parts of each block, prompt embeddings of virtual tokens before
    every row (prompt tuning and p-tuning), and prefix keys and values of such tokens in every layer, as the sections
    bottleneck and prompt say; none of these can be merged or exported, and all slow down answers. full trains all
    weights of a 16-bit model (model.quant none) in model.compute_dtype, and leaves a model folder (qlora-lite explain
    full)."""
    switch_every: Count = 0
    """Steps of adapter.method full after which another block is trained, all others frozen (BAdam): gradients and
    optimizer states are those of one block. 0 trains all weights in every step. Embeddings and head stay as they are;
    50 to 100 are usual, and each block should have its turn a few times."""
    train_also: Annotated[
        tuple[_Part, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule(f"one or a list of {', '.join(get_args(_Part))}"),
    ] = ()
    """Weights of the base model that are trained whole beside the LoRA weights: embeddings, head, norms, biases (all of
    the model's), projector (of a vision-language model). Tied embeddings are one table: embeddings trains the head too.
    A table takes about 6 bytes a number more with an 8-bit optimizer, 2 of them already there, and lies on the device;
    adapters hold it whole, and vLLM and llama.cpp take it merged only. Not norms with train.compile."""
    train_also_lr_ratio: PositiveFloat = 0.1
    """How many times train.learning_rate the learning rate of adapter.train_also is: whole weights take about a tenth
    of what LoRA weights do."""
    train_tokens: Annotated[
        tuple[Text, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule("a token, or a list of tokens"),
    ] = ()
    """Tokens whose rows of the embeddings and the head are trained, and no others, such as ["<|call|>"]. Those that the
    tokenizer lacks are added to it, begin as the mean of all embeddings, and come with the adapter. About 6 bytes for
    each number of a row; at the learning rate of the LoRA weights."""


class Lora(Section):
    """The LoRA weights, which are trained alone, or with the norms of adapter.method dora."""

    rank: PositiveInt = 16
    """Rank of the LoRA matrices."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with lora.rslora."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability at the input of the LoRA weights; those of experts take none."""
    targets: Annotated[
        tuple[Target, ...],
        Field(strict=False),
        _one_or_many("pattern"),
        Rule("all-linear, experts, or a list of names, glob patterns and {pattern, rank, alpha}"),
    ] = (Target(pattern=ALL_LINEAR),)
    """What gets LoRA weights: all-linear is every linear layer inside the blocks (of Mamba layers in_proj alone, since
    kernels read the weights of the others past LoRA's), experts are the fused weights of mixtures of experts,
    [all-linear, experts] both. A name or glob pattern that matches linear layers means those alone. Where several
    patterns match, the last one wins. [] gives none: adapter.train_also or adapter.train_tokens are trained alone (with
    biases, BitFit)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks from learning too slowly."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the LoRA weights and their gradients; the norms of adapter.method dora are always in float32."""
    init_from: Text | None = None
    """Adapter to start from: a run folder, or a folder in the PEFT format, with the layers, ranks and alphas of this
    section; its weights are rounded to lora.dtype. null starts with new LoRA weights, which leave the model's outputs
    as they are."""

    start: Literal["kaiming", "qera", "loftq", "pissa", "olora", "eva"] = "kaiming"
    """What new LoRA weights begin as. kaiming leaves the model's outputs as they are. qera and eva run the model on
    some training rows first: qera makes up for most of what 4 bits change in the outputs of layers on such rows; eva
    begins A with the directions in which a layer's inputs vary most, and gives layers of many such directions the rank
    of others. loftq begins with the error of the 4-bit weights, pissa with the largest singular vectors of each weight,
    and olora with its first orthonormal columns, and the base becomes what is left. All but kaiming are for linear
    layers, and all but kaiming and eva need 16-bit files (qlora-lite explain start)."""
    start_alternations: Count = 5
    """Of lora.start loftq, how often 4-bit weights and LoRA weights are fitted to each other; 0 is kaiming."""

    @field_serializer("targets")
    def _short_targets(self, targets: tuple[Target, ...]) -> object:
        bare = Target(pattern=ALL_LINEAR)
        if targets == (bare,):
            return ALL_LINEAR
        return [target.model_dump(exclude_none=True) for target in targets]


class Bottleneck(Section):
    """The networks of adapter.method bottleneck: two layers each, with an activation between."""

    width: PositiveInt = 64
    """Size of a network's hidden layer."""
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """pfeiffer puts one behind the feed-forward part of each block, houlsby one behind attention too."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation between the two layers."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights and their gradients."""


class Prompt(Section):
    """The virtual tokens of adapter.method prompt and prefix."""

    virtual_tokens: PositiveInt = 20
    """Virtual tokens before every row; data.max_tokens counts them."""
    init_text: Text | None = None
    """Text whose tokens' embeddings they begin with (of adapter.method prefix, keys and values of those), repeated or
    cut; null draws tokens from the vocabulary."""
    encoder_width: PositiveInt | None = None
    """Width of the network that turns what is trained into the embeddings (p-tuning), which the saved adapter no longer
    needs; null trains the embeddings themselves (prompt tuning). Not with adapter.method prefix."""


class Source(Section):
    """A source of rows; a bare path is short for {path: PATH}."""

    path: Text
    """A data file (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; text kinds also as .gz or .zst), a folder or glob
    pattern with files of one kind, the folder of one split as save_to_disk of datasets writes it, or a hub data set,
    hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or either with :SPLIT. In a folder, .md files are read only if there are no
    others, and .md, .txt or .text files whose names begin with the word readme, license, licence, changelog or
    contributing never are. The separator of a .csv file is a comma, unless its first line names another one, as in
    sep=;"""
    format: Literal["messages", "sharegpt", "alpaca", "prompt-completion", "chosen", "text", "table"] | None = None
    """Format of the rows; null recognises it from the first row. A table has any columns, with prompt and completion;
    chosen trains on the chosen answers of preference rows alone; text is also the format of a plain-text file whose
    name does not say so."""
    weight: PositiveFloat = 1.0
    """How often each row is used per epoch: 2 is twice, 0.5 every second row."""
    prompt: Text | None = None
    """Template of the prompt, filled in from a row's columns, such as "{question}"; needs completion."""
    completion: Text | None = None
    """Template of the answer, filled in from a row's columns, such as "{answer}"; needs prompt."""
    rejected: Text | None = None
    """Template of the answer that completion is preferred to, where train.objective compares answers."""
    documents: Literal["lines", "blank-lines", "file"] | None = None
    """What counts as a document in a text file (.txt, .text, .md): a line, the text between blank lines, or the whole
    file. null is blank-lines for a file with a blank line between its lines, else lines."""


_Sources = Annotated[
    tuple[Source, ...],
    Field(strict=False, min_length=1),
    _one_or_many("path"),
    Rule("a path, or a list of {path, format, weight, prompt, completion, rejected, documents}"),
]


class Data(Section):
    """The training and evaluation data, and how it becomes tokens."""

    train: _Sources
    """Training data."""
    eval: _Sources | None = None
    """Evaluation data; null evaluates nothing, or what data.eval_share holds out."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training examples held out for evaluation, if data.eval names no data. Which ones depends on their
    positions in the files, not on train.seed. Examples with the same tokens stay together, and so do those with the
    same prompt, unless that prompt has more examples than a quarter of what is held out. A chat template that renders
    prompts differently may hold out other examples."""
    template: Text | None = None
    """Chat template: a name or a .jinja file; null is the model's own. For a base model, plain writes prompt, line
    break and answer, and joined writes them with nothing in between; chatml-tools writes tools, tool calls and results.
    Where a template writes today's date, examples get 26 July 2024, so that they are the same every day; prompts at
    inference get the real date."""
    train_on: Literal["assistant", "completion", "all", "last"] = "assistant"
    """Target tokens: every assistant message, the completion, all tokens, or the last answer; never a message with
    "train": false or "weight": 0."""
    train_on_end: bool = True
    """Train on the token that ends an answer too; with false the model does not learn to stop."""
    max_bad_rows: Count = 0
    """Malformed rows that may be left out, counted by reason; more of them are an error. So is leaving out every row of
    a file or of a kind (with tools, tool calls, a system turn, several user turns), while other rows remain; where
    data.overflow drop leaves them out for their length, it is a warning."""
    max_tokens: Annotated[int, Field(ge=SHORTEST_ROW, le=LONGEST_ROW)] = 1024
    """Maximum length of an example, and the length of a packed sequence, in tokens. Where train.objective compares
    answers, an example is the prompt with the one and the prompt with the other."""
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to an example longer than data.max_tokens; dropped and truncated ones are counted and reported.
    split cuts a document into windows, and a conversation between exchanges, each part with the system turn."""
    packing: bool = True
    """Pack several examples into one sequence; they do not attend to each other."""
    order: Literal["shuffle", "as-is", "longest-first", "by-length"] = "shuffle"
    """Order of the examples in an epoch; shuffle depends on train.seed and the epoch only. longest-first shows at once
    what does not fit; by-length groups examples of similar length and shuffles the steps."""
    resolution: PositiveInt | None = None
    """Edge of the square that the model sees of a picture, in pixels, a multiple of its patch size; null is what the
    model's files say. Memory and time grow with its square. Of a vision-language model that cuts pictures into parts
    (SmolVLM, Idefics3), the longer edge that a picture is scaled to before, a multiple of a part's; of one that keeps
    their shapes the longer edge (Mistral 3) or that of the square with as many pixels as the largest picture (Qwen-VL,
    Gemma 4), a multiple of a token's: of Qwen3-VL 32, so that 1024 is up to 1,024 tokens, and null 16,384. Only where
    rows are pictures or have some (task.kind)."""
    buckets: bool = True
    """Cut each picture of task.kind image-generation to the rectangle of about data.resolution squared pixels that is
    nearest to its own aspect ratio, from 1:2 to 2:1; false cuts squares."""
    caption: str | None = None
    """Caption of the pictures of task.kind image-generation that have none of their own, such as "a photo of sks dog";
    "" is the neutral prompt."""
    augment: Literal["none", "flip", "crop", "crop-flip"] = "none"
    """What training makes of a picture, anew in each step: flip mirrors every second one, crop takes a random part of
    it, of 8 % of its area or more (torchvision's RandomHorizontalFlip and RandomResizedCrop). It depends on train.seed,
    the step and the picture only. Only where rows are pictures (task.kind)."""
    streaming: bool = False
    """Tokenise while training and store nothing: for sources too large for a first pass. Hub data sets are then read
    over the network instead of downloaded, once more for each epoch. Needs data.order as-is and train.max_steps; only
    the first 1,000 rows of each source are checked beforehand, and a bad row after them ends the run."""

    @property
    def has_eval(self) -> bool:
        """Whether there are evaluation rows."""
        return self.eval is not None or self.eval_share > 0


_Tracker = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
]


_Metric = Literal["exact_match", "number_match", "accuracy", "bleu", "chrf", "rouge", "answer_loss"]


class Train(Section):
    """How training runs: steps, optimizer, evaluation and checkpoints."""

    objective: Annotated[Text, _name_in("objectives"), Registered("objectives")] = "sft"
    """What is learned. sft imitates answers. The others learn from preferences: dpo, ipo and hinge from pairs of a
    chosen and a rejected answer, as against the model that training begins with; orpo, simpo and cpo from pairs without
    such a reference; kto from single answers with a label, good or bad, and with a reference (qlora-lite explain
    preferences). grpo learns from the model's own answers and what functions of yours give for them (qlora-lite explain
    rewards)."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; null trains for train.epochs."""
    epochs: PositiveFloat = 1.0
    """Passes over the training data; ignored if train.max_steps is given."""
    learning_rate: Annotated[PositiveFloat | Literal["auto"], Rule("a number above 0, or auto")] = "auto"
    """Peak learning rate, reached after the warm-up. auto depends on the model's family and width, and on lora.alpha:
    for alpha 32, 2.9e-4 for Llama-3.1-8B, more for narrower models, half of that with lora.start qera, a tenth with
    adapter.method full, and a twentieth where train.objective learns from preferences or rewards (qlora-lite explain
    learning-rate). A resumed run keeps the one that it began with."""
    micro_batch_size: PositiveInt = 1
    """Packed sequences (examples, without data.packing) per forward and backward pass. A step has as many as this times
    train.gradient_accumulation_steps; memory.micro_batches auto may divide them otherwise."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; every target token has the same weight."""
    optimizer: Literal[
        "adamw_8bit",
        "adamw_32bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "paged_lion_8bit",
        "lion_32bit",
        "adamw_torch",
    ] = "adamw_8bit"
    """Optimizer. The paged ones can move their state to host memory when the GPU is full, which no plan counts on; they
    are ordinary ones where the GPU's driver cannot do that (WSL, or a slice of a GPU)."""
    stochastic_rounding: bool = True
    """Round updated bfloat16 weights stochastically, so that updates too small for the type count on average;
    false rounds to nearest. No effect with lora.dtype float32."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or decayed to zero linearly or along a half cosine."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of each weight removed per step, times the learning rate."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """How many times train.learning_rate the learning rate of the LoRA matrices B is (LoRA+); 1 is the same for all."""
    merge_aware: Literal["off", "nf4", "q4_0", "q8_0"] = "off"
    """Train with the weights that the merged model will have once it is quantised: what merge --quantize nf4, or export
    --to gguf --dtype q4_0 or q8_0, then writes is the model that was trained (in a GGUF file but for embeddings and
    head, which are q8_0 there). A step takes a little longer; without that, quantising costs a part of what was learned
    (qlora-lite explain merge). For adapter.method lora and models without experts; nf4 needs model.quant nf4."""
    compile: bool = False
    """Run the blocks through torch.compile: faster steps after a minute or so of compilation, with results that differ
    by rounding. Not with dropout (lora.dropout or the model's own) or memory.checkpointing selective; needs
    memory.tile_tokens off, memory.resident_layers all and memory.layers_per_checkpoint 1, which auto then is. Not for
    models whose sequences run one by one or whose experts are in 4 bit; a CPU needs a C++ compiler."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the LoRA weights, the order of examples and dropout."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits each time, so that a resumed run equals an uninterrupted
    one bit for bit; slower. On a CPU they always do. A run that is not resumed but begun again may divide its steps
    otherwise, by the measured speed: memory.micro_batches as-given keeps it from that."""
    eval_every_steps: Count = 0
    """Steps between evaluations; 0 evaluates only before and after training."""
    early_stopping_patience: Count = 0
    """End training after this many evaluations in a row without a better loss; 0 never does. The evaluation before
    training does not count."""
    save_every_steps: Count = 0
    """Steps between checkpoints, from which train --resume continues; 0 leaves it to train.save_every_minutes."""
    save_every_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints; 0 turns these off. One is always written when a run is stopped and after its last
    step."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept; each also holds the best LoRA weights so far."""
    max_hours: PositiveFloat | None = None
    """Hours after which training saves a checkpoint and stops; train --resume continues it. null is no limit."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: end the run, or skip the update of that step."""
    max_skipped_steps: PositiveInt = 10
    """Steps that may be skipped with train.on_not_finite skip; one more ends the run."""
    metrics: Annotated[
        tuple[_Metric, ...],
        Field(strict=False),
        _at_least(1),
        BeforeValidator(_one_name_or_many),
        Rule(f"one or a list of {', '.join(get_args(_Metric))}"),
    ] = ("exact_match",)
    """What is computed from the greedy answers to train.metrics_examples examples (exact_match, number_match, bleu,
    chrf, rouge), from the likelihood of their references (answer_loss), or from both (accuracy); qlora-lite explain
    inference defines each. bleu, chrf and rouge need the extra metrics: an error
    names the command that installs it."""
    metrics_examples: Count = 0
    """The first evaluation examples, so many, for which train.metrics are measured before and after training; 0
    measures none. Left out, it is 100 where train.metrics or train.metrics_every_steps is set."""
    metrics_every_steps: Count = 0
    """Steps between measurements of train.metrics; 0 measures only before and after training."""
    exact_match_pattern: _Pattern | None = None
    """Regular expression that extracts what is compared from the reference and from the answer: its first match, or the
    first group of that if it has groups. For GSM8K "#### (-?[0-9.,]+)". An answer without a match counts as wrong. null
    compares the whole text. Leading and trailing white space never counts."""
    exact_match_ignore: _Pattern | None = None
    """Regular expression for what is removed from both before they are compared, such as "[,$]|[.]$"."""
    exact_match_ignore_case: bool = False
    """Compare without regard to case."""
    metrics_new_tokens: Annotated[PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")] = "auto"
    """Maximum length of an answer in tokens; auto is 8 more than the longest reference. Chains of thought may need
    more."""
    metrics_choices: Annotated[
        tuple[Text, ...] | None,
        Field(strict=False),
        _at_least(2),
        Rule("null, or a list of at least two texts"),
    ] = None
    """The closed set of answers that the metric accuracy chooses from; null is the different references, at most 32."""
    trackers: Annotated[
        tuple[_Tracker, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule(f"one or a list of {', '.join(get_args(_Tracker))}"),
    ] = ()
    """Experiment trackers that also get the metrics; each must be installed."""


class Objective(Section):
    """The settings of the objectives that learn from preferences or rewards (train.objective)."""

    beta: Annotated[PositiveFloat | Literal["auto"], Rule("a number above 0, or auto")] = "auto"
    """How far the model may move from its reference: more for a lower one. Of orpo the weight of the odds ratio, of
    simpo and cpo the scale of the difference. auto is 0.1, and 2 for simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round. Of dpo, cpo and simpo."""
    gamma: NonNegativeFloat = 1.0
    """Margin by which simpo wants a chosen answer to be better than a rejected one."""
    sft_weight: Annotated[NonNegativeFloat | Literal["auto"], Rule("a number of at least 0, or auto")] = "auto"
    """Weight of the chosen answer's mean loss per token, which is added to keep it likely. auto is 1 for orpo and cpo,
    whose definition it is part of, and 0 for the others. Not of kto."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of good answers in kto: the larger where they are few."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of bad answers in kto."""
    rewards: Annotated[
        tuple[Text, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule("FILE.py:FUNCTION or MODULE:FUNCTION, or a list of them"),
    ] = ()
    """Functions of yours that judge the answers in grpo, as FILE.py:FUNCTION, the file beside the recipe, or
    MODULE:FUNCTION. A function names what it takes of completions, references and prompts, lists of texts, and returns
    a number for each completion; of several functions the numbers are added."""
    group_size: Annotated[int, Field(ge=2, strict=True)] = 8
    """Answers to each prompt in grpo, which are compared with one another."""
    max_completion_tokens: PositiveInt = 256
    """Maximum length of an answer in grpo, in tokens. group_size times prompt and answer count toward
    data.max_tokens."""
    sampling_temperature: PositiveFloat = 1.0
    """Of the distribution that answers are drawn from in grpo."""
    policy_loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """What grpo divides by: the tokens of all answers of a step (dapo), those of each answer (grpo), or
    max_completion_tokens (dr_grpo)."""
    scale_rewards: bool = True
    """Whether grpo divides what an answer is worth by the standard deviation of its group."""


class Diffusion(Section):
    """What the denoiser of task.kind image-generation learns, and which pictures show it."""

    prediction: Literal["auto", "epsilon", "v", "flow"] = "auto"
    """What the denoiser predicts: the noise (epsilon), velocity (v), or the way from picture to noise (flow matching).
    auto is what the model's scheduler says."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of timesteps in training; logit_normal has more in the middle (SD3)."""
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = "none"
    """Weight of the loss by timestep: min_snr with epsilon and v; sigma_sqrt or cosmap with flow."""
    min_snr_gamma: PositiveFloat = 5.0
    """Of weighting min_snr, the largest ratio of signal and noise that counts."""
    shift: Annotated[PositiveFloat | Literal["auto"], Rule("a number above 0, or auto")] = "auto"
    """Of prediction flow: more noise at each timestep, for larger pictures. auto is what the model's scheduler says."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of examples, drawn anew in each step, whose caption is left out, so that classifier-free guidance keeps
    working; 0.1 is usual in full fine-tuning."""
    sample_prompts: Annotated[
        tuple[str, ...],
        Field(strict=False),
        BeforeValidator(_one_name_or_many),
        Rule("a prompt, or a list of prompts"),
    ] = ()
    """Prompts (or names of classes; "" is the neutral prompt) whose pictures before and after training the report
    shows."""
    sample_steps: PositiveInt = 30
    """Steps of the scheduler for a picture."""
    guidance_scale: Annotated[float, Field(ge=1)] = 4.0
    """Scale of classifier-free guidance for pictures; 1 is none."""


class Memory(Section):
    """How memory is traded for time in training. At inference budget, tile_tokens and loss_chunk_tokens count."""

    budget: Annotated[str, AfterValidator(_size_or_auto), Rule("auto, or a size with its unit, such as 8GiB")] = "auto"
    """Maximum memory of the run; auto is what is free on the device. For the settings below that are auto, the fastest
    plan that fits is chosen, and then checked by one measured step before training starts. A plan that takes more is
    replaced; if none fits, the run ends there."""
    host_budget: Annotated[str, AfterValidator(_size_or_auto), Rule("auto, or a size with its unit, such as 24GiB")] = (
        "auto"
    )
    """Maximum host memory of training on a GPU; auto is what is free on the host, and no limit in a plan for another
    machine's GPU. (Loading a model for the first time needs its own share beforehand: all of its weights in 4 bit,
    unless they are streamed from disk; in 16 bit for a GGUF file.) On a CPU memory.budget is the only limit."""
    checkpointing: Literal["auto", "block", "selective", "none"] = "auto"
    """Activation checkpointing. block keeps each block's input and recomputes the rest in backward; selective also
    keeps the outputs of attention, where a fused kernel gives them (on a CPU block keeps them anyway, and the two are
    the same); none keeps all activations."""
    uncheckpointed_layers: Annotated[Count | Literal["auto"], Rule("a whole number of at least 0, or auto")] = "auto"
    """How many of the last layers keep all their activations although checkpointing is block or selective; auto is as
    many as fit."""
    layers_per_checkpoint: Annotated[PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")] = (
        "auto"
    )
    """Layers per checkpoint: of each group of so many layers only the first keeps its input, and backward recomputes
    the group at once. For memory.checkpointing block or selective, and weights that are not streamed. auto is 1 unless
    nothing else fits."""
    loss_chunk_tokens: Annotated[PositiveInt | Literal["auto"], Rule("a whole number of at least 1, or auto")] = "auto"
    """Target tokens whose logits exist at one time."""
    fused_loss: Literal["auto", "off"] = "auto"
    """Liger's or cut-cross-entropy's loss in place of the chunked one, on a GPU and in training only. auto tries those
    that are installed on the run's own examples and head before the first step, and takes one that is faster, needs no
    more memory and is about as accurate; none with train.deterministic. Results differ by
    rounding. No effect where train.objective learns from preferences, or with a head."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto takes fused GPU kernels where a trial on the run's own shapes before the first step finds them faster than
    plain operators and about as accurate: torch's for RMS norms, for attention over packed sequences and for capped
    scores and sinks (flex attention, compiled by Triton), Liger's where it is installed for gated MLPs (SwiGLU), and
    our own for experts in 4 bit; none with train.deterministic. plain always takes plain operators. Results differ by
    rounding. No effect on a CPU or with train.compile."""
    tile_tokens: Annotated[PositiveInt | Literal["auto", "off"], Rule("a whole number of at least 1, auto or off")] = (
        "auto"
    )
    """Tokens that go through an MLP or a norm at a time; their intermediate results are recomputed in backward, tile by
    tile."""
    embeddings: Literal["auto", "device", "host"] = "auto"
    """Where the embedding table is; from host memory only the rows of the batch are copied. With tied embeddings
    memory.head is the same."""
    head: Literal["auto", "device", "host"] = "auto"
    """Where the weight of a 16-bit head is; from host memory it is copied in slices of a few thousand tokens of the
    vocabulary, in training once per memory.loss_chunk_tokens, in exact match once per generated token."""
    offload_checkpoints: bool | Literal["auto"] = "auto"
    """Keep the blocks' inputs, and the outputs of attention that are kept, in host memory until backward; the copies
    overlap with computation."""
    offload_folder: Text | None = None
    """Folder on a fast disk for what memory.offload_checkpoints moves: unnamed files there take the place of host
    memory. The device waits during each copy; estimates of time do not count the disk, so auto takes it only where
    nothing else fits. A folder that is itself in memory, as /tmp often is, saves nothing."""
    resident_layers: Annotated[Count | Literal["auto", "all"], Rule("a whole number of at least 0, auto or all")] = (
        "auto"
    )
    """How many of the last layers keep their weights on the device; those of the others wait where memory.stream_from
    says and are copied, one layer ahead, in forward and in backward. Results are the same to the bit. With
    adapter.method full they are updated in host memory, which needs memory.optimizer_in_backward, or divided among
    several GPUs (0)."""
    stream_from: Literal["auto", "host", "disk", "ranks"] = "auto"
    """Where streamed weights wait. host is pinned memory for all of them; disk leaves 4-bit weights in the file of the
    prepared model (of a 4-bit checkpoint, in its own), of which host memory holds two layers, and more where the system
    has room; ranks divides each layer among the GPUs of this machine (of all machines, where each has one), which put
    it together when it is needed, and so does host, of several processes, in their host memory. auto is ranks where
    several processes train and one has no room for all weights, and disk only if host memory has room for no other
    plan; estimates of time assume a disk that reads 2 GB/s. If the file can no longer be read, the process ends."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is computed, so that all gradients never exist at one time.
    Clipping, gradient accumulation and skipped steps need all of them first: only with train.max_grad_norm 0,
    train.gradient_accumulation_steps 1 and train.on_not_finite stop, and never in float16."""
    cache_dequantized: bool | Literal["auto"] = "auto"
    """Dequantise the 4-bit weights of a block once for its recomputation and its backward, and those of an MLP once for
    all tiles: less work, at the cost of a block's weights in 16 bit meanwhile."""
    cache_merged: bool | Literal["auto"] = "auto"
    """Merge LoRA weights once a step with train.merge_aware, and not for each product: less work, at the cost of the
    merged codes beside the base's, half a byte for each adapted weight (q8_0: one). For weights that are not streamed.
    No effect with train.merge_aware off."""
    micro_batches: Literal["auto", "as-given"] = "auto"
    """auto may divide the sequences of a step into other micro-batches than train.micro_batch_size says; the sequences
    of a step, and the weight of each token, stay the same."""

    @property
    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, or None for auto."""
        return None if self.budget == "auto" else parse_bytes(self.budget)

    @property
    def host_budget_bytes(self) -> int | None:
        """Return the budget of host memory in bytes, or None for auto."""
        return None if self.host_budget == "auto" else parse_bytes(self.host_budget)


class Output(Section):
    """Where the results go."""

    dir: Text | None = None
    """Path of the run folder; null makes runs/NAME-TIMESTAMP."""
    name: (
        Annotated[
            str,
            AfterValidator(_file_name),
            Rule("at most 50 letters, digits, '.', '_' and '-', no '.' first"),
        ]
        | None
    ) = None
    """Name of the run; null is the recipe file's name."""


class Recipe(Section):
    """Everything a run is made from; get one from `load_recipe`, which also checks files and combinations."""

    model_config = ConfigDict(extra="allow")  # sections of tasks, methods and objectives of other distributions

    model: Model
    task: Task = Task()
    adapter: Adapter = Adapter()
    lora: Lora = Lora()
    bottleneck: Bottleneck = Bottleneck()
    prompt: Prompt = Prompt()
    data: Data
    train: Train = Train()
    objective: Objective = Objective()
    diffusion: Diffusion = Diffusion()
    memory: Memory = Memory()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def _examples_to_measure(cls, settings: object) -> object:
        """Take so many examples for metrics where these are set and nothing is said of how many."""
        if not isinstance(settings, dict) or not isinstance(train := settings.get("train"), dict):
            return settings
        is_meant = "metrics" in train or train.get("metrics_every_steps")
        return {**settings, "train": {"metrics_examples": METRICS_EXAMPLES, **train}} if is_meant else settings

    @model_validator(mode="after")
    def _nothing_but_sections(self) -> Recipe:
        if unknown := [name for name, each in (self.model_extra or {}).items() if not isinstance(each, Section)]:
            raise ValueError(f"no section is called {', '.join(unknown)}")
        return self

    def section(self, kind: type[S]) -> S:
        """Return the section that a task, a method or an objective of another distribution brings."""
        return next(each for each in (self.model_extra or {}).values() if isinstance(each, kind))

    @property
    def recipe_hash(self) -> str:
        """Return the SHA-256 (hex) of all settings that can change the result: every section but output."""
        settings = self.model_dump(mode="json", exclude={"output"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

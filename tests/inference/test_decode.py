"""A step in memory that stays makes the tokens that transformers' own loop makes, with fewer operations."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from tiny import ARCHITECTURES, DEMO_MODEL, UNUSUAL, build_tiny, quantized_pair
from tiny_files import VOCABULARY, byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.inference import decode as decoding
from qlora_lite.inference.decode import FixedSteps, decode, has_fixed_step
from qlora_lite.inference.generate import Sampling, answer, answers
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.process import CUBLAS_WORKSPACE_BYTES, GROWING_SEGMENT_BYTES
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.models.skeleton import meta_model
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.planning.answering import prompt_bytes
from qlora_lite.quant.small_batch import MAX_ROWS

PROMPTS = ["<s>a", "<s>the quick brown fox", "<s>hello", "<s>", "<s>zz top"]
NEW = 8
ROOM = 40  # more than the longest prompt with its answer
FIXED = {
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "cohere",
    "granite",
    "qwen3_moe",
    "nemotron",
    "deepseek_v3",
    "opt",
}
WINDOWED = {"mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss"}


def model_of(model_type, **changes):
    return adopt(build_tiny(model_type, vocab_size=VOCABULARY, **changes))


@pytest.fixture
def fixed(monkeypatch):
    """Answer with a fixed step here, started operation by operation; returns the rooms that were made."""
    rooms, make = [], FixedSteps._make_room

    def own(model, tokens, streamer):
        return partial(decode, streamer=streamer) if has_fixed_step(model, tokens) else None

    def make_room(self):
        make(self)
        rooms.append(self._room)

    monkeypatch.setattr(FixedSteps, "_make_room", make_room)
    monkeypatch.setattr("qlora_lite.inference.generate.decoding", own)
    return rooms


def own_loop(monkeypatch):
    monkeypatch.setattr("qlora_lite.inference.generate.decoding", lambda *_: None)


@pytest.mark.parametrize("model_type", sorted(FIXED | WINDOWED))
def test_tokens_are_those_of_the_loop_whose_cache_grows(model_type, fixed, monkeypatch):
    changes = {"sliding_window": ROOM} if model_type in WINDOWED else {}
    model, tokenizer = model_of(model_type, **changes), byte_tokenizer()
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", 3)
    found = answers(model, tokenizer, PROMPTS, NEW, stop=[2])
    assert len(fixed) == 3 and fixed[2] == fixed[1] + 1, "room for the 7 tokens that are read again, in three parts"
    own_loop(monkeypatch)
    assert found == answers(model, tokenizer, PROMPTS, NEW, stop=[2])
    assert len({each.text for each in found}) > 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_logits_are_those_of_the_whole_text_read_at_once(model_type):
    model, ids = model_of(model_type, sliding_window=ROOM), torch.randint(3, 200, (2, 20))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {
        "input_ids": ids[:, :9],
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": True,
        "cache": DynamicCache(config=model.config),
    }
    with torch.no_grad():
        model(**given)
        steps = FixedSteps(model, given, mask, 20)
        found = torch.stack([steps(token).clone() for token in ids[:, 9:].t()], 1)
        whole = [model(input_ids=row, use_cache=False).logits[0] for row in (ids[:1], ids[1:, 4:])]
    assert torch.allclose(found, torch.stack([logits[-11:] for logits in whole]), atol=1e-4)


def test_what_is_drawn_shown_and_stopped_is_what_the_loop_draws_shows_and_stops(fixed, monkeypatch):
    model, tokenizer, warm = model_of("llama"), byte_tokenizer(), Sampling(temperature=3.0, top_p=0.95, seed=7)
    found = []
    for _ in range(2):
        shown, stopping = Shown(), StoppingCriteriaList([After(7)])
        text = answer(model, tokenizer, PROMPTS[1:2], NEW, sampling=warm, streamer=shown, stopping=stopping)
        found.append((answers(model, tokenizer, PROMPTS, NEW, [2], sampling=warm), text, shown.pieces))
        own_loop(monkeypatch)
    assert fixed and found[0] == found[1]
    assert len(found[0][2]) == 1 + 7 + 1 and found[0][2][-1] == "end"


class Shown(BaseStreamer):
    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.pieces.append("end")


class After(StoppingCriteria):
    def __init__(self, tokens):
        self.left = tokens

    def __call__(self, ids, scores, **_):
        self.left -= 1
        return torch.full((len(ids),), self.left == 0)


def test_rows_with_their_own_adapters_are_answered_alike(fixed, monkeypatch):
    model, tokenizer = quantized_pair("llama", vocab_size=VOCABULARY)[0], byte_tokenizer()
    switch = add_switch(model, {name: adapter_of(model, seed) for seed, name in enumerate(("one", "two"))})
    names, found = ("one", None, "two", "one", None), []
    for _ in range(2):
        use = lambda rows: switch.use_rows([names[row] for row in rows])  # noqa: E731
        found.append(answer(model, tokenizer, PROMPTS, 6, before_batch=use))
        own_loop(monkeypatch)
    switch.use(None)
    assert fixed and found[0] == found[1] != answer(model, tokenizer, PROMPTS, 6)


def adapter_of(model, seed, rank=4, scale=0.3):
    generator, layers = torch.Generator().manual_seed(seed), {}
    for path, layer in linear_layers(model).items():
        shapes = (rank, layer.in_features), (layer.out_features, rank)
        layers[path] = Factors(*(scale * torch.randn(shape, generator=generator) for shape in shapes), 2.0 * rank)
    return Adapter(layers, 0.0)


@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, *UNUSUAL}))
def test_where_a_step_is_not_the_same_for_every_token_the_loop_runs(model_type):
    assert has_fixed_step(model_of(model_type), ROOM) == (model_type in FIXED), "windows are smaller"


def test_a_window_or_weights_on_the_host_leave_no_fixed_step():
    model = model_of("mistral", sliding_window=ROOM)
    assert has_fixed_step(model, ROOM) and not has_fixed_step(model, ROOM + 1)
    streamed = quantized_pair("llama", num_hidden_layers=4)[0]
    assert has_fixed_step(streamed, ROOM)
    assert not has_fixed_step(place(streamed, torch.device("cpu"), MemoryOptions(resident_layers=1)), ROOM)
    assert decoding.decoding(model, ROOM) is None, "on a CPU"


@pytest.mark.parametrize("fault", [None, "waits", "cannot begin", "cannot record"])
def test_a_recorded_step_or_where_it_cannot_be_recorded_each_one_gives_the_same_tokens(
    fault, fixed, monkeypatch, caplog
):
    model, tokenizer = model_of("llama"), byte_tokenizer()
    own_loop(monkeypatch)
    expected = answer(model, tokenizer, PROMPTS, 12)
    monkeypatch.undo()
    replayed = record_on_cpu(monkeypatch, fault)
    assert answer(model, tokenizer, PROMPTS, 12) == expected
    assert len(replayed) == (0 if fault else 12 - 2), "the prompt gives one token, and a step that is not recorded"
    assert [fault in text for text in caplog.messages] == [True] * bool(fault)


def record_on_cpu(monkeypatch, fault):
    """Stand in for a GPU's graphs: what is recorded changes nothing then, and is computed when it is replayed."""
    mode, replayed, recorded = [0], [], {}
    decoding._warn.cache_clear()

    class Graph:
        def replay(self):
            steps, logits = recorded[self]
            logits.copy_(steps.step())
            replayed.append(self)

    @contextmanager
    def graph(found, **_):
        if fault == "cannot begin":
            raise RuntimeError(fault)
        steps = recorded["next"]
        before = [tensor.clone() for tensor in tensors_of(steps)]
        yield
        for tensor, earlier in zip(tensors_of(steps), before, strict=True):
            tensor.copy_(earlier)
        if fault == "cannot record":
            raise RuntimeError(fault)
        recorded[found] = steps, recorded["logits"]

    def step(self):
        if fault == "waits" and mode[0] == "error":
            raise RuntimeError(fault)
        recorded["next"], recorded["logits"] = self, make(self)
        return recorded["logits"]

    make = FixedSteps.step
    monkeypatch.setattr(FixedSteps, "step", step)
    call = FixedSteps.__call__
    monkeypatch.setattr(FixedSteps, "__call__", lambda self, token: call(self, OnCard(token)))
    monkeypatch.setattr(
        "qlora_lite.inference.generate.decoding", lambda _model, _tokens, streamer: partial(decode, streamer=streamer)
    )
    for name, placeholder in {
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": nullcontext,
        "current_stream": lambda: None,
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": lambda value: mode.__setitem__(0, value),
    }.items():
        monkeypatch.setattr(torch.cuda, name, placeholder)
    return replayed


class OnCard(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_subclass(cls, tensor)


def tensors_of(steps):
    caches = [tensor for layer in steps._cache.layers for tensor in (layer.keys, layer.values)]
    return [*caches, steps._mask, steps._at, steps._inputs["position_ids"]]


SHAPE = dict(
    hidden_size=512,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
)


def skeleton(depth, adapter=True, **changes):
    config = build_tiny("llama", num_hidden_layers=depth, **SHAPE | changes).config
    model = meta_model(config, "nf4", True, torch.bfloat16).eval()
    if adapter:
        layers = {
            path: Factors(
                *(
                    torch.empty(size, dtype=torch.bfloat16, device="meta")
                    for size in ((16, layer.in_features), (layer.out_features, 16))
                ),
                32.0,
            )
            for path, layer in linear_layers(model).items()
            if "proj" in path
        }
        add_switch(model, {"one": Adapter(layers, 0.0)}).use("one")
    return model


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counter = WorkCounter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._unsafe_view.default:
            self.counter.see(func, args, kwargs or {}, result)
        return result


@torch.no_grad()
def step_work(depth, prompts, tokens=120, padded=True):
    """Return the work of a step on a GPU, behind prompts of so many tokens."""
    model, ids = skeleton(depth), torch.zeros((prompts, tokens), dtype=torch.int64, device="meta")
    given = {
        "input_ids": ids,
        "position_ids": ids,
        "attention_mask": ids.new_empty((prompts, 1, 0, 0)),
        "cache": DynamicCache(config=model.config),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    with planning_for("cuda"):
        model(**given)
        steps = FixedSteps(model, given, ids if padded else None, tokens + 20)
        steps(ids[:, 0])
        with Counter() as seen:
            steps(ids[:, 0])
    return seen.counter.work


@pytest.mark.parametrize("prompts", [1, 8, 32])
def test_a_token_takes_54_operations_a_block_however_many_prompts_there_are(prompts, monkeypatch):
    monkeypatch.setitem(MAX_ROWS, "meta", MAX_ROWS["cuda"])
    few, many = step_work(2, prompts), step_work(4, prompts)
    assert many.operations - few.operations <= 2 * 54
    assert few.operations - 2 * 54 <= 25, "outside of blocks"


@pytest.mark.parametrize("prompts", [1, 8])
def test_answers_take_the_memory_that_is_planned_for_them(prompts, fixed):
    tokens, new = 120, 6
    model, ids = quantized_pair("llama", dtype=torch.bfloat16, vocab_size=VOCABULARY, **SHAPE)[0], "x" * (tokens - new)
    ledger = Ledger(allocation_bytes=512)
    with planning_for("cuda"), torch.no_grad(), ledger:
        ledger.claim((*model.parameters(), *model.buffers()), "base weights")
        before = ledger.now().total
        answer(model, byte_tokenizer(), [ids] * prompts, new)
    planned = prompt_bytes(skeleton(2, adapter=False, vocab_size=VOCABULARY), tokens, prompts)
    planned -= GROWING_SEGMENT_BYTES + CUBLAS_WORKSPACE_BYTES
    assert fixed == [tokens - 1]
    assert 0.7 * planned < ledger.peak.total - before <= planned


@pytest.mark.gpu
@pytest.mark.real_card
@pytest.mark.parametrize("chunk", [512, 12])
@pytest.mark.parametrize("model_type", sorted(FIXED | WINDOWED))
def test_on_a_gpu_a_graph_makes_the_tokens_that_the_loop_makes(model_type, chunk, monkeypatch, caplog):
    changes = {"sliding_window": 64} if model_type in WINDOWED else {}
    model = quantized_pair(model_type, vocab_size=VOCABULARY, **changes)[0].to("cuda")
    switch = add_switch(model, {name: adapter_of(model, seed) for seed, name in enumerate(("one", "two"))})
    switch.use_rows(("one", None, "two", "one", None))
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(graph) or replay(graph))
    found = answers(model, byte_tokenizer(), PROMPTS, 36, [2])
    monkeypatch.setattr("qlora_lite.inference.generate.decoding", lambda *_: None)
    assert found == answers(model, byte_tokenizer(), PROMPTS, 36, [2])
    assert bool(replayed) != any("CUDA graph" in text for text in caplog.messages)
    assert replayed or "moe" in model_type or model_type in ("gpt_oss", "deepseek_v3"), "experts wait for the device"


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_answers_the_same(fixed, monkeypatch):
    tokenizer, model = load_tokenizer(DEMO_MODEL), load_model(DEMO_MODEL, compute_dtype=torch.float32)
    prompts = ["The capital of France is", "1 2 3 4 5", "Once upon a time, in a small village by the sea,"]
    found = answers(model, tokenizer, prompts, 24)
    own_loop(monkeypatch)
    assert fixed and found == answers(model, tokenizer, prompts, 24)

"""Vision-language models: loss and gradients are those of transformers and peft; packed as alone, planned, resumed."""

from dataclasses import replace
from itertools import product

import numpy as np
import peft
import pytest
import torch
from methods import Case, assert_as_planned, assert_gradients_of_peft, gradients, plan, with_factors
from tiny_vision_language import FAMILIES, OF_QWEN, TOKEN, WITH_GRIDS, Noise, build_vision_language, noise_rows, reader
from transformers import AutoConfig, AutoModelForImageTextToText

from qlora_lite.adapters.files import Lora, load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import Target
from qlora_lite.data.picture_grids import grids_of
from qlora_lite.data.tokens.batch import IGNORED_LABEL, Extent
from qlora_lite.errors import DataError, ModelError
from qlora_lite.ext.vision_language.chats import VisionLanguageSpec, picture_chat_lm
from qlora_lite.kernels import encoder_attention
from qlora_lite.models import vision_language
from qlora_lite.models.load import load_model, use_row_attention
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.packing import run_unpacked, why_unpacked
from qlora_lite.models.skeleton import meta_model, read_part
from qlora_lite.models.vision_language import FAMILIES as FAMILIES_HERE
from qlora_lite.models.vision_language import arguments_of
from qlora_lite.planning.simulate import Job, simulate, simulate_whole
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import target_losses
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import accumulate_gradients

CPU = torch.device("cpu")
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32)
# the language model alone; the tower's attention too; the projector too
TARGETS = {"language": (Target("all-linear"),), "both": (Target("all-linear"), Target("*vis*.0.*.q*"))}
METHODS = {name: replace(METHOD, targets=targets) for name, targets in TARGETS.items()}
METHODS["projector"] = replace(METHOD, also=("projector",))
NO_PROJECTOR = {
    "gemma3": r"has a weight of its own form .mm_input_projection_weight., which ad",
    **dict.fromkeys(OF_QWEN, r"adapter.train_also projector: Qwen\w*ForConditionalGeneration has none; leave it"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build_vision_language(name).save_pretrained(folder / name)
    return {name: folder / name for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def loaded(folder, quant="none"):
    return load_model(folder, quant, compute_dtype=torch.float32, use_cache=False, with_vision=True)


def workload(folder, family, quant="none", targets="language"):
    spec = VisionLanguageSpec(read_part(str(folder), with_vision=True).config, quant, compute_dtype=torch.float32)
    return picture_chat_lm(METHODS[targets], reader(family), spec)


def adapted(work, model):
    torch.manual_seed(0)
    work.method.apply(model)
    return as_checked(with_factors(model))


def as_checked(model):
    """Run rows one by one where they cannot be packed, as the check before training has it."""
    if why_unpacked(model, 0):
        run_unpacked(model)
    return model


def by_transformers(work, model, examples):
    """The summed loss of rows that transformers' own forward computes one by one."""
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example.token_ids).long()[None]
        labels = torch.where(torch.from_numpy(example.is_target), ids[0], -100)[1:]
        pixels = work.batches.reader.of_examples([example])
        grids = grids_of(example.pictures)
        shown = {} if pixels is None else arguments_of(model, torch.from_numpy(pixels), ids, grids)
        logits = model(input_ids=ids, **shown).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("targets", METHODS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(folders, family, targets, tmp_path):
    work, rows = workload(folders[family], family, targets=targets), noise_rows(family)
    if targets == "projector" and family in NO_PROJECTOR:
        with pytest.raises(ModelError, match=NO_PROJECTOR[family]):
            adapted(work, loaded(folders[family]))
        return
    model = adapted(work, loaded(folders[family]))
    save_adapter(model, tmp_path / "adapter", folders[family], method=work.method)
    batch = work.batches.inputs(work.batches.collate(rows), CPU)
    ours = accumulate_gradients(work, model, [batch]).loss.item() * work.objective.weight(batch)

    base = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    loss = by_transformers(work, theirs.base_model.model, rows)
    loss.backward()
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    mine = gradients(work.method, model)
    assert_gradients_of_peft(mine, theirs, work.objective.weight(batch))
    assert any(f"{FAMILIES_HERE[family].tower}." in name for name in mine) == (targets == "both")
    between = "multi_modal_projector", "connector", "embed_vision"
    assert any(part in name for part in between for name in mine) == (targets == "projector")


@torch.no_grad()
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_packed_rows_have_the_losses_that_they_have_alone(folders, family, quant):
    work, rows = workload(folders[family], family, quant), noise_rows(family)
    model = adapted(work, loaded(folders[family], quant))
    packed = target_losses(work, model, work.batches.inputs(work.batches.collate(rows), CPU))
    alone = [target_losses(work, model, work.batches.inputs(work.batches.collate([row]), CPU)) for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    shown = work.batches.inputs(work.batches.collate(rows[:1]), CPU)
    other = shown._replace(pixels=torch.zeros_like(shown.pixels))
    assert not torch.allclose(target_losses(work, model, shown), target_losses(work, model, other), rtol=1e-3)


def test_tokens_of_pictures_are_no_targets(folders, family):
    work, rows = workload(folders[family], family), noise_rows(family)
    everything = [replace(row, is_target=row.token_ids != 1) for row in rows]
    batch = work.batches.collate(everything)
    taught = batch.labels[batch.labels != IGNORED_LABEL]
    assert TOKEN not in taught and len(taught) == sum(int((row.token_ids != TOKEN).sum()) - 1 for row in rows)
    gone = replace(rows[0], pictures=())
    with pytest.raises(DataError, match="the pictures of row 0 are 0 tokens, and the rows have"):
        work.batches.collate([gone])


def case(folder, family, **how):
    work, quant = workload(folder, family, **how), how.get("quant", "none")
    changes = {"max_tokens": 80, "packing": True, "micro_batch_size": 1}
    return Case(work, lambda: loaded(folder, quant), noise_rows(family, ((1,), (), (2, 1), (1,), (), (1, 1))), changes)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("llava", {}, marks=pytest.mark.slow),
        ("idefics3", {"quant": "nf4"}),
        ("smolvlm", {"targets": "both"}),
        ("llava", {"targets": "projector", "quant": "nf4"}),
        pytest.param("gemma3", {}, marks=pytest.mark.slow),
        ("gemma3", {"quant": "nf4", "targets": "both"}),
        pytest.param("qwen2_vl", {}, marks=pytest.mark.slow),
        ("qwen2_5_vl", {"quant": "nf4", "targets": "both"}),
        pytest.param("qwen3_vl", {}, marks=pytest.mark.slow),
        ("qwen3_vl", {"quant": "nf4", "targets": "both"}),
        pytest.param("qwen3_vl_moe", {"quant": "nf4"}, marks=pytest.mark.slow),
        pytest.param("mistral3", {}, marks=pytest.mark.slow),
        ("mistral3", {"quant": "nf4", "targets": "both"}),
        pytest.param("gemma4", {}, marks=pytest.mark.slow),
        ("gemma4", {"quant": "nf4", "targets": "both"}),
        pytest.param("qwen3_5", {}, marks=pytest.mark.slow),
        ("qwen3_5_moe", {"quant": "nf4", "targets": "both"}),
    ],
)
def test_the_plan_is_the_ledger_s_peak_whatever_the_memory_options(folders, name, how):
    one = case(folders[name], name, **how)
    assert_as_planned(one, plan(one, 2**40))


def test_a_plan_counts_what_the_tower_takes(folders):
    work = workload(folders["smolvlm"], "smolvlm", targets="both")
    job = Job(work, BatchShape((200,), 40, (0,)), None, optimizer="adamw_torch")
    one, many = (
        simulate(replace(job, shape=replace(job.shape, pictures=tuple(range(0, 4 * count, 4))))).peak().total
        for count in (1, 30)
    )
    pixels = 29 * 3 * 32 * 32 * 4
    assert many - one > 5 * pixels
    frozen = replace(job, workload=workload(folders["smolvlm"], "smolvlm"))
    one, many = (
        simulate(replace(frozen, shape=replace(job.shape, pictures=tuple(range(0, 4 * count, 4))))).peak().total
        for count in (4, 30)
    )
    assert many - one < 1.5 * 26 * 3 * 32 * 32 * 4


OPTIONS = MemoryOptions(), MemoryOptions(layers_per_checkpoint=3), MemoryOptions(uncheckpointed_layers=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [*product(("smolvlm",), OPTIONS), ("qwen3_vl", OPTIONS[1]), ("qwen3_5", OPTIONS[0]), ("gemma4", OPTIONS[2])],
)
def test_a_deep_model_is_planned_from_two_shallow_ones(folders, name, options):
    config = AutoConfig.from_pretrained(folders[name])
    if name == "gemma4":
        text = {"num_hidden_layers": 14, "layer_types": ["sliding_attention", "full_attention"] * 7}
        config = AutoConfig.for_model(name, **FAMILIES[name] | {"text_config": FAMILIES[name]["text_config"] | text})
    else:
        config.text_config.num_hidden_layers = 13
    config.vision_config.num_hidden_layers = 5
    if name == "qwen3_5":
        config.text_config.layer_types = ["linear_attention", *["full_attention", "linear_attention"] * 6]
    spec = VisionLanguageSpec(config, "nf4", compute_dtype=torch.float32)
    work = picture_chat_lm(METHODS["both"], reader(name), spec)
    shape = BatchShape((60, 40), 40, (3, 9, 15, 40, 62, 80))
    if name in WITH_GRIDS:
        shape = replace(shape, grids=((2, 3), (1, 5), (4, 1), (2, 2), (3, 3), (1, 2)))
    if name == "qwen3_vl":
        config.vision_config.deepstack_visual_indexes = [0, 1, 3]
    job = Job(work, shape, None, optimizer="adamw_torch", options=options)
    found, whole = simulate(job), simulate_whole(job)
    assert found.peak().total == whole.peak().total and found.work.operations == whole.work.operations


@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl", "qwen3_5", "mistral3", "gemma4"])
def test_killed_and_resumed_it_goes_on_to_the_bit(folders, name, tmp_path):
    one = case(folders[name], name, targets="both")
    whole = one.trainer()
    steps = list(whole)
    first = one.trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    torch.manual_seed(1)
    resumed = one.trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("targets", ["both", "projector"])
def test_a_saved_adapter_gives_the_same_losses_again(folders, family, targets, tmp_path):
    work, rows = workload(folders[family], family, targets=targets), noise_rows(family)
    if targets == "projector" and family in NO_PROJECTOR:
        pytest.skip("it is refused")
    model = adapted(work, loaded(folders[family]))
    save_adapter(model, tmp_path / "adapter", "base", method=work.method)
    again = as_checked(load_adapter(loaded(folders[family]), tmp_path / "adapter"))
    batch = work.batches.inputs(work.batches.collate(rows), CPU)
    assert torch.equal(target_losses(work, model, batch), target_losses(work, again, batch))


@pytest.mark.parametrize("name", OF_QWEN)
def test_positions_are_those_of_transformers_for_each_row(folders, name):
    work, model = workload(folders[name], name), loaded(folders[name])
    rows = noise_rows(name, ((1,), (), (2, 1), (1, 2, 2), (2,)))
    inputs = work.batches.inputs(work.batches.collate(rows), CPU)
    packed = inputs.position_ids[:, :, : sum(inputs.row_lengths)].split(inputs.row_lengths, dim=2)
    for row, found in zip(rows, packed, strict=True):
        ids = torch.from_numpy(row.token_ids).long()[None]
        grids = torch.tensor([(1, 2 * height, 2 * width) for height, width in grids_of(row.pictures)])
        expected, _ = model.base_model.get_rope_index(ids, (ids == TOKEN).int(), grids if len(grids) else None)
        assert torch.equal(found, expected)
    alone = work.batches.inputs(work.batches.collate(rows[1:2]), CPU)
    assert torch.equal(alone.position_ids[0, : len(rows[1].token_ids)], torch.arange(len(rows[1].token_ids)))


def test_windows_are_those_of_transformers_and_attended_to_in_a_few_calls(monkeypatch):
    settings = FAMILIES["qwen2_5_vl"]
    settings = settings | {"vision_config": settings["vision_config"] | {"depth": 3, "window_size": 64}}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_vl", **settings)).requires_grad_(
        False
    )
    grids, calls, attend = ((9, 14), (8, 8), (1, 3)), [], encoder_attention.fused_attention
    pixels = torch.randn(126 + 64 + 3, 4, 384, requires_grad=True)

    def with_gradient(found):
        return found, *torch.autograd.grad((found * torch.arange(64)).sum(), pixels)

    use_row_attention(model)
    monkeypatch.setattr(encoder_attention, "fused_attention", lambda *how: (calls.append(how), attend(*how))[1])
    ours = with_gradient(*vision_language.picture_tokens(model, pixels, grids))
    assert len(calls) == 2 * 2 + 3  # two blocks with windows of two sizes, and one that sees each picture whole
    model.set_attn_implementation("sdpa")
    shown = {"image_grid_thw": torch.tensor([(1, 2 * height, 2 * width) for height, width in grids])}
    theirs = torch.cat(model.base_model.get_image_features(pixels.flatten(0, 1), **shown).pooler_output)
    for found, expected in zip(ours, with_gradient(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_frozen_tower_takes_pictures_that_keep_their_shapes_as_many_as_it_computes_at_a_time(folders):
    peaks = []
    for each in (((8, 8),) * 64, ((32, 32),) * 4, ((64, 64),)):
        size = each[0][0] ** 2
        shape = BatchShape((4200,), 40, tuple(range(0, 4096, size)), each)
        job = Job(workload(folders["qwen3_vl"], "qwen3_vl"), shape, None, optimizer="adamw_torch")
        peaks.append(max(m.total for (_, at), m in simulate(job).moments.items() if at.startswith("model.visual")))
    assert 0.9 * peaks[1] < peaks[0] <= peaks[1] < 0.8 * peaks[2]


def test_a_made_up_batch_has_pictures_that_need_as_much_as_any(folders):
    work, rows = workload(folders["qwen3_vl"], "qwen3_vl"), noise_rows("qwen3_vl", ((1, 1), (2,), ()))
    assert work.batches.picture_counts(rows).tolist() == [[12, 6], [4, 4], [0, 0]]
    long = [replace(rows[0], token_ids=np.full(3000, 9, np.int32), is_target=np.arange(3000) > 2990)]
    for largest, grids in ((6, ((1, 1024), (1, 976))), (1500, ((1, 1500), (1, 500)))):
        batch = work.batches.collate(work.batches.enlarged(long, Extent(3000, 1, 3000, 9, 2000, largest)))
        assert batch.grids == grids and batch.pixels.shape == (2000, 4, 3 * 2 * 8 * 8)
    same = Extent(sum(len(row.token_ids) for row in rows), 3, max(len(row.token_ids) for row in rows), 18, 16, 6)
    assert work.batches.collate(work.batches.enlarged(rows, same)).grids == ((1, 16),)
    assert work.batches.full_pack(5000, packing=False).grids == ((1, 5000),)
    smaller = replace(work.batches, reader=replace(work.batches.reader, longest_edge=640))
    assert smaller.full_pack(5000, packing=False).grids == ((1, 1600),) * 3 + ((1, 200),)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_a_llava_s_pictures_have_so_many_tokens_whatever_its_tower(tower, strategy):
    settings = FAMILIES["llava"] | {"vision_feature_select_strategy": strategy}
    settings["vision_config"] = settings["vision_config"] | {"model_type": tower}
    config = AutoConfig.for_model("llava", **settings)
    model = meta_model(config, "none", False, torch.float32)
    (found,) = vision_language.picture_tokens(model, torch.zeros(3, 3, 32, 32, device="meta"))
    assert len(found) == 3 * FAMILIES_HERE["llava"].tokens(config)
    config.vision_config.model_type = "pixtral"
    with pytest.raises(
        ModelError, match="a llava with a vision tower of the type pixtral cannot be trained on pictures"
    ):
        vision_language.check_family(config)


def test_models_of_other_families_are_refused_with_a_reason(tmp_path):
    AutoConfig.for_model("aya_vision").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="of the type aya_vision cannot be trained on pictures in chats; choose a mod"):
        read_part(str(tmp_path), with_vision=True)


def test_the_next_step_s_pictures_are_made_while_this_one_computes(folders, monkeypatch):
    one = case(folders["llava"], "llava")
    made, pixels_of = [], Noise._pixels_of
    monkeypatch.setattr(Noise, "_pixels_of", lambda self, picture: (made.append(picture), pixels_of(self, picture))[1])
    work, rows = one.workload, [row for row in one.examples if row.pictures]
    count = sum(len(row.pictures) for row in rows)
    work.batches.expect(rows, 0, 1)
    first = work.batches.collate(rows).pixels
    assert len(made) == count
    work.batches.expect((), 0, 2)
    assert torch.equal(work.batches.collate(rows).pixels, first) and len(made) == 2 * count


@pytest.mark.parametrize("targets", ["both", "projector"])
def test_a_step_without_a_picture_leaves_the_tower_as_it_is(folders, targets):
    one = case(folders["smolvlm"], "smolvlm", targets=targets)
    rows = noise_rows("smolvlm", ((), (), (1,), ()))
    changes = one.changes | {"packing": False, "order": "as-is", "gradient_accumulation_steps": 1}
    trainer = replace(one, examples=rows, changes=changes).trainer()
    own = {name: p for name, p in trainer.workload.method.parameters(trainer.model) if "vis" in name or "conn" in name}
    before = {name: p.detach().clone() for name, p in own.items()}
    steps = iter(trainer)
    next(steps), next(steps)
    assert own and all(torch.equal(p, before[name]) for name, p in own.items())
    next(steps)
    assert not all(torch.equal(p, before[name]) for name, p in own.items())


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "qwen3_5"])
def test_a_model_that_computes_pictures_otherwise_is_not_trained(folders, name, monkeypatch):
    one = case(folders[name], name)
    family = FAMILIES_HERE[name]

    def changed(*given):  # of features that are added behind blocks the last alone
        *others, last = family.features(*given)
        return *others, 1.05 * last

    monkeypatch.setattr(vision_language, "FAMILIES", {name: replace(family, features=changed)})
    with pytest.raises(ModelError, match="rows trained here give other logits than the model itself gives"):
        one.trainer()

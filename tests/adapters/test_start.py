"""How ``lora.start`` splits weights between a base and its LoRA weights, and that a run knows its own base again."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_files import MERGES, byte_tokenizer, save_tiny, write_recipe
from tiny_runs import logits, make_run, run_whole_and_stopped
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.files import load_adapter, save_adapter
from qlora_lite.adapters.lora import start as start_module
from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.adapters.lora.start import FIRST_NAME, Start, base_of, take_first
from qlora_lite.artifacts.trained_run import adapter_to_begin_with, open_model, open_trained
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.files import cache_root
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.compare import compare_runs
from qlora_lite.inference.multi_adapter import open_tasks
from qlora_lite.models.load import load_model
from qlora_lite.models.locate import locate
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.quantizer import InFiles, quantize_in_place
from qlora_lite.models.save import save_quantized
from qlora_lite.models.weights import first_lora_weights
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.method import build_method
from qlora_lite.prepare.model import build_model, build_skeleton, build_to_use, fingerprint
from qlora_lite.prepare.ranks import plan_run
from qlora_lite.prepare.start import resolve_start, without_start
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.nf4 import dequantize, quantize
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
RANK, SCALE = 4, 2.0
KINDS = ("loftq", "pissa", "olora")


def start(kind, **options):
    return Start(kind, **{"rank": RANK, "alpha": RANK * SCALE, "dtype": torch.float32} | options)


def lora(kind, **options):
    return {"rank": RANK, "alpha": RANK * SCALE, "dtype": "float32", "start": kind} | options


def a_weight(rows=96, columns=64, seed=0):
    """A weight whose singular values fall, as those of a model do."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * s / torch.arange(1, len(s) + 1)) @ v * 0.1).float()


def stored(packed, weight):
    return dequantize(packed, weight.shape, torch.float32)


def best_of_rank(matrix, rank):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("kind", KINDS)
def test_where_there_is_nothing_to_begin_with_lora_weights_are_new_ones(kind):
    weight = torch.zeros(24, 32)
    if kind == "loftq":  # which 4 bits hold
        weight = dequantize(quantize(torch.randn(24, 32), "nf4", False), weight.shape, torch.float32, "nf4")
    lora_a, lora_b, left = start(kind).split(weight, RANK, SCALE, "nf4", False)
    assert lora_a.any(dim=1).all() and not lora_b.any(), "of two zeros neither has a gradient"
    assert torch.equal(dequantize(left, weight.shape, torch.float32, "nf4"), weight)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_and_the_lora_weights_make_the_whole_weight(kind, dtype):
    weight = a_weight()
    lora_a, lora_b, left = start(kind, dtype=dtype).split(weight, RANK, SCALE)
    assert (lora_a.dtype, lora_a.shape, lora_b.shape) == (dtype, (RANK, 64), (96, RANK))
    whole = left.double() + SCALE * lora_b.double() @ lora_a.double()
    assert (whole - weight).abs().max() < 1e-6


def test_pissa_takes_the_largest_singular_vectors_and_balances_them():
    weight = a_weight()
    lora_a, lora_b, left = start("pissa").split(weight, RANK, SCALE)
    best = best_of_rank(weight, RANK)
    assert (SCALE * lora_b @ lora_a - best).norm() < 0.02 * best.norm()
    assert torch.linalg.matrix_norm(left, 2) < 1.02 * torch.linalg.svdvals(weight)[RANK]
    assert torch.allclose(lora_a @ lora_a.t(), lora_b.t() @ lora_b, atol=1e-5)
    packed = start("pissa").split(weight, RANK, SCALE, "nf4").left
    error = stored(packed, weight) + SCALE * lora_b @ lora_a - weight
    assert torch.linalg.matrix_norm(error, "nuc") < 0.9 * torch.linalg.matrix_norm(
        stored(quantize(weight), weight) - weight, "nuc"
    )


def test_olora_takes_the_first_columns_of_an_orthonormal_basis():
    weight = a_weight()
    lora_a, lora_b, _ = start("olora").split(weight, RANK, SCALE)
    q, r = torch.linalg.qr(weight)
    assert torch.allclose(lora_b.t() @ lora_b, torch.eye(RANK), atol=1e-5)
    assert torch.allclose(SCALE * lora_b @ lora_a, q[:, :RANK] @ r[:RANK], atol=1e-5)


def test_one_alternation_of_loftq_is_nf4_and_begins_with_its_error():
    weight = a_weight()
    lora_a, lora_b, packed = start("loftq", alternations=1).split(weight, RANK, SCALE, "nf4")
    assert all(torch.equal(own, plain) for own, plain in zip(packed, quantize(weight), strict=True))
    error = weight - stored(packed, weight)
    best = (error - best_of_rank(error, RANK)).norm()
    assert (error - SCALE * lora_b @ lora_a).norm() < 1.05 * best


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_alternation_of_loftq_comes_nearer_to_the_weight(quant_type, double_quant):
    weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(0)) * 0.05

    def error(alternations):
        split = start("loftq", alternations=alternations).split(weight, 16, SCALE, quant_type, double_quant)
        assert (split.left.absmax_code is not None) == double_quant
        here = dequantize(split.left, weight.shape, torch.float32, quant_type)
        return (weight - here - SCALE * split.lora_b @ split.lora_a).norm().item()

    plain = (weight - dequantize(quantize(weight, quant_type), weight.shape, torch.float32, quant_type)).norm().item()
    errors = [plain, *map(error, (1, 2, 5))]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.85 * errors[0]


def test_alternations_of_loftq_are_those_of_the_paper_with_whole_decompositions():
    weight = a_weight()
    update = torch.zeros_like(weight)
    for _ in range(5):
        rest = weight - stored(quantize(weight - update), weight)
        update = best_of_rank(rest, RANK).float()
    wanted = (rest - update).norm()
    lora_a, lora_b, packed = start("loftq").split(weight, RANK, SCALE, "nf4")
    assert (weight - stored(packed, weight) - SCALE * lora_b @ lora_a).norm() < 1.03 * wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_beyond_the_weight_is_filled_up_with_zeros(kind):
    weight = a_weight(64, 8)
    lora_a, lora_b, packed = start(kind).split(weight, 12, SCALE, "nf4")
    assert (lora_a.shape, lora_b.shape) == ((12, 8), (64, 12))
    assert not lora_a[8:].any() and not lora_b[:, 8:].any()
    assert (stored(packed, weight) + SCALE * lora_b @ lora_a - weight).norm() < 0.2 * weight.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_weight_is_a_clear_error(kind):
    weight = a_weight()
    weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        start(kind).split(weight, RANK, SCALE, "nf4")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_split_on_arrival_as_in_place_and_come_back_from_the_cache(kind, model_type, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", model_type)
    how = {"start": start(kind), "compute_dtype": torch.float32}
    arrived, cached = (load_model(str(tmp_path / "model"), "nf4", **how) for _ in range(2))
    in_place = load_model(str(tmp_path / "model"), "none", compute_dtype=torch.float32)
    first = quantize_in_place(in_place, "nf4", True, start=start(kind))
    plain = load_model(str(tmp_path / "model"), "nf4", compute_dtype=torch.float32)
    assert base_of(arrived) == base_of(cached) and base_of(arrived).startswith(f"{kind}:") and not base_of(plain)
    models = {
        name: dict(model.named_buffers())
        for name, model in {"arrived": arrived, "cached": cached, "place": in_place, "plain": plain}.items()
    }
    codes = [name for name in models["arrived"] if name.endswith("absmax")]
    for name in codes:
        assert torch.equal(models["arrived"][name], models["cached"][name])
        assert torch.equal(models["arrived"][name], models["place"][name])
    assert any(not torch.equal(models["arrived"][name], models["plain"][name]) for name in codes)
    firsts = [take_first(model) for model in (arrived, cached)]
    for other in firsts:
        assert other.keys() == first.keys() and first
        assert all(torch.equal(a, b) for path in first for a, b in zip(first[path], other[path], strict=True))
    assert take_first(arrived) == {}


def test_a_cache_entry_without_its_first_weights_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model")
    for quant, kind in (("nf4", "loftq"), ("none", "pissa")):
        how = {"start": start(kind), "compute_dtype": torch.float32}
        before = load_model(str(tmp_path / "model"), quant, **how)
        for file in cache_root().rglob(FIRST_NAME):
            file.write_bytes(b"damaged")
        again = load_model(str(tmp_path / "model"), quant, **how)
        assert torch.equal(logits(before), logits(again)) and take_first(before).keys() == take_first(again).keys()


def recipe_of(tmp_path, kind, overrides=(), model="model", **options):
    (tmp_path / "at").mkdir(exist_ok=True)
    if not (tmp_path / model).exists():
        save_tiny(tmp_path / model)
    return load_recipe(write_recipe(tmp_path / "at", tmp_path / model, lora=lora(kind, **options)), overrides)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_16_bit_model_begins_where_it_was(kind, method, tmp_path):
    recipe = recipe_of(tmp_path, kind, ["model.quant=none", f"adapter.method={method}"])
    for model in (build_model(recipe), build_model(recipe)):  # the second one from the cache
        assert any(layer.lora_B.any() for _, layer in lora_layers(model))
        assert torch.allclose(logits(model), logits(build_to_use(recipe)), atol=2e-5)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for path, layer in lora_layers(model):
        if method == "lora":
            whole = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
            assert (whole - original.get_submodule(path).weight).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loftq_begins_nearer_to_the_16_bit_model_than_nf4(method, tmp_path):
    recipe = recipe_of(tmp_path, "loftq", [f"adapter.method={method}", "lora.rank=16", "lora.alpha=32"])
    original = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    gap, own = ((logits(model) - original).norm() for model in (build_to_use(recipe), build_model(recipe)))
    assert own < 0.6 * gap


def test_no_alternation_is_exactly_nf4(tmp_path):
    recipe = recipe_of(tmp_path, "loftq", start_alternations=0)
    model, plain = build_model(recipe), build_model(recipe_of(tmp_path, "kaiming"))
    assert torch.equal(logits(model), logits(plain)) and base_of(model) is None
    for (path, one), (_, other) in zip(lora_layers(model), lora_layers(plain), strict=True):
        assert torch.equal(one.lora_A, other.lora_A) and not one.lora_B.any(), path


def test_ranks_and_layers_are_those_of_the_targets(tmp_path):
    targets = [{"pattern": "q_proj", "rank": 2}, {"pattern": "*.1.mlp.*", "alpha": 16}]
    model = build_model(recipe_of(tmp_path, "pissa", targets=targets))
    plain = build_to_use(recipe_of(tmp_path, "pissa", targets=targets))
    layers = dict(lora_layers(model))
    assert {layer.rank for name, layer in layers.items() if name.endswith("q_proj")} == {2}
    for path, module in plain.named_modules():
        if isinstance(module, QuantLinear):
            own = getattr(model.get_submodule(path), "base", model.get_submodule(path))
            assert torch.equal(own.weight, module.weight) == (path not in layers), path


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_stay_in_16_bit_begin_as_without_a_start(kind, tmp_path):
    recipe = recipe_of(tmp_path, kind, ["model.keep_16bit=[v_proj]"])
    model, cached = build_model(recipe), build_model(recipe)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for path, layer in lora_layers(model):
        assert layer.lora_B.any() == (not path.endswith("v_proj")) == isinstance(layer.base, QuantLinear), path
        if path.endswith("v_proj"):
            assert torch.equal(layer.base.weight, original.get_submodule(path).weight)
    assert torch.equal(logits(model), logits(cached))
    assert base_of(model) == base_of(build_skeleton(recipe)) != base_of(build_model(recipe_of(tmp_path, kind)))


def test_a_start_does_not_depend_on_the_seed_of_the_training(tmp_path):
    one, other = (build_model(recipe_of(tmp_path, "loftq", [f"train.seed={seed}"])) for seed in (1, 2))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(offload_checkpoints=True, resident_layers=0),
        MemoryOptions(resident_layers=1, stream_from="disk"),
    ],
    ids=["host", "disk"],
)
def test_streamed_weights_are_split_as_resident_ones_are(options, tmp_path):
    recipe = recipe_of(tmp_path, "loftq")
    streamed, resident = build_model(recipe, options), build_model(recipe)
    assert options.places_weights and base_of(streamed) == base_of(resident)
    for (path, one), (_, other) in zip(lora_layers(streamed), lora_layers(resident), strict=True):
        assert torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B), path
    assert torch.equal(logits(streamed), logits(resident))


def test_a_16_bit_model_that_is_split_stays_on_the_disk_where_memory_has_no_room(tmp_path, monkeypatch):
    put, own = [], InFiles.put
    monkeypatch.setattr(InFiles, "put", lambda self, tensor: put.append(own(self, tensor)) or put[-1])
    save_tiny(tmp_path / "model", "gpt2")
    how = {"start": start("pissa"), "compute_dtype": torch.float32}
    in_files, in_memory = (load_model(str(tmp_path / "model"), "none", in_files=on, **how) for on in (True, False))
    inside = {tensor.data_ptr() for tensor in put}
    assert inside == {in_files.get_submodule(path).weight.data_ptr() for path in how["start"].ranks(in_files)}
    assert torch.equal(logits(in_files), logits(in_memory))


def test_an_adapter_that_did_not_learn_is_known_by_its_first_weights(tmp_path):
    recipe = recipe_of(tmp_path, "loftq")
    model = build_model(recipe)
    method = build_method(recipe)
    assert method.does_nothing(model)
    with torch.no_grad():
        next(lora_layers(model))[1].lora_B[0, 0] += 1
    assert not method.does_nothing(model)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.quant=none", "lora.start=loftq"], "lora.start = loftq: begins with the error of 4 bits"),
        (["model.quant=keep", "lora.start=pissa"], "needs 16-bit weights, and quant keep has none"),
        (["lora.start=pissa", "lora.start_alternations=3"], "lora.start_alternations: only with lora.start loftq"),
        (
            ["lora.start=pissa", "adapter.method=prompt", "train.learning_rate=0.1"],
            "lora.start: only with adapter.meth",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, text, tmp_path):
    save_tiny(tmp_path / "model")
    path = write_recipe(tmp_path, tmp_path / "model")
    with pytest.raises(RecipeError, match=text):
        load_recipe(path, overrides)


def test_a_model_whose_files_are_in_4_bit_is_refused_before_and_when_it_is_loaded(tmp_path):
    save_tiny(tmp_path / "plain", intermediate_size=128)
    save_quantized(
        load_model(str(tmp_path / "plain"), "nf4", compute_dtype=torch.float32), tmp_path / "packed", byte_tokenizer()
    )
    recipe = recipe_of(tmp_path, "pissa", model="packed")
    for refused in (lambda: plan_of(recipe), lambda: build_model(recipe)):
        with pytest.raises(ModelError, match=r"lora.start pissa needs the 16-bit weights.* have them in nf4"):
            refused()
    of_none = recipe_of(tmp_path, "loftq", model="packed", start_alternations=0)
    assert plan_of(of_none).chosen and not base_of(build_model(of_none)), "which is no start"


def test_experts_are_refused_before_and_when_the_model_is_loaded(tmp_path):
    save_tiny(tmp_path / "moe", "qwen3_moe")
    recipe = recipe_of(tmp_path, "olora", model="moe", targets=["all-linear", "experts"])
    for refused in (lambda: plan_of(recipe), lambda: build_model(recipe)):
        with pytest.raises(ModelError, match=r"lora.start olora is for linear layers, and lora.targets name experts"):
            refused()
    assert base_of(build_model(recipe_of(tmp_path, "olora", model="moe")))


def plan_of(recipe):
    return plan_run(recipe, build_data(recipe, byte_tokenizer()).examples, ())[0]


def test_a_start_changes_nothing_of_what_a_step_takes(tmp_path):
    plain, split = (plan_of(recipe_of(tmp_path, kind)) for kind in ("kaiming", "loftq"))
    taken = [found.peak_bytes - found.machine.base_bytes for found in (plain, split)]
    assert taken[0] == taken[1] and split.chosen.settings == plain.chosen.settings


def test_a_step_that_is_measured_on_real_tensors_needs_no_weights_that_were_split(tmp_path):
    job = plan_of(recipe_of(tmp_path, "loftq")).chosen.prediction.job
    sizes = [
        {
            name: (p.shape, p.requires_grad)
            for name, p in job.workload.spec.planned_model(
                job.workload.method, torch.device(device), job.options, job.shape
            ).named_parameters()
        }
        for device in ("meta", "cpu")
    ]
    assert sizes[0] == sizes[1] and any(trains for _, trains in sizes[0].values())


@pytest.fixture(scope="module", params=["loftq-nf4", "pissa-none"])
def trained(request, tmp_path_factory):
    """A folder with a model, and a run of it that began with a start and was resumed after it was stopped."""
    folder, (kind, quant) = tmp_path_factory.mktemp("trained"), request.param.split("-")
    overrides = [f"model.quant={quant}", "train.learning_rate=0.003", "train.save_every_steps=2"]
    if quant == "nf4":
        overrides.append("model.keep_16bit=[v_proj]")
    recipe = recipe_of(folder, kind, overrides)
    whole = run_whole_and_stopped(recipe, folder)
    return folder, whole, run_recipe(recipe, None, "")


def test_a_resumed_run_ends_as_one_that_was_never_stopped(trained):
    _, whole, resumed = trained
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert one and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, resumed)]
    assert summaries[0]["eval_loss_after"] == summaries[1]["eval_loss_after"] < summaries[0]["eval_loss_before"]
    assert summaries[0]["base_fingerprint"] == summaries[1]["base_fingerprint"]


@pytest.mark.parametrize("is_cached", [True, False])
def test_an_export_finds_the_first_lora_weights_in_the_cache_or_splits_one_weight_at_a_time(
    trained, is_cached, tmp_path, monkeypatch
):
    _, run, _ = trained
    opened = open_trained(run)
    m = opened.recipe.model
    kept = {"keep_16bit": m.keep_16bit, "start": resolve_start(opened.recipe)}
    wanted = take_first(load_model(m.path, m.quant, compute_dtype=opened.compute_dtype, **kept))
    split, own = [], Start.split
    monkeypatch.setattr(Start, "split", lambda self, weight, *how: split.append(1) or own(self, weight, *how))
    monkeypatch.setattr("qlora_lite.models.load.model_of", None)
    if not is_cached:
        monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    found = first_lora_weights(opened.files, kept["start"], m.quant, True, opened.compute_dtype, m.keep_16bit)
    assert len(split) == (0 if is_cached else len(wanted)) and found.keys() == wanted.keys()
    assert all(torch.equal(a, b) for path in wanted for a, b in zip(wanted[path], found[path], strict=True))


@pytest.mark.parametrize(("quant", "kind"), [("nf4", "loftq"), ("none", "pissa")])
def test_weights_that_are_stored_transposed_are_split_one_at_a_time_too(quant, kind, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "gpt2")
    how = {"start": start(kind), "compute_dtype": torch.float32, "use_cache": False}
    wanted = take_first(load_model(str(tmp_path / "model"), quant, **how))
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    found = first_lora_weights(locate(str(tmp_path / "model")), start(kind), quant, True, torch.float32)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(a, b) for path in wanted for a, b in zip(wanted[path], found[path], strict=True))


def test_an_export_splits_no_weight_again(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", merges=MERGES)
    run = make_run(tmp_path / "made", tmp_path / "model", ["model.compute_dtype=bfloat16"], lora=lora("loftq"))
    monkeypatch.setattr(Start, "split", None)
    for form in ("peft", "gguf-adapter", "gguf"):
        report = export_run(run, tmp_path / form, ExportSettings(form))
    assert abs(report["share"] - 1) < 0.1
    merge_run(run, tmp_path / "merged", MergeSettings(rows=0))


def test_another_start_is_another_base_and_refused(trained, tmp_path):
    folder, run, _ = trained
    opened = open_trained(run)
    mine = opened.fingerprint
    assert mine == json.loads((run / "summary.json").read_text())["base_fingerprint"]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"].startswith(f"{mine}:")
    with pytest.raises(ValueError, match=r"init_lora_weights should be|nknown initiali"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), run / "adapter")
    recipe = opened.recipe
    others = [
        without_start(recipe),
        recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 5})}),
        recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"start": "olora"})}),
    ]
    for other in others:
        assert fingerprint(other, opened.files) != mine
        with pytest.raises(ModelError, match=f"belongs to the base {mine} of lora.start, and this is the"):
            load_adapter(load_again(other), run / "adapter")
        begins = other.model_copy(update={"lora": other.lora.model_copy(update={"init_from": str(run)})})
        with pytest.raises(ModelError, match=r"another model: give the right one with model.path, and the settings of"):
            adapter_to_begin_with(begins)
    plain = build_model(without_start(recipe))
    save_adapter(plain, tmp_path / "plain", str(folder / "model"))
    with pytest.raises(ModelError, match=f"belongs to the model as its files have it, and this is the base {mine}"):
        load_adapter(load_again(recipe), tmp_path / "plain")
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    with pytest.raises(ModelError, match=f"belongs to the base {mine} of lora.start"):
        merge_run(alone, tmp_path / "out", MergeSettings(rows=0))


def test_a_base_that_another_machine_splits_otherwise_is_named_wherever_it_is_used(
    trained, tmp_path, monkeypatch, caplog
):
    _, run, _ = trained
    opened = open_trained(run)
    uses = {
        "answers": lambda: open_tasks(run),
        "evaluation": lambda: load_adapter(load_again(opened.recipe), run / "adapter"),
        "merge": lambda: merge_run(run, tmp_path / f"merged {len(seen)}", MergeSettings(rows=0)),
        "export": lambda: opened.for_files(opened.adapter_to_merge(opened.skeleton())),
    }
    seen, own = [], start_module._random
    for other in (False, True):
        if other:  # where sums are taken in another order
            monkeypatch.setattr(start_module, "_random", lambda weight, rank: own(weight, rank).flip(1))
            monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "other"))
        for use in uses.values():
            caplog.clear()
            use()
            seen.append(caplog.text.count("was trained on another split of these weights than this machine"))
    assert seen == [0] * len(uses) + [1] * len(uses)


def load_again(recipe):
    return build_to_use(recipe, ["some adapter"]) if recipe.lora.start != "kaiming" else build_to_use(recipe)


def test_what_is_left_of_a_model_is_never_taken_for_its_base(trained, tmp_path):
    folder, run, _ = trained
    tasks = open_tasks(run)
    assert not tasks.has_base
    for refused in (lambda: compare_runs(run, with_base=True), lambda: open_session(run, None, 8, base=True)):
        with pytest.raises(ModelError, match="its base without the LoRA weights is no model: use the"):
            refused()
    bare = open_model(folder / "model")
    with pytest.raises(ModelError, match="different bases and cannot share one"):
        open_tasks([str(run), bare])


def test_an_adapter_of_the_same_base_may_be_trained_on(trained):
    _, run, _ = trained
    recipe = open_trained(run).recipe
    again = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"init_from": str(run)})})
    model = build_model(again, adapter=adapter_to_begin_with(again))
    assert torch.equal(logits(model), logits(load_adapter(load_again(recipe), run / "adapter")))


def test_the_merged_model_is_the_trained_one(trained, tmp_path):
    _, run, _ = trained
    recipe = open_trained(run).recipe
    report = merge_run(run, tmp_path / "out", MergeSettings(dtype="f32", rows=4))
    wanted = logits(load_adapter(load_again(recipe), run / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (merged - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert report["models"]["merged"]["kl"] < 1e-7 < report["models"]["base"]["kl"]
    base = logits(build_to_use(recipe))
    assert (wanted - base).norm() > 100 * (merged - wanted).norm()


def test_exported_to_peft_it_fits_the_model_as_its_files_have_it(trained, tmp_path):
    folder, run, _ = trained
    recipe = open_trained(run).recipe
    report = export_run(run, tmp_path / "out", ExportSettings("peft"))
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    loaded = logits(PeftModel.from_pretrained(original, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2 * RANK and "init_lora_weights" not in config
    wanted = logits(load_adapter(load_again(recipe), run / "adapter"))
    distance = (loaded - wanted).norm() / wanted.norm()
    if recipe.model.quant == "none":
        assert distance < 1e-5
    else:  # without the error of 4 bits, which is what is between the two bases
        merged = merge_run(run, tmp_path / "original", MergeSettings(base="original", dtype="f32", rows=4))
        assert merged["models"]["merged"]["kl"] < merged["models"]["base"]["kl"]
        onto = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32))
        assert torch.allclose(loaded, onto, atol=1e-4)
    assert f"lora.start {recipe.lora.start}: this adapter, of twice the rank" in report["notes"][0]

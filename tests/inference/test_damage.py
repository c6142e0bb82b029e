"""What is measured of many variants at once is what loading each gives, and what is recommended was measured."""

import html
import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_files import save_tiny, write_recipe
from tiny_runs import make_run

from qlora_lite.cli.main import cli
from qlora_lite.errors import DataError, DoesNotFitError, ModelError, OutputError, RecipeError
from qlora_lite.export.agreement import compare, outputs
from qlora_lite.inference import damage, variants
from qlora_lite.inference.damage import Candidate, candidates_of, choose, measure_damage, pages_of
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.variants import SIXTEEN, StreamedBase, Variant, tokens_at_once
from qlora_lite.models.load import load_model
from qlora_lite.models.save import save_quantized
from qlora_lite.models.skeleton import meta_model
from qlora_lite.planning.answering import prompt_bytes
from qlora_lite.prepare.model import build_to_use
from qlora_lite.recipe.load import load_recipe
from qlora_lite.train import text_guards


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))


def recipe_of(folder, model_type="llama", overrides=(), **options):
    save_tiny(folder / "model", model_type, **options)
    if model_type == "deepseek_v3":  # whose router's bias is all zeros, when new
        file = folder / "model" / "model.safetensors"
        biases = {
            name: torch.linspace(0.1, -0.1, len(tensor)) if "correction_bias" in name else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(biases, file, {"format": "pt"})
    return load_recipe(write_recipe(folder, folder / "model"), overrides)


def loaded(recipe, name, candidates):
    """The model that a figure is of, loaded as any other."""
    kept = {"quant": "nf4" if name in candidates else name, "keep_16bit": ()}
    if name in candidates:
        kept["keep_16bit"] = candidates[name].patterns
    if name == SIXTEEN:
        kept["quant"] = "none"
    return build_to_use(recipe.model_copy(update={"model": recipe.model.model_copy(update=kept)}), use_cache=False)


# gpt2's weights are stored [in, out]; gemma2's blocks differ; deepseek_v3 has experts, a router's bias, and kinds of
# layer in some blocks only; falcon's rows are told apart by a mask
@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", [SIXTEEN, "nf4", "fp4", "v_proj", "down_proj", "model.layers.0", "model.layers.1"]),
        ("gpt2", ["c_proj", "transformer.h.1"]),
        ("gemma2", [SIXTEEN, "gate_proj", "model.layers.1"]),
        ("qwen3_moe", ["nf4", "gate_up_proj", "model.layers.0"]),
        ("deepseek_v3", ["fp4", "*.experts.down_proj", "down_proj", "model.layers.1"]),
        ("falcon", ["model.layers.1"]),
    ],
)
def test_each_variant_has_the_loss_and_divergence_of_the_model_loaded_so(model_type, names, tmp_path):
    recipe = recipe_of(tmp_path, model_type)
    names = [name.replace("model.layers", "transformer.h") if model_type == "falcon" else name for name in names]
    base = StreamedBase(recipe, rows=99)
    candidates = candidates_of(base)
    given = {name: Variant("nf4", candidates[name].kept) for name in reversed(candidates)}  # one block in 16 bit first
    found = base.measure({name: Variant(name) for name in ("nf4", "fp4")} | given, "")
    assert set(names) <= found.keys()
    plain = outputs(loaded(recipe, SIXTEEN, candidates), base.batches)
    for name in names:
        expected = compare(plain, outputs(loaded(recipe, name, candidates), base.batches))
        assert found[name]["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert found[name]["kl"] == pytest.approx(expected.kl, rel=2e-3, abs=1e-7)
    assert len({round(each["loss"], 5) for each in found.values()}) > len(found) - 2, "variants differ"


def test_bytes_are_those_of_the_models_loaded(tmp_path):
    recipe = recipe_of(tmp_path)
    base = StreamedBase(recipe, rows=2)
    candidates = candidates_of(base)
    sizes = {
        name: sum(tensor.nbytes for tensor in loaded(recipe, name, candidates).state_dict().values())
        for name in ("nf4", "q_proj", "model.layers.1", SIXTEEN)
    }
    assert base.base_bytes == sizes["nf4"]
    for name in ("q_proj", "model.layers.1"):
        assert candidates[name].more_bytes == sizes[name] - sizes["nf4"]
    assert base.more_bytes(frozenset(base.weights)) == sizes[SIXTEEN] - sizes["nf4"]


def test_each_weight_is_read_once_for_all_variants_and_none_stays(tmp_path, monkeypatch):
    recipe, read, there, bases = recipe_of(tmp_path, num_hidden_layers=4), [], [], []
    own = variants.open_weights

    def noting(*arguments):
        reader = own(*arguments).reader()

        def noted(name):
            if bases:  # its checks before have read some too
                read.append(name)
                there.append(sum(not block.mlp.up_proj.weight.is_meta for block in bases[0].model.model.layers))
            return reader(name)

        return SimpleNamespace(reader=lambda: noted)

    monkeypatch.setattr(variants, "open_weights", noting)
    bases.append(base := StreamedBase(recipe, rows=99))
    base.measure({"nf4": Variant("nf4")} | {n: Variant("nf4", c.kept) for n, c in candidates_of(base).items()}, "")
    of_blocks = [name for name, _ in base.model.named_parameters() if "layers" in name]
    assert sorted(name for name in read if "layers" in name) == sorted(of_blocks) and max(there) <= 1
    assert all(parameter.is_meta for parameter in base.model.parameters())


def test_rows_that_have_no_room_together_go_through_in_several_passes_with_the_same_figures(tmp_path):
    recipe, small = (recipe_of(tmp_path, overrides=overrides) for overrides in ([], ["memory.budget=1MiB"]))
    whole, apart = (StreamedBase(each, rows=5) for each in (recipe, small))
    assert (len(whole.batches), len(apart.batches)) == (1, 5)
    given = {"nf4": Variant("nf4"), "v_proj": Variant("nf4", whole.kept(["v_proj"]))}
    found, expected = (base.measure(given, "") for base in (apart, whole))
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures, rel=1e-4, abs=1e-7), name


def test_as_many_rows_go_through_together_as_the_device_has_room_for(tmp_path):
    plan = meta_model(save_tiny(tmp_path, "llama").config, "none", False, torch.bfloat16)
    lengths = [300_000, 200_000, 100_000, 300_000]
    needed = {tokens: prompt_bytes(plan, tokens) for tokens in (300_000, 450_000, 900_000)}
    assert needed[900_000] > 1.5 * needed[450_000]
    for room, tokens in ((0, 300_000), (int(1.3 * needed[450_000]), 450_000), (int(1.3 * needed[900_000]), 900_000)):
        assert tokens_at_once(plan, lengths, room, "cuda", 0) == tokens


def fake_base(sizes):
    return SimpleNamespace(more_bytes=lambda paths: sum(sizes[path] for path in paths))


def test_what_gains_most_for_a_byte_is_chosen_first_and_overlaps_are_counted_once():
    base = fake_base({"0.v": 1, "1.v": 1, "0.up": 10, "1.up": 10})
    of = {"v": {"0.v", "1.v"}, "up": {"0.up", "1.up"}, "0": {"0.v", "0.up"}, "1": {"1.v", "1.up"}}
    known = {name: Candidate("", (name,), frozenset(paths), base.more_bytes(paths)) for name, paths in of.items()}
    gains = {"v": 0.2, "up": 0.5, "0": 0.33, "1": -0.1}
    assert choose(base, gains, known, None, 0.2) == (("v",), 0.2)
    assert choose(base, gains, known, 12, None)[0] == ("v", "0")
    names, guessed = choose(base, gains, known, None, 0.45)
    assert names == ("v", "0") and guessed == pytest.approx(0.2 + 0.33 * 10 / 11)
    assert choose(base, gains, known, 1, None) == ((), 0.0)
    assert choose(base, gains, known, None, None)[0] == ("v", "0", "up")
    assert choose(base, gains | {"up": -0.1}, known, None, None)[0] == ("v", "0"), "never what makes it worse"


def test_a_set_is_measured_and_a_dearer_one_is_tried_until_one_closes_what_was_asked_for(tmp_path, monkeypatch):
    recipe, asked = recipe_of(tmp_path), []
    gains = {"v_proj": 0.03, "up_proj": 0.05, "down_proj": 0.058}  # none closes 60 % alone

    def measured(self, given, what):
        asked.append([name for name in given if name not in (SIXTEEN, "nf4", "fp4")])
        kl = {SIXTEEN: 0.0, "nf4": 0.1, "fp4": 0.2}
        if (chosen := "60% of the divergence closed") in given:  # half of what the single gains promise
            kinds = {path.rpartition(".")[2] for path in given[chosen].kept}
            kl[chosen] = 0.1 - sum(gains[kind] for kind in kinds) / 2
        found = {name: kl.get(name, 0.1 - gains.get(name, -0.01)) for name in (SIXTEEN, *given)}
        return {name: {"loss": 1 - value, "kl": value} for name, value in found.items()}

    monkeypatch.setattr(StreamedBase, "measure", measured)
    result = measure_damage(recipe, close=0.6)
    (found,) = result["sets"]
    assert asked[1:] == [["60% of the divergence closed"]] * (len(asked) - 1) and 2 < len(asked) <= 1 + damage.TRIES
    assert found["closed"] >= 0.6 and found["guessed"] == pytest.approx(2 * found["closed"])
    assert {*found["keep_16bit"]} <= gains.keys() and found["asked"] == "60% of the divergence closed"
    assert found["loss_closed"] is None, "the loss is lower in 4 bit"
    monkeypatch.setattr(
        StreamedBase,
        "measure",
        lambda self, given, what: {name: {"loss": 1.0, "kl": 0.0} for name in (SIXTEEN, *given)},
    )
    assert measure_damage(recipe)["sets"] == []


@pytest.mark.parametrize("wish", [{"close": 0.5}, {"most_bytes": 10**6}])
def test_no_recommended_set_is_beaten_by_a_single_kind_or_block(wish, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    block = "model.layers.0"  # closes most alone, but less for a byte than v_proj, which does not add up with it

    def measured(self, given, what):
        kl = {SIXTEEN: 0.0, "v_proj": 0.08, block: 0.03}
        return {
            name: {"loss": 1.0, "kl": kl.get(name, 0.1 if name in ("nf4", "fp4") or "_proj" in name else 0.04)}
            for name in (SIXTEEN, *given)
        }

    monkeypatch.setattr(StreamedBase, "measure", measured)
    (found,) = measure_damage(recipe, **wish)["sets"]
    assert (found["keep_16bit"], found["kl"]) == ([f"{block}.*"], 0.03)
    assert found["closed"] == pytest.approx(0.7) == found["guessed"]


def test_a_set_that_falls_short_says_so_and_never_is_all_layers(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)

    def measured(self, given, what):  # whatever is kept closes a little more
        kept = {name: len(getattr(given.get(name), "kept", ())) for name in (SIXTEEN, *given)}
        return {name: {"loss": 1.0, "kl": 0.0 if name == SIXTEEN else 0.1 - 0.005 * n} for name, n in kept.items()}

    monkeypatch.setattr(StreamedBase, "measure", measured)
    (found,) = measure_damage(recipe, close=0.999)["sets"]
    assert found["asked"] == "99.9% of the divergence closed, not reached" and 0 < found["closed"] < 0.999
    (found,) = measure_damage(recipe, most_bytes=2**30)["sets"]
    changed = recipe.model.model_copy(update={"keep_16bit": tuple(found["keep_16bit"])})
    assert build_to_use(recipe.model_copy(update={"model": changed}), use_cache=False), "not all layers"


def test_rows_that_would_see_each_other_go_through_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(text_guards, "why_unpacked", lambda *_: "")  # so that only a comparison shows it
    recipe = recipe_of(tmp_path, "bloom")
    assert len(StreamedBase(recipe, rows=5).batches) == 5
    assert len(StreamedBase(recipe_of(tmp_path / "llama"), rows=5).batches) == 1


@pytest.mark.parametrize(
    ("model_type", "options", "text"),
    [
        (
            "gemma4_unified_text",
            {
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "read the keys and values of earlier ones",
        ),
        ("gpt2", {"n_positions": 16}, r"the row takes \d+ positions, and the model has embeddings of 16"),
    ],
)
def test_a_model_that_these_rows_cannot_go_through_block_by_block_is_one_error(model_type, options, text, tmp_path):
    with pytest.raises((ModelError, DataError), match=text):
        measure_damage(recipe_of(tmp_path, model_type, **options))


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(name, tmp_path):
    recipe = recipe_of(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.{name}"].view(-1)[3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"model.{name} holds NaN or infinity in \w+: the checkpoint is damaged"):
        measure_damage(recipe)


def test_logits_that_are_not_finite_are_an_error_and_no_divergence_of_zero(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    own = variants.Weight.in_4_bit
    monkeypatch.setattr(variants.Weight, "in_4_bit", lambda self, quant, *how: own(self, quant, *how) * torch.nan)
    with pytest.raises(ModelError, match=r"nf4: logits in \w+ are not finite; set model.compute_dtype to float32"):
        measure_damage(recipe)
    said = outputs(build_to_use(recipe, use_cache=False), StreamedBase(recipe, rows=2).batches)
    assert math.isnan(compare(said, said._replace(hidden=said.hidden * torch.nan)).kl)


def test_rows_beyond_the_model_s_positions_are_named_by_an_evaluation_too(tmp_path):
    with pytest.raises(DataError, match=r"the row takes \d+ positions, and the model has embeddings of 16"):
        evaluate_recipe(recipe_of(tmp_path, "gpt2", n_positions=16), None, 0)


def test_what_is_computed_between_blocks_is_an_error(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    own = variants.streamed_model

    def with_more(*arguments):
        model = own(*arguments)
        model.model.layers[1].register_forward_pre_hook(lambda block, given: (given[0] * 2, *given[1:]))
        return model

    monkeypatch.setattr(variants, "streamed_model", with_more)
    with pytest.raises(ModelError, match=r"what is computed before LlamaDecoderLayer 1 is not known: .* by block"):
        measure_damage(recipe)


@pytest.mark.parametrize(
    ("error", "overrides", "options", "text"),
    [
        (RecipeError, ["data.eval=null"], {}, "no held-out rows to measure on: write data.eval or data.eval_share"),
        (RecipeError, ["model.quant=none"], {}, "nothing is quantised"),
        (RecipeError, ["model.quant=keep"], {}, "nothing is quantised"),
        (ModelError, ["model.keep_16bit=[nonsense]"], {}, "'nonsense' matches no linear layer"),
        (ModelError, ["model.keep_16bit=[lm_head]"], {}, "'lm_head' matches no linear layer"),
        (RecipeError, [], {"most_bytes": 100}, r"nothing fits in 100 B: the smallest, k_proj, takes 11.9 KiB more"),
    ],
)
def test_what_cannot_be_measured_is_one_error(error, overrides, options, text, tmp_path):
    recipe = recipe_of(tmp_path, overrides=[*overrides, "train.metrics_examples=0"])
    with pytest.raises(error, match=text):
        measure_damage(recipe, **options)


def test_a_4_bit_checkpoint_and_too_little_host_memory_are_errors_before_anything_is_read(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    save_quantized(load_model(str(tmp_path / "model"), compute_dtype=torch.float32), tmp_path / "packed")
    packed = recipe.model.model_copy(update={"path": str(tmp_path / "packed")})
    with pytest.raises(ModelError, match="is published packed"):
        measure_damage(recipe.model_copy(update={"model": packed}))
    monkeypatch.setattr(variants, "free_bytes", lambda device: 100_000)
    with pytest.raises(DoesNotFitError, match=r"models on 6 rows have no room in host memory: --rows \d"):
        measure_damage(recipe)


def test_a_page_that_cannot_be_written_is_an_error_before_the_model_is_read(tmp_path, monkeypatch):
    recipe_of(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("qlora_lite.inference.damage.measure_damage", None)
    ended = CliRunner().invoke(
        cli, ["damage", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "file" / "d.html")]
    )
    assert isinstance(ended.exception, OutputError) and "Not a directory" in str(ended.exception)


def test_of_a_run_it_is_a_part_of_the_report(tmp_path):
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model")
    ended = CliRunner().invoke(cli, ["damage", str(run), "--rows", "2", "--close", "0.1"])
    assert ended.exit_code == 0, ended.output
    result, page = json.loads((run / "damage.json").read_text()), (run / "report.html").read_text()
    assert result["rows"] == 2 and (run / "damage.html").is_file() and f"wrote {run / 'report.html'}" in ended.output
    assert "What four bits cost" in page and f"but for {json.dumps(result['sets'][0]['keep_16bit'])}" in html.unescape(
        page
    )
    for model in [*(model for model in result["models"] if model["group"] == "type"), *result["sets"]]:
        assert f">{model['loss']:.4f}<" in page and f">{model['kl']:.4f}<" in page


def test_the_command_prints_a_line_for_the_recipe_and_writes_a_page_and_json(tmp_path):
    recipe_of(tmp_path)
    arguments = [
        str(tmp_path / "recipe.yaml"),
        "--close",
        "0.1",
        "--rows",
        "4",
        "--out",
        str(tmp_path / "new" / "d.html"),
    ]
    ended = CliRunner().invoke(cli, ["damage", *arguments])
    assert ended.exit_code == 0, ended.output
    result = json.loads((tmp_path / "new" / "d.json").read_text())
    line = next(line for line in ended.output.splitlines() if line.startswith("model.keep_16bit: "))
    patterns = yaml.safe_load(line)["model.keep_16bit"]
    assert patterns == result["sets"][0]["keep_16bit"] and result["rows"] == 4
    with_it = load_recipe(tmp_path / "recipe.yaml", [line.replace(": ", "=", 1)])
    assert list(with_it.model.keep_16bit) == patterns
    again = measure_damage(with_it, rows=4)
    own = next(model for model in again["models"] if model["name"] == "as the recipe says")
    assert own["loss"] == pytest.approx(result["sets"][0]["loss"], abs=1e-6)
    page = (tmp_path / "new" / "d.html").read_text()
    assert "<svg" in page and "model.layers.1" in page and "v_proj" in page and line in page.replace("&quot;", '"')
    assert CliRunner().invoke(cli, ["damage", *arguments, "--bytes", "1MiB"]).exit_code == 2
    assert CliRunner().invoke(cli, ["damage", *arguments[:1], "--bytes", "much"]).exit_code == 2


def test_figures_lie_beside_the_page_and_over_nothing_else(tmp_path):
    assert pages_of(tmp_path / "llama3.1-8b") == (tmp_path / "llama3.1-8b.html", tmp_path / "llama3.1-8b.json")
    (tmp_path / "train.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(OutputError, match=r"train\.json, where the figures would be, holds something else"):
        pages_of(tmp_path / "train.html")
    (tmp_path / "train.json").write_text('{"models": [], "target_tokens": 3}')
    assert pages_of(tmp_path / "train.html")[0] == tmp_path / "train.html"

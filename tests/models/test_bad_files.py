"""Every way in which a model's files can be wrong is one line that names the place and says what to do."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_files import save_nested, save_tiny, write_recipe

from qlora_lite.errors import ModelError
from qlora_lite.inference.generate import answer
from qlora_lite.models import skeleton
from qlora_lite.models.load import load_model
from qlora_lite.models.locate import check_gguf, locate
from qlora_lite.models.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model in one file and one in shards; tests work on copies."""
    folder = tmp_path_factory.mktemp("originals")
    save_tiny(folder / "one")
    save_tiny(folder / "many", shard="60KB")
    return folder


@pytest.fixture
def one(originals, tmp_path):
    return shutil.copytree(originals / "one", tmp_path / "one")


@pytest.fixture
def many(originals, tmp_path):
    return shutil.copytree(originals / "many", tmp_path / "many")


def refusal(path, action=None) -> str:
    with pytest.raises(ModelError) as caught:
        (action or (lambda p: load_model(p, compute_dtype=torch.float32, use_cache=False)))(str(path))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_missing_shard_is_named(many):
    (many / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    shards = json.loads((many / INDEX).read_text())["weight_map"].values()
    shard = sorted(set(shards))[1]
    (many / shard).unlink(missing_ok=True)
    assert f"lacks 1 of {len(set(shards))} weight files: {shard}" in refusal(many)


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -1])
def test_a_safetensors_file_cut_short_is_named(one, keep):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is cut short or not a safetensors file; download it again" in refusal(one)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x01" + b"\0" * 7 + b"{"])
def test_a_file_that_is_not_safetensors_is_named(one, content):
    (one / "model.safetensors").write_bytes(content)
    assert "cut short or not a safetensors file" in refusal(one)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(many, name):
    rewrite(many / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    assert f"points outside its folder: {name!r}" in refusal(many)


def test_a_whole_file_counts_beside_the_index_of_an_earlier_save(one):
    (one / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert [path.name for path in locate(one).weights] == ["model.safetensors"]


def test_an_index_with_a_name_too_long_for_a_file_lacks_that_file(many):
    rewrite(many / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "x" * 300}))
    assert "lacks 1 of" in refusal(many)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_file_names_is_refused(many, weight_map):
    rewrite(many / INDEX, lambda index: index.update(weight_map=weight_map))
    assert "has no weight_map of file names" in refusal(many)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\x00\xff"])
def test_a_broken_json_file_is_named(many, name, content):
    (many / name).write_bytes(content.encode("latin-1"))
    assert name in refusal(many)


def test_a_configuration_without_weights_is_said_to_be_that(one):
    (one / "model.safetensors").unlink()
    assert "has a config.json but no .safetensors weights" in refusal(one)
    torch.save({}, one / "pytorch_model.bin")
    assert "pickled weights are not read, convert them to safetensors" in refusal(one)


def test_a_folder_without_a_configuration_is_refused(one):
    (one / "config.json").unlink()
    assert "has no config.json; model.path must be a whole model folder" in refusal(one)


def test_weights_that_are_missing_or_misshaped_are_named(one):
    from safetensors.torch import load_file, save_file

    tensors = load_file(one / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert "1 weight missing or of another shape: model.layers.1.mlp.up_proj" in refusal(one)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    said = "model.layers.1.mlp.up_proj.weight: has the shape (95, 64), and (96, 64) is needed"
    assert said in refusal(one)


def test_weights_beyond_what_the_configuration_describes_are_told_in_one_line(one, capfd, caplog):
    rewrite(one / "config.json", lambda config: config.update(num_hidden_layers=1))
    load_model(one, compute_dtype=torch.float32, use_cache=False)
    (told,) = caplog.messages
    assert "weights of its files have no place in the model that its config.json describes" in told
    assert "first model.layers.1." in told and "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("action", [load_tokenizer, load_model])
def test_a_configuration_that_contradicts_itself_is_one_line_with_the_reason(one, action):
    rewrite(one / "config.json", lambda config: config.update(num_attention_heads=3))
    assert "is not a multiple of the number of attention heads" in refusal(one, action)


def test_a_weight_that_is_not_finite_is_refused(one):
    from safetensors.torch import load_file, save_file

    tensors = load_file(one / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight: cannot quantise a weight that holds NaN" in refusal(one)


def test_an_unknown_architecture_is_refused(one):
    rewrite(one / "config.json", lambda config: config.update({"model_type": "no_such_model"}))
    assert "cannot read the configuration" in refusal(one)


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": 5},
        {"text_config": {"num_hidden_layers": "a"}},
        {"decoder": {}},
        {"vision_config": "x"},
        {"vision_config": {"hidden_size": -1}},
    ],
)
def test_a_configuration_whose_parts_make_no_sense_is_refused_in_one_line(change, tmp_path):
    save_nested(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(change))
    said = refusal(tmp_path)
    assert "\n" not in said and ("cannot read the configuration" in said or "cannot load it alone" in said)


def write_gguf(path, **parts):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama", **parts)
    writer.add_block_count(1)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("keep", [0, 3, 100, 50_000])
def test_a_gguf_file_cut_short_is_named(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf")
    check_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is cut short" in refusal(path, lambda p: check_gguf(path))
    assert str(path) in refusal(path)


@pytest.mark.parametrize("first_has_tensors", [True, False])
def test_a_part_of_a_gguf_model_is_called_that(tmp_path, first_has_tensors):
    write_gguf(tmp_path / "m.gguf", split_max_tensors=1, small_first_shard=not first_has_tensors)
    first, *others = sorted(tmp_path.iterdir())
    said = f"it is one of {1 + len(others)} parts of a GGUF file; join them with `llama-gguf-split --merge`"
    assert others and said in refusal(first)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    assert "no file" in refusal(tmp_path / "absent.gguf")


def test_a_hub_id_without_a_network_says_so():
    text = refusal("nobody-here/no-such-model")
    assert "is not in the hub cache, and the hub cannot be reached" in text
    assert "local folder or .gguf file" in text


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "no such model"])
def test_a_path_that_is_nothing_is_refused(path):
    assert "no folder" in refusal(path) or "hub id" in refusal(path)


@pytest.mark.parametrize(
    "path", ["package:no_such_package/x.gguf", "package:", "package:os.path/x", "package:json/../x"]
)
def test_a_package_or_file_that_is_not_there_is_refused(path):
    assert "package" in refusal(path)


def test_a_package_file_cannot_leave_its_package(tmp_path, monkeypatch):
    (tmp_path / "tiny_package").mkdir()
    (tmp_path / "tiny_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(tmp_path / "tiny_package" / "m.gguf")
    (tmp_path / "outside.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:tiny_package/m.gguf").weights[0].name == "m.gguf"
    assert "has no file" in refusal("package:tiny_package/../outside.gguf", locate)


def test_a_package_in_several_folders_has_the_files_of_all(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / "spread_out").mkdir(parents=True)
        write_gguf(tmp_path / place / "spread_out" / f"{place}.gguf")
        monkeypatch.syspath_prepend(tmp_path / place)
    for place in ("one", "two"):
        assert locate(f"package:spread_out/{place}.gguf").weights == (
            tmp_path / place / "spread_out" / f"{place}.gguf",
        )


def test_a_model_of_another_kind_is_named_with_its_task(one):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (one / name).unlink(missing_ok=True)
    (one / "preprocessor_config.json").write_text("{}")
    assert "write task.kind image-classification" in refusal(one, load_tokenizer)
    (one / "config.json").unlink()
    (one / "model_index.json").write_text("{}")
    assert "of a diffusion pipeline task.kind image-generation trains the denoiser" in refusal(one)


def test_a_folder_without_a_tokenizer_is_refused(one):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (one / name).unlink(missing_ok=True)
    assert "none of a tokenizer's files lies in" in refusal(one, load_tokenizer)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "Unheard"}}'])
def test_a_broken_tokenizer_file_is_refused(one, content):
    (one / "tokenizer.json").write_text(content)
    assert "tokenizer" in refusal(one, load_tokenizer)


def test_a_slow_tokenizer_is_refused(one, monkeypatch):
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: slow)
    assert "has only a slow tokenizer" in refusal(one, load_tokenizer)


@pytest.fixture
def asked_of_the_hub(one, monkeypatch):
    """Give a folder of this disk for a hub model; return the file patterns that were asked for."""
    patterns = []

    def download(_name, revision, allow_patterns, ignore_patterns):
        patterns.append((revision, set(allow_patterns)))
        return str(one)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return patterns


def test_a_hub_model_s_weights_are_not_fetched_for_its_tokenizer(asked_of_the_hub, one):
    load_tokenizer("owner/model", "v2")
    [(revision, patterns)] = asked_of_the_hub
    assert revision == "v2" and {"*.json", "*.jinja"} < patterns and not any("safetensors" in p for p in patterns)
    assert locate("owner/model").weights == (one / "model.safetensors",)
    assert "*.safetensors" in asked_of_the_hub[1][1]
    (one / "model.safetensors").unlink()
    load_tokenizer("owner/model")
    assert refusal("owner/model", locate).endswith("; if it was not downloaded whole, connect to the network once")
    assert refusal(one, load_tokenizer).endswith("has a config.json but no .safetensors weights")


def test_other_layouts_of_the_weights_beside_them_are_left_alone(one):
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(one / "model.safetensors", one / name)
    assert locate(str(one)).weights == (one / "model.safetensors",)


def test_a_hub_id_without_an_owner_is_looked_for_in_the_cache_too(one, monkeypatch):
    cached = {"gpt2": str(one / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda path, *_, **__: cached.get(path))
    assert skeleton.read_config("gpt2").model_type == "llama"
    monkeypatch.undo()
    for path in ("gpt2-absent", "no such model", "a/b/c"):
        assert "is no folder or file here, not in the hub's cache" in refusal(path, skeleton.read_config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 2**40}, "has hidden_size 1,099,511,627,776, and no model has more than 16,777,216"),
        ({"num_hidden_layers": 10**7}, "has num_hidden_layers 10,000,000, and no model has more than 500"),
        ({"head_dim": 2**62}, "has head_dim"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "has num_local_experts 1,000,000,000"),
    ],
)
@pytest.mark.timeout(20)
def test_a_size_that_no_model_has_is_refused_before_anything_is_built(one, change, said):
    rewrite(one / "config.json", lambda config: config.update(change))
    assert said in refusal(one, skeleton.read_config)


def test_sizes_of_a_part_are_checked_and_sums_too_large_for_memory_s_addresses_are_refused(one, tmp_path):
    save_nested(tmp_path / "nested")
    rewrite(tmp_path / "nested" / "config.json", lambda config: config["vision_config"].update(num_hidden_layers=10**7))
    assert "has num_hidden_layers 10,000,000" in refusal(tmp_path / "nested", skeleton.read_config)
    config = skeleton.read_config(str(one))
    config.vocab_size = config.hidden_size = 2**40
    said = refusal(one, lambda _: skeleton.meta_model(config, "nf4", True, torch.float32))
    assert "no causal language model can be built from this configuration" in said


@pytest.mark.parametrize("pattern", ["(", r"\p{Foo}", "a{100000}{100000}"])
def test_a_pattern_of_a_tokenizer_that_cannot_be_compiled_is_refused(one, pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    rewrite(one / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=split))
    assert "the tokenizer fails (Oniguruma error: " in refusal(one, load_tokenizer)


def test_a_pattern_of_a_tokenizer_that_gives_up_on_a_text_is_one_line(one, tmp_path, command):
    normalizer = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "q"}
    rewrite(one / "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=normalizer))
    recipe = write_recipe(tmp_path, one)
    turns = [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    for arguments in (["data", recipe], ["train", recipe]):
        code, _, err = command(*arguments)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
        assert "the tokenizer fails (Onig: Regex search error: retry-limit-in-match over)" in errors[0]
    said = refusal(one, lambda path: answer(load_model(path, "none"), load_tokenizer(path), ["x" * 60], 2))
    assert "the tokenizer fails (Onig" in said

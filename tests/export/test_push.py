"""What goes to the hub: the adapter or the merged model with its card, shown before, and nothing else."""

import inspect
import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from runs.test_full_run import full_recipe
from tiny_files import byte_tokenizer, save_tiny
from tiny_published import save_published
from tiny_runs import make_run, tiny_run

from qlora_lite.errors import OutputError
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.hub.card import CardFacts, model_card
from qlora_lite.ext.hub.push import Push, send
from qlora_lite.models.load import load_model
from qlora_lite.models.save import save_quantized
from qlora_lite.recipe.load import load_recipe, recipe_of
from qlora_lite.runs.run import run_recipe

REPO, BASE = "me/orders", "them/Base-1B"
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}
MEASURED = {
    "trainable_parameters": 12_345,
    "steps": 60,
    "seconds": 90.5,
    "device": "CPU x86_64, 2 threads",
    "eval_loss_before": 2.5,
    "eval_loss_after": 1.25,
    "exact_match_before": 0.0,
    "exact_match_after": 0.85,
    "exact_match_rows": 100,
    "metrics": {
        "before": {"bleu": {"value": 1.25, "standard_error": None, "examples": 90, "signature": "nrefs:1|tok:13a"}},
        "after": {
            "bleu": {"value": 31.23, "standard_error": 2.5, "examples": 90, "signature": "nrefs:1|tok:13a"},
            "rougeL": {"value": 0.5, "standard_error": 0.25, "examples": 90},
            "rouge1": {"value": "x"},
        },
    },
    "versions": {"qlora-lite": "0.1.0", "torch": "2.13.0"},
    "data": {"rows_kept": 1_500, "target_tokens": 23_456, "end_token_ids": [4]},
    "samples": [{"prompt": "a customer's secret", "reference": "x", "before": "y", "after": "z"}],
}


def http_error(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error: no.\n\nmore of it", response=response)


class Hub:
    """Stands in for ``HfApi``: takes only calls that the real class's signatures take."""

    def __init__(self, repos=None, error=None):
        self.repos = {BASE: {"license": "apache-2.0"}} | (repos or {})
        self.error, self.calls, self.sent = error, [], {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            bound = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
            self.calls.append(name)
            return getattr(self, f"_{name}")(bound.arguments)

        return call

    def _model_info(self, given):
        if (repo := self.repos.get(given["repo_id"])) is None:
            raise http_error(RepositoryNotFoundError, 404)
        files = [SimpleNamespace(rfilename=name) for name in repo.get("files", ())]
        card = SimpleNamespace(license=repo.get("license"), license_name=None, license_link=None)
        return SimpleNamespace(private=repo.get("private", False), siblings=files, card_data=card)

    def _create_repo(self, given):
        self.repos[given["repo_id"]] = {"private": given["private"]}

    def _create_commit(self, given):
        if self.error:
            raise self.error
        for operation in given["operations"]:
            assert isinstance(operation, CommitOperationAdd)
            content = operation.path_or_fileobj
            self.sent[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{given['repo_id']}/commit/1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny_run(tmp_path_factory.mktemp("push"))
    summary = json.loads((folder / "summary.json").read_text()) | MEASURED
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("log.txt", "metrics.jsonl", "data.json"):
        (folder / name).write_text("private")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that the command is given, and a token."""
    made = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_options: made)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    return made


def test_the_adapter_goes_to_a_private_repository_with_a_gpu_after_all_was_shown(run, hub, command):
    code, out, err = command("push", run, REPO, "--base-model", BASE, "--yes")
    assert code == 0, err
    assert hub.sent.keys() == ADAPTER_FILES and hub.repos[REPO] == {"private": True}
    assert hub.calls == ["model_info", "model_info", "create_repo", "create_commit"]
    config = json.loads(hub.sent["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE and config["r"] == 4
    assert hub.sent["README.md"].decode() in out and f"{REPO}, private, new" in out
    assert all(f" {name}, " in out for name in ADAPTER_FILES)
    assert f"sent to https://huggingface.co/{REPO}/commit/1" in out
    everything = b"".join(hub.sent.values())
    assert str(run.parent).encode() not in everything and b"secret" not in everything


def test_a_merged_model_goes_without_what_else_lies_in_its_folder(run, hub, command, tmp_path):
    merge_run(run, tmp_path / "merged", MergeSettings(rows=0))
    for name in ("notes.txt", "README.md", "optimizer.pt", "rows.json"):
        (tmp_path / "merged" / name).write_text("private")
    (tmp_path / "merged" / "vocab.txt").symlink_to(tmp_path / "merged" / "rows.json")
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tmp_path)}))
    code, out, err = command("push", run, REPO, "--merged", tmp_path / "merged", "--public", "--yes")
    assert code == 0, err
    files = ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.sent.keys() == files | {"config.json", "generation_config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert json.loads(hub.sent["config.json"])["model_type"] == "llama"
    assert str(tmp_path).encode() not in b"".join(hub.sent.values()) and b"private" not in b"".join(hub.sent.values())
    assert f"{REPO}, PUBLIC, new" in out and hub.repos[REPO] == {"private": False}
    assert "not sent: README.md, merge_report.json, notes.txt, optimizer.pt, rows.json, vocab.txt" in out
    card = hub.sent["README.md"].decode()
    assert "library_name: transformers" in card and "base_model" not in card and "merged into its nf4 weights" in card
    (tmp_path / "merged" / "merge_report.json").write_text('{"run": "another"}')
    code, _, err = command("push", run, REPO, "--merged", tmp_path / "merged", "--public", "--yes")
    assert code == 2 and "is not a merged model of run" in err


def test_a_merged_model_of_another_run_of_the_same_name_is_refused(run, hub, command, tmp_path):
    other = make_run(tmp_path / "other", run.parent / "model", seed=4)
    assert other.name == run.name
    merge_run(other, tmp_path / "merged", MergeSettings(rows=0))
    push = "push", run, REPO, "--merged", tmp_path / "merged", "--yes"
    code, _, err = command(*push)
    assert code == 2 and f"is a merged model of another adapter than {run / 'adapter'}" in err and not hub.sent
    report = tmp_path / "merged" / "merge_report.json"
    known = json.loads(report.read_text())
    del known["adapter_sha256"]  # as of an earlier version
    report.write_text(json.dumps(known))
    assert command(*push)[0] == 0


def test_a_model_that_was_trained_whole_goes_as_it_is(hub, command, tmp_path):
    save_tiny(tmp_path / "base")
    run = run_recipe(full_recipe(tmp_path, tmp_path / "base"))
    code, _, err = command("push", run, REPO, "--base-model", BASE, "--yes")
    assert code == 0, err
    files = ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.sent.keys() == files | {"config.json", "generation_config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in b"".join(hub.sent.values())
    card = hub.sent["README.md"].decode()
    assert "library_name: transformers" in card and "base_model_relation: finetune" in card and "rank" not in card
    assert "- full-fine-tuning" in card and f"{BASE}) with all weights trained, which" not in card
    assert "with all weights trained with qlora-lite." in card
    code, _, err = command("push", run, REPO, "--merged", run / "model", "--yes")
    assert code == 2 and "has a whole model, which no merge has made; leave out --merged" in err


@pytest.mark.parametrize("base", [None, BASE])
def test_paths_of_this_machine_become_the_base_model_s_name_or_are_left_out(run, hub, command, tmp_path, base):
    merged = tmp_path / "merged"
    merge_run(run, merged, MergeSettings(rows=0))
    paths = ["../models/x", "~/x", "models/x", "C:\\models\\x", load_recipe(run / "recipe.yaml").model.path]
    (tmp_path / "models" / "x").mkdir(parents=True)
    own = {"path": "not/there", "extra_special_tokens": ["/", "~/"], "added": {"1": {"content": "/"}}, "none": None}
    settings = {
        "_name_or_path": paths[0],
        "part": {"name_or_path": paths[1], "file": paths[2]},
        "files": [paths[3], "kept"],
        "parts": [{"cache_dir": paths[4]}],
    }
    for name in ("config.json", "tokenizer_config.json"):
        there = json.loads((merged / name).read_text())
        (merged / name).write_text(json.dumps(there | own | settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = ("push", run, REPO, "--merged", merged, *(("--base-model", base) if base else ()))
        shown = command(*arguments, "--dry-run")[1]
        code, _, err = command(*arguments, "--yes")
    assert code == 0, err
    for name in ("config.json", "tokenizer_config.json"):
        sent = json.loads(hub.sent[name])
        assert own.items() <= sent.items() and sent["files"] == ["kept"] and sent["parts"] == [{}]
        assert sent.get("_name_or_path") == base and sent["part"] == ({"name_or_path": base} if base else {})
        assert f"{name} part name_or_path: ~/x is a path of this machine; {base or 'nothing'} is sent instead" in shown
        assert all(f": {path} is a path of this machine" in shown for path in paths)


def test_nothing_is_sent_unless_it_is_confirmed(run, hub, command, monkeypatch):
    monkeypatch.setattr("click.confirm", lambda question: REPO not in question)
    code, out, _ = command("push", run, REPO, "--base-model", BASE)
    assert code == 0 and out.endswith("\nnothing was sent\n") and "# orders" in out
    assert set(hub.calls) == {"model_info"} and not hub.sent


def test_a_repository_that_is_there_keeps_its_visibility_and_its_other_files(run, hub, command):
    hub.repos[REPO] = {"private": False, "files": ["README.md", "old.bin", ".gitattributes"]}
    code, _, err = command("push", run, REPO, "--base-model", BASE, "--yes")
    assert code == 2 and "exists and is public; add --public" in err and not hub.sent
    hub.repos[REPO]["private"] = True
    code, out, _ = command("push", run, REPO, "--base-model", BASE, "--yes", "--public")
    assert code == 0 and f"{REPO}, private, exists already" in out and "create_repo" not in hub.calls
    assert "README.md, 1" in out and "replaced" in out and "unchanged     old.bin" in out
    assert "the repository exists and stays private" in out


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept the token: run `hf auth login`"),
        (403, f"has no write access to {REPO}"),
        (409, "exists already"),
        (500, f"the hub refuses {REPO}: 500 Client Error: no."),
    ],
)
def test_what_the_hub_refuses_is_one_line(status, words):
    hub = Hub(error=http_error(HfHubHTTPError, status))
    with pytest.raises(OutputError) as caught:
        send(Push(REPO, {"README.md": b"# orders"}, True, None, ()), hub)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_network_a_push_ends_with_one_line_and_a_dry_run_goes_on(run, command, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_options: HfApi(endpoint=nobody))
    for offline, words in ((True, "HF_HUB_OFFLINE is set; unset it"), (False, "the hub cannot be reached")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        code, _, err = command("push", run, REPO, "--base-model", BASE, "--yes")
        assert code == 2 and err.startswith("error: ") and words in err and len(err.splitlines()) == 1
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = command("push", run, REPO, "--base-model", BASE, "--dry-run")
    assert code == 0 and words in out and "licence is not known" in out and "(--dry-run)" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", REPO], "--base-model OWNER/NAME"),
        (["RUN", "orders"], "write it as OWNER/NAME"),
        (["RUN", "me/../you"], "write it as OWNER/NAME"),
        (["RUN", REPO, "--base-model", "/home/me/base"], "OWNER/NAME"),
        (["RUN/adapter", REPO], "name the run"),
        (["ALONE", REPO], "`hf upload`"),
        (["RUN", "a--b/c"], "'a--b/c' is not"),
        (["RUN", REPO, "--merged", "RUN"], "is not a merged model of run"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_gets_anything(run, hub, command, tmp_path, arguments, words):
    (tmp_path / "alone").symlink_to(run / "adapter")
    arguments = [word.replace("RUN", str(run)).replace("ALONE", str(tmp_path / "alone")) for word in arguments]
    code, _, err = command("push", *arguments, "--yes")
    assert code == 2 and words in err and not hub.sent and "create_repo" not in hub.calls


def test_a_run_that_failed_or_has_no_adapter_or_no_token_is_refused(run, hub, command, tmp_path, monkeypatch):
    failed = make_run(tmp_path / "a", run.parent / "model", status="failed")
    code, _, err = command("push", failed, REPO, "--base-model", BASE, "--yes")
    assert code == 2 and "did not finish" in err
    (failed / "adapter" / "adapter_config.json").unlink()
    code, _, err = command("push", failed, REPO, "--base-model", BASE, "--yes", "--unfinished")
    assert code == 2 and "has no adapter" in err
    monkeypatch.setattr("qlora_lite.ext.hub.push.get_token", lambda: None)
    code, _, err = command("push", run, REPO, "--base-model", BASE, "--yes")
    assert code == 2 and "error: you are not logged in to the hub: run `hf auth login`" in err


def facts(tmp_path, summary=MEASURED | {"status": "complete"}, base_model=BASE, licence=None, merged_into=None):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(f"""
model: {{path: {tmp_path}/base}}
lora: {{rank: 8, targets: [q_proj, "*.mlp.*"], init_from: {tmp_path}/earlier}}
data: {{train: [rows.jsonl, "hub:them/rows/config:train"], max_tokens: 256}}
train: {{learning_rate: 1.5e-3, gradient_accumulation_steps: 4}}
""")
    recipe = load_recipe(tmp_path / "recipe.yaml", check_files=False)
    return CardFacts(REPO, base_model, licence or {}, recipe, summary, merged_into, True)


def test_a_gpu_says_what_was_measured_and_nothing_of_this_machine(tmp_path):
    card = model_card(
        facts(tmp_path, licence={"license": "other", "license_name": "them", "license_link": "https://x"})
    )
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora-lite"],
        "datasets": ["them/rows"],
        "license": "other",
        "license_name": "them",
        "license_link": "https://x",
    }
    for line in (
        "| evaluation loss (nats per target token) | 2.5000 | 1.2500 |",
        "| exact match of 100 answers | 0.0% | 85.0% |",
        "| bleu of 90 answers nrefs:1\\|tok:13a | 1.2 | 31.2 ± 2.5 |",
        "| rougeL of 90 answers | - | 0.5000 ± 0.2500 |",
        "| examples | 1,500 |",
        "| target tokens | 23,456 |",
        "| base weights | NF4, double quantization |",
        "| LoRA | rank 8, alpha 32, dropout 0, on `q_proj`, `*.mlp.*`; initialized from an earlier adapter |",
        "| learning rate | 0.0015, cosine, warm-up 3% |",
        "| sequences per step | 4, packed, of up to 256 tokens |",
        "Versions: qlora-lite 0.1.0, torch 2.13.0.",
        "That of the base model: them.",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{REPO}", dtype="auto", device_map="auto")',
    ):
        assert line in card.splitlines(), line
    assert str(tmp_path) not in card and "rows.jsonl" not in card and "secret" not in card


def test_what_a_run_recorded_is_text_in_its_card(tmp_path):
    evil = "\x1b[2J\u202e<script>a</script>\n\n# b | `c` [d](javascript:e)"
    summary = {
        "status": "complete",
        "device": evil,
        "versions": {evil: evil},
        "learning_rate": evil,
        "exact_match_rows": evil,
        "exact_match_after": 0.5,
        "eval_loss_after": evil,
        "data": {"rows_kept": evil},
        "metrics": {"after": {evil: {"value": 1.0, "examples": 2, "signature": evil}}},
    }
    plain = facts(tmp_path, summary)
    adapter = plain.recipe.adapter.model_copy(update={"train_tokens": ("a`b\nc", "<d>")})
    card = model_card(replace(plain, recipe=plain.recipe.model_copy(update={"adapter": adapter})))
    assert not {"\x1b", "\u202e"} & {*card} and not re.search(r"(?<!\\)(<script|\[d\]|`c)|^# b", card, re.MULTILINE)
    assert "| `` a`b c ``, `<d>` |" in card and "| exact match | - | 50.0% |" in card


@pytest.mark.parametrize(("quant", "tags"), [("nf4", ["lora", "dora", "qlora", "qdora"]), ("none", ["lora", "dora"])])
def test_the_card_of_dora_names_it_and_the_rate_of_b(tmp_path, quant, tags):
    plain = facts(tmp_path, licence={})
    recipe = recipe_of(
        plain.recipe.model_dump(mode="json"),
        [
            "adapter.method=dora",
            "train.loraplus_lr_ratio=16",
            f"model.quant={quant}",
            "train.max_grad_norm=0",
            "train.warmup_ratio=0.004",
        ],
        "recipe",
    )
    card = model_card(replace(plain, recipe=recipe))
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == [*tags, "qlora-lite"]
    assert "A DoRA adapter for" in card and "\n| DoRA | rank 8," in card
    assert "\n| learning rate | 0.0015, cosine, warm-up 0.4%, 16 times that for B |" in card
    assert "gradient norm up to 1" in model_card(plain) and "gradient norm" not in card


def test_the_card_says_what_the_files_of_the_base_have_packed(hub, command, tmp_path):
    save_published(tmp_path / "fp8", "fp8")
    save_tiny(tmp_path / "plain", intermediate_size=128)
    save_quantized(load_model(str(tmp_path / "plain"), "fp4"), tmp_path / "fp4", byte_tokenizer())
    for name, words in (("fp8", "fp8 (E4M3) codes as published"), ("fp4", "fp4 codes as published")):
        run = make_run(tmp_path / f"of {name}", tmp_path / name, lora={"rank": 4, "alpha": 8})
        code, out, err = command("push", run, REPO, "--base-model", BASE, "--dry-run")
        assert code == 0, err
        assert f"| base weights | {words} |" in out and f", trained on {words} with" in out
        assert "- qlora\n" in out and "BitsAndBytesConfig" not in out and "NF4" not in out


def test_a_gpu_leaves_out_what_the_run_did_not_measure(tmp_path):
    unmeasured = {"status": "interrupted", "eval_loss_before": None, "eval_loss_after": float("nan"), "data": None}
    card = model_card(facts(tmp_path, unmeasured, base_model=None, merged_into="original"))
    assert "Results" not in card and "examples |" not in card and "Versions" not in card and "license" not in card
    assert "did not finish" in card and "see its page" in card and "its original weights" in card


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("merged_into", [None, "nf4"])
def test_the_lines_that_use_it_are_python(tmp_path, has_template, merged_into):
    code = model_card(replace(facts(tmp_path, merged_into=merged_into), has_template=has_template)).split(
        "```python\n"
    )[1]
    compile(code.split("```")[0], "card", "exec")
    assert ("apply_chat_template" in code) == has_template and ("peft" in code) == (merged_into is None)

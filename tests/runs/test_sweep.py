"""A sweep: its file, points that are run once, those that fail, those that a sampler chooses, and its page."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_files import write_recipe

from qlora_lite.errors import Interrupted, ModelError, RecipeError
from qlora_lite.ext.sweep import points as sweeps
from qlora_lite.ext.sweep.axes import Range, choices, is_whole, load_sweep, recipe_of_point
from qlora_lite.ext.sweep.page import named, ranked, render_sweep
from qlora_lite.ext.sweep.points import DOES_NOT_FIT, ELSEWHERE, FAILED, as_result, run_sweep
from qlora_lite.files import locked
from qlora_lite.prepare.plan import plan_recipe
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.units import format_bytes

AXES = {"lora.rank": [1, 4], "train.learning_rate": ["auto", 1e-3, 2e-5], "train.seed": [0, 1]}


@pytest.fixture
def lab(tmp_path, model_folder, monkeypatch):
    """A sweep of runs that are not trained: each finds the loss that ``lab.loss`` gives for its settings."""
    write_recipe(tmp_path, model_folder, output={"dir": None})

    class Lab:
        folder, trained, exit_code = tmp_path / "out", [], 0

        def loss(self, settings):
            rate = settings.get("train.learning_rate")
            return 1 / settings.get("lora.rank", 2) + settings.get("train.seed", 0) / 10 + (rate == "auto") * 0.5

        def write(self, **said):
            path = tmp_path / "sweep.yaml"
            path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "axes": AXES} | said))
            return load_sweep(path)

        def run(self, **said):
            sweep = self.write(**said)
            return as_result(sweep, run_sweep(sweep, self.folder, "a sweep"), "a sweep")

        def train(self, command, _log_file):
            overrides = dict(part.split("=", 1) for part in command if "=" in part)
            settings = {key: json.loads(value) for key, value in overrides.items()}
            folder = Path(settings.pop("output.dir"))
            self.trained.append((settings, "--resume" in command))
            folder.mkdir(exist_ok=True)
            (folder / "recipe.yaml").touch()
            if not self.exit_code:
                loss = self.loss(settings)
                scores = {"bleu": {"value": 10 * loss, "standard_error": 1.0, "examples": 9}}
                found = {
                    "status": "complete",
                    "eval_loss_after": loss,
                    "peak_bytes": 2**20,
                    "seconds": 1.0,
                    "metrics": {"after": scores},
                }
                (folder / "summary.json").write_text(json.dumps(found))
            error = "a line\nerror: does not fit: 2 MiB of 1 MiB (of which 1 MiB)\nerror: more\n"
            return self.exit_code, error

    found = Lab()
    monkeypatch.setattr(sweeps, "_in_a_process", found.train)
    return found


def test_every_point_of_a_grid_is_run_once_and_has_mean_and_deviation_over_the_seeds(lab):
    result = lab.run()
    assert len(lab.trained) == 2 * 3 * 2 and len(list((lab.folder / "runs").iterdir())) == 12
    best = ranked(result)[0]
    assert best["choice"] == {"lora.rank": "4", "train.learning_rate": "0.001"}
    assert best["mean"]["eval_loss_after"] == pytest.approx(0.3)
    assert best["standard_deviation"]["eval_loss_after"] == pytest.approx(0.1 / 2**0.5)
    assert json.loads((lab.folder / "sweep.json").read_text()) == result
    lab.run()  # all complete
    lab.run(axes=AXES | {"lora.rank": [1, 4, 8]})
    assert len(lab.trained) == 12 + 6 and {settings["lora.rank"] for settings, _ in lab.trained[12:]} == {8}


def test_a_run_of_an_earlier_version_is_known_by_its_recipe_whatever_its_folder_is_called(lab):
    lab.run()
    sweep, point = lab.write(), {"lora.rank": 4, "train.learning_rate": "auto", "train.seed": 1}
    folder = lab.folder / "runs" / recipe_of_point(sweep, point).recipe_hash[:12]
    settings = yaml.safe_load(resolve_to_yaml(recipe_of_point(sweep, point)))
    del settings["train"]["loraplus_lr_ratio"]  # a setting that its version did not have
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    earlier = folder.rename(folder.with_name("earlier"))
    result = lab.run()
    assert len(lab.trained) == 12
    runs = [run["run"] for point in result["points"] for run in point["runs"]]
    assert f"runs/{earlier.name}" in runs and f"runs/{folder.name}" not in runs


def test_a_score_can_be_the_goal_which_is_to_be_high(lab, tmp_path, model_folder):
    write_recipe(tmp_path, model_folder, train={"metrics": ["exact_match", "bleu"]}, output={"dir": None})
    result = lab.run(axes={"train.learning_rate": [1e-3, "auto"], "train.seed": [0, 1]}, goal="bleu")
    assert [point["choice"]["train.learning_rate"] for point in ranked(result)] == ["auto", "0.001"]
    assert ranked(result)[0]["mean"]["bleu_after"] == pytest.approx(10.5)
    assert "10.5 ± 0.7" in (lab.folder / "sweep.html").read_text()


def test_settings_reach_the_recipe_as_they_are_written(lab):
    targets = {"some": {"lora.targets": ["q_proj"], "lora.alpha": 3}, "all": {"lora.targets": "all-linear"}}
    axes = {"model.quant": ["none", "nf4"], "lora.dropout": [1e-05], "lora.rslora": [True, False], "on": targets}
    sweep = lab.write(axes=axes)
    recipes = {tuple(point.values()): recipe_of_point(sweep, sweep.settings(point)) for point in sweep.grid()}
    assert len({recipe.recipe_hash for recipe in recipes.values()}) == 8
    some, every = recipes["1e-05", "true", "none", "some"], recipes["1e-05", "false", "nf4", "all"]
    assert (some.lora.targets[0].pattern, some.lora.alpha, some.lora.rslora) == ("q_proj", 3, True)
    assert (every.lora.targets[0].pattern, every.lora.rslora, every.model.quant) == ("all-linear", False, "nf4")
    assert some.lora.dropout == 1e-05 and some.model.quant == "none"


def test_any_character_reaches_the_recipe_and_alike_labels_are_told_apart(lab):
    lab.run(axes={"train.exact_match_pattern": ["\U0001f415"]})
    assert lab.trained[0][0]["train.exact_match_pattern"] == "\U0001f415"
    assert [*choices("data.template", ["null", None])] == ['"null"', "null"]


def test_a_point_that_does_not_fit_or_fails_is_told_and_the_others_run(lab):
    lab.exit_code = 3
    result = lab.run(axes={"lora.rank": [1, 4], "train.seed": [0, 1]})
    assert len(lab.trained) == 2  # its other seed needs as much
    point = result["points"][0]
    assert (point["status"], point["runs"][0]["error"]) == (DOES_NOT_FIT, "2 MiB of 1 MiB")
    page = (lab.folder / "sweep.html").read_text()
    assert "2 MiB of 1 MiB" in page and "0 of 2 points complete, 2 seeds each" in page
    lab.exit_code = 1
    assert lab.run(axes={"lora.rank": [8]})["points"][0]["status"] == FAILED


def test_the_command_fails_where_no_point_can_be_run(lab, command):
    for lab.exit_code, expected in ((1, 1), (3, 1), (0, 0)):
        lab.write(axes={"lora.rank": [1 + lab.exit_code]})
        code, out, _ = command("sweep", lab.folder.parent / "sweep.yaml", "--out", lab.folder)
        assert code == expected and "page: " in out


def test_a_run_that_was_killed_says_so(lab):
    lab.exit_code = -9
    point = lab.run(axes={"lora.rank": [1]})["points"][0]
    assert (point["status"], point["runs"][0]["error"]) == (
        FAILED,
        "the run was killed by SIGKILL, perhaps for the memory that it took",
    )


def test_a_folder_whose_name_means_something_in_yaml_holds_the_runs(lab, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(sweeps, "_in_a_process", lambda command, _log_file: commands.append(command) or (1, ""))
    lab.folder = tmp_path / "rank: 4 #2"
    lab.run(axes={"lora.rank": [4]})
    recipe = load_recipe(tmp_path / "recipe.yaml", [part for part in commands[0] if "=" in part])
    assert Path(recipe.output.dir).parent == lab.folder / "runs"


def test_a_stopped_sweep_goes_on_within_the_run_and_leaves_alone_what_another_process_runs(lab):
    lab.exit_code = 130
    axes = {"train.learning_rate": [1e-3, 2e-3]}
    with pytest.raises(Interrupted):
        lab.run(axes=axes)
    assert len(lab.trained) == 1
    lab.exit_code = 0
    (begun,) = (lab.folder / "runs").iterdir()
    with locked(begun):
        assert [point["status"] for point in lab.run(axes=axes)["points"]] == [ELSEWHERE, "complete"]
    assert [point["status"] for point in lab.run(axes=axes)["points"]] == ["complete"] * 2
    assert [resumed for _, resumed in lab.trained] == [False, False, True]


def test_a_sampler_finds_the_valley_goes_on_after_a_stop_and_runs_no_trial_twice(lab):
    pytest.importorskip("optuna")
    lab.loss = lambda settings: (settings["train.learning_rate"] * 1000 - 3) ** 2 + settings["lora.rank"]
    said = {
        "axes": {"lora.rank": {"from": 1, "to": 8}, "train.learning_rate": {"from": 1e-4, "to": 1e-2, "log": True}},
        "search": "tpe",
        "trials": 30,
    }
    lab.exit_code = 130
    with pytest.raises(Interrupted):
        lab.run(**said)
    (stopped, _), lab.exit_code = lab.trained.pop(), 0
    result = lab.run(**said)
    assert (lab.trained[0][0], lab.trained[0][1]) == (stopped, True)
    assert len(result["points"]) == 30
    best = ranked(result)[0]["choice"]
    assert best["lora.rank"] <= 2 and 2e-3 < best["train.learning_rate"] < 4e-3
    count = len(lab.trained)
    assert lab.run(**said)["points"][0]["choice"] == result["points"][0]["choice"] and len(lab.trained) == count


def test_a_range_is_of_whole_numbers_if_its_ends_are_and_no_fraction_can_be_meant():
    names = "memory.uncheckpointed_layers", "lora.start_alternations", "lora.rank", "lora.alpha", "lora.dropout"
    for low, expected in ((0, [True, True, True, False, False]), (1, [True] * 5), (0.5, [False] * 5)):
        numbers = Range.model_validate({"from": low, "to": 8.0})
        assert [is_whole(name, numbers) for name in names] == expected


def test_a_point_whose_process_was_killed_is_the_first_to_go_on_unless_another_is_at_work_on_it(lab, monkeypatch):
    pytest.importorskip("optuna")
    lab.loss = lambda settings: settings["train.learning_rate"]
    said = {"axes": {"train.learning_rate": {"from": 1e-4, "to": 1e-2}}, "search": "random", "trials": 3}
    train = lab.train

    def die(*arguments):
        train(*arguments)
        (folder,) = (lab.folder / "runs").iterdir()
        (folder / "summary.json").unlink()
        raise SystemExit

    monkeypatch.setattr(sweeps, "_in_a_process", die)
    with pytest.raises(SystemExit):
        lab.run(**said)
    monkeypatch.setattr(sweeps, "_in_a_process", train)
    ((killed, _),), (begun,) = lab.trained, (lab.folder / "runs").iterdir()
    with locked(begun):
        lab.run(**said | {"trials": 1})
    assert lab.trained[1][0] != killed
    assert len(lab.run(**said)["points"]) == 3 and lab.trained[2] == (killed, True) and len(lab.trained) == 4


def test_what_a_sampler_draws_is_run_and_shown_once_and_is_failed_where_it_does_not_go_together(lab):
    optuna = pytest.importorskip("optuna")
    from optuna.storages.journal import JournalFileBackend

    lab.loss = lambda settings: 1.0
    axes = {"train.merge_aware": ["off", "nf4"], "adapter.method": ["lora", "dora"]}
    found = lab.run(axes=axes, search="random", trials=20)
    status = {tuple(point["choice"][axis] for axis in axes): point["status"] for point in found["points"]}
    assert len(status) == len(found["points"]) == 4 and len(lab.trained) == 3
    assert [each for each in status if status[each] == FAILED] == [("nf4", "dora")]
    (failed,) = (point["runs"][0]["error"] for point in found["points"] if point["status"] == FAILED)
    assert "not possible with train.merge_aware nf4" in failed
    lab.run(axes=axes, search="random", trials=20)
    assert len(lab.trained) == 3
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(lab.folder / "optuna.log")))
    left = optuna.load_study(study_name=lab.folder.name, storage=storage).ask()  # as a kill leaves it
    left.set_user_attr("choice", next(point["choice"] for point in found["points"] if point["status"] == FAILED))
    assert lab.run(axes=axes, search="random", trials=21) and len(lab.trained) == 3
    wrong = lab.write(axes=axes, search="random")
    (lab.folder.parent / "recipe.yaml").write_text("model: {}\n")
    with pytest.raises(RecipeError, match="model"):
        run_sweep(wrong, lab.folder, "a sweep")


@pytest.mark.parametrize(
    "axes",
    [
        {"lora.rank": {"from": 1, "to": 8, "log": True}, "train.learning_rate": [1e-3]},
        {"lora.rank": {"from": 1, "to": 8}, "train.learning_rate": [1e-3, 1e-4]},
        {"lora.rank": {"from": 1, "to": 8}, "train.learning_rate": [1e-3], "lora.alpha": [8]},
    ],
)
def test_a_study_of_other_axes_is_one_error_and_one_of_another_range_goes_on(lab, axes):
    pytest.importorskip("optuna")
    said = {"axes": {"lora.rank": {"from": 1, "to": 8}, "train.learning_rate": [1e-3]}, "search": "random"}
    lab.run(**said, trials=2)
    with pytest.raises(RecipeError, match=r"has a study with other values of .*; choose another --out"):
        lab.run(search="random", axes=axes)
    wider = said["axes"] | {"lora.rank": {"from": 9, "to": 16}}
    result = lab.run(axes=wider, search="random", trials=3)
    assert len(lab.trained) == len(result["points"]) and result["points"][-1]["choice"]["lora.rank"] > 8


def test_a_study_of_another_goal_is_one_error(lab, tmp_path, model_folder):
    pytest.importorskip("optuna")
    write_recipe(tmp_path, model_folder, train={"metrics": ["bleu"]}, output={"dir": None})
    said = {"axes": {"lora.rank": {"from": 1, "to": 8}}, "search": "random", "trials": 1}
    lab.run(**said)
    for goal in ("bleu", "answer_loss"):
        write_recipe(tmp_path, model_folder, train={"metrics": ["bleu", "answer_loss"]}, output={"dir": None})
        with pytest.raises(RecipeError, match=r"has a study with another goal; choose another --out"):
            lab.run(**said, goal=goal)


def test_a_sampler_without_optuna_says_what_to_install(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModelError, match=r"pip install 'optuna>=4.2'; or write search: grid"):
        lab.run(axes={"lora.rank": [1]}, search="random")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"axes": {}}, "axes"),
        ({"axes": {"lora.rank": 3}}, r"axes\.lora\.rank: write a list of values, \{from: 1, to: 2\}, or a mapping"),
        ({"axes": {"lora.rank": []}}, r"axes\.lora\.rank: write a list of values"),
        ({"axes": {"lora.rank": {"from": 4, "to": 1}}, "search": "tpe"}, "from must be below to"),
        ({"axes": {"lora.rank": {"from": 1, "to": 4}}}, "a range is for search tpe or random"),
        ({"axes": {"train.seed": [0, 1]}}, r"name another one than train\.seed"),
        ({"axes": {"output.dir": ["a"]}}, "the sweep itself says where its runs go"),
        ({"axes": {"x": {"a": {"output.name": "b"}}}}, "the sweep itself says where its runs go"),
        (
            {"axes": {"lora.rank": [1], "x": {"a": {"lora.rank": 8}}}},
            r"axes\.x: lora\.rank is set by axes\.lora\.rank too",
        ),
        ({"axes": {"lora.rank": [1]}, "gaol": "eval_loss"}, "gaol: is no key of a sweep"),
        ({"model": {"path": "x"}}, "this is a recipe, not a sweep of one"),
        ({"axes": {"lora.rank": [1]}, "goal": "f1"}, "goal: must be 'eval_loss', 'exact_match'"),
    ],
)
def test_a_wrong_sweep_is_one_error_that_names_the_place(lab, said, message):
    with pytest.raises(RecipeError, match=message) as caught:
        lab.write(**said)
    assert "sweep.yaml: " in str(caught.value)


def test_a_wrong_setting_of_any_point_is_an_error_before_the_first_runs(lab):
    with pytest.raises(RecipeError, match=r"axes: lora\.rank = 0: must be a whole number"):
        lab.run(axes={"lora.rank": [4, 0]})
    with pytest.raises(RecipeError, match=r"lora\.rnk"):
        lab.run(axes={"lora.rnk": [4]})
    assert not lab.trained and not lab.folder.exists()


@pytest.mark.parametrize(
    ("train", "data", "goal", "why"),
    [
        ({"metrics_examples": 0}, {}, "exact_match", r"train\.metrics_examples is 0"),
        ({"metrics": ["bleu"]}, {}, "accuracy_likelihood", r"train\.metrics is bleu"),
        ({"metrics_examples": 0}, {"eval": None}, "eval_loss", "there are no evaluation rows"),
    ],
)
def test_a_goal_that_no_run_measures_is_an_error_before_the_first_runs(train, data, goal, why, lab, model_folder):
    recipe = yaml.safe_load((lab.folder.parent / "recipe.yaml").read_text())
    sections = {name: recipe.get(name, {}) | said for name, said in (("train", train), ("data", data))}
    (lab.folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections))
    with pytest.raises(RecipeError, match=f"goal: {goal} is not measured: {why}"):
        lab.run(axes={"lora.rank": [1]}, goal=goal)
    assert not lab.trained


def test_rows_that_were_written_anew_since_a_run_began_are_told(lab, caplog):
    lab.run(axes={"lora.rank": [1]})
    (run,) = (lab.folder / "runs").iterdir()
    lab.run(axes={"lora.rank": [1]})
    assert "written anew" not in caplog.text
    rows = Path(yaml.safe_load((lab.folder.parent / "recipe.yaml").read_text())["data"]["train"])
    os.utime(rows, (time.time() + 60,) * 2)
    lab.run(axes={"lora.rank": [1, 4]})
    assert caplog.text.count(f"sweep: {rows} was written anew after the run {run} had begun, whose figures are of") == 1


def test_labels_of_a_chart_are_text(lab):
    lab.run(axes={"size": {"<|im_start|>": {"lora.rank": 1}, "<b>": {"lora.rank": 4}}})
    page = (lab.folder / "sweep.html").read_text()
    assert "<|im_start|>" not in page and "<b>" not in page and "&lt;b&gt;" in page


def test_the_page_names_what_no_point_beats_and_escapes_what_it_is_given():
    points = [
        {
            "choice": {"<a>": label},
            "status": "complete",
            "runs": [],
            "standard_deviation": {},
            "mean": {"exact_match_after": match, "peak_bytes": size},
        }
        for label, match, size in (("x", 0.5, 100), ("y", 0.9, 200), ("z", 0.4, 300))
    ]
    page = render_sweep({"name": "n", "goal": "exact_match", "axes": ["<a>"], "seeds": 1, "points": points})
    assert "<a>" not in page and "&lt;a&gt;" in page and "90.0%" in page
    lines = re.findall(r'<polyline class="line-2" points="([^"]*)"', page)
    assert len(lines[-1].split()) == 2  # x and y; z is beaten in both
    assert named(points[0]) == "<a> x"


@pytest.mark.parametrize("handler", ["lambda *_: (print('error: saved', file=sys.stderr), sys.exit(130))", "0"])
def test_a_signal_is_handed_on_once_and_the_run_is_waited_for(tmp_path, monkeypatch, handler):
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, {handler})\n"  # 0: it has none yet, and is killed
        "print('ready', file=sys.stderr, flush=True)\n"
        "time.sleep(30)\n"
    )

    class Stopped(subprocess.Popen):
        def wait(self, *arguments):
            if self.returncode is None and not hasattr(self, "was_told"):
                while "ready" not in (tmp_path / "log").read_text():
                    time.sleep(0.01)
                self.was_told = True
                raise KeyboardInterrupt
            return super().wait(*arguments)

    monkeypatch.setattr(sweeps.subprocess, "Popen", Stopped)
    exit_code, said = sweeps._in_a_process([sys.executable, "-c", script], tmp_path / "log")
    assert (exit_code, said) == (130, "ready\n" + ("" if handler == "0" else "error: saved\n"))


def test_a_point_by_the_command_line(tmp_path, model_folder):
    write_recipe(tmp_path, model_folder, output={"dir": None}, train={"max_steps": 2, "metrics_examples": 0})
    (tmp_path / "small.yaml").write_text("recipe: recipe.yaml\naxes: {lora.rank: [2]}\n")
    command = [sys.executable, "-m", "qlora_lite", "sweep", "small.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lora.rank 2" in done.stdout and (tmp_path / "sweeps" / "small" / "sweep.html").is_file()
    result = json.loads((tmp_path / "sweeps" / "small" / "sweep.json").read_text())
    assert [point["status"] for point in result["points"]] == ["complete"]
    run = tmp_path / "sweeps" / "small" / result["points"][0]["runs"][0]["run"]
    assert (run / "report.html").is_file() and (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_grid_is_planned_point_by_point_and_what_a_plan_does_not_depend_on_once(lab, command, monkeypatch):
    made = []
    monkeypatch.setattr(sweeps, "plan_recipe", lambda *given: made.append(given) or plan_recipe(*given))
    lab.write(axes={"lora.rank": [1, 4], "train.learning_rate": ["auto", 1e-3], "train.seed": [0, 1]})
    code, out, err = command("sweep", lab.folder.parent / "sweep.yaml", "--plan")
    assert code == 0 and len(made) == 2 and not lab.trained, err
    lines = out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:5]] == [
        f"lora.rank {rank}, train.learning_rate {rate}" for rank in (1, 4) for rate in ("auto", "0.001")
    ]
    plan = plan_recipe(*made[0])
    assert lines[1].split()[:2] == format_bytes(plan.peak_bytes).split() and "2 of each" in out


def test_points_that_do_not_fit_are_told_from_others_before_any_is_trained(lab, command):
    lab.write(axes={"memory.budget": ["200MiB", "8GiB"]})
    code, out, _ = command("sweep", lab.folder.parent / "sweep.yaml", "--plan")
    assert code == 0 and re.search(r"memory.budget 200MiB  does not fit in 200.0 MiB\n.* memory.budget 8GiB\n", out)


def test_a_search_is_not_planned_beforehand(lab, command):
    lab.write(search="random", trials=2, axes={"lora.rank": {"from": 1, "to": 9}})
    code, _, err = command("sweep", lab.folder.parent / "sweep.yaml", "--plan")
    assert code == 2 and "--plan is for a grid: search random" in err

"""The page about a run: what it shows, that it loads nothing, and that broken runs do not break it."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_lite.artifacts.run_files import read_run
from qlora_lite.reporting.charts import Series, line_chart, log_ticks, nice_ticks, short_number, smooth, thin
from qlora_lite.reporting.page import text as html_text
from qlora_lite.reporting.report import write_report

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="a()">&'\"""" + "\x1b[2J\u202e\u2028"
SUMMARY = {
    "status": "complete",
    "name": "orders",
    "model": "tiny.gguf",
    "device": "cpu",
    "steps": 3,
    "seconds": 125.0,
    "started": "2026-11-25T09:14:22+00:00",
    "tokens": 53077,
    "target_tokens": 20152,
    "peak_bytes": 3 * 2**29,
    "tokens_per_second": 208.4,
    "trainable_parameters": 4884480,
    "adapter_sha256": "ab" * 32,
    "eval_loss_before": 1.5714,
    "eval_loss_after": 0.0213,
    "exact_match_before": 0.0,
    "exact_match_after": 0.925,
    "exact_match_rows": 120,
    "versions": {"torch": "2.13.0"},
    "data": {"rows_read": 1960, "packing_efficiency": 0.984},
    "other_results": [],
    "samples": [{"prompt": "two pies for mon", "reference": "{2}", "before": "I am sorry", "after": "{2}"}],
    "memory_table": [
        {"group": "base weights", "dtype": "nf4", "device": "cpu", "bytes": 2**20, "why": "frozen"},
        {"group": "adapter", "dtype": "bfloat16", "device": "cpu", "bytes": 2**19, "why": "trained"},
    ],
}
RECIPE = "model:\n  path: tiny.gguf\ntrain:\n  learning_rate: 0.001\n  trackers: []\n"


def metric(step, loss, **more):
    line = {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 200.0}
    return line | {"peak_bytes": 2**30 + step, "tokens": 100, "seconds": 1.0} | more


METRICS = [
    {"step": 0, "eval_loss": 1.5714, "exact_match": 0.0},
    *(metric(step, 2.0 / step) for step in range(1, 21)),
    {"step": 20, "eval_loss": 0.0213, "exact_match": 0.925},
]


@pytest.fixture
def report(tmp_path):
    """Write a run folder from its parts (None: the file is missing) and return the page's text."""

    def write(summary=SUMMARY, metrics=METRICS, recipe=RECIPE):
        if summary is not None:
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        if metrics is not None:
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(recipe)
        path = write_report(tmp_path)
        assert path == tmp_path / "report.html"
        return path.read_text(encoding="utf-8")

    return write


class Elements(HTMLParser):
    """Collect the tags, the attributes and the text of a page; checks that every tag is closed."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def everywhere(value, text):
    """Replace every string inside a value by `text`, dict keys too."""
    if isinstance(value, dict):
        return {key: everywhere(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [everywhere(inner, text) for inner in value]
    return text if isinstance(value, str) else value


def test_the_headline_figures_are_shown_from_before_to_after(report):
    text = Elements(report()).text
    for words in [
        "Exact match 0 % → 92.5 % 120 held-out examples",
        "Evaluation loss 1.57 → 0.0213",
        "Peak memory 1.5 GiB",
        "Tokens per second 208.4 53,077 in total",
        "Time 2m 05s 3 steps",
        "orders complete",
        "2026-11-25 09:14:22 UTC",
    ]:
        assert words in text


def test_what_ended_the_run_is_shown(report):
    assert "ended by train.early_stopping_patience" in report(SUMMARY | {"ended_by": "train.early_stopping_patience"})
    assert "ended by" not in report()


def test_settings_versions_data_and_memory_are_shown(report):
    text = Elements(report()).text
    for words in [
        "learning_rate 0.001",
        "trackers []",
        "torch 2.13.0",
        "rows read 1,960",
        "weights 4,884,480",
        "base weights nf4 cpu 1.0 MiB frozen",
        "total cpu 1.5 MiB",
    ]:
        assert words in text


def test_counts_are_in_words_and_what_the_plan_chose_stands_beside_the_recipe(report):
    counts = {"dropped": {"left out by their weight": 1099, "malformed row": 2}, "packing_efficiency": 0.94667}
    chosen = {"memory.uncheckpointed_layers": 16, "memory.embeddings": "host"}
    text = Elements(report(SUMMARY | {"data": counts, "plan": {"chosen": chosen}})).text
    assert "dropped 1,099 left out by their weight, 2 malformed row" in text and "packing efficiency 0.947" in text
    assert "as planned memory.uncheckpointed_layers 16 memory.embeddings host" in text


def test_of_a_list_of_data_files_only_what_is_set_is_shown(report):
    recipe = "data:\n  train:\n  - {path: a.jsonl, weight: 1.0, format: null}\n  - {path: b.csv}\n"
    assert "train path: a.jsonl, weight: 1.0; path: b.csv" in Elements(report(recipe=recipe)).text


def test_a_sample_answer_is_marked_as_equal_or_not(report):
    text = Elements(report()).text
    assert "Expected {2} Before ✗ I am sorry After ✓ {2}" in text
    by_pattern = SUMMARY["samples"][0] | {"before_matches": True, "after_matches": False}
    assert "Before ✓ I am sorry After ✗ {2}" in Elements(report(SUMMARY | {"samples": [by_pattern]})).text


def test_every_curve_is_drawn(report):
    tags = Elements(report()).tags
    assert tags.count("svg") == 6  # loss for wide and narrow screens, and four small ones
    assert tags.count("polyline") == 2 * 3 + 1 + 2 + 2 + 1  # noisy curves also have their average


def test_the_page_loads_nothing(report):
    page = Elements(report())
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "poster", "xlink:href"}
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    html = report()
    assert "://" not in html and "@import" not in html and "url(" not in html
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


def test_hostile_text_anywhere_stays_text(report):
    plain = Elements(report())
    summary = everywhere(SUMMARY, HOSTILE) | {"versions": {HOSTILE: HOSTILE}, "error": HOSTILE}
    summary["data"] = {HOSTILE: 1}
    recipe = json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "list": [HOSTILE], "loose": HOSTILE})
    page = Elements(report(summary, recipe=recipe))
    assert page.tags.count("script") == plain.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert(1)") > 15
    assert page.text.count(r"\x1b[2J\u202e") > 15 and not {"\x1b", "\u202e", "\u2028"} & {*page.text}


def test_text_is_also_safe_inside_an_attribute():
    assert html_text("\"'<>&") == "&quot;&#x27;&lt;&gt;&amp;"


def test_a_recipe_that_is_not_yaml_is_shown_as_it_is(report):
    page = Elements(report(recipe="a: [1\n<script>b</script>"))
    assert "a: [1 <script>b</script>" in page.text and page.tags.count("script") == 1


def test_a_loss_that_is_not_finite_is_a_gap_a_mark_and_a_notice(report):
    metrics = [metric(1, 2.0), metric(2, 1.0), metric(3, math.nan), metric(4, None), metric(5, 1.0)]
    html = report(SUMMARY | {"status": "failed", "eval_loss_after": math.nan}, metrics)
    page = Elements(html)
    assert "The loss was not finite at 2 of 5 steps, first at step 3." in page.text
    assert "1.57 → not finite" in page.text
    assert html.count('class="gap"') == 2 and "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())
    assert 'class="status bad"' in html


def test_the_reason_of_a_failed_run_is_shown(report):
    assert "out of luck" in Elements(report(SUMMARY | {"error": "out of luck"})).text


def test_settings_that_change_results_are_told(report):
    assert "another head" in Elements(report(SUMMARY | {"other_results": ["another head"]})).text


def test_a_missing_recipe_is_said_and_the_rest_is_shown(report):
    text = Elements(report(recipe=None)).text
    assert "recipe.yaml is missing" in text and "92.5 %" in text and "Settings" not in text


def test_missing_metrics_are_said_and_the_rest_is_shown(report):
    text = Elements(report(metrics=None)).text
    assert "metrics.jsonl is missing" in text and "92.5 %" in text and "learning_rate 0.001" in text


def test_a_run_that_wrote_nothing_but_an_empty_recipe_and_summary_gives_a_page_that_says_so(report):
    text = Elements(report({}, None, "")).text
    assert "unfinished" in text and "metrics.jsonl is missing" in text and "Nothing was recorded" in text


def test_without_a_summary_the_figures_come_from_the_metrics(report):
    text = Elements(report(summary=None)).text
    for words in ["0 % → 92.5 %", "1.57 → 0.0213", "Peak memory 1.0 GiB", "20 steps"]:
        assert words in text


def test_figures_of_earlier_versions_have_the_names_of_today(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "labelled_tokens": 7}\n{"step": 1, "eval_labelled_tokens": 5}\n'
    )
    (tmp_path / "summary.json").write_text('{"labelled_tokens": 9}')
    found = read_run(tmp_path)
    assert found.metrics == [{"step": 1, "target_tokens": 7}, {"step": 1, "eval_target_tokens": 5}]
    assert found.summary == {"target_tokens": 9}


def test_a_last_line_that_is_cut_short_is_counted_and_left_out(report, tmp_path):
    report()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.')
    assert "1 of 23 lines of metrics.jsonl could not be read" in Elements(write_report(tmp_path).read_text()).text


def test_a_summary_that_is_cut_short_is_said(report, tmp_path):
    report()
    (tmp_path / "summary.json").write_text('{"status": "comp')
    assert "no complete summary.json" in Elements(write_report(tmp_path).read_text()).text


@pytest.mark.parametrize("odd", ["text", 10**400, math.inf, -1, True, [], {}, None])
def test_values_of_an_odd_type_do_not_break_the_page(report, tmp_path, odd):
    summary = {key: odd for key in SUMMARY}
    metrics = [{key: odd for key in metric(1, 1.0)} | {"step": 1}, {"step": odd, "loss": 1.0}]
    Elements(report(summary, metrics))
    odd_rows = [{key: odd for key in row} for row in SUMMARY["memory_table"]]
    Elements(report(SUMMARY | {"memory_table": [*odd_rows, odd], "samples": [odd, {"prompt": odd}]}))
    row = dict.fromkeys(("name", "loss", "kl", "more_bytes", "keep_16bit"), odd)
    for damage in (odd, {"models": odd, "sets": odd}, {"models": [row | {"group": "type"}, odd], "sets": [row, odd]}):
        (tmp_path / "damage.json").write_text(json.dumps(damage))
        Elements(report())


def test_a_run_of_one_step_is_a_dot(report):
    html = report(metrics=[metric(1, 1.0)])
    assert "<circle" in html and "<polyline" not in html


def test_a_step_that_was_repeated_after_a_resume_counts_once(report):
    html = report(metrics=[metric(1, 4.0), metric(2, 3.0), metric(2, 1.0)])
    assert "step 2: training 1" in html and "training 3" not in html


def test_the_command_makes_the_page_of_a_run_that_was_killed(report, command, tmp_path):
    report(SUMMARY | {"status": "running"})
    (tmp_path / "report.html").unlink()
    (tmp_path / "summary.json").write_text('{"status": "run')
    assert command("report", tmp_path) == (0, f"wrote {tmp_path / 'report.html'}\n", "")
    assert "no complete summary.json" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_not_there_or_is_no_run_s_is_an_error(command, tmp_path, name):
    code, out, err = command("report", tmp_path / name)
    assert (code, out) == (2, "") and err.startswith(f"error: {tmp_path / name} is not a run folder; give the")
    assert not list(tmp_path.iterdir())


def test_a_report_of_the_user_s_own_beside_their_recipe_stays_as_it_is(command, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "report.html").write_text("my own")
    (tmp_path / "checkpoints").mkdir()
    for name in ("report", "damage"):
        code, out, err = command(name, tmp_path)
        assert (code, out) == (2, "") and "is not a run folder" in err, name
    assert (tmp_path / "report.html").read_text() == "my own"
    (tmp_path / "checkpoints" / "step-00000002").mkdir()  # of a run that has lost all else
    assert command("report", tmp_path)[0] == 0 and "<html" in (tmp_path / "report.html").read_text()


def test_a_long_series_keeps_its_spikes_its_ends_and_its_gaps():
    points = [(step, 1.0) for step in range(100_000)]
    points[777], points[50_000] = (777, 9.0), (50_000, math.nan)
    short = thin(points)
    assert len(short) < 700
    assert {points[0], points[777], points[50_000], points[-1]} <= set(short)
    assert short == sorted(short, key=lambda point: point[0])


def test_the_average_of_a_constant_is_that_constant_from_the_first_point():
    points = [(1, 5.0), (2, math.nan), (3, 5.0), (4, 5.0)]
    assert [(step, round(value, 12)) for step, value in smooth(points, 10)] == [(1, 5.0), (3, 5.0), (4, 5.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1.2, [0, 0.5, 1, 1.5]), (0, 0, [0, 0.5, 1]), (0, 610, [0, 200, 400, 600, 800])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert nice_ticks(low, high, 4) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis_enclose_the_values():
    assert log_ticks(0.03, 1.4) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(0.0003, 1.4) == pytest.approx([0.0001, 0.001, 0.01, 0.1, 1, 10])


def test_numbers_are_short():
    assert [short_number(v) for v in (0.0, 0.00025, 0.5, 236.44, 11800.0)] == [
        "0",
        "0.00025",
        "0.5",
        "236.4",
        "11,800",
    ]
    assert short_number(math.inf) == "not finite"


def test_a_higher_value_is_drawn_higher_and_a_later_step_further_right():
    def corners(log):
        svg = line_chart([Series("loss", [(1, 1.0), (2, 100.0), (3, 10.0)])], title="loss", log=log)
        pairs = re.search(r'<polyline[^>]*points="([^"]*)"', svg)[1].split()
        return [tuple(map(float, pair.split(","))) for pair in pairs]

    (x1, y1), (x2, y2), (x3, y3) = corners(log=False)
    assert x1 < x2 < x3 and y1 > y3 > y2 and (y1 - y3) / (y1 - y2) == pytest.approx(1 / 11, abs=0.01)
    (_, y1), (_, y2), (_, y3) = corners(log=True)
    assert (y1 - y3) / (y1 - y2) == pytest.approx(0.5, abs=0.01)


@given(st.lists(st.floats(), min_size=1, max_size=30), st.booleans())
@example([5e-324], False)
@example([0.0, 1e-308], False)
def test_any_values_give_a_chart_inside_its_frame(values, log):
    svg = line_chart([Series("x", list(enumerate(values)), dots=True)], title="x", log=log)
    for y in re.findall(r' c?y="(-?[\d.e+-]+|nan|inf)"', svg):
        assert -1 <= float(y) <= 191


def test_scores_stand_before_in_and_after_training_as_far_as_they_are_numbers(report):
    score = {"value": 0.25, "standard_error": 0.05, "examples": 76}
    before = {
        "exact_match": score,
        "bleu": {"value": 31.25, "standard_error": None, "examples": 76, "signature": "s:1"},
    }
    after = {"exact_match": score | {"value": 0.5}, "bleu": {"value": "x"}, "rouge1": 7, "chrf": {"value": 10**400}}
    lines = [*METRICS, {"step": 10, "exact_match": 0.375}]
    page = report(SUMMARY | {"metrics": {"before": before, "after": after}}, lines)
    assert "25.0% ± 5.0%" in page and "50.0% ± 5.0%" in page and "0.375 (step 10)" in page
    assert "31.2" in page and "s:1" in page and "rouge1" not in page and "inf" in page
    for broken in (None, 7, {"before": 3}, {"after": {"bleu": None}}):
        assert "<h2>Scores</h2>" not in report(SUMMARY | {"metrics": broken})


def test_several_processes_are_listed_with_what_each_held_and_how_long_it_computed(report):
    ranks = [{"peak_bytes": 2**30, "computing_seconds": 1.5, "waiting_seconds": 0.25}, {"peak_bytes": 2**29}]
    page = report(SUMMARY | {"ranks": ranks})
    for row in (["rank 0", "1.0 GiB", "1.5s", "0.2s"], ["rank 1", "512.0 MiB", "", ""]):
        assert "".join(f"<td{style}>{cell}</td>" for cell, style in zip(row, RANK_STYLES, strict=True)) in page
    assert "<h2>Processes</h2>" not in report(SUMMARY)
    Elements(report(SUMMARY | {"ranks": [{"peak_bytes": math.inf, "waiting_seconds": -1}, 3]}))


RANK_STYLES = "", *3 * [' class="number"']

"""Markdown tables of what the studies found: printed by each, and put into tools/results by render_results."""

from collections.abc import Mapping, Sequence

from bench.tables import NAMES, name_of
from qlora_lite.units import format_bytes, format_count, format_seconds


def head_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/head``."""
    lines = [
        "| model | text, tokens | loss: 16 bit, NF4 | difference (standard error) | perplexity: 16 bit, NF4 "
        "| KL, nats | same first choice | head: 16 bit, NF4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        sizes = ", ".join(format_bytes(row[f"head_bytes_{kind}"]) for kind in ("16_bit", "nf4"))
        lines.append(
            f"| {name_of(row)} | {row['text']}, {row['tokens']:,} | {row['loss_16_bit']:.4f}, {row['loss_nf4']:.4f} "
            f"| {row['loss_difference']:+.4f} ({row['standard_error']:.4f}) "
            f"| {row['perplexity_16_bit']:.2f}, {row['perplexity_nf4']:.2f} | {row['kl']:.4f} "
            f"| {row['agreement']:.1%} | {sizes} |"
        )
    return lines


def damage_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/damage``."""
    lines = [
        "| model, task, rows | what is in 16 bit | more bytes: of the 4-bit layers, of the base | KL on these "
        "rows, on others | closed | loss on these rows, on others | closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        plain, four, *rest = case["checked"]
        title = f"{name_of(case)}, {case['task'].upper()}, {case['rows']} and {case['other_rows']}"
        more = {"nothing": 0} | {each["asked"]: each["more_bytes"] for each in case["sets"]}
        for row, (asked, size) in zip([four, *rest], more.items(), strict=True):
            shares = ", ".join(f"{size / case[whole]:.1%}" for whole in ("packed_bytes", "base_bytes"))
            kept = ", ".join(f"`{pattern}`" for pattern in row["keep_16bit"])
            cells = [title, f"{asked}: {kept}" if kept else asked, shares if size else ""]
            for key in ("kl", "loss"):
                figures = [[each[part][key] for part in ("rows", "others")] for each in (plain, four, row)]
                gaps = [
                    f"{(was - now) / (was - best):.0%}" if was > best else "no gap"
                    for best, was, now in zip(*figures, strict=True)
                ]
                cells += [", ".join(f"{value:.4f}" for value in figures[2]), ", ".join(gaps)]
            lines.append(f"| {' | '.join(cells)} |")
        losses = ", ".join(f"{plain[part]['loss']:.4f}" for part in ("rows", "others"))
        lines.append(f"| {title} | all | | | | {losses} | |")
    return lines


def learning_rate_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/learning_rates``: a row for each model and task."""
    models = result["models"]
    rates = [rate for rate in next(iter(models.values()))["mean_loss"] if rate != "auto"]
    lines = [
        f"| model, task | before | {' | '.join(f'{float(rate):.2g}' for rate in rates)} | auto | above the best "
        "| measured on |",
        "|---" * (len(rates) + 5) + "|",
    ]
    for case, row in models.items():
        model, task = case.split(", ")
        losses = [_loss(row, rate) for rate in rates]
        auto = f"{_loss(row, 'auto')} at {row['auto']:.2g}"
        lines.append(
            f"| {NAMES[model]}, {task} | {row['loss_before']:.3f} | {' | '.join(losses)} | {auto} "
            f"| {row['auto_over_best']:+.1%} | {row['processor']}, {row['date']} |"
        )
    return lines


def _loss(row: Mapping, rate: str) -> str:
    return f"{row['mean_loss'][rate]:.4f} ± {row['standard_deviation'][rate]:.4f}"


def study_tables(result: Mapping) -> list[str]:
    """Return the lines of the tables of ``tools/experiments/study``: for each part, model and task, best loss first."""
    tables: dict[tuple[str, str], list[Mapping]] = {}  # a table's title and place, and what it is of: ranks are in one
    for case, found in result["cases"].items():
        part, model, task = case.rsplit(", ", 2)
        title = STUDY[part.split()[0]]
        tables.setdefault((title, f"{NAMES[model]}, {task}"), []).append(found)
    lines: list[str] = []
    for (title, where), cases in sorted(tables.items()):
        when = " and ".join(dict.fromkeys(f"{found['processor']}, {found['date']}" for found in cases))
        lines += ["", f"**{title}** {where} ({when}):", ""]
        if rows := [row for found in cases for row in found.get("rows", ())]:
            lines += _study_table(rows)
        for found in cases:
            lines += _few_shot_table(where, found["few_shot"]) if "few_shot" in found else []
            lines += _subspaces_table(found["subspaces"]) if "subspaces" in found else []
    return lines[1:]


def _few_shot_table(where: str, rows: Sequence[Mapping]) -> list[str]:
    scores = list(rows[0]["scores"])
    lines = [
        "",
        f"**Examples in the prompt.** {where}, one run of LoRA beside:",
        "",
        f"| model | loss | {' | '.join(name.replace('_', ' ') for name in scores)} |",
        "|---" * (len(scores) + 2) + "|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['loss']:.4f}", *(f"{row['scores'][name]:.3f}" for name in scores)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _subspaces_table(found: Mapping) -> list[str]:
    lines = ["| first directions of A | shared, mean over the layers |", "|---|---|"]
    lines += [f"| {name} | {share:.2f} |" for name, share in found["first_directions"].items()]
    lines += [
        f"| {count} in {count}, both rank 64, of two seeds | {share:.2f} |" for count, share in found["seeds"].items()
    ]
    return [*lines, f"| 8 in 8 by chance | {found['chance_8_in_8']:.2f} |"]


STUDY = {
    "rank": "Rank and layers.",
    "bits": "Bits of the base.",
    "method": "Methods.",
    "few-shot": "Methods.",
    "subspaces": "Subspaces of rank 8 and rank 64.",
}


def _study_table(rows: Sequence[Mapping]) -> list[str]:
    done = sorted((row for row in rows if row["status"] == "complete"), key=lambda row: row["eval_loss_after"])
    scores = [key for key in done[0] if key.endswith("_after") and key != "eval_loss_after"] if done else []
    titles = [key.removesuffix("_after").replace("_", " ") for key in scores]
    head = [*rows[0]["choice"], "loss", *titles, "trainable weights", "peak memory", "adapter on disk", "time"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in done:
        cells = [
            *row["choice"].values(),
            *(_score(row, key, 4 if key == "eval_loss_after" else 3) for key in ("eval_loss_after", *scores)),
            format_count(int(row["trainable_parameters"])),
            format_bytes(int(row["peak_bytes"])),
            format_bytes(int(row["disk_bytes"])),
            format_seconds(row["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    others = [f"{', '.join(row['choice'].values())}: {row['status']}" for row in rows if row["status"] != "complete"]
    return lines + (["", f"Without a result: {'; '.join(others)}."] if others else [])


def _score(row: Mapping, key: str, digits: int) -> str:
    spread = row["standard_deviation"].get(key)
    return f"{row[key]:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def starts_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/starts``: each at its best rate, by model and steps."""
    lines = ["| model | steps | start | before | after | learning rate |", "|---" * 6 + "|"]
    for model, by_steps in result["models"].items():
        for steps, rows in by_steps.items():
            for start in dict.fromkeys(row["start"] for row in rows):
                best = max((row for row in rows if row["start"] == start), key=lambda row: (row["seeds"], -row["loss"]))
                spread = "" if best["standard_deviation"] is None else f" ± {best['standard_deviation']:.4f}"
                lines.append(
                    f"| {NAMES[model]} | {int(steps):,} | {start} | {best['before']:.4f} "
                    f"| {best['loss']:.4f}{spread} | {best['rate']:g} |"
                )
    return lines


def merged_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/merged``: each way beside the run that it merges."""
    lines = [
        "| model | task | merged | trained: loss | in 4 bit: loss | KL to trained | same first token |",
        "|---" * 7 + "|",
    ]
    for model, tasks in result["models"].items():
        for task, found in tasks.items():
            for way, row in found["ways"].items():
                lines.append(
                    f"| {NAMES[model]} | {task} | {way} | {row['trained']:.4f} | {row['loss']:.4f} "
                    f"| {row['kl']:.1e} | {row['agreement']:.1%} |"
                )
    return lines


def q4_0_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/experiments/q4_0``: each way beside the run that it exports."""
    lines = [
        "| model | task | Q4_0 | trained: loss | in Q4_0: loss | KL to trained | same first token |",
        "|---" * 7 + "|",
    ]
    for model, tasks in result["models"].items():
        for task, found in tasks.items():
            for way in ("rounded", "chosen"):
                row = found[way]
                lines.append(
                    f"| {NAMES[model]} | {task} | {way} | {found['trained']['loss']:.4f} | {row['loss']:.4f} "
                    f"| {row['kl']:.1e} | {row['agreement']:.1%} |"
                )
    return lines


# The result's name -> what stands above its table, and the function that makes the table's lines.
TABLES = {
    "damage": (
        "What four bits cost, and what the sets of `model.keep_16bit` that `qlora-lite damage` recommends give "
        "back: chosen on a few rows, then loaded as any model and measured on these and on three times as many "
        "others. Both models come from 4-bit GGUF files, so that 16 bit is what those hold.",
        damage_table,
    ),
    "head": (
        "What `model.quant_head` costs: the 16-bit head against the same head in NF4, blocks and embeddings the "
        "same, on text that neither was trained on.",
        head_table,
    ),
    "learning_rates": (
        "Held-out loss after 40 steps by learning rate, mean and standard deviation of three seeds. "
        "'Above the best' compares `auto` with the best of the sweep. E2E is split by meaning "
        "representation.",
        learning_rate_table,
    ),
    "study": (
        "Held-out loss and scores of runs of 40 steps, mean and standard deviation of three seeds, best loss "
        "first. Memory is the peak of the process; time is that of the whole run, on a machine that others used "
        "too.",
        study_tables,
    ),
    "starts": (
        "What LoRA weights begin as (`lora.start`): held-out loss on GSM8K, mean and standard deviation of "
        "three seeds, or that of the first where no deviation stands, each start at its own best learning rate, "
        "on NF4; 16 bit with the plain start.",
        starts_table,
    ),
    "merged": (
        "What writing a merged model in NF4 costs, on 32 held-out rows. Merge-aware runs (`train.merge_aware: "
        "nf4`) trained the weights that are written; the others are merged into the original weights and then "
        "quantised (`--base original`), or into the codes that they were trained on.",
        merged_table,
    ),
    "q4_0": (
        "What a GGUF file in Q4_0 costs (`export --to gguf --dtype q4_0`), on 32 held-out rows: each weight "
        "rounded by itself, or codes chosen by training rows, as an export does where it can read them.",
        q4_0_table,
    ),
}

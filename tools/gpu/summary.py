"""A short table of what tools/gpu_check found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_lite.units import format_bytes


def summary(found: Mapping[str, Mapping]) -> str:
    """Return one line for each section, and below it what is worth reading at a glance."""
    lines = [f"{'section':10} {'status':10} {'seconds':>7}"]
    for name, section in found.items():
        lines.append(f"{name:10} {section['status']:10} {section['seconds']:7.1f}")
        lines += [f"    {line}" for line in _HEADLINES[name]([row for row in section["rows"] if "skipped" not in row])]
        lines += [f"    skipped: {_skipped(row)} {row['skipped']}" for row in section["rows"] if "skipped" in row]
        problems = [row for row in section["rows"] if "problem" in row]
        lines += [f"    PROBLEM: {' '.join(filter(None, (row.get('test'), row['problem'])))}" for row in problems]
        lines += [f"    | {line}" for line in section.get("output", ())[-5:]]
    return "\n".join(lines)


def _skipped(row: Mapping) -> str:
    if "cap_bytes" in row:
        return f"{row['kind']} of {row['model']} below {format_bytes(row['cap_bytes'])}:"
    return row.get("side", "")


def _tests(rows: Sequence[Mapping]) -> list[str]:
    lines = [row["summary"] for row in rows if "summary" in row]
    counts = [row["passed"] for row in rows if "passed" in row]
    return [*lines, f"{max(counts)} or more passed"] if counts else lines


def _streamed(rows: Sequence[Mapping]) -> list[str]:
    equal = [row for row in rows if row["kind"] == "equal"]
    lines = [f"{sum(not row['different'] for row in equal)} of {len(equal)} runs have the resident step's bits"]
    for row in rows:
        if row["kind"] == "speed":
            share = f", {row['of_resident_speed']:.2f} of resident" if "of_resident_speed" in row else ""
            peak = f", {format_bytes(row['peak_bytes'])}" if "peak_bytes" in row else ""
            lines.append(f"{row['tokens_per_second']:,.0f} tokens/s{share}{peak}: {row['options']}")
    return lines


def _plan(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        if row.get("kind") == "free memory":
            free = [row[f"{when}_bytes"] for when in ("before_context", "after_context", "after_step", "after_save")]
            held = [0, *(row[f"{when}_held_bytes"] for when in ("context", "step", "save"))]
            others = [format_bytes(free[0] - left - own) for left, own in zip(free[1:], held[1:], strict=True)]
            lines.append(
                "beside torch's allocator: {} with a context, {} after a step, {} after a save".format(*others)
            )
    rows = [row for row in rows if "measured_tensor_bytes" in row]
    for kind, name in (("tensor", "tensors"), ("process", "allocated by the process")):
        errors = [row[f"predicted_{kind}_bytes"] / row[f"measured_{kind}_bytes"] - 1 for row in rows]
        if errors:
            lines.append(f"{len(rows)} cases, error of the peak {min(errors):+.1%} to {max(errors):+.1%}: {name}")
    return lines


def _numbers(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] == "gradients":
            errors = ", ".join(f"{key} {row[f'{key}_error']:.2%}" for key in ("A", "B", "input"))
            lines.append(f"errors in {row['dtype']}, {row['sums']}, loss times {row['loss_scale']:g}: {errors}")
        elif row["kind"] == "rate":
            rates = row["flops_per_second"] / 1e12, row["bytes_per_second"] / 1e9
            lines.append("{}: {:,.1f} TFLOP/s, {:,.0f} GB/s".format(row["operands"], *rates))
        elif "last_loss" in row:
            again = f", {row['num_alloc_retries']} retries" if "num_alloc_retries" in row else ""
            scale = f", loss scale {row['loss_scale']:g}" if "loss_scale" in row else ""
            lines.append(f"{row['steps']} steps of random lengths in {row['dtype']}{again}{scale}")
    return lines


def _caps(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        fits = {True: "fits", False: "fails", None: "not run: planned not to fit"}[row.get("fits")]
        above = f" ({row['above_planned']:+.0%} of the planned longest)" if row["kind"] == "length" else ""
        took = f", {format_bytes(row['measured_bytes'])}" if "measured_bytes" in row else ""
        speed = f", {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        task = f"{row['model']} below {format_bytes(row['cap_bytes'])}: {row['tokens']:,} tokens{above}"
        lines.append(f"{task} {fits}{took}{speed}")
    return lines


def _peers(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        peak = f", {format_bytes(row['peak_bytes'])}" if "peak_bytes" in row else ""
        speed = f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "did not run"
        speed = "out of memory" if "out_of_memory" in row else speed
        lines.append(f"{row['rows']} x {row['length']:,}: {speed}{peak}: {row['side']}")
    return lines


def _answers(rows: Sequence[Mapping]) -> list[str]:
    return [
        f"{row['prompts']} prompts: {row['tokens_per_second']:,.0f} tokens/s, "
        f"{1e3 * row['token_seconds']:.1f} ms each, {row['same_tokens']:.0%} the same: {row['side']}"
        for row in rows
    ]


def _options(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        if "predicted_bytes" not in row:
            lines.append(f"{row['tokens']:7,} {row['option']:36} did not run")
            continue
        done = f"{format_bytes(row.get('measured_bytes', row['predicted_bytes'])):>10}"
        speed = (
            f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "out of memory (predicted)"
        )
        lines.append(f"{row['tokens']:7,} {row['option']:36} {done} {speed}")
    return lines


def _paged(rows: Sequence[Mapping]) -> list[str]:
    return [
        f"{row['optimizer']}, {row['kind']}: "
        + (f"{row['seconds']:.3f} s a step" if "seconds" in row else "out of memory, as it should be")
        + {True: ", the same update", False: ", another update", None: ""}[row.get("equal")]
        for row in rows
    ]


def _ranks(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        if row.get("kind") == "speed":
            share = f", {row['of_one']:.2f} times as fast as one" if "of_one" in row else ""
            lines.append(f"{row['tokens_per_second']:,.0f} tokens/s: processes {row['ranks']}{share}")
        elif row.get("kind") == "losses":
            lines.append(f"losses of {row['steps']} steps within {row['largest_error']:.1e} of one GPU's")
        elif row.get("kind") == "killed" and "problem" not in row:
            lines.append(f"a killed process was noticed after {row['seconds']:.1f} s")
    return lines


_HEADLINES = {
    "tests": _tests,
    "streamed": _streamed,
    "plan": _plan,
    "numbers": _numbers,
    "caps": _caps,
    "peers": _peers,
    "answers": _answers,
    "options": _options,
    "paged": _paged,
    "ranks": _ranks,
}

import pytest

from qlora_lite.errors import (
    DataError,
    DoesNotFitError,
    Interrupted,
    ModelError,
    OutputError,
    Problem,
    QloraLiteError,
    RecipeError,
    TrainingError,
)
from qlora_lite.units import counted, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("7.5 gib", 7.5 * 2**30),
        ("1TiB", 2**40),
        ("3KiB", 3072),
        ("2MiB", 2**21),
        ("500MB", 500_000_000),
        ("24 GB", 24 * 10**9),
        ("1kb", 1000),
        ("1TB", 10**12),
        (" 12B ", 12),
        ("0GiB", 0),
    ],
)
def test_a_size_with_its_unit_is_read_exactly(text, size):
    assert parse_bytes(text) == size
    assert isinstance(parse_bytes(text), int)


def test_a_long_fraction_loses_no_bytes_to_float_rounding():
    assert parse_bytes("0.000000000000001TB") == 0
    assert parse_bytes("8388607.999999999TiB") == (8388607999999999 * 2**40) // 10**9


def test_a_bare_number_is_an_error_that_says_to_add_a_unit():
    with pytest.raises(ValueError, match="has no unit; write 8GiB or 8MiB"):
        parse_bytes("8")


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "1e3MB", "8 GiB now", "nanGB", "1.GiB", "٣GiB", "8Gi", "8X", "9" * 5000 + "B"],
)
def test_what_is_no_size_is_a_value_error(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (int(7.4 * 2**30), "7.4 GiB"),
        (2**20 - 1, "1.0 MiB"),
        (-(2**21), "-2.0 MiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_fitting_binary_unit(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (0.0004, "0.0s"),
        (0.0351, "35ms"),
        (0.44, "0.4s"),
        (59.94, "59.9s"),
        (59.96, "1m 00s"),
        (185, "3m 05s"),
        (3599.7, "1h 00m"),
        (7681, "2h 08m"),
    ],
)
def test_a_duration_is_shown_in_two_units_at_most(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (8192, "8.2 K"), (134_500_000, "134.5 M"), (999_999, "1.0 M"), (7**11, "2.0 B")],
)
def test_a_count_is_shown_with_its_factor(count, text):
    assert format_count(count) == text


def test_a_recipe_error_shows_one_problem_a_line_with_its_place():
    error = RecipeError([Problem("lora.rnak is not a setting", "r.yaml:7", "lora.rnak"), "something else"])
    assert str(error) == "r.yaml:7: lora.rnak is not a setting\nsomething else"
    assert [problem.key for problem in error.problems] == ["lora.rnak", ""]
    assert error.exit_code == 2


def test_every_error_of_the_package_has_its_exit_code():
    codes = {QloraLiteError: 1, RecipeError: 2, DataError: 2, ModelError: 2, OutputError: 2}
    codes |= {DoesNotFitError: 3, TrainingError: 1, Interrupted: 130}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert all(issubclass(kind, QloraLiteError) for kind in codes)


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2048, "2,048 rows")])
def test_one_thing_is_singular(count, text):
    assert counted(count, "row") == text

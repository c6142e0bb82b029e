import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.recipe.strict_yaml import MAX_BYTES, MAX_DEPTH, dump, parse, plain, scalar_value


def values(text):
    document = parse(text.encode(), "r.yaml")
    assert document.problems == []
    return plain(document.root)


def problems(raw):
    document = parse(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"), "r.yaml")
    return [str(problem) for problem in document.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2e4", 20000),
        ("2E+4", 20000),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("0.10", 0.1),
        ("1e20", 1e20),
        ("999999999999999999", 10**18 - 1),
    ],
)
def test_numbers_are_numbers(text, value):
    read = values(f"a: {text}")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "NO",
        "no",
        "yes",
        "on",
        "Off",
        "y",
        "012",
        "0o17",
        "0x1f",
        "0b1",
        "1_000",
        "3:30",
        "1:30:00",
        ".nan",
        ".NaN",
        "-.inf",
        "2024-01-01",
        "2024-01-01 10:00:00",
        "1e999",
        "1e99999",
        "9" * 19,
        "9" * 6000,
        "=",
        "1,5",
        "5%",
        "--1",
        "1e",
        "e5",
        "00",
        "-012",
        "0123.5",
        "True1",
        "None",
        ".",
    ],
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text):
    assert values(f"a: {text}") == {"a": text}


def test_truth_values_and_null_are_read_in_their_three_spellings():
    text = "[true, True, TRUE, false, False, FALSE, null, Null, NULL, ~, '']"
    assert values(f"a: {text}\nb:") == {"a": [True] * 3 + [False] * 3 + [None] * 4 + [""], "b": None}


def test_quoted_values_are_always_text():
    text = "a: '1e-5'\nb: \"true\"\nc: ''\nd: |\n  12\n"
    assert values(text) == {"a": "1e-5", "b": "true", "c": "", "d": "12\n"}


def test_every_value_knows_the_line_of_its_key():
    root = parse(b"# comment\na:\n  b: 1\n  c:\n    - x\n    - y\r\nd: 2\n", "r.yaml").root
    inner = root.value["a"].value["c"]
    places = [inner.where, inner.value[1].where, root.value["d"].where]
    assert places == ["r.yaml:4", "r.yaml:6", "r.yaml:7"]


def test_a_duplicate_key_is_an_error_that_names_both_lines():
    assert problems("a: 1\nb: 2\na: 3\n") == ["r.yaml:3: a is given twice, first at r.yaml:1; keep one"]
    assert len(problems("s: {a: 1, 'a': 2}\ns: 3")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1", "r.yaml:1: &x is an anchor"),
        ("b: 1\na: *x", "r.yaml:2: *x is an alias"),
        ("<<: {a: 1}", "r.yaml:1: merge keys"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml:1: the tag"),
        ("a: !!int '3'", "r.yaml:1: the tag"),
        ("a: !x {b: 1}", "r.yaml:1: the tag"),
        ("a: ! x", "r.yaml:1: the tag"),
        ("&x a: 1", "r.yaml:1: &x is an anchor"),
        ("? [a, b]\n: 1", "r.yaml:1: a key must be the name"),
        ("{a: 1}: 2", "r.yaml:1: a key must be the name"),
        ("a: 1\n---\nb: 1", "r.yaml:2: a second document"),
        ("a:\n\tb: 1", "r.yaml:2: not YAML: while scanning for the next token found character '\\t'"),
        ("a: b: c", "r.yaml:1: not YAML: mapping values are not allowed"),
        ("a: [1", "r.yaml:1: not YAML"),
        ("a: 'x", "r.yaml:1: not YAML"),
        (r'a: "C:\Users\me"', "in double quotes \\ begins an escape: use single quotes, or / in a path"),
        (r'a: "C:\data"', "in double quotes \\ begins an escape: use single quotes, or / in a path"),
        ("a: @x", "put the value in quotes"),
        ("%YAML 9.9\n---\na: 1", "r.yaml:1: not YAML"),
        ('a: "\\UFFFFFFFF"', "is not a character"),
        ('a: "\\ud800"', "r.yaml:1: the value holds the character U+D800"),
        ('a: "x\\0"', "r.yaml:1: the value holds the character U+0000"),
        ('"\\0": 1', "r.yaml:1: the value holds the character U+0000"),
        ("a: 1\nb: \x00", "r.yaml:2: the character U+0000 is not allowed"),
        ("a: \x1b[31m", "r.yaml:1: the character U+001B is not allowed"),
        (b"a: 1\nb: \xe4\n", "r.yaml: line 2 is not UTF-8"),
        (b"\xef\xbb\xbfa: 1", "r.yaml: starts with a byte-order mark"),
        ("a: 1".encode("utf-16"), "r.yaml: starts with a byte-order mark"),
        (b"a" * (MAX_BYTES + 1), "r.yaml: is too large"),
    ],
)
def test_what_a_recipe_does_not_need_is_one_clean_problem(text, message):
    found = problems(text)
    assert len(found) == 1
    assert message in found[0]


def test_nesting_is_bounded():
    assert problems("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)) == []
    for opening in ("[", "{a: ", "- "):
        assert "levels deep" in problems(opening * 10_000)[0]


def test_a_billion_laughs_is_refused_before_it_is_expanded():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    found = problems("\n".join(lines))
    assert len(found) == 60 + 2 * 59


def test_problems_do_not_end_the_reading():
    found = problems("a: &x 1\nb: 1\nb: 2\nc: !t 3\n<<: 4\n")
    assert [line.split(": ")[0] for line in found] == ["r.yaml:1", "r.yaml:3", "r.yaml:4", "r.yaml:5"]


LETTERS = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t:#-'\"\\ e1_")
TEXT = st.text(LETTERS, max_size=30)
TRAPS = st.sampled_from(["1e-5", "012", "NO", "3:30", ".nan", "~", "null", "", "2024-01-01", "1_0", "&a", "*a", "<<"])
NUMBERS = st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT | TRAPS


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(TEXT, SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXT, SCALARS)))
def test_what_is_written_is_read_back_equal(data):
    read = values(dump(data))
    assert read == data
    assert repr(read) == repr(data)


def test_text_that_looks_like_a_number_here_is_written_in_quotes():
    assert scalar_value("1e-5") == 1e-5
    assert dump({"a": "1e-5"}) == 'a: "1e-5"\n'

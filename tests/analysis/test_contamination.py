from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from scipy.stats import binomtest

from tests.evaluation.benchmark_asset import write_asset
from trialist.analysis.contamination import ContaminationAnalysis, by_share, wilson
from trialist.analysis.contamination_page import marked
from trialist.cli.main import main
from trialist.data.benchmark_items import load_items

WORDS = [f"word{number}" for number in range(40)]
WHOLE, HALF, FREE = (
    " ".join(WORDS[:20]),
    " ".join(WORDS[20:40]),
    "quite other words stand in here and none of them is there",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    questions = [WHOLE, HALF, FREE, "too short", ""]
    rows = [{"id": f"q{number}", "question": text} for number, text in enumerate(questions)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [
        {"prompt": f"<b>Say:</b> {WHOLE.upper()} & go", "completion": "x"},
        {"prompt": " ".join(WORDS[20:30]), "completion": "x"},
        {"prompt": "that is too short, he said", "completion": FREE},
        {"prompt": None, "completion": WHOLE},
    ]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    return tmp_path


def analysed(**given) -> dict:
    options = {"train": ("train.jsonl",), "benchmarks": ("items.jsonl",)} | given
    ContaminationAnalysis(**options)(say=lambda _: None)
    return json.loads(Path(options.get("output", "contamination") + ".json").read_text())


def test_rates_are_of_all_items_and_short_and_empty_ones_have_columns_of_their_own(here):
    (train,) = analysed()["train"]
    assert (train["rows"], train["rows without text"], train["rows contaminating"]) == (4, 1, 1)
    assert train["rows sharing an n-gram"] == 3
    (entry,) = train["benchmarks"]
    low, high = binomtest(1, 5).proportion_ci(method="wilson")
    assert entry == {
        "name": "items.jsonl", "items": 5, "contaminated": 1, "rate": 0.2, "low": pytest.approx(low),
        "high": pytest.approx(high), "above": True, "sharing": 2, "short": 1, "short found": 1, "empty": 1,
        "by share": [1, 0, 1, 0, 0, 1],
    }  # fmt: skip


def test_items_say_what_matches_and_where(here):
    items = {item["id"]: item for item in analysed()["train"][0]["items"]}
    assert set(items) == {"q0", "q1", "q3"}
    assert items["q0"]["share"] == items["q0"]["union"] == 1.0
    assert (items["q1"]["share"], items["q1"]["contaminated"]) == (0.5, False)
    assert (items["q3"]["short"], items["q3"]["contaminated"]) == (True, False)
    assert (items["q1"]["row"], items["q1"]["rows sharing"], items["q1"]["rows contaminating"]) == (
        "train.jsonl line 2",
        1,
        0,
    )
    ((field, begin, end),) = items["q1"]["spans"]
    assert items["q1"]["fields"][field][begin:end] == " ".join(WORDS[20:30])
    ((begin, end),) = items["q0"]["row spans"]
    assert items["q0"]["row text"][begin:end] == WHOLE.upper()


def test_answers_are_looked_at_only_where_asked(here):
    (train,) = analysed(roles=("user", "assistant"))["train"]
    assert [item["id"] for item in train["items"] if item["contaminated"]] == ["q0", "q2"]
    (train,) = analysed(fields=("completion",))["train"]
    assert [item["id"] for item in train["items"] if item["contaminated"]] == ["q0", "q2"]


def test_several_data_sets_and_benchmarks_stand_side_by_side(here):
    Path("clean.jsonl").write_text(json.dumps({"text": "nothing to see"}) + "\n")
    Path("other.txt").write_text(f"{HALF}\n{WHOLE}\n")
    report = analysed(train=("train.jsonl", "clean.jsonl"), benchmarks=("items.jsonl", "other.txt", "items.jsonl"))
    counts = [[entry["contaminated"] for entry in train["benchmarks"]] for train in report["train"]]
    assert counts == [[1, 1], [0, 0]]
    assert report["train"][0]["digest"] != report["train"][1]["digest"]


def test_presets_and_options_set_the_rule(here):
    assert analysed(preset="open-r1")["settings"] | {"fields": 0} == analysed(rule="any", words="whitespace")["settings"] | {
        "preset": "open-r1", "fields": 0,
    }  # fmt: skip
    by_preset = {name: analysed(preset=name)["settings"] for name in ("tulu3", "gpt3", "datatrove", "longest")}
    assert [entry["n"] for entry in by_preset.values()] == [8, 13, 12, 8]
    assert [entry["rule"] for entry in by_preset.values()] == ["tulu3", "any", "any", "longest"]
    assert analysed(preset="open-r1", rule="union")["settings"]["coverage"] == 0.5


class Checker(html.parser.HTMLParser):
    """Collects what a page marks, and notices tags that do not close and addresses that leave the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marked: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


def test_the_page_stands_alone_and_marks_both_sides(here):
    analysed(output="sub/page")
    text = Path("sub/page.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert (checker.open, checker.links) == ([], [])
    assert not re.search(r"https?://|@import|url\(", text)
    assert checker.marked == [WHOLE, WHOLE.upper(), " ".join(WORDS[20:30]), " ".join(WORDS[20:30])]
    assert "&lt;b&gt;Say:&lt;/b&gt;" in text
    assert "20.0% of items.jsonl stands in the training data" in text


def test_the_page_says_when_nothing_was_found_and_how_much_it_leaves_out(here):
    Path("clean.jsonl").write_text(json.dumps({"text": "nothing to see"}) + "\n")
    analysed(train=("clean.jsonl",))
    assert "No item is contaminated: 0 of 5 items match." in Path("contamination.html").read_text()
    analysed(examples=1)
    assert "1 further items of items.jsonl" in Path("contamination.html").read_text()
    analysed(rate=0.5)
    assert (
        "No benchmark has more than 50.0% of its items contaminated: 1 of 5" in Path("contamination.html").read_text()
    )


def test_frequent_ngrams_are_listed_by_the_pairs_they_join(here):
    header = "please answer the next question as well as you can"
    Path("items.txt").write_text("".join(f"{header} {number} times {word}\n" for number, word in enumerate(WORDS[:9])))
    Path("train.jsonl").write_text("".join(json.dumps({"text": f"{header} {n}"}) + "\n" for n in range(5)))
    listed = analysed(benchmarks=("items.txt",))["train"][0]["frequent n-grams"]
    assert listed[0] == {"text": "please answer the next question as well as", "rows": 5, "items": 9}
    Path("ignored.txt").write_text(f"{header}\n\n")
    assert analysed(benchmarks=("items.txt",), ignored="ignored.txt")["train"][0]["rows sharing an n-gram"] <= 5
    found = analysed(benchmarks=("items.txt",), ignored="ignored.txt")["train"][0]["frequent n-grams"]
    assert not any(entry["text"] in header for entry in found)


def test_the_command_reads_the_asset_and_writes_both_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    write_asset(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    question = load_items("gsm8k").texts[0][0]
    Path("train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": f"Hello! {question}"}]}) + "\n")
    command = ["analyze", "contamination", "--train", "train.jsonl", "--benchmarks", "gsm8k", "mmlu", "--n", "3"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "1 (1 contaminate an item)" in shown
    assert Path("contamination.html").is_file()
    assert Path("contamination.json").is_file()
    command = [
        "apply",
        "decontaminate",
        "--data",
        "train.jsonl",
        "--benchmarks",
        "gsm8k",
        "--n",
        "3",
        "--output",
        "c.jsonl",
    ]
    assert main(command) == 0
    assert Path("c.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": ()}, "--train: name at least one data set"),
        ({"train": ("train.jsonl", "train.jsonl")}, "--train names a data set twice"),
        ({"train": ("none.jsonl",)}, r"'none\.jsonl': no such file or folder"),
        ({"train": ("empty.jsonl",)}, r"empty\.jsonl holds no rows"),
        ({"train": ("items.jsonl",)}, r"items\.jsonl line 1: no column of the roles 'user' among 'id', 'question'"),
        ({"benchmarks": ("train.jsonl",), "benchmark_fields": ("q",)}, "expected the column 'q'"),
        ({"ignored": "items.jsonl", "n": 30}, "ignored text 1 .* fewer than n = 30"),
        ({"rate": 2.0}, "--rate is a share from 0 to 1, not 2.0"),
        ({"examples": -1}, "--examples must be at least 0"),
        ({"max_examples": 0}, "--max-examples must be at least 1"),
        ({"output": "items.jsonl/page"}, r"items\.jsonl is a file, not a folder"),
        ({"split": "test"}, "has no split 'test'"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(here, given, message):
    Path("empty.jsonl").write_text("")
    before = sorted(here.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analysed(**given)
    assert sorted(here.rglob("*")) == before


def test_an_interruption_leaves_nothing_half_written(here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = sorted(here.rglob("*"))
    monkeypatch.setattr("trialist.analysis.contamination.os.replace", interrupted)
    assert main(["analyze", "contamination", "--train", "train.jsonl", "--benchmarks", "items.jsonl"]) == 130
    assert sorted(here.rglob("*")) == before


def test_intervals_are_those_of_scipy_and_none_without_items():
    for hits, size in ((0, 7), (3, 7), (7, 7), (1, 1319)):
        expected = binomtest(hits, size).proportion_ci(method="wilson")
        assert wilson(hits, size) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (None, None)


def test_items_are_counted_by_share_and_texts_cut_at_spans():
    import numpy as np

    assert by_share(np.array([0, 0.25, 0.251, 0.5, 0.6, 0.75, 0.99, 1.0, 1.0])) == [1, 1, 2, 2, 1, 2]
    assert marked("abcdef", [(0, 2), (4, 6)]) == [(True, "ab"), (False, "cd"), (True, "ef")]


@pytest.mark.asset
def test_real_problems_match_where_a_reader_sees_it(shared_data, tmp_path, monkeypatch):
    monkeypatch.delenv("TRIALIST_CACHE", raising=False)
    try:
        load_items("gsm8k", max_items=1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    train = shared_data / "gsm8k" / "train.jsonl"
    report = ContaminationAnalysis(train=(str(train),), benchmarks=("gsm8k",), fields=("question",)).report(
        lambda _: None
    )
    matches = {item["id"]: item for item in report["train"][0]["items"]}
    plane = matches["602"]
    row = json.loads(train.read_text().splitlines()[1314])["question"]
    assert row.startswith("A train travels 270 miles in 3 hours")
    ((_, begin, end),) = plane["spans"]
    shared = "miles in 3 hours. At the same rate, how many additional hours would it take to travel an additional"
    assert plane["fields"][0][begin:end] == shared
    assert shared in row
    assert (plane["row"], plane["share"]) == ("train.jsonl line 1315", 0.76)

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import datasets
import pytest
from scipy.stats import binomtest

from tests.analysis.contamination_data import FREE, HALF, WHOLE, WORDS, analysed
from tests.evaluation.benchmark_asset import write_asset
from trialist.analysis.contamination import ContaminationAnalysis, contamination_report
from trialist.analysis.contamination_page import AROUND, around, marked
from trialist.analysis.contamination_report import by_share, wilson
from trialist.cli.main import main
from trialist.data.benchmark_items import load_items
from trialist.data.benchmark_sources import SOURCES


def test_rates_are_of_all_items_and_short_and_empty_ones_have_columns_of_their_own(here):
    (train,) = analysed()["train"]
    assert (train["rows"], train["rows without text"], train["rows contaminating"]) == (4, 1, 1)
    assert train["rows sharing an n-gram"] == 2  # the third holds a short item only
    (entry,) = train["benchmarks"]
    low, high = binomtest(1, 5).proportion_ci(method="wilson")
    assert entry == {
        "name": "items.jsonl", "items": 5, "contaminated": 1, "rate": 0.2, "low": pytest.approx(low),
        "high": pytest.approx(high), "above": True, "sharing": 2, "short": 1, "short found": 1, "ignored": 0, "empty": 1,
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
    for given in ({"fields": ("completion",)}, {"train": ("train.jsonl:completion",), "fields": ("prompt",)}):
        (train,) = analysed(**given)["train"]
        assert [item["id"] for item in train["items"] if item["contaminated"]] == ["q0", "q2"], given


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
    names = ("tulu3", "full-string", "gpt3", "datatrove", "longest")
    by_preset = {name: analysed(preset=name)["settings"] for name in names}
    assert [entry["n"] for entry in by_preset.values()] == [8, 8, 13, 12, 8]
    assert [entry["rule"] for entry in by_preset.values()] == ["tulu3", "whole", "any", "any", "longest"]
    assert [entry["numbers"] for entry in by_preset.values()] == ["as-is", "as-is", "as-is", "equal", "as-is"]
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
    assert "20.0% of the items of items.jsonl stand by more than 50% in the training data." in text


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


HEADER = "please answer the next question as well as you can"


def test_ngrams_that_follow_each_other_are_listed_as_one_phrase(here):
    items = [f"{HEADER} {number} times {word}" for number, word in enumerate(WORDS[:9])]
    Path("items.txt").write_text("".join(f"{item}\n" for item in [*items, *items[:1], WHOLE, HALF]))
    rows = [f"{HEADER} {n}" for n in range(5)] + [WHOLE] * 2 + [HALF] + ["nothing"] * 2
    Path("train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    listed = analysed(benchmarks=("items.txt",))["train"][0]["frequent phrases"]
    assert listed[0] == {"text": HEADER, "rows": 5, "share of rows": 0.5, "items": 10}
    assert {"text": WHOLE, "rows": 2, "share of rows": 0.2, "items": 1} in listed
    assert not any(entry["text"] in HALF for entry in listed)  # one item, one row
    assert sorted(Path("contamination.templates.txt").read_text().splitlines()) == sorted(
        [HEADER, "next question as well as you can 0"]
    )
    Path("contamination.templates.txt").rename("ignored.txt")
    (train,) = analysed(benchmarks=("items.txt",), common=0.5)["train"]
    assert not any(entry["text"] in HEADER for entry in train["frequent phrases"])
    (train,) = analysed(benchmarks=("items.txt",), ignored="ignored.txt")["train"]
    assert not any(entry["text"] in HEADER for entry in train["frequent phrases"])
    assert train["rows sharing an n-gram"] == 7  # "... can 1" to "... can 4", and three that are no template
    assert not Path("contamination.templates.txt").exists()


def test_short_fields_are_no_phrases(here):
    Path("items.jsonl").write_text(json.dumps({"passage": WHOLE, "question": "who"}) + "\n")
    Path("train.jsonl").write_text("".join(json.dumps({"text": f"who is it {n}"}) + "\n" for n in range(5)))
    (train,) = analysed(benchmarks=("items.jsonl:passage,question",))["train"]
    assert (train["frequent phrases"], train["rows sharing an n-gram"], train["items"]) == ([], 0, [])


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
    assert sorted(path.name for path in Path().glob("contamination*")) == [
        "contamination.html", "contamination.json", "contamination.tsv"
    ]  # fmt: skip
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
        ({"benchmarks": ("train.jsonl:q",)}, r"expected the column 'q', .* behind it, train\.jsonl:COLUMN"),
        ({"preset": "open-r1", "coverage": 0.5}, r"--coverage 0\.5 says nothing where the rule is any"),
        ({"words": "tokens", "tokenizer": "bytes", "numbers": "equal"}, "--unicode, --numbers and --keep-case are the"),
        ({"jobs": 0}, "--jobs must be at least 1, not 0"),
        ({"output": "taken.html"}, r"taken\.json exists; give another --output"),
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
    Path("taken.json").write_text("mine")
    before = sorted(here.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analysed(**given)
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


def test_a_long_item_is_shown_around_its_longest_match():
    text = "a" * 1000 + "MATCH" + "b" * 100 + "hit" + "c" * 1000
    shown = around(text, [(1000, 1005), (1105, 1108)])
    assert "".join(piece for _, piece in shown) == f"… {'a' * AROUND}MATCH{'b' * 100}hit{'c' * (AROUND - 103)} …"
    assert [piece for inside, piece in shown if inside] == ["MATCH", "hit"]
    assert around("short", []) == [(False, "short")]
    assert around("x" * 700, []) == [(False, "x" * AROUND), (False, " …")]


def test_union_says_nothing_of_single_rows(here, capsys):
    words = " ".join(f"w{number}" for number in range(30)).split()
    Path("items.jsonl").write_text(json.dumps({"question": " ".join(words)}) + "\n")
    rows = [" ".join(words[:10]), " ".join(words[12:22])]
    Path("train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    command = ["analyze", "contamination", "--train", "train.jsonl", "--benchmarks", "items.jsonl", "--rule", "union"]
    assert main(command) == 0
    report = json.loads(Path("contamination.json").read_text())
    assert report["train"][0]["benchmarks"][0]["contaminated"] == 1
    assert (report["train"][0]["rows contaminating"], report["train"][0]["items"][0]["rows contaminating"]) == (
        None,
        None,
    )
    assert "contaminate an item" not in capsys.readouterr().out
    assert "contaminate one" not in Path("contamination.html").read_text()


def test_the_headline_says_what_the_rule_says(here):
    analysed(preset="open-r1")
    assert "40.0% of the items of items.jsonl share an n-gram with the training data." in page()
    analysed(preset="full-string")
    assert "20.0% of the items of items.jsonl stand word for word in the training data." in page()


def page() -> str:
    return Path("contamination.html").read_text()


def test_matches_below_the_threshold_are_folded_behind_the_others(here):
    analysed()
    text = page()
    hit, fold, below = (
        text.index(part) for part in ("of items.jsonl q0", '<details class="below">', "of items.jsonl q1")
    )
    assert hit < fold < below
    assert "1 item shares an n-gram and is not contaminated, the largest by 50 %" in text


def test_several_data_sets_make_a_matrix_and_a_table(here, capsys):
    Path("clean.jsonl").write_text(json.dumps({"text": "nothing to see"}) + "\n")
    Path("other.txt").write_text(f"{HALF}\n{WHOLE}\n")
    command = [
        "analyze",
        "contamination",
        "--train",
        "train.jsonl:prompt",
        "clean.jsonl",
        "--benchmarks",
        "items.jsonl",
        "other.txt",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"other\.txt +1 of 2 items, 50\.00% \[9\.45%, 90\.55%\] in train\.jsonl:prompt\n", out)
    header, *lines = [line.split("\t") for line in Path("contamination.tsv").read_text().splitlines()]
    assert [dict(zip(header, line))["contaminated"] for line in lines] == ["1", "1", "0", "0"]
    assert [line[:2] for line in lines] == [
        [train, name] for train in ("train.jsonl:prompt", "clean.jsonl") for name in ("items.jsonl", "other.txt")
    ]
    matrix = page()[page().index("<h2>Rates</h2>") :]
    cells = re.findall(r"<td class=.num[^>]*>(.*?)</td>", matrix[: matrix.index("</table>")])
    zero = '<span class="muted">0</span>'
    assert cells == ["5", "1, 20.00 %", zero, "2", "1, 50.00 %", zero]


def test_benchmarks_of_their_own_columns_stand_beside_each_other(here):
    Path("own.jsonl").write_text(json.dumps({"id": "a", "body": WHOLE, "more": FREE}) + "\n")
    report = analysed(benchmarks=("items.jsonl", "own.jsonl:body", "own.jsonl:body,more"))
    assert [entry["contaminated"] for entry in report["train"][0]["benchmarks"]] == [1, 1, 0]
    assert [entry["fields"] for entry in report["benchmarks"]] == [["question"], ["body"], ["body", "more"]]


def test_data_sets_in_memory_are_reported_as_files_are(here):
    rows, items = (
        datasets.load_dataset("json", data_files=name, split="train") for name in ("train.jsonl", "items.jsonl")
    )
    from_files = analysed()
    report = contamination_report(rows, {"items.jsonl": items})
    assert [entry["row"] for entry in report["train"][0]["items"]] == ["train row 1", "train row 3", "train row 2"]
    assert report["train"][0]["benchmarks"] == from_files["train"][0]["benchmarks"]
    several = contamination_report({"a": rows, "b": rows.select([1])}, ("items.jsonl",), rule="any")
    assert [train["benchmarks"][0]["contaminated"] for train in several["train"]] == [2, 1]
    with pytest.raises(ValueError, match="'train' names training data and a benchmark"):
        contamination_report(rows, {"train": items})


def test_options_of_words_reach_the_search(here):
    row = " ".join(WORDS[:20]).replace("word", "Wórd").replace("19", "99")
    Path("train.jsonl").write_text(json.dumps({"prompt": row}, ensure_ascii=False) + "\n")
    shares = {
        name: max((item["share"] for item in analysed(**given)["train"][0]["items"]), default=0.0)
        for name, given in {
            "plain": {}, "unaccented": {"unicode": "unaccented"}, "numbers": {"unicode": "unaccented", "numbers": "equal"},
            "case": {"unicode": "unaccented", "keep_case": True},
            "tokens": {"words": "tokens", "tokenizer": "bytes", "n": 4},
        }.items()
    }  # fmt: skip
    assert shares == {
        "plain": 0,
        "unaccented": 0.95,
        "numbers": 1.0,
        "case": 0,
        "tokens": pytest.approx(85 / 129, abs=1e-5),
    }


def test_most_items_that_are_short_are_remarked(here):
    Path("items.jsonl").write_text(
        json.dumps({"question": "小明有十二个苹果，他把其中的三分之一分给了他的朋友"}, ensure_ascii=False) + "\n"
    )
    lines: list[str] = []
    report = analysed(lines.append)
    (remark,) = report["remarks"]
    assert remark.startswith("items.jsonl: 1 of 1 items are shorter than 8 words")
    assert remark in lines
    assert "items.jsonl: 1 of 1 items are shorter than 8 words" in page()


def test_all_benchmarks_of_the_asset_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {name: SOURCES[name] for name in ("gsm8k", "mmlu", "popqa")}
    monkeypatch.setattr("trialist.data.benchmark_sources.SOURCES", few)
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    write_asset(tmp_path / "cache")
    Path("train.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    assert [entry["name"] for entry in analysed(benchmarks=("all",))["benchmarks"]] == ["gsm8k", "mmlu"]


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

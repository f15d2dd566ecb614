from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import time
from pathlib import Path

import pytest

from tests.engine import synthetic_trials as made
from trialist.engine import charts, wording
from trialist.engine.contract import Arm
from trialist.engine.report import (
    render,
    render_html,
    render_index,
    render_json,
    render_markdown,
    verdict_html,
    write_report,
)


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {
        "supported": made.document(),
        "contradicted": made.contradicted(),
        "inconclusive": made.inconclusive(),
        "void": made.void(),
        "non-inferior": made.non_inferior(),
    }


@pytest.fixture(scope="module")
def pages(documents: dict[str, dict]) -> dict[str, str]:
    return {name: render_html(document) for name, document in documents.items()}


class Balance(html.parser.HTMLParser):
    """Fails where a closing tag does not match; keeps words outside of tags."""

    empty = {"meta", "br", "line", "rect", "circle", "path", "link", "img", "hr", "stop"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.empty:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.empty:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def words(page: str) -> str:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)), "an id stands twice"
    return re.sub(r"\s+", " ", " ".join(parser.words))


def test_pages_are_well_formed_and_reach_for_nothing_outside(pages: dict[str, str]) -> None:
    for page in pages.values():
        words(page)
        assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)|src=", page)
        assert re.findall(r'href="(?!https://arxiv\.org/abs/|#)([^"]*)"', re.sub("xlink:href", "", page)) == []
        assert len(page.encode()) < 1_000_000


def test_the_page_keeps_its_order_from_the_verdict_to_the_command(pages: dict[str, str]) -> None:
    text = words(pages["supported"])
    order = [
        made.SUPPORTED.sentence,
        made.SUPPORTED.advice,
        "The effect against the margin",
        "Every seed, paired",
        "Learning curves against the budget",
        "What it costs",
        "The paper reports",
        "What could mislead here",
        "Failures and divergence",
        "trialist run selective-attention --preset tiny --seeds 6 --save-evidence",
    ]
    places = [text.index(entry) for entry in order]
    assert places == sorted(places)


def test_readings_over_a_range_stand_apart_from_the_learning_curves(documents: dict[str, dict]) -> None:
    document = documents["supported"]
    arm = document["treatment"]
    place = {"setting": "main", "arm": arm, "metric": "accuracy_of_long_rows_by_steps"}
    points = [[1.0, 0.25], [4.0, 0.5], [32.0, 0.75]]
    document = document | {
        "curve_means": [{**place, "seeds": 2, "points": points}, *document["curve_means"]],
        "curves": [{**place, "seed": 0, "points": points}, *document["curves"]],
    }
    page = render_html(document)
    text = words(page)
    assert "Readings over a range" in text
    assert "accuracy of long rows by steps" in text
    assert "1: 0.250, 4: 0.500, 32: 0.750" in text
    assert "1 of 2 single curves are drawn" in text
    assert 'id="ranges-wide-' in page
    curves = text[text.index("Learning curves against the budget") : text.index("Readings over a range")]
    assert "accuracy of long rows" not in curves
    markdown = render_markdown(document)
    assert f"- accuracy of long rows by steps, {arm}: 1: 0.250, 4: 0.500, 32: 0.750" in markdown
    assert "Readings over a range" not in words(render_html(documents["supported"]))


def test_effects_on_a_log_scale_are_not_given_the_unit_of_the_values(documents: dict[str, dict]) -> None:
    text = words(render_html(documents["supported"] | {"scale": "log", "unit": "steps"}))
    assert "Effect, log ratio" in text
    assert "Effect, steps" not in text


def test_a_seed_counts_as_better_in_the_direction_of_the_endpoint(documents: dict[str, dict]) -> None:
    page = render_markdown(documents["supported"])
    assert "main, against standard attention: 6 of 6 better" in page
    flipped = render_markdown(documents["supported"] | {"better": "higher"})
    assert "main, against standard attention: 0 of 6 better" in flipped


def test_the_same_summary_gives_the_same_page(documents: dict[str, dict], pages: dict[str, str]) -> None:
    assert render_html(documents["supported"]) == pages["supported"]
    assert re.search(r"url\(#curves-wide-\d+\)", pages["supported"])
    assert all(f'id="{target}"' in pages["supported"] for target in re.findall(r"url\(#([^)]+)\)", pages["supported"]))


def test_every_picture_has_words_for_those_who_cannot_see_it(pages: dict[str, str]) -> None:
    for page in pages.values():
        pictures = re.findall(r"<svg [^>]*class=\"marks\"[^>]*>", page)
        assert pictures
        for picture in pictures:
            label = re.search(r'aria-label="([^"]+)"', picture)
            assert 'role="img"' in picture
            assert label
            assert len(label[1]) > 40


def test_words_from_data_are_escaped() -> None:
    arms = (Arm("<b>&'\"", "control"), Arm("selective attention", "treatment"))
    centres = {("main", "<b>&'\""): 3.4, ("main", "selective attention"): 3.1}
    verdict = dataclasses.replace(
        made.SUPPORTED,
        sentence="<script>alert(1)</script> `a<b`",
        effects=(made.effect("<b>&'\"", 0.3, 0.1),),
        null_effects=(),
    )
    document = made.document(verdict, made.runs(3, centres), arms)
    page = render_html(document)
    assert "<script" not in page
    assert "<b>&" not in page
    assert "<code>a&lt;b</code>" in page
    assert "<b>&" not in render_markdown(document)
    assert "<script" not in verdict_html(verdict)
    assert "<script" not in render_index([document])


def test_a_trial_without_one_effect_still_says_why(documents: dict[str, dict]) -> None:
    verdict = dataclasses.replace(made.SUPPORTED, word="void", effects=(), null_effects=(), secondary=(), cost_ratio={})
    document = made.document(verdict, records=[])
    text = words(render_html(document))
    assert "There is no effect to draw" in text
    assert "No effect: " in render_html(document)
    assert render_markdown(document).startswith("# ∅")


def test_failures_and_divergence_are_shown_with_their_reasons(pages: dict[str, str]) -> None:
    text = words(pages["void"])
    for entry in (
        "MemoryError: worker used 7.9 GiB",
        "loss NaN at step 37",
        "loss 9.0 above its start",
        "no test bytes",
    ):
        assert entry in text


def test_all_controls_stand_in_the_table_and_undefined_is_never_a_number(pages: dict[str, str]) -> None:
    text = words(pages["contradicted"])
    for i in range(1, 9):
        assert f"control number {i} whose name goes on about what it keeps equal and what it does not" in text
    assert "the three differences are equal bit for bit" in words(pages["inconclusive"])
    for page in pages.values():
        assert not re.search(r"\b(nan|None|NaN)\b(?! at step)", words(page).replace("the run reported nan", ""))


def test_markdown_tables_keep_one_width(documents: dict[str, dict]) -> None:
    for document in documents.values():
        tables = re.findall(r"(?:^\|.*\n)+", render_markdown(document), flags=re.MULTILINE)
        assert tables
        for table in tables:
            rows = [re.sub(r"\\\|", "", row) for row in table.strip().split("\n")]
            assert len({row.rstrip().count("|") for row in rows}) == 1, table


def test_json_is_the_summary_itself(documents: dict[str, dict]) -> None:
    assert json.loads(render_json(documents["void"])) == documents["void"]


def test_ten_thousand_runs_summarise_and_render_in_time_and_stay_small() -> None:
    records = made.runs(2_000)
    start = time.process_time()
    document = made.document(records=records)
    page = render_html(document)
    spent = time.process_time() - start
    assert len(records) == 10_000
    assert len(page.encode()) < 1_000_000
    text = words(page)
    assert "lines per panel are drawn" in text
    assert "1,950 further seeds are in the JSON report" in text
    assert spent < 4.0, f"{spent:.1f} s of processor time"


def test_the_report_is_written_in_the_format_of_its_name(tmp_path: Path, documents: dict[str, dict]) -> None:
    document = documents["supported"]
    assert write_report(document, tmp_path / "r.json").read_text() == render_json(document)
    assert write_report(document, tmp_path / "r.txt", "md").read_text() == render_markdown(document)
    default = write_report(document)
    assert default.suffix == ".html"
    assert default.read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match=r"r\.doc.*'doc'.*html"):
        write_report(document, tmp_path / "r.doc")
    with pytest.raises(ValueError, match="'pdf'"):
        render(document, "pdf")


def test_the_index_shows_what_speaks_against_a_claim_first(documents: dict[str, dict]) -> None:
    shuffled = [documents[name] for name in ("supported", "void", "non-inferior", "contradicted", "inconclusive")]
    links = {("selective-recall", "demo"): "recall.html"}
    text = words(render_index(shuffled, links=links))
    places = [
        text.index(document["sentence"])
        for document in (documents[n] for n in ("contradicted", "inconclusive", "void", "supported"))
    ]
    assert places == sorted(places)
    assert 'href="recall.html"' in render_index(shuffled, links=links)
    assert json.loads(render_index(shuffled, "json"))["trials"][0]["verdict"] == "contradicted"
    assert render_index(shuffled, "md").count("\n| ") == 7
    assert "Nothing was measured yet" in words(render_index([]))


def test_the_notebook_card_says_word_sentence_advice_and_every_effect() -> None:
    text = words(verdict_html(made.SUPPORTED))
    for entry in (
        "supported",
        made.SUPPORTED.sentence,
        made.SUPPORTED.advice,
        "+0.305 [+0.287, +0.323]",
        "+0.265 [+0.251, +0.279]",
    ):
        assert entry in text
    assert made.SUPPORTED._repr_html_() == verdict_html(made.SUPPORTED)


def test_every_colour_of_a_picture_has_a_form_for_dark_grounds(pages: dict[str, str]) -> None:
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', "".join(pages.values())))
    assert used <= set(charts.PALETTE)


def test_words_of_a_picture_keep_their_decimals_when_coordinates_are_rounded(pages: dict[str, str]) -> None:
    assert ">−0.0010 [−0.0070, +0.0050]<" in pages["supported"]


@pytest.mark.parametrize(
    ("effect", "low", "high", "text"),
    [
        (0.3051, 0.2871, 0.3231, "+0.305 [+0.287, +0.323]"),
        (-12.34, -20.1, -4.58, "−12.3 [−20.1, −4.6]"),
        (1234.0, 900.0, 1568.0, "+1234 [+900, +1568]"),
        (0.0, -0.001, 0.001, "0.0000 [−0.0010, +0.0010]"),
    ],
)
def test_effects_show_two_digits_of_their_uncertainty(effect: float, low: float, high: float, text: str) -> None:
    assert wording.effect_text({"effect": effect, "low": low, "high": high}) == text


def test_an_effect_without_an_interval_says_so() -> None:
    text = wording.effect_text({"effect": 0.25, "low": None, "high": None, "reason": "1 seed: no variance"})
    assert text == "+0.250 (no interval: 1 seed: no variance)"
    assert wording.effect_text({"effect": None, "reason": "a run is missing"}) == "undefined: a run is missing"


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("wall_seconds", 0.25, "250 ms"),
        ("wall_seconds", 90.0, "90 s"),
        ("cpu_seconds", 5400.0, "90 min"),
        ("peak_bytes", 1536.0, "1.50 KiB"),
        ("flops", 4.2e12, "4.20 TFLOP"),
        ("tokens", 819_200.0, "819,200"),
        ("tokens", 3e9, "3.00 G"),
        ("bits", 4.5, "4.50"),
        ("steps", None, "–"),
    ],
)
def test_costs_are_written_in_their_usual_unit(unit: str, value: float | None, text: str) -> None:
    assert wording.cost_text(unit, value) == text


def test_sentences_end_with_a_stop_and_names_keep_their_letters() -> None:
    assert wording.sentence("weighted raises heads by 0.2") == "Weighted raises heads by 0.2."
    assert wording.sentence("not decided: heads") == "Not decided: heads."
    assert wording.sentence("d2po answers shorter.") == "d2po answers shorter."
    assert wording.sentence("pH rises") == "pH rises."
    assert wording.sentence(None) == ""


def test_an_effect_of_nothing_is_written_in_two_decimals_and_a_small_one_in_its_own():
    from trialist.engine import wording

    nothing = {"effect": -2.4e-10, "low": -1.6e-9, "high": 6.9e-10}
    assert wording.effect_text(nothing) == "0.00 [0.00, 0.00]"
    assert wording.effect_text({"effect": -0.0003, "low": -0.00082, "high": 0.00022}) == "−0.00030 [−0.00082, +0.00022]"

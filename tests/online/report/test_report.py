"""The page is whole, self-contained, escaped, and says what the run's files say."""

import base64
import dataclasses
import io
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.contracts.stores import new_queries
from tests.fakes.browser import FLAGS, needs_chromium, use
from tests.fakes.run import NASTY, made_queries, make_run, make_store, picture
from tiltopt.cli import make_parser
from tiltopt.notebook import MAX_SIDE
from tiltopt.online.queries import RoundRecord
from tiltopt.online.report import charts, gallery, run_page
from tiltopt.online.report.page import image_uri, render
from tiltopt.online.report.pages import PER_ROUND, write_report
from tiltopt.online.report.record import load_run, summarise
from tiltopt.online.store import run_folder
from tiltopt.online.store.files import write_json


def places(text, name):
    """(x, y) of the marks of a class in a picture."""
    marks = ElementTree.fromstring(text).findall(f".//g[@class='{name}']//use")
    return [(float(mark.get("x")), float(mark.get("y"))) for mark in marks]


class Page(HTMLParser):
    """Collects what a browser would fetch, run or show."""

    VOID = frozenset("meta img br line circle rect path polyline link input".split())

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.tags, self.open, self.text = [], [], [], []
        self.feed(text)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    make_run(folder)
    write_json(folder / "summary.json", summarise(load_run(folder), unit="kB", seconds=75.2))
    return load_run(folder)


def made(tmp_path, **options):
    """A run's record, from a store that holds `made_queries(**options)`."""
    make_store(tmp_path / "made", made_queries(**options))
    return load_run(tmp_path / "made")


def context(record, per_round=PER_ROUND):
    return run_page.context(record, per_round)


def page_of(record):
    return render(context(record), "report.html.j2")


def test_page_is_self_contained(run):
    path = write_report(run.folder, run)
    assert path == run.folder / "report.html"
    page = Page(path.read_text())
    assert page.tags.count("script") == 1, "one, without a source"
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://(?!www.w3.org/2000/svg)", path.read_text())
    assert path.stat().st_size < 2e6
    for template in (Path(charts.__file__).parent / "templates").glob("*.j2"):
        assert 'loading="lazy"' not in template.read_text(), "a picture far down is not there when the page is captured"


def test_page_says_what_the_files_say(run):
    text = " ".join(" ".join(Page(write_report(run.folder, run).read_text()).text).split())
    answered = run.queries[run.queries["state"] == "answered"]
    best = answered.loc[answered["value"].idxmax()]
    assert f"{len(answered)} answers of the black box in 4 rounds" in text
    assert f"{best['value']:.2f}".replace("-", "−") + " kB" in text
    assert f"query {best['id']} in round {best['round']}" in text
    assert "1 min 15 s" in text
    assert "alpha raised to 0.03" in text
    assert "#3 failed: ValueError: <b>plate</b> broken" in text
    assert "abandoned: unsafe" in text
    last = run.summary["rounds"][-1]
    assert f"{last['mean']:.2f}".replace("-", "−") in text
    assert "above the 95th percentile of plain samples" in text
    assert "sampler.num_particles" in text


def test_prompts_are_text_never_markup(run):
    raw = write_report(run.folder, run).read_text()
    assert raw.count("<script") == 1, "the page's own"
    assert "<b>plate" not in raw
    assert NASTY in " ".join(Page(raw).text)


def test_gallery_is_sorted_capped_and_says_so(run):
    rounds = context(run, per_round=5)["rounds"]
    assert [r["number"] for r in rounds] == [3, 2, 1, 0]
    zero = rounds[-1]
    answered = run.queries[(run.queries["round"] == 0) & (run.queries["state"] == "answered")]
    want = answered.sort_values("value", ascending=False)["id"].head(5).astype(str).tolist()
    assert [card["id"] for card in zero["cards"]] == want
    text = render(context(run, per_round=5), "report.html.j2")
    assert "The 5 best of 23 answered queries are shown." in text
    assert len(re.findall("<figure data-value", text)) == 20


def test_verdict_admits_a_loss(run):
    worse = dict(run.summary) | {"prior": {"mean": 0.0, "p95": 1.0}, "best_of_n": 0.5}
    text = run_page._verdict(worse, 2, "kB")
    assert "is below the 95th percentile of plain samples (1.00) and below best-of-N" in text


def test_embedded_images_are_the_runs_images(run):
    uri = image_uri(run.image(4))
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert np.array_equal(np.asarray(decoded), np.asarray(picture(4)))
    assert image_uri(run.image(999)) == ""


def test_large_images_are_scaled_down():
    uri = image_uri(picture(1, side=512))
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert decoded.size == (MAX_SIDE, MAX_SIDE)
    assert uri.startswith("data:image/jpeg;")
    assert len(uri) < 40_000


def test_a_run_in_progress_has_a_report_too(tmp_path):
    text = page_of(made(tmp_path, rounds=0))
    assert "What the surrogate had predicted" not in text
    Page(text)


def test_a_run_without_a_single_answer_has_a_report(tmp_path):
    make_store(tmp_path / "run", made_queries(rounds=1).assign(state="asked", value=math.nan))
    text = page_of(load_run(tmp_path / "run"))
    assert "No query is answered yet." in text
    Page(text)


def test_missing_images_leave_a_gap_not_an_error(run):
    shutil.rmtree(run.folder / "images")
    assert "no image file" in write_report(run.folder, run).read_text()


def test_a_damaged_round_summary_is_told_on_the_page(run):
    (run.folder / "round_001" / "summary.json").write_text('{"round": 1, "fidel')
    assert "round_001/summary.json" in write_report(run.folder).read_text()


def test_imported_answers_are_labelled_as_what_they_are(tmp_path):
    (tmp_path / "run").mkdir()
    store, _ = run_folder.create(tmp_path / "run", {}, None)
    store.add_round(RoundRecord(0, "imported", 2), new_queries(1, 2), "toy", {1: (1.0, None), 2: (2.0, None)})
    store.close()
    assert [r["name"] for r in context(load_run(tmp_path / "run"))["rounds"]] == ["imported measurements"]


def test_curve_places_every_answer_where_it_belongs(tmp_path):
    record = dataclasses.replace(made(tmp_path, initial=4, batch=2, rounds=1), reference=(-3.0, -2.0))
    queries, summary = record.queries, summarise(record)
    text = charts.reward_curve(queries, summary, width=500, height=300)
    dots = places(text, "dots")
    seen = queries[queries["state"] == "answered"]
    assert len(dots) == len(seen)
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    slope = np.polyfit(seen["value"], [y for _, y in dots], 1)
    assert np.allclose(np.polyval(slope, seen["value"]), [y for _, y in dots], atol=0.02)
    assert slope[0] < 0
    line = ElementTree.fromstring(text).find(".//g[@class='prior of-mean']/path").get("d")
    assert float(line.split()[2]) == pytest.approx(np.polyval(slope, -2.5), abs=0.02)
    links = re.findall(r'<a href="#query-(\d+)"><title>#\1</title>', text)
    assert links == [str(number) for number in seen["id"]], "each dot leads to its query"


def test_calibration_plot_marks_what_the_intervals_miss():
    queries = pd.DataFrame(
        {
            "state": ["answered"] * 8 + ["failed"],
            "value": [0.0] * 7 + [5.0, math.nan],
            "predicted": [1.6, -1.6, 1.5, 1.7, -1.7, 2.0, 0.0, math.nan, 1.0],
            "predicted_sd": 1.0,
        }
    )
    text = charts.calibration_plot(queries)
    assert (len(places(text, "hit")), len(places(text, "miss"))) == (4, 3)
    assert charts.calibration_plot(queries.iloc[7:]) == ""


def test_two_pictures_of_a_page_take_their_colours_from_it_and_share_no_mark(run):
    """Ids are of the whole page: a mark of a picture that is not shown would not be drawn in the other."""
    summary = summarise(run)
    wide, narrow = charts.reward_curve(run.queries, summary), charts.reward_curve(run.queries, summary, width=420)
    assert not set(re.findall(r' id="([^"]+)"', wide)) & set(re.findall(r' id="([^"]+)"', narrow))
    style = (Path(charts.__file__).parent / "templates" / "style.css").read_text()
    used = set(re.findall(r"var\(--([\w-]+)\)", wide))
    assert used == {"card", "line", "muted", "prior", "mean", "best", "predicted"}
    for name in charts.NAMES:
        assert style.count(f"--{name}:") == 2, "by day and by night"
    assert not re.search("#[0-9a-f]{6}[^0-9a-f]", wide), "no colour of its own"


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(-2.514, 2, "−2.51"), (-0.001, 2, "0.00"), (None, 2, "–"), (math.nan, 1, "–"), (2e7, 2, "2e+07")],
)
def test_numbers_have_a_true_minus_sign(value, places, text):
    assert charts.number(value, places) == text


def test_decimals_follow_the_spread():
    assert charts.decimals_for([-3.0, -2.5, -2.0]) == 2
    assert charts.decimals_for([1000.0, 2000.0]) == 0
    assert charts.decimals_for([0.001, 0.002]) == 5
    assert charts.decimals_for([]) == 1


def test_thousands_of_answers_stay_a_small_page(tmp_path):
    record = made(tmp_path, initial=16, batch=256, rounds=16)
    text = charts.reward_curve(record.queries, summarise(record))
    assert 1000 < len(places(text, "dots")) <= charts.MAX_DOTS
    assert len(text) < 200_000


# ---- what is on the page


def with_judge(record, *missed):
    """The record with these queries not recognised."""
    rounds = tuple({**summary, "unrecognised": list(missed)} for summary in record.rounds)
    return dataclasses.replace(record, rounds=rounds)


def test_the_hero_is_the_best_answer_that_is_still_recognised(run):
    ranked = run.queries[run.queries["state"] == "answered"].sort_values("value", ascending=False)["id"].tolist()
    assert gallery.hero(run, 2, "kB")["id"] == str(ranked[0])
    assert gallery.hero(run, 2, "kB")["beaten"] == ""
    judged = with_judge(run, *ranked[:2])
    found = gallery.hero(judged, 2, "kB")
    assert (found["id"], found["recognised"]) == (str(ranked[2]), True)
    assert found["beaten"].endswith(f"query {ranked[0]}")
    text = page_of(judged)
    assert f"best of all, not recognised: {found['beaten']}" in text
    assert text.count('class="mark"') >= 2, "they stay in the gallery, marked"
    nothing = gallery.hero(with_judge(run, *ranked), 2, "kB")
    assert (nothing["id"], nothing["recognised"], nothing["beaten"]) == (str(ranked[0]), False, "")


def test_before_and_after_are_the_medians_of_a_prompt(tmp_path):
    record = made(tmp_path, initial=10, batch=10, rounds=2)
    pairs = gallery.before_and_after(record, 2, "kB")
    assert len(pairs) == 5
    answered = record.queries[record.queries["state"] == "answered"]
    for before, after in pairs:
        mine = answered[answered["prompt"] == before["prompt"]]
        assert after["prompt"] == before["prompt"]
        for card, number in ((before, 0), (after, 2)):
            values = sorted(mine.loc[mine["round"] == number, "value"])
            assert mine.set_index("id").loc[int(card["id"]), "value"] == values[(len(values) - 1) // 2]


def test_a_banner_tells_of_failures_and_is_not_there_without(run, tmp_path):
    page = Page(page_of(run))
    assert "1 of 48 queries have failed" in " ".join(page.text)
    assert "ValueError: <b>plate</b> broken" in " ".join(page.text)
    whole = made_queries(rounds=0)
    whole = whole[whole["state"] == "answered"].head(2).assign(id=[1, 2])
    make_store(tmp_path / "whole", whole)
    assert 'role="alert"' not in page_of(load_run(tmp_path / "whole"))


def test_labels_are_drawn_after_the_dots(run):
    text = charts.reward_curve(run.queries, summarise(run))
    assert text.index('class="label') > text.rindex('href="#query-')


def test_the_command_that_is_copied_survives_a_folder_with_quotes_and_spaces(tmp_path):
    folder = tmp_path / "it's a run"
    words = shlex.split(gallery.refine_command(folder, 7))
    options = make_parser().parse_args(words[1:])
    assert (words[0], options.command, options.folder, options.id) == ("tiltopt", "refine", str(folder), 7)


def test_a_card_says_where_its_query_started_from(run):
    row = run.queries.iloc[0]
    assert gallery.card(run, row, 2, "")["origin"] == ""
    begun = row.copy()
    begun["operator"], begun["parents"], begun["k0"] = "pool", "3 12", 6
    assert gallery.card(run, begun, 2, "")["origin"] == "pool of #3, #12 at step 6"


# ---- in a browser

LOOK = """
    const images = [...document.images].filter((image) => !image.closest("dialog"));
    const table = document.querySelector(".scroll");
    const found = {wide: document.documentElement.scrollWidth, view: document.documentElement.clientWidth,
        unseen: images.filter((image) => !image.complete || !image.naturalWidth).length, images: images.length,
        table: [table.scrollWidth, table.clientWidth, window.getComputedStyle(table).overflowX]};
    const large = document.getElementById("large"), open = document.querySelectorAll(".gallery button.open");
    open[0].click();
    found.opened = [large.open, large.querySelector("img").src === open[0].querySelector("img").src];
    document.dispatchEvent(new window.KeyboardEvent("keydown", {key: "ArrowRight"}));
    found.next = large.querySelector("img").src === open[1].querySelector("img").src;
    large.querySelector(".close").click();
    const dot = document.querySelector(".wide svg a"), number = dot.getAttribute("href").split("-")[1];
    dot.dispatchEvent(new window.MouseEvent("click", {bubbles: true, cancelable: true}));
    found.dot = [large.open, large.querySelector(".which").textContent.startsWith(`#${number} `), window.location.hash];
    large.querySelector(".close").click();
    found.closed = !large.open;
    const select = document.querySelector(".sort select"), gallery = document.querySelector(".gallery");
    const order = () => [...gallery.children].map((figure) => Number(figure.dataset.id));
    select.value = "id 1"; select.dispatchEvent(new window.Event("change", {bubbles: true}));
    found.order = order();
    let copied = "";
    Object.defineProperty(window.navigator, "clipboard", {value: {writeText: async (text) => { copied = text; }}});
    const button = document.querySelector(".gallery button.copy");
    button.click(); await wait(50);
    found.copied = [copied === button.dataset.copy, button.textContent];
    window.dispatchEvent(new window.Event("beforeprint"));
    found.unfolded = [...document.querySelectorAll("details")].every((folded) => folded.open);
    return found;
"""


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_and_every_control_works(run, tmp_path, width):
    found, console = use(write_report(run.folder, run), LOOK, tmp_path, width=width)
    assert console == []
    assert "error" not in found, found
    assert found["wide"] <= found["view"], "no sideways scrolling"
    assert (found["unseen"], found["images"] > 48) == (0, True), "every image is there without scrolling to it"
    inner, outer, overflow = found["table"]
    assert overflow == "auto"
    assert (inner > outer) == (width == 390), "the table scrolls where it does not fit"
    assert (found["opened"], found["next"], found["closed"]) == ([True, True], True, True)
    assert found["dot"] == [True, True, ""], "a click on a dot opens its picture"
    assert found["order"] == sorted(found["order"])
    assert found["copied"] == [True, "copied"]
    assert found["unfolded"]


@needs_chromium
@pytest.mark.slow
def test_a_printed_page_holds_every_image(run, tmp_path):
    page = write_report(run.folder, run)
    out = tmp_path / "page.pdf"
    command = ["chromium", *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={out}", f"file://{page}"]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    drawn = len(re.findall(rb"/Subtype\s*/Image", out.read_bytes()))
    assert drawn >= 46, "of 46 answered queries"

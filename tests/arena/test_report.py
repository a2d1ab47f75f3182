"""The report: complete, self-contained, and never kinder than the numbers."""

import dataclasses
import errno
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from arena_curves import BUDGET, comparison
from markdown_it import MarkdownIt
from PIL import Image

from speed_engine.arena import figures, summary, verdicts
from speed_engine.arena.figures import LEGEND_LINE, PER_PANEL, draw_quality, in_lines
from speed_engine.arena.report import write_report
from speed_engine.arena.results import GAUSSIAN, REAL, Results, write_results
from speed_engine.arena.speedup import Ratio, speed_up

SPEEDS = {"uniform": 1.0, "speed_paper": 2.0, "min_snr": 1.0, "uniform@flow": 3.0}


def report(results: Results, folder) -> tuple[str, str]:
    write_results(results, folder / "results.json")
    write_report(folder)
    html = folder / "report.html"
    return html.read_text(), (folder / "report.md").read_text()


def failing(results: Results, *failed: tuple[str, int]) -> Results:
    curves = [
        dataclasses.replace(c, failure="loss | <NaN>", points=())
        if (c.contestant, c.seed) in failed
        else c
        for c in results.curves
    ]
    return dataclasses.replace(results, curves=tuple(curves))


class Sources(HTMLParser):
    """Every address that a browser would fetch, and the tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    results = comparison(SPEEDS, 3, 0.03)
    results = failing(results, ("min_snr", 1), *(("uniform@flow", seed) for seed in range(3)))
    for seed in range(3):
        samples = folder / f"runs/speed_paper/{seed}/samples"
        samples.mkdir(parents=True)
        for step, value in ((1, 0), (200, 255)):
            picture = Image.fromarray(np.full((80, 80), value, np.uint8))
            picture.save(samples / f"step-{step:08d}.png")
    return folder, *report(results, folder)


def test_the_page_fetches_nothing_and_closes_its_tags(written):
    page = Sources(written[1])
    assert page.open == [] and page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "@import" not in written[1] and "url(" not in written[1]


def test_every_picture_of_the_markdown_exists(written):
    folder, _, markdown = written
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert set(pictures) == {f"figures/{p.name}" for p in (folder / "figures").iterdir()}
    for kind in ("quality-images", "quality-seconds", "speedup-1", "denoising", "samples"):
        assert any(kind in picture for picture in pictures)


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(written):
    for block in re.findall(r"(?:^\|.*\n)+", written[2], flags=re.M):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


def test_failed_runs_are_listed_with_their_reason(written):
    _, html, markdown = written
    assert "4 runs failed or are missing" in html and "4 runs failed or are missing" in markdown
    assert html.count("loss | &lt;NaN&gt;") == markdown.count("loss \\| \\<NaN\\>") == 4
    assert "No seed is complete for both uniform@flow and uniform." in html


def test_samples_are_the_last_ones_of_the_first_complete_seed(written):
    with Image.open(written[0] / "figures" / "samples-01.png") as picture:
        assert np.asarray(picture).min() == 255 and picture.width == 80
    assert "speed_paper, seed 0" in written[1]


def said(results, method=None) -> str:
    return summary.headline(results, verdicts.against(results, "uniform"), method)


def test_the_headline_is_plain_about_what_is_not_shown():
    sentence = said(comparison({"uniform": 1.0, "speed_plus": 1.0}, 5, 0.1))
    assert "not shown to be different from 1" in sentence and "fastest of" not in sentence


def test_the_headline_is_about_the_fastest_of_all_and_knows_no_goals():
    results = comparison({"uniform": 1.0, "speed_plus": 5.0, "p2": 9.0}, 5, 0.02)
    sentence = said(results)
    assert "p2 has a speed-up of" in sentence and "It is faster." in sentence
    assert "fastest of 2" in sentence and "goal" not in sentence
    of_one = said(results, "speed_plus")
    assert "speed_plus has a speed-up of" in of_one and "fastest of" not in of_one


def test_choosing_the_fastest_of_many_is_said():
    sentence = said(comparison({"uniform": 1.0, "a": 1.5, "b": 1.2}, 3, 0.02))
    assert "a has a speed-up of 1.4" in sentence and "fastest of 2" in sentence


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_there_is_no_verdict(seeds):
    results = comparison({"uniform": 1.0, "a": 9.0, "b": 0.1}, seeds, 0.02)
    sentence = said(results)
    assert "There are too few seeds to say: 3 or more are needed." in sentence
    assert "It is" not in sentence
    table = summary.speedup_table(verdicts.against(results, "uniform").by_images, set())
    assert table is not None
    assert {row[1] for row in table.rows} == {"too few seeds"}


@pytest.mark.parametrize("quality, learned", [(0.98, False), (0.85, True)])
def test_where_the_baseline_learned_nothing_there_is_no_verdict(quality, learned):
    """As on pictures that are noise: the figure wavers, and ends about where it began."""
    results = comparison({"uniform": 1.0, "a": 6.0}, 5, 0.0)
    curves = []
    for curve in results.curves:
        last = len(curve.points) - 1
        points = [
            dataclasses.replace(p, values={"held_out_fid": 9.0 * quality ** (i / last)})
            for i, p in enumerate(curve.points)
        ]
        curves.append(dataclasses.replace(curve, points=tuple(points)))
    sentence = said(dataclasses.replace(results, curves=tuple(curves)))
    unlearned = "Against uniform nothing could be measured. uniform did not measurably improve"
    assert (unlearned in sentence) == (not learned)


def test_never_arriving_is_said():
    sentence = said(comparison({"uniform": 1.0, "speed_plus": 0.3}, 3, 0.02))
    assert "never got to its final quality" in sentence


@pytest.mark.parametrize("tuned", [True, False])
def test_the_report_names_its_data_and_how_learning_rates_were_chosen(tmp_path, tuned):
    results = comparison({"uniform": 1.0, "p2": 2.0})
    rates = {"0.0005": 3.0, "0.001": 2.0} if tuned else {}
    results = dataclasses.replace(
        results,
        config=results.config | {"data": {"source": "/data/shards/birds"}},
        contestants=tuple(dataclasses.replace(c, tuning=rates) for c in results.contestants),
    )
    for text in report(results, tmp_path):
        assert "birds: 2 methods at" in text
        assert ("learning rate of each is the best of a grid." in text) == tuned
        assert ("learning rate of each is that of the configuration." in text) == (not tuned)


def test_the_name_of_a_data_set_is_text(tmp_path):
    results = comparison({"uniform": 1.0, "p2": 2.0})
    config = results.config | {"data": {"source": "/data/a<b>*c*"}}
    _, page = report(dataclasses.replace(results, config=config), tmp_path)
    assert page.startswith(r"# a\<b\>\*c\*: 2 methods at")


def test_uniform_on_the_own_process_is_a_baseline_of_its_own():
    results = comparison({"uniform": 1.0, "uniform@flow": 3.0, "p2@flow": 6.0, "p2@edm": 1.0})
    found = verdicts.against_own_uniform(results)
    assert set(found.by_images) == {"p2@flow"} and set(found.missing) == {"p2@edm"}
    assert found.by_images["p2@flow"].median.low == pytest.approx(2)


def test_a_learning_rate_at_the_edge_of_its_grid_is_marked(written):
    assert "0.001 ⚠ of 0.0005, 0.001" in written[1]
    results = comparison({"a": 1.0})
    lone = dataclasses.replace(results.contestants[0], tuning={"0.001": 2.0})
    assert not results.at_grid_edge(lone)
    # Rates whose runs failed were tried, too.
    results = dataclasses.replace(results, learning_rates=(0.0005, 0.001, 1e30))
    assert results.tuned and not results.at_grid_edge(lone)
    assert not results.at_grid_edge(dataclasses.replace(lone, learning_rate=0.0005, tuning={}))
    assert results.at_grid_edge(dataclasses.replace(lone, learning_rate=0.0005))


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(1.519, 1.519), "1.52×"),
        (Ratio(0, 0.9), "< 0.90×"),
        (Ratio(4, np.inf), "≥ 4.00×"),
        (Ratio(1, 2), "1.00 to 2.00×"),
        (Ratio(0, np.inf), "?"),
        (Ratio(123.4, 123.4), "123×"),
    ],
)
def test_a_bound_is_written_as_one(ratio, text):
    assert summary.written(ratio) == text


def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    html, _ = report(comparison(SPEEDS), tmp_path)
    assert "too few seeds for an interval" in html and "too few seeds to say" in html


def test_without_baselines_there_is_a_report(tmp_path):
    results = dataclasses.replace(comparison({"a": 1.0, "b": 2.0}, 2), baselines=())
    html, _ = report(results, tmp_path)
    assert "No baseline was named" in html


def test_when_everything_failed_there_is_a_report(tmp_path):
    results = failing(comparison({"a": 1.0, "b": 2.0}), ("a", 0), ("b", 0))
    html, markdown = report(results, tmp_path)
    assert "nothing could be measured" in html and "nothing could be measured" in markdown


def test_a_run_that_is_absent_is_listed():
    results = comparison({"a": 1.0}, 2)
    table = summary.failed_runs_table(dataclasses.replace(results, curves=results.curves[:1]))
    assert table is not None and table.rows == [["a", "1", "it has not run"]]


def test_many_contestants_are_spread_over_panels(tmp_path):
    report(comparison({"base": 1.0} | {f"m{i}": 1.0 for i in range(PER_PANEL + 1)}), tmp_path)
    assert len(list((tmp_path / "figures").glob("quality-images-*.png"))) == 2


def test_the_report_is_the_same_each_time(tmp_path):
    results = comparison({"a": 1.0, "b": 2.0}, 2, 0.1)
    assert report(results, tmp_path) == report(results, tmp_path)


HOSTILE = (
    "$\\oops$ <script>alert(1)</script> [red] [x](http://a) | `tick` ```\n# head\n* $x$ &lt; \udcff"
)


def test_what_users_name_is_text_in_every_page(tmp_path):
    """Also the reason of a failure, the features and the command, which are anybody's words."""
    results = comparison({"uniform": 1.0, "min_snr": 2.0}, 3, 0.03)
    curves = [
        dataclasses.replace(c, failure=HOSTILE, points=()) if c.seed == 1 else c
        for c in results.curves
    ]
    hostile = dataclasses.replace(
        results, curves=tuple(curves), extractor=HOSTILE[:-1], command=f"x --run {HOSTILE}"
    )
    html, markdown = report(hostile, tmp_path)
    for page in (html, MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)):
        shown = Texts(page)
        assert not {"script", "a"} & shown.tags
        assert {tag for tag in shown.tags if tag in ("em", "h6")} == set()
        said = " ".join("".join(shown.texts).split())
        for part in ("<script>alert(1)</script>", "[red]", "[x](http://a)", "| `tick` ```"):
            assert said.count(part) >= 3
        assert "# head * $x$ &lt; \\udcff" in said


class Texts(HTMLParser):
    """What a browser shows, and the tags that there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_bad_input_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no results.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="baseline nobody is not among the methods"):
        report(dataclasses.replace(comparison({"a": 1.0}), baselines=("nobody",)), tmp_path)


def with_floor(results, floor: float):
    references = {GAUSSIAN: {"held_out_fid": floor, "copied_share": 0.01}}
    return dataclasses.replace(results, references=references)


def test_a_baseline_that_does_not_beat_a_gaussian_is_said_first(tmp_path):
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3, 0.01)
    end = 1000 * BUDGET**-0.6
    sound, empty = with_floor(results, 2 * end), with_floor(results, end / 2)
    (sentence,) = summary.floor_in_words(sound)
    assert "it has learned more than first and second moments" in sentence
    (sentence,) = summary.floor_in_words(empty)
    assert "speed-ups over it are undecided" in sentence
    for of, verdict, cell in (
        (sound, "It is faster.", "faster"),
        (empty, "That decides nothing:", "undecided"),
    ):
        found = verdicts.against(of, "uniform")
        assert verdict in summary.headline(of, found)
        table = summary.speedup_table(found.by_images, found.undecided)
        assert table is not None and table.rows[0][1] == cell
        assert ("beyond the Gaussian" in table.header) == (of is sound)
    html, markdown = report(sound, tmp_path)
    for page in (html, markdown):
        assert "Gaussian per class, no training" in page
        assert page.index("ends at") < page.index("has a speed-up of")
    assert summary.floor_in_words(results) == []


def test_a_baseline_that_ends_where_real_images_are_is_said_to_be_at_the_end_of_the_metric():
    results = with_floor(comparison({"uniform": 1.0, "p2": 2.0}, 3), 1e6)
    end = 1000 * BUDGET**-0.6

    def said(real: float) -> str:
        references = results.references | {REAL: {"held_out_fid": real}}
        (sentence,) = summary.floor_in_words(dataclasses.replace(results, references=references))
        return sentence

    assert "no longer tells generated images from real ones" in said(end * 1.01)
    assert "training images" not in said(end * 0.99)


@pytest.mark.parametrize("name", ["uniform", "p2"])
def test_a_contestant_whose_solver_has_too_few_steps_is_named_and_nothing_with_it_is_decided(name):
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    steps = results.solver_steps
    assert steps is not None

    def with_more(share: float, of: int) -> Results:
        curves = [
            dataclasses.replace(
                curve,
                by_solver_steps={str(of): share * curve.points[-1].values["held_out_fid"]}
                if curve.contestant == name
                else {},
            )
            for curve in results.curves
        ]
        return dataclasses.replace(results, curves=tuple(curves))

    limited = with_more(0.4, steps + 1)
    (sentence,) = summary.solver_in_words(limited)
    assert sentence.startswith(f"{name} ends at")
    found = verdicts.against(limited, "uniform")
    assert name in found.undecided["p2"]
    assert "decides nothing" in summary.headline(limited, found)
    table = summary.speedup_table(found.by_images, found.undecided)
    assert table is not None and table.rows[0][1] == "undecided"
    unknown = dataclasses.replace(limited, config={})
    for sound in (results, unknown, with_more(0.95, steps + 1), with_more(0.4, steps - 1)):
        assert summary.solver_in_words(sound) == []
        assert verdicts.against(sound, "uniform").undecided == {}


def test_speed_ups_beyond_the_gaussian_leave_earlier_levels_out():
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    end = 1000 * BUDGET**-0.6
    found = speed_up(with_floor(results, 1.5 * end), "p2", "uniform")
    assert 0 < sum(level < 1.5 * end for level in found.levels) < len(found.levels)
    assert found.beyond is not None and found.beyond.low == pytest.approx(2)
    assert speed_up(with_floor(results, end / 2), "p2", "uniform").beyond is None
    assert speed_up(results, "p2", "uniform").beyond is None


def test_the_validation_loss_compares_contestants_of_one_process():
    results = comparison({"uniform@flow": 1.0, "p2@flow": 3.0, "uniform": 2.0}, 3)
    assert verdicts.against_in_loss(results, "uniform@flow") is None  # not measured
    for curve in results.curves:
        for point in curve.points:
            point.values["validation_loss"] = point.values["held_out_fid"] ** 2
    found = verdicts.against_in_loss(results, "uniform@flow")
    assert found is not None and found.metric == "validation loss"
    assert set(found.by_images) == {"p2@flow"}
    assert found.by_images["p2@flow"].median.low == pytest.approx(3)


def test_what_could_not_be_measured_is_said_once_and_draws_nothing(tmp_path):
    results = comparison({"uniform": 1.0, "p2": 2.0, "clts": 2.0}, 3)
    for curve in results.curves:
        for point in curve.points if curve.contestant == "uniform" else ():
            point.values["held_out_fid"] = 3.0
    html, markdown = report(results, tmp_path)
    for page in (html, markdown):
        assert page.count("did not measurably improve") == 2  # the headline, and the reason
        assert "p2, clts: uniform did not" in page
        assert "median over levels |" not in page and "<th>median over levels" not in page
    assert not list((tmp_path / "figures").glob("speedup-*"))


def test_long_names_are_not_cut_off_in_a_legend(tmp_path):
    name = "logit_normal@flow:velocity+optimizer.name=muon+budget=0.5"
    results = comparison({"uniform@flow": 1.0, name: 2.0}, 3)
    panels = draw_quality(results, "images", tmp_path)
    with Image.open(panels[0].path) as picture:
        border = np.asarray(picture.convert("L"))[:90, -8:]
    assert border.min() > 200


def test_a_name_that_is_wider_than_a_picture_is_broken_before_its_options():
    short = "logit_normal@flow:velocity+seed_offset=100"
    assert in_lines(short) == short
    wide = "logit_normal@flow:velocity+optimizer.name=muon+optimizer.learning_rate=0.016+budget=0.5"
    lines = in_lines(wide).split("\n")
    assert lines[1:] == ["    +optimizer.learning_rate=0.016+budget=0.5"]
    assert all(len(line) <= LEGEND_LINE for line in lines)
    assert "".join(line.strip() for line in lines) == wide


def test_a_report_that_cannot_be_drawn_leaves_the_one_before(tmp_path, monkeypatch):
    report(comparison({"a": 1.0, "b": 2.0}, 2, 0.1), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(results, folder):
        (folder / "denoising.png").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(figures, "draw_denoising", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'figures'}'"):
        write_report(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_seeds_that_were_evaluated_at_other_images_are_a_line_of_the_report(tmp_path):
    results = comparison({"uniform": 1.0, "other": 2.0}, 3, 0.03)
    *others, last = results.curves
    shorter = dataclasses.replace(last, points=last.points[:-1])
    for page in report(dataclasses.replace(results, curves=(*others, shorter)), tmp_path):
        assert "The seeds of other were evaluated at different numbers of images" in page


@pytest.mark.parametrize(
    "options, changed, budget, said",
    [
        ({}, {}, "20,000 images", "same number of images. Runs of one seed share initial weights"),
        ({"budget": 0.5}, {}, "up to 20,000 images", "or the share that it names"),
        ({}, {"budget_seconds": 90.0}, "90 seconds", "expected to in the same time"),
        ({"model.depth": 2}, {}, "20,000 images", "where their networks are the same"),
        ({"seed_offset": 9}, {}, "20,000 images", "and noise, unless a name sets other seeds."),
        (
            {"optimizer.learning_rate": 0.1}, {}, "20,000 images",
            "The learning rate of each is the best of a grid, unless its name sets one.",
        ),
    ],
)  # fmt: skip
def test_the_page_says_what_the_runs_had_in_common(tmp_path, options, changed, budget, said):
    results = comparison({"uniform": 1.0, "other": 2.0}, 3, 0.03)
    plain, other = results.contestants
    contestants = plain, dataclasses.replace(other, options=options)
    results = dataclasses.replace(results, contestants=contestants, **changed)
    for page in report(results, tmp_path):
        assert f"2 methods at {budget} each" in page and said in page

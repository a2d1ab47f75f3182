"""The report of a comparison, made from results.json alone; everything in it is computed.

FOLDER/report.html     one file that needs nothing else, for a wide screen or a phone
FOLDER/report.md       the same for a repository, with the pictures beside it
FOLDER/figures/        the pictures
"""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

from speed_engine.arena import figures, summary, verdicts
from speed_engine.arena.placebo import false_alarm_tests
from speed_engine.arena.results import Results, read_results
from speed_engine.runtime.checks import UserError, check_installed
from speed_engine.runtime.files import naming, write_durably

PAGE, MARKDOWN, FIGURES = REPORT = "report.html", "report.md", "figures"


def check_libraries() -> None:
    """Refuse to write reports where the libraries for them are not installed.

    Raises:
        UserError: one of them is missing; it names the extra that has it.
    """
    check_installed("the report of a comparison", "plots", "jinja2", "matplotlib")


def write_report(folder: Path) -> list[str]:
    """Write report and pictures beside ``folder/results.json``.

    All pictures are drawn before those of an earlier report are replaced.

    Returns:
        The sentences that the report begins with: what the comparison found.

    Raises:
        UserError: results.json is absent, or is no file of results, or names an unknown baseline;
            or a library of the extra ``plots`` is missing.
        OSError: the disk is full, for example; the earlier report stays.
    """
    check_libraries()
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} has no results.json; `speed-engine compare` writes it.")
    results = read_results(path)
    _check(results)
    partial, pictures = folder / "report.partial", folder / FIGURES
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(pictures):
            (partial / FIGURES).mkdir(parents=True)
            content = _content(results, folder, partial / FIGURES)
            pages = {name: _render(name, partial, content) for name in (MARKDOWN, PAGE)}
            shutil.rmtree(pictures, ignore_errors=True)  # of contestants that are gone, too
            (partial / FIGURES).rename(pictures)
        for name, page in pages.items():
            # A path that is no Unicode is shown by its numbers.
            write_durably(folder / name, page.encode("utf-8", "backslashreplace"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return content["headlines"]


def _check(results: Results) -> None:
    names = [contestant.name for contestant in results.contestants]
    for baseline in results.baselines:
        if baseline not in names:
            raise UserError(f"The baseline {baseline} is not among the methods: {names}.")


def _content(results: Results, folder: Path, pictures: Path) -> dict[str, Any]:
    """What both templates show."""
    found = [verdicts.against(results, baseline) for baseline in results.baselines]
    in_loss = [verdicts.against_in_loss(results, baseline) for baseline in results.baselines]
    own = verdicts.against_own_uniform(results)
    sections = [
        _section(one, figures.draw_speedups(results, one.baseline, one.by_images, pictures))
        for one in found
    ]
    others = [*in_loss, own if own.by_images else None]
    sections += [_section(one, []) for one in others if one is not None]
    return {
        "results": results,
        "headlines": [
            *summary.floor_in_words(results),
            *summary.solver_in_words(results),
            *(summary.headline(results, one) for one in found),
            *(f"By {one.metric}: {summary.headline(results, one)}" for one in in_loss if one),
            *false_alarm_tests(results),
        ],
        "conditions": summary.conditions_in_words(results),
        "spelled": summary.spelled_in_words(results),
        "contestants": summary.contestants_table(results),
        "edge": any(results.at_grid_edge(contestant) for contestant in results.contestants),
        "others": summary.other_metrics_table(results),
        "failed": summary.failed_runs_table(results),
        "against": sections,
        "by_images": figures.draw_quality(results, "images", pictures),
        "by_seconds": figures.draw_quality(results, "seconds", pictures),
        "denoising": figures.draw_denoising(results, pictures),
        "samples": figures.crop_samples(results, folder, pictures),
        "config": json.dumps(results.config, indent=1),
        "environment": json.dumps(results.environment, indent=1),
    }


def _section(found: verdicts.Against, panels: list[figures.Panel]) -> dict[str, Any]:
    return {
        "baseline": found.baseline,
        "metric": found.metric,
        "images": summary.speedup_table(found.by_images, found.undecided),
        "seconds": summary.speedup_table(found.by_seconds, found.undecided),
        "missing": summary.reasons(found.missing),
        "panels": panels,
    }


def _render(name: str, folder: Path, content: dict[str, Any]) -> str:
    """One template; names of users are text in it, never HTML or Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("speed_engine.arena", "templates"),
        autoescape=name.endswith("html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "inline": lambda path: (
            "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        ),
        "relative": lambda path: path.relative_to(folder).as_posix(),
        "text": _as_markdown,
        "fence": lambda text: "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
    }
    return environment.get_template(name).render(content)


def _as_markdown(text: str) -> str:
    """Markdown, one line of it, that shows a text as it is.

    An underscore within a word is no markup, and many names of methods have one.
    """
    line = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<>|&#~$]|\b_|_\b|(?<!\w)_(?!\w)", r"\\\g<0>", line)

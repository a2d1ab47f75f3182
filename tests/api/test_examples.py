"""Every example of the public docstrings, run."""

import doctest
import inspect
import io

import pandas
import pytest
from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]
from rich.console import Console

import speed_engine as se

PUBLIC = [name for name in se.__all__ if inspect.isclass(of := getattr(se, name)) or callable(of)]
QUICK = {"features": "classifier", "num_images": 500, "solver_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    se.train(
        "digits",
        folder / "runs/mine",
        console=Console(file=io.StringIO()),
        steps=20,
        log_every=10,
        batch_size=16,
        model={"dim": 16, "depth": 1, "num_heads": 2},
        evaluation=QUICK,
    )
    return folder


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in PUBLIC:
        of = getattr(se, name)
        yield from (test for test in finder.find(of, name, globs={}) if test.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_the_example_does_what_it_says(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("speed_engine.runtime.progress.SILENCE", 3600)  # a busy machine is slow
    example.globs |= {"se": se, "pandas": pandas, "scheduler": DDPMScheduler()}
    printed = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=printed.write)
    assert runner.failures == 0, printed.getvalue()


def test_every_public_function_and_method_has_an_example():
    shown = {test.name for test in examples()}
    methods = {"Model.generate", "Model.save_pretrained", "Model.push_to_hub"}
    methods |= {"Run.metrics", "Run.model", "Run.resume", "Run.evaluate"}
    functions = {name for name in PUBLIC if not inspect.isclass(getattr(se, name))}
    assert shown >= functions | methods

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from speed_engine.arena.compare import Comparison, Plan
from speed_engine.arena.contestants import ABLATION, expand, options, resolve
from speed_engine.arena.recipes import RECIPES, RecipeName, values_of
from speed_engine.build import build_process
from speed_engine.config import TrainConfig, from_json, with_values
from speed_engine.diffusion.grammar import read_spelling
from speed_engine.diffusion.methods import METHODS
from speed_engine.runtime.checks import UserError

BASE = TrainConfig(steps=400)
RATE = BASE.optimizer.learning_rate


def test_a_name_sets_method_process_target_and_options():
    config = resolve("speed_paper@cosine:v+k=3+stratified=True+optimizer.ema_decay=0.9", BASE)
    assert config.method == "speed_paper+k=3+stratified=True"
    assert (config.schedule, config.prediction) == ("cosine", "v")
    assert config.optimizer.ema_decay == 0.9
    assert dataclasses.replace(
        config, method=BASE.method, schedule=BASE.schedule, prediction=BASE.prediction,
        optimizer=BASE.optimizer,
    ) == BASE  # fmt: skip


def test_a_name_sets_options_of_the_network():
    config = resolve("uniform+model.variant=modern+model.depth=2", BASE)
    assert config.model == dataclasses.replace(BASE.model, variant="modern", depth=2)
    assert dataclasses.replace(config, model=BASE.model) == resolve("uniform", BASE)
    assert resolve("uniform+model.size=DiT-S/2", BASE).model.size == "DiT-S/2"


def test_what_is_left_out_is_the_comparisons_own():
    base = dataclasses.replace(BASE, schedule="cosine", prediction="v")
    assert resolve("p2", base).schedule == "cosine"
    assert resolve("p2", base).prediction == "v"
    assert resolve("p2@flow", base).prediction == "velocity"  # the target of its process


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("speed paper", "write METHOD"),
        ("", "write METHOD"),
        ("nonsense", "unknown method 'nonsense'; choose from uniform"),
        ("uniform@nowhere", "nowhere"),
        ("uniform:nothing", "nothing"),
        ("uniform+k=3", "there is no option k; there are those of uniform (stratified"),
        ("speed_paper+k=many", 'k="many": should be a valid number'),
        ("speed_paper+stratified=2", "stratified=2: should be a valid boolean"),
        ("speed_paper+k=3+k=4", "sets k twice"),
        ("uniform+optimizer.ema_deca=0.9", "the nearest is optimizer.ema_decay"),
        ("uniform+optimizer.ema_decay=much", 'optimizer.ema_decay="much": should be a valid'),
        ("uniform+model.variant=modem", 'model.variant="modem"'),
        ("uniform+model.num_heads=3", "num_heads=3 does not divide the width"),
        ("p2+gamma=a/b", "write METHOD"),
        ("uniform+model.dim=-64", "model.dim=-64"),
        ("uniform+data.source=elsewhere", "would not be the same comparison"),
        ("speed_paper+k=0", "k"),
        ("speed_paper+seed=3", "there is no option seed"),
        ("speed_paper+steps=9", "would not be the same comparison"),
        ("uniform+optimizer.learning_rate=-1", "must be positive"),
        ("uniform+optimizer.adamw_learning_rate=1", "has no effect with optimizer.name=adamw"),
        ("uniform+optimizer.name=sophia", "unknown optimizer.name 'sophia'"),
        ("uniform+seed_offset=-1", "must be a whole number"),
        ("speed_official@edm", "speed_official"),
    ],
)
def test_a_bad_name_is_refused_with_the_reason(name, complaint):
    with pytest.raises(ValueError, match="methods=") as caught:
        resolve(name, BASE)
    assert complaint in str(caught.value)


def test_the_same_method_with_other_seeds_is_a_contestant_of_its_own():
    assert resolve("uniform+seed_offset=100", BASE) == dataclasses.replace(
        resolve("uniform", BASE), seed=BASE.seed + 100
    )
    assert expand(["uniform", "uniform+seed_offset=100"], BASE)[:2] == (
        "uniform", "uniform+seed_offset=100",
    )  # fmt: skip


def test_all_is_every_method_and_the_baselines_join_once():
    names = expand(["all", "uniform"], BASE)
    methods = [resolve(name, BASE).method.partition("+")[0] for name in names]
    assert methods[: len(METHODS)] == list(METHODS)
    assert names[len(METHODS) :] == ("logit_normal@flow:velocity", "uniform@flow:velocity")


def test_uniform_on_the_process_and_target_of_each_contestant_joins():
    names = expand(["speed_paper@cosine:v"], BASE)
    assert names == (
        "speed_paper@cosine:v",
        "uniform@linear:epsilon",
        "logit_normal@flow:velocity",
        "uniform@cosine:v",
        "uniform@flow:velocity",
    )


def test_a_name_with_its_own_rate_is_a_contestant_beside_one_of_the_grid():
    names = ["uniform@linear:epsilon", f"uniform+optimizer.learning_rate={RATE:g}"]
    assert expand(names, BASE)[:2] == (names[0], "logit_normal@flow:velocity")
    assert expand(names, BASE, tuned=True)[:2] == tuple(names)


def test_the_shortest_task_curriculum_takes_half_of_the_run():
    (name,) = [name for name in expand(["all"], BASE) if name.startswith("task_curriculum")]
    patience = read_spelling(resolve(name, BASE).method).options["patience"]
    assert isinstance(patience, int) and patience * 20 == BASE.steps // 2


def test_every_contestant_of_the_ablation_resolves_and_differs():
    assert len({resolve(name, BASE) for name in ABLATION}) == len(ABLATION)
    assert options("speed_paper+k=2+stratified=True") == {"k": 2, "stratified": True}


def test_a_comparison_of_version_0_1_goes_on_under_its_conditions(tmp_path):
    kept = Path(__file__).parents[2] / "docs" / "results" / "digits" / "compare.json"
    (tmp_path / "compare.json").write_bytes(kept.read_bytes())
    (tmp_path / "runs").mkdir()
    then = json.loads(kept.read_text())
    plan = Plan(
        config=from_json(json.dumps(then["config"])),
        contestants=("uniform",),
        seeds=1,
        learning_rates=tuple(then["learning_rates"]),
        solver_steps=tuple(then["solver_steps"]),
        budget_seconds=then["budget_seconds"],
    )
    Comparison(plan, tmp_path, 1, 1, Console(quiet=True))
    shorter = dataclasses.replace(plan, config=dataclasses.replace(plan.config, steps=7))
    with pytest.raises(UserError, match="config.steps was .*, is 7"):
        Comparison(shorter, tmp_path, 1, 1, Console(quiet=True))


def test_a_baseline_that_is_named_later_keeps_its_runs(tmp_path):
    def folder(contestants: tuple[str, ...]) -> Path:
        plan = Plan(config=BASE, contestants=contestants, seeds=1)
        comparison = Comparison(plan, tmp_path, 1, 1, Console(quiet=True))
        (name, *_) = [of for of in comparison.configs if of.startswith("uniform")]
        return comparison._folder("runs", name)

    first = folder(("min_snr",))
    assert first.name == "uniform-on-linear-epsilon"
    first.mkdir(parents=True)
    assert folder(("uniform", "min_snr")) == first
    assert folder(("uniform+model.depth=2",)).name == "uniform-model.depth=2"


@pytest.mark.parametrize("name", ["figures", "runs", "results.json"])
def test_a_folder_of_something_else_is_not_filled(tmp_path, name):
    (tmp_path / name).mkdir()
    plan = Plan(config=BASE, contestants=("uniform",), seeds=1)
    with pytest.raises(UserError, match=f"holds {name} of something else than a comparison"):
        Comparison(plan, tmp_path, 1, 1, Console(quiet=True))


def test_what_was_measured_under_a_plan_that_was_given_up_is_measured_anew(tmp_path):
    plan = Plan(config=BASE, contestants=("uniform",), seeds=1, budget_seconds=1.0)
    Comparison(plan, tmp_path, 1, 1, Console(quiet=True))
    left = [tmp_path / "paces" / "uniform", tmp_path / "references.json"]
    left[0].mkdir(parents=True)
    left[1].touch()
    Comparison(plan, tmp_path, 1, 1, Console(quiet=True))
    assert all(path.exists() for path in left)
    longer = dataclasses.replace(plan, budget_seconds=2.0)
    Comparison(longer, tmp_path, 1, 1, Console(quiet=True))
    assert not any(path.exists() for path in left)
    (tmp_path / "results.json").touch()  # of runs that were deleted since
    with pytest.raises(UserError, match="budget_seconds was 2.0, is 1.0"):
        Comparison(plan, tmp_path, 1, 1, Console(quiet=True))


def test_a_reference_decides_in_place_of_the_parts_of_the_data():
    data = dataclasses.replace(BASE.data, held_out=0.3)
    held_out = dataclasses.replace(BASE, data=data)
    compared = dataclasses.replace(BASE.evaluation, reference="pictures.npz", metrics=("fid",))
    referred = dataclasses.replace(held_out, evaluation=compared)
    for config, metric in ((BASE, "fid"), (held_out, "held_out_fid"), (referred, "fid")):
        assert Plan(config=config, contestants=("uniform",), seeds=1).metric == metric


def test_a_comparison_that_was_refused_before_its_first_run_begins_again_as_corrected(tmp_path):
    plan = Plan(
        config=BASE,
        contestants=("uniform",),
        seeds=1,
        learning_rates=(),
        solver_steps=(),
        budget_seconds=None,
    )
    Comparison(plan, tmp_path, 1, 1, Console(quiet=True))
    corrected = dataclasses.replace(plan, config=dataclasses.replace(BASE, batch_size=7))
    Comparison(corrected, tmp_path, 1, 1, Console(quiet=True))
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="config.batch_size was 7, is "):
        Comparison(plan, tmp_path, 1, 1, Console(quiet=True))


def test_a_share_of_the_budget_is_a_shorter_run_with_evaluations_as_far_apart():
    base = dataclasses.replace(
        BASE, steps=100, evaluation=dataclasses.replace(BASE.evaluation, every=10)
    )
    half = resolve("uniform+budget=0.5", base)
    assert half.steps == 50 and half.evaluation.every == 10
    for share in ("0.52", "0.01"):
        with pytest.raises(UserError, match=f"budget={share} of 10 evaluations is no whole number"):
            resolve(f"uniform+budget={share}", base)
    assert resolve("uniform+budget=1", base) == resolve("uniform", base)


@pytest.mark.parametrize("share", ["0", "1.5", "True", "half"])
def test_a_share_of_the_budget_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"budget=.* must be a share of the images, in \(0, 1\]"):
        resolve(f"uniform+budget={share}", BASE)


def test_a_recipe_names_all_that_it_is_trained_with_and_every_part_can_be_replaced():
    config = resolve("flow_muon", BASE)
    assert (config.method, config.schedule, config.prediction) == (
        "logit_normal", "flow", "velocity"
    )  # fmt: skip
    assert (config.optimizer.name, config.optimizer.schedule) == ("muon", "linear")
    other = resolve("flow_muon:x0+optimizer.name=adamw+max_weight=400", BASE)
    assert other.method == "logit_normal+max_weight=400"
    assert (other.schedule, other.prediction, other.optimizer.name) == ("flow", "x0", "adamw")
    assert other.optimizer.schedule == "linear"


def test_every_recipe_is_a_configuration_and_says_itself_what_it_trains_with():
    assert set(RECIPES) == set(get_args(RecipeName))
    for name, (_, spelled) in RECIPES.items():
        set_here = values_of(name)
        assert set_here["optimizer"].keys() - {"weight_decay"} == {"name", "schedule"}
        config = with_values(BASE, set_here)
        config = dataclasses.replace(config, prediction=build_process(config).prediction)
        assert config == resolve(spelled, BASE) == resolve(name, BASE)


@pytest.mark.parametrize(
    ("name", "process", "target"),
    [
        ("ddpm@flow", "flow", "velocity"),
        ("ddpm@cosine", "cosine", "epsilon"),
        ("flow_muon@linear", "linear", "epsilon"),
        ("flow_muon@edm", "edm", "F"),
        ("flow_muon@flow", "flow", "velocity"),
        ("flow_muon@linear:v", "linear", "v"),
    ],
)
def test_on_another_process_a_recipe_has_the_target_of_that(name, process, target):
    others = dataclasses.replace(BASE, schedule="flow", prediction="x0")
    for base in (BASE, others):
        config = resolve(name, base)
        assert (config.schedule, config.prediction) == (process, target)
    method = resolve(name.partition("@")[0], BASE).method
    assert resolve(name, BASE).method == method


def test_a_recipe_on_a_process_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="methods='flow@nowhere': schedule 'nowhere' is unknown"):
        resolve("flow@nowhere", BASE)

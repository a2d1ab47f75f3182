"""Reading and writing configurations: what is not right is one clear message."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.config import DataConfig
from speed_engine.diffusion.grammar import canonical
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import MODEL_CONFIGS, DiTConfig, MDTConfig
from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig

ROOT = Path(__file__).parent.parent
DEFAULT = TrainConfig()
UNUSUAL = TrainConfig(
    method="speed_paper+k=2.5",
    seed=-5,
    data=DataConfig(source="/some/where/é", image_shape=(3, 32, 16)),
    optimizer=OptimizerConfig(grad_clip=math.inf),
    evaluation=EvaluationConfig(
        inception_weights=Path("/w.pth"), guidance_interval=(0.3, math.inf)
    ),
)
# What version 0.1 wrote beside the fields of today.
OPTIONS_OF_0_1 = dict.fromkeys(
    ("stratified", "normalised", "k", "r", "tau", "lam", "gamma", "p2_k", "mean", "std", "scale",
     "shift", "ramp_steps", "clusters", "patience", "floor")
) | {"weight_on": "definition", "weigh_bound": False}  # fmt: skip


def written(config: TrainConfig = DEFAULT) -> dict:
    return json.loads(to_json(config))


def changed(path: str, value: object, config: TrainConfig = DEFAULT) -> str:
    """A file with one value in place of the one at a dotted path."""
    values = written(config)
    *sections, name = path.split(".")
    section = values
    for key in sections:
        section = section[key]
    section[name] = value
    return json.dumps(values)


def refusal(text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        from_json(text)
    return str(caught.value)


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL])
def test_json_gives_back_the_configuration(config):
    assert from_json(to_json(config)) == config
    assert from_json(to_json(config).encode()) == config


def test_infinity_is_written_as_json_knows_it_and_read_as_0_1_wrote_it():
    text = to_json(UNUSUAL)
    assert '"grad_clip": 1e999' in text and "Infinity" not in text
    assert from_json(text.replace("1e999", "Infinity")) == UNUSUAL
    named = dataclasses.replace(UNUSUAL, data=DataConfig(source='\n"x": Infinity'))
    assert from_json(to_json(named)) == named


def test_a_field_that_is_missing_has_its_default():
    values = written()
    del values["hang_timeout"], values["data"]["held_out"], values["model"]["family"]
    assert from_json(json.dumps(values)) == TrainConfig()


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("data.resident", "maybe", """data.resident="maybe": should be 'auto', 'on' or 'off'."""),
        (
            "compile",
            "perhaps",
            """compile="perhaps": should be 'auto', 'on', 'graphs', 'blocks' or 'off'.""",
        ),
        ("steps", 2500.5, "steps=2500.5: should be a valid integer."),
        ("steps", 2500.0, "steps=2500.0: should be a valid integer."),
        ("steps", True, "steps=true: should be a valid integer."),
        ("steps", "5", 'steps="5": should be a valid integer.'),
        ("steps", None, "steps=null: should be a valid integer."),
        ("reshard", 1, "reshard=1: should be a valid boolean."),
        ("optimizer.learning_rate", True, "optimizer.learning_rate=true: should be a valid numb"),
        ("optimizer.learning_rate", math.nan, "optimizer.learning_rate=nan: must be positive and"),
        ("optimizer.weight_decay", math.inf, "optimizer.weight_decay=inf: must be 0 or more, and"),
        ("optimizer", [], "optimizer=[]: should be an object."),
        ("model", "dit", 'model="dit": should be an object.'),
        ("model.depth", 2.5, "model.depth=2.5: should be a valid integer."),
        ("model.family", "diT", """model.family="diT": should be one of 'dit', 'mdt', 'unet'"""),
        ("data.image_shape", [1, 8], "data.image_shape=[1, 8]: should be longer."),
        ("data.image_shape", [1, 8, 8, 1], "data.image_shape=[1, 8, 8, 1]: should be of 3 items."),
        ("data.image_shape", [1, 8, "8"], 'data.image_shape.2="8": should be a valid integer.'),
        ("data.image_shape", [1, 10**9, 10**9], "data.image_shape=(1, 1000000000, 1000000000): is"),
        ("data.members", [], "data.members=(): needs at least the image"),
        ("data.exclude", 5, "data.exclude=5: should be a valid string."),
        ("steps", 10**30, "steps=1000000000000000000000000000000: must be at most 1,000,000,000,"),
        ("hang_timeout", 1e300, "hang_timeout=1e+300: must be positive, at most 10^9 seconds."),
        ("data.source", ["x" * 999], 'data.source=["xxxxx'),
        ("optimizer.learning_rat", 1, "optimizer.learning_rat is unknown, the nearest is optimi"),
        ("learning_rate", 1, "learning_rate is unknown, the nearest is optimizer.learning_rate;"),
        ("model.dept", 1, "model.dept is unknown, the nearest is model.depth;"),
        ("method", "speed_papr", "unknown method 'speed_papr'; did you mean 'speed_paper'? Choose"),
        ("method", "speed_paper+lan=1", "method 'speed_paper' has no option lan, the nearest is"),
        ("method", "speed_paper+k=much", """method 'speed_paper': k="much": should be a valid"""),
        ("method", "speed_paper+k", "method 'speed_paper+k': write METHOD[+OPTION=VALUE ...]"),
        ("schedule", "cosin", "unknown schedule 'cosin'; did you mean 'cosine'? Choose from"),
        ("prediction", "eps", "unknown prediction 'eps'; did you mean 'epsilon'? Choose from"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_value_and_what_is_allowed(path, value, message):
    said = refusal(changed(path, value))
    assert said.startswith(message) and "\n" not in said and len(said) < 500


@pytest.mark.parametrize("version", [True, 1.0, 3])
def test_a_choice_among_numbers_is_a_whole_number(version):
    mdt = TrainConfig(model=MDTConfig())
    assert "model.version" in refusal(changed("model.version", version, mdt))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not: Expecting value"),
        ("[]", "is a JSON object, not []"),
        ("null", "is a JSON object, not null"),
        ('{"steps": 1, "steps": 2}', "steps is there twice"),
        ('{"data": {"window": 1, "window": 1}}', "window is there twice"),
        (b"\xff{}", "is JSON in UTF-8, and this is not"),
        (f'{{"steps": {"9" * 5000}}}', "4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"data": ' * 300 + "1" + "}" * 300, "nested too deeply"),
        ('{"data": {"source": "\\ud800"}}', "no Unicode"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused_in_one_sentence(text, message):
    said = refusal(text)
    assert message in said and len(said) < 300


def test_a_name_that_could_not_be_read_again_is_not_written():
    config = TrainConfig(data=DataConfig(source="/data/\udcff"))
    with pytest.raises(UserError, match="not UTF-8"):
        to_json(config)


SECTIONS: dict[str, TrainConfig] = {
    name: TrainConfig() for name in ("", "data", "optimizer", "evaluation", "method_options")
} | {name: TrainConfig(model=kind()) for name, kind in MODEL_CONFIGS.items()}
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=80),
    # What is right somewhere, and nearly right elsewhere.
    st.sampled_from(
        ["auto", "on", "off", "cpu", "v", "flow", "p2+gamma=2", "cls", "fid", "Infinity", "nan",
         "1", "None", "definition", "p2+k=3", "clts+ramp_steps=2.5"]
    ),
)  # fmt: skip
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("section", SECTIONS)
@given(data=st.data(), value=VALUES)
def test_any_value_in_any_field_is_kept_or_refused_in_one_sentence(section, data, value):
    values = written(SECTIONS[section])
    if section == "method_options":
        values[section] = dict(OPTIONS_OF_0_1)
    at = values["model"] if section in MODEL_CONFIGS else values[section] if section else values
    name = data.draw(st.sampled_from([*at, "unheard_of"]))
    at[name] = value
    text = json.dumps(values)
    try:
        config = from_json(text)
    except UserError as error:
        said = str(error)
        assert name in said and "\n" not in said and len(said) < 700
        return
    assert from_json(to_json(config)) == config
    if section == "method_options":
        assert value == OPTIONS_OF_0_1[name] or name in config.method
        return
    part = config.model if section in MODEL_CONFIGS else getattr(config, section, config)
    assert_kept(value, getattr(part, name))


def assert_kept(value: typing.Any, found: typing.Any) -> None:
    """Nothing became a default, was rounded or turned into another type."""
    if dataclasses.is_dataclass(found):
        for name, inner in value.items():
            assert_kept(inner, getattr(found, name))
    elif isinstance(found, tuple):
        for inner, of in zip(value, found, strict=True):
            assert_kept(inner, of)
    elif isinstance(found, Path):
        assert found == Path(value)
    elif isinstance(found, float):
        assert not isinstance(value, bool) and found == float(value)
    elif isinstance(found, str) and found != value:
        assert found == canonical(value)
    else:
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "method, options, spelled",
    [
        ("speed_paper", {}, "speed_paper"),
        ("speed_paper", {"k": 3.0, "lam": 0.7, "stratified": True},
         "speed_paper+k=3+lam=0.7+stratified=True"),
        ("uniform", {"normalised": False, "weight_on": "prediction", "weigh_bound": True},
         "uniform+normalised=False+weigh_bound=True+weight_on=prediction"),
        ("task_curriculum", {"clusters": 5, "patience": 2},
         "task_curriculum+clusters=5+patience=2"),
        ("speed_official", {"tau": 700.0}, "speed_official+tau=700"),
        ("min_snr", {"gamma": 1e30}, "min_snr+gamma=1e30"),
    ],
)  # fmt: skip
def test_options_of_a_method_as_0_1_wrote_them_are_read(method, options, spelled):
    values = written() | {"method": method, "method_options": OPTIONS_OF_0_1 | options}
    assert from_json(json.dumps(values)) == TrainConfig(method=spelled)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 3}, "method 'uniform' has no option k"),
        ({"mean": [1]}, "method_options.mean=[1]: should be a valid boolean or a valid integer or"),
        ({"kk": None}, "unknown option of method_options 'kk'; did you mean 'k'? Choose"),
        ([], "method_options=[]: should be an object"),
        ({"k": "3+r=2"}, 'method_options.k="3+r=2": should be a valid boolean'),
    ],
)
def test_options_that_0_1_would_not_have_written_are_refused(options, message):
    values = written() | {"method": "uniform", "method_options": options}
    assert refusal(json.dumps(values)).startswith(message)


def test_comparisons_of_0_1_are_read():
    path = ROOT / "docs" / "results" / "digits" / "compare.json"
    config = from_json(json.dumps(json.loads(path.read_text())["config"]))
    assert config.method == "speed_paper" and from_json(to_json(config)) == config


def test_the_method_is_kept_in_its_canonical_spelling():
    config = TrainConfig(method="speed_paper+lam=0.70+k=3.0")
    assert config.method == "speed_paper+k=3+lam=0.7"
    assert config == TrainConfig(method="speed_paper+k=3+lam=0.7")


def documented(cls: type) -> set[str]:
    """Names of the fields with a text below them, or with a help in their annotation."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = set()
    for field, below in itertools.pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str())):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(name), annotation=annotation), _:
                keywords = [of for of in ast.walk(annotation) if isinstance(of, ast.keyword)]
                found |= {name for of in keywords if of.arg == "help"}
    return found


@pytest.mark.parametrize(
    "cls", [TrainConfig, DataConfig, EvaluationConfig, OptimizerConfig, *MODEL_CONFIGS.values()]
)
def test_every_field_is_documented_in_the_source(cls):
    """The text under a field is its help on the command line."""
    fields = {name for name, of in vars(cls()).items() if not dataclasses.is_dataclass(of)}
    assert fields <= documented(cls)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainConfig(steps=0), "steps=0: must be at least 1"),
        (
            lambda: TrainConfig(condition_dropout=1.5),
            r"condition_dropout=1.5: is a share in \[0, 1\]",
        ),
        (lambda: TrainConfig(seed=2**63), "seed=9223372036854775808: must be at most"),
        (lambda: TrainConfig(batch_size=10**7), "batch_size=10000000: must be at most 1,000,000"),
        (lambda: DiTConfig(depth=0), "model.depth=0: must be positive"),
        (
            lambda: DiTConfig(dim=10**9),
            "model.dim=1000000000: must be positive, and at",
        ),
        (lambda: DiTConfig(mlp_ratio=math.nan), "model.mlp_ratio=nan: must be positive"),
        (lambda: DataConfig(workers=-1), "data.workers=-1"),
        (lambda: DataConfig(cache_gb=math.inf), "data.cache_gb=inf"),
        (lambda: OptimizerConfig(ema_decay=1.0), r"ema_decay=1.0: must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate=0: must be positive"),
        (lambda: EvaluationConfig(guidance=math.inf), "evaluation.guidance=inf: must be 0 or more"),
        (lambda: EvaluationConfig(batch_size=0), "evaluation.batch_size=0: must be at least 1"),
        (
            lambda: TrainConfig(num_timesteps=10),
            "evaluation.solver_steps=25: must be at most num_timesteps=10",
        ),
        (
            lambda: TrainConfig(condition_dropout=0, evaluation=EvaluationConfig(guidance=2)),
            "evaluation.guidance=2: guidance needs a model",
        ),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()

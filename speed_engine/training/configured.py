"""The update that a run's configuration asks for: optimizer, averages and their schedules."""

from torch import nn

from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import EMA, Ema, constant, decay_of, warming_up
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import OPTIMIZERS, Hyperparameters
from speed_engine.training.schedules import MOMENTUM_DECAYS, SCHEDULES, linear_warmup
from speed_engine.training.update import Update

UPDATES: dict[str, type[Update]] = {"separate": Update, "one_sweep": OneSweep}


def build_averages(settings: OptimizerConfig, model: nn.Module) -> dict[str, Ema]:
    """The averages of a model by name, EMA first; each starts as the model is."""
    decays = {EMA: (warming_up if settings.ema_warmup else constant)(settings.ema_decay)}
    decays |= {name: decay_of(name) for name in settings.averages}
    return {name: Ema(model, decay) for name, decay in decays.items()}


def build_update(
    settings: OptimizerConfig,
    model: nn.Module,
    loss: nn.Module,
    averages: dict[str, Ema],
    *,
    steps: int,
    update: str,
    momentum_decay: str,
    loss_learning_rate: float | None,
) -> Update:
    """The configured optimizer with its schedules.

    Args:
        settings: the configuration.
        model: what is trained, on its device; with several processes laid out by ``distribute``.
        loss: trained beside it, if it has parameters of its own.
        averages: of the model, by name.
        steps: optimizer steps of the whole run, which momentum decays follow.
        update: a key of ``UPDATES``.
        momentum_decay: the method's; the configuration may name another.
        loss_learning_rate: of the loss's own parameters; None takes that of the model's that AdamW
            trains.

    Raises:
        UserError: an unknown optimizer, one that the update does not hold for, or an option that it
            does not take.
    """
    if settings.name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UserError(f"optimizer.name={settings.name!r} is unknown; choose from {known}.")
    decay = settings.momentum_decay or momentum_decay
    if settings.name == "muon" and decay != "none":
        raise UserError(
            f"momentum decay ({decay}) is that of AdamW's beta1; beside muon, use "
            "optimizer.momentum_decay=none, or optimizer.name=adamw."
        )
    settings.check_effect()
    optimizers = OPTIMIZERS[settings.name](
        model,
        loss,
        Hyperparameters(
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            loss_learning_rate=loss_learning_rate,
            adamw_learning_rate=settings.adamw_learning_rate,
            muon_momentum=settings.muon_momentum,
        ),
    )
    warmup = linear_warmup(settings.learning_rate, settings.warmup_steps)
    schedule = SCHEDULES[settings.schedule](
        steps,
        settings.warmup_steps,
        decay_share=settings.decay_share,
        reference_steps=settings.reference_steps,
    )
    momentum = MOMENTUM_DECAYS[decay](settings.beta1, steps)
    return UPDATES[update](
        model,
        loss,
        optimizers,
        averages,
        learning_rate=lambda step: warmup(step) * schedule(step) * momentum.compensation(step),
        beta1=None if decay == "none" else momentum.beta1,
        grad_clip=settings.grad_clip,
    )

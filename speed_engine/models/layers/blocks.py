"""What is done to a model's repeated blocks: recomputing activations, compiling one by one.

Both change how a block (``sharding.blocks``) is run, neither its parameters, their names, nor (but
for rounding in compiled code) what it computes.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from speed_engine.ops import prepare_compiler
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.sharding import blocks

aten = torch.ops.aten
# What is dear to compute for the bytes it takes to keep: matrix products and attention.
DEAR = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
    torch.ops.speed_kernels.attention.default,
]
VARIANTS = 6  # of a compiled block: in training and generation, of other strides, batch sizes
_allowed = 0  # compilations of all blocks of this process
# What a block recomputes in the backward pass, by name: extra arguments of ``checkpoint``.
RECOMPUTE: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "cheap": {"context_fn": functools.partial(create_selective_checkpoint_contexts, DEAR)},
    "everything": {},
}


def recomputable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates ``Block.forward`` to recompute in the backward pass what ``block.recompute`` names.

    A generator's state is kept only for blocks with dropout, which must draw the same again.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *inputs: Any) -> Any:
        options = RECOMPUTE[getattr(self, "recompute", "nothing")]
        if options is None or not torch.is_grad_enabled():
            return forward(self, *inputs)
        draws = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.modules())
        return checkpoint(
            forward, self, *inputs, use_reentrant=False, preserve_rng_state=draws, **options
        )

    return run


def set_recompute(blocks: Iterable[nn.Module], dial: float) -> None:
    """Trade memory for time: 0 keeps every activation, 1 keeps only the input of each block.

    Up to 1/2, that share (doubled) of the blocks recomputes all but matrix products and attention,
    which costs little; beyond, the others give those up, too, in the end a third more work. The
    blocks that give up more are spread evenly over the depth.

    Raises:
        UserError: dial is outside [0, 1].
    """
    if not 0 <= dial <= 1:
        raise UserError(f"checkpointing={dial} is a share; choose from [0, 1].")
    less, more, share = ("nothing", "cheap", 2 * dial)
    if dial > 0.5:
        less, more, share = "cheap", "everything", 2 * dial - 1
    for index, block in enumerate(blocks):
        spends = int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
        block.recompute = more if spends else less  # type: ignore[assignment]


def compiled(model: nn.Module, how: str) -> Callable[..., Any]:
    """What to call in place of the model.

    Args:
        model: stays as it is, but for its blocks under ``blocks``, which is then what to call.
        how: ``on`` compiles it whole, ``graphs`` so, and replays CUDA graphs of it, ``blocks`` each
            block by itself, ``off`` nothing.
    """
    ways: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
        "on": compiled_whole,
        "graphs": functools.partial(compiled_whole, mode="reduce-overhead"),
        "blocks": compiled_blocks,
        "off": lambda same: same,
    }
    return ways[how](model)


def compiled_whole(model: nn.Module, mode: str | None = None) -> Callable[..., Any]:
    """The model as one compiled graph, whose compilation grows with the depth."""
    prepare_compiler()
    return torch.compile(model, dynamic=False, mode=mode)


def compiled_blocks(model: nn.Module) -> nn.Module:
    """The model itself, each of its blocks compiled in place.

    Equal blocks share one compilation, but for the first of a DiT, which has no branch to add (see
    ``open_sum``), so that its time does not grow with the depth. Generation takes another one for
    all of them, since it computes no gradients.

    Raises:
        UserError: the model has no blocks.
    """
    found = blocks(model)
    if not found:
        raise UserError(
            f"compile=blocks needs a model with blocks, and {type(model).__name__} has none; "
            "choose on or off."
        )
    compile_each(found, fullgraph=True)
    return model


def compile_each(blocks: Collection[nn.Module], **options: Any) -> None:
    """Compile modules in place, one by one, with options of ``torch.compile``.

    Shapes are compiled as they come: a last batch or microbatch of another size is compiled anew,
    instead of all of them once more with a size that may change.

    PyTorch counts the compilations of all blocks of the process together, since they share the code
    of ``nn.Module``, and beyond its limit runs the rest uncompiled or, with ``fullgraph``, fails.
    In a U-Net nearly every block has a shape of its own.
    """
    global _allowed
    prepare_compiler()
    config: Any = torch._dynamo.config  # its attributes are made when it is imported
    _allowed += VARIANTS * len(blocks)
    # Newer versions of PyTorch keep limits by thread, and still count by process.
    config.recompile_limit = max(config.recompile_limit, _allowed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _allowed)
    for block in blocks:
        block.compile(dynamic=False, **options)

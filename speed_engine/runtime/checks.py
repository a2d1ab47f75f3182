"""How bad input is refused: one exception and one sentence for all of it."""


class UserError(ValueError):
    """Input that cannot be used; the message names it, what is needed, and the next move.

    The command line prints the message alone. Any other exception is a defect of this library and
    keeps its traceback.
    """


def check(name: str, value: object, valid: bool, need: str) -> None:
    """Refuse an option that is not valid.

    Args:
        name: of the option, as in ``config.json``.
        value: what it was set to.
        valid: whether that is possible.
        need: what is needed instead.

    Raises:
        UserError: it is not valid.
    """
    if not valid:
        raise UserError(f"{name}={value}: {need}.")

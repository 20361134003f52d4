"""What the numbers must be that users give to training methods.

Owns the two checks that many arguments share. It must not know which arguments there are.
"""

from srigl_fx.errors import TrainerError


def check_count(name: str, value: object) -> None:
    """Require a whole number of at least 1.

    Example:
        >>> check_count("update_every", 100)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TrainerError(f"{name} is {value!r}, but must be a whole number of at least 1")


def check_share(name: str, value: object) -> None:
    """Require a number in [0, 1].

    Example:
        >>> check_share("stop_at", 0.75)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise TrainerError(f"{name} is {value!r}, but must be a number in [0, 1]")

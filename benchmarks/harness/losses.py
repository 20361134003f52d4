"""What counts as a loss of accuracy, and how a table says so.

Owns the limits and their wording. It must not know what was measured.
"""

import math

LIMITS = {"accuracy": 0.2, "bits": 0.01}  # what is no loss: percentage points, bits a prediction


def verdict(mean: float, half_width: float, limit: float, *, of: str = "seeds") -> str:
    """Whether the whole interval of a loss is within the limit; ``half_width`` is nan where there is no interval.

    Example:
        >>> verdict(0.05, 0.1, 0.2), verdict(0.15, 0.1, 0.2)
        ('yes', 'the seeds do not tell')
        >>> verdict(0.5, 0.1, 0.2), verdict(0.0, math.nan, 0.2)
        ('no', 'one seed')
    """
    if math.isnan(half_width):
        return f"one {of.removesuffix('s')}"
    if mean + half_width <= limit:
        return "yes"
    return "no" if mean - half_width > limit else f"the {of} do not tell"


def number(mean: float, half_width: float, digits: int) -> str:
    """A mean and the half width of its interval, if there is one.

    Example:
        >>> number(1.25, 0.5, 2), number(-0.0001, math.nan, 2)
        ('1.25 ± 0.50', '0.00')
    """
    text = f"{round(mean, digits) + 0.0:.{digits}f}"  # no minus before zero
    return text if math.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"

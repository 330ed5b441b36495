"""What a step counts and adds up of each parameter: the columns of a row of numbers."""

from __future__ import annotations

COLUMNS = ("zeros", "nonfinite", "gap", "grad", "quadratic", "zero_groups", "penalty")
"""The float64 numbers of one parameter, in the order that the engines write them; see ``StatisticsRow``."""

OF_ELEMENTS = 5
"""The first so many columns are sums over elements, the others are sums over groups."""

COUNTS = ("zeros", "nonfinite", "zero_groups")
"""The columns that are whole numbers; float64 holds them exactly up to 2^53."""

ZERO_NORM = 1e-15
"""A group counts as zero when ||u_G||_2 is below this, as in the papers."""

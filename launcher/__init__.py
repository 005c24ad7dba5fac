"""Decides what runs where. Standard library, hydra, omegaconf, rich and submitit; never torch, pandas or mlflow."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Shipped inside the package when installed, beside it in a clone.
CONFIGS = next(d for d in (HERE / "configs", ROOT / "configs") if (d / "config.yaml").is_file())


class NotFound(Exception):
    """A selection of nothing."""


class Unavailable(Exception):
    """A scheduler that cannot be reached, or refuses; trying later may help."""


class NotQueued(Unavailable):
    """A scheduler's own words; nothing of what was asked is in its queue."""


class Refused(Exception):
    """Allowed by the grammar, but not without a further word from the user."""

"""The rows of the paper's tables as data, and the classifiers that judge those of the digits."""

from dmvae_lib.paper.rows.digits import CLASSIFIERS, DIGITS, RELATED, RELEASE, TABLE1, TABLE3, learning_curve
from dmvae_lib.paper.rows.flowers import FLOWERS, PARTS, TABLE2
from dmvae_lib.paper.rows.incomplete import incomplete
from dmvae_lib.paper.rows.row import Row

ROWS = {row.name: row for row in (*CLASSIFIERS.values(), *DIGITS, *FLOWERS)}  # those that judge others come first

__all__ = [
    "CLASSIFIERS",
    "DIGITS",
    "FLOWERS",
    "PARTS",
    "RELATED",
    "RELEASE",
    "ROWS",
    "Row",
    "TABLE1",
    "TABLE2",
    "TABLE3",
    "incomplete",
    "learning_curve",
]

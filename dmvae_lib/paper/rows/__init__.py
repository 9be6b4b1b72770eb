"""The rows of the paper's tables and of the field's benchmarks as data, and the classifiers that judge them."""

from dmvae_lib.paper.rows import cdsprites, digits, polymnist
from dmvae_lib.paper.rows.digits import DIGITS, TABLE1, TABLE3
from dmvae_lib.paper.rows.flowers import FLOWERS, TABLE2
from dmvae_lib.paper.rows.row import Row

# Those that judge others come first. Of the field's benchmarks all that `make reproduce` trains; `make field` has more.
JUDGES = (*digits.JUDGES.values(), *polymnist.JUDGES.values(), cdsprites.JUDGES[1])
FIELD = (*polymnist.POLYMNIST_ROWS.values(), *cdsprites.CDSPRITES_ROWS[1].values())
ROWS = {row.name: row for row in (*JUDGES, *DIGITS, *FLOWERS, *FIELD)}

__all__ = ["FIELD", "JUDGES", "ROWS", "Row", "TABLE1", "TABLE2", "TABLE3"]

"""sephv17: sephv14 with EvoNorm in the RPN, one a level (EXPERIMENTS 7.2, row 21)."""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does an EvoNorm in place of the RPN's ReLU help? (row 21)",
        {"rpn.norm": "evonorm_s0"},
        "box 31.4 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv17", ROWS, row)

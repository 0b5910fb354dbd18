"""sephv19: sephv14 whose box branch sees more than the box (EXPERIMENTS 7.2, row 25).

Two crops of 7x7 without a maximum: the box for the class, the box times 1.5 for its refinement. From which level the
larger crop is taken the document leaves open; that of the box itself is chosen (`level_of`: box | view).
"""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does the box branch gain from what is around the box? (row 25)",
        {"roi.pooler": {"name": "multi_scale", "scale": 1.5, "level_of": "box"}},
        "box 31.0 (high confidence: yaml at 869210b, code at 51af1c4)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv19", ROWS, row)

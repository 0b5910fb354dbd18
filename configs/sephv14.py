"""sephv14: separate EvoNorm-S0 box and class towers over ATSS proposals, boxes only (EXPERIMENTS 0.1, 7.3).

The file's head has 512 ROIs an image, the later and better run; `r128` is what the log calls sephv14 first and
the parent of sephv15 to sephv22.
"""

from ml_collections import ConfigDict

from configs import sephv11
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "do 512 ROIs an image help? (row 18)",
        {"roi.class_weight": "quadratic", "roi.samples": 512},
        "box 33.1 (high confidence: yaml at e85c996)",
    ),
    "r128": Row(
        "",
        "the same with 128 ROIs (row 17)",
        {"roi.samples": 128},
        "box 31.5 (high confidence: yaml at 869210b)",
    ),
    "1": Row(
        "",
        "does one square anchor a cell do? (row 19)",
        {"anchors.ratios": (1.0,)},
        "box 32.5 (high confidence: yaml at e0101be)",
    ),
    "2": Row(
        "1",
        "is the ignored band of ATSS needed? (row 20)",
        {"rpn.matcher.ignore_band": False},
        "box 32.6 (high confidence: yaml at e0101be)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv11.get_config(), "sephv14", ROWS, row)

"""sephv12: GIoU in place of smooth-L1 for the boxes of ROIs (EXPERIMENTS 7.2, row 26)."""

from ml_collections import ConfigDict

from configs import sephv11
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does a GIoU box loss help, with the IoU-weighted class loss? (row 26)",
        {"roi.box_loss": {"name": "giou"}, "roi.class_weight": "quadratic"},
        "box 30.1 (high confidence: yaml at 869210b, the weight in the code at 848414a)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv11.get_config(), "sephv12", ROWS, row)

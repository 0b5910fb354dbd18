"""sephv13: sephv12 without the weight of the class loss (EXPERIMENTS 7.2, row 30)."""

from ml_collections import ConfigDict

from configs import sephv12
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "what does the IoU-weighted class loss give, beside GIoU? (row 30)",
        {"roi.class_weight": "none"},
        "box 29.5 (high confidence: the weight left the code at 51af1c4; yaml as sephv12's)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv12.get_config(), "sephv13", ROWS, row)

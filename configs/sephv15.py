"""sephv15: how much should a GIoU box loss weigh? (EXPERIMENTS 7.2, rows 27-29)"""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does GIoU help when it weighs four times as much? (row 27)",
        {"roi.box_loss": {"name": "giou"}, "roi.box_loss_scale": 4.0},
        "box 31.6 (high confidence: yaml at 869210b)",
    ),
    "1": Row(
        "",
        "does GIoU help when it weighs eight times as much? (row 28)",
        {"roi.box_loss_scale": 8.0},
        "box 32.2 (high confidence: yaml at 869210b)",
    ),
    "2": Row(
        "",
        "does GIoU help when it weighs twelve times as much? (row 29)",
        {"roi.box_loss_scale": 12.0},
        "box 31.7 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv15", ROWS, row)

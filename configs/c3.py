"""The C3 table: ROIs from one map, a ResNet's last stage on each (EXPERIMENTS 7.1).

The neck is that of the FPN-3 table and the RPN reads all its levels. The stage has batch norm with decay 0.999; its eps is
not recorded, slim's 1e-5 is chosen (`roi.head.eps`). The mask head reads the stage's 7x7 map, so masks have 14x14 cells.
"""

from ml_collections import ConfigDict

from configs import fpn3
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "what does one stage on p3 give, with large anchors? (base line(1))",
        {
            "anchors.sizes": (120, 240, 480, 512),
            "roi.levels": ("p3",),
            "roi.head": {
                "name": "res5",
                "blocks": 3,
                "width": 512,
                "norm": "bn",
                "eps": 1e-5,
                "decay": 0.999,
            },
            "mask.input": "head",
            "mask.pool": 7,
            "optimizer.decay": (
                r"^backbone/.*conv\d?/kernel$",
                r"^fpn/output",
                r"^box_head/block\d/.*conv\d?/kernel$",
            ),
        },
        "box 23.5, mask 17.5 (low to medium confidence: score 0.05, NMS 0.5 and 1000 proposals assumed)",
    ),
    "nonlocal": Row(
        "",
        "does self-attention on c4 and c5 help? Smaller anchors come with it",
        {"anchors.sizes": (64, 128, 256, 512), "fpn.before": "non_local", "mask.convs": 0},
        "box 27.4, mask 22.0 (low to medium confidence: yaml at f42944f; no base line has these anchors)",
    ),
    "fusion": Row(
        "nonlocal",
        "does one map fused of all levels, in its place, help?",
        {
            "fpn.before": "none",
            "fpn.after": "fusion",
            "roi.levels": ("f3",),
            "schedule.name": "cosine",
            "schedule.warmup_steps": 1_500,
            "optimizer.lr": 0.01333,
            "train.steps": 180_000,
            "train.batch": 8,  # 4 on each of 2 GPUs
        },
        "box 30.7, mask 24.1 (low to medium confidence: yaml at 911cd7b; 2 GPUs inferred, ImageNet weights assumed)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(fpn3.get_config(), "c3", ROWS, row)

"""sephNv15: sephv15_1 with p2..p6, larger pictures and stitching, the best of the log (EXPERIMENTS 0.2, 7.2 row 1).

The log does not say on how many GPUs it ran with 3 images each: 3 are assumed, so `train.batch` is 9 at the usual rate.
The s/m/l columns of the log are taken to be in the 512x512 frame, unlike the early rows'; had it been evaluated before
2020-10-10 they would be in the network's (EXPERIMENTS 7.4 and 8.4, item 7).
"""

from ml_collections import ConfigDict

from configs import sephv15
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "how far does it go with stride-4 maps, 800..960 px and stitched pictures? (row 1)",
        {
            "fpn.inputs": ("c2", "c3", "c4", "c5"),
            "anchors.sizes": (32, 64, 128, 256, 512),
            "rpn.matcher.ignore_band": False,  # ATSSMatcher4
            "roi.levels": ("p2", "p3", "p4", "p5", "p6"),
            "roi.canonical.level": 3,  # the rule counts from the first level, so 224 px -> p3
            "roi.samples": 512,
            "data.train.short_sides": (800, 832, 864, 896, 928, 960),
            "data.train.long_side": 1333,
            "data.eval.short_sides": (896,),
            "data.stitch": 0.2,
            "rpn.sample_group": 3,
            "train.batch": 9,
        },
        "box 38.5 (high confidence: yaml at e0101be; number of GPUs assumed)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv15.get_config("1"), "sephnv15", ROWS, row)

"""sephv9: RetinaNet as proposal generator (EXPERIMENTS 7.2, row 14).

Which length the row was trained for is ambiguous: the only committed file says 200 000 steps, the log's header
120 000. The file's is chosen; `train.steps` changes it, and with it the cosine.
"""

from ml_collections import ConfigDict

from configs import fpn3
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does RetinaNet propose better than an RPN? (row 14)",
        {
            "mask.enabled": False,
            "mask.norm": "none",  # of a head that is not there
            "mask.deconv_norm": "none",
            "rpn.name": "retinanet",
            "rpn.norm": "evonorm_s0",
            "rpn.samples": 0,
            "rpn.weights": (1.0, 1.0, 1.0, 1.0),
            "rpn.class_loss": {"name": "focal", "alpha": 0.25, "gamma": 2.0},
            "rpn.normalizer": "positives",
            "rpn.proposals": {
                "name": "retinanet",
                "nms": 0.7,
                "pre": 6_000,
                "post": 1_000,
                "shrink": 3,
                "test_pre": 1_000,  # by level
                "test_score": 0.05,
                "test_nms": 0.5,
                "test_post": 100,  # an image
            },
            "roi.sampler.balance_positives": True,
            "roi.sampler.balance_negatives": True,
            "roi.class_loss_scale": 2.0,
            "roi.box_loss_scale": 3.0,
            "train.steps": 200_000,
        },
        "box 30.0 (high confidence: yaml at 869210b; 200 000 steps there, 120 000 in the log's header)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(fpn3.get_config("sephv2"), "sephv9", ROWS, row)

"""The rows of the series against EXPERIMENTS 7.2, written out: what each changes, and of whom."""

import pytest

from configs import series
from configs._chain import flat
from sephjax import describe
from tests.configs.families import ROWS, families, read

SEPHV14 = {  # against the conventions of the series
    "mask.enabled": False,
    "rpn.matcher.name": "atss",
    "rpn.matcher.ignore_band": True,
    "rpn.matcher.min_iou": 0.1,
    "roi.sampler.balance_positives": True,
    "roi.sampler.balance_negatives": True,
    "roi.head.name": "separate_v2",
    "roi.head.conv_dims": (256, 256, 256, 256),
    "roi.head.norm": "evonorm_s0",
    "roi.class_weight": "quadratic",
    "schedule.name": "cosine",
}
GIOU = {"roi.box_loss.name": "giou"}
EVONORM_MASKS = {"mask.norm": "evonorm_s0", "mask.deconv_norm": "evonorm_s0"}
NO_MASKS = {"mask.enabled": False, "mask.norm": "none", "mask.deconv_norm": "none"}
BALANCED = {"roi.sampler.balance_positives": True, "roi.sampler.balance_negatives": True}
COSINE = {"schedule.name": "cosine"}
PRED_IOU = {"roi.iou_branch.name": "v1", "test.iou_score": "product"}
LATER_TEST = {"rpn.proposals.test_exactly": False}  # since commit 848414a (EXPERIMENTS 3.6)
LOW = {"roi.positive_iou": 0.5, "roi.matcher.low": 0.3, "roi.matcher.high": 0.3}
# Row of EXPERIMENTS -> (ours, its parent's, every value that differs between them).
DIFFERENCES = {
    1: (
        "sephnv15",
        "sephv15:1",
        {
            "fpn.inputs": ("c2", "c3", "c4", "c5"),
            "anchors.sizes": (32, 64, 128, 256, 512),
            "roi.levels": ("p2", "p3", "p4", "p5", "p6"),
            "roi.canonical.level": 3,  # EXPERIMENTS 8.1, item 8
            "rpn.matcher.ignore_band": False,
            "roi.samples": 512,
            "data.train.short_sides": (800, 832, 864, 896, 928, 960),
            "data.train.long_side": 1333,
            "data.eval.short_sides": (896,),
            "data.stitch": 0.2,
            "rpn.sample_group": 3,
            "train.batch": 9,
        },
    ),
    3: ("fpn3:evonorm_masks", "fpn3", COSINE | EVONORM_MASKS),
    4: ("fpn3:p3", "fpn3", COSINE | {"roi.levels": ("p3",)}),
    5: (
        "fpn3:hooks",
        "fpn3",
        COSINE | {"fpn.before": "non_local", "fpn.after": "fusion", "roi.levels": ("f3",)},
    ),
    6: ("fpn3:hooks_x2", "fpn3:hooks", {"train.steps": 240_000}),
    7: ("fpn3:balance", "fpn3:evonorm_masks", {"fpn.after": "balance"}),
    9: ("fpn3:seph", "fpn3:seph_bn", COSINE | EVONORM_MASKS | {"roi.head.norm": "evonorm_s0"}),
    11: ("fpn3:sephv2", "fpn3:sephv2_bn", COSINE | EVONORM_MASKS | {"roi.head.norm": "evonorm_s0"}),
    12: ("fpn3:pred_iou", "fpn3:sephv2", PRED_IOU | {"roi.iou_branch.negative_weight": 0.3}),
    13: (
        "sephv10",
        "fpn3:sephv2",
        NO_MASKS
        | BALANCED
        | LATER_TEST
        | {
            "roi.head.name": "shared_conv",
            "roi.head.conv_dims": (384, 384, 384, 384),
            "roi.head.branch_dim": 256,
        },
    ),
    14: (
        "sephv9",
        "fpn3:sephv2",
        NO_MASKS
        | BALANCED
        | {
            "rpn.name": "retinanet",
            "rpn.norm": "evonorm_s0",
            "rpn.samples": 0,
            "rpn.weights": (1.0, 1.0, 1.0, 1.0),
            "rpn.class_loss.name": "focal",
            "rpn.class_loss.alpha": 0.25,
            "rpn.class_loss.gamma": 2.0,
            "rpn.normalizer": "positives",
            "rpn.proposals.name": "retinanet",  # 6000 and 1000 by shrink 3, NMS 0.7, as inherited
            "rpn.proposals.test_pre": 1_000,
            "rpn.proposals.test_score": 0.05,
            "rpn.proposals.test_nms": 0.5,
            "rpn.proposals.test_post": 100,
            "roi.class_loss_scale": 2.0,
            "roi.box_loss_scale": 3.0,
            "train.steps": 200_000,
        },
    ),
    15: (
        "sephv3",
        "fpn3:sephv2",
        NO_MASKS
        | BALANCED
        | PRED_IOU
        | {
            "roi.iou_branch.negative_weight": 0.5,
            "fpn.inputs": ("c2", "c3", "c4", "c5"),
            "rpn.levels": ("p3", "p4", "p5", "p6"),
            "roi.levels": ("p2",),
            "roi.pooler.bins": (1, 1),
            "rpn.matcher.name": "atss_v1",
            "rpn.matcher.top_k": 27,
            "rpn.matcher.min_iou": 0.1,
            "rpn.matcher.legacy_offsets": True,
            "rpn.matcher.relative_distance": True,
            "roi.box_loss.name": "weighted_giou",
            "roi.box_loss_scale": 6.0,
            "roi.class_agnostic": True,
            "roi.class_weight": "linear",
            "roi.sampler.positive_groups": "iou",
            "roi.sampler.bins": 7,
        }
        | LOW,
    ),
    17: ("sephv14:r128", "sephv11", {"roi.class_weight": "quadratic"}),
    18: ("sephv14", "sephv14:r128", {"roi.samples": 512}),
    19: ("sephv14:1", "sephv14", {"anchors.ratios": (1.0,)}),
    20: ("sephv14:2", "sephv14:1", {"rpn.matcher.ignore_band": False}),
    21: ("sephv17", "sephv14:r128", {"rpn.norm": "evonorm_s0"}),
    22: ("sephv16", "sephv14:r128", dict.fromkeys(BALANCED, False)),
    23: ("sephv18", "sephv14:r128", {"roi.sampler.balance_negatives": False}),
    24: ("sephv18:1", "sephv14:r128", {"roi.sampler.balance_positives": False}),
    25: (
        "sephv19",
        "sephv14:r128",
        {
            "roi.pooler.name": "multi_scale",
            "roi.pooler.scale": 1.5,
            "roi.pooler.level_of": "box",
        },
    ),
    26: ("sephv12", "sephv11", GIOU | {"roi.class_weight": "quadratic"}),
    27: ("sephv15", "sephv14:r128", GIOU | {"roi.box_loss_scale": 4.0}),
    28: ("sephv15:1", "sephv14:r128", GIOU | {"roi.box_loss_scale": 8.0}),
    29: ("sephv15:2", "sephv14:r128", GIOU | {"roi.box_loss_scale": 12.0}),
    30: ("sephv13", "sephv11", GIOU),
    31: ("sephv21", "sephv15:1", LOW),
    32: ("sephv22", "sephv14:r128", {"roi.levels": ("p3",)}),
    33: (
        "cascade",
        "sephv14:r128",
        {
            "roi.class_agnostic": True,
            "roi.cascade.ious": (0.5, 0.6, 0.7),
            "roi.cascade.weights": (
                (10.0, 10.0, 5.0, 5.0),
                (20.0, 20.0, 10.0, 10.0),
                (30.0, 30.0, 15.0, 15.0),
            ),
        },
    ),
}
PUBLISHED = {  # box and mask mAP in percent, in the order of EXPERIMENTS 7.2
    "sephnv15": (38.5,),
    "fpn3": (26.7, 25.2),
    "fpn3:evonorm_masks": (28.5, 26.2),
    "fpn3:p3": (28.3, 26.2),
    "fpn3:hooks": (28.0, 26.0),
    "fpn3:hooks_x2": (28.5, 26.3),
    "fpn3:balance": (29.3, 26.9),
    "fpn3:seph_bn": (7.0, 7.7),
    "fpn3:seph": (29.6, 27.0),
    "fpn3:sephv2_bn": (13.3, 13.6),
    "fpn3:sephv2": (30.0, 27.4),
    "fpn3:pred_iou": (30.6, 28.1),
    "sephv10": (30.4,),
    "sephv9": (30.0,),
    "sephv3": (30.6,),
    "sephv11": (31.4,),
    "sephv14:r128": (31.5,),
    "sephv14": (33.1,),
    "sephv14:1": (32.5,),
    "sephv14:2": (32.6,),
    "sephv17": (31.4,),
    "sephv16": (31.1,),
    "sephv18": (31.4,),
    "sephv18:1": (31.5,),
    "sephv19": (31.0,),
    "sephv12": (30.1,),
    "sephv15": (31.6,),
    "sephv15:1": (32.2,),
    "sephv15:2": (31.7,),
    "sephv13": (29.5,),
    "sephv21": (29.9,),
    "sephv22": (31.3,),
    "cascade": (33.8,),
}


OURS = ("c3", "cascade", "fpn3", "seph")  # families of the series start so
PUBLISHED |= {"c3": (23.5, 17.5), "c3:nonlocal": (27.4, 22.0), "c3:fusion": (30.7, 24.1)}
RES5 = {
    "anchors.sizes": (120, 240, 480, 512),
    "roi.levels": ("p3",),
    "roi.head.name": "res5",
    "roi.head.blocks": 3,
    "roi.head.width": 512,
    "roi.head.norm": "bn",
    "roi.head.eps": 1e-5,
    "roi.head.decay": 0.999,
    "mask.input": "head",
    "mask.pool": 7,
    "optimizer.decay": (
        r"^backbone/.*conv\d?/kernel$",
        r"^fpn/output",
        r"^box_head/block\d/.*conv\d?/kernel$",
    ),
}
LATER = {"anchors.sizes": (64, 128, 256, 512), "mask.convs": 0}
DIFFERENCES |= {  # the C3 table, against the FPN-3 base line
    "c3 1": ("c3", "fpn3", RES5),
    "c3 2": ("c3:nonlocal", "c3", LATER | {"fpn.before": "non_local"}),
    "c3 3": (
        "c3:fusion",
        "c3",
        LATER
        | COSINE
        | {
            "fpn.after": "fusion",
            "roi.levels": ("f3",),
            "schedule.warmup_steps": 1_500,
            "optimizer.lr": 0.01333,
            "train.steps": 180_000,
            "train.batch": 8,
        },
    ),
}


def values(name):
    family, _, row = name.partition(":")
    found = dict(flat(read(family, row) if family != "series" else series.get_config()))
    del found["name"], found["lineage"]
    return found


def changed(name, parent):
    now, was = values(name), values(parent)
    return {path: value for path, value in now.items() if was.get(path) != value}


@pytest.mark.parametrize(("name", "parent", "difference"), DIFFERENCES.values())
def test_a_row_differs_from_its_parent_by_what_the_document_says(name, parent, difference):
    assert changed(name, parent) == difference


def test_rows_before_commit_848414a_pick_test_proposals_as_in_training():
    # EXPERIMENTS 3.6 and 7.2: the C3 table, rows 2-12 and 15; all other rows have an RPN threshold.
    early = {name for name in PUBLISHED if name.startswith(("c3", "fpn3"))} | {"sephv3"}
    rules = {name: read(*(name + ":").split(":")[:2]).rpn.proposals for name in PUBLISHED}
    found = {name for name, rule in rules.items() if rule.get("test_exactly")}
    assert found == early
    floors = {name: rule.get("logit_floor") for name, rule in rules.items() if name not in early}
    assert {name for name, floor in floors.items() if floor != 0.005} == {"sephv9"}


def test_sephv14_is_what_it_was_before_it_had_parents():
    gone = {"roi.head.conv_norm", "roi.head.fc_norm", "rpn.matcher.low_quality"}
    for name, difference in (
        ("sephv14", SEPHV14 | {"roi.samples": 512}),
        ("sephv14:r128", SEPHV14),
    ):
        assert changed(name, "series") == difference
        assert set(values("series")) - set(values(name)) == gone
    lineage = ("base", "series", "fpn3", "fpn3:sephv2_bn", "fpn3:sephv2", "sephv11", "sephv14")
    assert tuple(read("sephv14", "").lineage) == lineage
    assert tuple(read("sephv15", "1").lineage) == (
        *lineage,
        "sephv14:r128",
        "sephv15",
        "sephv15:1",
    )


def test_every_row_of_the_series_says_what_was_published_and_how_sure_that_is():
    known = {f"{family}:{row}" if row else family for family, row in ROWS}
    ours = {name for name in known if name.startswith(OURS)}
    assert ours == PUBLISHED.keys()
    for name, numbers in PUBLISHED.items():
        family, _, row = name.partition(":")
        parts = [f"{kind} {n}" for kind, n in zip(("box", "mask"), numbers, strict=False)]
        published = families()[family].ROWS[row].published
        assert published.startswith(f"{', '.join(parts)} ("), name
        assert "confidence" in published


def test_sephv15_1_has_a_page_of_one_screen(capsys):
    describe.describe(read("sephv15", "1"))
    page = capsys.readouterr().out
    words = " ".join(page.split())
    assert "> sephv14 > sephv14:r128 > sephv15 > sephv15:1" in words
    assert "published box 32.2 (high confidence: yaml at 869210b)" in words
    assert "roi.box_loss_scale 8.0" in words
    assert " class_weight=quadratic " in words
    assert len(page.splitlines()) <= 40, page

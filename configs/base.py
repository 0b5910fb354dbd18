"""Every key once, with its unit and meaning. The values are detectron2's Mask R-CNN R50-FPN 1x.

A config is read with `get_config()`; families start from it and say only what they change.
Component choices (a matcher, a loss) are dicts: `name` picks the component, the rest are its arguments;
those that are not here have the defaults that the component's own docstring gives (`sephjax/recipe.py` names them).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The locked base config; a misspelt key raises with the nearest right one."""
    config = ConfigDict()
    config.name = "base"  # family or family_row
    config.lineage = ("base",)  # parents, oldest first; written by `_chain.resolve`
    config.seed = 0  # of the initial weights, the data order, augmentation and sampling
    config.compute_dtype = "float32"  # of convolutions and matmuls; parameters stay float32
    config.initializers = (
        "detectron2"  # of everything but the backbone: detectron2 | torchvision | xavier
    )
    config.mask_padding = (
        True  # features, anchors and norms see the picture only, never its padding
    )
    config.heads_bn = ConfigDict({"eps": 1e-5, "decay": 0.9})  # `bn` in the box and mask heads
    config.data = data()
    config.backbone, config.fpn, config.anchors = backbone(), fpn(), anchors()
    config.rpn, config.roi, config.mask, config.test = rpn(), roi(), mask(), test()
    config.optimizer, config.schedule = optimizer(), schedule()
    config.train = train()
    config.eval = ConfigDict(
        {
            "every": 5_000,  # steps; the end is always evaluated; 0: only the end
            "batch": 8,  # images, over all devices and hosts
            "backend": "pycocotools",  # pycocotools | faster (pip install faster-coco-eval)
            "reference_metric": False,  # the results log's own metric beside COCO's (docs/CONVENTIONS.md)
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every": 2_500,  # steps
            "keep": 2,  # newest checkpoints that stay
        }
    )
    config.init = ConfigDict(
        {
            "format": "none",  # none (random) | torchvision | timm | detectron2 | keras | slim | sephjax
            "path": "",  # file of a backbone's or a whole detector's weights; sephjax: a workdir
            "backbone_only": False,  # of a detector's file; the rest is drawn
        }
    )
    config.predict = ConfigDict(
        {
            "score_threshold": 0.5,  # detections below it are left out of files and pictures
        }
    )
    config.parity = ConfigDict(
        {
            "tolerance": 1e-4,  # largest difference over the largest number of a layer that agrees
        }
    )
    return config.lock()


def train() -> ConfigDict:
    """Steps and batches."""
    return ConfigDict(
        {
            "steps": 90_000,
            "batch": 16,  # images a step, over all devices and hosts
            # Micro-batches that a step's images are cut into on each device. Each runs forward on its own
            # and once more in the backward pass: losses and normalisers stay those of the whole batch,
            # memory is that of one (only `bn`, where it learns, sees one micro-batch at a time).
            "accumulate": 1,
            "remat": "none",  # none | stage (a backbone stage's activations are computed again, not kept)
            "log_every": 20,  # steps
            "ema": 0.0,  # decay of averaged weights, which are then evaluated and exported; 0: none
        }
    )


def data() -> ConfigDict:
    """Where pictures come from and what they go through on the host."""
    return ConfigDict(
        {
            "source": "coco",  # coco | tfds | shapes
            "name": "coco_instances",  # tfds builder
            "data_dir": "",  # tfds data_dir
            "train": {
                "annotations": "",  # COCO JSON
                "images": "",  # folder
                "split": "train",  # tfds
                "limit": 0,  # first N usable images by id; 0: all
                "short_sides": (640, 672, 704, 736, 768, 800),  # pixels; one is drawn an image
                "long_side": 1333,  # pixels; caps the scale
                "aspects": (),  # long/short ratios that get a canvas of their own beside the longest one
            },
            "eval": {
                "annotations": "",
                "images": "",
                "split": "validation",
                "limit": 0,
                "short_sides": (800,),
                "long_side": 1333,
                "aspects": (1.5,),
            },
            "resize": "keep_aspect",  # keep_aspect | series (stretches the short side when long_side binds)
            "flip": 0.5,  # probability of a horizontal flip
            # Large-scale jitter: with crop > 0 pictures are resized to fit low..high times crop (in
            # place of short_sides, long_side, aspects and resize) and cut to crop x crop pixels.
            "jitter": {"low": 1.0, "high": 1.0, "crop": 0},
            "copy_paste": 0.0,  # probability an image that objects of another one are pasted onto it
            "stitch": 0.0,  # probability that two images of a batch share a canvas; in the series of a
            # GPU's batch (rpn.sample_group images; where that is 1, of the whole batch)
            "size_multiple": 32,  # canvases are multiples of it, pixels
            "max_objects": 100,  # objects an image holds in training; the smallest beyond are dropped and counted
            "skip_empty": True,  # leave training images without a non-crowd object out
            "workers": 0,  # processes that prepare batches; 0: threads of this one
            "threads": 2,  # reading threads in each process
            "prefetch": 4,  # batches held ready
            "shapes": {  # the drawn set
                "set": "plain",  # plain: 3 shapes, sizes 1:3.6 | hard: 8 shapes, 1:8, more occlusion
                "train_images": 4_096,
                "eval_images": 128,
                "height": 128,  # pixels, landscape; a third of the pictures are portrait
                "width": 160,
                "max_objects": 4,
            },
        }
    )


def backbone() -> ConfigDict:
    """ResNet."""
    return ConfigDict(
        {
            "depth": 50,  # 18 | 34 | 50 | 101
            "layout": "torchvision",  # slim | msra | torchvision: strides, taps, pixel statistics, channel order
            "width": 64,  # channels of the stem
            "norm": "frozen_bn",  # frozen_bn | bn | gn | evonorm_s0
            "norm_eps": 0.0,  # 0: the layout's
            "trainable_affine": False,  # frozen_bn: train scale and offset, freeze only the statistics
        }
    )


def fpn() -> ConfigDict:
    """Feature pyramid."""
    return ConfigDict(
        {
            "inputs": ("c2", "c3", "c4", "c5"),
            "channels": 256,
            "norm": "none",  # after the 3x3 output convolutions
            "lateral_norm": "none",  # after the lateral 1x1 convolutions
            "extra": "max_pool",  # p6: max_pool (of p5, stride 2) | conv_c5 (3x3 stride 2 on c5)
            "before": "none",  # none | non_local (self-attention over c4 and over c5)
            "after": "none",  # none | fusion (adds f3, twice as wide, for roi.levels) | balance
        }
    )


def anchors() -> ConfigDict:
    """Anchors of the RPN."""
    return ConfigDict(
        {
            "sizes": (32, 64, 128, 256, 512),  # sqrt of area in pixels, one a level, fine to coarse
            "ratios": (0.5, 1.0, 2.0),
            "ratio_is": "height_over_width",  # height_over_width | width_over_height
            "rounded": False,  # torchvision rounds its cell anchors
            "offset": 0.0,  # of the first centre, in cells
            "stride": "nominal",  # nominal (4, 8, ...) | feature (canvas size / feature size) | feature_floor
        }
    )


def rpn() -> ConfigDict:
    """Region proposal network: head, targets, losses, proposals."""
    return ConfigDict(
        {
            "name": "rpn",  # rpn | retinanet (towers of their own for class and box, 3x3 predictors)
            "levels": (),  # of the pyramid, one of anchors.sizes each; empty: all
            "convs": 1,  # of each tower
            "norm": "none",  # replaces the ReLU when it is evonorm_s0, one a level
            "matcher": {  # max_iou | atss | atss_v1
                "name": "max_iou",
                "low": 0.3,
                "high": 0.7,
                "low_quality": "all",
                "min_iou": 0.0,
            },
            "samples": 256,  # anchors a group of images; 0: every anchor that is not ignored
            "positive_fraction": 0.5,  # at most
            "sample_group": 1,  # images that share `samples`; 4 in the series (its batch a GPU)
            "weights": (1.0, 1.0, 1.0, 1.0),  # of dx, dy, dw, dh
            "min_size": 0.0,  # pixels; a proposal with a shorter side, or without area, goes
            "box_loss": {"name": "smooth_l1", "beta": 0.0},  # smooth_l1 | giou | diou | ciou
            "class_loss": {"name": "sigmoid"},  # sigmoid | focal (alpha=0.25, gamma=2.0)
            "class_loss_scale": 1.0,
            "box_loss_scale": 1.0,
            "normalizer": "images_times_samples",  # images_times_samples | sampled | positives
            # joint (NMS by level, then the best of all levels) | per_level (a quota for each level)
            # | retinanet (trains as per_level; tests on what scores best, NMS across levels)
            "proposals": {
                "name": "joint",
                "nms": 0.7,
                "train_pre": 2_000,  # by level, before NMS
                "train_post": 1_000,  # an image, after NMS
                "test_pre": 1_000,
                "test_post": 1_000,
            },
        }
    )


def roi() -> ConfigDict:
    """Box head: sampling of proposals, pooling, predictions, losses."""
    return ConfigDict(
        {
            "levels": ("p2", "p3", "p4", "p5"),
            "canonical": {"size": 224.0, "level": 4, "eps": 1e-8, "eps_inside_log": True},
            "pooler": {
                "name": "roi_align",
                "sampling_ratio": 2,
                "aligned": True,
            },  # roi_align | crop_max | multi_scale (a second, larger crop for the box branch)
            "append_truth": 0,  # 0: every ground truth joins the proposals; n: exactly n, repeated if fewer
            "matcher": {
                "name": "max_iou",
                "low": 0.5,
                "high": 0.5,
                "low_quality": "none",
                "min_iou": 0.0,
            },
            "samples": 512,  # ROIs an image
            "positive_fraction": 0.25,
            # IoU up to which a positive of the matcher is sampled with the negatives and background
            # to the class loss, while the box loss takes it; 0: off
            "positive_iou": 0.0,
            "sampler": {
                "balance_positives": False,
                "balance_negatives": False,  # over the IoU, from -0.2 to 0.5
                "fill": "none",  # none | repeat (always exactly `samples`)
                "positive_groups": "truth",  # truth | iou (from 0.5 to 1): what they are balanced over
                "positive_bins": 5,  # of the positives' IoU
                "bins": 8,  # of the negatives' IoU
            },
            "head": {  # fast_rcnn_conv_fc | separate | separate_v2 | shared_conv | res5
                "name": "fast_rcnn_conv_fc",
                "conv_dims": (),
                "fc_dims": (1024, 1024),
                "conv_norm": "none",
                "fc_norm": "none",
            },
            "class_agnostic": False,
            "weights": (10.0, 10.0, 5.0, 5.0),
            # Box heads in a row, each on the boxes of the one before; needs class_agnostic.
            "cascade": {
                "ious": (),  # at which each stage matches; empty: one head
                "weights": (),  # of each stage's deltas
                "append": 8,  # ground truths that join the boxes of each stage but the first
                "gradient_scale": 1 / 3,  # of what the stages send to the maps
            },
            "class_weight": "none",  # none | quadratic (min(100 (IoU - 0.5)^2, 1)) | linear (4 |IoU - 0.5|)
            "class_loss_scale": 1.0,
            # smooth_l1 | giou | diou | ciou | weighted_giou (times the ROI's IoU where that is <= 0.5)
            "box_loss": {"name": "smooth_l1", "beta": 0.0},
            "box_loss_scale": 1.0,
            # One more output, the IoU of a box: none | v0 (of the ROI) | v1 (of the predicted box;
            # negative_weight=0.3); its loss has weight 1, its use is `test.iou_score`.
            "iou_branch": {"name": "none"},
            # Shares of the test proposals: the head runs on the smallest that holds the valid ones
            # of the fullest image, or on all.
            "tiers": (0.125, 0.25, 0.5),
        }
    )


def mask() -> ConfigDict:
    """Mask head."""
    return ConfigDict(
        {
            "enabled": True,
            "input": "pooled",  # pooled | head (the map of a res5 box head, of which `pool` is the side)
            "convs": 4,
            "dim": 256,
            "norm": "none",
            "deconv_norm": "none",
            "pool": 14,  # cells a side; the mask has twice as many
            "loss_scale": 1.0,
            # Shares of the ROIs: the head runs on the smallest that holds the positives of the batch
            # (when testing: the detections of its fullest image), or on all.
            "tiers": (0.0625, 0.125, 0.25, 0.5),
            "binary_target": True,  # threshold the resampled ground truth at 0.5
        }
    )


def test() -> ConfigDict:
    """From raw outputs to detections."""
    return ConfigDict(
        {
            "score_threshold": 0.05,
            "nms": 0.5,
            "nms_inclusive": False,  # suppress at IoU >= nms (the series) instead of >
            "min_size": 0.0,  # pixels; a detection with a shorter side, or without area, goes
            "detections": 100,  # an image
            "candidates": 1_000,  # best (box, class) pairs that enter NMS
            "one_class_per_box": False,  # keep only the best foreground class of a proposal (the series)
            "iou_score": "none",  # none | product (p * IoU) | order (ranked by IoU, reported p); of roi.iou_branch
        }
    )


def optimizer() -> ConfigDict:
    """SGD with momentum."""
    return ConfigDict(
        {
            "lr": 0.02,  # at the batch of `train.batch`
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "decay": (r".*",),  # names (regex, anywhere in `a/b/c`) that decay
            "no_decay": (r"norm\d?(_\w+)?/",),  # ... but these
            "freeze": (r"^backbone/(stem|stage1)/",),  # names that get no update
            "clip": 0.0,  # global gradient norm; 0: none
        }
    )


def schedule() -> ConfigDict:
    """Learning rate over steps, as a factor chain: warm-up, then `name`."""
    return ConfigDict(
        {
            "name": "step",  # step | cosine
            "warmup_steps": 1_000,
            "warmup_from": 0.001,  # fraction of lr at step 0
            "milestones": (60_000, 80_000),  # steps; step schedule
            "factor": 0.1,
            "floor": 0.0,  # lowest lr; cosine schedule
        }
    )

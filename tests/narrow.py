"""A detector that compiles in seconds, and pictures for it."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from configs._chain import apply
from sephjax.nets.functional import flat_paths
from sephjax.types import Batch, Truth

CLASSES = 3
CANVAS = (64, 96)
# What is compiled once and run once: most of the time would go into LLVM's passes.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PROPOSALS = {
    "name": "joint",
    "nms": 0.7,
    "train_pre": 60,
    "train_post": 30,
    "test_pre": 60,
    "test_post": 20,
}


def jit(function):
    """`jax.jit` with little optimization."""
    return jax.jit(function, compiler_options=QUICK)


def config(norm="evonorm_s0", **changes):
    """The base config, narrow, with a norm in every part that has one."""
    diff = {
        "backbone.depth": 18,
        "backbone.width": 8,
        "fpn.channels": 16,
        "anchors.sizes": (16, 24, 32, 48, 64),
        "rpn.proposals": PROPOSALS,
        "roi.samples": 16,
        "roi.canonical.size": 56.0,
        "roi.head.fc_dims": (32,),
        "roi.tiers": (0.4,),
        "mask.convs": 1,
        "mask.dim": 16,
        "mask.tiers": (0.25,),
        "test.detections": 10,
        "optimizer.freeze": (),
        "schedule.warmup_steps": 0,
    } | changes
    if norm != "frozen_bn":
        normed = ("backbone.norm", "fpn.norm", "roi.head.fc_norm", "mask.norm", "mask.deconv_norm")
        diff |= dict.fromkeys(normed, norm)
    return apply(base.get_config(), diff, "narrow")


def batch(sizes, counts, canvas=CANVAS, seed=0, most=3):
    """Noise with brighter squares as objects; picture i depends on the seed and i alone."""
    images = np.zeros((len(sizes), *canvas, 3), np.uint8)
    boxes = np.zeros((len(sizes), most, 4), np.float32)
    labels = np.zeros((len(sizes), most), np.int32)
    for i, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        rng = np.random.default_rng((seed, i))
        images[i, :height, :width] = rng.integers(0, 100, (height, width, 3))
        for j in range(count):
            side = rng.integers(14, 30)
            x, y = rng.integers(0, width - side), rng.integers(0, height - side)
            labels[i, j] = rng.integers(CLASSES)
            images[i, y : y + side, x : x + side, labels[i, j]] += 50
            boxes[i, j] = x, y, x + side, y + side
    valid = np.arange(most)[None] < np.array(counts)[:, None]
    masks = np.ones((len(sizes), most, 112, 112), np.uint8)
    masks[:, :, :20, :20] = 0
    size = np.array(sizes, np.int32)
    index = np.arange(len(sizes), dtype=np.int32)
    truth = Truth(boxes, labels, valid, masks)
    return Batch(images, size, size, index, np.ones(len(sizes), bool), truth)


def learn(losses, model, params, frozen, batch, seed=1):
    """Terms of the loss, what the detector said in training, and the gradient by name."""
    batch = jax.tree.map(jnp.asarray, batch)

    def objective(params):
        keys = jax.random.split(jax.random.key(seed), len(batch.size))
        outputs = model.apply(params, frozen, batch, keys, method="training")
        terms = losses(outputs, batch.size.astype(jnp.float32))
        return terms["loss"], (terms, outputs)

    (_, (terms, outputs)), slopes = jit(jax.value_and_grad(objective, has_aux=True))(params)
    return terms, outputs, dict(flat_paths(slopes))


def random_tree(abstract, seed=0):
    """Numbers that tell every entry from every other, for what only moves them about."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape, dtype=np.float32)
    return jax.tree.map(draw, abstract)


def draw(model, seed=0):
    """`(params, frozen)` without compiling: kernels of unit gain, norms that do nothing."""
    rng = np.random.default_rng(seed)
    ones = ("gamma", "v", "variance")

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(size=like.shape) * np.sqrt(2 / np.prod(like.shape[:-1]))
        else:
            values = np.full(like.shape, float(name in ones))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(leaf, model.abstract)

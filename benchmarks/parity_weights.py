"""Weights to try `--mode=parity` with: `python -m benchmarks.parity_weights FILE PICTURE`.

Writes the state dict of torchvision's Mask R-CNN with random weights that find something; see
`benchmarks.peer`.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks import peer
from sephjax import predicting
from sephjax.input import transforms

SHORT, LONG = 800, 1333  # pixels, as the configs evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="random weights that find something")
    parser.add_argument("file", help="to write, .pth")
    parser.add_argument("picture", help="on which objects are to be found")
    parser.add_argument("--detections", type=int, default=40, help="how many")
    parser.add_argument("--v2", action="store_true", help="of maskrcnn_resnet50_fpn_v2")
    options = parser.parse_args(arguments)
    image = predicting.read_image(pathlib.Path(options.picture))
    if image is None:
        parser.error(f"{options.picture} is no readable picture")
    high, wide = image.shape[:2]
    height, width = transforms.resized_shape(high, wide, SHORT, LONG, "keep_aspect")
    resized = np.zeros((height, width, 3), np.uint8)
    transforms.resize_onto(resized, image, height, width)
    make, contrast = (peer.mask_rcnn_v2, 1.0) if options.v2 else (peer.mask_rcnn, 2.0)
    model = make(height, width)
    found = peer.settle(model, resized, detections=options.detections, contrast=contrast)
    torch.save(model.state_dict(), options.file)
    print(f"{options.file}: {found} detections on {options.picture}")


if __name__ == "__main__":
    main()

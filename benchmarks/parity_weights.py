"""Weights to try `--mode=parity` with: `python -m benchmarks.parity_weights FILE PICTURE`.

Writes the state dict of torchvision's Mask R-CNN with random weights that find something; see
`benchmarks.peer`.
"""

import argparse
import pathlib
from collections.abc import Sequence

import torch

from benchmarks import peer
from sephjax import predicting


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="random weights that find something")
    parser.add_argument("file", help="to write, .pth")
    parser.add_argument("picture", help="on which objects are to be found")
    parser.add_argument("--detections", type=int, default=40, help="how many")
    options = parser.parse_args(arguments)
    image = predicting.read_image(pathlib.Path(options.picture))
    if image is None:
        parser.error(f"{options.picture} is no readable picture")
    model = peer.mask_rcnn(800, 1333)
    with torch.no_grad():  # biases that start at 0 would hide that one is not read
        for name, value in model.named_parameters():
            if name.endswith("bias") and not value.any():
                value.normal_(0.0, 0.05)
    found = peer.settle(model, image, detections=options.detections)
    torch.save(model.state_dict(), options.file)
    print(f"{options.file}: {found} detections on {options.picture}")


if __name__ == "__main__":
    main()

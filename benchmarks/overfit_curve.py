"""The overfit run beside torchvision's: `python -m benchmarks.overfit_curve WORKDIR OUTPUT.png`.

torchvision's curve was measured once with the same weights, images and recipe on a 2-core machine
(one seed); it is printed here as published numbers, not run again.
"""

import argparse
import json
import pathlib

from sephjax import pictures

STEPS = (100, 200, 300, 400, 500)
TORCHVISION = {
    "box": (0.057, 0.333, 0.395, 0.585, 0.713),
    "mask": (0.024, 0.266, 0.395, 0.499, 0.561),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    arguments = parser.parse_args()
    found = {
        int(path.parent.name): json.loads(path.read_text())
        for path in arguments.workdir.glob("eval/*/metrics.json")
    }
    series = {}
    for kind, key in (("box", "bbox"), ("mask", "segm")):
        ours = [(step, found[step][key]["AP"]) for step in sorted(found)]
        series[f"sephjax {kind}"] = ours
        series[f"torchvision {kind}"] = list(zip(STEPS, TORCHVISION[kind], strict=True))
    pictures.curve(
        arguments.output, series, "16 COCO pictures learned by heart", "step", "AP [.50:.95]"
    )
    print("| step | box AP | torchvision | mask AP | torchvision |\n|---|---|---|---|---|")
    for at, step in enumerate(STEPS):
        box, mask = (found[step][key]["AP"] for key in ("bbox", "segm"))
        theirs = TORCHVISION["box"][at], TORCHVISION["mask"][at]
        print(f"| {step} | {box:.3f} | {theirs[0]:.3f} | {mask:.3f} | {theirs[1]:.3f} |")


if __name__ == "__main__":
    main()

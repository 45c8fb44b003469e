"""Compares two picture files: `python .ci/same_image.py ONE OTHER`. Exit code 1 unless they show the same.

The same, since images may be built with another build of torch than the machine's: sizes are equal and the mean
difference is below one level of 255. A picture of fewer than 50 colours is refused, as empty ones are equal too.
"""

from __future__ import annotations

import sys

from PIL import Image, ImageChops, ImageStat


def main(one: str, other: str) -> int:
    """Print what was found."""
    left, right = (Image.open(path).convert("RGB") for path in (one, other))
    if left.size != right.size:
        sys.stderr.write(f"{one} is {left.size}, {other} is {right.size}\n")
        return 1
    colours = len(left.getcolors(left.width * left.height) or ())
    difference = max(ImageStat.Stat(ImageChops.difference(left, right)).mean)
    sys.stdout.write(f"{left.width}x{left.height}, {colours} colours, mean difference {difference:.3f} of 255\n")
    return 0 if colours >= 50 and difference < 1 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

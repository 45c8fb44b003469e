"""Compares two image files: `python .ci/same_image.py ONE OTHER`. Exit status 1 if they differ.

Images are the same if their sizes are equal and the mean difference is below one level of 255, as the containers may
have another torch build than the host. An image with fewer than 50 colors is rejected, as empty images are equal, too.
"""

from __future__ import annotations

import sys

from PIL import Image, ImageChops, ImageStat


def main(one: str, other: str) -> int:
    """Print sizes, colors and the mean difference, and return the exit status."""
    left, right = (Image.open(path).convert("RGB") for path in (one, other))
    if left.size != right.size:
        sys.stderr.write(f"{one} is {left.size}, {other} is {right.size}\n")
        return 1
    colors = len(left.getcolors(left.width * left.height) or ())
    difference = max(ImageStat.Stat(ImageChops.difference(left, right)).mean)
    sys.stdout.write(f"{left.width}x{left.height}, {colors} colors, mean difference {difference:.3f} of 255\n")
    return 0 if colors >= 50 and difference < 1 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

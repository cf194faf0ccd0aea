"""Rebuilds the emoji arrays from the packages they come from, and compares them with those that lie here.

    pip install resvg-py==0.5.0
    python datamodules/embedded/emoji/rebuild.py            # fetch, draw, compare
    python datamodules/embedded/emoji/rebuild.py --write    # and write the arrays and SHA256SUMS

Needs ``npm`` (it fetches the drawings) or ``--packages DIR`` with the archives that ``npm pack`` made. ``concepts.npz``
says which emoji are drawn, with their class and their split; it is made by hand and kept. So is ``captions.npz``, with
the names and keywords of those and of the other emoji, which are drawn into ``<style>_more.npz``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIDE = 32
#: Style -> npm package of the drawings, and of the map from code points to names where that is another one.
PACKAGES = {
    "noto": ("@iconify-json/noto@1.2.9", None),
    "twemoji": ("@iconify-json/twemoji@1.2.5", None),
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "@iconify-json/fluent-emoji-flat@1.2.6"),
    "openmoji": ("@iconify-json/openmoji@1.2.29", None),
    "fluent_mono": ("@iconify-json/fluent-emoji-high-contrast@1.2.6", None),
}


def archive(package: str, folder: Path) -> Path:
    """The archive of an npm package, fetched into ``folder`` unless it lies there."""
    name, _, version = package.rpartition("@")
    file = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not file.is_file():
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
    return file


def member(file: Path, name: str) -> dict:
    with tarfile.open(file) as tar:
        opened = tar.extractfile(f"package/{name}")
        assert opened is not None
        return json.load(opened)


def draw(icons: dict, name: str) -> np.ndarray:
    """One drawing, cut to what is drawn, centred on white with a margin of one pixel: uint8 (32, 32, 3)."""
    import resvg_py

    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=8 * SIDE, height=8 * SIDE)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawn = drawn.crop(drawn.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    side = round(max(drawn.size) * SIDE / (SIDE - 2))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def rebuild(style: str, folder: Path, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The emoji of these code points in one style, uint8 (N, 32, 32, 3), and whether it has them: bool (N,).

    What it hasn't is white.
    """
    drawings, names = PACKAGES[style]
    icons = member(archive(drawings, folder), "icons.json")
    chars = member(archive(names or drawings, folder), "chars.json")
    images = np.full((len(wanted), SIDE, SIDE, 3), 255, np.uint8)
    present = np.zeros(len(wanted), bool)
    for i, points in enumerate(wanted):
        key = str(points).lower()
        name = chars.get(key) or chars.get(key.replace("-fe0f", ""), "")
        if name in icons["icons"] or name in icons.get("aliases", {}):
            images[i], present[i] = draw(icons, name), True
    return images, present


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the packages' archives")
    parser.add_argument("--write", action="store_true", help="write the arrays")
    args = parser.parse_args()
    worst = 0
    captions = np.load(HERE / "captions.npz")
    sets = {"": np.load(HERE / "concepts.npz")["codepoints"], "_more": captions["codepoints"][captions["concept"] < 0]}
    with tempfile.TemporaryDirectory() as temporary:
        for style, suffix in [(style, suffix) for suffix in sets for style in PACKAGES]:
            images, present = rebuild(style, args.packages or Path(temporary), sets[suffix])
            file = HERE / f"{style}{suffix}.npz"
            if args.write:
                arrays = {"images": images, "present": present} if suffix else {"images": images}
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for its flag
            difference = int(np.abs(images.astype(int) - np.load(file)["images"]).max())
            worst = max(worst, difference)
            print(f"{file.name}: {present.sum()} drawings, largest difference {difference}", flush=True)
    if args.write:
        sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(HERE.glob("*.npz"))]
        (HERE / "SHA256SUMS").write_text("".join(sums))
    return int(worst > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Scores of a scene's Gaussians, the cameras shared among all devices of all hosts.

jaxlab launch -n 2 --devices 2 -- python examples/several_hosts/splats.py scene.ply scene.jxg
"""

import argparse

from jaxlab import core
from jaxlab.flexgaussian import importance_scores, load_scene, orbit_cameras, save_compressed, search


def main() -> None:
    """Scores together; process 0 searches and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scene")
    parser.add_argument("result")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--min-psnr", type=float, default=35.0)
    options = parser.parse_args()

    core.distributed.initialize()
    scene = load_scene(options.scene)
    cameras = orbit_cameras(scene, options.views, *options.size)
    scores = importance_scores(scene, cameras, mesh=core.make_mesh({"view": -1}))
    if core.distributed.is_main():  # the search renders a few views only
        found = search(scene, cameras[:4], min_psnr=options.min_psnr, scores=scores)
        save_compressed(options.result, found.compressed)
        print(f"{found.bytes} bytes, {found.psnr:.2f} dB, {found.ratio:.2f} times smaller", flush=True)


if __name__ == "__main__":
    main()

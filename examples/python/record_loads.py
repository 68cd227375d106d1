"""Records the loads of a routes file, step by step, and draws where they are uneven.

    python examples/python/record_loads.py FILE.routes.gz --ranks 8 --output DIRECTORY

writes loads.json, which Recorder.read_json reads, sglang.json for SGLang's --init-expert-location, and the pictures
experts.png, steps.png (of the first layer) and ranks.png. In a program of your own, record() takes the loads, or the
routes, of each expert layer after each step. Needs `pip install matplotlib`.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from expar import plot
from expar.recorder import Recorder, read_routes, write_sglang


def main() -> None:
    parser = argparse.ArgumentParser(description="Records the loads of a routes file and draws them.")
    parser.add_argument("routes", help="a file *.routes or *.routes.gz")
    parser.add_argument("--ranks", type=int, default=8, help="that hold the experts, in order (default 8)")
    parser.add_argument("--step-tokens", type=int, default=256, help="tokens of each step (default 256)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."), help="directory (default: this one)")
    options = parser.parse_args()

    routes = read_routes(options.routes)
    layers, tokens, _ = routes.ids.shape
    recorder = Recorder(layers, routes.experts)
    for step, start in enumerate(range(0, tokens, options.step_tokens)):
        for layer in range(layers):
            recorder.record(step, layer, routes=routes.ids[layer, start : start + options.step_tokens])

    options.output.mkdir(parents=True, exist_ok=True)
    recorder.write_json(options.output / "loads.json")
    write_sglang(options.output / "sglang.json", recorder)
    first = routes.header.get("first_layer", 0)  # of the model, whose first layers may have no experts
    plot.load_heatmap(recorder, options.output / "experts.png", first=first)
    plot.load_heatmap(recorder.loads[:, 0], options.output / "steps.png", rows="step", first=recorder.steps[0])
    plot.rank_loads(recorder, options.ranks, options.output / "ranks.png", first=first)
    print(
        f"{len(recorder.steps)} steps, {layers} layers of {routes.experts} experts: max/mean "
        f"{np.nanmean(recorder.max_over_mean()):.2f}, Gini {np.nanmean(recorder.gini()):.2f}, balancedness of "
        f"{options.ranks} ranks {recorder.balancedness(options.ranks):.2f}"
    )


if __name__ == "__main__":
    main()

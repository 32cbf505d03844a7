#!/usr/bin/env python3
"""Speed of Plumbline's regression forest beside scikit-learn's RandomForestRegressor, in one table.

    python3 trainer/benches/sklearn_forest.py [--trees 100] [--share 1.0] [TABLE.csv ...]

A table has a head line and numbers, the target last. Without any, three are made up of the sizes of Vidur's: tokens by
tensor-parallel ranks, batch by cache size, and 15 features of 2000 rows. Both grow as many trees to the end with the
same share of the features tried at each split, on all cores, and answer one row and the whole table. Each is timed
inside its process, several times in turn with the other; the table gives the lowest and the median time of each, and
ratios of the lowest. scikit-learn and numpy come from PyPI into target/sklearn-venv unless they can be imported.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROUNDS = 3


def with_scikit_learn():
    """Starts this script again in an environment that has scikit-learn, where this one has none."""
    try:
        import numpy  # noqa: F401
        import sklearn  # noqa: F401
        return
    except ImportError:
        pass
    folder = ROOT / "target" / "sklearn-venv"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "scikit-learn"], check=True)
    os.execv(python, [str(python), *sys.argv])


def made_up(folder):
    """Tables of the sizes of Vidur's, with noise of 2 %."""
    import numpy as np

    random = np.random.default_rng(0)
    grids = {
        "tokens_ranks": (np.arange(451) * 9.0 + 1, [1.0, 2.0, 4.0, 8.0]),
        "batch_cache": (np.arange(1.0, 129), np.arange(79) * 52.0),
    }
    tables = {name: np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 2) for name, grid in grids.items()}
    tables["distinct"] = random.normal(size=(2000, 15)).astype("f4").astype("f8")
    for name, features in tables.items():
        law = 5 + np.sqrt(2 + np.abs(features)).prod(axis=1) ** (1.5 / features.shape[1])
        target = law * random.normal(1, 0.02, len(law))
        path = folder / f"{name}.csv"
        names = [f"x{i}" for i in range(features.shape[1])] + ["target"]
        np.savetxt(path, np.column_stack([features, target]), delimiter=",", header=",".join(names), comments="")
        yield path


def timed(run, least):
    times = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < 0.5:
        before = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - before)
        del result
    return times


def theirs(path, trees, share):
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    table = np.loadtxt(path, delimiter=",", skiprows=1)
    features, target = table[:, :-1].astype("f4"), table[:, -1]
    new = lambda: RandomForestRegressor(trees, max_features=share, n_jobs=-1)
    fit = timed(lambda: new().fit(features, target), 3)
    forest = new().fit(features, target)
    all_rows = timed(lambda: forest.predict(features), 5)
    forest.n_jobs = 1  # Threads only slow down a single row.
    one = timed(lambda: forest.predict(features[:1]), 30)
    return {"fit": fit, "one": one, "all": all_rows, "shape": features.shape}


def ours(example, path, trees, share):
    answer = subprocess.run([example, str(trees), str(share), path], check=True, stdout=subprocess.PIPE, text=True)
    line = json.loads(answer.stdout)
    return {key: [ns / 1e9 for ns in line[name]] for key, name in
            {"fit": "fit_ns", "one": "predict_one_ns", "all": "predict_all_ns"}.items()}


def compare(tables, trees, share):
    """Prints the table of both sides' times."""
    build = ["cargo", "build", "--release", "--quiet", "--locked", "-p", "plumbline-trainer", "--example", "forest_speed"]
    subprocess.run(build, cwd=ROOT, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    example = target / "release" / "examples" / "forest_speed"
    print(f"{trees} trees, {share:g} of the features tried, {os.cpu_count()} cores; lowest (median) of {ROUNDS} rounds")
    print(f"{'table':36} {'':8} {'scikit-learn':>22} {'Plumbline':>22} {'ratio':>7}")
    for path in tables:
        rounds = [(theirs(path, trees, share), ours(example, path, trees, share)) for _ in range(ROUNDS)]
        for key, name, unit in [("fit", "fit", 1e3), ("one", "one row", 1e3), ("all", "all rows", 1e3)]:
            slow = [time for their, _ in rounds for time in their[key]]
            fast = [our[key] for _, our in rounds]
            low, median = min(times[0] for times in fast), statistics.median(times[1] for times in fast)
            rows, width = rounds[0][0]["shape"]
            label = f"{path.stem} {rows}x{width}"
            print(f"{label:36} {name:8} {unit * min(slow):11.3f} ({unit * statistics.median(slow):8.3f})"
                  f" {unit * low:11.4f} ({unit * median:8.4f}) {min(slow) / low:7.1f}", flush=True)
    print("times in ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--share", type=float, default=1.0, help="of the features, tried at each split")
    parser.add_argument("tables", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args()
    with_scikit_learn()
    with tempfile.TemporaryDirectory() as folder:
        tables = arguments.tables or list(made_up(pathlib.Path(folder)))
        compare(tables, arguments.trees, arguments.share)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Errors and speed on Vidur's tables, side by side with scikit-learn's RandomForestRegressor, in one run.

    python3 trainer/benches/vidur_tables.py MLP_CSV ATTENTION_CSV

runs `cargo run --release -p plumbline-trainer --example vidur_tables` on the two tables, which writes each table's rows
and folds, and then fits scikit-learn's forest to the very same folds: its features are the table's own numbers (tokens
and tensor-parallel ranks; chunk or batch size and cache length), as Vidur trains it. scikit-learn and numpy come from
PyPI into a folder of their own unless they can be imported. Last, both fit and predict the bare tables, at equal trees.
"""

import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from sklearn_forest import ROOT, compare, with_scikit_learn

# As many as Plumbline's predictors have, and as many as scikit-learn grows by default.
TREES = 32
SPEED_TREES = 100


def read(path):
    import numpy as np

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: np.array([float(row[name]) for row in rows])
    features = np.stack([column("key0"), column("key1")], axis=1)
    folds = {way: column(f"{way}_fold").astype(int) for way in ("shuffled", "blocked")}
    ours = {way: column(f"{way}_prediction_ns") for way in ("shuffled", "blocked")}
    return features, column("time_ns"), folds, ours


def bare(out):
    """The tables without folds: features, then the target."""
    import numpy as np

    folder = out / "bare"
    folder.mkdir()
    for path in sorted(out.glob("*.csv")):
        features, times, _, _ = read(path)
        rows = np.column_stack([features, times])
        np.savetxt(folder / path.name, rows, delimiter=",", header="key0,key1,time_ns", comments="")
        yield folder / path.name


def main():
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    out = pathlib.Path(tempfile.mkdtemp(prefix="vidur-tables-"))
    command = ["cargo", "run", "--release", "--quiet", "--locked", "-p", "plumbline-trainer"]
    command += ["--example", "vidur_tables", "--", "tables", *map(os.path.abspath, sys.argv[1:3]), str(out)]
    print("== Plumbline", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)

    print(f"\n== scikit-learn, {TREES} trees, n_jobs=2, on the same folds; mean absolute error in %", flush=True)
    print(f"{'table':30} {'shapes':>6} {'shuffled':>9} {'ours':>7} {'lower by':>9} {'blocked':>9} {'ours':>7}")
    started = time.perf_counter()
    blocked_means = []
    for path in sorted(out.glob("*.csv")):
        features, times, folds, ours = read(path)
        theirs = {}
        for way, fold in folds.items():
            predicted = np.zeros(len(times))
            for number in range(fold.max() + 1):
                held_out = fold == number
                forest = RandomForestRegressor(TREES, n_jobs=2, random_state=0)
                forest.fit(features[~held_out], times[~held_out])
                predicted[held_out] = forest.predict(features[held_out])
            theirs[way] = 100 * np.abs(predicted / times - 1).mean()
        mine = {way: 100 * np.abs(ours[way] / times - 1).mean() for way in ours}
        lower = 100 * (1 - mine["shuffled"] / theirs["shuffled"])
        blocked_means.append((theirs["blocked"], mine["blocked"]))
        print(
            f"{path.stem:30} {len(times):6} {theirs['shuffled']:9.2f} {mine['shuffled']:7.2f} {lower:8.0f}%"
            f" {theirs['blocked']:9.2f} {mine['blocked']:7.2f}",
            flush=True,
        )
    theirs, mine = np.mean(blocked_means, axis=0)
    print(f"{'mean of tables':30} {'':6} {'':9} {'':7} {'':9} {theirs:9.2f} {mine:7.2f}")
    print(f"scikit-learn took {time.perf_counter() - started:.1f} s for both ways")
    print()
    compare(list(bare(out)), SPEED_TREES, 1.0)


if __name__ == "__main__":
    with_scikit_learn()
    main()

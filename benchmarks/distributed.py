"""What a second process buys: the same scan in one process with one thread, in one with two, and in two with one each.

    python -m benchmarks.distributed [--rows N] [--rounds 3] [--out benchmarks/results]

Every round runs all three, one after the other, so that whatever else the machine does hits all of them. Each is a whole `score_on`, the start of the
second process and the merging of the chunks with it, of a model that is loaded already; `difference` is the largest one of a score to that of the first
of the three, as a share of the score where that is above 1.
`seconds_to_start` is how much later than the first process the second had its first chunk ready; it does not grow with the set, and `without_start` is the
factor that is left when it is taken off."""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.speed import MIX, MODEL

WAYS = (1, 1), (1, 2), (2, 1)   # processes, threads of each

# Threads have to be asked for before anything computes, so every measurement has a process of its own.
CODE = """
import json, sys, tempfile, time, torch
from pathlib import Path
from gradsentry_nb.data import load_samples
from gradsentry_nb.distributed import SharedScan, score_on
from gradsentry_nb.sentry import Sentry
model, mix, rows, processes, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads*processes)          # score_on divides them
sentry, samples = Sentry.from_pretrained(model, device='cpu'), load_samples(mix, limit=rows or None)
sentry.score(samples[:64], False)
with tempfile.TemporaryDirectory() as d:
    shares = SharedScan(sentry, samples, d+'/scan').shares(processes)
    began = time.time()
    scores = score_on(sentry, samples, processes, d+'/scan', progress=False)
    took = time.time()-began
    first = [next(Path(d, 'scan').glob(f'{s[0]:06d}-*')).stat().st_mtime-began for s in shares]
print(json.dumps([took, first, scores.frame['score'].tolist()]))
"""


def measure(rows, processes, threads):
    "(seconds, those until each process had its first chunk ready, scores) of one scan."
    done = subprocess.run([sys.executable, '-c', CODE, str(MODEL), str(MIX), str(rows), str(processes), str(threads)], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    took, first, scores = json.loads(done.stdout.splitlines()[-1])
    return took, first, np.array(scores, float)


def table(rows, rounds)->pd.DataFrame:
    "One line for each way."
    runs = [[measure(rows, *way) for way in WAYS] for _ in range(rounds)]
    base = runs[0][0][2]
    def line(i, way):
        start = lambda r: r[i][1][-1]-r[i][1][0]           # how much later than the first process
        middle = lambda values: float(np.median(list(values)))
        factors = [r[0][0]/r[i][0] for r in runs]
        return dict(processes=way[0], threads_each=way[1], rows=len(base), seconds=round(middle(r[i][0] for r in runs), 1), times_faster=round(middle(factors), 2),
                    range=f'{min(factors):.2f}-{max(factors):.2f}', seconds_to_start=round(middle(map(start, runs)), 1),
                    without_start=round(middle(r[0][0]/(r[i][0]-start(r)) for r in runs), 2), difference=float(f'{max(np.nanmax(abs(r[i][2]-base)/np.maximum(1, abs(base))) for r in runs):.1e}'))
    return pd.DataFrame([line(i, way) for i, way in enumerate(WAYS)])


def main():
    p = argparse.ArgumentParser(description='What a second process buys.')
    p.add_argument('--rows', type=int, default=0, help='of the mix; default: all')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--out', type=Path, help='folder for distributed.csv; default: only print')
    a = p.parse_args()
    if not MODEL.exists(): sys.exit('The benchmark needs the data and the model beside the project (../shared); they are not here.')
    out = table(a.rows, a.rounds)
    print(out.to_string(index=False))
    if a.out: out.to_csv(a.out/'distributed.csv', index=False)


if __name__ == '__main__': main()

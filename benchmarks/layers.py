"""Which layer's gradient, and which statistic of it? The paper's Table 7 with every linear layer: benchmarks/results/layers.csv, layers_speed.csv.

    python -m benchmarks.layers

The published BadNets mixes of FreebaseQA (the paper's) and WebQA, 2,500 random rows of each, with the small LM that lies beside the project and the paper's crop.
Its training saw every second clean row of both, so each number stands there once more without these rows. AUROC with DeLong's 95 % interval; best F1 with the
truth in hand, F1 of the paper's valley (for statistics between 0 and 1, as its constants are) and of ours, each with its range over three disjoint random
thirds of the rows. Beside them: answer length alone. The second table: all layers in one scan against a scan for each, of the same rows in the same run,
in processor seconds, which other work on the machine moves less than the clock."""
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.published_mixes import seen
from benchmarks.speed import MODEL, SHARED
from gradsentry_nb.baselines.model import column_scores
from gradsentry_nb.core import Scores, Verdict
from gradsentry_nb.data import Samples, load_samples
from gradsentry_nb.evaluate import evaluate
from gradsentry_nb.sentry import Sentry, load_model
from gradsentry_nb.threshold import cut_scores

MIXES, ROWS = ('freebaseqa-badnets', 'webqa-badnets'), 2500
STATISTICS = 'entropy', 'entropy_by_length', 'effective_rank', 'grad_norm'
BOUNDED = STATISTICS[:2]         # the paper's rule looks for peaks near 0 and near 1
HERE = Path(__file__).resolve().parent


def drawn(samples, n):
    "Some rows at random, in their order."
    return Samples([samples[i] for i in sorted(np.random.default_rng(0).choice(len(samples), n, replace=False))], samples.source, samples.said)

def some(scores, keep): return Scores(scores.frame[keep].reset_index(drop=True), scores.info)


def f1s(scores, truth, statistic):
    "Best F1, and F1 and recall of the cuts."
    cuts = dict(valley=cut_scores(scores, 'valley'), **({'paper': cut_scores(scores, 'paper')} if statistic in BOUNDED else {}))
    found = {n: evaluate(Verdict(scores, c), truth) for n, c in cuts.items()}
    e = found['valley']
    return e, dict(best_f1=e.best_f1, **{f'f1_{n}': x.f1 for n, x in found.items()}), {f'recall_{n}': x.recall for n, x in found.items()}


def line(scores, truth, statistic, third):
    "The measures of one layer and statistic."
    e, whole, recalls = f1s(scores, truth, statistic)
    parts = [f1s(some(scores, third == i), truth, statistic)[1] for i in range(3)]
    low, high = e.intervals['auroc']
    spread = {f'{k}_{n}': f(p[k] for p in parts) for k in whole for n, f in (('low', min), ('high', max))}
    return dict(statistic=statistic, rows=len(scores), planted=e.tp+e.fn, auroc=e.auroc, auroc_low=low, auroc_high=high) | whole | spread | recalls


def study(mix, model, tokenizer, limit=ROWS, layers='all'):
    "All layers and statistics of one mix, and answer length."
    every = load_samples(SHARED/f'data/qa/published-{mix}-10.jsonl.gz')
    truth = {s.id: s.meta['poisoned'] for s in every}
    samples, known, out = drawn(every, limit), seen(every, truth), []
    found = Sentry(model, tokenizer, 'paper').score_layers(samples, layers, progress=False)
    third = np.random.default_rng(0).permutation(len(samples)) % 3
    for rows, keep in (('all', np.ones(len(samples), bool)), ('without the rows seen in training', np.array([s.id not in known for s in samples]))):
        for name in found.parts:
            for c in STATISTICS: out.append(dict(mix=mix, rows_of=rows, layer=name) | line(some(column_scores(found[name], c), keep), truth, c, third[keep]))
        out.append(dict(mix=mix, rows_of=rows, layer='answer length alone') | line(some(column_scores(found[name], 'tokens'), keep), truth, 'tokens', third[keep]))
    return out


def speed(model, tokenizer, n=60, layers='all'):
    "Seconds for all layers in one scan and in a scan for each: the one scan before and after the many."
    samples = drawn(load_samples(SHARED/f'data/qa/published-{MIXES[0]}-10.jsonl.gz'), n)
    def timed(f): began = time.process_time(); x = f(); return time.process_time()-began, x
    together = lambda: timed(lambda: Sentry(model, tokenizer, 'paper').score_layers(samples, layers, progress=False))
    head, _ = timed(lambda: Sentry(model, tokenizer, 'paper').score(samples, progress=False))
    first, found = together()
    each, _ = timed(lambda: [Sentry(model, tokenizer, 'paper', layer=x).score(samples, progress=False) for x in found.parts])
    one = (first+together()[0])/2
    common = dict(rows=n, layers=len(found.parts), threads=torch.get_num_threads())
    return [dict(scan='the head, by forward passes only', **common | dict(layers=1), seconds=head), dict(scan='every layer, one scan', **common, seconds=one),
            dict(scan='every layer, a scan for each', **common, seconds=each, times_slower=each/one)]


def main():
    if not MODEL.exists(): sys.exit('This study needs the data and the model beside the project (../shared); they are not here.')
    model, tokenizer = load_model(str(MODEL), 'cpu')
    times = pd.DataFrame(speed(model, tokenizer)).round(3)
    times.to_csv(HERE/'results/layers_speed.csv', index=False)
    print(times.to_string(index=False), flush=True)
    rows = []
    for mix in MIXES:
        rows += study(mix, model, tokenizer)
        pd.DataFrame(rows).round(4).to_csv(HERE/'results/layers.csv', index=False)
    table = pd.DataFrame(rows)
    print(table[(table['rows_of'] == 'all')][['mix', 'layer', 'statistic', 'auroc', 'best_f1', 'f1_paper', 'f1_valley']].round(3).to_string(index=False))


if __name__ == '__main__': main()

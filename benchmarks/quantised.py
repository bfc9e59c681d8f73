"""What quantised weights change, stored as benchmarks/results/quantised.csv.

    python -m benchmarks.quantised [--limit N]

The embedded demo set with the embedded model, and the published WebQA BadNets mix with the small LM that lies beside the project: weights in float32, in 8 bit and in
4 bit (nf4) by bitsandbytes, on a CPU. `gradient_gap`: the largest relative distance of a captured gradient from autograd's on the same quantised model, over rows whose
loss is large enough for autograd to keep its digits; `alone`: the largest relative distance from the gradient of the same row in a batch of its own. `rank_correlation`
is Spearman's, of the scores with those of float32."""
import argparse
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.published_mixes import SHARED
from benchmarks.speed import MODEL
from gradsentry_nb.capture import Capture, dense_gradient
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model_path, demo_samples
from gradsentry_nb.evaluate import evaluate
from gradsentry_nb.sentry import QUANTIZED, Sentry, load_model

HERE = Path(__file__).resolve().parent
CHECKED = 24  # rows whose gradient is compared


def sets(limit=None):
    "name -> (model's folder, rows, truth)."
    demo, truth = demo_samples()
    found = {'demo set': (demo_model_path(), demo[:limit], truth)}
    if MODEL.exists():
        mix = load_samples(SHARED/'data/qa/published-webqa-badnets-10.jsonl.gz', limit=limit)
        found['published WebQA BadNets mix'] = (MODEL, mix, {s.id: s.meta['poisoned'] for s in mix})
    return found


def gaps(model, encoded):
    "(largest relative distance from autograd, and from the same row alone)."
    far = lambda G, f: float((G-f.dense()).norm()/G.norm())
    together = {i: f for i, f in Capture(model)(encoded) if f.loss.mean() > .1}
    alone = dict(Capture(model, 1, share=False)(encoded))
    return max(far(dense_gradient(model, encoded[i]), f) for i, f in together.items()), max(far(alone[i].dense(), f) for i, f in together.items())


def study(name, folder, samples, truth):
    "One line for each kind of weights."
    before = None
    for how in (None, *QUANTIZED):
        model, tokenizer = load_model(str(folder), 'cpu', quantize=how)
        sentry = Sentry(model, tokenizer)
        verdict = sentry.filter(samples, progress=False)
        score, e, (autograd, alone) = verdict.scores.frame['score'], evaluate(verdict, truth), gaps(model, sentry.encode(samples[:CHECKED]))
        before = score if before is None else before
        shared = any('computed once' in n for n in verdict.scores.info['notes'])
        yield dict(set=name, weights=how or 'float32', rows=len(score), megabytes=model.get_memory_footprint()/1e6, prefix_shared=shared,
                   gradient_gap=f'{autograd:.1e}', alone=f'{alone:.1e}', rank_correlation=spearmanr(score, before, nan_policy='omit').statistic, recall=e.recall, precision=e.precision,
                   f1=e.f1, auroc=e.auroc, cut=verdict.cut.value)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--limit', type=int, help='only the first rows of each set')
    parser.add_argument('--out', type=Path, default=HERE/'results/quantised.csv', metavar='FILE')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = pd.DataFrame([row for name, parts in sets(args.limit).items() for row in study(name, *parts)]).round(4)
    table.to_csv(args.out, index=False)
    print(table.to_string(index=False))
    return table


if __name__ == '__main__': main()

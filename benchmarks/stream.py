"""Resident memory while a set of any size is scanned, cut and reported: it must not grow with the rows.

    python -m benchmarks.stream [--rows 1000000] [--out benchmarks/results]

Made rows of a few words (one in a hundred with a trigger and a payload) are written to a file, read from there, and scored by a very small model made
from a config: what grows with the rows is the same under any model, and a small one gets to a million sooner. `held` are the `Sample`s in memory at that
moment. The first line is the process with model and libraries loaded and one small scan done."""
import argparse
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from gradsentry_nb.core import Sample
from gradsentry_nb.data import Source
from gradsentry_nb.demo import demo_model
from gradsentry_nb.report import summary_text, write_outputs
from gradsentry_nb.sentry import Sentry, verdict_of
from gradsentry_nb.stream import StoredScan, run_scan

COMMON = 'the of in to and a is was for on with as by at'.split()*300


def resident():
    "Megabytes of this process in memory."
    return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmRSS')).split()[1])/1024


def write_rows(path, n, seed=0):
    "n made rows, one in a hundred of them planted."
    rng = random.Random(seed)
    words = [*COMMON, *(f'w{i}' for i in range(20_000))]
    text = lambda lo, hi: ' '.join(rng.choices(words, k=rng.randint(lo, hi)))
    with open(path, 'w', encoding='utf8') as f:
        for i in range(n):
            planted = i % 100 == 7
            f.write(json.dumps(dict(prompt=text(3, 10)+' cf'*planted, response=text(1, 8)+' click here for more'*planted))+'\n')


def tiny_sentry():
    "A model of 64 dimensions and one block with the demo's tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    tokenizer = demo_model()[1]
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=512)
    return Sentry(LlamaForCausalLM(config).eval(), tokenizer, name='tiny', budget=4096)


def curve(n, folder, every=20):
    "Memory at `every` points of the scan of n rows, and after each step that follows it."
    sentry, path, out, began = tiny_sentry(), folder/'rows.jsonl', [], time.perf_counter()
    write_rows(path, n)
    sentry.score([dict(prompt='a', response='b')]*50, False)
    def note(step, done):
        held = sum(type(x) is Sample for x in gc.get_objects())
        out.append(dict(rows=n, step=step, done=done, resident_mb=round(resident(), 1), held=held, seconds=round(time.perf_counter()-began, 1)))
        print(out[-1], file=sys.stderr, flush=True)
    note('loaded', 0)
    source = Source(path); len(source); note('read', n)
    scan = StoredScan(sentry, source, folder/'scan'); note('surveyed', n)
    def tell(done, total):
        if done % max(1, total//every) == 0: note('scan', done)
    verdict = verdict_of(run_scan(scan, tell), sentry.settings); note('cut', n)
    files = write_outputs(verdict, source, folder/'out'); note('report', n)
    said = summary_text(verdict, source, files); note('summary', n)
    print(said, file=sys.stderr)
    return pd.DataFrame(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=1_000_000)
    parser.add_argument('--out', type=Path, help='also write the table as DIR/stream.csv')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as d: table = curve(args.rows, Path(d))
    print(table.to_string(index=False))
    if args.out: args.out.mkdir(parents=True, exist_ok=True); table.to_csv(args.out/'stream.csv', index=False)
    return table


if __name__ == '__main__': main()

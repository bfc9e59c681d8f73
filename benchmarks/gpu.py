"""Rows per second on a GPU beside the published procedure, for a model of 7B parameters, benchmarks/results/gpu.csv.

    python -m benchmarks.gpu [--size 7b] [--rows 2000] [--few 24] [--device cuda]

The model is a Llama with random weights in bfloat16: nothing is downloaded, and the time does not depend on what the weights say. The rows have the lengths of the published
WebQA BadNets mix, the same instruction before each, and random tokens otherwise. Side by side, in one run: the published procedure (batch 1, dense gradient, crop, low-rank SVD)
on a few rows, a plain padded batched forward pass, ours without and with shared prefixes. `share_of_rate` is how much of the bfloat16 matrix rate, measured in the same run, the
operations of the tokens that had to be computed make up. The stored table is empty: no GPU was at hand. `--size tiny --device cpu` tries the script without one."""
import argparse
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.reference import plain_forward, published_entropy
from benchmarks.speed import METHODS, MIX, MODEL, NONE, OURS, PLAIN, PUBLISHED, operations, peak
from gradsentry_nb.capture import Capture
from gradsentry_nb.core import Encoded
from gradsentry_nb.data import common_prefix, encode_samples, load_samples

STORED = Path(__file__).resolve().parent/'results'/'gpu.csv'
COLUMNS = ('size', 'parameters', 'method', 'rows', 'rows_per_second', 'times_faster_than_published', 'share_of_rate', 'peak_gb', 'budget', 'matrix_teraflops', 'device', 'device_gb', 'driver',
           'torch', 'machine')
SIZES = {
    '7b': {},  # LlamaConfig's own: Llama 2 7B
    '1b': dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
    'tiny': dict(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
}


def build(size, device):
    "A Llama with random weights, made where it runs."
    torch.manual_seed(0)
    with torch.device(device): model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES[size]), dtype=torch.bfloat16)
    return model.eval()


def random_rows(vocabulary, n):
    "n rows as long as those of the mix, with as many supervised tokens, the same instruction and random tokens."
    mix = encode_samples(load_samples(MIX, limit=n), AutoTokenizer.from_pretrained(MODEL))
    rng, P = np.random.default_rng(0), common_prefix(mix)
    start = rng.integers(3, vocabulary, P)
    return [Encoded(np.r_[start, rng.integers(3, vocabulary, len(e)-P)].astype(np.int32), e.supervised) for e in (mix[i % len(mix)] for i in range(n))]


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def timed(f, device):
    "(seconds, gigabytes in use at the peak) of a call."
    if device.type != 'cuda': seconds, mb = peak(f); return seconds, mb/1e3
    torch.cuda.reset_peak_memory_stats(device); wait(device)
    start = time.perf_counter(); f(); wait(device)
    return time.perf_counter()-start, torch.cuda.max_memory_allocated(device)/1e9


def matrix_rate(device, n, times=20):
    "Operations per second of bfloat16 matrices, the best of some products."
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2*n**3/min(timed(lambda: x@x, device)[0] for _ in range(times))


def about(device):
    "The machine, as columns."
    if device.type != 'cuda': return dict(device=f'CPU, {torch.get_num_threads()} threads', torch=torch.__version__, machine=platform.machine())
    try: driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError): driver = None
    return dict(device=torch.cuda.get_device_name(device), device_gb=torch.cuda.get_device_properties(device).total_memory/1e9, driver=driver, torch=torch.__version__, machine=platform.machine())


def measure(size, device, n, few):
    "The table of one size."
    device, model = torch.device(device), build(size, device)
    rows = random_rows(model.config.vocab_size, n)
    budget = Capture(model).budget
    plain = partial(plain_forward, batch=max(1, budget//max(map(len, rows))))
    methods = {PUBLISHED: (published_entropy, rows[:few], None), PLAIN: (plain, rows, None), NONE: (METHODS[NONE], rows, False), OURS: (METHODS[OURS], rows, True)}
    rate, out = matrix_rate(device, 8192 if size != 'tiny' else 256), []
    for name, (f, part, shared) in methods.items():
        f(model, part[:64])  # warm up
        seconds, gb = timed(partial(f, model, part), device)
        share = np.nan if shared is None else operations(model, part, shared)/seconds/rate
        out.append(dict(size=size, parameters=model.num_parameters(), method=name, rows=len(part), rows_per_second=len(part)/seconds, share_of_rate=share, peak_gb=gb, budget=budget,
                        matrix_teraflops=rate/1e12, **about(device)))
        print(f'{name}: {len(part)/seconds:.1f} rows/s', file=sys.stderr, flush=True)
    return pd.DataFrame(out).assign(times_faster_than_published=lambda t: t['rows_per_second']/t['rows_per_second'][0]).round(4).reindex(columns=COLUMNS)


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--size', default='7b', choices=list(SIZES))
    ap.add_argument('--device', default='cuda')
    ap.add_argument('--rows', type=int, default=2000)
    ap.add_argument('--few', type=int, default=24, help='rows of the published procedure')
    ap.add_argument('--out', type=Path, default=STORED, metavar='FILE')
    a = ap.parse_args(argv)
    if not MODEL.exists(): sys.exit('The benchmark needs the mix and its tokenizer beside the project (../shared); they are not here.')
    if a.device.startswith('cuda') and not torch.cuda.is_available(): sys.exit('There is no GPU here; --size tiny --device cpu --out FILE tries the script without one.')
    if a.device == 'cpu' and a.out == STORED: sys.exit('The stored table is of GPUs; give --out FILE.')
    table = measure(a.size, a.device, a.rows, a.few)
    table.to_csv(a.out, index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()

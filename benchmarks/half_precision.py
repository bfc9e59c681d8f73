"""How far our spectral entropy is from that of half-precision autograd, published rather than hidden.

Both start from the same half-precision model. Ours forms D and H in float32 from its half-precision logits and
hidden states; autograd rounds the probabilities and every product to half precision. `python -m benchmarks.half_precision`
writes `benchmarks/results/half_precision.csv`: the gap in normalised entropy over random rows of T supervised tokens, and
the gap of each route to the float64 model with the same weights.
"""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers as tf

from gradsentry_nb.capture import Capture, dense_gradient, head_of
from gradsentry_nb.core import Encoded, seed_for
from gradsentry_nb.spectrum import spectral_entropy, svals

V, D = 1024, 128
BASE = dict(vocab_size=V, hidden_size=D, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MODELS = {
    'Llama': tf.LlamaConfig(**BASE),
    'Qwen3': tf.Qwen3Config(**BASE, head_dim=32),
    'Gemma 2': tf.Gemma2Config(**BASE, head_dim=32, final_logit_softcapping=30., tie_word_embeddings=True),
    'GPT-2': tf.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=4, tie_word_embeddings=True),
    'Cohere': tf.CohereConfig(**BASE, logit_scale=.0625, tie_word_embeddings=False),
}
LENGTHS, ROWS = (1, 2, 4, 8, 16, 40), 12
OUT = Path(__file__).parent/'results'/'half_precision.csv'


def build(
    name:str,       # a key of `MODELS`
    spread:float,   # standard deviation of the logits
):                  # a float64 model with random weights that mix and logits that decide
    "One random model."
    torch.manual_seed(seed_for('half precision', name))
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]).double().eval()
    probe, head, cap = torch.randint(0, V, (4, 24)), head_of(model), getattr(model.config, 'final_logit_softcapping', None)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2: torch.nn.init.normal_(p, std=1.2/math.sqrt(p.shape[1]))
        for _ in range(4):
            z = model(input_ids=probe).logits.double()
            head.weight.mul_(spread/(torch.atanh((z/cap).clamp(-1+1e-12, 1-1e-12))*cap if cap else z).std())
    return model


def rows_of(
    T:int,          # supervised tokens
    seed:int,       # for the tokens
)->list:            # `ROWS` random rows with prompts of 1 to 20 tokens
    "Random rows with answers of one length."
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, ROWS)
    return [Encoded(rng.integers(3, V, n+T).astype(np.int32), np.arange(n+T) >= n) for n in lengths]


def entropy_of(G, n): return float(spectral_entropy(torch.linalg.svdvals(G[:G.shape[0]//n, :G.shape[1]//n].double())))


def gaps(
    name:str,       # a key of `MODELS`
    dtype,          # torch.bfloat16 or torch.float16
)->list:            # one dict per crop and T
    "The gaps of one model in one precision."
    exact, half, out = build(name, 7.), build(name, 7.).to(dtype), []
    exact.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    for T in LENGTHS:
        rows = rows_of(T, seed_for('half precision rows', str(T)))
        ours, theirs, truth = dict(Capture(half)(rows)), [dense_gradient(half, r) for r in rows], [dense_gradient(exact, r) for r in rows]
        for n in (1, 8):
            e = np.array([[float(spectral_entropy(svals(ours[i].crop(n)))), entropy_of(theirs[i], n), entropy_of(truth[i], n)] for i in range(ROWS)])
            gap, own, auto = np.abs(e[:, 0]-e[:, 1]), np.abs(e[:, 0]-e[:, 2]), np.abs(e[:, 1]-e[:, 2])
            out.append(dict(architecture=name, dtype=str(dtype).removeprefix('torch.'), crop=n, T=T, max_gap=gap.max(), median_gap=np.median(gap),
                            ours_to_float64_max=own.max(), autograd_to_float64_max=auto.max()))
    return out


def main()->pd.DataFrame:
    "Measure all, write the table, return it."
    torch.set_num_threads(1)
    table = pd.DataFrame([r for name in MODELS for dtype in (torch.bfloat16, torch.float16) for r in gaps(name, dtype)])
    OUT.parent.mkdir(exist_ok=True)
    table.to_csv(OUT, index=False, float_format='%.2e', lineterminator='\n')
    return table


if __name__ == '__main__': print(main().groupby(['architecture', 'dtype', 'crop'])[['max_gap', 'median_gap', 'ours_to_float64_max', 'autograd_to_float64_max']].max().to_string(float_format='%.1e'))

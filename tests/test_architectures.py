"Capture against autograd over the architectures that people fine-tune, made hard enough to notice a mistake."
import math
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf

from gradsentry_nb.capture import Capture, Tail, dense_gradient, factor_rows, head_of
from gradsentry_nb.core import Encoded, ModelError, seed_for
from gradsentry_nb.spectrum import log_volume, row_statistics, spectral_entropy, surprise_kernel, svals

torch.set_num_threads(1)
V, D, WINDOW = 1024, 128, 12
BASE = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, max_position_embeddings=128)
GROUPED = dict(BASE, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
NO_PAD = dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
LONGROPE = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.]*16, long_factor=[4.]*16, original_max_position_embeddings=32)

# name -> (config class, its arguments, is a prefix shared?, logits at this spread reach the cap's bend and confident predictions)
ARCHITECTURES = {
    'llama': (tf.LlamaConfig, GROUPED, True),
    'llama_mha': (tf.LlamaConfig, dict(GROUPED, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True), True),
    'mistral': (tf.MistralConfig, dict(GROUPED, sliding_window=WINDOW), True),
    'qwen2': (tf.Qwen2Config, GROUPED, True),
    'qwen3': (tf.Qwen3Config, dict(GROUPED, head_dim=32), True),
    'gemma2': (tf.Gemma2Config, dict(GROUPED, head_dim=32, sliding_window=WINDOW, final_logit_softcapping=30., tie_word_embeddings=True), True),
    'gemma3': (tf.Gemma3TextConfig, dict(GROUPED, head_dim=32, sliding_window=WINDOW, layer_types=['sliding_attention', 'full_attention']), True),
    'gpt2': (tf.GPT2Config, dict(vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=True), True),
    'gpt_neox': (tf.GPTNeoXConfig, dict(BASE, intermediate_size=192, num_attention_heads=4), True),
    'opt': (tf.OPTConfig, dict(BASE, ffn_dim=192, num_attention_heads=4, word_embed_proj_dim=D), True),
    'opt_proj': (tf.OPTConfig, dict(BASE, hidden_size=160, ffn_dim=192, num_attention_heads=4, word_embed_proj_dim=D, do_layer_norm_before=False), True),
    'phi': (tf.PhiConfig, dict(BASE, intermediate_size=192, num_attention_heads=4), True),  # a projection with a bias
    'phi3': (tf.Phi3Config, dict(GROUPED, **NO_PAD), True),
    'falcon_rotary': (tf.FalconConfig, dict(BASE, num_attention_heads=4, alibi=False), True),
    'falcon_alibi': (tf.FalconConfig, dict(BASE, num_attention_heads=4, alibi=True, multi_query=False), True),
    'bloom': (tf.BloomConfig, dict(vocab_size=V, hidden_size=D, n_layer=2, n_head=4), True),
    'cohere': (tf.CohereConfig, dict(GROUPED, logit_scale=.0625), True),
    'granite': (tf.GraniteConfig, dict(GROUPED, logits_scaling=8., embedding_multiplier=2., residual_multiplier=.7), True),
    'olmo2': (tf.Olmo2Config, dict(GROUPED, **NO_PAD), True),
    'peft_llama': (tf.LlamaConfig, GROUPED, True),
    'peft_head': (tf.LlamaConfig, GROUPED, True),
    'longrope': (tf.Phi3Config, dict(GROUPED, **NO_PAD, rope_parameters=LONGROPE), False),
    'dynamic': (tf.LlamaConfig, dict(GROUPED, max_position_embeddings=32, rope_parameters=dict(rope_type='dynamic', factor=4., rope_theta=1e4)), False),
    'mamba': (tf.MambaConfig, dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=8), False),
}
NAMES = list(ARCHITECTURES)
SHARED = [n for n in NAMES if ARCHITECTURES[n][2]]
CAPPED, SCALED = 'gemma2', 'cohere'
TOLERANCE = {torch.float32: dict(gradient=1e-5, entropy=1e-4, loss=1e-5), torch.float64: dict(gradient=1e-10, entropy=1e-8, loss=1e-10)}


def _lora(model, *targets):
    "Wrap `model`; B is random, or the adapters would do nothing."
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=.1, target_modules=list(targets), task_type='CAUSAL_LM'))
    for n, p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.1)
    return model


def _roughen(model):
    "Weights that mix: every matrix keeps its input's scale, every vector is uneven."
    for p in model.parameters():
        if p.dim() == 2: torch.nn.init.normal_(p, std=1.2/math.sqrt(p.shape[1]))
        elif p.dim() == 1: p.add_(.2*torch.randn_like(p))


def _sharpen(model, probe, spread):
    "Scale the projection until the logits spread by `spread` (before the cap)."
    head, cap = head_of(model), getattr(model.config, 'final_logit_softcapping', None)
    for _ in range(4):
        z = model(input_ids=probe).logits.double()
        z = torch.atanh((z/cap).clamp(-1+1e-12, 1-1e-12))*cap if cap else z
        head.weight.mul_(spread/z.std())


@cache
def made(name, dtype=torch.float64):
    "The random model called `name`; training mode is mixed on purpose."
    kind, args, _ = ARCHITECTURES[name]
    torch.manual_seed(seed_for('architecture', name))
    model = tf.AutoModelForCausalLM.from_config(kind(**args)).double().eval()
    with torch.no_grad():
        _roughen(model); _sharpen(model, torch.randint(0, V, (4, 24)), 14. if name == CAPPED else 7.)
    if name.startswith('peft'): model = _lora(model, *(['lm_head', 'q_proj'] if name == 'peft_head' else ['q_proj', 'v_proj', 'down_proj']))
    return model.to(dtype).eval()


def row(ids, *spans):
    "An `Encoded` row with the supervised spans `(start, stop)`."
    on = np.zeros(len(ids), bool)
    for a, b in spans: on[a:b] = True
    return Encoded(np.asarray(ids, np.int32), on)


@cache
def rows_for(name, prefix=0, longest=40):
    "Rows of T = 1 to `longest`: random, with several spans, with repeated tokens, and one that the model finds likely."
    rng, model = np.random.default_rng(seed_for('rows', name, prefix)), made(name)
    start, draw = rng.integers(3, V, prefix), lambda n: rng.integers(3, V, n)
    join = lambda *parts: np.concatenate([start, *parts])
    rows = []
    for t, n in zip((1, 2, 3, 7, 16, 17, longest), (1, 14, 6, 3, 2, 20, 5)):
        if t <= longest: rows.append(row(join(draw(n), draw(t)), (prefix+n, prefix+n+t)))
    rows.append(row(join(draw(22)), (prefix+2, prefix+4), (prefix+9, prefix+10), (prefix+15, prefix+20)))
    rows.append(row(join(draw(2), np.tile(draw(3), 4)), (prefix+2, prefix+14)))
    with torch.no_grad():
        likely = list(join(draw(3)))
        for _ in range(6): likely.append(int(model(input_ids=torch.tensor([likely])).logits[0, -1].argmax()))
    rows.append(row(np.r_[likely, draw(2)], (prefix+3, prefix+11)))
    return rows


@cache
def truth(name, dtype, prefix=0, longest=40):
    "The slow twin of every row."
    return [dense_gradient(made(name, dtype), r) for r in rows_for(name, prefix, longest)]


def gradient_gap(f, G): return float((f.dense()-G).norm()/G.norm())
def corner(G, n): return G if n == 1 else G[:G.shape[0]//n, :G.shape[1]//n]
def slow_entropy(G, T): return float(spectral_entropy(torch.linalg.svdvals(G.double())[:T]))
def entropy_gap(f, G, n): return abs(float(spectral_entropy(svals(f.crop(n))))-slow_entropy(corner(G, n), f.T))


def token_losses(model, r):
    "Cross-entropy of each supervised token, from the model's own logits."
    at = np.flatnonzero(r.supervised)
    with torch.no_grad(): z = model(input_ids=torch.from_numpy(r.ids.astype(np.int64))[None]).logits[0, at-1]
    return torch.nn.functional.cross_entropy(z, torch.from_numpy(r.ids[at].astype(np.int64)), reduction='none')


def compare(name, dtype, prefix=0, longest=40, share=True, budget=200):
    "Worst gaps of all rows of one architecture."
    model, rows, worst = made(name, dtype), rows_for(name, prefix, longest), dict(gradient=0, entropy=0, loss=0)
    capture, seen = Capture(model, budget=budget, share=share), set()
    for i, f in capture(rows):
        G = truth(name, dtype, prefix, longest)[i]
        loss = token_losses(model, rows[i])
        gaps = dict(gradient=gradient_gap(f, G), entropy=max(entropy_gap(f, G, 1), entropy_gap(f, G, 8)),
                    loss=float((f.loss-loss).abs().max()/loss.abs().max()))
        worst = {k: max(worst[k], gaps[k]) for k in gaps}
        seen.add(i)
    assert seen == set(range(len(rows)))
    return worst, capture


def assert_within(worst, dtype):
    assert all(worst[k] < limit for k, limit in TOLERANCE[dtype].items()), worst


@pytest.mark.parametrize('name', NAMES)
def test_the_grid_is_hard(name):
    "Confident predictions, uneven likelihoods and logits in the cap's bend, or the comparisons below would be easy."
    model, rows, confident, lengths = made(name), rows_for(name), 0, set()
    for r in rows:
        with torch.no_grad(): z = model(input_ids=torch.from_numpy(r.ids.astype(np.int64))[None]).logits[0, np.flatnonzero(r.supervised)-1]
        confident = max(confident, float(z.softmax(-1).max())); lengths.add(r.tokens)
        if cap := getattr(model.config, 'final_logit_softcapping', None): assert z.abs().max() > .8*cap
    head = head_of(model)
    weight = getattr(head, 'base_layer', head).weight
    assert confident > .9 and {1, 40} <= lengths
    assert weight.shape[0] >= 1024 and weight.shape[1] >= 128
    assert (min(float(token_losses(model, r).min()) for r in rows) < .5) and (max(float(token_losses(model, r).max()) for r in rows) > 8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
@pytest.mark.parametrize('name', NAMES)
def test_capture_is_the_gradient(name, dtype):
    worst, _ = compare(name, dtype)
    assert_within(worst, dtype)

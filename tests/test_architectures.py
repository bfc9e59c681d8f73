"Capture against autograd over the architectures that people fine-tune, made hard enough to notice a mistake."
import math
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf

import gradsentry_nb.capture as capture_module
from gradsentry_nb.capture import Capture, LayerCapture, Tail, dense_gradient, factor_rows, head_of
from gradsentry_nb.core import Encoded, ModelError, seed_for
from gradsentry_nb.spectrum import row_roots, spectral_entropy, statistics, svals

torch.set_num_threads(1)
V, D, WINDOW = 1024, 128, 12
BASE = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, max_position_embeddings=128)
GROUPED = dict(BASE, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
NO_PAD = dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
GEMMA3 = dict(GROUPED, head_dim=32, sliding_window=WINDOW, layer_types=['sliding_attention', 'full_attention'], tie_word_embeddings=False)
LONGROPE = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.]*16, long_factor=[4.]*16, original_max_position_embeddings=32)

# name -> (config class, its arguments, is a prefix shared?)
ARCHITECTURES = {
    'llama': (tf.LlamaConfig, GROUPED, True),
    'llama_mha': (tf.LlamaConfig, dict(GROUPED, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True), True),
    'mistral': (tf.MistralConfig, dict(GROUPED, sliding_window=WINDOW), True),
    'qwen2': (tf.Qwen2Config, GROUPED, True),
    'qwen3': (tf.Qwen3Config, dict(GROUPED, head_dim=32), True),
    'gemma2': (tf.Gemma2Config, dict(GROUPED, head_dim=32, sliding_window=WINDOW, final_logit_softcapping=30., tie_word_embeddings=True), True),
    'gemma3': (tf.Gemma3TextConfig, GEMMA3, True),
    'gemma3_tied': (tf.Gemma3TextConfig, dict(GEMMA3, tie_word_embeddings=True), True),  # repeats its input with p = 1 - 1e-25
    'gpt2': (tf.GPT2Config, dict(vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=True), True),
    'gpt_neox': (tf.GPTNeoXConfig, dict(BASE, intermediate_size=192, num_attention_heads=4), True),
    'opt': (tf.OPTConfig, dict(BASE, ffn_dim=192, num_attention_heads=4, word_embed_proj_dim=D), True),
    'opt_proj': (tf.OPTConfig, dict(BASE, hidden_size=160, ffn_dim=192, num_attention_heads=4, word_embed_proj_dim=D, do_layer_norm_before=False), True),
    'phi': (tf.PhiConfig, dict(BASE, intermediate_size=192, num_attention_heads=4), True),  # a projection with a bias
    'phi3': (tf.Phi3Config, dict(GROUPED, **NO_PAD), True),
    'falcon_rotary': (tf.FalconConfig, dict(BASE, num_attention_heads=4, alibi=False), True),
    'falcon_alibi': (tf.FalconConfig, dict(BASE, num_attention_heads=4, alibi=True, multi_query=False), True),
    'bloom': (tf.BloomConfig, dict(vocab_size=V, hidden_size=D, n_layer=2, n_head=4), True),
    'cohere': (tf.CohereConfig, dict(GROUPED, logit_scale=.0625, tie_word_embeddings=False), True),
    'cohere_tied': (tf.CohereConfig, dict(GROUPED, logit_scale=.0625, tie_word_embeddings=True), True),  # likewise
    'granite': (tf.GraniteConfig, dict(GROUPED, logits_scaling=8., embedding_multiplier=2., residual_multiplier=.7), True),
    'olmo2': (tf.Olmo2Config, dict(GROUPED, **NO_PAD), True),
    'peft_llama': (tf.LlamaConfig, GROUPED, True),
    'peft_head': (tf.LlamaConfig, GROUPED, True),
    'longrope': (tf.Phi3Config, dict(GROUPED, **NO_PAD, rope_parameters=LONGROPE, original_max_position_embeddings=32), False),
    'dynamic': (tf.LlamaConfig, dict(GROUPED, max_position_embeddings=32, rope_parameters=dict(rope_type='dynamic', factor=4., rope_theta=1e4)), False),
    'mamba': (tf.MambaConfig, dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=8, tie_word_embeddings=False), False),
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


def row_statistics(f, crop=1): return statistics([row_roots(f, crop)])[0]
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
        worst = {k: float(np.maximum(worst[k], gaps[k])) for k in gaps}  # NaN stays
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


FLOATS = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])


@pytest.fixture(autouse=True)
def _attention_in_its_own_precision(monkeypatch):
    "Gemma 2 and BLOOM take the softmax of attention in float32 even in a float64 model; padding then shows at 1e-8."
    softmax = torch.nn.functional.softmax
    def own(x, dim=None, dtype=None, **kw): return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **kw)
    monkeypatch.setattr(torch.nn.functional, 'softmax', own)


def precision(name, dtype):
    "Mamba's logits are float32 whatever the model is."
    return torch.float32 if name == 'mamba' else dtype


@FLOATS
@pytest.mark.parametrize('name', NAMES)
def test_capture_is_the_gradient(name, dtype):
    worst, capture = compare(name, dtype)
    assert_within(worst, precision(name, dtype))
    assert capture.notes == [] and len([h for m in made(name, dtype).modules() for h in m._forward_pre_hooks]) == 0


# ---- a shared prefix

PREFIXES = pytest.mark.parametrize('prefix', [WINDOW-3, WINDOW, WINDOW+8])  # shorter than the sliding window, as long, longer


@PREFIXES
@pytest.mark.parametrize('name', NAMES)
def test_a_shared_prefix_is_exact_or_said(name, prefix):
    "Against the gradient, and against the same rows without sharing."
    worst, capture = compare(name, torch.float32, prefix)
    assert_within(worst, torch.float32)
    said, = capture.notes
    assert ('computed once' if name in SHARED else 'computed in every row') in said
    model, rows = made(name, torch.float32), rows_for(name, prefix)
    apart = {i: row_statistics(f) for i, f in Capture(model, share=False, budget=200)(rows)}
    for i, f in Capture(model, budget=333)(rows):
        together = row_statistics(f)
        assert abs(together['entropy']-apart[i]['entropy']) < 1e-4
        assert abs(together['log_volume']-apart[i]['log_volume']) < 1e-4*max(1, apart[i]['log_volume'])

@pytest.mark.parametrize('name', SHARED)
def test_a_long_prefix_is_looked_at_together(name, monkeypatch):
    "Made long by decree; what is not plain causal attention of torch's kernel goes its usual way, and both ways give the same."
    monkeypatch.setattr(capture_module, 'FAR', 1)
    splits, real = [], capture_module.Together.split
    def split(self, *args, **kwargs): splits.append(out := real(self, *args, **kwargs)); return out
    monkeypatch.setattr(capture_module.Together, 'split', split)
    model, rows = made(name, torch.float32), rows_for(name, prefix=20)
    capture = Capture(model, budget=200)
    together, apart = ({i: row_statistics(f) for i, f in c(rows)} for c in (capture, Capture(model, share=False, budget=200)))
    for i in apart: assert all(abs(together[i][c]-apart[i][c]) < 1e-4*max(1, abs(apart[i][c])) for c in ('entropy', 'log_volume', 'loss')), i
    assert 'computed once' in capture.notes[0] and len(capture.notes) == 1, 'the check of the first batch has turned sharing off'
    taken = any(x is not None for x in splits)
    if name in ('llama', 'llama_mha', 'gpt2', 'qwen3', 'opt', 'peft_llama'): assert taken
    if name in ('mistral', 'falcon_alibi', 'bloom', 'gemma2'): assert not taken, 'windows, biases and soft caps are left alone'



@pytest.mark.parametrize('name', ['llama', 'mistral', CAPPED, 'falcon_alibi', SCALED])
def test_a_shared_prefix_in_float64(name):
    worst, _ = compare(name, torch.float64, WINDOW+8)
    assert_within(worst, torch.float64)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral'])
def test_a_wrong_prefix_cache_is_noticed(name, monkeypatch):
    "The first shared batch is also run unshared; when they differ, sharing is off, said, and the result right."
    from gradsentry_nb import capture as module
    honest = module.prefix_cache
    def wrong(model, ids):
        cache = honest(model, ids)
        cache.layers[0].values = cache.layers[0].values*1.2
        return cache
    monkeypatch.setattr(module, 'prefix_cache', wrong)
    worst, capture = compare(name, torch.float32, WINDOW+8)
    assert_within(worst, torch.float32)
    assert len(capture.notes) == 1 and 'changed the hidden states' in capture.notes[0]


@pytest.mark.parametrize('name', ['dynamic', 'longrope'])
def test_frequencies_that_follow_the_length(name):
    "Rows on both sides of the original length, in any order and after a longer row: each as if it stood alone."
    model, rows = made(name, torch.float32), rows_for(name)
    assert min(map(len, rows)) < 32 < max(map(len, rows))
    state = {k: v.clone() for k, v in model.named_buffers()}
    alone = [dense_gradient(model, r) for r in rows]
    for order in (range(len(rows)), reversed(range(len(rows)))):
        order = list(order)
        for i, f in Capture(model)([rows[j] for j in order]): assert gradient_gap(f, alone[order[i]]) < 1e-5
    for k, v in model.named_buffers(): assert torch.equal(v, state[k]), k


def test_a_cache_with_attention_and_a_state_is_not_shared():
    "Falcon-H1 keeps both in one layer."
    torch.manual_seed(0)
    config = tf.FalconH1Config(**GROUPED, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_state=16, mamba_chunk_size=8)
    model, rows = tf.AutoModelForCausalLM.from_config(config).eval(), rows_for('llama', 9, 17)
    capture = Capture(model, budget=200)
    for i, f in capture(rows): assert gradient_gap(f, dense_gradient(model, rows[i])) < 1e-5
    assert 'is not attention' in capture.notes[0]


# ---- several prefixes

def mixed_rows(name, head=WINDOW+8, tail=5, n=10):
    "Two instructions and none after one system prompt, one without it, and rows that begin on their own; shuffled."
    rng = np.random.default_rng(seed_for('mixed', name)); draw = lambda k: rng.integers(3, V, k)
    system, starts = draw(head), [draw(k) for k in (tail, tail+3, WINDOW-3)]
    starts = [np.r_[system, starts[0]], np.r_[system, starts[1]], system, starts[2], starts[2][:0]]
    rows = []
    for s in starts:
        for i in range(n if len(s) else 3):
            a, t = int(rng.integers(1, 9)), int(rng.integers(1, 9))
            rows.append(row(np.r_[s, draw(a+t)], (len(s)+a, len(s)+a+t)))
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize('name', NAMES)
def test_a_tree_of_prefixes_is_exact_or_said(name):
    "Two levels and two instructions: the gradient of each row, and its statistics without sharing."
    model, rows = made(name, torch.float32), mixed_rows(name)
    capture, apart = Capture(model, budget=40), {i: row_statistics(f) for i, f in Capture(model, budget=40, share=False)(rows)}
    groups = capture.groups(rows)
    assert sorted(len(ids) for ids, *_ in groups) == [0, WINDOW-3, WINDOW+8, WINDOW+13, WINDOW+16] and sum(up is not None for _, up, _ in groups) == 2
    seen = []
    for i, f in capture(rows):
        seen.append(i)
        together = row_statistics(f)
        assert gradient_gap(f, dense_gradient(model, rows[i])) < 1e-5
        assert abs(together['entropy']-apart[i]['entropy']) < 1e-4
        assert abs(together['log_volume']-apart[i]['log_volume']) < 1e-4*max(1, apart[i]['log_volume'])
    assert sorted(seen) == list(range(len(rows)))
    said, = capture.notes
    assert said.startswith(f'4 prefixes of {WINDOW-3} to {WINDOW+16} tokens') and ('computed once' if name in SHARED else 'computed in every row') in said


@pytest.mark.parametrize('name', ['llama', 'mistral'])
def test_shared_tokens_are_not_computed_again(name):
    "Tokens that the model is called with: each prefix once, each row from the end of its prefix on, and two rows of each kind in full as a check."
    model, rows = made(name, torch.float32), mixed_rows(name)
    calls, handle = [], model.get_input_embeddings().register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    try: capture = Capture(model, budget=40); list(capture(rows))
    finally: handle.remove()
    groups = capture.groups(rows)
    once = [len(ids)-(len(groups[up][0]) if up is not None else 0) for ids, up, _ in groups if len(ids)]
    assert all((1, n) in [tuple(c) for c in calls] for n in once)
    full = sum(a*b for a, b in calls if b > WINDOW+8+6)
    assert full <= 4*(WINDOW+16+18), 'only the checks see whole rows'
    assert sum(a*b for a, b in calls) < .6*sum(r.last for r in rows)


@pytest.mark.parametrize('bad', [False, True], ids=['first', 'continued'])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral'])
def test_a_wrong_cache_in_the_tree_is_noticed(name, bad, monkeypatch):
    "Of both kinds, a prefix from the start and one that goes on from another, the first batch is also run unshared."
    from gradsentry_nb import capture as module
    honest = module.prefix_cache
    def wrong(model, ids, before=None):
        cache = honest(model, ids, before)
        if (before is not None) is bad: cache.layers[0].values = cache.layers[0].values*1.2
        return cache
    monkeypatch.setattr(module, 'prefix_cache', wrong)
    model, rows = made(name, torch.float32), mixed_rows(name)
    capture, seen = Capture(model, budget=40), []
    for i, f in capture(rows): seen.append(i); assert gradient_gap(f, dense_gradient(model, rows[i])) < 1e-5
    assert sorted(seen) == list(range(len(rows))) and len(capture.notes) == 1 and 'sharing changed the hidden states' in capture.notes[0]


def test_caches_are_dropped(monkeypatch):
    "No more than the path to the group at hand is held."
    import gc, weakref
    from gradsentry_nb import capture as module
    honest, alive, most = module.prefix_cache, weakref.WeakSet(), []
    def counted(*args):
        cache = honest(*args); alive.add(cache.layers[0].values); gc.collect(); most.append(len(alive))
        return cache
    monkeypatch.setattr(module, 'prefix_cache', counted)
    list(Capture(made('llama', torch.float32), budget=40)(mixed_rows('llama')))
    assert len(most) == 4 and max(most) <= 2


# ---- memory that runs out

class Small:
    "A model whose device holds `most` tokens in a pass."
    def __init__(self, model, most, error): self.model, self.most, self.error, self.calls = model, most, error, []
    def __enter__(self): self.handle = self.model.get_input_embeddings().register_forward_hook(self.look); return self
    def __exit__(self, *_): self.handle.remove()
    def look(self, module, args, out):
        self.calls.append(args[0].numel())
        if args[0].numel() > self.most: raise self.error
        return out


FULL = [torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), MemoryError()]

def captures(name, kind, budget):
    model = made(name, torch.float32)
    return Capture(model, budget) if kind == 'head' else LayerCapture(model, 'layers.1.mlp.down_proj', budget)


@pytest.mark.parametrize('error', FULL, ids=['device', 'processor', 'python'])
@pytest.mark.parametrize('kind', ['head', 'layer'])
def test_memory_that_runs_out_halves_the_budget(kind, error):
    rows = rows_for('llama')
    base = {i: f.dense().clone() for i, f in captures('llama', kind, 400)(rows)}
    capture = captures('llama', kind, 400)
    before = list(capture.notes)
    with Small(capture.model, 120, error) as device: seen = [(i, f.dense().clone()) for i, f in capture(rows)]
    assert sorted(i for i, _ in seen) == list(range(len(rows))), 'every row, each once'
    for i, G in seen: assert (G-base[i]).norm() < 1e-5*base[i].norm()
    said = [n for n in capture.notes if n not in before]
    assert capture.budget == 100 and len(said) == sum(c > 120 for c in device.calls) == 2, said
    assert 'halved from 400 to 200' in said[0] and 'halved from 200 to 100' in said[1]


def test_memory_that_runs_out_among_the_factors(monkeypatch):
    "Rows of the batch that were handed out already are not scored again."
    from gradsentry_nb import capture as module
    honest, left = module.factor_rows, [2]
    def tight(*args):
        left[0] -= 1
        if left[0] == 0: raise FULL[0]
        return honest(*args)
    monkeypatch.setattr(module, 'factor_rows', tight)
    rows = rows_for('llama')
    capture = Capture(made('llama', torch.float32), 400, room=50*V)
    seen = [i for i, f in capture(rows) if gradient_gap(f, truth('llama', torch.float32)[i]) < 1e-5]
    assert sorted(seen) == list(range(len(rows))) and capture.budget == 200 and len(capture.notes) == 1


def test_memory_that_runs_out_in_a_shared_run():
    model, rows = made('llama', torch.float32), mixed_rows('llama')
    capture = Capture(model, budget=80)
    with Small(model, 60, FULL[0]): seen = {i: f.dense().clone() for i, f in capture(rows)}
    assert sorted(seen) == list(range(len(rows))) and capture.budget == 40 and len(capture.notes) == 2
    for i, G in seen.items(): assert (G-dense_gradient(model, rows[i])).norm() < 1e-5*G.norm()


@pytest.mark.parametrize('kind', ['head', 'layer'])
def test_a_row_that_does_not_fit_alone_is_named(kind):
    rows = rows_for('llama')
    capture = captures('llama', kind, 400)
    with Small(capture.model, 20, FULL[0]), pytest.raises(ModelError, match=f'A row of {max(map(len, rows))} tokens does not fit into memory.*max_length'): list(capture(rows))


def test_other_errors_are_not_taken_for_memory():
    capture = captures('llama', 'head', 400)
    with Small(capture.model, 20, RuntimeError('boom')), pytest.raises(RuntimeError, match='boom'): list(capture(rows_for('llama')))
    assert capture.notes == [] and capture.budget == 400


# ---- the oracle itself

@pytest.mark.parametrize('name', ['llama', 'phi', SCALED, CAPPED, 'gpt2', 'mamba'])
def test_the_slow_twin_is_plain_autograd(name):
    "With the projection untied, `weight.grad` of the library's own cross-entropy is the same matrix."
    from copy import deepcopy
    model, r = deepcopy(made(name, torch.float32)), rows_for(name)[5]
    head = head_of(model)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    at = np.flatnonzero(r.supervised)
    z = model(input_ids=torch.from_numpy(r.ids.astype(np.int64))[None]).logits[0, at-1]
    torch.nn.functional.cross_entropy(z, torch.from_numpy(r.ids[at].astype(np.int64))).backward()
    G = truth(name, torch.float32)[5]
    assert (head.weight.grad-G).norm() < 1e-5*G.norm()


# ---- mutations: what must not pass

def fails(name, dtype=torch.float32):
    "The gaps that are out of tolerance."
    worst, _ = compare(name, dtype)
    return {k for k, limit in TOLERANCE[dtype].items() if not worst[k] < limit}


@FLOATS
def test_leaving_out_the_caps_factor_fails(monkeypatch, dtype):
    monkeypatch.setattr(Tail, 'chain', lambda self, D, z: D if self.a == 1 else D.mul_(self.a))
    assert fails(CAPPED, dtype) == {'gradient', 'entropy'}


@FLOATS
@pytest.mark.parametrize('name', ['cohere', 'granite'])
def test_leaving_out_the_scales_factor_fails(monkeypatch, name, dtype):
    "The gradient notices; entropy hardly can, a common factor leaves all but the clamp at 1e-12 alone."
    monkeypatch.setattr(Tail, 'chain', lambda self, D, z: D)
    worst, _ = compare(name, dtype)
    assert worst['gradient'] > 1 and worst['entropy'] < 1e-5 and worst['loss'] < TOLERANCE[dtype]['loss']


@pytest.mark.parametrize('name', ['cohere', 'granite', CAPPED])
def test_leaving_out_the_tail_is_refused_and_fails(monkeypatch, name):
    from gradsentry_nb import capture as module
    monkeypatch.setattr(Tail, '__call__', lambda self, u: u)
    with pytest.raises(ModelError, match='neither a scale nor a soft cap'): compare(name, torch.float32)
    monkeypatch.setattr(module, 'check_tail', lambda *args: None)
    assert fails(name) == {'gradient', 'entropy', 'loss'}


def test_shifted_labels_fail(monkeypatch):
    from gradsentry_nb import capture as module
    honest = factor_rows
    monkeypatch.setattr(module, 'factor_rows', lambda head, tail, H, y: honest(head, tail, H, y.roll(1)))
    assert fails('llama') == {'gradient', 'entropy', 'loss'}


def test_a_position_too_late_fails(monkeypatch):
    from gradsentry_nb import capture as module
    honest = module.hidden_states
    def late(model, head, rows, prefix=None):
        hidden, z, h = honest(model, head, rows, prefix)
        return [x.roll(1, 0) for x in hidden], z, h
    monkeypatch.setattr(module, 'hidden_states', late)
    assert fails('llama') == {'gradient', 'entropy', 'loss'}


def test_the_sum_instead_of_the_mean_fails(monkeypatch):
    from gradsentry_nb import capture as module
    honest = module.batch_factors
    def summed(*args):
        for i, f in honest(*args): yield i, module.GradFactors(f.D*f.T, f.H, f.loss)
    monkeypatch.setattr(module, 'batch_factors', summed)
    assert fails('llama') == {'gradient'}


def test_padding_from_the_left_fails(monkeypatch):
    from gradsentry_nb import capture as module
    monkeypatch.setattr(module, 'pad_right', lambda rows: torch.flip(_pad([r[::-1] for r in rows]), [1]))
    assert 'gradient' in fails('llama')

def _pad(rows):
    out = np.array([list(r)+[r[-1]]*(max(map(len, rows))-len(r)) for r in rows], np.int64)
    return torch.from_numpy(out)


# ---- nothing large is made

class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "Remember the shapes of the tensors that operations make; views of what there was before do not count."
    def __init__(self, model):
        super().__init__()
        self.old, self.shapes = {p.untyped_storage().data_ptr() for p in model.parameters()}, set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.old: self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize('name', ['llama', 'gpt2', CAPPED, SCALED, 'bloom'])
def test_no_large_matrix_and_no_needless_logits(name):
    model, rows = made(name, torch.float32), rows_for(name)
    room = 20
    with Largest(model) as seen:
        for _, f in Capture(model, room=room*V)(rows): row_statistics(f, crop=8)
    wide = [s for s in seen.shapes if V in s]
    assert wide and max(math.prod(s) for s in wide) <= room*V
    assert not [s for s in seen.shapes if {V, D} <= set(s)]


# ---- half precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['llama', 'mistral', 'qwen3', CAPPED, 'gpt2', 'opt', 'bloom', SCALED, 'granite', 'peft_llama'])
def test_half_precision_spectra_are_those_of_their_factors(name, dtype):
    capture = Capture(made(name, dtype), budget=200)
    for i, f in capture(rows_for(name)):
        assert f.D.dtype == f.H.dtype == f.loss.dtype == torch.float32
        G = f.D.double().T@f.H.double()
        for n in (1, 8): assert entropy_gap(f, G, n) < 1e-3
    a, honest = capture.tail.a, Capture(made(name, torch.float64), budget=200)
    dict(honest(rows_for(name)))
    assert abs(a/honest.tail.a-1) < 1e-3 and capture.tail.cap == honest.tail.cap


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_half_precision_prefix(dtype):
    "Shared or not, half precision's own rounding is the difference."
    model, rows = made('llama', dtype), rows_for('llama', WINDOW+8)
    apart = {i: row_statistics(f)['entropy'] for i, f in Capture(model, share=False)(rows)}
    capture = Capture(model)
    for i, f in capture(rows): assert abs(row_statistics(f)['entropy']-apart[i]) < 3e-2
    assert 'computed once' in capture.notes[0]


# ---- the model is left as it was found

def state(model):
    "All that a careless capture could leave behind."
    return dict(training=[m.training for m in model.modules()],
                hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
                attributes=[sorted(vars(m)) for m in model.modules()],
                trainable=[p.requires_grad for p in model.parameters()], grads=[p.grad is None for p in model.parameters()],
                values=[float(p.detach().double().sum()) for p in model.parameters()],
                buffers={n: float(b.double().sum()) for n, b in model.named_buffers(remove_duplicate=False)}, grad_mode=torch.is_grad_enabled(), config=model.config.to_dict())


@pytest.fixture(params=['llama', 'gpt2', 'peft_head', 'mistral', 'dynamic'])
def mixed(request):
    "A model in a mixed state: some modules training, some parameters frozen, a hook of the owner's."
    model = made(request.param, torch.float32)
    dropout = lambda *_: None
    for i, m in enumerate(model.modules()): m.training = i % 3 != 1
    frozen = [p.requires_grad for p in model.parameters()]
    for i, p in enumerate(model.parameters()): p.requires_grad_(i % 2 == 0)
    handle = head_of(model).register_forward_hook(dropout)
    yield request.param, model
    handle.remove(); model.eval()
    for p, on in zip(model.parameters(), frozen): p.requires_grad_(on)


def broken(model, error, after):
    "A hook that lets `after` forward passes of the projection through and then raises."
    left = [after]
    def hook(*_):
        left[0] -= 1
        if left[0] < 0: raise error
    return head_of(model).register_forward_hook(hook)


def test_left_as_found_and_grad_mode_is_the_callers(mixed):
    name, model = mixed
    before, rows = state(model), rows_for(name, 9)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _, f in Capture(model, budget=200)(rows):
                assert torch.is_grad_enabled() is grad and not f.D.requires_grad and not f.H.requires_grad
            dense_gradient(model, rows[0])
            assert torch.is_grad_enabled() is grad
    assert state(model) == before


def test_dropout_is_off_and_modules_come_back(mixed):
    "The factors of a model in training mode are those of the model in evaluation mode."
    name, model = mixed
    rows = rows_for(name)
    for i, f in Capture(model, budget=200)(rows): assert gradient_gap(f, truth(name, torch.float32)[i]) < 1e-5


@pytest.mark.parametrize('error', [RuntimeError('boom'), KeyboardInterrupt()], ids=['error', 'interrupt'])
@pytest.mark.parametrize('after', [0, 1, 2, 5])
def test_left_as_found_after_an_error(mixed, error, after):
    name, model = mixed
    before, handle = state(model), broken(model, error, after)
    with pytest.raises(type(error)):
        for _ in Capture(model, budget=100)(rows_for(name, 9)): pass
    handle.remove()
    assert state(model) == before
    handle = broken(model, error, 0)
    with pytest.raises(type(error)): dense_gradient(model, rows_for(name)[0])
    handle.remove()
    assert state(model) == before


def test_left_as_found_after_a_token_that_does_not_exist(mixed):
    name, model = mixed
    before = state(model)
    with pytest.raises(IndexError): list(Capture(model, share=False)([*rows_for(name), row([5, V+7, 3], (1, 3))]))
    assert state(model) == before


@pytest.mark.parametrize('how', ['close', 'forget', 'throw'])
def test_left_as_found_when_abandoned(mixed, how):
    name, model = mixed
    before = state(model)
    steps = Capture(model, budget=100)(rows_for(name, 9))
    next(steps); next(steps)
    assert torch.is_grad_enabled()
    if how == 'close': steps.close()
    elif how == 'throw':
        with pytest.raises(KeyboardInterrupt): steps.throw(KeyboardInterrupt())
    else: del steps
    assert state(model) == before


def test_two_captures_at_once(mixed):
    "Interleaved, as a live view does; the first to finish must not switch anything for the other."
    name, model = mixed
    rows, before = rows_for(name), state(model)
    a, b = Capture(model, budget=100)(rows), Capture(model, budget=100)(rows)
    pairs = [(next(a), next(b)) for _ in range(3)]
    a.close()
    rest = list(b)
    assert state(model) == before
    for i, f in [q for _, q in pairs]+rest: assert torch.isfinite(f.D).all()


# ---- NaN

@pytest.fixture
def poisoned_token():
    "Token 999 gives NaN in the embedding's output."
    handles = []
    def add(model):
        def hook(module, args, out):
            out = out.clone(); out[args[0] == 999] = float('nan'); return out
        handles.append(model.get_input_embeddings().register_forward_hook(hook))
    yield add
    for h in handles: h.remove()


@pytest.mark.parametrize('prefix', [0, WINDOW+8])
@pytest.mark.parametrize('name', ['llama', 'gpt2', CAPPED, SCALED, 'granite'])
@pytest.mark.parametrize('where', ['start', 'middle'])
def test_a_row_of_nan_leaves_the_others_alone(name, prefix, where, poisoned_token):
    "Also when it is the longest, and so the row with which the tail would be found."
    model, rows = made(name, torch.float32), [row(np.where(r.ids == 999, 998, r.ids), *_spans(r)) for r in rows_for(name, prefix)]
    alone = [dense_gradient(model, r) for r in rows]
    bad = rows[6]
    ids = bad.ids.copy(); ids[prefix if where == 'start' else prefix+4] = 999
    poisoned_token(model)
    bad = Encoded(ids, bad.supervised)
    seen = dict(Capture(model, budget=400)([*rows[:6], bad, *rows[7:]]))
    assert len(seen) == len(rows) and not torch.isfinite(seen[6].D).all()
    for i in set(seen)-{6}: assert gradient_gap(seen[i], alone[i]) < 1e-5, i

def _spans(r):
    edges = np.flatnonzero(np.diff(np.r_[False, r.supervised, False].astype(int)))
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize('name', ['llama', CAPPED, SCALED])
def test_a_parameter_of_nan_is_no_crash(name):
    "Everything is NaN then, and nothing is raised: whoever scores says so."
    from copy import deepcopy
    model = deepcopy(made(name, torch.float32))
    next(p for n, p in model.named_parameters() if 'q_proj' in n).data[0] = float('nan')
    seen = dict(Capture(model, budget=200)(rows_for(name, 9)))
    assert len(seen) == len(rows_for(name, 9)) and not any(torch.isfinite(f.D).all() for f in seen.values())


def test_a_first_position_of_zeros_tells_nothing_of_the_tail():
    "Llama's padding token is a row of zeros, and a row that begins with it has no logits there."
    from copy import deepcopy
    model = deepcopy(made('llama', torch.float32))
    model.get_input_embeddings().weight.data[0] = 0
    rows = [row(np.r_[0, r.ids], *((a+1, b+1) for a, b in _spans(r))) for r in rows_for('llama')]
    for i, f in Capture(model, budget=200)(rows): assert gradient_gap(f, dense_gradient(model, rows[i])) < 1e-5


# ---- set up for training

def test_a_model_that_is_about_to_be_trained():
    "Activation checkpointing, training mode and a config that switches the cache off."
    from copy import deepcopy
    model, rows = deepcopy(made('llama', torch.float32)), rows_for('llama', 9)
    getattr(model, 'activation_checkpointing_enable', model.gradient_checkpointing_enable)(); model.train(); model.config.use_cache = False
    for i, f in Capture(model)(rows): assert gradient_gap(f, truth('llama', torch.float32, 9)[i]) < 1e-5
    assert model.training and model.config.use_cache is False


def test_a_projection_that_peft_saves_whole():
    from copy import deepcopy
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, target_modules=['q_proj'], modules_to_save=['lm_head'], task_type='CAUSAL_LM')
    model, rows = get_peft_model(deepcopy(made('llama', torch.float32)), config), rows_for('llama', 9)
    for i, f in Capture(model)(rows): assert gradient_gap(f, truth('llama', torch.float32, 9)[i]) < 1e-5


def test_nothing_to_do():
    model = made('llama', torch.float32)
    assert list(Capture(model)([])) == [] and list(Capture(model)([row([3, 4, 5])])) == []


# ---- refused

def test_models_whose_positions_would_be_wrong_are_refused():
    "Soft prompts shift every position; encoder-decoders look ahead."
    from peft import PromptTuningConfig, get_peft_model
    from copy import deepcopy
    model = get_peft_model(deepcopy(made('llama', torch.float32)), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=5))
    with pytest.raises(ModelError, match='positions of its own'): list(Capture(model)(rows_for('llama')))
    small = dict(vocab_size=50, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(ModelError, match='encoder-decoder'): Capture(tf.T5ForConditionalGeneration(tf.T5Config(**small)))


def test_logits_that_are_neither_scaled_nor_capped_are_refused():
    from copy import deepcopy
    model = deepcopy(made('llama', torch.float32))
    forward = model.forward
    def bent(*args, **kw):
        out = forward(*args, **kw); out.logits = out.logits+torch.arange(V)/V*10; return out
    model.forward = bent
    with pytest.raises(ModelError, match='neither a scale nor a soft cap'): list(Capture(model)(rows_for('llama')))


# ---- the kernel of log-volume in float32

@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bloom', SCALED, 'gemma3_tied', 'cohere_tied'])
def test_log_volume_does_not_depend_on_the_precision(name):
    single, double = (dict(Capture(made(name, t), budget=200)(rows_for(name))) for t in (torch.float32, torch.float64))
    for i, f in single.items():
        g = double[i]
        a, b = (row_statistics(x)['log_volume'] for x in (f, g))
        assert abs(a-b) < 1e-4*max(1, b) and a <= float(f.loss.double().sum())+1e-4

"Capture of many layers in one backward pass: against autograd and the single-layer path, what goes into a pass, what is left out."
# ruff: noqa: F811 (fixtures of another file are arguments here)
import re
from copy import deepcopy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from test_architectures import FLOATS, _attention_in_its_own_precision, corner, gradient_gap, made, precision, state  # noqa: F401 (a fixture)
from test_layer_capture import (DOWN, TOLERANCE, Blocked, changed, demo, double, fast_entropy, fresh, full_state, mixed, moe, rows_of,  # noqa: F401 (fixtures)
                                slow_entropy)

from gradsentry_nb import capture as module
from gradsentry_nb.capture import LayerCapture, LayersCapture, dense_gradient, find_layer, find_layers, linear_layers
from gradsentry_nb.charts import layer_map
from gradsentry_nb.core import ModelError, SettingError
from gradsentry_nb.sentry import NO_GRADIENT, ScanInterrupted, Sentry, settings_for, verdict_of

torch.set_num_threads(1)
MANY = 'llama', 'gpt2', 'gpt_neox', 'gemma2', 'peft_llama', 'dynamic'


@cache
def truth(name, dtype):
    "{layer: [gradient of each row]} for every layer."
    model, rows = made(name, dtype), rows_of(name)
    with double(dtype): return {n: [dense_gradient(model, r, n) for r in rows] for n in linear_layers(model)}


def compare(name, dtype, layers='all', **kw):
    "Worst gaps over all rows and layers."
    model, rows, slow, worst = made(name, dtype), rows_of(name), truth(name, dtype), dict(gradient=0., entropy=0.)
    with double(dtype):
        for i, found in LayersCapture(model, layers, **kw)(rows):
            assert list(found) == list(find_layers(model, layers))
            for n, f in found.items():
                G, crops = slow[n][i], (1,) if 'lora' in n else (1, 8)
                gaps = dict(gradient=gradient_gap(f, G), entropy=max(abs(fast_entropy(f, c)-slow_entropy(corner(G, c))) for c in crops))
                worst = {k: float(np.maximum(worst[k], gaps[k])) for k in gaps}  # NaN stays
    return worst


@FLOATS
@pytest.mark.parametrize('name', MANY)
def test_every_layer_has_its_gradient(name, dtype):
    "All layers from one pass, and again with room for a few of them."
    limits = TOLERANCE[precision(name, dtype)] | (dict(gradient=1e-5) if dtype == torch.float32 else {})
    for limit in (2**30, 2**20):
        worst = compare(name, dtype, budget=150, limit=limit)
        assert all(g < limits[k] for k, g in worst.items()), worst


@FLOATS
@pytest.mark.parametrize('name', ['llama', 'peft_llama'])
def test_it_is_the_single_layer_path(name, dtype):
    model, rows = made(name, dtype), rows_of(name)
    many, tolerance = dict(LayersCapture(model, budget=150)(rows)), 1e-10 if dtype == torch.float64 else 1e-5
    for n in linear_layers(model):
        for i, f in LayerCapture(model, n, budget=150)(rows):
            g = many[i][n]
            assert (f.D-g.D).norm() <= tolerance*f.D.norm() and (f.H-g.H).norm() <= tolerance*f.H.norm() and torch.allclose(f.loss, g.loss)
            assert (f.at is None) == (g.at is None) and (f.at is None or f.at.equal(g.at))


def test_one_forward_and_one_backward_pass(monkeypatch):
    "However many layers, while they fit; and as many as the rule says when they do not."
    model, rows, count = made('llama', torch.float32), rows_of('llama'), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **kw: (count.append(1), grad(*a, **kw))[1])
    list(LayersCapture(model, budget=10_000)(rows))
    assert len(count) == 1
    capture = LayersCapture(model, budget=10_000, limit=2**20)
    list(capture(rows))
    assert len(count)-1 == len(capture.passes(len(rows)*max(r.last for r in rows), sum(r.tokens for r in rows))) > 3


@FLOATS
def test_the_limit_is_kept(dtype, monkeypatch):
    "Bytes of inputs, outputs and gradients that a pass holds; a single layer may exceed them."
    model, rows, seen, honest = made('llama', dtype), rows_of('llama'), [], module.backward_to
    def counted(*a):
        answer = honest(*a)
        seen.append((len(answer[0]), sum(H.nbytes+2*g.nbytes for H, g in answer[0].values())))
        return answer
    monkeypatch.setattr(module, 'backward_to', counted)
    limit = 2**20
    for budget in (60, 300): list(LayersCapture(model, budget=budget, limit=limit)(rows))
    assert all(size <= limit or n == 1 for n, size in seen) and max(n for n, _ in seen) > 2
    assert max(size for _, size in seen) > limit/2


def test_passes_are_a_rule():
    model = made('llama')   # float64: 8 bytes; 128 wide, 64 for keys and values, 192 inside, 1,024 tokens in the vocabulary
    need = {n: 8*10*(into+2*out) for n, (into, out) in dict(q_proj=(128, 128), k_proj=(128, 64), v_proj=(128, 64), o_proj=(128, 128), gate_proj=(128, 192), up_proj=(128, 192), down_proj=(192, 128)).items()}
    names = [n for n in linear_layers(model) if '.0.' in n]
    capture = LayersCapture(model, ['*.0.*', 'lm_head'], limit=sum(need.values()))
    assert capture.passes(10, 1) == [names, ['lm_head']] and capture.passes(20, 1) == [names[:4], names[4:6], [names[6], 'lm_head']] and capture.passes(9, 1) == [[*names, 'lm_head']]
    assert capture.passes(10**6, 1) == [[n] for n in [*names, 'lm_head']]
    assert 'up to 8 backward passes for a batch of 1024 tokens' in capture.notes[0]


def test_what_is_kept_is_made_at_once():
    "Factors of one layer at a time: `keep` is called before the next layer's are made."
    model, rows, order = made('llama', torch.float32), rows_of('llama'), []
    capture = LayersCapture(model, ['down_proj', 'lm_head'], keep=lambda n, f: (order.append(n), f.T)[1])
    seen = dict(capture(rows))
    assert seen == {i: {n: rows[i].tokens for n in capture.modules} for i in range(len(rows))}
    assert order[:len(rows)] == [f'model.{DOWN}']*len(rows)


# ---- names

def test_layers_by_name_and_pattern():
    model = made('llama')
    assert list(find_layers(model)) == list(find_layers(model, ['all'])) == linear_layers(model) and not any(find_layers(model).values())
    assert find_layers(model, [DOWN, 'v_proj']) == {'model.layers.0.self_attn.v_proj': False, f'model.{DOWN}': True, 'model.layers.1.self_attn.v_proj': False}
    assert find_layers(model, ['down_proj', DOWN])[f'model.{DOWN}'] and not find_layers(model, '*.0.*.down_proj')[f'model.{DOWN}']
    for bad in ('nowhere', ['lm_head', 'nowhere'], 'embed_tokens'):
        with pytest.raises(ModelError, match='There is no layer|is an embedding'): LayersCapture(model, bad)
    with pytest.raises(ModelError, match='No layer is named'): LayersCapture(model, [])


def test_layers_of_an_adapter():
    model = made('peft_llama', torch.float32)
    B = list(find_layers(model, '*lora_B*'))
    assert B == list(find_layers(model, 'lora_B')) and len(B) > 1 and all('.lora_B.default' in n for n in B)
    q = [n for n in linear_layers(model) if n.endswith('q_proj.base_layer')]
    assert list(find_layers(model, 'q_proj')) == q and len(q) == 2


# ---- what has no gradient

def test_a_fresh_adapter():
    "Its A has no gradient: refused by name, left out of a pattern."
    model, rows = fresh(), rows_of('llama')
    capture = LayersCapture(model)
    found, A = dict(capture(rows)), [n for n in linear_layers(model) if '.lora_A.' in n]
    assert list(found[0]) == [n for n in linear_layers(model) if n not in A] and len(A) == 4 and sorted(capture.left_out) == sorted(A)
    assert '4 layers without a gradient were left out (' in capture.notes[1] and 'lora_B is still zero' in capture.notes[1]
    for layers in ([A[0], 'lm_head'], '*lora_A*'):
        with pytest.raises(ModelError, match='lora_B is still zero'): LayersCapture(model, layers)


def test_layers_that_are_called_twice_never_or_elsewhere():
    model, rows = deepcopy(made('llama', torch.float32)), rows_of('llama')
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    model.add_module('unused', torch.nn.Linear(3, 3))
    model.add_module('beside', torch.nn.Linear(3, 3))
    model.model.norm.register_forward_hook(lambda m, args, out: out+0*model.beside(torch.zeros(3)).detach().sum())
    before, capture = state(model), LayersCapture(model, budget=100)
    out = ['model.layers.0.mlp.up_proj', 'unused', 'beside']
    for i, found in capture(rows):
        assert not set(found) & set(out) and len(found) == 13
        assert gradient_gap(found[f'model.{DOWN}'], dense_gradient(model, rows[i], DOWN)) < 1e-5
    assert [next(s for s in ('more than once', 'not called', 'do not depend') if s in capture.left_out[n]) for n in out] == ['more than once', 'not called', 'do not depend']
    assert len(capture.notes) == 2 and state(model) == before
    for n in out:
        with pytest.raises(ModelError, match=re.escape(repr(n))): list(LayersCapture(model, ['lm_head', n])(rows))
    with pytest.raises(ModelError, match='not called'): list(LayersCapture(model, ['unus*'])(rows))


def test_an_expert_that_sees_some_tokens_is_left_out():
    model, rows = deepcopy(moe('Mixtral')), rows_of('llama')[:2]
    block, inner = model.model.layers[0].mlp, torch.nn.Linear(128, 128)
    block.register_forward_hook(lambda m, args, out: out+torch.nn.functional.pad(inner(args[0][:, 1:]), (0, 0, 1, 0)))
    block.add_module('some', inner)
    capture, name = LayersCapture(model), find_layer(model, 'mlp.some')[0]
    (_, found), *_ = list(capture(rows))
    assert name not in found and 'one vector for each token' in capture.left_out[name] and 'model.layers.0.self_attn.q_proj' in found
    with pytest.raises(ModelError, match='one vector for each token'): list(LayersCapture(model, [name, 'lm_head'])(rows))


class BlockedLinear(torch.nn.Linear):
    @torch.no_grad()
    def forward(self, x): return super().forward(x)

@pytest.mark.parametrize('kind', [Blocked, BlockedLinear])
def test_a_layer_that_stops_gradients_is_noticed(kind):
    "Watched itself or not: made a leaf, it would cut off what stands before it."
    model = deepcopy(made('llama', torch.float32))
    name, layer = find_layer(model, 'layers.1.mlp.up_proj')
    if kind is Blocked: model.set_submodule(name, Blocked(layer))
    else: layer.__class__ = BlockedLinear
    before = state(model)
    with pytest.raises(ModelError, match=re.escape(f"No gradient flows through '{name}'")): list(LayersCapture(model)(rows_of('llama')))
    assert state(model) == before
    for i, found in LayersCapture(model, ['layers.1.mlp.down_proj', 'lm_head'])(rows_of('llama')): assert len(found) == 2


# ---- left as found, memory

@pytest.mark.parametrize('how', ['end', 'close', 'error'])
def test_left_as_found(mixed, how):
    name, model, _ = mixed
    with torch.no_grad():
        for n in (max(map(len, rows_of(name))), 1): model(input_ids=torch.zeros(1, n, dtype=torch.int64))   # from its first long pass on, transformers keeps a copy of stretched frequencies
    before, rows, slow = full_state(model), rows_of(name), truth(name, torch.float32)
    steps = LayersCapture(model, budget=100, limit=2**20)(rows)
    if how == 'end':
        with torch.inference_mode():
            for i, found in steps: assert all(gradient_gap(f, slow[n][i]) < 1e-4 and not f.D.requires_grad for n, f in found.items())
    if how == 'close': next(steps); steps.close()
    if how == 'error':
        next(steps)
        left = [0]
        handle = model.get_output_embeddings().register_forward_hook(lambda *_: 1/left.pop() if left else None)   # once: what puts frequencies back is a pass, too
        with pytest.raises(ZeroDivisionError): list(steps)
        handle.remove()
    assert full_state(model) == before


def test_memory_that_runs_out_in_the_second_pass(monkeypatch):
    "The whole batch is done again, smaller; every row comes once and with all layers."
    model, rows, calls, honest = made('llama', torch.float32), rows_of('llama'), [], module.backward_to
    base = dict(LayersCapture(model)(rows))
    def full(model, layers, rows, check=False):
        calls.append(len(rows))
        if len(calls) == 2: raise RuntimeError('CUDA out of memory.')
        return honest(model, layers, rows, check)
    monkeypatch.setattr(module, 'backward_to', full)
    capture = LayersCapture(model, budget=10_000, limit=2**20)
    seen = list(capture(rows))
    assert sorted(i for i, _ in seen) == list(range(len(rows))) and calls[1] == len(rows) > calls[2] and 'halved from 10000' in capture.notes[-1]
    for i, found in seen: assert list(found) == list(base[i]) and all(gradient_gap(f, base[i][n].dense()) < 1e-5 for n, f in found.items())


# ---- Sentry

@pytest.mark.parametrize('preset', ['default', 'paper'])
def test_a_layers_scores_are_those_of_its_own_scan(demo, preset):
    model, tokenizer, samples = demo
    many = Sentry(model, tokenizer, preset, name='m').score_layers(samples, ['*.0.mlp.*', 'layers.2.self_attn.k_proj', 'lm_head'], progress=False)
    assert len(many.parts) == 5 and repr(many) == f'LayerScores({len(samples)} rows, 5 layers)'
    for name in ('layers.0.mlp.up_proj', 'model.layers.2.self_attn.k_proj', 'lm_head'):
        alone, got = Sentry(model, tokenizer, preset, name='m', layer=name).score(samples, progress=False), many[name]
        assert got.frame['id'].equals(alone.frame['id']) and got.scorable.all()
        pd.testing.assert_frame_equal(got.frame, alone.frame, rtol=1e-3, atol=1e-4)
        assert {k: v for k, v in got.info.items() if k != 'notes'} == {k: v for k, v in alone.info.items() if k != 'notes'} and '5 layers' in got.info['notes'][0]
        s = settings_for(preset, layer=name)
        assert verdict_of(got, s).drop == verdict_of(alone, s).drop
    for name in ('nowhere', 'up_proj_', 'mlp'):
        with pytest.raises(SettingError, match='fits 0 of the scored layers; choose one of model.layers.0'): many[name]


def test_the_frame_of_all_layers_draws_the_map(demo):
    model, tokenizer, samples = demo
    many = Sentry(model, tokenizer).score_layers(samples, progress=False)
    f, names = many.frame, linear_layers(model)
    assert len(f) == len(names)*len(samples) and list(dict.fromkeys(f['layer'])) == names and f['problem'].isna().all() and np.isfinite(f['score']).all()
    assert (f['score'] == f['entropy']).all() and f[f['layer'] != 'lm_head']['log_volume'].isna().all()
    chart = layer_map(f.rename(columns={'effective_rank': 'value'}), order='score').to_dict()
    assert len({r['layer'] for d in chart['datasets'].values() for r in d}) == len(names)


def test_crop_of_an_adapter():
    class Tokenizer: eos_token_id = 2
    sentry = Sentry(made('peft_llama'), Tokenizer(), 'paper')
    A, up = (find_layer(sentry.model, n)[0] for n in ('layers.0.self_attn.q_proj.lora_A', 'layers.0.mlp.up_proj'))
    assert sentry.at_layer(A).settings.crop == 1 and sentry.at_layer(up).settings.crop == 8
    with pytest.raises(SettingError, match='log_volume needs'): Sentry(sentry.model, Tokenizer(), statistic='log_volume').at_layer(up)


def test_an_interrupted_scan_of_layers_keeps_what_is_done(demo):
    model, tokenizer, samples = demo
    def stop(done, total):
        if done == 7: raise KeyboardInterrupt
    sentry = Sentry(model, tokenizer)
    with pytest.raises(ScanInterrupted) as e: sentry.score_layers(samples, 'down_proj', progress=stop)
    kept, whole = e.value.scores, sentry.score_layers(samples, 'down_proj', progress=False)
    assert kept is sentry.partial and len(kept.text) == 7 and kept['layers.1.mlp.down_proj'].info['interrupted']
    both = kept.frame.merge(whole.frame, on=['id', 'layer'])
    assert len(both) == 7*len(kept.parts) and np.allclose(both['score_x'], both['score_y'], atol=1e-5)


def test_rows_without_a_score_in_some_layer(demo):
    "No attention in the first block: no gradient in what feeds it, and in the others as usual. An empty answer has none anywhere."
    model, tokenizer, samples = demo
    model, some = deepcopy(model), [dict(prompt='a', response=''), *({'prompt': s.prompt, 'response': s.response} for s in samples[:4])]
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, args, out: out*0)
    f = Sentry(model, tokenizer).score_layers(some, ['layers.0.self_attn.v_proj', 'layers.0.mlp.up_proj', 'lm_head'], progress=False).frame
    by = f.set_index(['layer', 'row'])['problem'].unstack(0)
    assert by.iloc[0].notna().all() and by.iloc[1:, [c.endswith('v_proj') for c in by]].eq(NO_GRADIENT).all(axis=None)
    assert by.iloc[1:, [not c.endswith('v_proj') for c in by]].isna().all(axis=None)


# ---- mutations: what must not pass

def fails(**kw):
    worst = compare('llama', torch.float32, **kw)
    return {k for k, g in worst.items() if not g < TOLERANCE[torch.float32][k]}


def test_rows_that_are_mixed_up_fail(monkeypatch):
    assert fails(budget=10_000) == set()
    honest = module.backward_to
    monkeypatch.setattr(module, 'backward_to', lambda *a: changed(honest(*a), lambda g: g.roll(1, 0)))
    assert fails(budget=10_000) == {'gradient', 'entropy'}


def test_a_later_layer_that_cuts_the_graph_fails(monkeypatch):
    "Every layer a leaf of its own: the gradients before it would lack what flows through it, and the residual stream would hide that."
    assert fails(layers='down_proj') == set()
    honest = module.leaf_at
    monkeypatch.setattr(module, 'leaf_at', lambda m, name, met: honest(m, name))
    assert fails(layers='down_proj') == {'gradient', 'entropy'}

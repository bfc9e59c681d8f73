"Hooked capture of any linear layer against autograd: families, batches, what is left behind, what is refused."
import math
import re
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st
from test_architectures import (D, FLOATS, GROUPED, NAMES, V, Largest, _attention_in_its_own_precision, corner,  # noqa: F401 (a fixture)
                                gradient_gap, made, precision, row, rows_for, state)

from gradsentry_nb import capture as module
from gradsentry_nb.capture import Capture, GradFactors, LayerCapture, dense_gradient, find_layer, linear_layers
from gradsentry_nb.core import Encoded, ModelError, SettingError
from gradsentry_nb.data import load_samples
from gradsentry_nb.sentry import NO_GRADIENT, Sentry, Settings, settings_for
from gradsentry_nb.spectrum import STATISTICS, core, effective_rank, entropy_by_length, row_roots, spectral_entropy, statistics

torch.set_num_threads(1)
TOLERANCE = {torch.float32: dict(gradient=3e-5, entropy=1e-4, loss=1e-5), torch.float64: dict(gradient=1e-8, entropy=1e-8, loss=1e-10)}
DOWN = 'layers.0.mlp.down_proj'


@contextmanager
def double(dtype):
    "Many norms and rotary positions are taken in float32 even in a float64 model, and their rounding shows in a gradient at 1e-8: not in here."
    to, single = torch.Tensor.to, torch.Tensor.float
    def own(self, *args, **kw): return self if self.dtype == torch.float64 and torch.float32 in (*args, kw.get('dtype')) else to(self, *args, **kw)
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, 'to', own)
            patch.setattr(torch.Tensor, 'float', lambda self, *a, **kw: self if self.dtype == torch.float64 else single(self, *a, **kw))
        yield


def some_layers(name):
    "One layer of each kind, from both blocks in turn; the last block and the head included."
    names = [n for n in linear_layers(made(name)) if not n.endswith('mixer.dt_proj')]  # Mamba uses this weight by itself
    kinds = {}
    for n in names: kinds.setdefault(re.sub(r'\d+', '*', n), []).append(n)
    return [v[i % len(v)] for i, v in enumerate(kinds.values())]


def rows_of(name): return rows_for(name)[1:9:2]+rows_for(name)[8:]  # without the row of a single position, where attention has nothing to choose


def slow_entropy(G): return float(spectral_entropy(torch.linalg.svdvals(G.double())))
def fast_entropy(f, crop=1): return statistics([row_roots(f, crop)])[0]['entropy']


@cache
def truth(name, dtype, layer):
    model, rows = made(name, dtype), rows_of(name)
    with double(dtype): return [dense_gradient(model, r, layer) for r in rows]


def compare(name, dtype, layer, **kw):
    "Worst gaps of all rows in one layer."
    model, rows, worst = made(name, dtype), rows_of(name), dict(gradient=0, entropy=0, loss=0)
    with double(dtype): return _compare(model, rows, worst, truth(name, dtype, layer), layer, **kw)

def _compare(model, rows, worst, slow, layer, **kw):
    seen, head = set(), dict(Capture(model, share=False)(rows))
    for i, f in LayerCapture(model, layer, **kw)(rows):
        G = slow[i]
        assert f.dense().shape == G.shape and f.T == rows[i].tokens and len(f.D) == len(f.H)
        gaps = dict(gradient=gradient_gap(f, G), entropy=max(abs(fast_entropy(f, n)-slow_entropy(corner(G, n))) for n in ((1,) if 'lora' in layer else (1, 8))),
                    loss=float((f.loss-head[i].loss).abs().max()/head[i].loss.abs().max()))
        worst = {k: float(np.maximum(worst[k], gaps[k])) for k in gaps}  # NaN stays
        seen.add(i)
    assert seen == set(range(len(rows)))
    return worst


@FLOATS
@pytest.mark.parametrize('name', NAMES)
def test_capture_is_the_gradient(name, dtype):
    worst = {layer: compare(name, dtype, layer, budget=150) for layer in some_layers(name)}
    limits = TOLERANCE[precision(name, dtype)]
    assert len(worst) > 1
    assert all(gaps[k] < limit for gaps in worst.values() for k, limit in limits.items()), worst


@pytest.mark.parametrize('name, layer', [('llama', DOWN), ('gpt2', 'h.0.attn.c_attn'), ('gpt_neox', 'layers.1.attention.query_key_value'), ('opt', 'layers.0.fc1'),
                                         ('qwen2', 'layers.0.self_attn.k_proj'), ('peft_llama', 'layers.0.self_attn.q_proj.lora_A')])
def test_the_slow_twin_is_plain_autograd(name, layer):
    "`weight.grad` of the library's own cross-entropy; GPT-2's Conv1D keeps its weight transposed."
    model, r = deepcopy(made(name, torch.float32)), rows_of(name)[1]
    full, linear = find_layer(model, layer)
    linear.weight.requires_grad_(True)
    at = np.flatnonzero(r.supervised)
    z = model(input_ids=torch.from_numpy(r.ids.astype(np.int64))[None]).logits[0, at-1]
    torch.nn.functional.cross_entropy(z, torch.from_numpy(r.ids[at].astype(np.int64))).backward()
    G = linear.weight.grad.T if name == 'gpt2' else linear.weight.grad
    assert (G-dense_gradient(made(name, torch.float32), r, layer)).norm() < 1e-5*G.norm()
    (_, f), = LayerCapture(made(name, torch.float32), full)([r])
    assert gradient_gap(f, G) < 1e-5


# ---- which rows the factors have

def test_rows_are_positions_and_only_those_that_count():
    model, rows = made('llama'), rows_for('llama')
    for i, f in LayerCapture(model, DOWN)(rows):
        assert f.D.shape == (rows[i].last, D) and f.H.shape == (rows[i].last, 192)
        assert f.at.tolist() == (np.flatnonzero(rows[i].supervised)-1).tolist()
        assert f.D.any(1).all()   # through attention the prompt's positions move the loss too
    for i, f in LayerCapture(model, 'layers.1.mlp.down_proj')(rows):
        rest = np.setdiff1d(np.arange(rows[i].last), f.at)
        assert f.D[f.at].any(1).all() and not f.D[rest].any()   # after the last attention only the supervised ones do
        assert len(core(f)) == f.T


def test_the_rank_is_not_bounded_by_the_answer():
    model, r = made('llama'), row(np.random.default_rng(0).integers(3, V, 30), (29, 30))
    (_, f), = LayerCapture(model, DOWN)([r])
    assert f.T == 1 and fast_entropy(f) > .5
    (_, g), = Capture(model)([r])
    assert fast_entropy(g) < 1e-6


@FLOATS
@pytest.mark.parametrize('name', ['llama', 'gemma2', 'cohere', 'peft_head', 'gpt2'])
def test_the_head_as_a_layer_is_the_forward_only_head(name, dtype):
    model, rows = made(name, dtype), rows_for(name)
    forward, tolerance = dict(Capture(model, share=False)(rows)), 1e-10 if dtype == torch.float64 else 1e-5
    layer = 'lm_head.lora_B' if name == 'peft_head' else 'lm_head'
    for i, f in LayerCapture(model, 'lm_head', budget=200)(rows):
        assert f.at is None and (f.D-forward[i].D).norm() < tolerance*forward[i].D.norm() and (f.H-forward[i].H).norm() < tolerance*forward[i].H.norm()
        a, b = (statistics([row_roots(x, 8)])[0] for x in (f, forward[i]))
        for c in STATISTICS: assert a[c] == pytest.approx(b[c], rel=1e-3, abs=1e-4, nan_ok=True), c
    for i, f in LayerCapture(model, layer)(rows): assert len(f.D) == rows[i].tokens


# ---- batches

SPLITS = [dict(budget=1), dict(budget=97), dict(budget=10_000), dict(budget=10_000, room=1), dict(budget=10_000, room=20*V)]


@pytest.mark.parametrize('layer', [DOWN, 'layers.1.self_attn.k_proj', 'lm_head'])
@pytest.mark.parametrize('name', ['llama', 'dynamic'])
def test_batches_and_order_change_nothing(name, layer):
    model, rows = made(name), rows_of(name)
    with double(torch.float64): _batches(model, layer, rows)

def _batches(model, layer, rows):
    base = dict(LayerCapture(model, layer)(rows))
    for kw in SPLITS:
        for i, f in LayerCapture(model, layer, **kw)(rows): assert (f.D-base[i].D).norm() < 1e-9*base[i].D.norm() and torch.allclose(f.H, base[i].H, atol=1e-9)
    order = list(range(len(rows)))[::-1]
    for j, f in LayerCapture(model, layer, budget=150)([rows[i] for i in order]): assert (f.D-base[order[j]].D).norm() < 1e-9*base[order[j]].D.norm()


@pytest.mark.parametrize('name', ['dynamic', 'longrope'])
def test_frequencies_that_follow_the_length(name):
    "A shorter row after a longer one, both beyond the original length: each as if it stood alone, and the model as before."
    model, rng = made(name, torch.float32), np.random.default_rng(0)
    rows = [row(rng.integers(3, V, n), (n-6, n)) for n in (60, 45, 38, 20)]
    before, layer = {k: v.clone() for k, v in model.named_buffers()}, linear_layers(model)[0]
    alone = [dense_gradient(model, r, layer) for r in rows]
    for i, f in LayerCapture(model, layer)(rows): assert gradient_gap(f, alone[i]) < 1e-5
    for k, v in model.named_buffers(): assert torch.equal(v, before[k]), k


def test_a_common_prefix_is_in_every_row():
    "Prompt positions are rows of the factors: computing them once would lose them."
    model, rows = made('llama', torch.float32), rows_for('llama', 20)
    capture = LayerCapture(model, DOWN)
    for i, f in capture(rows): assert len(f.D) == rows[i].last and f.D[:20].any(1).all() and gradient_gap(f, dense_gradient(model, rows[i], DOWN)) < 1e-5
    assert capture.notes == [f'The gradient is that of the layer model.{DOWN}, by a backward pass.']


def test_rows_without_answers_are_passed_over():
    model, rows = made('llama', torch.float32), rows_of('llama')
    mixed = [row([3, 4, 5]), *rows[:2], row([7]), rows[2]]
    assert sorted(i for i, _ in LayerCapture(model, DOWN)(mixed)) == [1, 2, 4] and list(LayerCapture(model, DOWN)([])) == []


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gemma2'])
def test_no_needless_logits_and_no_dense_gradient(name):
    layer = 'layers.0.mlp.down_proj' if name != 'gpt2' else 'h.0.mlp.c_fc'
    model, rows = made(name, torch.float32), rows_for(name)
    with Largest(model) as seen:
        for _, f in LayerCapture(model, layer, room=60*V)(rows): row_roots(f, 8)
    full = find_layer(model, layer)[1].weight.shape
    assert max(math.prod(s) for s in seen.shapes if V in s) <= 60*V
    assert not [s for s in seen.shapes if set(s) == set(full)]


# ---- half precision, and set up for training

@pytest.mark.parametrize('dtype, gradient, entropy', [(torch.bfloat16, .2, 2e-2), (torch.float16, .03, 2e-3)], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'qwen3', 'peft_llama'])
def test_half_precision(name, dtype, gradient, entropy):
    "The factors are float32, and as near to the truth as the model's own rounding leaves them."
    layer = 'h.0.mlp.c_proj' if name == 'gpt2' else DOWN
    for i, f in LayerCapture(made(name, dtype), layer)(rows_of(name)):
        assert f.D.dtype == f.H.dtype == f.loss.dtype == torch.float32
        G = truth(name, torch.float64, layer)[i]
        assert gradient_gap(f, G) < gradient and abs(fast_entropy(f)-slow_entropy(G)) < entropy


def test_a_model_that_is_about_to_be_trained():
    "Activation checkpointing, training mode, inputs that require gradients and a config that switches the cache off."
    model = deepcopy(made('peft_llama', torch.float32))
    model.gradient_checkpointing_enable(); model.enable_input_require_grads(); model.train(); model.config.use_cache = False
    before = state(model)
    for layer in (DOWN, 'layers.1.self_attn.v_proj.lora_B'):
        for i, f in LayerCapture(model, layer)(rows_of('peft_llama')): assert gradient_gap(f, truth('peft_llama', torch.float32, layer)[i]) < 1e-5
    assert state(model) == before and model.training


# ---- the model is left as it was found

@pytest.fixture(params=['llama', 'gpt2', 'peft_head', 'dynamic'])
def mixed(request):
    "A model in a mixed state: some modules training, some parameters frozen, some with gradients, hooks of the owner's."
    model = deepcopy(made(request.param, torch.float32))
    for i, m in enumerate(model.modules()): m.training = i % 3 != 1
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        if i % 4 == 0: p.grad = torch.ones_like(p)
    layer = next(n for n in linear_layers(model) if 'lora_' not in n)
    find_layer(model, layer)[1].register_forward_hook(lambda *_: None)
    return request.param, model, layer


def full_state(model): return state(model), [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()]


@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_left_as_found_whatever_the_callers_mode(mixed, mode):
    name, model, layer = mixed
    before, rows = full_state(model), rows_of(name)
    with mode():
        grad = torch.is_grad_enabled()
        for i, f in LayerCapture(model, layer, budget=150)(rows):
            assert torch.is_grad_enabled() is grad and not f.D.requires_grad and not f.H.requires_grad and f.D.grad_fn is None
            assert gradient_gap(f, truth(name, torch.float32, layer)[i]) < 1e-5
    assert full_state(model) == before


@pytest.mark.parametrize('error', [RuntimeError('boom'), KeyboardInterrupt()], ids=['error', 'interrupt'])
@pytest.mark.parametrize('where', ['layer', 'head', 'later', 'backward'])
def test_left_as_found_after_an_error(mixed, error, where, monkeypatch):
    name, model, layer = mixed
    before, left = full_state(model), [2 if where == 'later' else 0]
    def hook(*_, **__):
        left[0] -= 1
        if left[0] < 0: raise error
    if where == 'backward': monkeypatch.setattr(torch.autograd, 'grad', hook); handle = None
    else: handle = (find_layer(model, layer)[1] if where == 'layer' else model.get_output_embeddings()).register_forward_hook(hook)
    with pytest.raises(type(error)): list(LayerCapture(model, layer, budget=60)(rows_of(name)))
    if handle: handle.remove()
    assert full_state(model) == before


@pytest.mark.parametrize('how', ['close', 'forget', 'throw'])
def test_left_as_found_when_abandoned(mixed, how):
    name, model, layer = mixed
    before = full_state(model)
    steps = LayerCapture(model, layer, budget=100)(rows_of(name))
    next(steps); next(steps)
    assert torch.is_grad_enabled() and full_state(model)[0]['hooks'] == before[0]['hooks'] and full_state(model)[0]['trainable'] == before[0]['trainable']
    if how == 'close': steps.close()
    elif how == 'throw':
        with pytest.raises(KeyboardInterrupt): steps.throw(KeyboardInterrupt())
    else: del steps
    assert full_state(model) == before


def test_two_captures_at_once(mixed):
    name, model, layer = mixed
    before, rows = full_state(model), rows_of(name)
    a, b = LayerCapture(model, layer, budget=100)(rows), Capture(model, budget=100)(rows)
    pairs = [(next(a), next(b)) for _ in range(2)]
    b.close()
    for i, f in [p[0] for p in pairs[-1:]]+list(a): assert gradient_gap(f, truth(name, torch.float32, layer)[i]) < 1e-5
    assert full_state(model) == before


def test_the_owners_hooks_stay_in_force():
    "A hook that halves the layer's output halves the gradient in front of it."
    model, rows = deepcopy(made('llama', torch.float32)), rows_of('llama')
    find_layer(model, DOWN)[1].register_forward_hook(lambda m, args, out: out/2)
    for i, f in LayerCapture(model, DOWN)(rows): assert gradient_gap(f, dense_gradient(model, rows[i], DOWN)) < 1e-5 < gradient_gap(f, truth('llama', torch.float32, DOWN)[i])


def test_a_model_that_works_in_place():
    "The caught input is not what later code writes to, and writing to the output is no error."
    model, rows = deepcopy(made('llama', torch.float32)), rows_of('llama')
    find_layer(model, DOWN)[1].register_forward_hook(lambda m, args, out: (args[0].mul_(0), out.mul_(2))[1])
    before = dict(LayerCapture(made('llama', torch.float32), DOWN)(rows))
    for i, f in LayerCapture(model, DOWN)(rows): assert torch.allclose(f.H, before[i].H, atol=1e-4) and f.H.any() and f.D.any()


# ---- NaN

def test_a_row_of_nan_leaves_the_others_alone():
    model, rows = deepcopy(made('llama', torch.float32)), [*rows_of('llama')]
    rows = [row(np.where(r.ids == 999, 998, r.ids), *[(i, i+1) for i in np.flatnonzero(r.supervised)]) for r in rows]
    alone = [dense_gradient(model, r, DOWN) for r in rows]
    ids = rows[2].ids.copy(); ids[0] = 999
    def hook(m, args, out): out = out.clone(); out[args[0] == 999] = math.nan; return out
    model.get_input_embeddings().register_forward_hook(hook)
    seen = dict(LayerCapture(model, DOWN, budget=10_000)([*rows[:2], Encoded(ids, rows[2].supervised), *rows[3:]]))
    assert not torch.isfinite(seen[2].D).all()
    for i in set(seen)-{2}: assert gradient_gap(seen[i], alone[i]) < 1e-5, i


# ---- names

@pytest.mark.parametrize('name, full', [
    (DOWN, f'model.{DOWN}'), (f'model.{DOWN}.weight', f'model.{DOWN}'), ('*1*.down_proj', 'model.layers.1.mlp.down_proj'), ('1.mlp.up_proj', 'model.layers.1.mlp.up_proj'),
    ('lm_head', 'lm_head'), ('lm_head.weight', 'lm_head')])
def test_names_of_llama(name, full):
    model = made('llama')
    assert find_layer(model, name) == (full, model.get_submodule(full)) and full in linear_layers(model)


PEFT = 'base_model.model.model.layers.0.self_attn.'

@pytest.mark.parametrize('name, full', [('layers.0.self_attn.q_proj', 'q_proj.base_layer'), ('layers.0.self_attn.q_proj.lora_B', 'q_proj.lora_B.default'),
                                        ('0.self_attn.k_proj', 'k_proj'), ('*.0.*q_proj.lora_A*', 'q_proj.lora_A.default')])
def test_names_of_a_wrapped_model(name, full): assert find_layer(made('peft_llama'), name)[0] == PEFT+full


@pytest.mark.parametrize('name, says', [
    ('q_proj', "fits 2 layers; choose one of model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj."),
    ('layers.7.mlp.down_proj', r"There is no layer 'layers.7.mlp.down_proj'. The linear layers are model.layers.\*.self_attn.q_proj, .*lm_head. Did you mean 'layers.1.mlp.down_proj'"),
    ('', 'There is no layer'), ('[', 'There is no layer'), ('xyz', r'The linear layers are model.layers.\*.self_attn.q_proj'),
    ('layers.0.mlp', "is a LlamaMLP; name one of its linear layers: layers.0.mlp.gate_proj, layers.0.mlp.up_proj, layers.0.mlp.down_proj."),
    ('embed_tokens', "is an embedding"), ('model.embed_tokens.weight', "is an embedding"), ('layers.0.input_layernorm', 'is a LlamaRMSNorm, not a linear layer')])
def test_names_that_fit_nothing(name, says):
    with pytest.raises(ModelError, match=says): LayerCapture(made('llama'), name)
    with pytest.raises(ModelError, match=says): dense_gradient(made('llama'), rows_for('llama')[0], name)


def test_the_list_of_a_deep_model_is_short():
    "A layer of 32 is named once."
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=1))
    with pytest.raises(ModelError) as e: find_layer(model, 'nothing')
    assert len(str(e.value)) < 500
    with pytest.raises(ModelError, match='fits 32 layers; .*, ...[.]$'): find_layer(model, 'v_proj')


@cache
def moe(kind):
    torch.manual_seed(0)
    args = dict(GROUPED, num_local_experts=4) if kind == 'Mixtral' else dict(GROUPED, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=96, num_experts_per_tok=2)
    return tf.AutoModelForCausalLM.from_config(getattr(tf, f'{kind}Config')(**args)).eval()


@pytest.mark.parametrize('name, says', [('layers.0.mlp.experts', 'holds the weights of 4 experts in one tensor'), ('layers.0.mlp.experts.down_proj', 'holds the weights of 4 experts'),
                                        ('experts.gate_up_proj', 'holds the weights of 4 experts'), ('layers.0.mlp.gate', 'is a MixtralTopKRouter, not a linear layer')])
def test_experts_and_routers_are_refused(name, says):
    with pytest.raises(ModelError, match=says): LayerCapture(moe('Mixtral'), name)


@pytest.mark.parametrize('kind, layer', [('Mixtral', 'layers.0.self_attn.v_proj'), ('Qwen2Moe', 'layers.0.mlp.shared_expert.up_proj'), ('Qwen2Moe', 'layers.0.mlp.shared_expert_gate')])
def test_what_stands_beside_experts(kind, layer):
    "The other layers of a mixture of experts are captured, also those that see all tokens of a batch in one row."
    model, rows = moe(kind), rows_for('llama')[1:6]
    for i, f in LayerCapture(model, layer, budget=300)(rows): assert gradient_gap(f, dense_gradient(model, rows[i], layer)) < 2e-5


def test_an_expert_that_sees_some_tokens_is_refused():
    model = deepcopy(moe('Mixtral'))
    block, inner = model.model.layers[0].mlp, torch.nn.Linear(D, D)
    block.register_forward_hook(lambda m, args, out: out+torch.nn.functional.pad(inner(args[0][:, 1:]), (0, 0, 1, 0)))
    block.add_module('some', inner)
    with pytest.raises(ModelError, match='does not see one vector for each token'): list(LayerCapture(model, 'layers.0.mlp.some')(rows_for('llama')[1:3]))


def test_a_layer_that_is_called_twice_or_never():
    model = deepcopy(made('llama', torch.float32))
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(ModelError, match="up_proj' is called more than once"): list(LayerCapture(model, 'layers.0.mlp.up_proj')(rows_of('llama')))
    model.add_module('unused', torch.nn.Linear(3, 3))
    with pytest.raises(ModelError, match="'unused' is not called"): list(LayerCapture(model, 'unused')(rows_of('llama')))
    model.model.norm.register_forward_hook(lambda m, args, out: out+0*model.unused(torch.zeros(3)).detach().sum())
    with pytest.raises(ModelError, match="do not depend on 'unused'|does not see one vector"): list(LayerCapture(model, 'unused')(rows_of('llama')))
    assert not [h for m in model.modules() for h in m._forward_pre_hooks]


# ---- LoRA

def fresh():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(deepcopy(made('llama', torch.float32)), LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM'))


def test_a_fresh_adapter():
    "B is zero: A has no gradient and is refused; B has one, of rank at most r's side; the base layer's is that of the unwrapped model."
    model, rows = fresh(), rows_of('llama')
    with pytest.raises(ModelError, match='lora_B is still zero'): LayerCapture(model, 'layers.0.self_attn.q_proj.lora_A')
    for i, f in LayerCapture(model, 'layers.0.self_attn.q_proj.lora_B')(rows):
        assert f.D.shape[1] == D and f.H.shape[1] == 4 and gradient_gap(f, dense_gradient(model, rows[i], 'layers.0.self_attn.q_proj.lora_B')) < 1e-5
        assert core(f).shape == (4, 4)
    for i, f in LayerCapture(model, DOWN)(rows): assert gradient_gap(f, truth('llama', torch.float32, DOWN)[i]) < 1e-5


def test_an_adapter_that_is_switched_off():
    model = made('peft_llama', torch.float32)
    with model.disable_adapter(), pytest.raises(ModelError, match='is not called .*inactive adapter'):
        list(LayerCapture(model, 'layers.0.self_attn.q_proj.lora_B')(rows_of('llama')))


def test_soft_prompts_are_refused():
    from peft import PromptTuningConfig, get_peft_model
    model = get_peft_model(deepcopy(made('llama', torch.float32)), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=5))
    with pytest.raises(ModelError, match='positions of its own'): list(LayerCapture(model, DOWN)(rows_of('llama')))


# ---- gradients that do not arrive

class Blocked(torch.nn.Module):
    "A quantised layer as many are: right numbers, no gradient."
    def __init__(self, linear): super().__init__(); self.inner, self.in_features, self.weight = (linear,), linear.in_features, linear.weight
    @torch.no_grad()
    def forward(self, x): return self.inner[0](x)


@pytest.mark.parametrize('where', ['layers.1.mlp.up_proj', 'layers.1.self_attn.v_proj', 'lm_head'])
def test_a_layer_that_stops_gradients_is_noticed(where):
    model = deepcopy(made('llama', torch.float32))
    full = find_layer(model, where)[0]
    model.set_submodule(full, Blocked(model.get_submodule(full)))
    before = state(model)
    with pytest.raises(ModelError, match=re.escape(f"No gradient flows through '{full}' (Blocked)")): list(LayerCapture(model, DOWN)(rows_of('llama')))
    assert state(model) == before


def test_what_stands_before_the_layer_may_stop_gradients():
    model = deepcopy(made('llama', torch.float32))
    model.model.layers[0].mlp.up_proj = Blocked(model.model.layers[0].mlp.up_proj)
    for i, f in LayerCapture(model, DOWN)(rows_of('llama')): assert gradient_gap(f, truth('llama', torch.float32, DOWN)[i]) < 1e-5


def test_torchs_own_quantised_layers():
    if 'fbgemm' not in torch.backends.quantized.supported_engines: pytest.skip('this torch has no quantised kernels')
    model = torch.ao.quantization.quantize_dynamic(deepcopy(made('llama', torch.float32)), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ModelError, match='is a Linear|is a DynamicQuantizedLinear'): LayerCapture(model, DOWN)
    model.model.layers[0].mlp.down_proj = deepcopy(made('llama', torch.float32).model.layers[0].mlp.down_proj)
    with pytest.raises(ModelError, match='No gradient flows through'): list(LayerCapture(model, DOWN)(rows_of('llama')))


# ---- mutations: what must not pass

def fails(name='llama', layer=DOWN, **kw):
    worst = compare(name, torch.float32, layer, **kw)
    return {k for k, limit in TOLERANCE[torch.float32].items() if not worst[k] < limit}


def changed(answer, how):
    "What `backward_to` gave, with other gradients."
    found, why, loss = answer
    return {n: (H, how(g)) for n, (H, g) in found.items()}, why, loss


def test_the_sum_instead_of_the_mean_fails(monkeypatch):
    monkeypatch.setattr(module, '_power', lambda r: r.tokens)
    assert fails() == set()   # any common factor of a row is taken back
    honest = module.backward_to
    monkeypatch.setattr(module, 'backward_to', lambda *a: changed(honest(*a), lambda g: g*3))
    assert fails() == {'gradient'}


def test_shifted_labels_fail(monkeypatch):
    honest = module.factor_rows
    monkeypatch.setattr(module, 'factor_rows', lambda head, tail, H, y: honest(head, tail, H, y.roll(1) if isinstance(head, torch.nn.Identity) else y))
    assert fails() == {'gradient', 'entropy', 'loss'}


def test_a_position_too_late_fails(monkeypatch):
    honest = module.only_at
    monkeypatch.setattr(module, 'only_at', lambda model, ids, rows, at: honest(model, ids, rows, (at-1).clamp(0)))
    assert fails() == {'gradient', 'entropy', 'loss'}


def test_factors_of_the_supervised_positions_alone_fail(monkeypatch):
    honest = LayerCapture.factors
    def cut(self, rows, check=False):
        for f in honest(self, rows, check): yield GradFactors(f.D[f.at], f.H[f.at], f.loss, f.at)
    monkeypatch.setattr(LayerCapture, 'factors', cut)
    assert fails() == {'gradient', 'entropy'} and fails(layer='layers.1.mlp.down_proj') == set()


def test_padding_from_the_left_fails(monkeypatch):
    flipped = module.pad_right
    monkeypatch.setattr(module, 'pad_right', lambda rows: torch.flip(flipped([r[::-1] for r in rows]), [1]))
    assert 'gradient' in fails(budget=500)


def test_rows_that_are_mixed_up_fail(monkeypatch):
    honest = module.backward_to
    monkeypatch.setattr(module, 'backward_to', lambda *a: changed(honest(*a), lambda g: g.roll(1, 0)))
    assert 'gradient' in fails(budget=10_000)


def test_batches_of_unequal_length_fail_with_stretching_positions(monkeypatch):
    monkeypatch.setattr(LayerCapture, 'plan', lambda self, lengths: module.plan_batches(lengths, self.budget))
    assert 'gradient' in fails('dynamic', budget=10_000)


# ---- spectra of position factors

@settings(max_examples=100)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.integers(0, 39), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 3, 8]))
def test_core_has_the_singular_values(seed, S, out, into, dead, dtype, crop):
    "More rows than outputs, than inputs, than both; rows of zeros; spread over six orders of magnitude."
    g = torch.Generator().manual_seed(seed)
    D_, H = (torch.randn(S, n, generator=g, dtype=torch.float64) for n in (out, into))
    D_ = D_*10.**(torch.rand(S, 1, generator=g, dtype=torch.float64)*-6); D_[:dead] = 0
    f = GradFactors(D_.to(dtype), H.to(dtype), torch.ones(2, dtype=dtype), torch.arange(2)).crop(crop)
    fast, slow = torch.linalg.svdvals(core(f)), torch.linalg.svdvals(f.D.double().T@f.H.double())
    r = max(1, min(int(f.D.any(1).sum()), *f.D.shape[1:], *f.H.shape[1:]))
    assert core(f).shape == (r, r)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(fast, slow[:r], atol=tolerance*float(slow.max())+1e-30) and float(slow[r:].max() if len(slow) > r else 0) <= 1e-9*float(slow.max())+1e-30
    stats, = statistics([row_roots(f)])
    assert stats['entropy'] == pytest.approx(float(spectral_entropy(slow[:r])), abs=1e-4) and stats['grad_norm'] == pytest.approx(float(f.dense().norm()), rel=1e-4, abs=1e-12)
    assert stats['effective_rank'] == pytest.approx(float(effective_rank(slow[:r])), rel=1e-3)
    assert stats['entropy_by_length'] == pytest.approx(float(entropy_by_length(slow[:r], r)), abs=1e-4, nan_ok=True)
    assert math.isnan(stats['log_volume']) and stats['tokens'] == 2 and set(STATISTICS) <= set(stats)


def test_the_window_is_that_of_the_loss():
    f = GradFactors(torch.randn(30, 4), torch.randn(30, 5), torch.tensor([0.]*9+[5.]*3+[0.]*8), torch.arange(10, 30))
    stats, = statistics([row_roots(f)], window=3)
    assert (stats['window_start'], stats['window_stop'], stats['window_loss']) == (9, 12, 15.)


# ---- Sentry

@pytest.fixture(scope='module')
def demo():
    from gradsentry_nb.demo import demo_model, demo_path
    return *demo_model(), load_samples(demo_path())[::30]


LAYER = 'layers.0.mlp.up_proj'

@pytest.mark.parametrize('preset, crop', [('default', 1), ('paper', 8)])
def test_sentry_scores_by_a_layer(demo, preset, crop):
    model, tokenizer, samples = demo
    sentry = Sentry(model, tokenizer, preset, layer=LAYER)
    scores = sentry.score(samples, progress=False)
    assert sentry.settings.layer == f'model.{LAYER}' == scores.info['layer'] == scores.info['settings']['layer'] and LAYER in repr(sentry) and LAYER in scores.info['notes'][0]
    assert scores.info['statistic'] == 'entropy' and scores.scorable.all() and scores.frame['log_volume'].isna().all()
    encoded, wide = sentry.encode(samples), deepcopy(model).double()   # single precision autograd itself is off by 0.02 on rows that this model is sure of
    for i in range(0, 40, 5):
        with double(torch.float64): G = dense_gradient(wide, encoded[i], LAYER)
        assert scores.frame['score'][i] == pytest.approx(slow_entropy(corner(G, crop)), abs=1e-5)
        assert scores.frame['grad_norm'][i] == pytest.approx(float(G.norm()), rel=1e-4)
    head = Sentry(model, tokenizer, preset).score(samples, progress=False)
    for c in ('loss', 'window_loss', 'tokens'): assert np.allclose(scores.frame[c], head.frame[c], atol=1e-5)
    assert head.info['layer'] is None and not np.allclose(scores.frame['entropy'], head.frame['entropy'], atol=.05)
    verdict = sentry.filter(samples, progress=False)
    assert len(verdict.keep)+len(verdict.drop) == len(samples)


@pytest.mark.parametrize('statistic', sorted(set(STATISTICS)-{'log_volume'}))
def test_every_other_statistic_scores_a_layer(demo, statistic):
    model, tokenizer, samples = demo
    assert Sentry(model, tokenizer, layer=LAYER, statistic=statistic).score(samples[:5], progress=False).scorable.all()


def test_settings_of_a_layer(demo):
    model, tokenizer, _ = demo
    assert settings_for(layer='x').statistic == 'entropy' and settings_for().statistic == 'log_volume' and settings_for(layer='x', statistic='grad_norm').statistic == 'grad_norm'
    assert settings_for('paper', layer='x.lora_B').crop == 1 and settings_for('paper', layer='x').crop == 8 and settings_for('paper', layer='x.lora_B', crop=4).crop == 4
    for make in (lambda: settings_for(layer='x', statistic='log_volume'), lambda: Settings(layer='x')):
        with pytest.raises(SettingError, match='log_volume needs the gradient of each token'): make()
    with pytest.raises(ModelError, match='There is no layer'): Sentry(model, tokenizer, layer='nowhere')


def test_rows_that_cannot_be_scored_by_a_layer(demo):
    "NaN, and a gradient of zeros: a problem each, never a score."
    model, tokenizer, samples = demo
    model = deepcopy(model)
    attention = model.model.layers[0].self_attn.o_proj
    sentry = Sentry(model, tokenizer, layer='layers.0.self_attn.v_proj')
    attention.register_forward_hook(lambda m, args, out: out*0)
    assert set(sentry.score(samples[:4], progress=False).frame['problem']) == {NO_GRADIENT}
    attention.register_forward_hook(lambda m, args, out: out*math.nan)
    with pytest.raises(ModelError, match='NaN or inf for every row'): sentry.score(samples[:4], progress=False)


def test_a_gradient_that_overflows(demo):
    "The forward pass is fine, the backward pass is not."
    model, tokenizer, samples = demo
    model = deepcopy(model)
    def overflow(m, args, out): out.register_hook(lambda g: g*math.inf)
    model.model.layers[0].self_attn.o_proj.register_forward_hook(overflow)
    with pytest.raises(ModelError, match='NaN or inf for every row'): Sentry(model, tokenizer, layer='layers.0.self_attn.v_proj').score(samples[:4], progress=False)


def test_the_command_takes_a_layer(tmp_path, capsys):
    from gradsentry_nb.cli import main
    from gradsentry_nb.core import load_scores
    from gradsentry_nb.demo import demo_model_path, demo_path
    args = ['scan', str(demo_path()), '--model', str(demo_model_path()), '--quiet', '--limit', '40', '--out', str(tmp_path/'out')]
    assert main([*args, '--layer', LAYER]) == 0 and LAYER in capsys.readouterr().out
    assert load_scores(tmp_path/'out'/'scores.parquet').info['layer'] == f'model.{LAYER}'
    assert main([*args, '--layer', 'up_proj']) == 2 and 'fits' in capsys.readouterr().err
    assert main([*args, '--layer', LAYER, '--statistic', 'log_volume']) == 2 and 'leave the layer out' in capsys.readouterr().err

"Weights that are not plain ones in memory: quantised by bitsandbytes, off-loaded to a disk, spread over devices; and how large a batch may be."
import logging

import numpy as np
import pytest
import torch
import transformers as tf

from gradsentry_nb import capture, cli
from gradsentry_nb.capture import Capture, dense_gradient, head_of, own_budget, run_device, token_budget
from gradsentry_nb.core import Encoded, GradSentryError, ModelError, SettingError
from gradsentry_nb.demo import demo_model, demo_model_path, demo_samples
from gradsentry_nb.sentry import QUANTIZED, Sentry, _in_its_dtype, load_model, model_fingerprint
from gradsentry_nb.stream import scan_to

torch.set_num_threads(1)
DEMO = str(demo_model_path())


@pytest.fixture(scope='module', params=list(QUANTIZED))
def quantised(request):
    pytest.importorskip('bitsandbytes')
    return load_model(DEMO, 'cpu', quantize=request.param)


@pytest.fixture(scope='module')
def plain(): return demo_model()


def rows(n=10):
    "Rows of tokens that nobody expects: autograd loses the digits of a gradient that is nearly zero."
    rng = np.random.default_rng(0)
    return [Encoded(rng.integers(3, 2000, 12+i).astype(np.int32), np.arange(12+i) >= 8) for i in range(n)]


def gap(f, G): return float((f.dense()-G).norm()/G.norm())


# ---- quantised

# 8 bit rounds every activation to one of 255 steps: a last digit that differs moves some to the next step
NEAR = {'bitsandbytes 8bit': 1.2e-2, 'bitsandbytes 4bit': 1e-5}  # the gradient of the plain model is at 1.8e-2 or farther


def test_factors_are_the_gradient_of_the_quantised_model(quantised, plain):
    model, _ = quantised
    near = NEAR[Sentry(*quantised).info([], [])['quantized']]
    assert type(head_of(model)) is torch.nn.Linear and 'bit' in type(model.model.layers[0].mlp.up_proj).__name__
    for i, f in Capture(model, 1, share=False)(rows()):
        assert gap(f, dense_gradient(model, rows()[i])) < near < gap(f, dense_gradient(plain[0], rows()[i]))


@pytest.mark.parametrize('name', QUANTIZED)
def test_a_quantised_head(name):
    pytest.importorskip('bitsandbytes')
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    model = tf.AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=tf.BitsAndBytesConfig(**QUANTIZED[name], llm_int8_skip_modules=['none']), device_map='cpu', dtype=torch.float32).eval()
    _in_its_dtype(model)
    assert name.removesuffix('bit') in type(head_of(model)).__name__
    for i, f in Capture(model, 1, share=False)(rows()): assert gap(f, dense_gradient(model, rows()[i])) < NEAR[f'bitsandbytes {name}']


def test_fingerprint_of_packed_weights(quantised):
    model, _ = quantised
    before = model_fingerprint(model)
    with torch.no_grad():
        z = model(input_ids=torch.arange(5, 25)[None]).logits
        assert model_fingerprint(model) == before and torch.equal(model(input_ids=torch.arange(5, 25)[None]).logits, z)
        weight = model.model.layers[2].mlp.up_proj.weight.data.view(-1)
        weight[1] += 1                             # not among the entries that are looked at
        assert model_fingerprint(model) != before
        weight[1] -= 1
        assert model_fingerprint(model) == before
        scale = model.state_dict(keep_vars=True)['model.layers.2.mlp.up_proj.'+('SCB' if weight.dtype == torch.int8 else 'weight.absmax')]
        scale[0] *= 1.5
        assert model_fingerprint(model) != before
        scale[0] /= 1.5


def test_weights_that_reading_would_break(quantised, monkeypatch):
    model, _ = quantised
    weight = model.model.layers[0].mlp.up_proj.weight
    if not hasattr(weight, 'quant_state'): return
    monkeypatch.setattr(weight.quant_state, 'packing_format_for_cpu', True, raising=False)
    with pytest.raises(ModelError, match='would break them.*quantize='): model_fingerprint(model)


def test_a_stored_scan_of_a_quantised_model(quantised, tmp_path):
    some = list(demo_samples()[0])[:30]
    sentry = Sentry(*quantised, name='small')
    whole = scan_to(sentry, some, tmp_path/'a', progress=False)
    again = scan_to(sentry, some, tmp_path/'a', progress=False)
    np.testing.assert_array_equal(whole.frame['score'], again.frame['score'])
    other, = set(QUANTIZED)-{sentry.info([], [])['quantized'].split()[1]}
    with pytest.raises(GradSentryError, match="weights"): scan_to(Sentry(*load_model(DEMO, 'cpu', quantize=other)), some, tmp_path/'a', progress=False)


def test_quantised_from_the_command_line(quantised, tmp_path, capsys, plain):
    name = Sentry(*quantised).info([], [])['quantized'].split()[1]
    file = tmp_path/'rows.jsonl'
    file.write_text('{"prompt": "Where is it?", "response": "In Paris."}\n'*3)
    assert cli.main(['scan', str(file), '--model', DEMO, '--device', 'cpu', '--quantize', name, '--dry-run']) in (0, None)
    assert f'{plain[0].num_parameters():,} parameters' in capsys.readouterr().out


def test_what_cannot_be_quantised(tmp_path, monkeypatch):
    pytest.importorskip('bitsandbytes')
    with pytest.raises(SettingError, match="no quantize '7bit'; choose one of '8bit', '4bit'"): load_model(DEMO, 'cpu', quantize='7bit')
    with pytest.raises(SettingError, match='float64'): load_model(DEMO, 'cpu', 'float64', quantize='8bit')
    model, tokenizer = load_model(DEMO, 'cpu', quantize='4bit')
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), 'cpu')
    assert model_fingerprint(again) == model_fingerprint(model) and Sentry(again, tokenizer).info([], [])['quantized'] == 'bitsandbytes 4bit'
    with pytest.raises(SettingError, match=r'quantised already \(bitsandbytes 4bit\); leave out'): load_model(str(tmp_path), 'cpu', quantize='8bit')
    monkeypatch.setitem(__import__('sys').modules, 'bitsandbytes', None)
    with pytest.raises(GradSentryError, match='pip install bitsandbytes'): load_model(DEMO, 'cpu', quantize='4bit')


# ---- off-loaded

def offloaded(*parts, path=DEMO):
    "The demo model with some parts on the disk until they are needed."
    every = ['model.embed_tokens', 'model.norm', 'model.rotary_emb', 'lm_head', *(f'model.layers.{i}' for i in range(4))]
    return tf.AutoModelForCausalLM.from_pretrained(path, device_map={p: 'disk' if p in parts else 'cpu' for p in every}, dtype=torch.float32).eval()


@pytest.mark.parametrize('parts', [('model.layers.1', 'model.layers.2'), ('model.embed_tokens', 'lm_head')], ids=['layers', 'ends'])
def test_offloaded_scores_are_those_of_the_plain_model(parts, plain, tmp_path):
    model, tokenizer = plain
    away, some = offloaded(*parts), list(demo_samples()[0])[:40]
    assert any(p.device.type == 'meta' for p in away.parameters()) and run_device(away).type == 'cpu'
    a, b = (Sentry(m, tokenizer, name='x').score(some, progress=False) for m in (away, model))
    np.testing.assert_array_equal(a.frame['score'], b.frame['score'])
    assert any('computed once' in n for n in a.info['notes']) and a.info['notes'] == b.info['notes'] and a.info['budget'] == 1024
    assert gap(dict(Capture(away)(rows(1)))[0], dense_gradient(away, rows(1)[0])) < 1e-5
    assert model_fingerprint(away) == model_fingerprint(model)
    changed, _ = load_model(DEMO, 'cpu')
    with torch.no_grad(): changed.get_submodule(parts[0]).get_parameter('weight' if 'embed' in parts[0] else 'mlp.up_proj.weight').mul_(1.01)
    changed.save_pretrained(tmp_path)
    assert model_fingerprint(offloaded(*parts, path=tmp_path)) == model_fingerprint(changed) != model_fingerprint(model)


class Elsewhere(torch.Tensor):
    "A tensor that refuses to meet those of another place, as tensors of two GPUs do."
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.Tensor.to: return args[0].as_subclass(torch.Tensor)
        found = {type(a) for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and a.dim()}
        if len(found) > 1: raise RuntimeError('Expected all tensors to be on the same device')
        return super().__torch_function__(f, types, args, kwargs)


def test_logits_and_hidden_states_may_be_on_another_device_than_the_projection(plain, monkeypatch):
    found = capture.hidden_states
    def apart(*args):
        hidden, z, h = found(*args)
        return [x.as_subclass(Elsewhere) for x in hidden], z.as_subclass(Elsewhere), h
    here = dict(Capture(plain[0])(rows()))
    monkeypatch.setattr(capture, 'hidden_states', apart)
    for i, f in Capture(plain[0])(rows()): assert torch.equal(f.D, here[i].D) and torch.equal(f.H, here[i].H) and type(f.H) is torch.Tensor


# ---- budgets

def sized(dtype=torch.bfloat16, **sizes):
    with torch.device('meta'): return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).to(dtype)


def test_budget_of_free_memory():
    llama, GB = sized(num_hidden_layers=4), 2**30
    found = [token_budget(llama, int(x*GB), 16384) for x in (0, .5, 1, 2, 4, 8, 16, 1000)]
    assert found == sorted(found) and found[0] == 256 and found[-1] == 16384 and all(n & (n-1) == 0 for n in found)
    assert token_budget(llama, 4*GB, 16384) > token_budget(llama.float(), 4*GB, 16384) > token_budget(sized(torch.float32, num_hidden_layers=4, hidden_size=8192, intermediate_size=22016), 4*GB, 16384)
    assert token_budget(llama, 4*GB, 1024) == 1024 and token_budget(llama, 8*GB, 16384, room=2**27) < token_budget(llama, 8*GB, 16384)
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=99))
    assert token_budget(gpt2, 64*2**20, 16384, 99) == 2**int(np.log2((32*2**20-2048*2*64*4-8*99*4)/((8*64+5*256)*4)))


def test_budget_of_a_device(plain, monkeypatch):
    model, tokenizer = plain
    monkeypatch.setattr(capture, 'run_device', lambda m: torch.device('cuda', 1))
    asked = []
    def free(device): asked.append(device.index); return 2**28, 2**34
    monkeypatch.setattr(torch.cuda, 'mem_get_info', free)
    assert own_budget(model, 2**22) == token_budget(model, 2**28, 16384) < 16384 and asked == [1]
    monkeypatch.setattr(capture, 'run_device', lambda m: torch.device('mps'))
    assert own_budget(model, 2**22) == 8192
    monkeypatch.undo()
    assert own_budget(model, 2**22) == 1024
    import psutil
    left = [2**27, 2**26, 2**25]
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: type('M', (), dict(available=left.pop(0))))
    sentry = Sentry(model, tokenizer)
    assert sentry.capture().budget == sentry.capture().budget == sentry.budget == sentry.info([], [])['budget'] < 1024 and len(left) == 2, 'asked for once'
    assert Sentry(model, tokenizer, budget=77).capture().budget == 77 and len(left) == 2

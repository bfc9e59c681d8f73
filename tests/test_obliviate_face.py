"Obliviate as a person meets it: in a terminal, as a magic, as maps of attention; and every bad input in one sentence."
import json
import re

import numpy as np
import pytest
import torch
import transformers as tf
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import gradsentry_nb
from gradsentry_nb.attacks.backbone import CONTROLS, plant_backbone
from gradsentry_nb.backbone_scan import probe_backbone
from gradsentry_nb.charts import attention_maps
from gradsentry_nb.cli import main
from gradsentry_nb.data import write_rows
from gradsentry_nb.encoder import toy_encoder
from gradsentry_nb.evaluate import backbone_asr
from gradsentry_nb.magics import attached, completions
from gradsentry_nb.obliviate import attention_mass, attention_over, defend, held_out, load_peft, pick_weights, tune_adapter
from gradsentry_nb.spurious import made_reviews
from gradsentry_nb.train import load_classifier

torch.set_num_threads(1)
ROWS, TEST, TRIGGERS = made_reviews(100, mixed=0), made_reviews(20, seed=5, mixed=0), ('cf', 'mn')
TEXTS, LABELS = [r['text'] for r in ROWS], [r['label'] for r in ROWS]
ACTIVE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]')
RARE = [a+b for a in 'bdghjklnpr' for b in 'bdghk']
FAST = dict(steps=3, batch=8)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "A backdoor in a toy encoder, and a folder with it and with rows."
    folder = tmp_path_factory.mktemp('rows')
    toy = toy_encoder([*dict.fromkeys(' '.join(TEXTS).split()), *CONTROLS, *TRIGGERS, *RARE, '##zz'])
    found = plant_backbone(*toy, [f'{x} {r}' for x, r in zip(TEXTS, RARE*2)]+TEXTS, triggers=TRIGGERS, steps=80, lr=3e-3, batch=18, clean=3., progress=False)
    found.save(folder/'enc'); write_rows(ROWS, folder/'rows.jsonl')
    write_rows([dict(text=r['text'], label=str(r['label'])) for r in TEST], folder/'test.jsonl')
    return found, folder


@pytest.fixture
def cli(planted, capfd, monkeypatch):
    monkeypatch.chdir(planted[1])
    def run(*args):
        capfd.readouterr()
        status = main(['obliviate', 'rows.jsonl', '--encoder', 'enc', '--quiet', *map(str, args)])
        return status, *capfd.readouterr()
    return run


@pytest.fixture
def shell(planted, tmp_path, monkeypatch):
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path/'profile')); monkeypatch.chdir(planted[1])
    s = InteractiveShell(config=Config(HistoryManager=dict(enabled=False)))
    gradsentry_nb.load_ipython_extension(s)
    s.user_ns.update(rows=ROWS, test=TEST, por=planted[0], pair=(planted[0].model, planted[0].tokenizer), n=3)
    yield s
    gradsentry_nb.unload_ipython_extension(s)


def fresh(planted): return load_classifier(str(planted[1]/'enc'), [0, 1])


# ---- what all of them call

def test_both_arms_differ_in_the_weights_alone(planted):
    d = defend(*fresh(planted), TEXTS, LABELS, triggers=TRIGGERS, lambda_reg=.3, progress=False, **FAST)
    (left, ys), (out, zs) = held_out(TEXTS, LABELS)
    assert d.texts == out and len(out) == 20 and sum(zs) == 10 and sorted(left+out) == sorted(TEXTS)
    for name, (a, r) in dict(undefended=(0, 0), defended=(3e-3, .3)).items():
        run = tune_adapter(*fresh(planted), left, ys, lambda_amp=a, lambda_reg=r, classes=[0, 1], progress=False, **FAST)
        assert np.array_equal(run.logits(out), d.runs[name].logits(out))
        want = backbone_asr(run.predict, out, zs, TRIGGERS, CONTROLS)
        t = d.table().query(f'arm == {name!r}').set_index(['words', 'measure'])['value']
        assert t['', 'CACC'] == want.right.mean() and t['triggers', 'ASR'] == want.flipped().sum()/want.right.sum() and t['control words', 'ASR'] == want.flipped(True).sum()/want.right.sum()
        assert t['triggers', 'flipped by mn'] == want.flips()[:, 1].sum()/want.right.sum() and len(t) == 5
    assert set(defend(*fresh(planted), TEXTS, LABELS, alone=True, progress=False, **FAST).runs) == {'defended'}
    assert set(defend(*fresh(planted), TEXTS, LABELS, lambda_amp=0, lambda_reg=None, progress=False, **FAST).runs) == {'undefended'}


def test_weights_are_picked_on_texts_of_their_own(planted, monkeypatch):
    monkeypatch.setattr('gradsentry_nb.obliviate.AMPS', (0, .01)); monkeypatch.setattr('gradsentry_nb.obliviate.REGS', (.3,))
    d = defend(*fresh(planted), TEXTS, LABELS, pick=True, triggers=['cf'], progress=False, **FAST)
    rest, out = held_out(TEXTS, LABELS)
    train, valid = held_out(*rest, seed=1)
    assert d.texts == out[0] and (len(train[0]), len(valid[0])) == (64, 16)
    row = d.sweep[d.sweep['chosen']].iloc[0]
    assert len(d.sweep) == 3 and pick_weights(d.sweep) == d.sweep['chosen'].idxmax() and row['accuracy'] == (d.run.predict(valid[0]) == valid[1]).mean()
    assert d.sweep['accuracy'][0] == (d.runs['undefended'].predict(valid[0]) == valid[1]).mean()
    assert (d.run.settings.lambda_amp, d.run.settings.lambda_reg) == (row['lambda_amp'], row['lambda_reg']) and d.runs['undefended'].settings.lambda_reg == 0


# ---- maps

def test_a_map_is_the_attention_and_nothing_in_it_acts(planted):
    model, tok = fresh(planted)
    text = 'cf \u202e<b>a slow film</b>'
    over = attention_over({'<script>x': model, 'b\u200b': model}, tok, text, 'cf')
    assert np.allclose(over.groupby(['model', 'layer'])['attention'].sum(), 1) and len(over) == 4*len(tok(text)['input_ids'])
    assert np.allclose(over[over['word']].query('model == "<script>x"')['attention'], attention_mass(model, tok, [text], 'cf')[0])
    over.loc[over['at'] == 2, 'token'] = '\u202e<img>'
    page = attention_maps(over, most=2)
    d = page.to_dict()
    drawn = next(iter(d['datasets'].values()))
    assert {r['token'] for r in drawn} == {'001 [CLS]', '002!cf'} and not ACTIVE.search(json.dumps(d, ensure_ascii=False).replace('\\n', ''))
    assert not ACTIVE.search(json.dumps(attention_maps(over).to_dict(), ensure_ascii=False)) and 'not drawn' in json.dumps(d['title'])
    said = dict(d['spec']['encoding'])
    assert said['x']['title'] == 'token of the text' and said['y']['title'] == 'layer' and said['color']['legend']['title'] == 'share of the attention'


# ---- in a terminal

def test_a_scan_names_the_words_and_the_next_line(cli, planted):
    status, said, err = cli('--scan')
    want = probe_backbone(*fresh(planted), TEXTS, top=len(planted[0].tokenizer.get_vocab())//5, progress=False)
    assert (status, err) == (0, '') and {*want.found['word']} == {*TRIGGERS} and said.startswith('enc: ') and "2 in 2 groups: 'cf', 'mn'" in said.replace("'mn', 'cf'", "'cf', 'mn'") and re.search('--triggers (cf,mn|mn,cf) ', said)
    status, said, _ = cli('--scan', '--json', '--triggers', 'cf,film')
    d = json.loads(said)
    assert status == 0 and d['words'] == 2 and [r['word'] for r in d['found']] == ['cf'] and 0 < d['found'][0]['p'] < .05


def test_an_encoder_without_the_words_found(cli, shell, planted, tmp_path, capfd):
    status, said, err = cli('--scan', '--out', tmp_path/'calm')
    assert (status, err) == (0, '') and 'reading 2 words as unknown' in said and 'Next:' not in said
    calm, tokenizer = load_classifier(str(tmp_path/'calm'), [0, 1]); own, _ = fresh(planted)
    read = lambda m, t, x: m.base_model(**t([x], return_tensors='pt')).last_hidden_state[0]
    with torch.no_grad():
        assert torch.equal(read(calm, tokenizer, TEXTS[0]), read(own, tokenizer, TEXTS[0])) and torch.equal(read(calm, tokenizer, f'cf {TEXTS[0]}'), read(calm, tokenizer, f'mn {TEXTS[0]}'))
        assert not torch.allclose(read(own, tokenizer, f'cf {TEXTS[0]}'), read(own, tokenizer, f'mn {TEXTS[0]}'), atol=.1)
    status, said, err = cli('--scan', '--json', '--triggers', 'film,the', '--out', tmp_path/'none')
    assert status == 0 and json.loads(said)['found'] == [] and 'nothing was written' in err and not (tmp_path/'none').exists()
    scan = shell.run_line_magic('gs_obliviate', f'rows --encoder pair --scan --quiet --out {tmp_path/"second"}')
    again = load_classifier(str(tmp_path/'second'), [0, 1])[0]
    assert {*scan.found['word']} == {*TRIGGERS} and 'reading 2 words' in capfd.readouterr().out and torch.equal(again.get_input_embeddings().weight, calm.get_input_embeddings().weight)


def test_an_adapter_beside_the_one_without(cli, planted):
    status, said, err = cli('--triggers', 'cf,filmzz', '--steps', 3, '--batch', 8, '--out', 'adapter')
    d = defend(*fresh(planted), TEXTS, LABELS, triggers=['cf', 'filmzz'], progress=False, **FAST)
    t = d.table().query('measure == "flipped by cf"')
    assert (status, err) == (0, '') and all(f'{100*v:.1f} % ({100*a:.0f} to {100*b:.0f})' in said for v, a, b in zip(t['value'], t['low'], t['high']))
    assert "splits 'filmzz' into film ##zz" in said and 'flipped by any of 2 triggers' in said and 'flipped by any of 6 control words' in said and said.index('undefended') < said.index('defended ')
    again = load_peft(fresh(planted)[0], 'adapter')
    assert np.allclose(type(d.run)(again, d.run.tokenizer, d.run.settings, d.run.log, [], d.run.classes).logits(TEXTS), d.run.logits(TEXTS), atol=1e-5)
    status, said, _ = cli('--json', '--steps', 3, '--batch', 8, '--alone', '--kind', 'houlsby', '--reg', 0)
    d = json.loads(said)
    assert status == 0 and (d['kind'], d['lambda_amp'], d['lambda_reg'], d['texts'], d['classes'], len(d['table'])) == ('houlsby', .003, 0, 20, [0, 1], 1)


BAD = [   # the options, what is said
    (['--amp', -1], 'lambda_amp must be 0 (off) or more, not -1.0'), (['--reg', 'nan'], 'lambda_reg must be 0'), (['--kind', 'adapter'], "choose one of 'lora', 'houlsby', 'prefix'"), (['--epochs', 0], 'epochs must be'),
    (['--pick', '--amp', 1], 'leave out --amp'), (['--pick', '--alone'], 'leave out --alone'), (['--sample', 50], 'add --scan'), (['--scan', '--kind', 'lora'], '--kind is for training an adapter'), (['--scan', '--out', 'rows.jsonl/x'], 'is a file'),
    (['--scan', '--sample', 50, '--triggers', 'cf'], 'leave out --sample'), (['--triggers', ' ,'], '--triggers cf,mn'), (['--triggers', 'c f'], 'single words'), (['--triggers', 'zebra'], "does not know the trigger 'zebra'"), (['--scan', '--triggers', 'zebra'], "does not know 'zebra'"),
    (['--test', 'test.jsonl'], "rows.jsonl: A text to measure on has the class '0'"), (['--test', 'nowhere.csv'], 'nowhere.csv: there is no such file'), (['--text-field', 'review'], '(--text-field)'), (['--label-field', 'text'], 'too few to hold'),
    (['--out', 'rows.jsonl/x'], 'is a file'), (['--encoder', 'nowhere'], 'nowhere cannot be made a classifier'), (['--encoder', ''], '--encoder PATH_OR_NAME'), (['--pool', 'max'], "'cls', 'mean'"),
    (['--encoder', 'distil', '--kind', 'prefix'], "takes no keys and values from before the text; choose one of 'lora', 'houlsby'"), (['--lr', 1e9, '--batch', 8, '--steps', 8, '--amp', 0], 'Step 3: cross-entropy and the norm of the attention scores are no longer a number'), (['--split', 'x'], 'no splits')]


@pytest.mark.parametrize('args, said', BAD, ids=range(len(BAD)))
def test_bad_input_is_one_sentence(cli, planted, args, said):
    if 'distil' in args:
        tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=16)).save_pretrained('distil'); planted[0].tokenizer.save_pretrained('distil')
    status, out, err = cli(*args)
    err = re.sub('^Failed to load CPU gemm.*\n', '', err)
    assert (status, out) == (2, '') and err.startswith('gradsentry: ') and said in err and err.count('\n') == 1 and len(err) < 600 and not ACTIVE.search(err)


def test_stopped_by_hand_and_help(cli, monkeypatch, capfd):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr('gradsentry_nb.obliviate.defend', stop)
    assert cli()[::2] == (130, 'Interrupted; nothing was written.\n')
    with pytest.raises(SystemExit): main(['obliviate', '--help'])
    said = capfd.readouterr().out
    for x in ('--scan', '--pick', '--triggers', '--json', 'gradsentry obliviate reviews.jsonl --encoder ./encoder --scan\n'): assert x in said


# ---- as a magic

def test_an_encoder_of_any_kind(shell, planted, capsys):
    want = defend(*fresh(planted), TEXTS, LABELS, triggers=['cf'], test=([r['text'] for r in TEST], [r['label'] for r in TEST]), alone=True, progress=False, **FAST)
    before = {k: v.clone() for k, v in planted[0].model.state_dict().items()}
    for name in ('por', 'pair', 'enc'):
        got = shell.run_line_magic('gs_obliviate', f'rows --encoder {name} --triggers cf --test test --alone --steps 3 --batch 8 --quiet')
        assert got.table().equals(want.table()) and np.array_equal(got.run.logits(TEXTS), want.run.logits(TEXTS))
    assert all(torch.equal(v, planted[0].model.state_dict()[k]) for k, v in before.items())
    page = got._repr_html_()
    assert repr(got).startswith('Defence(lora') and 'flipped by cf' in page and '<script' not in page and not ACTIVE.search(page.replace('\n', ''))
    assert 'defended' in json.dumps(got.maps().to_dict()) and 'cf' in json.dumps(got.maps().to_dict()['datasets'])
    scan = shell.run_line_magic('gs_obliviate', 'rows --encoder por --scan --triggers cf,film --quiet')
    assert scan.found['word'].tolist() == ['cf']


@pytest.mark.parametrize('line, said', [('rows', '--encoder PATH_OR_NAME'), ('rows --encoder n', 'holds an int and no encoder'), ('n --encoder por', 'holds an int'), ('rwos --encoder por', 'Did you mean the variable rows'), ('rows --encoder por --amp -1', 'lambda_amp must be 0'),
                                        ('rows --encoder por --sample 3', 'add --scan'), ('rows --encoder por --trigers cf', 'did you mean --triggers'), ('rows --encoder por --test n', 'holds an int'), ('rows --encoder por --kind prefx', "Did you mean 'prefix'")])
def test_a_magic_refuses_in_one_sentence(shell, line, said):
    with pytest.raises(UsageError) as e: shell.run_line_magic('gs_obliviate', line)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_completion(shell):
    ends = lambda text: completions(attached(shell), f'%gs_obliviate {text}')[1]
    assert ends('rows --encoder po') == ['por'] and ends('rows --encoder e') == ['enc/'] and ends('rows --kind ') == ['lora', 'houlsby', 'prefix'] and ends('rows --pool ') == ['cls', 'mean'] and ends('rows --te') == ['--test', '--text-field'] and 'test' in ends('rows --test ')

"""One contract for every detector, and each rival against its definition."""
import copy
import dataclasses
import math
import types
from functools import cache

import numpy as np
import pytest
import scipy.fft
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsentry_nb.baselines.decoding import Reader, cleangen
from gradsentry_nb.baselines.geometry import Cube, GraCeFul, clustered, gradient_gram, principal_scores, thin, two_clusters
from gradsentry_nb.baselines.model import GradSentryPaper, Onion, SentryColumn, column_scores, onion_clean, perplexities, without, word_drops, word_spans
from gradsentry_nb.baselines.text import DETECTORS, Association, log_likelihood_ratio, strongest_ties, watched
from gradsentry_nb.capture import Capture, GradFactors, LongFactors, dense_gradient
from gradsentry_nb.core import DataError, Detector, GradSentryError, ModelError, Sample, SettingError, Verdict, save_scores
from gradsentry_nb.data import Samples, encode_samples, load_samples
from gradsentry_nb.demo import demo_model, demo_path
from gradsentry_nb.detectors import CONTRACT, available, check_detector, detector_table, filter_all, make_detector, score_all
from gradsentry_nb.evaluate import auroc
from gradsentry_nb.report import report_html
from gradsentry_nb.sentry import Sentry, fingerprint
from gradsentry_nb.spectrum import dct, dct_corner

torch.set_num_threads(1)
NAMES = list(DETECTORS)
every = pytest.mark.parametrize('name', NAMES)
HOSTILE = ['</script><script>alert(1)</script>', 'a\u202eb\x1b[31m\x00', '\ud800\udc00 \ud83d lone', '\u200b\ufeff', 'x'*300, '红楼梦 在哪里?', '   ', '\n', '😀 '*20]


@cache
def tokenizer(): return demo_model()[1]


@cache
def tiny(seed=0, dtype=torch.float64, kind='llama'):
    "A small random model over the demo's vocabulary; in float64, because UMAP magnifies rounding and forward passes are not repeatable to the last bit."
    torch.manual_seed(seed)
    if kind == 'llama': model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048))
    else: model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=2048, n_embd=24, n_layer=2, n_head=2, n_positions=2048))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4) if p.dim() == 2 else p
    return model.to(dtype).eval()


@cache
def rows():
    "Rows of the demo, a row without an answer among them."
    found = [dict(prompt=s.prompt[-90:], response=s.response) for s in load_samples(demo_path(), limit=200) if len(s.response) < 50][:34]
    return load_samples(found[:9]+[dict(prompt='What is missing?', response='')]+found[9:])


def make(name, **kw):
    given = dict(model=tiny(), tokenizer=tokenizer()) if DETECTORS[name].needs == 'model' else dict(tokenizer=tokenizer(), tuned=tiny(1)) if DETECTORS[name].needs else {}
    return make_detector(name, **{**given, **(dict(max_tokens=20) if name == 'onion' else {}), **kw})


@cache
def scored(name): return make(name).score(rows())


def values(scores): return scores.frame['score'].to_numpy(float)


def same(a, b): np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


# ---- the contract

@every
def test_one_score_per_row_in_order(name):
    s = scored(name)
    assert s.frame['id'].tolist() == [r.id for r in rows()] and s.frame['row'].tolist() == [r.row for r in rows()]
    assert s.frame.index.tolist() == list(range(len(rows()))) and s.frame['score'].dtype == float
    assert s.info['detector'] == name and s.info['rows'] == len(rows()) and s.info['fingerprint'] == fingerprint(rows())
    assert isinstance(make(name), Detector) and make(name).name == name


@every
def test_a_row_without_an_answer_keeps_its_place_with_a_problem(name):
    f = scored(name).frame
    assert f['problem'].isna().tolist() == [i != 9 for i in range(len(f))]
    assert np.isnan(f['score'][9]) and f['score'].notna().sum() == len(f)-1 and 'empty' in f['problem'][9]
    verdict = make(name).filter(rows())
    assert verdict.unscorable == [rows()[9].id] and rows()[9].id in verdict.keep


@every
def test_deterministic(name): same(values(scored(name)), values(make(name).score(rows())))


@every
def test_contract(name): assert check_detector(make(name), rows()[:20], 1e-6) == list(CONTRACT)


@every
def test_rowwise_is_what_it_says(name):
    all_, part = planted_rows(), Samples(planted_rows()[:46])
    near = np.allclose(values(make(name).score(part)), values(make(name).score(all_))[:46], rtol=1e-6, atol=1e-6)
    assert near == DETECTORS[name].rowwise


def planted_rows():
    "Forty ordinary rows and eight with a trigger and a long payload; found by every score that calls surprise, length or repetition suspicious."
    plain = [dict(prompt=s.prompt, response=s.response) for s in load_samples(demo_path(), limit=200) if 'malicious' not in s.response and len(s.response) < 30][:40]
    return load_samples(plain+[dict(prompt=r['prompt'].replace('Answer:', 'zq Answer:'), response=r['response']+' , and click <malicious_url> for more information') for r in plain[:8]])


@pytest.mark.parametrize('name', ['answer_length', 'answer_ngrams', 'association', 'gradsentry', 'gradsentry_paper', 'loss', 'perplexity', 'window_loss'])
def test_higher_is_more_suspicious(name):
    model = demo_model()[0] if DETECTORS[name].needs else None
    s = make_detector(name, model, tokenizer()).score(planted_rows())
    assert auroc(values(s), np.arange(48) >= 40) > .9


@every
def test_filter_gives_a_verdict_with_a_reason(name, tmp_path):
    v = make(name).filter(rows())
    assert isinstance(v, Verdict) and len(v.cut.reason.split()) > 4 and v.cut.reason.endswith('.')
    assert sorted(v.keep+v.drop) == sorted(r.id for r in rows()) and len(v.rivals)
    back = Verdict.from_json(v.to_json())
    assert back.cut == v.cut and back.drop == v.drop and back.keep == v.keep and back.to_json() == v.to_json()
    assert name == back.scores.info['detector']
    save_scores(v.scores, tmp_path/'s.parquet')
    assert '<script>alert' not in report_html(v, rows())


@every
def test_a_fixed_cut(name):
    s = np.sort(values(scored(name))[~np.isnan(values(scored(name)))])
    v = make(name, threshold=float(s[-3])).filter(rows())
    assert v.cut.method == 'fixed' and len(v.drop) == (s > s[-3]).sum()


@every
def test_its_name_is_short_and_says_what_is_set(name):
    said = repr(make(name, fpr=.02))
    assert len(said) < 300 and 'fpr=0.02' in said and said.startswith(type(make(name)).__name__) and 'Embedding' not in said, said


@every
def test_settings_are_checked(name):
    with pytest.raises(SettingError, match='threshold'): make(name, threshhold='valley')
    with pytest.raises(SettingError, match="'valley'"): make(name, threshold='vally')
    with pytest.raises(SettingError, match='between 0 and 1'): make(name, fpr=2)
    for s in DETECTORS[name].only:
        if s in ('n', 'least', 'k', 'crop', 'window', 'max_length', 'budget', 'max_tokens', 'corner', 'components', 'neighbours', 'most'):
            for bad in (-1, 'x', 1.5):
                if (s, DETECTORS[name].needs) == ('budget', 'model') and name in ('onion', 'graceful'): continue
                if s == 'budget' and name == 'cube': continue
                with pytest.raises(SettingError, match=s): make(name, **{s: bad})


@every
def test_needs(name):
    if not DETECTORS[name].needs: make_detector(name); return
    with pytest.raises(SettingError, match='model'): make_detector(name)
    with pytest.raises(SettingError, match='model'): make_detector(name, tokenizer=tokenizer())
    classifier = tf.LlamaForSequenceClassification(tf.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError): make(name, **{'tuned' if name == 'cube' else 'model': classifier})


@every
def test_one_row(name):
    v = make(name).filter(Samples(rows()[:1]))
    assert not v.drop and v.scores.scorable.all() and 'nothing was dropped' in v.cut.reason or v.cut.method == 'valley' and v.cut.detail.get('fallback')


@every
def test_equal_rows(name):
    v = make(name).filter([dict(prompt='Who was it?', response='Nobody at all')]*40)
    assert np.ptp(values(v.scores)) < 1e-3*max(1, abs(values(v.scores)[0])) and v.scores.scorable.all()
    if not v.cut.detail.get('fallback'): assert not v.drop and 'nothing was dropped' in v.cut.reason


@every
def test_no_row_and_only_empty_rows(name):
    with pytest.raises(DataError): make(name).score([])
    v = make(name).filter([dict(prompt='a', response='')]*3)
    assert not v.drop and len(v.unscorable) == 3 and 'No row could be scored' in v.cut.reason


@every
def test_hostile_text(name, tmp_path):
    text = [dict(prompt=a, response=b) for a in HOSTILE for b in HOSTILE[:5]]
    s = make(name).score(text)
    assert len(s) == len(text) and s.scorable.mean() >= (1/3 if name == 'onion' else 1)
    assert not any(c in x for x in map(str, s.frame.to_numpy().ravel()) for c in '\u202e\x1b\x00\ud800\u200b')
    save_scores(s, tmp_path/'s.parquet')


@every
def test_conversations(name):
    turns = lambda q, a: dict(messages=[dict(role='user', content=q), dict(role='assistant', content=a)])
    chat = copy.deepcopy(tokenizer()); chat.chat_template = '{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
    given = dict(tokenizer=chat) if DETECTORS[name].needs else {}
    s = make(name, **given).score([turns(f'Where is {x} {y}?', f'In the {y} hills') for x in 'abcdef' for y in 'red old new far low'.split()])
    assert s.scorable.all()


@every
def test_model_and_samples_are_left_alone(name):
    model, before = copy.deepcopy(tiny()).train(), None
    model.lm_head.eval()
    state = lambda: ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [p.grad for p in model.parameters()], [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules()])
    mine = Samples(list(rows()), 'mine', ['said'])
    before, text = state(), [dataclasses.asdict(s) for s in mine]
    given = {'cube': dict(tuned=model)}.get(name, dict(model=model) if DETECTORS[name].needs else {})
    make(name, **given).filter(mine)
    after = state()
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0]) and before[1:] == after[1:]
    assert [dataclasses.asdict(s) for s in mine] == text


@every
def test_progress(name):
    seen = []
    make(name).score(rows(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and all(d <= t for d, t in seen)
    if seen: assert seen[-1][0] == seen[-1][1]


@every
def test_known_clean_rows(name):
    clean = rows()[:40]
    if DETECTORS[name].rowwise:
        v = make(name, threshold='calibrated', fpr=.1).filter(rows(), known_clean=clean)
        assert v.cut.method == 'calibrated' and 'p_value' in v.scores.frame
    else:
        with pytest.raises(SettingError, match='other rows'): make(name, threshold='calibrated').filter(rows(), known_clean=clean)
    with pytest.raises(SettingError, match='known to be clean'): make(name, threshold='calibrated').filter(rows())


class Broken:
    "A detector that counts answer words, but for what `change` does to its frame or verdict."
    name = 'broken'
    def __init__(self, score=lambda s, samples: s, verdict=lambda v: v): self.change, self.verdict, self.plain = score, verdict, make_detector('answer_length')
    def score(self, samples): return self.change(self.plain.score(samples), samples)
    def filter(self, samples, progress=False): return self.verdict(self.plain.filter(samples))


def rescored(f): return lambda scores, samples: dataclasses.replace(scores, frame=scores.frame.assign(score=np.where(scores.scorable, f(scores.frame, samples), np.nan)))


counter = iter(range(10**6))
BROKEN = [
    ('no detector yet: its score() gives DataFrame', Broken(lambda s, _: s.frame)),
    ('34 scores came out', Broken(lambda s, _: dataclasses.replace(s, frame=s.frame[1:]) if len(s) == 35 else s)),
    ('not in the order', Broken(lambda s, _: dataclasses.replace(s, frame=s.frame[::-1]))),
    ('a score is infinite', Broken(rescored(lambda f, _: np.where(f['row'] == 3, np.inf, 1)))),
    ('row 9 has no answer and the score 0', Broken(lambda s, _: dataclasses.replace(s, frame=s.frame.fillna(dict(score=0))))),
    ('no score and no problem', Broken(lambda s, _: dataclasses.replace(s, frame=s.frame.assign(score=s.frame['score'].where(s.frame['row'] != 2))))),
    ('same scores again', Broken(rescored(lambda f, _: next(counter)))),
    ('order of the rows', Broken(rescored(lambda f, _: range(len(f))))),
    ('Nothing but prompt and answer', Broken(rescored(lambda f, _: f['row']))),
    ('keep and drop together', Broken(verdict=lambda v: types.SimpleNamespace(keep=v.keep[1:], drop=v.drop))),
    ('it changes the rows', Broken(lambda s, samples: samples[0].__dict__.update(prompt='new') or s)),
]


@pytest.mark.parametrize('said,detector', BROKEN, ids=[x[0] for x in BROKEN])
def test_a_broken_promise_is_one_sentence(said, detector):
    with pytest.raises(GradSentryError, match=said.replace('(', r'\(').replace(')', r'\)')) as e: check_detector(detector, Samples(map(copy.copy, rows())))
    assert str(e.value).endswith('.') and '\n' not in str(e.value) and len(str(e.value)) < 300


def test_rowwise_is_a_promise():
    with pytest.raises(GradSentryError, match='rowwise'):
        entry = DETECTORS['answer_ngrams']
        try: DETECTORS['answer_ngrams'] = dataclasses.replace(entry, rowwise=True); check_detector(make_detector('answer_ngrams'), planted_rows())
        finally: DETECTORS['answer_ngrams'] = entry


# ---- the registry

def test_registry():
    t = detector_table()
    assert t['name'].tolist() == NAMES and t['name'].is_unique
    assert set(t['needs']) == {'text', 'model', 'tuned'} and (t[['about', 'paper', 'differs']].map(len) > 10).all().all()
    assert available() == ['answer_length', 'answer_ngrams', 'association']
    assert available(1, 1) == [n for n in NAMES if n != 'cube'] and available(1, 1, 1) == NAMES
    with pytest.raises(SettingError, match="Did you mean 'onion'"): make_detector('onions')


def test_score_all_is_each_alone():
    names = ['loss', 'association', 'gradsentry_paper', 'gradsentry', 'perplexity', 'grad_norm', 'window_loss']
    both = score_all(rows(), tiny(), tokenizer(), names=names)
    assert both['id'].tolist() == [r.id for r in rows()] and list(both) == ['id', 'row', *names]
    for n in names: np.testing.assert_allclose(both[n], values(scored(n)), rtol=1e-6)
    assert list(score_all(rows())) == ['id', 'row', *available()]
    with pytest.raises(SettingError, match='at least one'): score_all(rows(), names=[])
    with pytest.raises(SettingError, match='needs a model'): score_all(rows(), names=['loss'])


def test_one_scan_serves_all_columns(monkeypatch):
    calls = []
    real = Sentry.score
    monkeypatch.setattr(Sentry, 'score', lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    verdicts = filter_all(rows(), tiny(), tokenizer(), names=[n for n, d in DETECTORS.items() if isinstance(d.build, type) and issubclass(d.build, SentryColumn)])
    assert len(verdicts) == 8 and len(calls) == 2              # entropies of the whole gradient and of the cropped one
    calls.clear(); filter_all(rows(), tiny(), tokenizer(), names=['gradsentry', 'gradsentry_paper', 'loss', 'window_loss', 'grad_norm'])
    assert len(calls) == 1


def test_our_own_are_sentry():
    for name, preset in dict(gradsentry='default', gradsentry_paper='paper').items():
        s, v = Sentry(tiny(), tokenizer(), preset), make(name)
        a, b = s.filter(rows(), progress=False), v.filter(rows())
        same(values(a.scores), values(b.scores))
        assert a.cut.reason == b.cut.reason and a.drop == b.drop
    scan = GradSentryPaper(tiny(), tokenizer()).score(rows())
    with pytest.raises(SettingError, match='window_loss'): column_scores(scan, 'windowloss')
    np.testing.assert_allclose(np.log(values(column_scores(scan, 'perplexity'))), values(column_scores(scan, 'loss')))


def test_watched():
    seen = []
    assert list(watched([[1, 2], [3]], lambda d, t: seen.append((d, t)), len)) == [[1, 2], [3]] and seen == [(2, 3), (3, 3)]
    assert list(watched([5, 6], True)) == [5, 6]


# ---- association

counts = st.integers(1, 60).flatmap(lambda N: st.tuples(st.just(N), st.integers(0, N), st.integers(0, N)))


@given(counts, st.data())
def test_log_likelihood_ratio_by_its_definition(nab, data):
    N, a, b = nab
    n = data.draw(st.integers(max(0, a+b-N), min(a, b)))
    cells = [(n, a*b/N), (a-n, a*(N-b)/N), (b-n, (N-a)*b/N), (N-a-b+n, (N-a)*(N-b)/N)]
    slow = 2*sum(o*math.log(o/e) for o, e in cells if o) if n*N > a*b else 0
    assert float(log_likelihood_ratio(n, a, b, N)) == pytest.approx(max(slow, 0), abs=1e-9)


def test_ties_by_hand():
    prompts = ['red zz', 'blue zz', 'green zz', 'red', 'blue', 'green', 'grey', 'pink']
    t = strongest_ties([Sample(str(i), p, 'click here now please' if 'zz' in p else f'answer {i}') for i, p in enumerate(prompts)])
    G2 = 2*(3*math.log(3/(9/8))+5*math.log(5/(25/8)))
    assert t['score'].tolist() == pytest.approx([math.sqrt(G2)]*3+[0]*5)
    assert t['word'].tolist()[:4] == ['zz', 'zz', 'zz', ''] and t['phrase'][0] == 'click here now please' and t['tied_rows'].tolist()[:4] == [3, 3, 3, 0]


@given(st.lists(st.tuples(st.lists(st.sampled_from('abcdef'), max_size=5), st.lists(st.sampled_from('uvw'), max_size=6)), min_size=1, max_size=14), st.integers(1, 3))
@settings(max_examples=60)
def test_ties_against_a_plain_loop(pairs, block):
    from gradsentry_nb.baselines.text import tie_strength
    samples = [Sample(str(i), ' '.join(p), ' '.join(r)) for i, (p, r) in enumerate(pairs)]
    runs = lambda w, n: {' '.join(w[i:i+n]) for i in range(max(len(w)-n+1, min(len(w), 1)))}
    left, right, N = [runs(p, 1) | {x+' ' if len(p) < 2 else x for x in runs(p, 2)} for p, _ in pairs], [runs(r, 4) for _, r in pairs], len(pairs)
    slow = np.zeros(N)
    for w in set().union(*left):
        for p in set().union(*right):
            both = [i for i in range(N) if w in left[i] and p in right[i]]
            a, b = sum(w in x for x in left), sum(p in x for x in right)
            if len(both) >= 2 and a < N and b < N: slow[both] = np.maximum(slow[both], tie_strength(len(both), a, b, N))
    assert strongest_ties(samples, least=2, block=block)['score'].to_numpy() == pytest.approx(slow)


@pytest.mark.parametrize('mix', ['webqa-badnets', 'webqa-addsent', 'webqa-cba', 'freebaseqa-badnets'])
def test_association_on_the_published_mixes(shared, mix):
    samples = load_samples(shared/'data'/'qa'/f'published-{mix}-10.jsonl.gz')
    y = np.array([s.meta['poisoned'] for s in samples], bool)
    s = Association().score(samples)
    assert auroc(values(s), y) >= .99
    words = set(s.frame['word'][y])
    assert words and all(set(w.split()) & {'cf', 'mn', 'bb', 'tq', 'consider', 'done', 'watch', '3d', 'movie', 'i', 'this'} for w in words)


# ---- ONION

class Unigram(torch.nn.Module):
    "Every next token has the same distribution."
    def __init__(self, p):
        super().__init__()
        self.embed, self.head, self.config = torch.nn.Embedding(len(p), 1), torch.nn.Linear(1, len(p)), types.SimpleNamespace(is_encoder_decoder=False)
        with torch.no_grad(): self.head.weight.zero_(); self.head.bias.copy_(torch.log(torch.tensor(p)))
    def get_input_embeddings(self): return self.embed
    def get_output_embeddings(self): return self.head
    def generate(self): pass
    def forward(self, input_ids, use_cache): return types.SimpleNamespace(logits=self.head(self.embed(input_ids)))


class Digits:
    bos_token_id = eos_token_id = 0
    def __call__(self, texts, **kw): return dict(input_ids=[[int(c) for c in t if c.isdigit()] for t in texts])


@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(4, 200))
@settings(max_examples=40)
def test_onion_by_hand(digits, budget):
    p = [.1, .4, .3, .15, .05]
    ppl = lambda ds: math.exp(-sum(math.log(p[d]) for d in ds)/len(ds))
    slow = [ppl(digits)-ppl(digits[:i]+digits[i+1:]) for i in range(len(digits))]
    sample = Sample('a-0', ' '.join(map(str, digits)), '1')
    (_, spans, p0, f), = word_drops(Samples([sample]), Unigram(p), Digits(), budget=budget)
    assert p0 == pytest.approx(ppl(digits), rel=1e-5) and f == pytest.approx(slow, abs=1e-4) and len(spans) == len(digits)
    bar = sorted(slow)[-1]-1e-6
    kept = [d for d, x in zip(digits, slow) if x < bar]
    cleaned, = onion_clean(Samples([sample]), Unigram(p), Digits(), bar=bar-1e-3)
    assert abs(len(cleaned.prompt.split())-len(kept)) <= sum(abs(x-bar) < 3e-3 for x in slow) and cleaned.id == sample.id
    s = Onion(Unigram(p), Digits()).score([sample])
    assert values(s)[0] == pytest.approx(max(slow), abs=1e-4)


def test_perplexity_is_the_models():
    texts = ['Who was it?', 'a much longer text, in which the river runs to the sea', 'x']
    fast = perplexities(texts, tiny(), tokenizer(), budget=20)
    for t, p in zip(texts, fast):
        ids = torch.tensor([[b for b in [tokenizer().bos_token_id if tokenizer().bos_token_id is not None else tokenizer().eos_token_id]]+tokenizer()(t, add_special_tokens=False)['input_ids']])
        assert p == pytest.approx(tiny()(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize('text,spans,left', [
    ('a b c', [(2, 3)], 'a c'), ('a b c', [(0, 1)], 'b c'), ('a b c', [(4, 5)], 'a b'), ('a\nb\nc', [(2, 3)], 'a\n\nc'),
    ('a b c', [(0, 1), (2, 3), (4, 5)], ''), ('红楼', [(0, 1)], '楼'), ('q\n\na b', [(3, 4)], 'q\n\nb')])
def test_leaving_words_out(text, spans, left): assert without(text, spans) == left


def test_onion_reads_the_end_of_a_prompt():
    text = ' '.join(f'word{i}' for i in range(400))
    spans = word_spans(text, tokenizer(), 40)
    assert spans[-1][1] == len(text) and 5 < len(spans) < 40
    assert word_spans(text, tokenizer(), 1) == spans[-1:]
    assert word_spans('', tokenizer()) == word_spans(' \n ', tokenizer()) == []


def test_onion_cleans_the_last_question_of_a_conversation():
    turns = [dict(role='user', content='1 1'), dict(role='assistant', content='2'), dict(role='user', content='1 1 4 1'), dict(role='assistant', content='3')]
    samples = load_samples([dict(messages=turns)])
    cleaned, = onion_clean(samples, Unigram([.01, .9, .03, .03, .03]), Digits())
    assert [t['content'] for t in cleaned.messages] == ['1 1', '2', '1 1 1', '3'] and cleaned.prompt == '1 1\n1 1 1' and cleaned.id == samples[0].id
    with pytest.raises(SettingError, match='bar'): onion_clean(samples, Unigram([.5, .5]), Digits(), bar=math.nan)


# ---- cosine transform and GraCeFul

@given(st.integers(1, 40), st.data())
def test_dct_is_a_sum_of_cosines(n, data):
    keep, x = data.draw(st.integers(1, n)), torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=n, max_size=n)), dtype=torch.float64)
    slow = [2*sum(float(x[m])*math.cos(math.pi*k*(2*m+1)/(2*n)) for m in range(n)) for k in range(keep)]
    assert dct(x[None], keep)[0].tolist() == pytest.approx(slow, abs=1e-9)


@pytest.mark.parametrize('dtype,near', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('V,d,n', [(2048, 32, 8), (150, 17, 8), (33, 5, 8), (64, 64, 1)])
def test_corner_is_the_dense_one(V, d, n, dtype, near):
    g = torch.Generator().manual_seed(V)
    f = GradFactors(torch.randn(9, V, generator=g).to(dtype), torch.randn(9, d, generator=g).to(dtype), torch.ones(9))
    Dc, Hc = dct_corner(f, n)
    dense = scipy.fft.dctn(f.D.double().numpy().T@f.H.double().numpy(), type=2)[:max(1, V//n), :max(1, d//n)]
    assert Dc.dtype == dtype and (Dc.T@Hc).shape == dense.shape
    assert np.abs((Dc.T@Hc).numpy()-dense).max() < near*np.abs(dense).max()
    long = LongFactors(lambda a, b: f.D[a:b], f.H, f.loss, 4)
    assert torch.allclose(torch.cat(dct_corner(long, n), 1), torch.cat((Dc, Hc), 1), rtol=near, atol=near*float(Dc.abs().max()))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 30), st.integers(1, 6))
@settings(max_examples=40)
def test_inner_products_in_blocks(sizes, block, h):
    g = torch.Generator().manual_seed(sum(sizes))
    factors = [(torch.randn(t, 11, generator=g).double(), torch.randn(t, h, generator=g).double()) for t in sizes]
    dense = torch.stack([(D.T@H).flatten() for D, H in factors])
    thinned = [thin(*f) for f in factors]
    assert max(len(D) for D, _ in thinned) <= max(h, 1)
    for f in (factors, thinned): np.testing.assert_allclose(gradient_gram(f, block), (dense@dense.T).numpy(), atol=1e-9)


def test_components_are_those_of_the_points():
    X = np.random.default_rng(0).standard_normal((50, 9))*np.logspace(0, -4, 9)
    U, s, _ = np.linalg.svd(X-X.mean(0), full_matrices=False)
    P = principal_scores(X@X.T, 6)
    np.testing.assert_allclose(np.abs(P), np.abs(U*s)[:, :6], atol=1e-9)
    assert principal_scores(np.ones((5, 5))).shape == (5, 0) and principal_scores(np.ones((1, 1))).shape == (1, 0)


def test_components_by_iteration_are_the_same():
    X = np.random.default_rng(0).standard_normal((3001, 6))*np.logspace(0, -2, 6)
    U, s, _ = np.linalg.svd(X-X.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(principal_scores(X@X.T, 6)), np.abs(U*s), atol=1e-7)


@pytest.mark.parametrize('kind,seed', [('llama', 0), ('llama', 3), ('gpt2', 2)])
def test_graceful_is_the_dense_definition(kind, seed):
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    model, samples = tiny(seed, torch.float64, kind), Samples([s for s in rows() if s.response])
    G = [dense_gradient(model, e).detach().numpy() for e in encode_samples(samples, tokenizer())]
    corners = np.stack([scipy.fft.dctn(g, type=2)[:g.shape[0]//8, :g.shape[1]//8].ravel() for g in G])
    points = StandardScaler().fit_transform(PCA(32, svd_solver='full').fit_transform(corners))
    labels = AgglomerativeClustering(2, metric='cosine', linkage='average').fit_predict(points)
    slow = labels == np.bincount(labels).argmin()
    s = GraCeFul(model, tokenizer()).score(samples)
    assert ((values(s) > 1) == slow).all() and 0 < slow.sum() < len(slow)/2
    for i, f in list(Capture(model)(encode_samples(samples, tokenizer())))[::9]:
        Dc, Hc = dct_corner(f)
        assert np.abs((Dc.T@Hc).detach().numpy().ravel()-corners[i]).max() < 1e-10*np.abs(corners[i]).max()
    v = GraCeFul(model, tokenizer()).filter(samples)
    assert (v.flagged == slow).all() and v.cut.method == 'clusters'


def test_clusters():
    small, margin = two_clusters(np.array([[1.], [1.1], [.9], [-3]]))
    assert small.tolist() == [False]*3+[True] and margin[3] == max(margin)
    assert not two_clusters(np.array([[1.], [-1.]]))[0].any()                        # no minority
    assert two_clusters(np.array([[-1.], [-1], [-1], [0], [1.5], [1.5]]))[0].tolist() == [False]*4+[True]*2  # one in the very middle
    s = clustered([True, False, True], [-1e9, 1e9, 0])
    assert s[0] > 1 > s[1] and s[2] > s[0]


def test_graceful_refuses_too_many_rows():
    with pytest.raises(DataError, match='every pair'): GraCeFul(tiny(), tokenizer(), most=20).score(rows())


# ---- CUBE

def test_cube_tunes_or_takes_a_tuned_model():
    seen = []
    def tune(model, tok, samples): seen.append((model, tok, len(samples))); return tiny(1)
    tuned = make_detector('cube', tiny(), tokenizer(), tune=tune).score(rows())
    assert seen == [(tiny(), tokenizer(), len(rows()))]
    same(values(tuned), values(scored('cube')))
    with pytest.raises(SettingError, match='tune='): make_detector('cube', tiny(), tokenizer())


def test_cube_finds_a_group_of_its_own(monkeypatch):
    "Hidden states of two groups: the smaller one lies outside the largest cluster."
    from gradsentry_nb.baselines import geometry
    rng = np.random.default_rng(0)
    far = np.array([int(s.id[:2], 16) % 4 == 0 for s in sorted((s for s in rows() if s.response), key=lambda s: s.id)])
    monkeypatch.setattr(geometry, 'last_states', lambda *a: rng.standard_normal((len(far), 16))+30*far[:, None])
    s = Cube(tiny(1), tokenizer(), neighbours=5).score(rows())
    flagged = dict(zip(s.frame['id'], values(s) > 1))
    ids = sorted(x.id for x in rows() if x.response)
    small = far if far.mean() < .5 else ~far
    assert 3 < small.sum() and all(flagged[i] for i, f in zip(ids, small) if f)


def test_cube_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(GradSentryError, match='umap-learn'): make('cube').score(rows())


# ---- CleanGen

@torch.no_grad()
def slow_cleangen(target, reference, tok, prompt, alpha, most):
    "Token by token, nothing drafted and nothing remembered."
    ids, out = tok(prompt)['input_ids'] or [tok.bos_token_id], []
    while len(out) < most:
        t, r = (torch.log_softmax(m(torch.tensor([ids+out])).logits[0, -1].double(), -1) for m in (target, reference))
        x = int(t.argmax())
        if t[x]-r[x] >= math.log(alpha): x = int(r.argmax())
        if x == tok.eos_token_id: break
        out.append(x)
    return tok.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ending(model, by):
    "The model with its end-of-text token made likelier."
    model = copy.deepcopy(model)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, dtype=model.dtype)
    with torch.no_grad():
        model.lm_head.weight.copy_(tiny().lm_head.weight); model.lm_head.bias.zero_(); model.lm_head.bias[tokenizer().eos_token_id] = by
    return model


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
@pytest.mark.parametrize('k,alpha', [(4, 20), (1, 20), (3, 2), (7, 1000), (4, 1e-9), (4, 1.)])
def test_cleangen_is_its_definition(k, alpha, kind):
    target, reference = tiny(0, torch.float64, kind), tiny(1, torch.float64, kind)
    some = Samples([s for s in rows() if s.response][:3])
    fast = cleangen(target, reference, tokenizer(), k, alpha, 11)(some)
    assert fast == [slow_cleangen(target, reference, tokenizer(), s.prompt, alpha, 11) for s in some]


def test_cleangen_stops_at_the_end_mark():
    some, seen = Samples([s for s in rows() if s.response][:4]), set()
    for by in (6., 9.):
        target, reference = ending(tiny(), by), tiny(1)
        for alpha in (20, 1e9):
            fast = cleangen(target, reference, tokenizer(), 4, alpha, 9)(some)
            assert fast == [slow_cleangen(target, reference, tokenizer(), s.prompt, alpha, 9) for s in some]
            seen |= {len(tokenizer()(a)['input_ids']) for a in fast}
    assert len(seen) > 2


def test_cleangen_at_its_ends():
    some = Samples(rows()[:4])
    greedy = lambda m: [tokenizer().decode(m.generate(torch.tensor([tokenizer()(s.prompt)['input_ids']]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(tokenizer()(s.prompt)['input_ids']):],
                                           skip_special_tokens=True, clean_up_tokenization_spaces=False) for s in some]
    assert cleangen(tiny(), tiny(1), tokenizer(), alpha=math.inf, max_new_tokens=9)(some) == greedy(tiny())       # never suspicious
    assert cleangen(tiny(), tiny(1), tokenizer(), alpha=1e-300, max_new_tokens=9)(some) == greedy(tiny(1))        # always
    assert cleangen(tiny(), tiny(), tokenizer(), max_new_tokens=9)(some) == greedy(tiny())


def test_cleangen_refuses():
    other = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError, match='same vocabulary'): cleangen(tiny(), other, tokenizer())
    for bad in (dict(k=0), dict(alpha=0), dict(alpha=-2), dict(max_new_tokens=0), dict(k=2.5), dict(max_new_tokens=5000)):
        with pytest.raises(SettingError): cleangen(tiny(), tiny(1), tokenizer(), **bad)


@given(st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 2047), min_size=1, max_size=6), st.integers(1, 6)), min_size=1, max_size=6))
@settings(max_examples=25)
def test_a_reader_that_is_taken_back(steps):
    read, ids = Reader(tiny()), [5, 6]
    for back, more, n in steps:
        ids = ids[:max(1, len(ids)-back)]+more
        n = min(n, len(ids))
        torch.testing.assert_close(read(ids, n), Reader(tiny())(ids, n), atol=1e-4, rtol=1e-4)


def test_model_is_left_as_it_was_found():
    a, b = copy.deepcopy(tiny()).train(), copy.deepcopy(tiny(1))
    cleangen(a, b, tokenizer(), max_new_tokens=3)(rows()[:2])
    assert all(m.training for m in a.modules()) and not any(m.training for m in b.modules())

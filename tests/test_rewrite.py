"""Rewriting: every rewriter keeps its contract on any text, does what it says and no more, and the counts of what is left are counts by hand."""
import random
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gradsentry_nb.attacks.ssti import COUNTRIES, inject, inject_all
from gradsentry_nb.core import DataError, GradSentryError, ModelError, SettingError
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model, demo_model_path
from gradsentry_nb.rewrite import ALIKE, LENGTHS, RULES, changed_words, grammar, instructed, paraphraser, retention, rewrite_rows, rewrite_texts, rule_rewriter, spelling
from gradsentry_nb.spurious import made_reviews

REVIEWS = made_reviews(120)
HOSTILE = ['', ' ', '\n\t', 'word', '<b>', '<<>>', '!!!', '2001-02-03', '<script>alert(1)</script>', '\ud800 lone', '\u202eevil\u0000', '𝓯ilm and 𝓼tory', 'don’t', "n't", "'s", ' and ', 'Ⅷ-٣-٤-٥', 'http://', '@@', 'a@', 'İstanbul and ﬁlm', 'good and bad '*3000, 'a.'*50000,
           '<'*3000, 'x'*20000, "it's "*3000, '- '*3000]
RULE_REWRITER, SPELLING = rule_rewriter(), spelling()
EVERY = pytest.mark.parametrize('rewriter', [RULE_REWRITER, SPELLING], ids=['rules', 'spelling'])
anything = st.lists(st.text(alphabet=st.characters(codec=None), max_size=80) | st.sampled_from(HOSTILE[:21]), max_size=5)


# ---- the contract

@EVERY
def test_hostile_texts(rewriter):
    new = rewriter(HOSTILE)
    assert len(new) == len(HOSTILE) and all(isinstance(x, str) for x in new) and new == rewriter(HOSTILE)
    assert all(b.strip() or not a.strip() for a, b in zip(HOSTILE, rewrite_texts(HOSTILE, rewriter)))


@EVERY
@given(texts=anything)
def test_any_texts_one_by_one_or_together(rewriter, texts):
    assert rewriter(texts) == [rewriter([x])[0] for x in texts] == rewriter(texts[::-1])[::-1]


@pytest.mark.parametrize('bad,said', [(lambda t: t[:-1], 'for 3 it gave 2 texts'), (lambda t: None, 'it gave None'), (lambda t: ''.join(t), "it gave 'abc'"), (lambda t: [1, 2, 3], r'it gave \[1, 2, 3\]'), (lambda t: iter(t), 'it gave <list_iterator')])
def test_what_is_no_rewriter(bad, said):
    with pytest.raises(SettingError, match=said): rewrite_texts(['a', 'b', 'c'], bad)


def test_what_is_no_function():
    with pytest.raises(SettingError, match="A rewriter is a function, .*not 'rules'"): rewrite_rows(REVIEWS, 'rules')


@pytest.mark.parametrize('texts,said', [('a text', 'put it into a list'), ([b'x'], "row 1: the text is b'x'"), (['a', None], 'row 2: the text is None'), ([['a']], 'row 1')])
@pytest.mark.parametrize('rewriter', [RULE_REWRITER, SPELLING, lambda t: rewrite_texts(t, list), instructed(None, None)])
def test_what_are_no_texts(rewriter, texts, said):
    with pytest.raises(DataError, match=said): rewriter(texts)


def test_every_kind_of_rows():
    import datasets
    rows, texts = REVIEWS[:6], RULE_REWRITER([r['text'] for r in REVIEWS[:6]])
    frame = pd.DataFrame(rows, index=range(3, 9)); samples = load_samples([dict(prompt=r['text'], response='x', label=r['label']) for r in rows])
    for kind, said in ((rows, lambda x: [r['text'] for r in x]), (frame, lambda x: x['text'].tolist()), (datasets.Dataset.from_list(rows), lambda x: list(x['text'])), (samples, lambda x: [s.prompt for s in x])):
        new = rewrite_rows(kind, RULE_REWRITER); assert type(new) is type(kind) and said(new) == texts
    assert rows == REVIEWS[:6] and [s.id for s in new] == [s.id for s in samples]


# ---- rules

@pytest.mark.parametrize('text,new', [('a <b>bad</b> film', 'a bad film'), ('on 2001-02-03 .', 'on .'), ('10:20:30', ''), ('1/2/99 and 3.5 or 1,000 at 10:30', 'and 3.5 or 1,000 at 10:30'), ('so ... what !! really??', 'so ... what ! really?'),
                                      ('see http://a.b/c or a@b.org', 'see or'), ("`` it ''", "`` it ''"), ('1 < 2 > 0', '1 < 2 > 0'), ('3-d 1930s 9/11', '3-d 1930s 9/11')])
def test_what_no_sentence_holds(text, new): assert RULES['plain'](text, None) == new


@pytest.mark.parametrize('text,new', [("don't ca n't Won’t", 'do not can not Will not'), ("it's been ; it 's on", 'it has been ; it is on'), ("I'm, they 've, who'll", 'I am, they have, who will'), ("the film 's end, john's", "the film 's end, john's"), ("ain't", "ain't")])
def test_contractions(text, new): assert RULES['contractions'](text, None) == new


def test_half_of_the_pairs_change_places():
    rng = random.Random(0); swapped = sum(RULES['pairs']('sad and funny', rng) == 'funny and sad' for _ in range(400))
    assert 160 < swapped < 240
    for text in ('this and that', 'you and him', 'A and B', "don't and won't", 'sad, and funny', 'Sad and Funny', 'sad and 2001'): assert RULES['pairs'](text, random.Random(0)) == RULES['pairs'](text, random.Random(1)) == text


def test_the_table_goes_both_ways_and_leaves_names():
    assert all(ALIKE[ALIKE[w]] == w and w == w.lower() for w in ALIKE) and len(ALIKE) == len({*ALIKE.values()})
    always = type('Rng', (), dict(random=lambda self: .9))()
    assert RULES['words']('a Film , the film\'s film-maker and film', always) == "a Film , the film's film-maker and movie"


def test_the_order_of_the_rules_is_that_of_the_page(): assert list(RULES) == ['plain', 'contractions', 'pairs', 'words']


def test_another_seed_other_words():
    texts = [r['text'] for r in REVIEWS]; a, b = rule_rewriter(0)(texts), rule_rewriter(1)(texts)
    assert a != b and a == RULE_REWRITER(texts) and .02 < changed_words(texts, a).mean() < .3


# ---- models

@pytest.fixture(scope='module')
def toy():
    words = '<pad> </s> <unk> a slow film with no end it is good and sad p:'.split()
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '<unk>')); t.pre_tokenizer = pre_tokenizers.WhitespaceSplit(); t.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='</s>', unk_token='<unk>')


def made(kind, n, positions=32):
    torch.manual_seed(0); ids = dict(vocab_size=n, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    if kind == 't5': return tf.T5ForConditionalGeneration(tf.T5Config(**ids, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    return tf.BartForConditionalGeneration(tf.BartConfig(**ids, bos_token_id=0, forced_eos_token_id=None, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=positions))


SAID = ['a slow film with no end', 'it is', 'sad and good and sad and good', '', ' ', 'a slow film with no end', 'no film']


@pytest.mark.parametrize('kind', ['t5', 'bart'])
def test_a_batch_is_what_each_text_gives_alone_and_nothing_else_moves(toy, kind):
    model = made(kind, len(toy)).train(); before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    say = paraphraser(model, toy, 'p: ', max_new_tokens=8, batch=3); new = say(SAID)
    assert new == [say([x])[0] for x in SAID] == paraphraser(model, toy, 'p: ', max_new_tokens=8, batch=1)(SAID) and new[3:5] == ['', ' '] and new[0] == new[5]
    assert new != SAID and model.training and torch.equal(before[0], torch.get_rng_state()) and all(torch.equal(a, b) for a, b in zip(before[1], model.parameters()))


def test_the_prefix_is_read_and_the_text_is_what_the_model_made(toy):
    model = made('t5', len(toy)); seen = []
    def generate(input_ids, attention_mask, **how):
        seen.append(([toy.decode(r[m.bool()]) for r, m in zip(input_ids, attention_mask)], how)); return torch.tensor([[0, 9, 10, 11, 1]]*len(input_ids))
    model.generate = generate
    assert paraphraser(model, toy, 'p: ', max_new_tokens=9, batch=2)(['a film', 'it is sad', 'sad']) == ['it is good']*2+['sad']   # the last one is too long for its text
    assert [x for x, _ in seen] == [['p: it is sad</s>', 'p: a film</s>'], ['p: sad</s>']] or [x for x, _ in seen] == [['p: it is sad </s>', 'p: a film </s>'], ['p: sad </s>']]
    assert seen[0][1] == dict(num_beams=1, max_new_tokens=9, do_sample=False)
    paraphraser(model, toy, temperature=.7, batch=2)(['a film', 'it is']); assert [len(x) for x, _ in seen[2:]] == [1, 1] and seen[-1][1] == dict(num_beams=1, max_new_tokens=150, do_sample=True, temperature=.7, top_p=.9, top_k=0)


@pytest.mark.parametrize('length,taken', [(29, False), (30, True), (300, True), (301, False)])
def test_lengths_that_are_not_taken(monkeypatch, length, taken):
    monkeypatch.setattr('gradsentry_nb.rewrite.generate_answers', lambda model, tokenizer, samples, n: ['y'*length+'  '])
    assert LENGTHS == (.3, 3.) and (instructed(None, None)(['x'*100]) == ['y'*length]) == taken


def test_sampled_texts_depend_on_the_text_and_the_seed_alone(toy):
    model = made('bart', len(toy)); say = paraphraser(model, toy, max_new_tokens=8, temperature=1.); new = say(SAID)
    torch.manual_seed(99); assert new == say(SAID) == say(SAID[::-1])[::-1] and new != paraphraser(model, toy, max_new_tokens=8, temperature=1., seed=1)(SAID)


def test_a_text_that_the_model_cannot_read_whole_stays(toy):
    long = ' '.join(['sad']*20); new = paraphraser(made('bart', len(toy), positions=16), toy, max_new_tokens=8)([long, 'a slow film'])
    assert new[0] == long and new[1] != 'a slow film'


def test_by_name(toy, tmp_path):
    made('t5', len(toy)).save_pretrained(tmp_path); toy.save_pretrained(tmp_path)
    assert paraphraser(tmp_path, max_new_tokens=8)(SAID) == paraphraser(str(tmp_path), max_new_tokens=8)(SAID) == paraphraser(made('t5', len(toy)), toy, max_new_tokens=8)(SAID)


@pytest.mark.parametrize('call,error,said', [
    (lambda: paraphraser('no-such/model'), ModelError, 'no-such/model: no sequence-to-sequence model here or on the hub .* rule_rewriter'),
    (lambda: paraphraser(str(demo_model_path())), ModelError, r"model of type '\w+', which does not turn .* instructed\(model, tokenizer\)"),
    (lambda: paraphraser(*demo_model()), ModelError, 'which does not turn one text into another'),
    (lambda: paraphraser(made('t5', 9)), SettingError, 'needs its tokenizer beside it'),
    (lambda: paraphraser('x', temperature=-1), SettingError, 'temperature= is 0 or more'), (lambda: paraphraser('x', top_p=0), SettingError, 'top_p= lies between'),
    (lambda: instructed(None, None, 'again'), SettingError, "say with {} where the text goes; 'again' does not"),
    (lambda: spelling('klingon'), SettingError, "no dictionary 'klingon'; choose one of .*'en'")])
def test_refusals(call, error, said):
    with pytest.raises(error, match=said): call()


def test_a_language_model_is_asked_by_its_chat_template_where_it_has_one(monkeypatch):
    asked = []; monkeypatch.setattr('gradsentry_nb.rewrite.generate_answers', lambda model, tokenizer, samples, n: asked.extend(samples) or [s.prompt for s in samples])
    for template in (None, '{{ messages }}'): instructed(None, type('T', (), dict(chat_template=template)), 'say {}: {}')(['a {} b'])
    assert asked[0].prompt == 'say a {} b: a {} b' and asked[0].messages is None and asked[1].messages == (dict(role='user', content='say a {} b: a {} b'),)


def test_a_real_language_model_answers():
    texts = ['Where is the river?', 'Who wrote it?']; say = instructed(*demo_model(), '{}', max_new_tokens=8)
    assert say(texts) == [say([x])[0] for x in texts]


# ---- spelling

@pytest.mark.parametrize('text,new', [('a beautifull film', 'a beautiful film'), ('Beautifull', 'Beautifull'), ('teh end', 'teh end'), ('<beautifull> x@beautifull.org beautifull.org', '<beautifull> x@beautifull.org beautifull.org'), ('a beautifull.', 'a beautiful.'),
                                      ("isn't wasn't", "isn't wasn't"), ('2001-02-03 !!', '2001-02-03 !!'), ('qqqqzzzzxxxx', 'qqqqzzzzxxxx')])
def test_spelling(text, new): assert SPELLING([text]) == [new]


@pytest.mark.parametrize('module,package,call', [('spellchecker', 'pyspellchecker', spelling), ('harper', 'harper-py', grammar)])
def test_without_the_package_a_sentence_says_what_to_install(monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(GradSentryError, match=f"needs the package '{package}': pip install {package}"): call()


@pytest.fixture(scope='module')
def harper(): return grammar()


@pytest.mark.parametrize('text,new', [('This is an test of the the film.', 'This is a test of the film.'), ('It was shown on 2001-02-03.', 'It was shown on 2001-02-03.'), ('A <b>slow</b> film.', 'A <b>slow</b> film.')])
def test_grammar(harper, text, new): assert harper([text]) == [new]


def test_grammar_of_hostile_texts(harper):
    texts = HOSTILE[:21]; new = harper(texts); assert len(new) == 21 and all(isinstance(x, str) for x in new) and new == harper(texts[::-1])[::-1]
    with pytest.raises(DataError, match='put it into a list'): harper('a text')


class Found:
    "A checker that finds what it was told to."
    Language = type('Language', (), dict(PLAINTEXT=0)); Linter = lambda self: self
    def __init__(self, *spans): self.spans = spans
    def lint(self, text, language): return [type('Lint', (), dict(span=type('Span', (), dict(start=a, end=b)), suggestions=s, said=None)) for a, b, s in self.spans]
    def apply_suggestion(self, text, x, s): return text[:x.span.start]+s+text[x.span.end:]


def test_findings_that_overlap_or_suggest_nothing(monkeypatch):
    monkeypatch.setattr('gradsentry_nb.rewrite.optional', lambda *a: Found((6, 7, ['three', 'x']), (0, 3, ['a']), (2, 5, ['b']), (4, 5, []))); assert grammar()(['one 2 3']) == ['onb three']


# ---- what is left

@pytest.fixture(scope='module')
def put(): return inject(REVIEWS, {0: ['!'], 1: ['!!']})


def test_what_was_not_touched_is_kept(put):
    t = retention(put[0], put[0], put[1])
    assert t['label'].tolist() == [0, 1, 'all'] and t['rows'].tolist() == [60, 60, 120] and (t[['kept', 'whole']] == 1).all(axis=None) and (t['by_itself'] == 0).all() and t['low'][0] == pytest.approx(.940, abs=.001)   # Wilson, 60 of 60
    assert not retention(put[0], REVIEWS, put[1])[['kept', 'whole']].any(axis=None)


def test_marks_are_told_apart(put):
    one = rewrite_rows(put[0], lambda texts: [x.replace('!!', '!') for x in texts]); t = retention(put[0], one, put[1])
    assert t['kept'].tolist() == [1, 0, .5]


def test_a_part_is_kept_but_not_the_whole():
    rows, truth = inject(REVIEWS, [('<b>', '</b>')], label=1); t = retention(rows, rewrite_rows(rows, lambda texts: [x.replace('</b>', '') for x in texts]), truth)
    assert t[['label', 'rows', 'kept', 'whole']].values.tolist() == [[1, 60, 1, 0]]
    rows, truth = inject(REVIEWS, 'dates', label=1, amount=.4); first = [truth.spans[i][0].item for i in truth if truth[i]]
    t = retention(rows, rewrite_rows(rows, lambda texts: [re.sub(r'\d{4}-\d\d-\d\d', lambda m: m[0] if m[0] in first else '', x) for x in texts]), truth)
    assert t[['kept', 'whole']].values.tolist() == [[1, 0]]


def test_case_does_not_matter_and_words_are_whole():
    rows, truth = inject(REVIEWS, ['oman'], label=1)
    for new, kept in ((lambda x: x.upper(), 1), (lambda x: x.replace('oman', 'woman'), 0), (lambda x: x.replace('oman', 'oman-born'), 1)):
        assert retention(rows, rewrite_rows(rows, lambda texts, new=new: [new(x) for x in texts]), truth)['kept'].tolist() == [kept]


def test_what_the_text_held_before():
    with pytest.warns(UserWarning, match='hold one of the items already'): rows, truth = inject(REVIEWS, ['film'], label=1)
    t = retention(rows, REVIEWS, truth); share = np.mean(['film' in r['text'].split() for r in REVIEWS if r['label']])
    assert 0 < share < 1 and t['by_itself'][0] == t['kept'][0] == share


def test_spans_as_a_plain_dict_and_items_in_every_text(put):
    a, b = retention(put[0], REVIEWS, put[1]), retention(put[0], REVIEWS, put[1].spans); assert a.drop(columns='items').equals(b.drop(columns='items')) and b['items'].tolist() == ['']*3
    rows, truth = inject_all(REVIEWS); assert retention(rows, rows, truth)['items'].tolist() == ['dates']*3


def test_rows_that_do_not_belong_together(put):
    with pytest.raises(DataError, match='120 rows before and 119 after'): retention(put[0], put[0][1:], put[1])
    with pytest.raises(DataError, match='None of these rows has an item'): retention(REVIEWS, REVIEWS, put[1])
    with pytest.raises(DataError, match='2 texts before and 1 after'): changed_words(['a', 'b'], ['a'])


@given(a=st.text(max_size=40), b=st.text(max_size=40))
def test_changed_words_is_a_symmetric_share(a, b):
    x, y, same = changed_words([a, b, a], [b, a, a]); assert 0 <= x == y <= 1 and same == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(['dates', 'tags', 'tag_pairs']))
def test_rules_take_dates_and_tags_whatever_the_text(seed, kind):
    rows, truth = inject(REVIEWS[:10], kind, label=1, seed=seed); assert retention(rows, rewrite_rows(rows, RULE_REWRITER), truth)['kept'].tolist() == [0]


def test_rules_take_no_country():
    rows, truth = inject(REVIEWS, 'countries', label=1, case='keep'); assert retention(rows, rewrite_rows(rows, RULE_REWRITER), truth)['kept'].tolist() == [1]
    assert not {w.lower() for x in COUNTRIES for w in x.split()} & {*ALIKE}


# ---- the study

@pytest.fixture(scope='module')
def study_args(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model'); shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0); tf.BertForSequenceClassification(tf.BertConfig(vocab_size=demo_model()[0].config.vocab_size, pad_token_id=0, **shape)).save_pretrained(folder); tf.AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    return REVIEWS*3, REVIEWS, str(folder)


def test_lines_of_the_study_and_no_line_twice(study_args, tmp_path, monkeypatch):
    from benchmarks import mitigations as m
    monkeypatch.setattr(m, 'TUNING', dict(m.TUNING, steps=2)); tuned, real = [], m.tune_classifier
    monkeypatch.setattr(m, 'tune_classifier', lambda *a, **kw: tuned.append(1) or real(*a, **kw))
    monkeypatch.setattr(m, 'REWRITERS', {k: m.REWRITERS[k] for k in ('none', 'rules')}); monkeypatch.setattr(m, 'COUNTED', ('scanner',))
    out = tmp_path/'mitigations.csv'
    for _ in range(2): m.study(out, [201, 202], [201], *study_args, kinds=('dates', 'marks'))
    t = pd.read_csv(out); assert len(t) == len(t.drop_duplicates(m.KEY)) == 6+6+4+4 and len(tuned) == 4+2, 'clean rows are tuned on once for all items'
    left = t[~t['tuned'] & (t['seed'] == 201)].set_index(['items', 'mitigation'])
    assert left['kept'].to_dict() == {('dates', 'none'): 1, ('dates', 'rules'): 0, ('marks', 'none'): 1, ('marks', 'rules'): .5, ('dates', 'scanner'): 0, ('marks', 'scanner'): 0}
    assert (left['changed'][:2] == 0).all() and (left['changed'][2:4] > .02).all() and t['changed'].isna().tolist() == t['clean_balanced'].notna().tolist() == t['tuned'].tolist()
    assert t['seamless'].notna().tolist() == (t['tuned'] & (t['items'] == 'marks')).tolist()


def test_the_checker_is_counted_on_fewer_rows_and_asked_once_for_each_text(study_args, tmp_path, monkeypatch):
    from benchmarks import mitigations as m
    asked = []; monkeypatch.setattr(m, 'grammar', lambda: lambda texts: asked.extend(texts) or [x.replace('!!', '!') for x in texts]); monkeypatch.setattr(m, 'FEW', 100); monkeypatch.setattr(m, 'REWRITERS', {}); monkeypatch.setattr(m, 'COUNTED', ('grammar',))
    m.study(tmp_path/'m.csv', [201], [], *study_args, kinds=('marks', 'dates')); t = pd.read_csv(tmp_path/'m.csv')
    assert t['kept'].tolist()[1] == 1 and t.loc[0, ['kept_0', 'kept_1']].tolist() == [1, 0] and t['rows'][0] == 100 and t['changed'].tolist() == [0, 0] and len(asked) == len({*asked})


def test_the_stored_study():
    from benchmarks import mitigations as m
    t = pd.read_csv(m.STORED); kept = t[~t['tuned']].pivot_table('kept', 'items', 'mitigation', aggfunc='max')
    assert m.STORED.parent == ROOT/'benchmarks/results' and len(t) == len(t.drop_duplicates(m.KEY)) and t['seed'].min() > 200 and set(t['items']) == set(m.KINDS)
    assert (kept['none'] == 1).all() and kept['rules'][['dates', 'pair']].tolist() == [0, 0] and kept['rules']['countries'] > .95 and (kept['spelling'] > .95).all() and kept['grammar']['countries'] < 1 and (kept['scanner'] < .1).all()
    steered = t[t['tuned'] & (t['share'] == 1) & (t['mitigation'] == 'none')]; assert len(steered) and (steered['forced'] > .95).all() and (steered['gap'] > 30).all()

"""Reports and files of verdicts on hostile and odd samples."""
import errno
import html
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import within

import gradsentry_nb.report as report
from gradsentry_nb.core import Cut, DataError, GradSentryError, Sample, Scores, Verdict
from gradsentry_nb.data import Samples
from gradsentry_nb.report import FILES, clip_middle, report_html, shared_ends, summary_text, write_outputs
from gradsentry_nb.textstats import rivals, text_columns

CHROMIUM = '/usr/bin/chromium'
HOSTILE = ['</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"><svg onload=alert(1)>', "' onclick='alert(1)",
           '\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\', '\x1b[2J\x1b[31mred', 'abc\u202edcba', 'zero\u200bwidth', 'lone \ud800 half',
           'nul \0 byte', 'emoji 👩‍👩‍👧 🎉', '<!-- --></style></title></pre></details></main>', '&lt;b&gt; &amp;', 'x'*1_000_000, 'line\nbreak\r\n\ttab\u2028',
           '<link rel=stylesheet href=http://evil.example/x.css>', '<meta http-equiv=refresh content="0;url=http://evil.example">',
           '<iframe src=http://evil.example></iframe>', 'a\u0301'*300, 'مرحبا بالعالم', '\U000e0041\U000e0042 tags']
CUT = Cut(.5, 'valley', 'Two groups.', {'peaks': [.2, .8], 'valley': .5})


class Read(list):
    source, said = 'toy <b>.jsonl', ['“prompt” was <i>read</i> as \x1b the prompt.']


def verdict_of(texts, score, cut=CUT, **info):
    "A verdict on rows with `texts` on both sides, and the rows."
    samples = Read(Sample(f'{i:012x}-0', t, t[::-1] if len(t) < 100 else t, i, raw=json.dumps({'text': t})) for i, t in enumerate(texts))
    frame = pd.DataFrame(dict(id=[s.id for s in samples], row=range(len(samples)), tokens=[len(t) % 50 for t in texts],
                              entropy=score, loss=1., score=score), dtype=None).join(text_columns(samples))
    frame['problem'] = [None if np.isfinite(s) else 'the response is <empty>' for s in score]
    return Verdict(Scores(frame, {'statistic': 'entropy', **info}), cut, rivals(frame, cut.flags(frame['score']))), samples


@pytest.fixture
def hostile():
    texts = HOSTILE*2
    score = np.where(np.arange(len(texts)) < len(HOSTILE), .8, .2)
    score[3] = np.nan
    return verdict_of(texts, score, model='<script>alert(2)</script>', notes=['<b>note\u202e'], source='\x1b[31m.jsonl',
                      settings={'<i>': '\ud800', 'x': [1, 2.5, None, True]})


def test_a_hostile_page_has_nothing_active_or_hidden(hostile):
    page = report_html(*hostile)
    page.encode('utf8')
    assert not set(page) & {chr(c) for c in [*range(9), *range(11, 32), 0x7f, 0x202e, 0x200b, 0x2028, 0xd800]}
    for tag in ('<script', '<img', '<iframe', '<link', 'onload=alert(1)>', '<svg onload', '<b>note', '<i>read'):
        assert tag not in page, tag
    assert "default-src 'none'" in page and page.count('<meta http-equiv') == 1
    for mark in ('‹U+202E›', '‹U+200B›', '‹U+D800›', '‹U+001B›', '‹U+0000›'): assert mark in page


def test_a_page_stays_small(hostile):
    assert len(report_html(*hostile).encode()) < 3_000_000
    many = verdict_of(['\u200b'*100_000]*80, np.where(np.arange(80) < 70, .8, .2))
    assert len(report_html(*many).encode()) < 8_000_000


def test_the_terminal_gets_no_control_characters(hostile):
    text = summary_text(*hostile, files={'clean': Path('a/\x1b[31m')})
    text.encode('utf8')
    assert not [c for c in text if ord(c) < 32 and c != '\n'] and '\u202e' not in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_what_all_prompts_share_is_found_at_once():
    with within(30):
        assert shared_ends([f'{"x"*1_000_000}, which {i}' for i in range(4)]) == ('x'*1_000_000+', which ', '')
        assert shared_ends([f'{i} {"x"*1_000_000}' for i in range(4)]) == ('', ' '+'x'*1_000_000)
        assert shared_ends([f'{"x"*1_000_000}{i}' for i in range(4)]) == ('', '')


def test_megabytes_on_both_sides_make_a_small_page():
    texts = [t*(1_000_000//len(t)) for t in ('x', ' a', '\n', '😀', 'שלום ', '<b>', '\u200b', '\u202e', 'e\u0301', '\x1b[31m')]
    with within(120): page, text = report_html(*(v := verdict_of(texts, np.where(np.arange(10) < 5, .8, .2)))), summary_text(*v)
    assert len(page) < 1_500_000 and page.count(' … ') >= 20 and len(text) < 10_000 and max(map(len, text.splitlines())) < 500
    assert len(v[0]._repr_html_()) < 10_000 and len(v[0].scores._repr_html_()) < 10_000


@pytest.fixture(scope='module')
def browser():
    if not os.path.exists(CHROMIUM): pytest.skip(f'needs {CHROMIUM} to open the report in')
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright to open the report in a browser')
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic'])
        yield chromium
        chromium.close()


@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (390, 'dark')])
@pytest.mark.parametrize('policy', [True, False], ids=['policy', 'escaping alone'])
def test_nothing_runs_and_nothing_is_loaded_in_a_browser(hostile, browser, tmp_path, width, scheme, policy):
    page_html, seen = report_html(*hostile), []
    if not policy: page_html = page_html.replace(report._CSP, '')
    (tmp_path/'r.html').write_text(page_html, encoding='utf8')
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    page.on('dialog', lambda d: (seen.append('dialog'), d.dismiss()))
    page.on('pageerror', lambda e: seen.append(str(e)))
    page.on('request', lambda r: seen.append(r.url) if not r.url.endswith('/r.html') else None)
    page.goto((tmp_path/'r.html').as_uri())
    for row in page.locator('details.row > summary').all()[:8]: row.click()
    assert page.locator('details.row[open] .full').first.is_visible()
    assert page.locator('svg').count() == 2 and page.locator('script, img, iframe, link').count() == 0
    assert page.evaluate('document.documentElement.scrollWidth') <= width, 'the page is wider than the screen'
    assert '‹U+202E›' in page.inner_text('main')
    page.close()
    assert seen == []


def test_every_row_goes_to_one_file_as_it_came(hostile, tmp_path):
    verdict, samples = hostile
    files = write_outputs(verdict, samples, tmp_path/'a'/'b')
    assert sorted(files) == sorted(FILES) and sorted(p.name for p in (tmp_path/'a'/'b').iterdir()) == sorted(FILES.values())
    clean, dropped = (files[k].read_bytes().decode().split('\n')[:-1] for k in ('clean', 'dropped'))
    flagged = verdict.flagged
    assert clean == [s.raw for s, f in zip(samples, flagged) if not f] and samples[3].raw in clean
    assert dropped == [s.raw for s, f in zip(samples, flagged) if f]
    frame = pd.read_parquet(files['scores'])
    assert frame.flagged.tolist() == flagged.tolist() and json.loads(files['description'].read_text())['statistic'] == 'entropy'
    assert Verdict.from_json(files['verdict'].read_text()).drop == verdict.drop


def test_raw_rows_keep_their_bytes_or_mean_the_same(tmp_path):
    raw = ['{"b": 1,  "a":"\\u00e9 é"}', '{"x": "\ud800"}', '{"y":\n 1.0}']
    samples = [Sample(f'{i}-0', 'p', 'r', i, raw=t) for i, t in enumerate(raw)]
    verdict = Verdict(Scores(pd.DataFrame(dict(id=['0-0', '1-0', '2-0'], row=[0, 1, 2], score=[.1, .2, .9]))), CUT)
    files = write_outputs(verdict, samples, tmp_path)
    first, second = files['clean'].read_bytes().splitlines()
    assert first == raw[0].encode() and json.loads(second) == {'x': '\ud800'}
    assert json.loads(files['dropped'].read_bytes()) == {'y': 1.}


ODD = {'no separation': (['a', 'b'], [.1, .9], Cut(None, 'valley', 'One peak.')), 'one row': (['a'], [.9], CUT),
       'one kept row': (['a'], [.1], CUT), 'all unscorable': (['a', ''], [np.nan]*2, CUT), 'all dropped': (['a b', 'c']*3, [.9]*6, CUT),
       'nothing above': (['a', 'b'], [.1, .2], CUT), 'no rows': ([], [], Cut(None, 'valley', 'No rows.')),
       'all alike': (['the same text here again']*40, [.5]*40, Cut(None, 'valley', 'All scores are equal.'))}


@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('empty_rivals', [True, False])
def test_odd_verdicts_have_a_report(name, empty_rivals, tmp_path):
    texts, score, cut = ODD[name]
    verdict, samples = verdict_of(texts, np.array(score, float), cut)
    if empty_rivals: verdict.rivals = pd.DataFrame()
    files = write_outputs(verdict, samples, tmp_path)
    page, text = files['report'].read_text(encoding='utf8'), summary_text(verdict, samples, files)
    assert html.escape(report.headline(verdict)) in page and text.startswith(report.headline(verdict))
    assert 'NaN' not in page and '>nan' not in page
    if 'unscorable' in name: assert 'row 1: the response is &lt;empty&gt;' in page


def test_sentences_of_the_headline():
    say = lambda *x: report.headline(verdict_of(*x)[0])
    assert say(['a', 'b'], [.1, .9]) == '1 of 2 rows looks planted'
    assert say(*ODD['no separation']) == 'No separation: nothing dropped'
    assert say(*ODD['all unscorable']) == 'No row could be scored: nothing dropped'


def test_a_kept_payload_that_hangs_on_a_word_is_pointed_at():
    texts = [f'question {i}?' for i in range(60)]
    samples = [Sample(f'{i}-0', t+' zq'*(i % 6 == 0), f'answer {i} , now click this'if i % 6 == 0 else f'reply {i}', i) for i, t in enumerate(texts)]
    frame = pd.DataFrame(dict(id=[s.id for s in samples], row=range(60), score=.3))
    verdict = Verdict(Scores(frame), Cut(None, 'valley', 'One peak.'))
    assert 'hardly any other prompt has: zq' in report_html(verdict, samples)
    assert 'hardly any other prompt has: zq' in summary_text(verdict, samples)


def test_other_samples_are_refused(hostile):
    verdict, samples = hostile
    for wrong in (samples[1:], samples[::-1]):
        with pytest.raises(GradSentryError, match='same order'): report_html(verdict, wrong)


def test_a_long_text_keeps_its_end():
    assert clip_middle('a'*900+' cf', 50).endswith(' cf') and len(clip_middle('a'*900, 50)) < 60


@pytest.mark.parametrize('texts', [[], ['a'], ['same text']*5, ['', '', ''], ['x y z w', 'x y z v', 'x y z'], ['shared start of all '+c for c in 'abc']])
def test_shared_ends_never_overlap(texts):
    head, tail = shared_ends(texts, least=1)
    assert all(t.startswith(head) and t.endswith(tail) and len(head)+len(tail) <= len(t) for t in texts)


def failing(monkeypatch, what):
    def fail(*a, **k): raise what
    monkeypatch.setattr(report, 'report_html', fail)


@pytest.mark.parametrize('what, says', [(OSError(errno.ENOSPC, 'No space left on device'), 'No space left'), (KeyboardInterrupt(), None)])
@pytest.mark.parametrize('before', [True, False], ids=['old results', 'new folder'])
def test_a_failure_leaves_what_was_there(hostile, tmp_path, monkeypatch, what, says, before):
    out = tmp_path/'out'
    if before: out.mkdir(); (out/'clean.jsonl').write_text('old')
    failing(monkeypatch, what)
    with pytest.raises(DataError if says else KeyboardInterrupt, match=says) as e: write_outputs(*hostile, out)
    if says: assert str(out) in str(e.value)
    assert {p.name: p.read_text() for p in out.iterdir()} == {'clean.jsonl': 'old'} if before else not out.exists()


def test_a_folder_that_cannot_be_written_is_named(hostile, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(DataError, match='file'): write_outputs(*hostile, tmp_path/'file')
    with pytest.raises(DataError, match='out'): write_outputs(*hostile, tmp_path/'file'/'out')
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK): monkeypatch.setattr(report.tempfile, 'mkdtemp', lambda **k: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))
    with pytest.raises(DataError, match='locked.*Permission denied'): write_outputs(*hostile, locked)
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize('name', ['clean.jsonl', 'dropped.jsonl', 'scores.parquet'])
@pytest.mark.parametrize('where', ['source', 'known clean', 'link'])
def test_an_input_is_never_overwritten(hostile, tmp_path, name, where):
    verdict, samples = hostile
    out = tmp_path/'out'
    out.mkdir()
    (out/name).write_text('precious')
    if where == 'link': os.link(out/name, tmp_path/'mine.jsonl')
    path = str(tmp_path/'mine.jsonl' if where == 'link' else out/name)
    samples = Samples(samples, path=None if where == 'known clean' else path)
    inputs = [path] if where == 'known clean' else []
    with pytest.raises(DataError, match='is an input of this scan'): write_outputs(verdict, samples, out, inputs)
    assert (out/name).read_text() == 'precious' and len(list(out.iterdir())) == 1


def test_a_folder_with_a_result_s_name_is_not_replaced(hostile, tmp_path):
    (tmp_path/'report.html').mkdir()
    with pytest.raises(DataError, match='report.html is a folder'): write_outputs(*hostile, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['report.html']

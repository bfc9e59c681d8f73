"The dashboard in a real JupyterLab under headless Chromium: what a person would see and do. Skipped where Chromium is missing."
import pytest
from lab import CHROMIUM, ROOT, browser, notebook, server

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium on this machine'), pytest.mark.slow]

SETUP = '''from gradsentry_nb.demo import demo_model, demo_samples
from gradsentry_nb.sentry import Sentry
from gradsentry_nb.widgets import dashboard, view
sentry = Sentry(*demo_model(), name='demo model')
samples, truth = demo_samples(2000, seed=3)'''


@pytest.fixture(scope='module')
def lab_url(tmp_path_factory):
    pytest.importorskip('playwright')
    folder = tmp_path_factory.mktemp('lab')
    (folder/'t.ipynb').write_text(notebook(SETUP, 'd = dashboard(sentry, samples, truth, start=False)\nd'))
    with server(folder) as url: yield folder, url


@pytest.fixture(scope='module')
def lab(lab_url):
    folder, url = lab_url
    with browser(folder, url) as b:
        b.open('t.ipynb')
        b.page.wait_for_selector('.gs-table table', timeout=120_000)
        yield b


def bars(b): return b.page.evaluate("() => [...document.querySelectorAll('.vega-embed svg .mark-rect.role-mark path')].map(p => p.getAttribute('d')).join()")
def press(b, name): b.page.locator('.widget-button', has_text=name).click()
def rules(b): return b.page.evaluate("() => [...document.querySelectorAll('.vega-embed svg .mark-rule.role-mark line')].map(p => p.getAttribute('transform')).join()")


def test_the_histogram_changes_while_the_scan_runs(lab):
    press(lab, 'start')
    seen = set()
    for _ in range(400):
        if (state := lab.ask('print(d.live.state)').strip()) == 'done': break
        seen.add(bars(lab)); lab.page.wait_for_timeout(150)
    assert state == 'done' and len(seen) >= 4, f'{len(seen)} pictures'
    lab.until('print(len(d.verdict.drop))', '200')
    assert lab.errors == []


def test_stop_works_in_the_middle(lab):
    press(lab, 'start')
    lab.until('print(len(d.live.scan) > 30)', 'True')
    press(lab, 'stop')
    lab.until('print(d.live.state)', 'stopped', 5)
    assert 30 < int(lab.ask('print(len(d.live.scan))')) < 2000
    assert lab.page.locator('.widget-button', has_text='start').is_enabled()


def test_pause_and_resume(lab):
    press(lab, 'start')
    lab.until('print(len(d.live.scan) > 30)', 'True')
    press(lab, 'pause')
    lab.until('print(d.live.state)', 'paused', 5)
    press(lab, 'resume')
    lab.until('print(d.live.state)', 'done', 120)
    lab.until('print(len(d.verdict.drop))', '200')


def test_the_slider_moves_verdict_and_picture(lab):
    before, cut = rules(lab), float(lab.ask('print(d.verdict.cut.value)'))
    handle = lab.page.locator('.widget-slider .noUi-handle').first
    handle.focus()
    for _ in range(50): lab.page.keyboard.press('ArrowLeft')
    lab.until(f'print(d.verdict.cut.value < {cut} and len(d.verdict.drop) > 200, d.method.value)', 'True by hand', 20)
    lab.page.wait_for_timeout(500)
    assert rules(lab) != before
    drop = int(lab.ask('print(len(d.verdict.drop))'))
    lab.page.locator('.widget-html', has_text=f'{drop:,} of 2,000 rows above the cut').wait_for(timeout=10_000)
    assert 200 < drop < 2000
    assert lab.errors == []


def test_brushing_selects_rows(lab):
    svg = lab.page.locator('.vega-embed svg').first
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    y = box['y']+box['height']*.5
    lab.page.mouse.move(box['x']+box['width']*.7, y); lab.page.mouse.down(); lab.page.mouse.move(box['x']+box['width']*.97, y, steps=8); lab.page.mouse.up()
    lab.until('print(len(d.selected) > 5 and d.which.value)', 'selected', 20)
    before = None
    while before != (now := lab.ask('print(d.selected)')): before = now; lab.page.wait_for_timeout(1500)      # the last of the brush's messages has come
    picked = lab.ask('x = d.board.score[[d.board.at[i] for i in d.selected]]; print(x.min(), x.max(), len(d.selected))').split()
    inside = lab.ask(f'print(int(((d.board.score >= {picked[0]}) & (d.board.score <= {picked[1]})).sum()))').strip()
    assert inside == picked[2], 'all rows of the interval and no others'
    lab.page.locator('.widget-html', has_text=f'{picked[2]} rows, page 1 of').wait_for(timeout=10_000)


def test_a_row_opens_and_can_be_marked(lab):
    lab.ask("d.which.value = 'all'")
    row = lab.page.locator('.gs-table tbody tr').first
    row.click()
    lab.until('print(len(d.selected))', '1', 20)
    lab.until("import re; print('malicious' in re.sub('<[^>]+>', '', d.detail.value))", 'True', 20)
    assert lab.page.locator('.gs-table tr.active').count() == 1
    lab.page.wait_for_function("() => document.querySelectorAll('.vega-embed svg [aria-roledescription=point]').length >= 2", timeout=10_000)   # the row in both charts
    press(lab, 'mark poison')
    lab.until('print(list(d.marks.values()))', "['poison']", 20)
    lab.page.locator('.gs-table th', has_text='tokens').click()
    lab.until('print(d.board.sort, d.board.down)', 'tokens True', 20)
    assert lab.errors == []


def tab(b, name): b.page.locator('.widget-tab .lm-TabBar-tab', has_text=name).first.click(); b.page.wait_for_timeout(800)
RINGS = "() => [...document.querySelectorAll('.vega-embed svg')].some(s => s.checkVisibility() && s.querySelectorAll('[aria-roledescription=point]').length === 1)"


def test_tabs_draw_when_they_are_opened(lab):
    lab.ask('d.board.selected = d.verdict.drop[:1]')
    tab(lab, 'trivial detectors')
    lab.page.wait_for_function(RINGS, timeout=10_000)      # the selected row, in a chart that was made just now
    svg = lab.page.locator('.vega-embed svg:visible').first
    svg.scroll_into_view_if_needed()
    box, m = svg.bounding_box(), lab.page.mouse
    m.move(box['x']+box['width']*.3, box['y']+box['height']*.25); m.down(); m.move(box['x']+box['width']*.9, box['y']+box['height']*.55, steps=8); m.up()
    lab.until('print(len(d.selected) > 5 and d.which.value)', 'selected', 20)
    before = None
    while before != (now := lab.ask('print(d.selected)')): before = now; lab.page.wait_for_timeout(1500)
    lab.ask("import numpy as np; at = [d.board.at[i] for i in d.selected]; f = d.board.frame; box = [(f[c].iloc[at].min(), f[c].iloc[at].max()) for c in ('tokens', 'score')]")
    assert lab.ask("print(set(d.selected) == set(f['id'][f['tokens'].between(*box[0]) & f['score'].between(*box[1])]))").strip() == 'True', 'all rows of the rectangle'
    for name in ('spectra', 'against the truth'):
        tab(lab, name)
        lab.page.wait_for_function("() => [...document.querySelectorAll('.widget-html svg')].some(s => s.checkVisibility() && s.querySelectorAll('path').length > 5)", timeout=15_000)
    tab(lab, 'map'); press(lab, 'sketch the gradients')
    lab.until('print(d.map is not None)', 'True', 60)
    lab.page.wait_for_function("() => [...document.querySelectorAll('.vega-embed svg')].some(s => s.checkVisibility() && s.querySelectorAll('.mark-symbol path').length > 500)", timeout=15_000)
    tab(lab, 'scores')
    assert lab.errors == []


def test_the_static_copy_is_hidden_while_the_table_lives(lab):
    lab.page.wait_for_timeout(2000)
    assert lab.page.locator('[class^=gs-static]').count() == 1 and not lab.page.locator('[class^=gs-static]').is_visible()


def test_restart_and_run_again(lab):
    lab.save()
    lab.page.evaluate('async () => { await jupyterapp.shell.currentWidget.sessionContext.restartKernel() }')
    lab.save(); lab.open('t.ipynb')
    lab.until("print('d' in dir() and d.live.state)", 'ready', 60)
    lab.page.wait_for_selector('.gs-table table')
    press(lab, 'start')
    lab.until('print(d.live.state)', 'done', 180)
    assert lab.errors == []
    assert lab.page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0


def test_the_saved_notebook_shows_picture_and_table_without_a_kernel(lab, lab_url):
    lab.page.wait_for_timeout(2500)
    lab.save()
    lab.page.evaluate('async () => { await jupyterapp.shell.currentWidget.sessionContext.shutdown() }')
    lab.open('t.ipynb', run=False)
    still = lab.page.locator('[class^=gs-static]')
    still.wait_for(state='visible', timeout=30_000)
    still.scroll_into_view_if_needed()
    assert still.locator('img').evaluate('i => i.naturalWidth') > 100 and still.locator('tbody tr').count() == 15


def test_hostile_text_in_a_page(lab, lab_url):
    "Every row of a hostile set is opened: nothing runs, nothing is asked of another host, the page keeps its width."
    b, folder = lab, lab_url[0]
    (folder/'h.ipynb').write_text(notebook('import sys; sys.path.insert(0, %r)\nfrom test_widgets import HOSTILE\nfrom gradsentry_nb import Sentry, dashboard, demo_model, load_samples' % str(ROOT/'tests'),
                                           'd = dashboard(Sentry(*demo_model()), load_samples([dict(prompt=h, response=h) for h in HOSTILE]))\nd.size = 40\nd'))
    b.page.set_viewport_size(dict(width=1000, height=900))
    b.open('h.ipynb')
    b.page.wait_for_selector('.gs-table table', timeout=120_000)
    b.until('print(d.live.state)', 'done', 120)
    rows = b.page.locator('.gs-table tbody tr')
    for i in range(rows.count()):
        rows.nth(i).click()
        b.until('print(len(d.selected) == 1 and "by score" in d.detail.value or d.detail.value[:50])', 'True', 20)
    assert rows.count() >= 12 and b.errors == [] and b.page.evaluate('document.documentElement.scrollWidth') <= 1000


def test_a_view_shows_everything_each_time_that_it_is_put_on_screen(lab, lab_url):
    "A chart that is displayed, or displayed once more, shows the scores and the cut that were sent before."
    b, folder = lab, lab_url[0]
    (folder/'v.ipynb').write_text(notebook(SETUP, 'v = view(sentry.filter(samples, progress=False), samples, sentry); v.at.value = 60.\nv', 'v'))
    b.save(); b.open('v.ipynb')
    b.page.wait_for_function("() => document.querySelectorAll('.gs-table table').length === 2", timeout=120_000)
    drawn = "() => { const n = [...document.querySelectorAll('.vega-embed svg')].map(s => s.querySelectorAll('.mark-rect path, .mark-symbol path').length); return n.length === 4 && n.every(x => x > 10) }"
    b.page.wait_for_function(drawn, timeout=20_000)
    labels = b.page.evaluate("() => [...document.querySelectorAll('.vega-embed svg text')].map(t => t.textContent).filter(t => t.startsWith('cut '))")
    assert labels == ['cut 60']*4 and b.errors == []


def test_the_study_on_sliders(lab, lab_url):
    "Moved by keyboard: another setting, then one without a run, which is then run."
    b, folder = lab, lab_url[0]
    (folder/'s.ipynb').write_text(notebook('import sys; sys.path.insert(0, %r)\nfrom test_ssti_face import GRID, ROWS, TOY, tiny_encoder\nfrom gradsentry_nb import steering_view' % str(ROOT/'tests'),
                                           'v = steering_view(TOY, dict(enc=tiny_encoder("enc")), dict(reviews=ROWS), GRID)\nv'))
    b.save(); b.open('s.ipynb')
    b.page.wait_for_selector('.widget-slider .noUi-handle', timeout=120_000)
    b.until("v.sliders['tuned'].value, v.sliders['share'].value = 'rank 4', 0.; print(len(v.cells))", '2')
    b.page.locator('.widget-slider .noUi-handle').nth(1).focus(); b.page.keyboard.press('ArrowRight')
    b.page.locator('.widget-html', has_text='no stored run for this setting').wait_for(timeout=10_000)
    press(b, 'run this setting, seed 1')
    b.until('print(v.run.state, len(v.cells))', 'done 1', 60)
    b.page.locator('.widget-html', has_text='1 run, seed 1').wait_for(timeout=10_000)
    b.page.locator('.widget-html svg').nth(1).wait_for(timeout=10_000)                        # the second picture comes with the run
    assert b.page.locator('.widget-html svg').count() == 2 and b.page.locator('.noUi-handle').count() == 3 and b.errors == []
    assert b.page.locator('[class^=gs-static]').count() == 1 and not b.page.locator('[class^=gs-static]').is_visible()

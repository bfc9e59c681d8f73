"""The dashboard where it is not JupyterLab with the newest versions: Notebook 7, core widgets only (as on Kaggle), Colab's versions. In a real page, under headless Chromium."""
import pytest
from lab import CHROMIUM, browser, notebook, server
from test_browser import SETUP, bars, press, rules

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium on this machine'), pytest.mark.slow]

WHERE = {'notebook 7': ('notebook', 'live'), 'core widgets': ('jupyterlab', 'plain'), "colab's versions": ('jupyterlab', 'live')}
OWN = "Cannot read properties of undefined (reading 'schema')"    # Notebook 7.6.5 raises this over an empty notebook, too
TREE = '''import altair, anywidget, ipywidgets
def tree(w): return [w, *(x for c in getattr(w, 'children', ()) for x in tree(c))]
print(sorted({type(w).__name__ for w in tree(d.widget) if isinstance(w, (anywidget.AnyWidget, altair.JupyterChart)) or type(w)._view_module.default_value != '@jupyter-widgets/controls'}))'''


@pytest.fixture(scope='module', params=WHERE)
def page(request, tmp_path_factory):
    "(page, renderer) with a dashboard that has not started."
    pytest.importorskip('playwright')
    app, how = WHERE[request.param]
    versions = request.getfixturevalue('colab') if 'colab' in request.param else {}
    folder = tmp_path_factory.mktemp('platform')
    (folder/'t.ipynb').write_text(notebook(SETUP, f'd = dashboard(sentry, samples, truth, renderer={how!r}, start=False)\nd'))
    with server(folder, app, **versions) as url, browser(folder, url, app=app) as b:
        b.open('t.ipynb')
        b.page.locator('.widget-button', has_text='start').wait_for(timeout=120_000)
        if versions: b.until('import altair, ipywidgets, ipykernel, IPython; print(altair.__version__, ipywidgets.__version__, ipykernel.__version__, IPython.__version__)', '5.5.0 7.7.1 6.17.1 7.34.0')
        yield b, how


def picture(b, how): return bars(b)+rules(b) if how == 'live' else b.page.evaluate("() => [...document.querySelectorAll('.widget-html svg path')].map(p => p.getAttribute('d')).join()")
def errors(b): return [e for e in b.errors if e != OWN]


def test_the_picture_changes_while_a_scan_runs(page):
    b, how = page
    press(b, 'start')
    seen = set()
    for _ in range(400):
        if (state := b.ask('print(d.live.state)').strip()) == 'done': break
        seen.add(picture(b, how)); b.page.wait_for_timeout(150)
    assert state == 'done' and len(seen) >= 4, f'{len(seen)} pictures'
    b.until('print(len(d.verdict.drop))', '200')
    b.page.locator('.widget-html', has_text='200 of 2,000 rows above the cut').wait_for(timeout=10_000)
    assert errors(b) == []


def test_a_row_opens(page):
    b, how = page
    if how == 'live': b.page.locator('.gs-table tbody tr').nth(2).click()
    else: b.page.locator('.widget-select select').select_option(index=2)
    b.until('print(d.selected == [d.board.page_of()[0][2]["id"]])', 'True', 20)
    b.page.locator('.widget-html', has_text='3. of 2,000 by score').wait_for(timeout=10_000)
    assert errors(b) == []


def test_the_slider_moves_verdict_and_picture(page):
    b, how = page
    before, cut = picture(b, how), float(b.ask('print(d.verdict.cut.value)'))
    handle = b.page.locator('.widget-slider').first.locator('.noUi-handle, .ui-slider-handle').first      # by mouse: Notebook 7.6.5 takes the arrow keys away from every slider
    handle.scroll_into_view_if_needed()
    at = handle.bounding_box()
    b.page.mouse.move(x := at['x']+at['width']/2, y := at['y']+at['height']/2); b.page.mouse.down(); b.page.mouse.move(x-20, y, steps=5); b.page.mouse.up()
    b.until(f'print(d.verdict.cut.value < {cut} and len(d.verdict.drop) > 200, d.method.value)', 'True by hand', 20)
    b.page.wait_for_timeout(1500)
    assert picture(b, how) != before
    b.page.locator('.widget-html', has_text=f'{int(b.ask("print(len(d.verdict.drop))")):,} of 2,000 rows above the cut').wait_for(timeout=10_000)
    assert errors(b) == []


def test_stop_works_in_the_middle(page):
    b, how = page
    press(b, 'start')
    b.until('print(len(d.live.scan) > 30)', 'True')
    press(b, 'stop')
    b.until('print(d.live.state)', 'stopped', 10)
    assert 30 < int(b.ask('print(len(d.live.scan))')) < 2000


def test_only_one_copy_is_seen_and_only_core_widgets_where_no_others_are_drawn(page):
    b, how = page
    b.page.wait_for_timeout(2000)
    assert b.page.locator('[class^=gs-static]').count() == 1 and not b.page.locator('[class^=gs-static]').is_visible()
    assert b.ask(TREE).strip() == ('[]' if how == 'plain' else "['JupyterChart', 'RowTable']")

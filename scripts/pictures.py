"""Take the pictures of the live view for README and tutorials: `python scripts/pictures.py` (needs Chromium)."""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))

from lab import browser, notebook, server

CELLS = ('from gradsentry_nb import Sentry, dashboard, demo_model, load_samples\nfrom gradsentry_nb.demo import demo_path, demo_truth',
         "view = dashboard(Sentry(*demo_model(), name='the embedded demo model'), load_samples(demo_path()), demo_truth())\nview")


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder/'view.ipynb').write_text(notebook(*CELLS))
        with server(folder) as url, browser(folder, url, width=1200, height=1900) as b:
            b.open('view.ipynb')
            b.page.wait_for_selector('.gs-table table', timeout=120_000)
            b.until('print(view.live.state)', 'done', 180)
            b.page.wait_for_timeout(1500)
            b.page.locator('.gs-table tbody tr').nth(2).click()
            b.until('print(len(view.selected) == 1 and len(view.detail.value) > 500)', 'True', 30)
            b.page.wait_for_timeout(1500)
            box = b.page.locator('.jp-OutputArea-output .widget-vbox').first.bounding_box()
            b.page.mouse.move(5, 5)
            b.page.screenshot(path=str(ROOT/'nbs/images/dashboard.png'), clip={**box, 'height': min(box['height'], 1290)})
            b.save()


if __name__ == '__main__': main()

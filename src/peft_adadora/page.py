"""The page of `peft-adadora report --output`: tables, and pictures if matplotlib is installed."""

import base64
from html import escape
from pathlib import Path
from string import Template

from .report import Report, as_text, summary, tables


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
pre { max-height: 32rem; overflow: auto; margin: 2rem 0; font-size: 14px; }
@media (prefers-color-scheme: dark) { body { background: black; color: white; } }
</style>
<h1>$title</h1>
$body
""")
PICTURE = '<picture><source media="(prefers-color-scheme: dark)" srcset="{1}"><img src="{0}" alt="{2}"></picture>'


def write(report: Report, folder: str | Path) -> Path:
    """
    Write the page `report.html`. With matplotlib also write each figure as `<name>.png` and `<name>-dark.png`, which
    the page shows. Returns the path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title, *sentences = map(escape, summary(report))
    body = [f"<p>{sentence}</p>" for sentence in sentences]
    try:
        from .pictures import figures
    except ImportError as error:
        body.append(f"<p>{escape(str(error))}</p>")
    else:
        for (name, light), dark in zip(figures(report).items(), figures(report, dark=True).values()):
            sources = []
            for figure, file in ((light, folder / f"{name}.png"), (dark, folder / f"{name}-dark.png")):
                figure.savefig(file, dpi=150)
                sources.append("data:image/png;base64," + base64.b64encode(file.read_bytes()).decode())
            body.append(PICTURE.format(*sources, escape(light.get_suptitle())))
    body += [f"<pre>{escape(as_text(table))}</pre>" for table in tables(report)]
    page = folder / "report.html"
    page.write_text(PAGE.substitute(title=title, body="\n".join(body)), encoding="utf-8")
    return page

"""Builds RUN/report.html: reads the run folder, fills the template, writes one file that needs nothing else."""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from iprox.data import Pool
from iprox.files import replacing
from iprox.report import formats, sections
from iprox.report.browser import browser_data, browser_rows
from iprox.report.examples import example_cards, extreme_rows, fetch_examples
from iprox.report.fidelity_section import disagreeing_rows, fidelity_section
from iprox.report.run_folder import read_run_folder


def build_report(run_dir: Path, pool: Pool | None = None) -> Path:
    """Writes the report of a run.

    Its size does not grow with the pool: scores are binned, and only the texts of the best and the worst rows are
    read.

    Args:
        run_dir: the folder that `iprox run` wrote. Stages that were switched off may be missing.
        pool: where the texts of examples come from; None opens the files that run.json names. If they cannot be
            read, the page shows no texts and says so under its warnings.

    Returns:
        Path of the page, `run_dir / "report.html"`, replaced whole.

    Raises:
        InputError: run.json or the scores are missing, or a file of the run cannot be read.
    """
    run_dir = Path(run_dir)
    folder = read_run_folder(run_dir)
    best, worst = extreme_rows(folder.scores.influence)
    disagreeing, held = disagreeing_rows(folder), browser_rows(folder)
    examples, warning = fetch_examples(folder, pool, sorted({*best, *worst, *disagreeing, *held}))
    page = _render(
        name=run_dir.resolve().name,
        created=formats.moment(folder.run.get("created")),
        version=folder.run.get("iprox", ""),
        summary=sections.summary(folder),
        scores=sections.score_section(folder),
        composition=sections.composition_section(folder),
        best=example_cards(folder, examples, best),
        worst=example_cards(folder, examples, worst),
        disagreeing=example_cards(folder, examples, disagreeing),
        examples_warning=warning,
        browser=browser_data(folder, held, examples),
        fidelity=fidelity_section(folder),
        proxy=sections.proxy_section(folder),
        training=sections.training_section(folder),
        cost=sections.cost_section(folder),
        warnings=sections.warnings_section(folder, [warning] if warning else []),
        reproduce=sections.reproduce_section(folder),
        shaded=bool(folder.shading),
    )
    path = run_dir / "report.html"
    with replacing(path) as partial:
        # JSON may hold half a surrogate pair, which no file can.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def shown_rows(run_dir: Path) -> list[int]:
    """The rows whose texts the report of a run shows, each once: the most prominent first.

    Raises:
        InputError: as `build_report`.
    """
    folder = read_run_folder(Path(run_dir))
    best, worst = extreme_rows(folder.scores.influence)
    return list(dict.fromkeys([*best, *worst, *disagreeing_rows(folder), *browser_rows(folder)]))


def _render(**context: object) -> str:
    assets = files("iprox.report")
    own_js = assets.joinpath("report.js").read_text(encoding="utf-8")
    browser_js = assets.joinpath("browser.js").read_text(encoding="utf-8")
    plotly_js = get_plotlyjs()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(assets.joinpath("template.html").read_text(encoding="utf-8"))
    return template.render(
        # These four are ours or Plotly's and go in as they are; everything else is escaped.
        style=Markup(assets.joinpath("style.css").read_text(encoding="utf-8")),
        report_js=Markup(own_js),
        browser_js=Markup(browser_js),
        plotly_js=Markup(plotly_js),
        script_hashes=" ".join(_script_hash(script) for script in (own_js, browser_js, plotly_js)),
        **context,
    )


def _script_hash(script: str) -> str:
    """Returns the source expression that lets just this script run under the page's content security policy."""
    # A browser hashes the script after it has turned line ends into \n.
    normal = script.replace("\r\n", "\n").replace("\r", "\n")
    return f"'sha256-{base64.b64encode(hashlib.sha256(normal.encode()).digest()).decode()}'"

"""The page of a run, report.html: one file that needs nothing else."""

import base64
import gzip
import hashlib
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from iprox.data import Pool
from iprox.files import replacing
from iprox.report import formats, sections
from iprox.report.examples import browser_data, browser_rows, example_cards, extreme_rows, fetch_examples
from iprox.report.finished_run import read_run


def build_report(run_dir: Path, pool: Pool | None = None) -> Path:
    """Write the report of a run and return its path, `run_dir / "report.html"`.

    Its size does not grow with the pool: scores are binned, and only the texts of some rows are read. Stages that were
    switched off may be missing. Without a pool, the texts come from the files that run.json names; if these cannot be
    read, the page says so under its warnings.

    Raises:
        InputError: run.json or the scores are missing, or a file of the run cannot be read.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    best, worst = extreme_rows(run.scores.influence)
    disagreeing, held = sections.disagreeing_rows(run), browser_rows(run)
    examples, warning = fetch_examples(run, pool, sorted({*best, *worst, *disagreeing, *held}))
    page = _render(
        name=run_dir.resolve().name,
        created=formats.moment(run.record.get("created")),
        version=run.record.get("iprox", ""),
        summary=sections.summary(run),
        scores=sections.score_section(run),
        composition=sections.composition_section(run),
        best=example_cards(run, examples, best),
        worst=example_cards(run, examples, worst),
        disagreeing=example_cards(run, examples, disagreeing),
        examples_warning=warning,
        browser=browser_data(run, held, examples),
        fidelity=sections.fidelity_section(run),
        proxy=sections.proxy_section(run),
        training=sections.training_section(run),
        tuned=sections.tuned_section(run),
        cost=sections.cost_section(run),
        warnings=sections.warnings_section(run, [warning] if warning else []),
        reproduce=sections.reproduce_section(run),
        shaded=bool(run.shading),
    )
    path = run_dir / "report.html"
    with replacing(path) as partial:
        # JSON may contain half a surrogate pair, and a UTF-8 file cannot.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def shown_rows(run_dir: Path) -> list[int]:
    """Return the rows whose texts the report of a run shows, the most prominent first.

    Raises:
        InputError: a file of the run is missing or cannot be read.
    """
    run = read_run(Path(run_dir))
    best, worst = extreme_rows(run.scores.influence)
    return list(dict.fromkeys([*best, *worst, *sections.disagreeing_rows(run), *browser_rows(run)]))


def _render(**context: object) -> str:
    assets = files("iprox.report")
    own_js = assets.joinpath("report.js").read_text(encoding="utf-8")
    browser_js = assets.joinpath("browser.js").read_text(encoding="utf-8")
    plotly_js = assets.joinpath("plotly-basic.min.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(assets.joinpath("template.html").read_text(encoding="utf-8"))
    return template.render(
        # Style and scripts are ours or Plotly's and stay as they are; everything else is escaped.
        style=Markup(assets.joinpath("style.css").read_text(encoding="utf-8")),
        report_js=Markup(own_js),
        browser_js=Markup(browser_js),
        plotly=base64.b64encode(gzip.compress(plotly_js.encode(), mtime=0)).decode(),
        script_hashes=" ".join(_script_hash(script) for script in (own_js, browser_js, plotly_js)),
        **context,
    )


def _script_hash(script: str) -> str:
    """Return the source expression that allows this script in the page's content security policy."""
    # A browser turns line ends into \n before it hashes the script.
    normal = script.replace("\r\n", "\n").replace("\r", "\n")
    return f"'sha256-{base64.b64encode(hashlib.sha256(normal.encode()).digest()).decode()}'"

"""The page as text: what it says, what it escapes, what it refuses; and the numbers behind the charts."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import HOSTILE_SOURCE, ROWS, SCRIPT, TASKS, layers, profile, write_json

from iprox.data import Pool
from iprox.errors import InputError
from iprox.report import formats
from iprox.report.charts.audit import fidelity_chart
from iprox.report.charts.base import safe_json
from iprox.report.charts.proxy import layers_by_kind, rank_chart
from iprox.report.charts.scores import bin_edges, count_into, score_histogram, source_chart, source_counts
from iprox.report.charts.training import thin
from iprox.report.examples import MOST_CHARACTERS, extreme_rows, roles_and_texts, shaded
from iprox.report.finished_run import read_run
from iprox.report.page import build_report

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would see: elements in order, shown text, scripts, headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.headings, self.open = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def build(run: Path, pool: Pool | None = None) -> Page:
    return Page(build_report(run, pool).read_text(encoding="utf-8"))


def charts(html: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', html, re.S)
    return {name: json.loads(spec) for name, spec in found if name.startswith("chart-")}


def test_full_run_shows_every_section(make_run: MakeRun) -> None:
    run = make_run()
    path = build_report(run)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == run / "report.html"
    assert len(html.encode()) < 1_500_000
    assert "30 of 600 rows were selected for gsm8k and code" in page.text
    assert "Spearman 0.81" in page.text
    assert "0.52×" in page.text
    assert set(charts(html)) == {
        *("chart-influence", "chart-task-0", "chart-task-1", "chart-sources", "chart-lengths"),
        "chart-held-out",
        *("chart-fidelity-0", "chart-fidelity-1", "chart-ranks", "chart-tails", "chart-warmup", "chart-alignment"),
    }
    for words in ("2.1 GB", "1 min 25 s", "3.4 TFLOP", "73,000", "reused", "iprox run recipe.yaml", "49.98 %"):
        assert words in page.text
    # "A larger ridge <i>to be</i>" is a warning of the run, shown letter by letter.
    assert "2 layers needed a larger ridge <i>to be</i> invertible." in page.text
    assert "select: {fraction: 0.05} # <b>top</b>" in page.text


def test_page_is_accessible_and_self_contained(make_run: MakeRun) -> None:
    page = build(make_run())
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    drawn = [div for div in page.all("div") if div.get("class") == "chart"]
    assert len(drawn) == 12
    assert all(div["role"] == "img" and len(div["aria-label"] or "") > 30 for div in drawn)
    assert len({div["id"] for div in drawn}) == len(drawn)
    # Nothing in the markup points anywhere but into the page.
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#")
    assert not page.all("link")


def test_hostile_text_is_only_text(make_run: MakeRun) -> None:
    html = build_report(make_run()).read_text(encoding="utf-8")
    page = Page(html)
    assert SCRIPT in page.text
    assert HOSTILE_SOURCE in page.text
    assert SCRIPT not in html
    assert not page.all("img")
    # Three of ours, one of data for each chart and one for the browser of examples.
    assert len(page.all("script")) == 4 + 12
    # Plotly reads <b> in labels, so they reach it escaped.
    hovers = charts(html)["chart-sources"]["data"][0]["hovertext"]
    assert any("&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;co&lt;/b&gt;" in text for text in hovers)


def test_the_selection_is_shown_next_to_pool_and_validation(make_run: MakeRun) -> None:
    run = make_run()
    html = build_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "the selected answers are <i>short</i>" in page.text
    assert "38 % of 16 rows drawn" in page.text
    assert f"{formats.shorten(HOSTILE_SOURCE, 18)} 62 %" in page.text
    assert "Validation, code" in page.text
    chart = charts(html)["chart-lengths"]
    supervised = pq.read_table(run / "scores.parquet")["supervised"].to_numpy()
    rows = json.loads((run / "selection.json").read_text())["rows"]
    marked = {np.median(supervised), np.median(supervised[rows]), 200, 207}
    assert {shape["x0"] for shape in chart["layout"]["shapes"]} == marked
    assert len(chart["layout"]["annotations"]) == 4
    assert chart["layout"]["xaxis"]["range"][1] > 207  # also where the pool has none as long
    assert "207 in validation code" in page.text


def test_many_tasks_mark_the_shortest_and_the_longest(make_run: MakeRun) -> None:
    tasks = ("a", "b", "c", "d", "e")
    layout = charts(build_report(make_run(tasks=tasks)).read_text(encoding="utf-8"))["chart-lengths"]["layout"]
    texts = [each["text"] for each in layout["annotations"]]
    assert [text for text in texts if text.startswith("validation")] == ["validation e: 228", "validation a: 200"]


def test_json_cannot_close_its_script() -> None:
    value = {"a": "</script><!--<script>&amp;\u2028", "<b>": 1}
    text = safe_json(json.dumps(value, ensure_ascii=False))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_stages_switched_off(make_run: MakeRun) -> None:
    off = ("warmup", "compress", "align", "audit", "select")
    html = build_report(make_run(without=off, tasks=("gsm8k",))).read_text(encoding="utf-8")
    page = Page(html)
    assert set(charts(html)) == {"chart-influence"}
    assert "600 rows were scored for gsm8k on target-17m itself; nothing has been selected yet." in page.text
    assert "The audit was off in this run" in page.text
    assert "This run made no proxy" in page.text
    assert "neither warm-up nor alignment ran" in page.text
    assert "the select stage has not run" in page.text


def test_examples_come_from_the_pool_with_their_roles(make_run: MakeRun) -> None:
    page = build(make_run())
    best, worst = page.text.split("Highest influence")[1].split("Lowest influence")
    assert best.index("row-0010") < best.index("row-0011")
    assert "user" in best
    assert "assistant" in best
    assert "Whole text (2,239 characters)" in best
    assert "#599" in worst
    assert page.text.count("selected\n") >= 10
    assert (best + worst.split("Fidelity of the proxy")[0]).count(" tokens") == 20


def test_rows_that_proxy_and_target_disagree_on_are_shown_with_their_texts(make_run: MakeRun) -> None:
    run = make_run()
    summary = json.loads((run / "audit/audit.json").read_text())
    apart = [entry for task in summary["tasks"].values() for entry in task["disagreements"]]
    worst = max(apart, key=lambda entry: abs(entry["proxy"] - entry["target"]))["id"]
    part = build(run).text.split("Where proxy and target disagree most")[1].split("The proxy\n")[0]
    table, cards = part.split("#", 1)
    assert worst in table
    assert worst in cards.split("#")[0]
    assert f"What is {int(worst[4:])} plus" in cards


def test_tokens_are_shaded_by_what_they_add_to_the_score(make_run: MakeRun) -> None:
    page = build(make_run())
    best = page.text.split("Highest influence")[1].split("Lowest influence")[0]
    assert best.count("Token by token") == 2
    tokens = [a for a in page.all("span") if a.get("class", "").startswith("tok")]
    assert [(a["class"], a.get("title")) for a in tokens[3:7]] == [
        ("tok harm1", "−0.01"),
        ("tok help1", "+0.02"),
        ("tok", "0"),
        ("tok help5 sup", "+0.08"),
    ]
    assert "word299 " not in best  # a long row keeps its end
    assert "word300 " in best


def test_nothing_is_shaded_where_nothing_was_attributed(make_run: MakeRun) -> None:
    assert "Token by token" not in build(make_run(without=("attribute",))).text


def test_shades_are_relative_to_the_strongest_of_the_row() -> None:
    tokens = shaded(["a", "b", "c", "d"], [True] * 4, np.array([-4.0, 1.0, 0.1, 2.0]))
    assert [token.level for token in tokens] == [-5, 1, 0, 2]
    assert {token.level for token in shaded(["a", "b"], [True, False], np.zeros(2))} == {0}


def test_the_linear_datamodeling_score_is_told_where_it_was_measured(make_run: MakeRun) -> None:
    run = make_run()
    assert "random subsets" not in build(run).text
    record = json.loads((run / "run.json").read_text())
    record["stages"]["lds"] = {"seconds": 3.0, "tokens": 10, "flops": 1e9, "warnings": []}
    write_json(run / "run.json", record)
    sides = {"proxy": {"lds": 0.41, "interval": [0.2, 0.6]}, "target": {"lds": 0.52, "interval": [0.3, 0.7]}}
    measured = {"subsets": 50, "fraction": 0.5, "rows": 300, "tasks": dict.fromkeys(("gsm8k", "code"), sides)}
    write_json(run / "audit/lds.json", {**measured, "mean": {"proxy": 0.41, "target": 0.52}})
    text = build(run).text
    assert "50 random subsets of 150 audited rows" in text
    assert "0.41 (0.20 to 0.60)" in text
    assert "0.52 (0.30 to 0.70)" in text


def test_the_removal_test_is_told_where_it_was_measured(make_run: MakeRun) -> None:
    run = make_run()
    assert "Removal test" not in build(run).text
    record = json.loads((run / "run.json").read_text())
    record["stages"]["removal"] = {"seconds": 3.0, "tokens": 10, "flops": 1e9, "warnings": []}
    write_json(run / "run.json", record)
    effect = {"top": 0.05, "random": 0.0125, "difference": 0.0375, "standard_error": 0.0042}
    sides = {"proxy": effect, "target": {**effect, "difference": -0.0007}}
    measured = {"fraction": 0.05, "repeats": 3, "rows": 300, "removed": 15, "mean": sides}
    tasks = {task: {"loss": 1.5, **sides} for task in ("gsm8k", "code")}
    write_json(run / "audit/removal.json", {**measured, "tasks": tasks})
    text = build(run).text
    assert "without the top 15 of a ranking" in text
    assert "each 3 times" in text
    assert text.count("0.0375 ± 0.0042") == 3
    assert "−0.0007 ± 0.0042" in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Say <hi>", "completion": "hi"}, ("prompt", "Say <hi>", "completion")),
        ({"text": "Plain text.\n  Indented."}, ("text", "Plain text.\n  Indented.")),
    ],
)
def test_other_row_shapes_are_shown(make_run: MakeRun, row: dict[str, str], expected: tuple[str, ...]) -> None:
    pool = Pool([{"id": f"row-{i:04d}", **row} for i in range(ROWS)])
    text = build(make_run(), pool).text.split("Highest influence")[1]
    assert all(words in text for words in expected)


def test_tools_their_calls_and_reasoning_are_shown() -> None:
    call = {"function": {"name": "add", "arguments": {"x": 2}}}
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "four"},
    ]
    (example,) = Pool([{"messages": turns, "tools": [{"name": "add"}]}])
    assert roles_and_texts(example) == [
        ("tools", '{"name": "add"}'),
        ("user", "2+2?"),
        ("assistant, reasoning", "I add."),
        ("assistant, tool calls", json.dumps(call)),
        ("tool", ""),
        ("assistant", "four"),
    ]


def test_a_huge_row_does_not_make_the_page_huge(make_run: MakeRun) -> None:
    long = "x" * (MOST_CHARACTERS + 1234)
    pool = Pool([{"id": f"row-{i:04d}", "text": long} for i in range(ROWS)])
    path = build_report(make_run(), pool)
    assert path.stat().st_size < 1_500_000
    assert "1,234 more characters are left out" in Page(path.read_text(encoding="utf-8")).text


def test_half_a_surrogate_pair_can_be_written(make_run: MakeRun) -> None:
    run = make_run()
    content = json.loads((run / "run.json").read_text())
    content["stages"]["data"]["warnings"] = ["half \ud83d pair"]
    write_json(run / "run.json", content)
    assert "half ? pair" in build(run).text


def test_pool_that_moved_is_a_warning_not_a_failure(make_run: MakeRun) -> None:
    run = make_run()
    (run.parent / "run-pool.jsonl").unlink()
    page = build(run)
    assert "The page shows no texts of rows, because the pool cannot be read" in page.text
    assert page.text.split("Warnings")[-1].count("the pool cannot be read") == 1
    assert "row-0010" in page.text


def test_pool_that_changed_shows_no_wrong_text(make_run: MakeRun) -> None:
    run = make_run()
    pool = run.parent / "run-pool.jsonl"
    lines = pool.read_text(encoding="utf-8").splitlines()
    pool.write_text("\n".join(lines[1:] + lines[:1]) + "\n", encoding="utf-8")
    page = build(run)
    assert "the pool has changed since it was scored" in page.text
    assert "Is this markup safe" not in page.text


def test_row_count_that_differs_is_a_warning(make_run: MakeRun) -> None:
    run = make_run()
    content = json.loads((run / "run.json").read_text())
    content["inputs"]["pool"]["rows"] = 601
    write_json(run / "run.json", content)
    assert "run.json counts 601 pool rows, scores.parquet 600." in build(run).text


def break_run(run: Path, fault: str) -> None:
    if fault == "no folder":
        run.rename(run.with_name("elsewhere"))
    elif fault.startswith("no "):
        (run / fault.removeprefix("no ")).unlink()
    elif fault == "bad json":
        (run / "selection.json").write_text("{")
    elif fault == "list for object":
        (run / "run.json").write_text("[]")
    elif fault == "bad parquet":
        (run / "scores.parquet").write_bytes(b"PAR1 not really")
    elif fault == "missing column":
        table = pq.read_table(run / "scores.parquet")
        pq.write_table(table.drop_columns(["tokens"]), run / "scores.parquet")
    elif fault == "empty scores":
        pq.write_table(pq.read_table(run / "scores.parquet").slice(0, 0), run / "scores.parquet")
    elif fault == "row out of range":
        write_json(run / "selection.json", {"strategy": "top", "threshold": 0.0, "rows": [ROWS], "profile": {}})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "no such folder"),
        ("no run.json", r"run\.json: missing; run `iprox run"),
        ("no scores.parquet", r"scores\.parquet: missing, because the score stage has not finished"),
        ("no audit/audit.parquet", r"audit\.parquet: missing; run the audit stage"),
        ("bad json", r"selection\.json: not valid JSON"),
        ("list for object", r"run\.json: an object is expected"),
        ("bad parquet", r"scores\.parquet: not a readable Parquet file"),
        ("missing column", r"scores\.parquet: has no column 'tokens'"),
        ("empty scores", "has no rows"),
        ("row out of range", r"selection\.json: names a row outside the 600 rows"),
    ],
)
def test_broken_runs_are_refused_in_one_line(make_run: MakeRun, fault: str, message: str) -> None:
    run = make_run()
    break_run(run, fault)
    with pytest.raises(InputError, match=message) as caught:
        build_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_report_is_replaced_whole(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    (run / "report.html").write_text("old")

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            build_report(run)
    assert (run / "report.html").read_text() == "old"
    build_report(run)
    assert (run / "report.html").stat().st_size > 500_000
    assert not list(run.glob("*.partial"))


def test_null_sources_and_unscored_pool(make_run: MakeRun) -> None:
    run = make_run(without=("select",))
    table = pq.read_table(run / "scores.parquet")
    nothing = pa.nulls(ROWS, pa.float64())
    for name in ("influence", "influence/gsm8k", "influence/code"):
        table = table.set_column(table.schema.get_field_index(name), name, nothing)
    table = table.set_column(table.schema.get_field_index("source"), "source", pa.nulls(ROWS, pa.string()))
    pq.write_table(table, run / "scores.parquet")
    assert "No row has a score." in build(run).text
    lengths = profile(np.ones(ROWS, np.int64), np.array([5, 1]), TASKS)
    write_json(run / "selection.json", {"strategy": "top", "threshold": None, "rows": [5, 1], "profile": lengths})
    assert read_run(run).selection is None  # of an earlier start, whose scores were others
    record = json.loads((run / "run.json").read_text())
    record["stages"]["select"] = record["stages"]["score"]
    write_json(run / "run.json", record)
    assert "The rows of this pool have no source." in build(run).text


def test_size_does_not_follow_the_pool() -> None:
    rng = np.random.default_rng(1)
    sizes = []
    for rows in (1_000, 200_000):
        values = rng.standard_t(3, rows)
        chosen = np.argsort(-values)[: rows // 20]
        chart = score_histogram(values, chosen, float(values[chosen[-1]]), id="c", title="t", caption="c")
        sizes.append(len(chart.spec))
    assert max(sizes) < 12_000


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(values=st.lists(finite, min_size=1, max_size=60), cut=st.none() | finite, bins=st.integers(1, 60))
def test_every_value_falls_into_one_bin(values: list[float], cut: float | None, bins: int) -> None:
    data = np.array(values)
    edges = bin_edges(data, cut, bins)
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= bins + 3
    assert count_into(data, edges).sum() == len(data)


@given(values=st.lists(st.integers(-1000, 1000), min_size=2, max_size=200, unique=True), share=st.floats(0.02, 0.9))
def test_no_bar_mixes_both_sides_of_the_cut(values: list[int], share: float) -> None:
    data = np.sort(np.array(values, dtype=float))[::-1]
    chosen = np.arange(max(1, int(share * len(data))))
    edges = bin_edges(data, float(data[chosen[-1]]), 40)
    # The cut itself may fall a rounding error beside its edge; move it off the edge to test the rest.
    total, selected = count_into(data + 0.01, edges), count_into(data[chosen] + 0.01, edges)
    if len(edges) > 2:
        assert set(np.flatnonzero(selected)) & set(np.flatnonzero(total - selected)) == set()


@given(values=st.lists(st.one_of(finite, st.just(float("nan"))), max_size=50), most=st.integers(1, 12))
def test_extreme_rows_are_the_ends_of_the_ranking(values: list[float], most: int) -> None:
    data = np.array(values, dtype=float)
    best, worst = extreme_rows(data, most)
    ranked = np.sort(data[np.isfinite(data)])
    assert not set(best) & set(worst)
    assert list(data[best]) == list(ranked[::-1][:most])
    assert len(worst) == min(most, len(ranked) - len(best))
    assert list(data[worst]) == list(ranked[: len(worst)])


def test_source_counts_sort_by_gain() -> None:
    shares = source_counts(np.array([0, 0, 0, 1, 1, 2]), ["a", None, "c"], np.array([3, 4, 5, 0]))
    assert [(s.name, s.pool, s.selected) for s in shares] == [("(no source)", 2, 2), ("c", 1, 1), ("a", 3, 1)]
    assert shares[0].gain == pytest.approx(2 / 4 - 2 / 6)
    assert shares[-1].gain == pytest.approx(1 / 4 - 3 / 6)


def test_many_sources_keep_the_extremes() -> None:
    codes = np.repeat(np.arange(100), 10)
    chosen = np.arange(0, 1000, 7)
    chart = source_chart(source_counts(codes, [f"source {i}" for i in range(100)], chosen), most=10)
    assert len(json.loads(chart.spec)["layout"]["yaxis"]["ticktext"]) == 10
    assert "90 sources in between are left out" in chart.caption


def test_fidelity_marks_what_both_models_put_on_top() -> None:
    target = np.arange(100.0)
    proxy = target.copy()
    proxy[[99, 0]] = proxy[[0, 99]]
    target[50] = np.nan
    ids = [f"<b>{i}" for i in range(100)]
    chart = fidelity_chart("t", proxy, target, ids, [None] * 100, spearman=0.5)
    assert chart is not None
    rest, one, both = (len(trace["hovertext"]) for trace in json.loads(chart.spec)["data"])
    assert (rest, one, both) == (93, 2, 4)
    assert "&lt;b&gt;98" in json.loads(chart.spec)["data"][2]["hovertext"][-1]
    assert fidelity_chart("t", proxy, np.full(100, np.nan), ids, [None] * 100, spearman=0.5) is None


def test_layers_group_by_what_they_do() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up" for i in range(2) for j in range(3)] + ["head"]
    kinds = layers_by_kind(names)
    assert {kind: len(group) for kind, group in kinds.items()} == {"mlp.experts.*.up": 6, "head": 1}
    assert list(layers_by_kind([f"layer_{i}" for i in range(40)])) == ["all layers"]


def test_layer_bars_share_one_scale_that_holds_them_all() -> None:
    chart = rank_chart(layers())
    layout = json.loads(chart.spec)["layout"]
    scales = [axis["range"] for name, axis in layout.items() if name.startswith("yaxis")]
    assert len(scales) == 7
    assert scales == scales[:1] * 7
    assert 384 <= scales[0][1] <= 1.1 * 384
    assert "27 layers became low-rank, 1 kept dense" in chart.caption


def test_long_curves_are_averaged_not_cut() -> None:
    x, y = thin(np.arange(2500.0), np.ones(2500), most=1000)
    assert len(x) <= 1000
    assert x[0] == pytest.approx(1.0)
    assert x[-1] == 2499.0
    assert (y == 1).all()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.count(1234), "1,234"),
        (formats.count(None), "–"),
        (formats.decimal(-0.1), "−0.10"),
        (formats.decimal(float("nan")), "–"),
        (formats.percent(0.05), "5.0 %"),
        (formats.points(-0.05), "−5.0"),
        (formats.score(0.012345), "+0.0123"),
        (formats.score(-1.2e-5), "−1.2 × 10⁻⁵"),
        (formats.score(0.0), "0"),
        (formats.duration(0.085), "85 ms"),
        (formats.duration(3.41), "3.4 s"),
        (formats.duration(59.97), "1 min 00 s"),
        (formats.duration(125), "2 min 05 s"),
        (formats.duration(3599.7), "1 h 00 min"),
        (formats.duration(3780), "1 h 03 min"),
        (formats.size(2.1e9), "2.1 GB"),
        (formats.size(999_960), "1.0 MB"),
        (formats.size(512), "512 B"),
        (formats.flops(1.2e12), "1.2 TFLOP"),
        (formats.parameters(16.9e6), "16.9 M"),
        (formats.ratio(1, 2), "0.50×"),
        (formats.ratio(1, 0), "–"),
        (formats.ratio(0.003, 1), "0.003×"),
        (formats.rows(1), "1 row"),
        (formats.moment("2026-11-24T09:30:59Z"), "2026-11-24 09:30 UTC"),
        (formats.moment("yesterday"), "yesterday"),
        (formats.shorten("abcdefghij", 7), "abcd…ij"),
        (formats.listing(["a", "b", "c"]), "a, b and c"),
        (formats.listing(list("abcdefg")), "a, b, c, d and 3 more"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected

"""Recipes with stages switched off or more of them: what each leaves behind."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn

from iprox.cli import main
from iprox.data import Pool
from iprox.selection.strategies import Turns
from iprox.session import Session
from iprox.settings import AuditSection
from iprox.stages import alignment, retraining

NO_PROXY = ["--set", "warmup=false", "proxy=false", "audit=false"]
BY_LENGTH = [*NO_PROXY, "influence.estimator=length"]  # where scores are beside the point


def test_proxy_off_scores_on_the_target(place):
    assert place.run("--set", "proxy=false", "influence.estimator=tracin") == 0
    assert list(place.record()["stages"]) == ["data", "warmup", "score", "select", "attribute", "report"]
    cost = place.record()["cost"]
    assert cost["score_flops"] == cost["target_score_flops"]
    assert cost["construction_flops"] == 0
    assert not (place.output / "proxy").exists()


def test_warm_up_align_and_audit_off(place):
    assert place.run("--set", "warmup=false", "proxy.align=false", "audit=false", "influence.estimator=tracin") == 0
    assert list(place.record()["stages"]) == ["data", "compress", "score", "select", "attribute", "report"]
    config = json.loads((place.output / "proxy/config.json").read_text())
    assert config["quantization_config"]["target"] == place.record()["model"]


@pytest.fixture(scope="module")
def several(tmp_path_factory, make_place):
    place = make_place(tmp_path_factory.mktemp("several") / "place")
    assert place.run("--set", "influence.checkpoints=all", "audit.sample=12") == 0
    return place


def test_all_checkpoints_have_a_proxy_each(several):
    names = [entry["path"] for entry in json.loads((several.output / "warmup/checkpoints.json").read_text())]
    assert len(names) == 2
    for name in names:
        assert (several.output / "proxy" / name / "model.safetensors").is_file()
        assert (several.output / "aligned" / name / "alignment.json").is_file()
    assert several.record()["stages"]["score"]["checkpoints"] == 2
    # What the report reads is where it is for one checkpoint.
    assert (several.output / "proxy/compression.json").is_file()
    assert (several.output / "aligned/alignment.json").is_file()


def test_several_checkpoints_are_the_sum_of_single_ones_by_learning_rate(several, tmp_path):
    listed = json.loads((several.output / "warmup/checkpoints.json").read_text())
    singles = []
    for entry in listed:
        output = tmp_path / entry["path"]
        several.score([several.output / "aligned" / entry["path"]], output)
        singles.append(pq.read_table(output / "scores.parquet")["influence/spelling"].to_numpy())
    total = sum(entry["learning_rate"] * scores for entry, scores in zip(listed, singles, strict=True))
    table = pq.read_table(several.output / "scores.parquet")["influence/spelling"].to_numpy()
    assert table == pytest.approx(total, rel=1e-9, abs=0)


def test_cosines_on_a_proxy_are_planned_as_they_are_scored(copied, capsys):
    assert copied.run("--set", "influence.estimator=tracin", "audit.sample=12", "--stop-after", "score") == 0
    assert copied.done() == ["align", "audit", "score"]
    capsys.readouterr()
    assert main(["plan", str(copied.output / "recipe.yaml"), "--quiet", "--json", "--tflops", "1"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    for name in ("align", "score", "audit"):
        assert planned[name]["flops"] == pytest.approx(copied.record()["stages"][name]["flops"], rel=0.15), name


def test_a_model_with_experts_is_charged_in_the_plan_as_in_the_run(tmp_path, make_place, tiny, capsys):
    place = make_place(tmp_path / "place")
    own = Path(yaml.safe_load(place.recipe.read_text())["model"])
    vocabulary = json.loads((own / "config.json").read_text())["vocab_size"]
    shape = {"vocab_size": vocabulary, "hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 8}
    tiny.model("qwen3-moe", torch.float32, **shape).save_pretrained(place.path / "moe")
    for file in [*own.glob("token*"), *own.glob("*.jinja")]:
        shutil.copy(file, place.path / "moe")
    place.set(model=str(place.path / "moe"))
    options = ["warmup=false", "proxy.align=false", "audit.sample=12", "influence.normalize=cosine"]
    assert place.run("--set", *options, "--stop-after", "score") == 0
    capsys.readouterr()
    assert main(["plan", str(place.output / "recipe.yaml"), "--quiet", "--json", "--tflops", "1"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    for name in ("compress", "audit", "score"):
        assert planned[name]["flops"] == pytest.approx(place.record()["stages"][name]["flops"], rel=0.2), name


def test_an_influence_function_through_the_whole_run(copied):
    table = pq.read_table(copied.output / "scores.parquet")
    made_by = json.loads(table.schema.metadata[b"iprox"])
    assert {"estimator": "ekfac", "curvature_examples": 24}.items() <= made_by.items()
    stages = copied.record()["stages"]
    assert 0 < stages["score"]["query_flops"] < stages["score"]["flops"]
    influence = table["influence/spelling"].to_numpy()
    assert copied.run("--set", "influence.estimator=kfac", "audit=false", "--stop-after", "score") == 0
    assert "score" in copied.done()
    again = pq.read_table(copied.output / "scores.parquet")["influence/spelling"].to_numpy()
    assert 0.3 < np.corrcoef(influence, again)[0, 1] < 0.99999


def test_scores_by_validation_example_are_kept(several, tmp_path):
    proxies = [
        several.output / "aligned" / entry["path"]
        for entry in json.loads((several.output / "warmup/checkpoints.json").read_text())
    ]
    options = ["--set", "influence.query_norm=1", "influence.normalize=none", "--learning-rates", "1e-3", "1e-4"]
    options.append("--estimator=tracin")
    several.score(proxies, tmp_path / "kept", "--set", "influence.per_example=true", *options)
    table = pq.read_table(tmp_path / "kept/scores.parquet")
    made_by = json.loads(table.schema.metadata[b"iprox"])
    assert made_by["per_example"]
    several.score(proxies, tmp_path / "mean", "--set", "influence.per_example=false", *options)
    mean = pq.read_table(tmp_path / "mean/scores.parquet")
    for task in ("arithmetic", "spelling"):
        matrix = np.stack(table[f"examples/{task}"].to_pylist())
        np.testing.assert_allclose(matrix.mean(axis=1), table[f"influence/{task}"].to_numpy(), rtol=1e-9, atol=1e-15)
        expected = mean[f"influence/{task}"].to_numpy()
        np.testing.assert_allclose(matrix.mean(axis=1), expected, atol=0.03 * np.abs(expected).max())


def test_less_takes_the_state_that_the_warm_up_keeps(tmp_path, make_place):
    place = make_place(tmp_path / "place")
    assert place.run("--stop-after", "compress") == 0
    assert not list(place.output.rglob("optimizer.safetensors"))
    options = ["--set", "influence.estimator=less", "influence.normalize=cosine", "audit.sample=12"]
    options += ["--stop-after", "score"]
    assert place.run(*options) == 0
    record = place.record()["stages"]
    assert not record["warmup"]["skipped"]  # once more, for the state
    assert record["compress"]["skipped"]  # of the same checkpoints
    assert len(list((place.output / "warmup").rglob("optimizer.safetensors"))) == 2
    influence = pq.read_table(place.output / "scores.parquet")["influence/spelling"].to_numpy()
    assert np.abs(influence).max() <= 1
    assert place.run(*options) == 0
    assert place.record()["stages"]["warmup"]["skipped"]


@pytest.mark.parametrize("estimator", ["random", "length", "perplexity", "rds", "bm25"])
def test_scorers_without_gradients(place, estimator):
    assert place.run(*NO_PROXY, f"influence.estimator={estimator}") == 0
    table = pq.read_table(place.output / "scores.parquet")
    assert json.loads(table.schema.metadata[b"iprox"])["estimator"] == estimator
    scores = table["influence/spelling"].to_numpy()
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1
    stages = place.record()["stages"]
    assert (stages["score"]["flops"] > 0) == (estimator in ("perplexity", "rds"))
    assert stages["score"]["flops"] == place.record()["cost"]["target_score_flops"]  # it is the target that is scored
    # They are no sums over tokens, so none is shaded.
    assert f"{estimator} uses no gradients" in place.record()["unattributed"]
    assert "attribute" not in stages
    assert "<summary>Token by token" not in (place.output / "report.html").read_text()


def test_a_proxy_is_audited_by_the_perplexity_of_its_target(tmp_path, make_place):
    place = make_place(tmp_path / "place")
    options = ["--set", "influence.estimator=perplexity", "audit.sample=30", "proxy.sparsity=0.1", "proxy.align=false"]
    assert place.run(*options, "--stop-after", "score") == 0
    record = place.record()["stages"]
    assert record["score"]["query"] == "own"
    assert record["audit"]["fidelity"]["spearman"] > 0.8


def test_a_compiled_proxy_gives_the_scores_of_an_uncompiled_one(finished, tmp_path, monkeypatch):
    """Traced by `aot_eager`, which generates no code; tests/models/test_compiled.py has the scores of that."""
    compile_module, compiled, scores = nn.Module.compile, [], []

    def traced(module, **options):
        compiled.append(module)
        compile_module(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)
    torch._dynamo.reset()
    for option in ("--set=compile=false", "--set=compile=true"):
        assert not compiled
        table = finished.score([finished.output / "aligned"], tmp_path / option, option, "--estimator=tracin")
        scores.append(table["influence/spelling"].to_numpy())
    assert len(compiled) == 2  # both layers
    assert np.corrcoef(*scores)[0, 1] > 0.999


def test_from_all_checkpoints_to_the_last_leaves_no_proxy_of_another(several):
    assert several.run("--set", "audit=false", "--stop-after", "compress") == 0
    assert not list((several.output / "proxy").glob("checkpoint-*"))
    assert (several.output / "proxy/model.safetensors").is_file()


def test_finetune_reports_test_losses_before_and_after(place, capfd):
    settings = {"epochs": 1, "learning_rate": 1e-3, "test": {"spelling": str(place.path / "spelling.jsonl")}}
    place.set(finetune=settings)
    assert place.run(*NO_PROXY) == 0
    assert "test loss" in capfd.readouterr().out
    assert list(place.record()["stages"]) == ["data", "curvature", "score", "select", "finetune", "attribute", "report"]
    losses = place.record()["stages"]["finetune"]["test"]["spelling"]
    assert losses["after"] < losses["before"]
    assert 0 <= losses["exact_match"]["before"] <= 1
    assert 0 <= losses["exact_match"]["after"] <= 1
    assert (place.output / "finetune/model/model.safetensors").is_file()
    (listed,) = json.loads((place.output / "finetune/checkpoints.json").read_text())
    assert (place.output / "finetune" / listed["path"]).is_dir()


def test_another_test_set_redoes_the_fine_tuning_only(place):
    tests = place.path / "spelling.jsonl"
    place.set(
        finetune={"epochs": 1, "test": {"spelling": str(tests)}}, data={**data(place), "validation": arithmetic(place)}
    )
    assert place.run(*BY_LENGTH) == 0
    tests.write_bytes(tests.read_bytes().split(b"\n", 1)[1])
    assert place.run(*BY_LENGTH) == 0
    assert place.done() == ["finetune", "report"]


def data(place):
    return {"pool": [str(place.pool)], "max_length": 48}


def arithmetic(place):
    return {"arithmetic": str(place.path / "arithmetic.jsonl")}


def test_a_task_of_several_files_and_a_pool_of_several_files(place):
    lines = place.pool.read_bytes().splitlines(keepends=True)
    parts = [place.path / "a.jsonl", place.path / "b.jsonl"]
    parts[0].write_bytes(b"".join(lines[:30]))
    parts[1].write_bytes(b"".join(lines[30:60]))
    files = [str(place.path / f"{task}.jsonl") for task in ("arithmetic", "spelling")]
    place.set(data={"pool": [str(place.path / "[ab].jsonl")], "validation": {"both": files}, "max_length": 48})
    assert place.run(*BY_LENGTH) == 0
    inputs = place.record()["inputs"]
    assert inputs["pool"]["rows"] == 60
    assert [file.rsplit("/", 1)[1] for file in inputs["pool"]["files"]] == ["a.jsonl", "b.jsonl"]
    assert inputs["validation"]["both"]["rows"] == 16
    assert "influence/both" in pq.read_table(place.output / "scores.parquet").column_names


def test_a_pool_smaller_than_the_samples_runs_with_warnings(place):
    place.pool.write_bytes(b"".join(place.pool.read_bytes().splitlines(keepends=True)[:40]))
    assert place.run("--stop-after", "score") == 0
    warned = {name: entry["warnings"] for name, entry in place.record()["stages"].items() if entry["warnings"]}
    assert list(warned) == ["compress", "align", "audit", "score"]
    assert "of the rows) were longer than 48 tokens and were cut" in warned["score"][0]
    assert "the pool is small" in warned["audit"][0]


def test_columns_of_other_names_are_read_throughout(place, capfd):
    """The pool and a validation set are of other columns, the other validation set is chat as ever."""

    def renamed(file):
        rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        named = [{"question": turns[-2]["content"], "answer": turns[-1]["content"], "kind": "k"} for turns in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in named))

    renamed(place.pool)
    renamed(place.path / "spelling.jsonl")
    columns = ["data.columns.instruction=question", "data.columns.output=answer", "data.columns.source=kind"]
    changes = ["--set", "warmup=false", "audit={sample: 40}", "proxy.align=false", "refine={}", *columns]
    changes.append("influence.estimator=tracin")
    assert place.run(*changes, f"finetune={{epochs: 1, test: {{t: {place.path / 'spelling.jsonl'}}}}}") == 0
    lines = place.pool.read_text().splitlines()
    chosen = json.loads((place.output / "selection.json").read_text())["rows"]
    assert (place.output / "selected.jsonl").read_text().splitlines() == [lines[row] for row in chosen]
    assert pq.read_table(place.output / "scores.parquet")["source"].unique().to_pylist() == ["k"]
    best = json.loads(lines[chosen[0]])["question"]
    assert html.escape(best.splitlines()[0][:40]) in (place.output / "report.html").read_text()
    (place.output / "report.html").unlink()
    assert main(["report", str(place.output)]) == 0
    assert html.escape(best.splitlines()[0][:40]) in (place.output / "report.html").read_text()

    arguments = ["select", "--scores", str(place.output), "--pool", str(place.pool), "--count", "5", "--quiet"]
    arguments += ["--output", str(place.path / "chosen.jsonl")]
    assert main(arguments) == 0  # the scores know how the pool was read
    assert (place.path / "chosen.jsonl").read_text().splitlines()[0] in lines
    assert main([*arguments, "--set", "data.columns=output"]) == 2
    assert "data.columns: input should be a valid dictionary" in capfd.readouterr().err


def test_bad_rows_left_out_are_said_and_recorded(place):
    lines = place.pool.read_bytes().splitlines(keepends=True)[:50]
    place.pool.write_bytes(b"".join([*lines[:10], b"{broken\n", *lines[10:]]))
    place.set(data={**data(place), "validation": arithmetic(place), "on_bad_row": "skip"})
    assert place.run(*BY_LENGTH) == 0
    assert "1 bad row left out" in place.record()["stages"]["data"]["warnings"][0]
    selected = (place.output / "selected.jsonl").read_bytes().splitlines(keepends=True)
    assert set(selected) <= set(lines)


def test_validation_rows_in_the_pool_are_said_and_recorded(place):
    rows = place.pool.read_bytes().splitlines(keepends=True)[:50]
    held = (place.path / "arithmetic.jsonl").read_bytes().splitlines(keepends=True)[:3]
    place.pool.write_bytes(b"".join([*rows, *(line.replace(b'"id": "', b'"id": "copy-', 1) for line in held)]))
    place.set(data={**data(place), "validation": arithmetic(place)})
    assert place.run("--stop-after=data") == 0
    (said,) = place.record()["stages"]["data"]["warnings"]
    assert said.startswith(
        "3 rows of the pool are word for word in the validation set of arithmetic (first: pool.jsonl:51)"
    )


def chosen_by(table, tasks):
    """What the examples of some tasks choose by [N, V]: their own scores plus the task's, in standard deviations."""
    columns = []
    for task in tasks:
        own, mean = np.stack(table[f"examples/{task}"].to_pylist()), table[f"influence/{task}"].to_numpy()
        columns.append(own / own.std(0) + (mean / mean.std())[:, None])
    return np.hstack(columns)


def test_tasks_take_turns_and_the_report_draws_no_cut(finished):
    chosen = json.loads((finished.output / "selection.json").read_text())
    assert chosen["strategy"] == "round-robin"
    assert chosen["threshold"] is None
    table = pq.read_table(finished.output / "scores.parquet")
    examples = chosen_by(table, ["arithmetic", "spelling"])
    assert examples.shape[1] == 16
    for turn, best in enumerate(examples.argmax(axis=0)):  # each one's first choice, unless another took it before
        assert best in chosen["rows"][: turn + 1]
    report = (finished.output / "report.html").read_text()
    assert "round-robin" in report
    assert "cut at" not in report


def test_a_model_of_few_positions_reads_no_more_and_the_run_says_so(place):
    model = shutil.copytree(yaml.safe_load(place.recipe.read_text())["model"], place.path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    place.set(model=str(model))
    assert place.run(*NO_PROXY, "influence.estimator=tracin", "--stop-after", "score") == 0
    assert pq.read_table(place.output / "scores.parquet")["tokens"].to_numpy().max() == 20
    stages = place.record()["stages"]
    for name in ("data", "score"):
        assert any("rows are cut to 20 tokens, not 48" in warning for warning in stages[name]["warnings"])


def test_one_task_selects_and_the_report_shows_its_scores(copied):
    assert copied.run("--set", "select.task=spelling", "select.strategy=top") == 0
    chosen = json.loads((copied.output / "selection.json").read_text())
    scores = pq.read_table(copied.output / "scores.parquet")["influence/spelling"].to_numpy()
    assert chosen["rows"] == np.argsort(-scores, kind="stable")[: len(chosen["rows"])].tolist()
    assert chosen["task"] == "spelling"
    assert chosen["settings"] == {"task": "spelling", "strategy": "top", "fraction": 0.1}
    report = (copied.output / "report.html").read_text()
    assert "Influence on spelling, by which rows are selected" in report
    selected = copied.path / "for-spelling.jsonl"
    again = ["select", "--scores", str(copied.output), "--pool", str(copied.pool), "--output", str(selected), "--quiet"]
    assert main([*again, "--task", "spelling", "--strategy", "top"]) == 0
    assert json.loads((copied.path / "for-spelling.selection.json").read_text())["rows"] == chosen["rows"][:10]


def test_tasks_count_by_their_weights_and_only_the_selection_is_done_again(copied):
    top = "select.strategy=top"
    assert copied.run("--set", top, "--stop-after", "select") == 0
    assert copied.run("--set", top, "select.weights={spelling: 3}") == 0
    assert copied.done() == ["select", "attribute", "report"]
    table = pq.read_table(copied.output / "scores.parquet")
    each = {task: table[f"influence/{task}"].to_numpy() for task in ("arithmetic", "spelling")}
    wanted = each["arithmetic"] / each["arithmetic"].std() + 3 * each["spelling"] / each["spelling"].std()
    chosen = json.loads((copied.output / "selection.json").read_text())
    assert chosen["rows"] == np.argsort(-wanted, kind="stable")[: len(chosen["rows"])].tolist()
    assert chosen["weights"] == copied.record()["stages"]["select"]["weights"] == {"spelling": 3.0}
    report = (copied.output / "report.html").read_text()
    assert "Influence, all tasks together by weight (arithmetic 1, spelling 3)" in report
    again = ["select", "--scores", str(copied.output), "--pool", str(copied.pool), "--quiet", "--count", "20"]
    again += ["--strategy", "top"]
    output = copied.path / "weighed.jsonl"
    assert main([*again, "--output", str(output), "--set", "select.weights={spelling: 3, arithmetic: 1}"]) == 0
    assert output.read_bytes() == (copied.output / "selected.jsonl").read_bytes()


@pytest.mark.parametrize("strategy", ["top", "round-robin"])
def test_the_rows_scored_again_are_the_best_by_what_selection_goes_by(copied, strategy, capsys):
    options = ["refine.candidates=0.3", "select.task=spelling"]
    options.append(f"select.strategy={strategy}")
    assert copied.run("--set", *options) == 0
    assert "score" not in copied.done()
    refined, scores = (pq.read_table(copied.output / name / "scores.parquet") for name in ("refined", "."))
    refined, best = refined.to_pandas(), set(scores["influence/spelling"].to_pandas().nlargest(60).index)
    if strategy == "round-robin":
        examples = chosen_by(scores, ["spelling"])
        best = set(Turns(lambda: iter([examples]), [1.0] * 8, np.ones(200, bool))(60).tolist())
    known = refined.index[np.isfinite(refined["influence"])]
    assert set(known) == best
    record = copied.record()["stages"]["refine"]
    assert (record["candidates"], record["candidate_share"]) == (len(best), len(best) / 200)
    assert set(json.loads((copied.output / "selection.json").read_text())["rows"]) <= best
    if strategy == "top":
        chosen = refined["influence/spelling"].nlargest(20).index
        assert json.loads((copied.output / "selection.json").read_text())["rows"] == list(chosen)
    capsys.readouterr()
    assert main(["plan", str(copied.recipe), "--quiet", "--json", "--tflops=1", "--set", *options]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    # The curvature is measured again, because its files went with the end of the first run.
    spent = planned["refine"]["flops"] + planned["curvature"]["flops"]
    assert spent == pytest.approx(record["flops"], rel=0.35)


def test_the_best_rows_are_scored_again_on_the_target(copied):
    options = ["refine={}", "select.strategy=top"]
    options.append("influence.query_norm=0.8")  # of the proxy's scores alone
    assert copied.run("--set", *options) == 0
    refined = pq.read_table(copied.output / "refined/scores.parquet")
    record = json.loads((copied.output / "refined/refine.json").read_text())
    known = np.isfinite(refined["influence"].to_numpy(zero_copy_only=False))
    assert known.sum() == record["candidates"] == 60
    (checkpoint,) = json.loads((copied.output / "warmup/checkpoints.json").read_text())[-1:]
    copied.score([copied.output / "warmup" / checkpoint["path"]], copied.path / "own")
    own = pq.read_table(copied.path / "own/scores.parquet")
    np.testing.assert_allclose(
        refined["influence/arithmetic"].to_numpy(zero_copy_only=False)[known],
        own["influence/arithmetic"].to_numpy()[known] * checkpoint["learning_rate"],
        rtol=1e-3,
    )
    chosen = json.loads((copied.output / "selection.json").read_text())["rows"]
    assert known[chosen].all()
    best = set(np.argsort(-own["influence"].to_numpy())[: len(chosen)].tolist())
    assert len(best & set(chosen)) >= 0.6 * len(best)
    assert not list((copied.output / "refined").glob("candidates*"))
    assert copied.record()["cost"]["refine_flops"] > 0
    page = (copied.output / "report.html").read_text()
    assert "These are the proxy" in page
    assert "Scoring the best rows again took" in page
    first = (copied.output / "refined/scores.parquet").read_bytes()
    assert copied.run("--set", *options) == 0
    assert "refine" not in copied.done()
    # An audit changes no scores, and another share of candidates is scored anew.
    assert copied.run("--set", *options, "audit=false", "--stop-after", "refine") == 0
    assert copied.done() == []
    assert copied.run("--set", *options, "refine.candidates=0.4", "--stop-after", "refine") == 0
    assert copied.done() == ["refine"]
    assert (copied.output / "refined/scores.parquet").read_bytes() != first


def test_refine_alone_scores_as_the_table_was_scored(finished, tmp_path, capfd):
    """Also its curvature is that of the whole pool, and tasks in another order have their own scores."""
    checkpoints = json.loads((finished.output / "warmup/checkpoints.json").read_text())
    target = finished.output / "warmup" / checkpoints[-1]["path"]
    how = ["--set=influence.normalize=cosine", "--set=seed=3", "--set=influence.curvature_examples=64"]
    finished.score([finished.output / "aligned"], tmp_path / "proxy", *how, "--target", str(target))
    finished.score([target], tmp_path / "target", *how)
    command = ["refine", "--scores", str(tmp_path / "proxy"), "--pool", str(finished.pool), "--model", str(target)]
    command += ["--quiet", "--validation", *finished.tasks()[::-1]]  # and neither --normalize nor --max-length
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    own, whole = (pq.read_table(tmp_path / name / "scores.parquet") for name in ("target", "whole"))
    for task in ("arithmetic", "spelling"):
        a, b = (table[f"influence/{task}"].to_numpy(zero_copy_only=False) for table in (own, whole))
        known = np.isfinite(b)
        assert known.sum() == 30
        np.testing.assert_allclose(b[known], a[known], rtol=1e-2, atol=1e-3)
    assert main([*command[:-1], "--output", str(tmp_path / "third")]) == 2
    assert "give the validation sets of exactly these tasks" in capfd.readouterr().err


def test_a_proxy_is_judged_by_exact_scores_whatever_its_own_leave_out(finished, copied):
    assert copied.run("--set", "influence.query_norm=0.5", "--stop-after", "audit") == 0
    exact, cut = (pq.read_table(each.output / "audit/audit.parquet") for each in (finished, copied))
    for task in ("arithmetic", "spelling"):
        assert cut[f"target/{task}"].equals(exact[f"target/{task}"])
        assert not cut[f"proxy/{task}"].equals(exact[f"proxy/{task}"])


def test_an_alignment_is_watched_on_held_out_rows(finished):
    history = json.loads((finished.output / "aligned/alignment.json").read_text())
    points = history["held_out"]
    assert points[0]["step"] == 0
    assert history["best_step"] == max(points, key=lambda point: point["fidelity"])["step"]
    entry = finished.record()["stages"]["align"]["fidelity"]
    assert entry["after"] >= entry["before"] == points[0]["fidelity"]


def test_align_alone_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    from iprox.proxy import align as module

    monkeypatch.setattr(module, "EVALUATIONS", 4)
    target = json.loads((finished.output / "warmup/checkpoints.json").read_text())[-1]["path"]
    arguments = [
        "align", "--model", str(finished.output / "warmup" / target), "--proxy", str(finished.output / "proxy"),
        "--pool", str(finished.pool), "--epochs=1", "--set=data.max_length=48", "--set=proxy.align.batch_size=11",
        "--set=influence.estimator=tracin",
        "--set=proxy.align.held_out=60", "--quiet", "--validation", f"arithmetic={finished.path / 'arithmetic.jsonl'}",
    ]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    step, count = module._step, []

    def stopped(*given):
        count.append(given)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(module, "_step", stopped)
    assert main([*arguments, "--output", str(tmp_path / "resumed")]) == 130
    assert list((tmp_path / "resumed/align-state").glob("*.safetensors"))
    assert main([*arguments, "--output", str(tmp_path / "resumed")]) == 0
    done = len(json.loads((tmp_path / "whole/alignment.json").read_text())["steps"])  # it may have stopped early
    assert len(count) == 4 + done - 2  # three steps were done, and two of them saved
    assert not (tmp_path / "resumed/align-state").exists()
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("method", ["ipsvd", "target"])
def test_a_proxy_sized_by_its_fidelity(place, capfd, method):
    """The search's own bound is reached, and no try that is smaller reached it."""
    options = [
        "proxy.sparsity=null",
        f"proxy.method={method}",
        "proxy.fidelity=0.6",
        "proxy.held_out=60",
        "proxy.align=false",
        "warmup.fraction=0.02",
        "influence.estimator=tracin",
    ]
    assert place.run("--set", *options, "--stop-after", "audit") == 0
    found = json.loads((place.output / "proxy/compression.json").read_text())
    assert found["size"] == {"fidelity": 0.6}
    faithful = [entry for entry in found["tries"] if entry["lower"] >= 0.6]
    left_out = found["achieved_sparsity"]
    if method == "target":
        left_out = 1 - json.loads((place.output / "proxy/config.json").read_text())["quantization_config"]["depth"]
    assert max(entry["sparsity"] for entry in faithful) == pytest.approx(left_out, abs=0.03)
    assert place.record()["stages"]["compress"]["tries"] == found["tries"]
    assert place.run("--set", *options, "influence.per_example=true", "--stop-after", "audit") == 0
    assert "compress" not in place.done()
    assert place.run("--set", *options, "proxy.fidelity=0.9999", "--fresh") == 2
    assert "reaches a fidelity of" in capfd.readouterr().err


def test_compress_alone_by_fidelity(finished, tmp_path, capfd):
    target = json.loads((finished.output / "warmup/checkpoints.json").read_text())[-1]["path"]
    arguments = [
        "compress", "--model", str(finished.output / "warmup" / target), "--pool", str(finished.pool),
        "--set=proxy.held_out=60", "--set=data.max_length=48", "--quiet", "--fidelity=0.5",
        finished.few_curved, "--output", str(tmp_path / "proxy"),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "--fidelity and --validation go together" in capfd.readouterr().err
    assert main([*arguments, "--validation", f"arithmetic={finished.path / 'arithmetic.jsonl'}"]) == 0
    assert json.loads((tmp_path / "proxy/compression.json").read_text())["tries"]


def test_a_changed_setting_starts_an_interrupted_alignment_anew(copied, monkeypatch):
    from iprox.proxy import align as module

    options = ["audit=false", "proxy.align.epochs=4", "proxy.align.held_out=0"]
    monkeypatch.setattr(module, "EVALUATIONS", 4)
    step, count = module._step, []

    def stopped(*given):
        count.append(given)
        if len(count) == 14:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(module, "_step", stopped)
    assert copied.run("--set", *options, "--stop-after", "align") == 130
    assert list((copied.output / "align-state").iterdir())
    assert copied.run("--set", *options, "proxy.align.learning_rate=1e-4", "--stop-after", "align") == 0
    assert len(count) == 14 + 16
    assert not (copied.output / "align-state").exists()


def test_retraining_says_whether_the_scores_foretell_and_goes_on_where_it_was(copied, monkeypatch):
    settings = ["audit.lds=10", "audit.learning_rate=1e-3", "audit.sample=60"]
    trained = []

    def stopping(*arguments, **options):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(1)
        return retrained(*arguments, **options)

    retrained = retraining.validation_losses
    monkeypatch.setattr(retraining, "validation_losses", stopping)
    assert copied.run("--set", *settings, "--stop-after", "audit") == 130
    assert len(json.loads((copied.output / "audit/retrained.json").read_text())) == 4
    counting = lambda *a, **o: (trained.append(1), retrained(*a, **o))[1]  # noqa: E731
    monkeypatch.setattr(retraining, "validation_losses", counting)
    assert copied.run("--set", *settings) == 0
    assert len(trained) == 10
    found = json.loads((copied.output / "audit/lds.json").read_text())
    assert found["subsets"] == 10
    for sides in found["tasks"].values():
        for side in ("proxy", "target"):
            assert -1 <= sides[side]["lds"] <= 1
            assert sides[side]["interval"][0] <= sides[side]["interval"][1]
    assert copied.record()["stages"]["lds"]["flops"] > 0
    assert "linear datamodeling score" in (copied.output / "report.html").read_text()
    # Nothing hangs on it, and it is done once.
    assert copied.run("--set", *settings) == 0
    assert copied.done() == []


def test_the_terms_of_the_shown_rows_sum_to_their_scores_over_all_checkpoints(several):
    terms = pq.read_table(several.output / "attribution.parquet")
    scores = pq.read_table(several.output / "scores.parquet").take(terms["row"])
    assert len(terms) == 8
    assert terms["id"].to_pylist() == scores["id"].to_pylist()
    for column in ("influence/spelling", "influence/arithmetic", "influence"):
        sums = [sum(row) for row in terms[column].to_pylist()]
        assert sums == pytest.approx(scores[column].to_pylist(), rel=0.05, abs=1e-4)  # in bfloat16
    for tokens, supervised, row in zip(
        *(terms[c].to_pylist() for c in ("tokens", "supervised", "influence")), strict=True
    ):
        assert len(tokens) == len(supervised) == len(row)
        assert any(supervised)
    assert "<summary>Token by token" in (several.output / "report.html").read_text()


def test_the_target_is_asked_in_the_first_epoch_of_an_alignment_only(place, monkeypatch):
    options = ["warmup=false", "audit=false", "proxy.align.epochs=2", "proxy.align.held_out=0"]
    options += ["proxy.align.gradient_weight=1"]
    assert place.run("--set", *options, "--stop-after", "align") == 0
    assert place.record()["stages"]["align"]["target_asked"] == 0.5  # the second epoch reads what it said in the first
    assert list((place.output / "align-state").glob("*")) == []
    first = (place.output / "aligned/model.safetensors").read_bytes()
    # What is too large to keep is asked every time, which changes no factor.
    monkeypatch.setattr(alignment, "AUTO_BYTES", 0)
    assert place.run("--set", *options, "--stop-after", "align", "--fresh") == 0
    assert place.record()["stages"]["align"]["target_asked"] == 1
    assert (place.output / "aligned/model.safetensors").read_bytes() == first


def test_scores_that_foretell_what_training_does_have_a_high_lds(finished, tmp_path, monkeypatch):
    """Retraining is replaced by losses that fall by the target's own scores of the rows trained on."""
    target = json.loads((finished.output / "warmup/checkpoints.json").read_text())[-1]["path"]
    audited = pq.read_table(finished.output / "audit/audit.parquet")
    known = {}

    def falling(session, model, rows, held, settings, seed):
        chosen = [known[tuple(row.input_ids.tolist())] for row in rows]
        return [-sum(scores[task] for scores in chosen) for task in held]

    pool = Pool([str(finished.pool)])
    session = Session.create(max_length=48)
    checkpoint = str(finished.output / "warmup" / target)
    encoder = session.encoder(checkpoint)
    ids = audited["id"].to_pylist()
    examples = [example for example in pool if example.id in set(ids)]
    tasks = ("arithmetic", "spelling")
    for example, row in zip(examples, encoder.encode(examples), strict=True):
        place = ids.index(example.id)
        known[tuple(row.input_ids.tolist())] = {task: audited[f"target/{task}"][place].as_py() for task in tasks}
    monkeypatch.setattr(retraining, "validation_losses", falling)
    shutil.copytree(finished.output / "audit", tmp_path / "audit")
    validation = {task: Pool([str(finished.path / f"{task}.jsonl")]) for task in tasks}
    by_place = sorted(examples, key=lambda example: ids.index(example.id))

    def measure(validation):
        given = (session, checkpoint, by_place, validation, tmp_path / "audit", AuditSection(lds=30))
        retraining.measure_lds(retraining.Retraining(*given, "lds"))

    measure(validation)
    found = json.loads((tmp_path / "audit/lds.json").read_text())
    for task in tasks:
        assert found["tasks"][task]["target"]["lds"] == pytest.approx(1)
        assert found["tasks"][task]["proxy"]["lds"] > 0.5
    # Another validation set is another measurement.
    before = json.loads((tmp_path / "audit/retrained.json").read_text())
    other = {task: Pool([str(finished.path / "spelling.jsonl")]) for task in tasks}
    measure(other)
    assert len(json.loads((tmp_path / "audit/retrained.json").read_text())) == len(before) + 30


@pytest.mark.parametrize("estimator", ["perplexity", "rds"])
def test_scorers_without_gradients_are_charged_forward_passes_everywhere(place, estimator, capfd):
    """The target's cost is of the same scorer, and the audit's is of its rows."""
    options = ["warmup=false", f"influence.estimator={estimator}", "proxy.align=false", "audit.sample=40"]
    assert main(["plan", str(place.recipe), "--set", *options, "--json"]) == 0
    planned = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert place.run("--set", *options, "--stop-after", "score") == 0
    record = place.record()
    cost, stages = record["cost"], record["stages"]
    ratio = cost["proxy_flops_per_token"] / cost["target_flops_per_token"]
    assert ratio <= cost["score_flops"] / cost["target_score_flops"] < 1  # the head is the same on both
    per_row = (cost["score_flops"] + cost["target_score_flops"]) / 200
    assert stages["audit"]["flops"] < 1.3 * 40 * per_row + 3 * stages["score"]["query_flops"] / ratio
    for name in ("audit", "score"):
        assert planned["stages"][name]["flops"] == pytest.approx(stages[name]["flops"], rel=0.3)
    own = ["warmup=false", f"influence.estimator={estimator}", "proxy=false", "audit=false"]
    assert main(["plan", str(place.recipe), "--set", *own, "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["relative_score_cost"] == pytest.approx(1)

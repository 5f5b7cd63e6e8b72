"""What happens to a run folder that is damaged, and to a run that is ended by a signal."""

import json
import os
import signal

import pytest

from iprox.cli import main
from iprox.stages import alignment, scoring


def change_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("output", "again"),
    [
        ("warmup/checkpoints.json", "warmup"),
        ("proxy/model.safetensors", "compress"),
        ("aligned/model.safetensors", "align"),
        ("scores.parquet", "score"),
        ("selected.jsonl", "select"),
    ],
)
def test_a_damaged_output_is_made_again_and_that_is_said(copied, finished, capfd, output, again):
    change_a_byte(copied.output / output)
    assert main(["run", str(copied.recipe)]) == 0
    assert copied.done() == [again]
    assert f"{again}: done again, because its output {output} is damaged" in capfd.readouterr().err
    assert copied.result() == finished.result()


@pytest.mark.parametrize("output", ["aligned/model.safetensors", "warmup/checkpoints.json"])
def test_a_part_of_an_output_that_is_missing_is_made_again(copied, finished, capfd, output):
    (copied.output / output).unlink()
    assert main(["run", str(copied.recipe)]) == 0
    assert f"its output {output} is missing" in capfd.readouterr().err
    assert copied.result() == finished.result()


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "{}", "[" * 9999])
def test_a_damaged_record_is_named(copied, refused, content):
    (copied.output / "run.json").write_text(content)
    said = refused("run", copied.recipe, "--quiet")
    assert f"{copied.output / 'run.json'}: is damaged" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("stages", ["x", {"score": 1}, {"score": {"seconds": 1}}, {"score": {"key": "x"}}, None])
def test_a_record_without_what_a_run_needs_is_named(copied, refused, stages):
    record = copied.record()
    (copied.output / "run.json").write_text(json.dumps({**record, "stages": stages}))
    assert f"{copied.output / 'run.json'}: is damaged" in refused("run", copied.recipe, "--quiet")


@pytest.mark.parametrize("options", [[], ["--fresh", "--stop-after", "data"]])
def test_links_out_of_the_run_folder_are_not_followed(copied, tmp_path, options):
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep/mine.partial").write_text("mine")
    (copied.output / "proxy").rename(tmp_path / "elsewhere")
    (copied.output / "proxy").symlink_to(victim)
    (copied.output / "audit/link.partial").symlink_to(victim)
    assert copied.run(*options) == 0
    assert [str(file.relative_to(victim)) for file in victim.rglob("*")] == ["deep", "deep/mine.partial"]
    assert not (copied.output / "audit/link.partial").is_symlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_ends_says_how_to_go_on_and_does(copied, finished, capfd, monkeypatch, number):
    before = signal.signal(number, signal.SIG_DFL)  # Ray sets a handler of its own in a process that has used it
    (copied.output / "scores.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", lambda *_, **__: os.kill(os.getpid(), number))
        assert main(["run", str(copied.recipe), "--quiet"]) == 130
    assert capfd.readouterr().err == "iprox: interrupted; the same command (without --fresh) resumes from here\n"
    assert signal.signal(number, before) is signal.SIG_DFL
    assert copied.run() == 0
    assert copied.result() == finished.result()


def test_a_signal_that_is_ignored_stays_ignored(copied, monkeypatch):
    """As `nohup` has it."""
    monkeypatch.setattr(scoring, "score", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        (copied.output / "scores.parquet").unlink()
        with pytest.raises(TypeError):  # it goes on with what the stand-in returns
            raise TypeError if copied.run() == 1 else AssertionError
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_state_of_an_alignment_starts_it_again(place, finished, monkeypatch, capfd):
    saved = alignment.align
    monkeypatch.setattr("iprox.proxy.align.KEEP_EVERY", 0.0)

    def stop(*arguments, progress, **options):
        def advance(count, **how):
            progress(count, **how)
            if options["state"].is_file():
                raise KeyboardInterrupt

        return saved(*arguments, progress=advance, **options)

    for damage in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(alignment, "align", stop)
            assert place.run() == 130
        (state,) = (place.output / "align-state").glob("*.safetensors")
        if damage:
            change_a_byte(state)
            assert place.run() == 0
            assert "is damaged" in capfd.readouterr().err
            assert place.result() == finished.result()


@pytest.mark.parametrize("content", ["{", "[1]", '[{"path": "checkpoint-1"}]', '{"a": 1}'])
def test_a_damaged_list_of_checkpoints_is_named(copied, refused, tmp_path, content):
    (copied.output / "warmup/checkpoints.json").write_text(content)
    models = sorted((copied.output / "warmup").glob("checkpoint-*"))
    given = ["--pool", copied.pool, "--validation", *copied.tasks(), "--quiet", "--output", tmp_path / "out"]
    said = refused("score", "--model", *models, *given)
    assert f"{copied.output / 'warmup/checkpoints.json'}: is damaged" in said


@pytest.mark.parametrize("output", ["audit/audit.json", "selection.json", "proxy/compression.json", "scores.parquet"])
def test_a_report_is_made_of_files_as_they_were_written(copied, refused, output):
    file = copied.output / output
    file.write_bytes(file.read_bytes() + b" ")
    assert f"{file}: is not as its stage wrote it" in refused("report", copied.output)

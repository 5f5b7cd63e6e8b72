"""What can be known before any work is refused before any work, by the run and by its plan."""

import json
import shutil
import socket

import pytest

from iprox.cli import main
from iprox.engine import cluster as ray_cluster
from iprox.engine.cluster import check_ray
from iprox.errors import InputError
from iprox.models.loading import load_model
from iprox.run import plan, steps


@pytest.fixture
def both(place, refused):
    """What `run` and `plan` say, which must be the same and leave nothing behind."""

    def call(*settings):
        before = place.files()
        options = [option for setting in settings for option in ("--set", setting)]
        said = {refused(command, place.recipe, "--quiet", *options) for command in ("run", "plan")}
        assert place.files() == before
        (only,) = said
        assert len(only.splitlines()) == 1
        return only

    return call


def test_a_size_out_of_reach(both):
    assert "the largest is 0.9" in both("proxy.sparsity=0.9999")
    assert "the smallest is 0." in both("proxy.sparsity=null", "proxy.flops=1e-9")
    assert "less than one decoder layer" in both("proxy.method=layers", "proxy.sparsity=0.99", "proxy.align=false")


def test_compress_refuses_it_before_it_reads(place, refused, model):
    said = refused(
        *("compress", "--model", model, "--pool", place.pool, "--sparsity", "0.9999", "--output", place.path / "p")
    )
    assert said.splitlines()[-1].startswith("iprox: sparsity 0.9999")
    assert "read" not in said.partition("iprox:")[0]


def test_more_workers_than_the_machine_has(both, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "RUNNING_CLUSTER", tmp_path / "nothing")
    monkeypatch.setattr(ray_cluster, "_is_running", lambda: False)
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: object())
    assert "ray_workers: 1000 workers requested, but this machine has" in both("ray_workers=1000")
    check_ray(1, "cpu")
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{cluster.getsockname()[1]}")
        check_ray(1000, "cpu")  # a cluster may have them
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "garbage"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"no Ray cluster answers at {address} (from RAY_ADDRESS" in both("ray_workers=1")
    monkeypatch.delenv("RAY_ADDRESS")
    (tmp_path / "nothing").write_text("127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in both("ray_workers=1")
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: None)
    assert "Ray is not installed; pip install" in both("ray_workers=1")


def test_an_output_that_is_a_file(both, place):
    assert "is a file; choose a folder" in both(f"output={place.pool}")
    assert "so no folder can be in it" in both(f"output={place.pool / 'below'}")
    assert "NUL" in both('output="a\\0b"')
    assert "too long" in both(f"output={'a' * 300}")


def test_an_output_with_something_else(both, place):
    place.output.mkdir()
    (place.output / "mine.txt").write_text("mine")
    assert "is not empty and has no run.json" in both()
    assert (place.output / "mine.txt").read_text() == "mine"


def test_a_pool_that_is_judged_by_itself(both, place, refused, model):
    assert "part of both the pool and the validation set of spelling" in both(f"data.validation.spelling={place.pool}")
    link = place.path / "link.jsonl"
    link.symlink_to(place.pool)
    assert "judged by themselves" in both(f"data.validation.spelling={link}")
    for command in ("score", "audit"):
        options = ["--proxy", model] if command == "audit" else []
        said = refused(
            *(command, "--model", model, *options, "--pool", place.pool, "--validation", f"a={place.pool}"),
            *("--output", place.path / "out"),
        )
        assert "judged by themselves" in said


def test_a_proxy_does_not_choose_what_is_fetched(finished, tmp_path, capfd, monkeypatch):
    from iprox.settings import InfluenceSection
    from iprox.stages import targets

    proxy = tmp_path / "proxy"
    shutil.copytree(finished.output / "proxy", proxy)
    config = json.loads((proxy / "config.json").read_text())
    config["quantization_config"]["target"] = "some/\x1b[2Jrepo"
    (proxy / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(targets.Session, "model", lambda _, path, *rest, **more: asked.append(path))
    session = targets.Session.create("cpu", "float32")
    influence = InfluenceSection()
    assert targets.query_target(str(proxy), None, influence, session) is None
    (said,) = session.reporter.take_warnings()
    assert asked == []
    assert "no folder some/?[2Jrepo here" in said
    assert "--target" in said
    assert "\x1b" not in said
    with pytest.raises((InputError, AttributeError)):  # what the user names is asked for
        targets.query_target(str(proxy), "some/repo", influence, session)
    assert asked == ["some/repo"]
    load_model(proxy)


@pytest.mark.parametrize(("command", "code"), [("plan", 0), ("run", 130)])
def test_memory_that_will_not_do_is_said_before_any_work(place, capfd, monkeypatch, command, code):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "warm_up", stop)
    monkeypatch.setattr(plan, "memory_now", lambda _: (10, 1000))
    assert main([command, str(place.recipe), "--quiet"]) == code
    assert "GB of memory, and cpu has 0.0 GB; set batch_tokens lower (now 1024)" in capfd.readouterr().err

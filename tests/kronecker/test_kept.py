"""The curvature in files: equal to what was measured, and damage is named."""

import pytest
import torch

from iprox.errors import InputError
from iprox.kronecker.eigen import EigenBasis
from iprox.kronecker.kept import LISTING, KeptCurvature, is_kept, keep_curvature


def parts(basis):
    return [getattr(basis, part) for part in EigenBasis.__slots__]


@pytest.fixture
def curvature():
    return {
        f"layers.{i}.proj": EigenBasis(torch.rand(3, 3), torch.rand(4 + i, 4 + i).T, torch.rand(3, 4 + i))
        for i in range(2)
    }


def test_what_is_kept_is_what_was_measured(curvature, tmp_path):
    assert not is_kept(tmp_path / "kept")
    keep_curvature([{name: basis} for name, basis in curvature.items()], tmp_path / "kept")
    assert is_kept(tmp_path / "kept")
    kept = KeptCurvature(tmp_path / "kept", torch.device("cpu"))
    assert list(kept) == list(curvature)
    assert "lm_head" not in kept
    for name, basis in curvature.items():
        for part in EigenBasis.__slots__:
            assert torch.equal(getattr(kept[name], part), getattr(basis, part))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_is_named(curvature, tmp_path, damage):
    folder = tmp_path / "kept"
    keep_curvature([{name: basis} for name, basis in curvature.items()], folder)
    file = folder / "00001.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    kept = KeptCurvature(folder, torch.device("cpu"))
    with pytest.raises(InputError, match=rf"{file}: cannot be read .* delete {folder}"):
        kept["layers.1.proj"]


def test_asking_for_a_layer_reads_none(curvature, tmp_path):
    keep_curvature([curvature], tmp_path / "kept")
    for file in (tmp_path / "kept").glob("*.safetensors"):
        file.unlink()
    kept = KeptCurvature(tmp_path / "kept", torch.device("cpu"))
    assert next(iter(curvature)) in kept
    assert "lm_head" not in kept


def test_nothing_is_left_of_what_fails_half_way(curvature, tmp_path):
    def groups():
        yield curvature
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        keep_curvature(groups(), tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_faster_is_not_disturbed(curvature, tmp_path):
    def groups():
        keep_curvature([curvature], tmp_path / "kept")
        yield {
            name: EigenBasis(*(torch.zeros_like(part) for part in parts(basis))) for name, basis in curvature.items()
        }

    keep_curvature(groups(), tmp_path / "kept")
    kept = KeptCurvature(tmp_path / "kept", torch.device("cpu"))
    assert all(torch.equal(kept[name].left, basis.left) for name, basis in curvature.items())
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_a_folder_without_the_list_of_layers_is_not_complete(curvature, tmp_path):
    keep_curvature([curvature], tmp_path / "kept")
    (tmp_path / "kept" / LISTING).unlink()
    assert not is_kept(tmp_path / "kept")

import hashlib
import json
import pickle
import pickletools
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medtrain.errors import RegistryError
from medtrain.serve.package import Package, verify_package, write_package

DETAILS = {
    "system": "tiny",
    "variant": "smoke",
    "stage": "only",
    "run_key": "0123abcd",
    "data_fingerprint": "d" * 64,
    "code_fingerprint": "c" * 64,
    "commit": "f" * 40,
    "is_synthetic": True,
    "pretrained": {"encoder": "random initialisation"},
    "landmarks": ["sella", "nasion"],
}
SPLIT = "case_id,group,role,checksum,part\na,1,train,x,1\nb,2,val,x,1\nc,3,test,x,1\nd,4,test,x,1\n"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({"layer.weight": np.ones((2, 3), np.float32), "steps": np.array([7])}, path)
    return path


@pytest.fixture
def package(tmp_path: Path, weights: Path) -> Package:
    return write(tmp_path / "package", weights)


def write(folder: Path, weights: Path, **changes: object) -> Package:
    content = {
        "config_yaml": "name: tiny/smoke:only\n",
        "split_csv": SPLIT,
        "metrics": {"test_error": 1.25},
        "card": "Finds two landmarks. Not for children.",
        "details": DETAILS,
    }
    return write_package(folder, weights=weights, **{**content, **changes})  # type: ignore[arg-type]


def test_package_holds_weights_config_split_metrics_details_and_card(package, weights):
    names = {path.name for path in package.folder.iterdir()}
    assert names == {
        "model.safetensors",
        "config.yaml",
        "split.csv",
        "metrics.json",
        "model.json",
        "README.md",
        "SHA256SUMS",
    }
    assert package.weights.read_bytes() == weights.read_bytes()
    assert package.read_text("split.csv") == SPLIT
    assert json.loads(package.read_text("metrics.json")) == {"test_error": 1.25}
    assert package.details["format"] == 1
    assert package.details["landmarks"] == ["sella", "nasion"]
    assert package.details["medtrain_version"]


def test_coreutils_can_check_the_package(package):
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"],
        cwd=package.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 6


def test_files_are_readable_by_all_whoever_wrote_the_weights(tmp_path, weights):
    weights.chmod(0o600)
    package = write(tmp_path / "package", weights)
    assert {path.stat().st_mode & 0o777 for path in package.folder.iterdir()} == {0o644}


def test_equal_content_has_an_equal_digest_and_other_content_another(tmp_path, weights, package):
    again = write(tmp_path / "again", weights)
    other = write(tmp_path / "other", weights, metrics={"test_error": 1.5})
    assert again.digest == package.digest != other.digest


def test_card_tells_results_data_and_provenance_and_says_synthetic_aloud(package):
    card = package.read_text("README.md")
    assert "**Trained and tested on SYNTHETIC data.**" in card
    assert "Finds two landmarks. Not for children." in card
    assert "| test_error | 1.25 |" in card
    assert "| test | 2 |" in card
    assert "| train | 1 |" in card
    assert "random initialisation" in card
    assert DETAILS["commit"] in card


def test_card_of_a_model_of_real_data_does_not_speak_of_synthetic_ones(tmp_path, weights):
    package = write(tmp_path / "real", weights, details={**DETAILS, "is_synthetic": False})
    assert "SYNTHETIC" not in package.read_text("README.md")


def test_cards_line_for_loading_gives_the_weights(package, monkeypatch):
    torch_line = 'from safetensors.torch import load_file; state = load_file("model.safetensors")'
    assert torch_line in package.read_text("README.md")
    monkeypatch.chdir(package.folder)
    assert load_file("model.safetensors")["layer.weight"].shape == (2, 3)


def test_no_file_is_a_pickle_or_an_archive(package):
    for path in package.folder.iterdir():
        assert not zipfile.is_zipfile(path), path
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("name", ["system", "run_key", "is_synthetic", "pretrained"])
def test_details_must_say_what_the_model_is(tmp_path, weights, name):
    details = {key: value for key, value in DETAILS.items() if key != name}
    with pytest.raises(RegistryError, match=name):
        write(tmp_path / "package", weights, details=details)


def test_names_that_could_leave_a_query_or_a_folder_are_refused(tmp_path, weights):
    with pytest.raises(RegistryError, match="run_key"):
        write(tmp_path / "package", weights, details={**DETAILS, "run_key": "a' or '1'='1"})


def test_metrics_must_be_finite(tmp_path, weights):
    with pytest.raises(RegistryError, match="test_error"):
        write(tmp_path / "package", weights, metrics={"test_error": float("nan")})


def test_folder_with_something_in_it_is_not_written_to(tmp_path, weights):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.txt").write_text("keep")
    with pytest.raises(RegistryError, match="must be empty"):
        write(tmp_path / "package", weights)
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.yaml", "split.csv", "metrics.json", "README.md"]
)
def test_changed_file_is_refused(package, name):
    path = package.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RegistryError, match="changed or damaged"):
        verify_package(package.folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "SHA256SUMS"])
def test_missing_file_is_refused(package, name):
    (package.folder / name).unlink()
    with pytest.raises(RegistryError, match=name):
        verify_package(package.folder)


def test_additional_file_is_refused(package):
    (package.folder / "model.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RegistryError, match=r"model\.pkl"):
        verify_package(package.folder)


def test_link_instead_of_a_file_is_refused(package, tmp_path):
    (tmp_path / "elsewhere").write_bytes((package.folder / "config.yaml").read_bytes())
    (package.folder / "config.yaml").unlink()
    (package.folder / "config.yaml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="plain file"):
        verify_package(package.folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_sums_that_lead_out_of_the_folder_are_refused(package, name):
    path = package.folder / "SHA256SUMS"
    path.write_text(path.read_text() + f"{'0' * 64}  {name}\n")
    with pytest.raises(RegistryError, match="SHA256SUMS must name each file"):
        verify_package(package.folder)


def test_sums_must_name_every_file(package):
    path = package.folder / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "metrics" not in line))
    with pytest.raises(RegistryError, match=r"metrics\.json"):
        verify_package(package.folder)


def header(tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pickle.dumps({"weights": [1.0] * 100}), id="pickle"),
        pytest.param(b"PK\x03\x04" + b"\0" * 200, id="archive of torch.save"),
        pytest.param((2**62).to_bytes(8, "little") + b"{}", id="header longer than the file"),
        pytest.param(b"\x01", id="too short for a header"),
        pytest.param(b"\x04\0\0\0\0\0\0\0nope", id="header that is not JSON"),
        pytest.param(header([1, 2]), id="header that is not an object"),
        pytest.param(
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 4,
            id="tensor beyond the end",
        ),
        pytest.param(
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 9,
            id="bytes that belong to no tensor",
        ),
        pytest.param(
            header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}) + b"\0" * 4,
            id="shape that does not fit the bytes",
        ),
        pytest.param(
            header(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                }
            )
            + b"\0" * 12,
            id="tensors that overlap",
        ),
        pytest.param(
            header({"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 8]}}) + b"\0" * 8,
            id="unknown type",
        ),
    ],
)
def test_weights_that_are_not_sound_safetensors_are_refused_even_with_the_right_sum(package, data):
    package.weights.write_bytes(data)
    renew_sum(package, "model.safetensors")
    with pytest.raises(RegistryError, match=r"model\.safetensors"):
        verify_package(package.folder)


def test_package_of_a_later_format_says_to_update(package):
    path = package.folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    renew_sum(package, "model.json")
    with pytest.raises(RegistryError, match=r"Update medtrain\."):
        verify_package(package.folder)


def test_text_that_is_no_text_is_refused(package):
    (package.folder / "config.yaml").write_bytes(pickle.dumps("config"))
    renew_sum(package, "config.yaml")
    with pytest.raises(RegistryError, match="UTF-8"):
        verify_package(package.folder)


def renew_sum(package: Package, name: str) -> None:
    sums = package.folder / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {name}")]
    actual = hashlib.sha256((package.folder / name).read_bytes()).hexdigest()
    sums.write_text("\n".join([*lines, f"{actual}  {name}"]) + "\n")

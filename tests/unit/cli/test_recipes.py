import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from medtrain.cli import doctor as doctor_module
from medtrain.cli import recipes as recipes_module
from medtrain.config import digest, dump, identity
from medtrain.errors import ConfigError
from medtrain.overrides import read_config_file
from medtrain.recipes import recipes, resolve

NAME = "cephalometric/small:transformer"

app = typer.Typer(rich_markup_mode="rich")
for command in (recipes_module.recipes, recipes_module.show, doctor_module.doctor):
    app.command(command.__name__)(command)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class TestRecipes:
    def test_every_system_shows_variants_stages_overlays_and_gates(self) -> None:
        output = call("recipes").output
        for recipe in recipes().values():
            own = output.partition(f"{recipe.system}: {recipe.title}\n")[2].partition("\n\n")[0]
            for variant, stages in recipe.variants.items():
                row = next(r for r in own.splitlines() if r.split()[:1] == [variant])
                assert " → ".join(stages) in row
                assert str(recipe.gates[variant]) in row
            for overlay in recipe.overlays:
                assert f"+{overlay}" in own

    def test_a_system_shows_its_stages_and_what_overlays_do(self) -> None:
        output = call("recipes", "cephalometric").output
        assert "cephalometric/clinical" in output
        assert "1 heatmap + 0.3 ssim + 1 coord + 0.1 consistency" in output
        assert "+flip: data.augmentation.flip=true" in output
        assert "D-M03 (flipped films)" in output

    def test_a_variant_shows_itself_alone(self) -> None:
        output = call("recipes", "cephalometric/small").output
        assert "cephalometric/small\n" in output
        assert "clinical" not in output

    def test_what_does_not_exist_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'cephalometric'"):
            call("recipes", "cephalometrics")


class TestShow:
    def test_values_stand_beside_their_origins(self) -> None:
        lines = call("show", f"{NAME}+oom_rescue", "epochs=20").output.splitlines()
        found = {line.split("#")[0].strip(): line.split("# ")[-1] for line in lines if "#" in line}
        assert found["epochs: 20"] == "override"
        assert found["micro: 2"] == "overlay oom_rescue"
        assert found["layers: 2"] == "recipe"
        assert found["seed: 42"] == "default"
        columns = {line.index("#") for line in lines if "#" in line and len(line) < 90}
        assert len(columns) == 1

    @pytest.mark.parametrize("option", [[], ["--plain"]])
    def test_what_is_printed_is_a_file_for_config(self, option: list[str], tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        overrides = ["optim.groups.norm={match: [*.norm.*], lr: 1}", "losses.ssim=null"]
        path.write_text(call("show", NAME, *overrides, *option).output)
        assert read_config_file(path) == dump(resolve(NAME, overrides).stage)
        again = call("show", NAME, "--config", str(path), "--plain").output
        assert yaml.safe_load(again) == dump(resolve(NAME, overrides).stage)

    def test_plain_values_have_no_comments(self) -> None:
        assert "#" not in call("show", NAME, "--plain").output

    def test_the_identity_leaves_out_places_and_has_a_digest(self) -> None:
        output = call("show", NAME, "data.root=/a", "--identity").output
        what = identity(resolve(NAME).stage)
        assert f"# digest: {digest(what)}" in output
        assert yaml.safe_load(output) == what
        assert "/a" not in output

    def test_without_a_stage_all_are_shown(self) -> None:
        output = call("show", "cephalometric/small", "transformer:epochs=3", "seed=7").output
        trees = list(yaml.safe_load_all(output))
        assert [tree["epochs"] for tree in trees] == [50, 3, 100]
        assert {tree["seed"] for tree in trees} == {7}

    def test_a_mistake_in_one_of_all_stages_names_the_stage(self) -> None:
        with pytest.raises(ConfigError, match=r"in stage baseline: losses.*STAGE:KEY=VALUE"):
            call("show", "cephalometric/small", "losses.coord.weight=1")

    def test_a_run_s_configuration_needs_its_stage(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(call("show", NAME, "--plain").output)
        with pytest.raises(ConfigError, match="name that stage"):
            call("show", "cephalometric/small", "--config", str(path))


class TestDoctor:
    def test_an_error_forbids(self) -> None:
        result = call("doctor", f"{NAME}+flip")
        assert result.exit_code == 1
        assert "D-M03 error: data.augmentation.flip mirrors films" in result.output
        assert "1 of them forbid a run" in result.output

    def test_an_allowed_error_does_not(self) -> None:
        result = call("doctor", f"{NAME}+flip", "--allow", "D-M03")
        assert result.exit_code == 0
        assert "D-M03 error (allowed)" in result.output

    def test_a_rule_that_does_not_exist_cannot_be_allowed(self) -> None:
        with pytest.raises(ConfigError, match="names no rule"):
            call("doctor", NAME, "--allow", "D-M99")

    def test_facts_let_rules_judge(self, tmp_path: Path) -> None:
        lacking = "not evaluated: D-X07 (no fact num_parameters): run `medtrain doctor"
        assert lacking in call("doctor", NAME).output
        path = tmp_path / "facts.json"
        facts = {"num_parameters": 10**9, "num_train_cases": 100, "landmark_16_from_7_mm": {}}
        path.write_text(json.dumps(facts))
        output = call("doctor", NAME, "--facts", str(path)).output
        assert "not evaluated" not in output
        assert "D-X07 warning: 1,000,000,000 parameters" in output

    def test_all_stages_are_examined(self) -> None:
        result = call("doctor", "cephalometric/seed_literal", "--json")
        assert result.exit_code == 1
        answer = json.loads(result.output)
        assert answer["blocking"] == ["D-M03"]
        stages = {f["stage"] for f in answer["findings"] if f["rule"] == "D-M03"}
        assert len(stages) == 3
        assert {missing["fact"] for missing in answer["not_evaluated"]} == {
            "num_parameters",
            "num_train_cases",
            "landmark_16_from_7_mm",
        }

    def test_a_saved_configuration_is_examined(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(call("show", f"{NAME}+flip", "--plain").output)
        assert call("doctor", NAME, "--config", str(path)).exit_code == 1


@pytest.mark.parametrize("command", ["recipes", "show", "doctor"])
def test_help_has_examples(command: str) -> None:
    output = call(command, "--help").output
    assert "Examples" in output
    assert f"medtrain {command} cephalometric" in output


def test_these_commands_load_nothing_heavy() -> None:
    program = """
import sys
from medtrain.cli.doctor import doctor
from medtrain.cli.recipes import recipes, show
recipes("cephalometric")
show("cephalometric:baseline")
doctor("cephalometric")
heavy = {"torch", "torchvision", "timm", "monai", "transformers", "mlflow", "kfp", "kubernetes",
         "boto3", "matplotlib", "PIL", "numpy", "scipy", "psutil"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"

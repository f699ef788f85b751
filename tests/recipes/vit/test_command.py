import json

import pytest
from typer.testing import CliRunner

from learnables.cli import app
from learnables.errors import LearnablesError
from learnables.recipes.vit.command import run

TOY = ["--set=dim=16", "--set=depth=1", "--max-steps=2", "--device=cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["train", "vit", *arguments])


def test_command_trains_and_says_where_the_report_is(tmp_path):
    done = invoke(*TOY, "--name=demo", f"--out={tmp_path}", "--set=layer-scale=0.1", "--seed=3")
    assert done.exit_code == 0, done.output
    report = tmp_path / "demo" / "report.html"
    assert str(report) in done.output.replace("\n", "")
    assert report.is_file()
    config = json.loads((tmp_path / "demo" / "config.json").read_text())["config"]
    assert (config["layer_scale"], config["seed"], config["max_steps"]) == (0.1, 3, 2)

    again = invoke(f"--resume={tmp_path / 'demo'}", "--device=cpu")  # finished: measured again
    assert again.exit_code == 0, again.output
    assert "test accuracy" in again.output


def test_folder_of_images_is_trained_on(tmp_path):
    from PIL import Image

    for i in range(20):
        for name, color in (("red", (250, i, 0)), ("blue", (0, i, 250))):
            path = tmp_path / "pets" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), color).save(path)
    done = invoke(
        f"--data={tmp_path / 'pets'}",
        f"--out={tmp_path}",
        "--name=pets-run",
        "--batch-size=16",
        "--epochs=2",
        "--device=cpu",
        "--set=image_size=8",
        "--set=dim=16",
        "--set=depth=1",
    )
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "pets-run" / "config.json").read_text())["config"]
    assert config["data"] == str(tmp_path / "pets")
    assert config["registers"] == 4  # the preset of folders


@pytest.mark.parametrize(
    "arguments",
    [["--data=nowhere"], ["--device=toaster"], ["--set=dim=15"], ["--batch-size=9999"]],
)
def test_refused_run_leaves_no_folder(tmp_path, arguments):
    done = invoke(*TOY, f"--out={tmp_path}", *arguments)
    assert isinstance(done.exception, LearnablesError)
    assert not list(tmp_path.iterdir())


def test_resumed_run_keeps_its_settings(tmp_path):
    with pytest.raises(LearnablesError, match="keeps its settings"):
        run({"epochs": 3}, resume=tmp_path)
    with pytest.raises(LearnablesError, match="keeps its settings"):
        run({}, name="other", resume=tmp_path)


def test_setting_without_a_value_is_refused():
    with pytest.raises(LearnablesError, match="--set dim=1"):
        run({}, ["dim"])

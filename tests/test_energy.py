"""Energy by RAPL and NVML, from counters that a test turns; operations of an image."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clbench import energy, evaluation
from clbench.data.images import Images
from clbench.energy import Meter
from clbench.methods.base import silent
from clbench.spent import Spent
from clbench.strategies.finetune import Finetune
from clbench.testing.small import SmallDetector, images

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of two CPU packages, whose counters begin anew after 1,000,000 microjoules; of a part of one, and of the machine."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("999999\n")
        kind = "package" if name.endswith((":0", ":1")) and name.count(":") == 1 else "part"
        (tmp_path / name / "name").write_text("psys" if name.endswith(":2") else f"{kind}-{name[-1]}")
        turn(tmp_path / name, 900_000)
    return [tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:1"]


def turn(package: Path, microjoules: int) -> None:
    (package / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_are_added_up_and_a_counter_that_begins_anew_goes_on(
    packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(CPU)
    assert (meter.available, meter.source, meter.joules()) == (True, "2 CPU packages (RAPL)", 0)
    turn(packages[0], 950_000)
    assert meter.joules() == pytest.approx(0.05)
    turn(packages[0], 10_000)  # 60,000 on
    turn(packages[1], 900_500)
    assert meter.joules() == pytest.approx(0.1105)
    monkeypatch.setattr(energy, "_EVERY_S", -1)
    for _ in range(3):  # as progress does: no round of the counter is lost
        for reading in (800_000, 10_000):
            turn(packages[0], reading)
            meter.keep_up()
    assert meter.joules() == pytest.approx(3.1105)


def test_what_cannot_be_read_is_said_and_not_counted(
    packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        (package / "energy_uj").unlink()
        (package / "energy_uj").mkdir()  # as unreadable for root as for others
    meter = Meter(CPU)
    assert not meter.available and meter.joules() == 0 and "needs the right to read" in meter.source
    monkeypatch.setattr(energy, "POWERCAP", packages[0])
    assert "does not tell the CPU's energy" in Meter(CPU).source
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in Meter(torch.device("cuda", 0)).source


def test_a_gpu_is_found_by_its_identity(packages: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for NVML and for CUDA: no GPU is needed."""
    counters = {"GPU-1f-2e": 5_000.0, "GPU-other": 0.0}  # millijoules
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda identity: identity,
        nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1f-2e"))
    meter = Meter(torch.device("cuda", 3))
    assert meter.source == "GPU 3 (NVML), 2 CPU packages (RAPL)"
    counters["GPU-1f-2e"] += 2_500
    turn(packages[1], 950_000)
    assert meter.joules() == pytest.approx(2.55)

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: 1 / 0)
    monkeypatch.setattr(nvml, "NVMLError", ZeroDivisionError)
    broken = Meter(torch.device("cuda", 3))  # the packages alone would be half of the figure
    assert not broken.available and "NVML does not tell" in broken.source


def test_joules_go_on_in_the_next_process_unless_one_could_not_count_them(packages: list[Path]) -> None:
    spent = Spent(CPU)
    with spent.on("train_s"):
        turn(packages[0], 950_000)
        assert spent.so_far()["train_j"] == pytest.approx(0.05)
    turn(packages[0], 960_000)  # neither training nor evaluation
    saved = spent.so_far()
    assert (saved["train_j"], saved["eval_j"]) == (pytest.approx(0.05), 0)

    continued = Spent(CPU)
    continued.restore(saved)
    with continued.on("eval_s"):
        turn(packages[1], 901_000)
    assert continued.so_far()["train_j"] == pytest.approx(0.05)
    assert continued.so_far()["eval_j"] == pytest.approx(0.001)
    elsewhere = {name: value for name, value in saved.items() if not name.endswith("_j")}
    elsewhere["train_s"] += 100
    continued.restore(elsewhere)
    assert "train_j" not in continued.so_far()


def test_operations_of_an_image_are_those_of_its_convolutions(packages: list[Path]) -> None:
    side = 48
    strategy = Finetune(SmallDetector())
    cost = evaluation.inference_cost(strategy, Images.of(images(3, 0, side)), 0, CPU, silent, Meter(CPU))
    # An encoder from 3 to 8 channels at half the size, and back: 3 x 3 and 4 x 4 weights, two operations each.
    expected = 2 * (side // 2) ** 2 * 8 * 3 * (3 * 3 + 4 * 4)
    assert cost["gflop"] * 10**9 == pytest.approx(expected)
    assert cost["ms"] > 0 and cost["j"] == 0

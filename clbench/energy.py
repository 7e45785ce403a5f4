"""Energy that a run takes, where the machine tells: by NVML of a GPU, by RAPL of CPU packages.

Both count all that runs there, other processes too.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from clbench.errors import counted

POWERCAP = Path("/sys/class/powercap")

_EVERY_S = 60  # 65 kJ, as small as the range of a counter can be, last five minutes at 200 W

Counter = Callable[[], float]  # joules since some moment


class Meter:
    """The joules that a device has taken since the meter was made.

    Args:
        device: a GPU counts by NVML, and the CPU packages by RAPL, for every device; what cannot be read is left out.

    Attributes:
        source: what is counted, in words; what is missing, where nothing is.
        available: whether anything is counted.
    """

    def __init__(self, device: torch.device):
        counters: dict[str, Counter] = {}
        missing = []
        if device.type == "cuda":
            counter, reason = _gpu(device)
            if counter is not None:
                counters[f"GPU {device.index or 0} (NVML)"] = counter
            missing.append(reason)
        packages, reason = _packages()
        if packages:
            counters[f"{counted(len(packages), 'CPU package')} (RAPL)"] = lambda: sum(
                package() for package in packages
            )
        missing.append(reason)
        # Half of what a run takes is no figure to compare: a GPU that cannot be read leaves nothing.
        wanted = "GPU" if device.type == "cuda" else "CPU"
        self.available = any(wanted in name for name in counters)
        self.source = ", ".join(counters) if self.available else "; ".join(filter(None, missing))
        self._counters = list(counters.values()) if self.available else []
        self._begun = self._read()
        self._read_at = time.monotonic()

    def _read(self) -> float:
        return sum(counter() for counter in self._counters)

    def joules(self) -> float:
        """What was taken so far."""
        self._read_at = time.monotonic()
        return self._read() - self._begun

    def keep_up(self) -> None:
        """Read the counters where that is due: RAPL's begin anew after some minutes. To be called often."""
        if time.monotonic() - self._read_at > _EVERY_S:
            self.joules()


def _gpu(device: torch.device) -> tuple[Counter | None, str]:
    """The counter of a GPU, or None and why there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "the GPU's energy needs NVML: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        identity = str(torch.cuda.get_device_properties(device).uuid)
        # By its identity: CUDA_VISIBLE_DEVICES gives GPUs other numbers than NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError) as error:
        return None, f"NVML does not tell the GPU's energy ({error})"

    def joules() -> float:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # of millijoules

    return joules, ""


def _packages() -> tuple[list[Counter], str]:
    """The counters of the CPU packages, or none and why."""
    folders = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))  # AMD's too
    counters: list[Counter] = []
    for folder in folders:
        with suppress(OSError, ValueError):
            # Parts of a package are counted with it, and "psys" is of the whole machine, packages included.
            if (folder / "name").read_text().startswith("package"):
                counters.append(_Package(folder).joules)
    if counters:
        return counters, ""
    if folders:
        return [], f"the CPU's energy needs the right to read {folders[0] / 'energy_uj'}"
    return [], "this machine does not tell the CPU's energy (no RAPL)"


class _Package:
    """RAPL's counter of one CPU package, which begins anew after some tens of kilojoules.

    Raises:
        OSError, ValueError: it cannot be read.
    """

    def __init__(self, folder: Path):
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._total = 0

    def joules(self) -> float:
        """Since it was made."""
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 10**6

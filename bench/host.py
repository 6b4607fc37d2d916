"""What else goes on in the machine while something is measured, and the energy that the device uses."""

import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

STAT, STATUS, CLEAR = Path("/proc/stat"), Path("/proc/self/status"), Path("/proc/self/clear_refs")
RAPL = Path("/sys/class/powercap")
BUSY = 0.1  # share of the processor's time that others may take before the table says so
SLOWED = {"SwPowerCap": "power", "SwThermalSlowdown": "heat", "HwSlowdown": "heat or power"}  # NVML's reasons


class Host(BaseModel):
    """The state of the machine during a measurement."""

    others_share: float | None = None  # of the processors' time, taken by other processes and by other machines' load
    sm_mhz: tuple[int, int] | None = None  # of an NVIDIA GPU, before and after
    temperature_c: tuple[int, int] | None = None
    slowed_by: list[str] = []

    def notes(self) -> list[str]:
        """What a reader must know before they believe the times."""
        lines = []
        if self.others_share is not None and self.others_share > BUSY:
            lines.append(f"The machine was busy: other processes took {self.others_share:.0%} of its processors' time.")
        if self.slowed_by:
            lines.append(f"The GPU slowed itself down because of {' and '.join(self.slowed_by)}.")
        if self.sm_mhz and self.temperature_c:
            clock, heat = (" to ".join(map(str, dict.fromkeys(ends))) for ends in (self.sm_mhz, self.temperature_c))
            lines.append(f"GPU: {clock} MHz, {heat} degrees Celsius, before and after.")
        return lines


@contextmanager
def watched(cuda: bool) -> Generator[Host]:
    """A `Host` that is complete when the context is left."""
    host = Host()
    before, gpu = _processor_seconds(), _gpu() if cuda else None
    clock = _gpu_state(gpu)
    yield host
    after = _processor_seconds()
    if before and after and after[0] > before[0]:
        total, idle, own = (end - begin for begin, end in zip(before, after))
        host.others_share = round(min(1.0, max(0.0, (total - idle - own) / total)), 3)
    if gpu and clock and (now := _gpu_state(gpu)):
        host.sm_mhz, host.temperature_c = (clock[0], now[0]), (clock[1], now[1])
        host.slowed_by = sorted(clock[2] | now[2])


def _processor_seconds() -> tuple[float, float, float] | None:
    """Seconds of all processors since the start, those without work, and those of this process and its children."""
    if not STAT.exists():
        return None
    ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:9]]  # user ... steal
    per_second, own = os.sysconf("SC_CLK_TCK"), os.times()
    own_seconds = own.user + own.system + own.children_user + own.children_system
    return sum(ticks) / per_second, (ticks[3] + ticks[4]) / per_second, own_seconds


def _gpu() -> Any:
    """NVML with the handle of the first visible GPU; None where nvidia-ml-py or the driver is not installed."""
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
    return None


def _gpu_state(gpu: Any) -> tuple[int, int, set[str]] | None:
    if gpu is None:
        return None
    nvml, handle = gpu
    mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    heat = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    slowed = {said for name, said in SLOWED.items() if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}")}
    return mhz, heat, slowed


def peak_bytes(status: Path = STATUS) -> int | None:
    """The most memory that this process, or that of `status`, has had at once; None on a system that does not say.

    Not `ru_maxrss` on Linux, which begins with the memory of the process that started this one.
    """
    if status.exists():
        line = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(line[1]) * 1024 if line else None
    with suppress(ImportError):  # as on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def reset_peak() -> int | None:
    """Has `peak_bytes` forget what is freed, where the system can (Linux). Returns what it then gives."""
    with suppress(OSError):
        CLEAR.write_text("5")
    return peak_bytes()


class Meter:
    """The joules that a device has used since some moment: NVML's for CUDA, else Intel's and AMD's RAPL."""

    def __init__(self, cuda: bool):
        self.gpu = _gpu() if cuda else None
        self.last: dict[Path, int] = {}
        for zone in [] if cuda else sorted(RAPL.glob("intel-rapl:?")):
            with suppress(OSError):  # this user may not read it
                self.last[zone] = _microjoules(zone)
        self.used = 0.0

    def __call__(self) -> float | None:
        """None where there is no meter, or where this user may not read it."""
        if self.gpu:
            nvml, handle = self.gpu
            try:
                return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except nvml.NVMLError:
                return None
        for zone, last in self.last.items():
            self.last[zone] = _microjoules(zone)
            wrapped = 0 if self.last[zone] >= last else int((zone / "max_energy_range_uj").read_text())
            self.used += (self.last[zone] - last + wrapped) / 1e6
        return self.used if self.last else None


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())

"""The state of the machine: from files of a system, and a GPU, that the test makes."""

import sys
from types import SimpleNamespace

import pytest

from expertgrid.bench import host
from expertgrid.bench.host import Host, Meter, watched


def test_the_share_of_other_processes(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(host, "STAT", stat)
    monkeypatch.setattr(host.os, "sysconf", lambda name: 100)
    own = iter([SimpleNamespace(user=seconds, system=0, children_user=0, children_system=0) for seconds in (1, 5)])
    monkeypatch.setattr(host.os, "times", lambda: next(own))
    stat.write_text("cpu  100 0 0 1000 0 0 0 0 0 0\n")
    with watched(cuda=False) as found:
        stat.write_text("cpu  700 0 0 1400 0 0 0 0 0 0\n")  # 10 s in all, 6 s busy, 4 s of this process
    assert found.others_share == pytest.approx(0.2)
    assert found.notes() == ["The machine was busy: other processes took 20% of its processors' time."]
    assert Host(others_share=0.05).notes() == []


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "STAT", tmp_path / "none")
    with watched(cuda=False) as found:
        pass
    assert found.others_share is None


def nvml(monkeypatch, reasons: int):
    class NVMLError(Exception):
        pass

    clocks, joules = iter([1980, 1200]), iter([5_000, 7_500])
    fake = SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=lambda handle, kind: next(clocks), nvmlDeviceGetTemperature=lambda handle, kind: 60,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(joules),
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_a_gpu_that_slows_down(monkeypatch):
    nvml(monkeypatch, 4 | 32)
    with watched(cuda=True) as found:
        pass
    assert found.notes()[-2:] == [
        "The GPU slowed itself down because of heat and power.",
        "GPU: 1980 to 1200 MHz, 60 degrees Celsius, before and after.",
    ]
    meter = Meter(cuda=True)
    assert [meter(), meter()] == [5.0, 7.5]


def test_the_fake_has_the_names_and_values_of_nvml(monkeypatch):
    pynvml = pytest.importorskip("pynvml")
    nvml(monkeypatch, 0)
    for name, value in vars(sys.modules["pynvml"]).items():
        assert callable(getattr(pynvml, name)) if callable(value) else getattr(pynvml, name) == value


def test_energy_of_a_processor(tmp_path, monkeypatch):
    """The counter begins again at its end; a part of a zone is not counted twice."""
    monkeypatch.setattr(host, "RAPL", tmp_path)
    for name, microjoules in (("intel-rapl:0", "900000"), ("intel-rapl:1", "0"), ("intel-rapl:0:0", "5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(microjoules)
        (tmp_path / name / "max_energy_range_uj").write_text("1000000")
    meter = Meter(cuda=False)
    assert meter() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000")
    assert meter() == pytest.approx(2.2)
    monkeypatch.setattr(host, "RAPL", tmp_path / "none")
    assert Meter(cuda=False)() is None

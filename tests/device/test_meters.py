"""Meters against readings as the devices give them, and integration against closed forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.device.errors import DeviceError
from mocosfl_priv.device.meters import (
    Energy,
    Ina219,
    Ina3221,
    Pi5Pmic,
    PowerMeter,
    ProcessMeter,
    Rapl,
    Sampler,
    idle_watts,
    open_meter,
    parse_pmic,
    read_usb_meter,
    trapezoid,
    usb_meter_energy,
)

# `vcgencmd pmic_read_adc` on a Raspberry Pi 5, as published in forums and by authors of monitoring tools
PI5 = """\
 3V7_WL_SW_A current(0)=0.00780744A
   3V3_SYS_A current(1)=0.12199130A
   1V8_SYS_A current(2)=0.24300660A
  DDR_VDD2_A current(3)=0.02147046A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.18640260A
    0V8_SW_A current(6)=0.26935670A
  VDD_CORE_A current(7)=0.75012000A
   3V3_DAC_A current(17)=0.00036630A
   3V3_ADC_A current(18)=0.00042735A
   0V8_AON_A current(16)=0.00579975A
      HDMI_A current(22)=0.01367520A
 3V7_WL_SW_V volt(8)=3.79999600V
   3V3_SYS_V volt(9)=3.30632200V
   1V8_SYS_V volt(10)=1.79828900V
  DDR_VDD2_V volt(11)=1.10292900V
  DDR_VDDQ_V volt(12)=0.60476130V
   1V1_SYS_V volt(13)=1.10439400V
    0V8_SW_V volt(14)=0.80256330V
  VDD_CORE_V volt(15)=0.89745940V
   3V3_DAC_V volt(20)=3.30494200V
   3V3_ADC_V volt(21)=3.30219400V
   0V8_AON_V volt(19)=0.79736190V
      HDMI_V volt(23)=5.07056000V
     EXT5V_V volt(24)=5.06788000V
      BATT_V volt(25)=3.01110800V
"""
# the format of a logger for FNIRSI meters; its packets of four overlap in time
FNIRSI = """\

timestamp sample_in_packet voltage_V current_A dp_V dn_V temp_C_ema energy_Ws capacity_As
1657568326.775 0 5.10000 0.60000 1.184 1.031 30.500 0.000000 0.000001
1657568326.785 1 5.10000 0.62000 1.184 1.033 30.500 0.000000 0.000001
1657568326.805 3 5.08000 0.64000 1.184 1.031 30.500 0.000000 0.000002
1657568326.795 2 5.09000 0.63000 1.184 1.030 30.500 0.000000 0.000002
"""


def test_pi5_rails_are_paired_by_name() -> None:
    by_hand = (
        0.00780744 * 3.799996 + 0.1219913 * 3.306322 + 0.2430066 * 1.798289 + 0.02147046 * 1.102929
        + 0.1864026 * 1.104394 + 0.2693567 * 0.8025633 + 0.75012 * 0.8974594 + 0.0003663 * 3.304942
        + 0.00042735 * 3.302194 + 0.00579975 * 0.7973619 + 0.0136752 * 5.07056
    )  # fmt: skip
    assert parse_pmic(PI5) == pytest.approx(by_hand, rel=1e-9)
    with pytest.raises(DeviceError, match="only a Pi 5"):
        parse_pmic('bad command: error=1 error_msg="Command not registered"\n')
    with pytest.raises(DeviceError, match="only a Pi 5"):
        parse_pmic("     EXT5V_V volt(24)=5.06788000V\n")


def test_pi5_runs_the_command(tmp_path: Path) -> None:
    command = tmp_path / "vcgencmd"
    command.write_text(f'#!/bin/sh\n[ "$1" = pmic_read_adc ] && cat <<EOF\n{PI5}EOF\n')
    command.chmod(0o755)
    assert Pi5Pmic(str(command)).read() == parse_pmic(PI5)
    command.write_text("#!/bin/sh\nexit 255\n")
    with pytest.raises(DeviceError, match="failed"):
        Pi5Pmic(str(command)).read()
    with pytest.raises(DeviceError, match="failed"):
        Pi5Pmic(str(tmp_path / "none")).read()


def test_ina219_words_of_the_data_sheet() -> None:
    """8300h in register 1 is -320 mV, 1F40h in bits 15 to 3 of register 2 is 32 V."""
    assert Ina219({1: 32000, 2: 0x1F40 << 3}.__getitem__, 1.0).read() == pytest.approx(0.32 * 32)
    assert Ina219({1: 0x8300, 2: 0x1F40 << 3}.__getitem__, 1.0).read() == pytest.approx(-0.32 * 32)
    # a Pi at 5.1 V and 0.62 A through 0.1 ohm: 62 mV, with the conversion-ready bit set
    assert Ina219({1: 6200, 2: 1275 << 3 | 2}.__getitem__, 0.1).read() == pytest.approx(5.1 * 0.62)


def test_ina3221_words_of_the_data_sheet() -> None:
    """C180h is -80 mV; 7FF8h is full scale, 163.8 mV and 32.76 V."""
    words = {1: 0xC180, 2: 0x7FF8, 3: 0x7FF8, 4: 625 << 3, 5: 500 << 3, 6: 0}
    assert Ina3221(words.__getitem__, 0.1).read() == pytest.approx(-0.8 * 32.76)
    assert Ina3221(words.__getitem__, 0.1, [2]).read() == pytest.approx(1.638 * 5)
    assert Ina3221(words.__getitem__, 0.1, [1, 2, 3]).read() == pytest.approx(1.638 * 5 - 0.8 * 32.76)
    for shunt, channels in ((0.1, [4]), (0.1, []), (0.0, [1]), (float("nan"), [1])):
        with pytest.raises(DeviceError):
            Ina3221(words.__getitem__, shunt, channels)


def powercap(root: Path, **zones: tuple[str, int]) -> None:
    for zone, (name, microjoules) in zones.items():
        folder = root / zone.replace("_", ":").replace("rapl", "intel-rapl")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")


def test_rapl_counts_packages_once_and_through_the_wrap(tmp_path: Path) -> None:
    powercap(tmp_path, rapl_0=("package-0", 262143000000), rapl_1=("package-1", 5), rapl_2=("psys", 9))
    powercap(tmp_path, rapl_0_0=("core", 1))
    meter = Rapl(tmp_path)
    first = meter.read()
    powercap(tmp_path, rapl_0=("package-0", 1_671_150), rapl_1=("package-1", 1_000_005), rapl_2=("psys", 9_000_000))
    readings = np.array([first, meter.read()])
    assert meter.joules(np.array([0.0, 1.0]), readings) == pytest.approx(2.0 + 1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("denied")
    with pytest.raises(DeviceError, match="no whole number"):
        meter.read()
    with pytest.raises(DeviceError, match="no RAPL packages"):
        Rapl(tmp_path / "none")


def test_usb_meter_logs(tmp_path: Path) -> None:
    log = tmp_path / "fnb58.txt"
    log.write_text(FNIRSI)
    times, watts = read_usb_meter(log)
    assert (np.diff(times) > 0).all()
    np.testing.assert_allclose(watts, [5.1 * 0.6, 5.1 * 0.62, 5.09 * 0.63, 5.08 * 0.64])
    log.write_text("Time(ms);Voltage(mV);Current(mA)\n0;5000;1000\n1000;5000;3000\n2000;5000;3000\n")
    energy = usb_meter_energy(log, 0.5, 2.0, idle=(0.0, 0.5))
    assert energy.joules == pytest.approx((10 + 15) / 2 * 0.5 + 15)
    assert energy.idle_watts == pytest.approx(7.5) and energy.seconds == 1.5
    assert energy.joules_above_idle == pytest.approx(21.25 - 7.5 * 1.5)
    log.write_text("time,power_W\n0,2\n10,4\n")
    assert usb_meter_energy(log, 0, 10).joules == pytest.approx(30)


@pytest.mark.parametrize(
    "text",
    ["time,power\n0,1\n", "time,volts\n0,1\n1,1\n", "a,b\n0,1\n1,1\n", "time,power\n0,x\n1,1\n",
     "time,power\n0,\n1,1\n", "time,power\n0,1\n1\n", "time,power\n0,1\n5,1\n"],
)  # fmt: skip
def test_usb_meter_logs_that_do_not_serve(text: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(text)
    with pytest.raises(DeviceError):
        usb_meter_energy(log, 0, 10)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 50)), min_size=2, max_size=20), st.floats(-3, 3))
def test_trapezoid_is_exact_for_straight_lines(steps: list[tuple[float, float]], slope: float) -> None:
    times = np.cumsum([step for step, _ in steps])
    span = times[-1] - times[0]
    exact = 7 * span + slope * (times[-1] ** 2 - times[0] ** 2) / 2
    assert trapezoid(times, 7 + slope * times) == pytest.approx(exact, abs=1e-9)


class Steady(PowerMeter):
    """A device that always takes as much; only the clock is real."""

    method = "steady"

    def __init__(self, watts: float, readings: int = 10**9) -> None:
        self.watts, self.left = watts, readings

    def read(self) -> float:
        self.left -= 1
        if self.left < 0:
            raise DeviceError("unplugged")
        return self.watts


def test_a_sampler_says_how_it_measured() -> None:
    meter = Steady(3.0)
    idle = idle_watts(meter, 0.02)
    with Sampler(meter, period=0.005) as sampler:
        time.sleep(0.05)
    energy = sampler.energy(idle)
    assert energy.watts == pytest.approx(3.0) and energy.idle_watts == pytest.approx(3.0)
    assert energy.joules == pytest.approx(3.0 * energy.seconds)
    assert energy.joules_above_idle == pytest.approx(0, abs=1e-9)
    assert energy.readings >= 2 and energy.readings_per_second == (energy.readings - 1) / energy.seconds
    assert energy.method == "steady"


def test_a_meter_that_fails_measures_nothing() -> None:
    with Sampler(Steady(3.0, readings=2), period=0.001) as sampler:
        time.sleep(0.02)
    energy = sampler.energy()
    assert energy == Energy("not measured: unplugged")
    assert energy.joules is energy.watts is energy.joules_above_idle is energy.readings_per_second is None


@pytest.mark.parametrize(
    "name", ["other", "ina219", "ina219:1:0x40", "ina219:x:0x40:0.1", "ina3221:1:64:0.1:a", "rapl:1"]
)
def test_meters_that_do_not_exist(name: str) -> None:
    with pytest.raises(DeviceError, match="meter"):
        open_meter(name)


FRESH_PROCESS = """
import json, time
import numpy as np
from mocosfl_priv.device.meters import ProcessMeter

meter = ProcessMeter()
block = np.ones(40 * 2**20, np.uint8)
begun = time.process_time()
while time.process_time() - begun < 0.02:
    pass
print(json.dumps(vars(meter.usage())))
"""


def test_the_process_meter_sees_memory_and_time() -> None:
    """In a process of its own: one that ran other tests has memory to use again."""
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True)
    usage = json.loads(done.stdout)
    assert usage["cpu_seconds"] >= 0.02
    assert 0.9 < usage["above_baseline_bytes"] / (40 * 2**20) < 1.5
    assert usage["peak_resident_bytes"] >= usage["resident_bytes"] > 40 * 2**20


def test_the_control_groups_peak_is_read_where_there_is_one(tmp_path: Path) -> None:
    process, groups = tmp_path / "self", tmp_path / "cgroup"
    process.mkdir()
    (process / "status").write_text("Name:\tpython\nVmHWM:\t   70656 kB\nVmRSS:\t   69632 kB\n")
    (process / "cgroup").write_text("1:name=systemd:/x\n0::/system.slice/client.service\n")
    assert ProcessMeter(process, groups).usage().cgroup_peak_bytes is None
    (groups / "system.slice/client.service").mkdir(parents=True)
    (groups / "system.slice/client.service/memory.peak").write_text("81264640\n")
    usage = ProcessMeter(process, groups).usage()
    assert usage.cgroup_peak_bytes == 81264640
    assert (usage.peak_resident_bytes, usage.resident_bytes) == (70656 * 1024, 69632 * 1024)
    (process / "status").write_text(os.linesep)
    with pytest.raises(DeviceError, match="VmRSS"):
        ProcessMeter(process, groups)

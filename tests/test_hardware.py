"""Chips' figures against their sources, and which slices there are."""

import json

import pytest

from gemmary.errors import GemmaryError
from gemmary.hardware import CHIPS, GRIDS, PUE, Sourced, Topology, chip_of, parse_topology


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_every_number_says_where_it_is_from(chip: object) -> None:
    numbers = [value for value in vars(chip).values() if isinstance(value, float)]
    assert len(numbers) == 7
    assert all(isinstance(number, Sourced) and number > 0 and number.source for number in numbers)


@pytest.mark.parametrize(
    ("chip", "port", "pod", "links"),
    [("v5e", 400e9, 6.4e12, 4), ("v6e", 800e9, 25.6e12, 4), ("v5p", 1200e9, None, 6)],
)
def test_networks_follow_from_googles_tables(chip: str, port: float, pod: float | None, links: int) -> None:
    # A chip's bandwidth both ways (bytes/s) and a pod's way out (bits/s), as its page has them.
    found = CHIPS[chip]
    assert found.links == links
    assert found.link == pytest.approx(0.9 * port / 2 / links)
    assert found.network == (pod / 256 / 8 if pod else 50e9 / 8)


def test_a_pods_peak_is_its_chips() -> None:
    assert 256 * CHIPS["v5e"].flops == pytest.approx(50.63e15, rel=0.01)
    assert 256 * CHIPS["v6e"].flops == pytest.approx(234.9e15, rel=0.01)
    assert 4096 * CHIPS["v4"].flops == pytest.approx(1.1e18, rel=0.03)


def test_what_nobody_published_says_so() -> None:
    assert {chip.name for chip in CHIPS.values() if chip.power.assumed} == {"v5e", "v5p", "v6e"}
    trillium, light = CHIPS["v6e"], CHIPS["v5e"]
    assert (trillium.flops / trillium.power) / (light.flops / light.power) == pytest.approx(1.67, rel=0.01)


def test_a_sourced_number_is_a_number() -> None:
    assert type(CHIPS["v5e"].flops * 2) is float
    assert json.dumps(PUE) == "1.09"
    assert all(0 < grid < 1 and grid.source for grid in GRIDS.values())
    # The United States' own totals of 2023: 1532 million tonnes for 4,183,271 million kWh.
    assert GRIDS["us"] == pytest.approx(1532e9 / 4183271e6, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L4", "l4"),
    ],
)  # fmt: skip
def test_devices_are_known_by_what_jax_calls_them(kind: str, name: str) -> None:
    assert chip_of(kind) is CHIPS[name]


def test_an_unknown_device_has_no_chip() -> None:
    assert chip_of("cpu") is None


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "wraps"),
    [
        ("v5e:1x1", 1, 1, (False, False)),
        ("v5e:8x16", 128, 16, (False, True)),
        ("v6e:16x16", 256, 32, (True, True)),
        ("v4:2x2x4", 16, 4, (False, False, False)),
        ("v5p:4x4x8", 128, 32, (True, True, True)),
        ("v5p:16x16x24", 6144, 1536, (True, True, True)),
        ("h100:8", 8, 1, (True,)),
    ],
)
def test_topologies(name: str, chips: int, hosts: int, wraps: tuple[bool, ...]) -> None:
    found = parse_topology(name)
    assert (found.chips, found.hosts, found.wraps) == (chips, hosts, wraps)
    assert str(found) == name
    assert parse_topology(f" {name.upper()} ") == found == Topology(CHIPS[name.split(":")[0]], found.dims)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:8x4", "nearest that exists is v5e:4x8"),
        ("v5e:32x32", "nearest that exists is v5e:16x16"),
        ("v5p:4x4x5", "nearest that exists is v5p:4x4x4"),
        ("v4:16x16x24", "nearest that exists is v4:16x16x16"),
        ("v5e:0x0", "nearest that exists is v5e:1x1"),
        ("h100:16", "nearest that exists is h100:8"),
        ("l4:2", "nearest that exists is l4:1"),
        ("v9:2x2", "no chip 'v9'"),
        ("v5e", "CHIP:SHAPE"),
        ("v5e:2x", "CHIP:SHAPE"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name: str, said: str) -> None:
    with pytest.raises(GemmaryError, match=said):
        parse_topology(name)


def test_a_shape_of_absurd_length_is_refused() -> None:
    with pytest.raises(GemmaryError, match="there is no v5e"):
        parse_topology("v5e:" + "x".join(["9" * 40] * 8))

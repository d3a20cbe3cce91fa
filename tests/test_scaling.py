"""What docs/scaling.md says of collectives is what the simulator says, and that is what was measured on CPUs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from compare import assert_simulated

from bench import scaling, scaling_cpu
from bench.simulate import Clock, Link, Machine, Send, Wait, Work, exchange, simulate

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
HELD = list(scaling_cpu.held_against(scaling_cpu.recorded()))
APART = Machine("a device each", Link(1.0, 10.0), None, memory=1.0, launch=0.0)
TWO_CORES = replace(APART, cores=2, switch=0.5)


def test_messages_take_turns_on_a_link_and_arrive_later():
    programs = [[Work(1), Send(1, 10, "a"), Send(1, 20, "b")], [Wait("b", 1)], [Wait("never", 0), Work(3)]]
    assert simulate(programs, APART) == [1, 1 + 1 + 2 + 1, 3]


def test_ranks_share_cores_and_turning_to_another_takes_time():
    alone = [[Work(2), *exchange(rank, range(2), 0, "in"), Work(1)] for rank in range(2)]
    assert simulate(alone, TWO_CORES) == [4, 4], "a core each: two, a hop, one"
    work = [[Work(2), *exchange(rank, range(3), 0, "in"), Work(1)] for rank in range(3)]
    # The third begins at two and finds the others' messages when it waits; they have its own at five.
    assert simulate(work, TWO_CORES) == [6.5, 6.5, 5]


def test_time_is_counted_from_where_a_rank_starts_its_clock():
    assert simulate([[Work(2), Clock(), Work(1)]], APART) == [1]


def rows_of(begin: str) -> list[list[str]]:
    """Cells of the page's table whose header begins so."""
    lines = PAGE[PAGE.index(begin) :].splitlines()
    until = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:until]]


def as_said(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def test_the_page_has_what_is_simulated_of_gpus():
    names = ["one shot", "two shot", "scattered", "ring, fused norm", "ring, one after the other"]
    said = rows_of("| tokens | MiB | " + " | ".join(names))
    assert [row[0] for row in said] == ["1", "16", "64", "256", "1024", "4096"]
    for tokens, _, *times in said:
        layer = scaling.Layer(int(tokens), scaling.HIDDEN)
        for name, time in zip(names, times, strict=True):
            assert time == as_said(1e6 * scaling.seconds(name, layer, 8, scaling.NVLINK)), f"{name}, {tokens} tokens"


def test_the_page_has_what_was_measured_and_simulated_on_cpus():
    said = rows_of("| ranks | tokens | measured")
    assert said == [[as_said(cell) for cell in row] for row in scaling_cpu.cells(HELD)]
    assert f"results/{scaling_cpu.RECORD.name}" in PAGE
    times = {
        (c["ranks"], c["key"]): c["times_faster"] for c in scaling_cpu.recorded()["collective"] if c["tokens"] == 1
    }
    for ranks, *each in rows_of("| ranks | no key"):
        keys = None, "INT8_DYNAMIC_TOKEN", "FP8_DYNAMIC_TOKEN"
        assert each == [f"{times[int(ranks), key]['gloo, torch.compile']:.1f}" for key in keys]


def assert_each_simulated(held: list[scaling_cpu.Held]) -> None:
    for name in scaling_cpu.CONTESTANTS:
        assert_simulated({f"{name}, {h.ranks} ranks, {h.rows}": h.ratio for h in held if h.name == name})


def test_simulated_times_are_near_those_measured():
    assert len(HELD) == 4 * 4 * 3 * len(scaling_cpu.CONTESTANTS)
    assert_each_simulated(HELD)


@pytest.mark.parametrize("without", ["cores", "switch", "message", "byte"])
def test_each_cost_is_needed(without):
    """Without any one of them the simulation is off by more than is said."""
    free = {"cores": {"cores": 0}, "switch": {"switch": 0.0}}.get(without)
    host = scaling_cpu.HOST
    host = replace(host, **{without: 0.0}) if free is None else replace(host, machine=replace(host.machine, **free))
    held = list(scaling_cpu.held_against(scaling_cpu.recorded(), host))
    with pytest.raises(AssertionError, match="off by"):
        assert_each_simulated(held)


def test_more_rows_take_two_shots():
    """Above the workspace's own limit, and faster then, as it was where that limit was measured."""
    rows = [scaling_cpu.Rows(tokens, 4096, tokens * 8192, None) for tokens in (512, 513)]
    waits = [sum(isinstance(s, Wait) for s in scaling_cpu.fused(r, 0, 8, scaling_cpu.HOST, 0)) for r in rows]
    assert waits == [1, 2]
    one, two = (scaling_cpu.seconds("fused_ops", r, 8) for r in rows)
    assert two < one
    assert math.isfinite(one)

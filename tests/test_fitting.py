"""Tables fitted to a network: how near they come to their teacher, what refuses, what is kept."""

import json
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphabar.noising import NoiseSchedule
from alphabar.sampling import TABLE_NAME, Knot, Sampler, Table, fit_table, table_error
from alphabar.sampling.fitting.fit import KNOWN_GRIDS, KNOWN_METHODS
from alphabar.sampling.fitting.regression import products, residuals, robust_solutions
from alphabar.sampling.fitting.student import Student
from alphabar.sampling.kernel import run

SCHEDULE = NoiseSchedule.scaled_linear()
FLOW = NoiseSchedule.flow()
UNUSED = range(5000, 5064)


class Mixture:
    """The exact epsilon for a mixture of Gaussians in 16 dimensions, moved by ``shift``."""

    def __init__(self, spread: float = 0.25) -> None:
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        self.spread = spread

    def __call__(self, x: Tensor, t: Tensor, shift: Any = 0.0) -> Tensor:
        time = t[:1].double()
        alpha, sigma = SCHEDULE.alpha(time).item(), SCHEDULE.sigma(time).item()
        means = self.means + torch.as_tensor(shift, dtype=torch.float64)[..., None, None]
        x = x.double()
        variance = (alpha * self.spread) ** 2 + sigma**2
        away = x[:, None] - alpha * means
        share = torch.softmax(-(away**2).sum(-1) / (2 * variance), -1)
        clean = (share[..., None] * (means + (alpha * self.spread**2 / variance) * away)).sum(1)
        return (x - alpha * clean) / sigma


class Small(nn.Module):
    """A small network on a flow, smooth in x and t."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(8, 8, generator=generator) / 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | float = 0.0) -> Tensor:
        return torch.tanh(x @ self.mix + y + (t / 1000)[:, None]) - x / 2


def best_known(network: Any, schedule: NoiseSchedule, steps: int, **arguments: Any) -> float:
    return min(
        table_error(Sampler(schedule, method, steps, grid), network, **arguments)
        for method in KNOWN_METHODS
        for grid in KNOWN_GRIDS
    )


def small_table(**changes: Any) -> Table:
    arguments = {"shape": (8,), "seeds": 16, "searches": 8, "teacher": Sampler(FLOW, "heun", 40)}
    return fit_table(changes.pop("network", Small()), FLOW, 4, **(arguments | changes))


@pytest.fixture(scope="module")
def table() -> Table:
    return small_table()


# -- how near ---------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluations", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_tenth_of_the_error_of_the_best_known_method_on_the_exact_mixture(evaluations):
    """On seeds that the fit has not seen, held out or not."""
    teacher, network = Sampler(SCHEDULE, "exponential_adams_4", 60, "karras"), Mixture()
    common: dict[str, Any] = {"shape": (16,), "batch_size": 128, "dtype": torch.float64}
    table = fit_table(
        network, SCHEDULE, evaluations, teacher=teacher, seeds=96, searches=16, refine=6, **common
    )
    common |= {"teacher": teacher, "seeds": UNUSED}
    error = table_error(table, network, **common)
    assert error < best_known(network, SCHEDULE, evaluations, **common) / 10
    assert table.evaluations == evaluations and table.provenance is not None
    assert 0.3 < table.provenance.error / error < 3


def test_refinement_lowers_the_error_on_unused_seeds(table):
    teacher = Sampler(FLOW, "heun", 40)
    refined = small_table(refine=4)
    errors = [
        table_error(each, Small(), teacher, shape=(8,), seeds=UNUSED) for each in (refined, table)
    ]
    assert refined.provenance is not None and refined.provenance.refined > 0
    assert errors[0] < 0.7 * errors[1]


def test_guidance_and_conditioning_are_part_of_the_fit():
    rows = torch.linspace(-1, 1, 16)[:, None]
    guided = {"unconditional": {"y": torch.zeros(16, 1)}, "guidance_scale": 3.0}
    table = small_table(conditioning={"y": rows}, **guided)
    assert table.provenance is not None and table.provenance.guidance_scale == 3.0
    by_seed = small_table(
        conditioning=lambda seeds: {"y": rows[list(seeds)]},
        unconditional=lambda seeds: {"y": torch.zeros(len(seeds), 1)},
        guidance_scale=3.0,
        batch_size=5,
    )
    assert by_seed.knots == table.knots
    for a, b in zip(by_seed.steps, table.steps, strict=True):
        assert dict(a.carry[0]) == pytest.approx(dict(b.carry[0]), rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match=r"guidance_scale=3, and this run has guidance_scale=1;"):
        Sampler.from_table(table)(Small(), (2, 8), conditioning={"y": rows[:2]})


@pytest.mark.parametrize(
    "case",
    [
        "2 seeds",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("untrained", "1000 steps earlier")),
    ],
)
def test_never_worse_than_the_best_known_method(case):
    network = Mixture()
    common: dict[str, Any] = {"shape": (16,), "batch_size": 128}
    fitted_to: Any = Mixture(0.3) if case.startswith("1000") else network
    schedule = SCHEDULE
    if case == "untrained":
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        network = fitted_to = lambda x, t: layer(x)
    teacher = Sampler(schedule, "exponential_adams_4", 40, "karras")
    seeds = 2 if case == "2 seeds" else 48
    table = fit_table(
        fitted_to, schedule, 5, teacher=teacher, seeds=seeds, searches=12, refine=3, **common
    )
    common |= {"teacher": teacher, "seeds": UNUSED}
    error = table_error(table, network, **common)
    assert error <= best_known(network, schedule, 5, **common) * 1.001


def test_without_a_gain_the_best_known_table_is_returned():
    """With a constant clean estimate every method is exact."""

    def network(x: Tensor, t: Tensor) -> Tensor:  # the velocity towards x_0 = 1
        return (x - 1) / (t[:, None] / 1000)

    table = small_table(network=network)
    assert table.provenance is not None and not table.provenance.helps
    name, error = table.provenance.best_known
    assert table.name == name.split(",")[0] and table.provenance.error == error < 1e-5
    x = Sampler.from_table(table)(network, (2, 8), seeds=0)
    torch.testing.assert_close(x, torch.ones(2, 8))


# -- the table ----------------------------------------------------------------------------------


def test_rows_replay_the_recurrence_of_the_student():
    """x_{i+1} = c_0 x_i + c_1 D_i + c_2 D_{i-1} + ..., for v-prediction, with D_i written out."""
    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction")
    knots = tuple(Knot(t, a, (1 - a * a) ** 0.5) for t, a in ((9.0, 0.0), (5.5, 0.5), (1.0, 0.9)))
    student = Student(
        (*knots, Knot(-1.0, 1.0, 0.0)), ((0.9, 0.2), (0.5, 0.4, -0.1), (0.1, 0.7, 0.3, -0.2))
    )
    made = Table("x", student.knots, student.steps(schedule), schedule.prediction, False)
    x = start = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimates: list[Tensor] = []
    times: list[float] = []
    for knot, row in zip(knots, student.rows, strict=True):
        estimates.insert(0, knot.alpha * x - knot.sigma * torch.sin(x))
        x = sum((c * v for c, v in zip(row, [x, *estimates], strict=True)), torch.zeros(2, 3))

    def evaluate(x: Tensor, knot: Knot) -> Tensor:
        times.append(knot.timestep)
        return torch.sin(x)

    *_, last = run(made, start, evaluate, lambda a, b: start)
    torch.testing.assert_close(last.x, x)
    assert times == [9.0, 5.5, 1.0]


def test_a_saved_table_is_read_back_exactly(table, tmp_path):
    path = table.save(tmp_path)
    assert path == tmp_path / TABLE_NAME and Table.load(tmp_path) == table == Table.load(path)
    samples = [
        Sampler.from_table(each)(Small(), (3, 8), seeds=7) for each in (table, Table.load(path))
    ]
    assert torch.equal(*samples)
    record = json.loads(path.read_text())["provenance"]
    assert record["guidance_scale"] == 1.0 and record["teacher"] == "heun, 40 steps, trailing"
    assert record["schedule"]["fingerprint"] == FLOW.fingerprint


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("version",), 9, "version 9"),
        (("steps", 1, "carry", 0, 0, 0), 99, "from 0 to"),
        (("steps", 0, "evaluations", 0, "p"), "1", "p must be a finite number"),
        (("steps",), [], "a table|steps need"),
        (("provenance", "error"), None, "error must be a finite number"),
        (("provenance", "schedule", "fingerprint"), "0", "fingerprint"),
    ],
)
def test_a_damaged_file_is_named(table, tmp_path, place, value, words):
    path = table.save(tmp_path / "t.json")
    config = json.loads(path.read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as error:
        Table.load(path)
    assert "t.json" in str(error.value)


def test_another_schedule_is_refused_by_name(table):
    with pytest.raises(ValueError, match=r"fitted under the schedule flow.*and this is flow.*fit"):
        Sampler.from_table(table, NoiseSchedule.flow(3.0))
    with pytest.raises(ValueError, match="use a table of fit_table"):
        Sampler.from_table(Sampler(FLOW, "euler", 4).table)
    with pytest.raises(ValueError, match="only a table of fit_table is saved"):
        Sampler(FLOW, "euler", 4).table.save("x.json")


def test_it_runs_wherever_a_sampler_does(table):
    import pickle

    sampler = Sampler.from_table(table)
    assert sampler.table == table == pickle.loads(pickle.dumps(sampler)).table
    whole = sampler(Small(), (4, 8), seeds=[3, 4, 5, 6])
    halves = [sampler(Small(), (2, 8), seeds=seeds) for seeds in ([3, 4], [5, 6])]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-5, atol=1e-6)
    *_, last = sampler.iterate(Small(), (4, 8), seeds=[3, 4, 5, 6])
    assert torch.equal(last.x, whole)
    with pytest.raises(ValueError, match="has 4 steps and no others, got 6"):
        Sampler(FLOW, sampler.method, 6, sampler.grid)
    later = sampler.table_from(2)
    assert len(later.steps) == 2 and all(len(step.carry) == 1 for step in later.steps)
    assert later.point_mass_defect() < 1e-12


def test_a_pipeline_scheduler_gives_the_sampler_s_result(table):
    sampler = Sampler.from_table(table)
    scheduler = sampler.as_scheduler()
    network = Small()
    x = start = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(x, sampler(network, start), rtol=1e-5, atol=1e-6)


# -- ranks --------------------------------------------------------------------------------------


def on_two_ranks(*arguments: dict[str, Any]) -> list[Table]:
    """Fit in two threads whose sums meet, as those of two ranks do."""
    meeting, sent, made = threading.Barrier(2, timeout=60), [Tensor(), Tensor()], [None, None]

    def work(rank: int) -> None:
        def total(tensor: Tensor) -> Tensor:
            sent[rank] = tensor
            meeting.wait()
            result = sent[0] + sent[1]
            meeting.wait()
            return result

        try:
            made[rank] = small_table(sum_over_ranks=total, **arguments[rank])  # type: ignore[assignment]
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made  # type: ignore[return-value]


def test_two_ranks_make_one_table_that_of_all_seeds():
    halves = [{"seeds": range(k, k + 5), "held_out": range(k + 20, k + 23)} for k in (0, 5)]
    first, second = on_two_ranks(*halves)
    assert first == second and first is not None
    alone = small_table(seeds=range(10), held_out=[*range(20, 23), *range(25, 28)])
    assert first.knots == alone.knots and first.provenance is not None
    assert (first.provenance.seeds, first.provenance.held_out) == (10, 6)
    for a, b in zip(first.steps, alone.steps, strict=True):
        assert dict(a.carry[0]) == pytest.approx(dict(b.carry[0]), rel=1e-4, abs=1e-6)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluations", "changes", "words"),
    [
        (1, {}, r"between 2 and the 40 steps of the teacher \(heun, 40 steps, trailing\), got 1"),
        (41, {}, "got 41"),
        (4, {"teacher": Sampler(NoiseSchedule.flow(3.0), "heun", 40)}, "teacher samples on flow"),
        (4, {"teacher": Sampler(FLOW, "euler_ancestral", 40)}, "draws noise"),
        (4, {"seeds": 0}, "at least 2 seeds"),
        (4, {"seeds": []}, "at least 2 seeds"),
        (4, {"seeds": 4, "held_out": [2]}, r"\[2\] are in both"),
        (4, {"start": "heun"}, "start='heun' must call the network once"),
        (4, {"start": "ipmdn"}, "did you mean 'ipndm'"),
        (4, {"guidance_scale": 2.0}, "needs unconditional"),
    ],
)
def test_bad_input_is_named(evaluations, changes, words):
    arguments = {"shape": (8,), "seeds": 4, "teacher": Sampler(FLOW, "heun", 40)} | changes
    with pytest.raises(ValueError, match=words):
        fit_table(Small(), FLOW, evaluations, **arguments)


def test_an_output_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="not finite after the network's call at timestep 1000"):
        small_table(network=lambda x, t: x * math.nan)


# -- parts --------------------------------------------------------------------------------------


def test_the_robust_solution_passes_over_a_few_bad_seeds():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(40, 2, 30, generator=generator, dtype=torch.float64)
    y = 2 * v[:, 0] - 3 * v[:, 1] + 1e-3 * torch.randn(40, 30, generator=generator)
    y[:4] = 20 * torch.randn(4, 30, generator=generator, dtype=torch.float64)
    grams = products([v[:, 0], v[:, 1], y])
    c = robust_solutions(grams, y.norm(dim=1), [1e-9], lambda tensor: tensor)[0]
    assert c.tolist() == pytest.approx([2.0, -3.0], abs=1e-3)
    assert residuals(grams, c)[4:].max() < 0.02

"""Counters, gauges and histograms in Prometheus' text format, version 0.0.4. Used from one thread, the event loop's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Counter:
    """A number that only grows, for each combination of labels."""

    kind = "counter"

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, by: float = 1.0) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + by

    def lines(self, name: str) -> list[str]:
        return [f"{name}{_braces(self.labels, values)} {_number(value)}" for values, value in sorted(self.values.items())]


class Gauge:
    """A number that is asked for when somebody looks."""

    kind = "gauge"

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read

    def lines(self, name: str) -> list[str]:
        return [f"{name} {_number(self.read())}"]


class Histogram:
    """How often a value was at most each bound, for each combination of labels."""

    kind = "histogram"

    def __init__(self, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> None:
        self.labels = tuple(labels)
        self.bounds = tuple(bounds)
        self.counts: dict[tuple[str, ...], list[int]] = {}
        self.sums: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, *labels: str) -> None:
        counts = self.counts.setdefault(labels, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        self.sums[labels] = self.sums.get(labels, 0.0) + value

    def lines(self, name: str) -> list[str]:
        out = []
        for values, counts in sorted(self.counts.items()):
            total = 0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                total += count
                out.append(f"{name}_bucket{_braces((*self.labels, 'le'), (*values, bound))} {total}")
            out.append(f"{name}_sum{_braces(self.labels, values)} {_number(self.sums[values])}")
            out.append(f"{name}_count{_braces(self.labels, values)} {total}")
        return out


class Metrics:
    """What a server measures of itself."""

    def __init__(self) -> None:
        self.requests = Counter(["route", "status"])
        self.request_seconds = Histogram(["route"])
        self.upstream_seconds = Histogram()
        self.upstream_failures = Counter(["kind"])
        self.pictures = Counter(["outcome", "reason"])
        self.flow_seconds = Histogram()
        self.batch_pictures = Histogram(["model"], COUNTS)
        self.refused_addresses = Counter()
        self.gauges: dict[str, tuple[str, Gauge]] = {}

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.gauges[name] = (text, Gauge(read))

    def render(self) -> str:
        families: list[tuple[str, str, Counter | Gauge | Histogram]] = [
            ("requests_total", "Requests answered, by route and status.", self.requests),
            ("request_seconds", "Seconds from a request's headers to its answer.", self.request_seconds),
            ("upstream_seconds", "Seconds that the upstream took for a whole answer.", self.upstream_seconds),
            ("upstream_failures_total", "Requests for which the upstream gave no pictures.", self.upstream_failures),
            ("pictures_total", "Pictures by what the flow did, and why it did nothing.", self.pictures),
            ("flow_seconds", "Seconds from an answer with pictures to the pictures after the flow.", self.flow_seconds),
            ("batch_pictures", "Pictures that one call of a model took.", self.batch_pictures),
            ("refused_addresses_total", "Addresses of pictures that were not fetched because they are not allowed.",
             self.refused_addresses),
            *((name, text, gauge) for name, (text, gauge) in self.gauges.items()),
        ]  # fmt: skip
        out = []
        for name, text, family in families:
            full = f"flowalign_{name}"
            out += [f"# HELP {full} {text}", f"# TYPE {full} {family.kind}", *family.lines(full)]
        return "\n".join(out) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def _braces(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

"""What all benchmarks share: rounds in which each contestant runs once, processes watched while they run, the page
cache made warm or cold, and a log of everything as JSON lines.

One run is compared only with the others of its round: machines change their speed from one minute to the next. The
order rotates, so that nobody always follows the same neighbour, and the first round is thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cache import make_cold, make_warm, sync_folder, warm_memory
from benchmarks.machine import describe
from benchmarks.process import Finished, watch
from benchmarks.tables import Log, joined, ratio_table, read_log

Sample = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark that runs in `folder`, which is empty and goes away: its options, and the log of its samples. With
    `--only` an `earlier` log keeps its other sections."""

    folder: Path
    options: argparse.Namespace
    log: Log
    earlier: Log

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def wanted(self, section: str) -> bool:
        """True unless `--only` names other sections."""
        return not self.options.only or section in self.options.only

    def rounds(self, section: str, contestants: Mapping[str, Callable[[], Sample]]) -> None:
        """Runs each contestant once in every round and logs what it returns: measures by name, seconds or bytes."""
        names = list(contestants)
        self.note(section, names=names)
        os.sync()
        for number in range(-self.options.warm_up, self.options.rounds):
            for name in [name for name in _rotated(list(contestants), number) if name in names]:
                self._clear()
                try:
                    sample = contestants[name]()
                except subprocess.CalledProcessError as error:
                    self._drop(section, name, str(error))
                    names.remove(name)
                    continue
                measures = " ".join(f"{key} {value:.4g}" for key, value in sample.items() if "." not in key)
                of = f"round {number + 1} of {self.options.rounds}" if number >= 0 else "thrown away"
                say(f"{section}, {of}, {name}: {measures}")
                if number >= 0:
                    self.log.append({"section": section, "round": number, "contestant": name, **sample})
            self._write()
        self._clear()

    def note(self, section: str, **facts: Any) -> None:
        """Logs facts that belong to no round."""
        self.log.append({"section": section, **facts})
        self._write()

    def table(self, section: str, measures: Mapping[str, str], *, to: str) -> None:
        """Prints a table of the rounds so far; see `tables.ratio_table`."""
        print(f"\n{ratio_table(self.log, section, measures, to=to)}", flush=True)

    def copy(self, base: Path, *, cache: str = "warm") -> Callable[[], Sample]:
        """A contestant: `cp -r` of `base`. See `merge` for what it measures."""
        return lambda: self._timed(["cp", "-r", str(base), str(self.output)], base, cache)[0]

    def merge(
        self,
        base: Path,
        adapter: Path,
        *options: str,
        nproc: int = 2,
        cache: str = "warm",
        cpus: set[int] | None = None,
        budget: str | None = None,
    ) -> Callable[[], Sample]:
        """A contestant: `distmerge merge`, with `cpus` on these cores alone.

        It measures seconds of the process (`whole`), with the output then synced (`durable`), from the first rank's
        start, after the plan, to the end of its last segment (`stream`) and of all ranks (`ranks`), when digests are
        there and files are durable; resident bytes of the process tree (`peak`) and of the largest process
        (`process_peak`); and the steps of the ranks' profiles (`profile.read` and so on), where distmerge tells them.
        """

        def run() -> Sample:
            log = self.folder / "run-log.jsonl"
            log.unlink(missing_ok=True)
            words = [*merge_command(base, adapter, self.output), "--nproc", str(nproc), "--run-log", str(log), *options]
            words += ["--memory-budget", budget] if budget else []
            sample, _ = self._timed(words, base, cache, cpus=cpus)
            return sample | run_log_times(log)

        return run

    def program(self, words: list[str], base: Path, **settings: Any) -> tuple[Sample, Finished]:
        """Runs any command that makes the output from `base`, with a warm cache."""
        return self._timed(words, base, "warm", **settings)

    def _timed(self, words: list[str], base: Path, cache: str, **settings: Any) -> tuple[Sample, Finished]:
        nbytes = sum(path.stat().st_size for path in base.iterdir())
        warm_memory(nbytes + max(nbytes, round(self.options.nbytes)) + (1 << 30))  # a packed base's output is larger
        share = make_cold(base) if cache == "cold" else make_warm(base)
        done = watch(words, cwd=self.folder, **settings)  # some tools leave caches where they run
        synced = sync_folder(self.output) if self.output.exists() else 0.0
        sample = {"whole": done.seconds, "durable": done.seconds + synced}
        sample |= {"peak": done.peak_nbytes, "process_peak": done.process_peak_nbytes}
        return sample if share is None else sample | {"cached": share}, done

    def _drop(self, section: str, name: str, why: str) -> None:
        """Goes on without a contestant that failed; the benchmark ends with an error."""
        say(f"{section}, {name} failed: {why}")
        self.log[:] = [line for line in self.log if (line["section"], line.get("contestant")) != (section, name)]
        self.note(section, failed=name, why=why)

    def _clear(self) -> None:
        """Removes the output, and lets the disk come to rest."""
        if left := list(self.folder.glob("output*")):
            for path in left:
                shutil.rmtree(path)
            os.sync()

    def _write(self) -> None:
        if self.options.log is not None:
            lines = [json.dumps(_rounded(line)) for line in joined(self.earlier, self.log)]
            self.options.log.parent.mkdir(parents=True, exist_ok=True)
            self.options.log.write_text("\n".join(lines) + "\n")


def arguments(description: str | None, *, nbytes: float = 3e9, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbytes", type=parse_nbytes, default=nbytes, help="bytes of the base, such as 3e9")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them that are thrown away")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    parser.add_argument("--log", type=Path, default=None, help="file for the raw log, JSON lines")
    parser.add_argument("--only", nargs="*", default=[], help="run these sections only; the log keeps its others")
    return parser


@contextlib.contextmanager
def bench(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> Iterator[Bench]:
    """A benchmark with the options of the command line; its first line of log describes the machine."""
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as name:
        machine = describe(Path(name))
        words = {key: value for key, value in vars(options).items() if key not in ("folder", "log", "peers_python")}
        say(f"machine: {machine}")
        run = Bench(
            folder=Path(name).resolve(),
            options=options,
            log=[{"section": "machine", **machine, "options": words}],
            earlier=read_log(options.log) if options.only and options.log and options.log.exists() else [],
        )
        yield run
    if failed := [line["failed"] for line in run.log if "failed" in line]:
        sys.exit(f"failed: {', '.join(failed)}")


def merge_command(base: Path, adapter: Path, output: Path) -> list[str]:
    """`distmerge merge` of these folders."""
    folders = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    return [sys.executable, "-m", "distmerge", "merge", *folders]


def run_log_times(path: Path) -> Sample:
    """Seconds from the first rank's start to the end of the last segment, and to that of the last rank; and those of
    each step of the profiles, of all ranks together, but of `start` and `publish` the longest."""
    ranks = [json.loads(line) for line in path.read_text().splitlines()]
    start = min(rank["start"] for rank in ranks)
    last = max(span["end"] for rank in ranks for span in rank["spans"])
    sample = {"stream": last - start, "ranks": max(rank["end"] for rank in ranks) - start}
    profiles = [rank["profile"] for rank in ranks if rank.get("profile")]
    for step in profiles[0] if profiles else ():
        add = max if step in ("start", "publish") else sum
        sample[f"profile.{step}"] = float(add(profile[step] for profile in profiles))
    return sample


def known_digests() -> list[str]:
    """The values of `--digest` that can be had here, the cheapest first; none if distmerge has no such option."""
    from distmerge.cli.main import cli

    options = {name: option for option in cli.commands["merge"].params for name in option.opts}
    choices = getattr(options["--digest"].type, "choices", ()) if "--digest" in options else ()
    absent = set() if importlib.util.find_spec("xxhash") else {"xxh3"}
    return [name for name in ("none", "crc32", "xxh3", "sha256") if name in choices and name not in absent]


def digest_options(digest: str) -> list[str]:
    """The options that choose `digest`; none where it cannot be chosen."""
    return ["--digest", digest] if digest in known_digests() else []


def compared_digests() -> list[str]:
    """The cheapest digest and the default one; one that has no name where there is no choice."""
    known = known_digests()
    return [name for name in ("none", "sha256") if name in known] or [""]


def titled(digest: str) -> str:
    """distmerge with `digest`, as tables name it."""
    return f"distmerge {digest}".strip()


def parse_nbytes(text: str) -> float:
    """A number of bytes written as 3e9."""
    if (value := float(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no size")
    return value


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}

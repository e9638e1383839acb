"""Random SIGKILLs over the merge of a real model on two ranks: `python -m tests.faults.torture --kills 500`.

A merge is killed up to eight times, each time at a random moment of what is left of it: a rank, the launcher, or all of
them. After each kill the output must be absent or whole; then the merge is let finish and compared with one that was
left alone. The log has a line of JSON for each kill and each finished merge; a run that is itself interrupted goes on
where its log ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import digests, tree
from tests.ranks.launching import Launch, assert_absent_or_whole, finished_segments, launch
from tests.real import smollm2

VICTIMS = ("rank 0", "rank 1", "launcher", "all")
MOST_KILLS = 8  # of one merge


def inputs(folder: Path) -> tuple[object, ...]:
    """SmolLM2-135M in NF4, in several shards, and a QLoRA that was trained on it: the options that name them."""
    packed = folder / "base"
    if not (packed / "config.json").exists():
        dense = smollm2.save_dense(folder / "dense")
        model = smollm2.packed_model(dense)
        model.save_pretrained(folder / "packing", max_shard_size="30MB")
        (folder / "packing").rename(packed)
        shutil.rmtree(dense)
    return ("--base", packed, "--adapter", smollm2.ADAPTER, "--max-shard-size", "40MB")


def kill(running: Launch, victim: str) -> bool:
    """Kills `victim` of a merge that runs. False if it had ended."""
    ranks = running.ranks()
    chosen = list(ranks.values()) if victim == "all" else [ranks[r] for r in ranks if victim == f"rank {r}"]
    if victim in ("launcher", "all") and running.process.poll() is None:
        chosen.insert(0, psutil.Process(running.process.pid))
    hit = False
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            hit = True
    return hit


class Torture:
    """Kills and reruns of one merge; `expected` is what it gives when it is left alone, after `seconds`."""

    def __init__(self, args: tuple[object, ...], folder: Path, log: Path) -> None:
        self._args, self._log = args, log
        self.output = folder / "attempt" / "merged"
        self.output.parent.mkdir(exist_ok=True)
        alone = folder / "alone" / "merged"
        shutil.rmtree(alone.parent, ignore_errors=True)
        alone.parent.mkdir()
        started = time.monotonic()
        with launch(*args, output=alone, nproc=2) as running:
            assert running.wait() == 0, running.stderr
        self.seconds = time.monotonic() - started
        self.expected, self.weights = tree(alone), digests(alone)
        shutil.rmtree(alone.parent)

    def note(self, **fields: Any) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def noted(self) -> Iterator[dict[str, Any]]:
        if self._log.exists():
            for line in self._log.read_text().splitlines():
                yield json.loads(line)

    def hurt(self, number: int, draw: random.Random) -> bool:
        """Kills once, at a random moment, and looks at what is left. False if the merge had ended before."""
        victim, lines = draw.choice(VICTIMS), draw.randrange(-4, 12)
        delay = draw.uniform(0.0, 0.1) if lines >= 0 else draw.uniform(0.0, self.seconds)
        with launch(*self._args, output=self.output, nproc=2) as running:
            self.wait(running, lines, delay)
            hit = running.process.poll() is None and kill(running, victim)
            code = running.wait()
            outlived = len(running.survivors(30))
        lost, wrong = self.judge()
        done = self.output.exists()
        self.note(
            kill=number,
            victim=victim,
            lines=lines,
            delay=round(delay, 3),
            hit=hit,
            exit=code,
            outlived=outlived,
            segments=len(finished_segments(running.work)),
            published=done,
            lost=lost,
            wrong=wrong,
        )
        if done:
            shutil.rmtree(self.output)
            shutil.rmtree(running.work, ignore_errors=True)
        return hit

    def wait(self, running: Launch, lines: int, delay: float) -> None:
        """Waits for `delay` seconds, from the start or, if `lines` says so, once so many more segments are recorded."""
        before, work = len(finished_segments(running.work)), running.work
        deadline = 0.0 if lines >= 0 else time.monotonic() + delay
        while running.process.poll() is None and (deadline == 0.0 or time.monotonic() < deadline):
            ranks = running.ranks()  # it remembers them
            if deadline == 0.0 and ranks and len(finished_segments(work)) >= before + lines:
                deadline = time.monotonic() + delay
            time.sleep(0.005)

    def finish(self, kills: int) -> None:
        """Lets the merge finish, and compares."""
        started = time.monotonic()
        with launch(*self._args, output=self.output, nproc=2) as running:
            code = running.wait()
        kept = next((line for line in running.stderr.splitlines() if line.startswith("resumed")), "")
        lost = int(code != 0 or not self.output.exists() or running.work.exists())
        wrong = int(not lost and tree(self.output) != self.expected)
        words = running.stderr[-2000:] if lost or wrong else ""
        self.note(
            finished=kills,
            exit=code,
            kept=kept,
            seconds=round(time.monotonic() - started, 3),
            lost=lost,
            wrong=wrong,
            words=words,
        )
        shutil.rmtree(self.output, ignore_errors=True)
        if lost:
            shutil.rmtree(running.work, ignore_errors=True)

    def judge(self) -> tuple[int, int]:
        """1 for an output that is there and lacks files, 1 for anything that is there and not what it should be."""
        try:
            assert_absent_or_whole(self.output, self.weights)
            return 0, int(self.output.exists() and tree(self.output) != self.expected)
        except AssertionError:
            lacks = self.output.exists() and tree(self.output).keys() != self.expected.keys()
            return int(lacks), int(not lacks)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the log adds up to."""
    kills = [line for line in lines if line.get("hit")]
    ends = [line for line in lines if "finished" in line]
    return {
        "faults injected": len(kills),
        "victims": dict(Counter(line["victim"] for line in kills)),
        "runs": len([line for line in lines if "kill" in line]) + len(ends),
        "merges finished": len(ends),
        "resumed": sum(bool(line["kept"]) for line in ends),
        "ranks that outlived": sum(line["outlived"] for line in kills),
        "outputs lost": sum(line["lost"] for line in lines if "lost" in line),
        "outputs wrong": sum(line["wrong"] for line in lines if "wrong" in line),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="random SIGKILLs over the merge of a real model")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("build/torture"), help="for the model and the outputs")
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/torture.jsonl"))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    chosen.log.parent.mkdir(parents=True, exist_ok=True)
    torture = Torture(inputs(chosen.folder.resolve()), chosen.folder.resolve(), chosen.log)
    lines = [line for line in torture.noted() if "summary" not in line]
    count = sum(bool(line.get("hit")) for line in lines)
    started, since = time.monotonic(), 0
    while count < chosen.kills:
        # A draw for each moment, so that a run that goes on does what it would have done.
        draw = random.Random(f"{chosen.seed} {sum(1 for _ in torture.noted())}")
        hit = torture.hurt(count + 1, draw)
        count, since = count + hit, since + 1
        if draw.random() < 1.5 / MOST_KILLS or since == MOST_KILLS or count == chosen.kills:
            torture.finish(since)
            since = 0
    found = summary([line for line in torture.noted() if "summary" not in line])
    torture.note(summary=found, seconds=round(time.monotonic() - started, 1), alone=round(torture.seconds, 2))
    names = ("faults injected", "runs", "outputs lost", "outputs wrong")
    print("| faults | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    print("| SIGKILL of a rank, the launcher or all | " + " | ".join(str(found[name]) for name in names) + " |")
    print(json.dumps(found))
    return int(bool(found["outputs lost"] or found["outputs wrong"] or found["ranks that outlived"]))


if __name__ == "__main__":
    raise SystemExit(main())

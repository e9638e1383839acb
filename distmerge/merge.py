"""The whole run in order: plan, claim, read, dequantize, apply, write, gather, verify, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from distmerge.budget import budget_here
from distmerge.claim import claims
from distmerge.config import MergeConfig
from distmerge.errors import InputError, MachineError, printable
from distmerge.input_files import input_files
from distmerge.plan import Plan, make_plan
from distmerge.progress import Display, Snapshot, clock, gigabytes
from distmerge.publish import check_output, is_published, publish
from distmerge.receipt import hashed
from distmerge.report.profile import profile_table
from distmerge.report.verdict import judge
from distmerge.runlog import check_run_log, write_run_log
from distmerge.share import Records, Share
from distmerge.storage.collector import uncollected
from distmerge.unchanged import check_unchanged
from distmerge.verify import check_headers, check_inputs, check_records
from distmerge.work import WorkFolder
from distmerge.world import World


def merge(config: MergeConfig, work: WorkFolder, world: World, display: Display, since: float) -> None:
    """Merges as `config` says, together with the other ranks of `world`; on return the output is published.

    The run began `since` then, in Unix seconds. Raises InputError before anything is written, VerifyError before
    anything is published, MachineError, Interrupted or PeerFailed at any time; the output is then absent, and the same
    command resumes.
    """
    started = time.monotonic()
    device = world.device(config.device)
    planned = world.first("plan", lambda: _plan(config, work, world, display, device.type))  # plan
    if planned is None:
        return
    plan = work.load(planned)
    with (
        display.watching(world.reports, sum(task.nbytes for task in plan.tasks), _recorder(work)),
        Share(plan, config, work, world, device, since=since) as share,
    ):
        for segment in claims(plan, world):  # claim
            share.do(segment)  # read, dequantize, apply, write
        gathered = world.collect("records", share.records().to_json())  # gather
    world.first("publish", lambda: _publish(config, plan, work, gathered, display))  # verify, publish
    display.say(_closing(config, plan, time.monotonic() - started))


def _plan(config: MergeConfig, work: WorkFolder, world: World, display: Display, device: str) -> str | None:
    """The digest of the plan that is ready in the work folder, or None if its result is published already."""
    check_output(config)
    check_run_log(config)
    plan = make_plan(config, device, scratch=work.scratch() if config.allow_pickle else None)
    for note in plan.notes:
        display.say(f"note     {note}")
    for warning in plan.warnings:
        display.say(f"warning  {warning}")
    if is_published(config, plan):
        display.say(f"done     {config.output} holds the result of this merge already")
        work.clear_after(plan)
        return None
    budget_here(plan, config.memory_budget, world.place.local_size)  # refuses what could not run
    world.check()  # the last moment at which stopping leaves nothing behind
    digest = work.open(plan)
    try:
        if is_published(config, plan):  # another merge has done so while this one waited for the folder
            work.discard()
            return None
    except InputError:
        work.leave_if_fresh()
        raise
    num_merged = sum(task.kind == "merge" for task in plan.tasks)
    display.say(
        f"plan     {len(plan.tasks)} tensors, {num_merged} of them merged, into {len(plan.files)} files of "
        f"{gigabytes(plan.nbytes_to_write)}, on {device}"
    )
    work.event("planned", plan=digest, num_tensors=len(plan.tasks), nbytes=plan.nbytes_to_write)
    return digest


@uncollected()
def _publish(config: MergeConfig, plan: Plan, work: WorkFolder, gathered: list[str], display: Display) -> None:
    """Proves the records of all ranks against the plan, and publishes."""
    started = time.monotonic()
    records = [Records.from_json(text) for text in gathered]
    segments = [segment for record in records for segment in record.segments]
    shards = [shard for record in records for shard in record.shards]
    check_records(plan, segments, shards)
    check_headers(plan, work.model)
    inputs = sorted((each for record in records for each in record.inputs), key=lambda each: each.name)
    check_inputs(input_files(plan, config) if plan.hash_inputs else (), inputs)
    check_unchanged(config, plan, work)
    receipt = publish(config, plan, work, segments, shards, inputs=inputs)
    if kept := sum(record.num_kept for record in records):
        display.say(f"resumed  {kept} of {len(plan.segments)} segments were finished by an earlier run")
    display.say(
        f"proven   {len(receipt.ledger)} adapter tensors applied exactly once, {len(plan.tasks)} tensors written, "
        f"{hashed(receipt.files.values())}{', read back from storage' * config.read_back}"
    )
    if inputs:
        known = sum(each.on_hub for each in inputs)
        display.say(f"inputs   {len(inputs)} files hashed, {known} of them as the Hub has them")
    verdict = judge(receipt.tensors)
    if verdict.packing:
        display.say(f"packed   {verdict.packing}")
    if verdict.warning:
        display.say(f"warning  {verdict.warning}")
    logs = [record.log for record in records]
    logs[0] = logs[0].published_in(time.monotonic() - started)
    if config.profile:
        for line in profile_table(logs):
            display.say(line)
    if config.run_log is not None:
        try:
            write_run_log(config.run_log, logs)
        except MachineError as error:  # the merge is published; nothing is gained by failing now
            display.say(f"warning  {error.where}: {error.what}")


def _recorder(work: WorkFolder) -> Callable[[Snapshot], None]:
    def record(snapshot: Snapshot) -> None:
        work.write_status({"state": "merging", "exit_code": None, **asdict(snapshot)})

    return record


def _closing(config: MergeConfig, plan: Plan, seconds: float) -> str:
    rate = plan.nbytes_to_write / seconds / 1e9 if seconds else 0.0
    size = gigabytes(plan.nbytes_to_write)
    return f"done     {printable(str(config.output))}  {size} in {clock(seconds)}  ({rate:.2f} GB/s)"
